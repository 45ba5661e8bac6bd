"""What the environment may say: good values, wrong ones all named at once, and --help."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import WORKER, clean_environment

DOCUMENTED = {
    "BARK_VOICE", "BARK_VOICES_DIR", "TTS_MAX_LENGTH", "PORT", "HOST", "HF_HOME", "BARK_MODEL",
    "BARK_DEVICE",
    "BARK_DTYPE", "BARK_API_KEY", "BARK_MAX_BATCH", "BARK_MAX_QUEUE", "BARK_TIMEOUT",
    "BARK_DETERMINISTIC", "BARK_EXPRESSION", "BARK_CACHE_MB", "BARK_CORS_ORIGINS",
    "BARK_QUALITY", "BARK_RETRIES", "BARK_LISTEN", "BARK_WORD_ERRORS", "BARK_IDLE_STOP",
    "BARK_START_LIMIT", "BARK_MAX_HOURS", "BARK_METRICS", "BARK_LOG_FORMAT",
}

GOOD = [
    ("BARK_VOICE", "male", "voice", "male"),
    ("BARK_VOICE", "v2/de_speaker_3", "voice", "v2/de_speaker_3"),
    ("BARK_VOICES_DIR", "/my voices", "voices_dir", "/my voices"),
    ("TTS_MAX_LENGTH", "1", "max_text_length", 1),
    ("TTS_MAX_LENGTH", "1000000", "max_text_length", 1_000_000),
    ("PORT", "0", "port", 0),
    ("PORT", "65535", "port", 65535),
    ("PORT", "08080", "port", 8080),
    ("HOST", "::1", "host", "::1"),
    ("BARK_MODEL", "/models/my bark", "model", "/models/my bark"),
    ("BARK_DEVICE", "cpu", "device", "cpu"),
    ("BARK_DEVICE", "cuda", "device", "cuda:0"),
    ("BARK_DEVICE", "cuda:1", "device", "cuda:1"),
    ("BARK_DTYPE", "bfloat16", "dtype", "bfloat16"),
    ("BARK_API_KEY", "s3cret!~", "api_key", "s3cret!~"),
    ("BARK_MAX_BATCH", "256", "max_batch", 256),
    ("BARK_MAX_QUEUE", "1", "max_queue", 1),
    ("BARK_TIMEOUT", "0.5", "timeout", 0.5),
    ("BARK_TIMEOUT", "90", "timeout", 90.0),
    ("BARK_DETERMINISTIC", "on", "deterministic", True),
    ("BARK_DETERMINISTIC", "off", "deterministic", False),
    ("BARK_EXPRESSION", "off", "expression", False),
    ("BARK_CACHE_MB", "0", "cache_mb", 0),
    ("BARK_QUALITY", "off", "quality", False), ("BARK_RETRIES", "0", "retries", 0),
    ("BARK_LISTEN", "off", "listen", None), ("BARK_LISTEN", "tiny.en", "listen", "tiny.en"),
    ("BARK_LISTEN", "me/whisper", "listen", "me/whisper"), ("BARK_LISTEN", "/", "listen", "/"),
    ("BARK_WORD_ERRORS", ".5", "word_errors", 0.5), ("BARK_WORD_ERRORS", "0", "word_errors", 0.0),
    ("BARK_CORS_ORIGINS", "*", "cors_origins", ("*",)),
    ("BARK_CORS_ORIGINS", "https://Reader.example, app://x:1,null", "cors_origins",
     ("https://reader.example", "app://x:1", "null")),
    ("BARK_METRICS", "open", "metrics", "open"), ("BARK_METRICS", "key", "metrics", "key"),
    ("BARK_LOG_FORMAT", "json", "log_format", "json"),
    ("BARK_IDLE_STOP", "30", "idle_stop", 30.0), ("BARK_IDLE_STOP", "0.05", "idle_stop", 0.05),
    ("BARK_IDLE_STOP", "10080", "idle_stop", 10_080.0),
    ("BARK_START_LIMIT", ".5", "start_limit", 0.5), ("BARK_MAX_HOURS", "8.", "max_hours", 8.0),
]

WRONG = [
    ("BARK_VOICE", "a\nb", "printable"), ("BARK_VOICE", "a\x00", "printable"),
    ("TTS_MAX_LENGTH", "0", "from 1 to 1000000"), ("TTS_MAX_LENGTH", "1e3", "from 1 to 1000000"),
    ("TTS_MAX_LENGTH", "-5", "from 1 to 1000000"), ("TTS_MAX_LENGTH", "٣", "from 1 to 1000000"),
    ("TTS_MAX_LENGTH", "1000001", "from 1 to 1000000"), ("TTS_MAX_LENGTH", " 5", "from 1 to"),
    ("PORT", "65536", "from 0 to 65535"), ("PORT", "http", "from 0 to 65535"),
    ("PORT", "9" * 5000, "from 0 to 65535"), ("PORT", "1_0", "from 0 to 65535"),
    ("HOST", "a\tb", "printable"), ("BARK_MODEL", "a\x1bb", "printable"),
    ("BARK_DEVICE", "gpu", "cpu, cuda or cuda:N"), ("BARK_DEVICE", "cuda:", "cpu, cuda or cuda:N"),
    ("BARK_DEVICE", "CUDA:0", "cpu, cuda or cuda:N"), ("BARK_DEVICE", "cuda:-1", "cpu, cuda or"),
    ("BARK_DTYPE", "fp16", "float16 or bfloat16 or float32"), ("BARK_DTYPE", "int8", "float16 or"),
    ("BARK_API_KEY", "a b", "without blanks"), ("BARK_API_KEY", "clé", "ASCII"),
    ("BARK_MAX_BATCH", "0", "from 1 to 256"), ("BARK_MAX_BATCH", "257", "from 1 to 256"),
    ("BARK_MAX_QUEUE", "0", "from 1 to 100000"), ("BARK_MAX_QUEUE", "many", "from 1 to 100000"),
    ("BARK_TIMEOUT", "0", "more than 0"), ("BARK_TIMEOUT", "0.0", "more than 0"),
    ("BARK_TIMEOUT", "-1", "more than 0"), ("BARK_TIMEOUT", "nan", "more than 0"),
    ("BARK_TIMEOUT", "inf", "more than 0"), ("BARK_TIMEOUT", "10m", "more than 0"),
    ("BARK_DETERMINISTIC", "yes", "on or off"), ("BARK_DETERMINISTIC", "1", "on or off"),
    ("BARK_EXPRESSION", "no", "on or off"),
    ("BARK_LISTEN", "tyni", "tiny, base, small"), ("BARK_LISTEN", "on", "a hub id such as"),
    ("BARK_LISTEN", "/nonexistent", "or a folder"), ("BARK_WORD_ERRORS", "35%", "0 to 9.9999"),
    ("BARK_QUALITY", "high", "on or off"), ("BARK_RETRIES", "11", "from 0 to 10"),
    ("BARK_CACHE_MB", "-1", "from 0 to 1000000"), ("BARK_CACHE_MB", "1.5", "from 0 to 1000000"),
    ("BARK_METRICS", "on", "key or open"), ("BARK_LOG_FORMAT", "JSON", "text or json"),
    ("BARK_IDLE_STOP", "-1", "minutes from 0 to 10080"),
    ("BARK_IDLE_STOP", "30m", "minutes from 0 to 10080"), ("BARK_IDLE_STOP", "nan", "minutes"),
    ("BARK_IDLE_STOP", ".", "0 is off"), ("BARK_IDLE_STOP", "off", "0 is off"),
    ("BARK_IDLE_STOP", "٣", "minutes from 0"), ("BARK_IDLE_STOP", "10080.1", "to 10080"),
    ("BARK_START_LIMIT", "inf", "minutes from 0"), ("BARK_START_LIMIT", "1e3", "minutes from 0"),
    ("BARK_MAX_HOURS", "8761", "hours from 0 to 8760"), ("BARK_MAX_HOURS", " 8", "hours from 0"),
    ("BARK_CORS_ORIGINS", "https://a.example/", "without a path"),
    ("BARK_CORS_ORIGINS", "a.example", "origins such as"),
    ("BARK_CORS_ORIGINS", "http://*.example.org", "each in full"),
    ("BARK_CORS_ORIGINS", "https://a.example,", "origins such as"),
]


@pytest.mark.parametrize(("name", "value", "field", "expected"), GOOD)
def test_a_good_value_reaches_its_field_and_no_other(
        bark: ModuleType, name: str, value: str, field: str, expected: Any) -> None:
    config = bark.Config.from_env({name: value, "PATH": "/bin"})
    assert getattr(config, field) == expected
    assert bark.replace(config, **{field: getattr(bark.Config(), field)}) == bark.Config()


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(
        bark: ModuleType, name: str, value: str, allowed: str) -> None:
    with pytest.raises(bark.ConfigError) as error:
        bark.Config.from_env({name: value})
    message = str(error.value)
    assert f"  {name}" in message and allowed in message
    assert (repr(value)[1:-1] in message) or name == "BARK_API_KEY" or not value.isascii() \
        or len(value) > 60
    assert len(message) < 250 and message.isprintable() == ("\n" not in message)


def test_all_wrong_values_are_named_at_once(bark: ModuleType) -> None:
    wrong = {name: value for name, value, _ in WRONG}
    with pytest.raises(bark.ConfigError) as error:
        bark.Config.from_env(wrong)
    first, *rest = str(error.value).splitlines()
    assert first == "wrong configuration:"
    assert sorted(line.split()[0] for line in rest) == sorted(wrong)


def test_an_empty_value_counts_as_unset(bark: ModuleType) -> None:
    empty = {variable.name: "" for variable in bark.VARIABLES}
    assert bark.Config.from_env(empty) == bark.Config.from_env({}) == bark.Config()


def test_the_key_shows_neither_in_errors_nor_in_the_settings(bark: ModuleType) -> None:
    with pytest.raises(bark.ConfigError) as error:
        bark.Config.from_env({"BARK_API_KEY": "open sesame", "PORT": "x"})
    assert "sesame" not in str(error.value) + repr(error.value)
    assert "sesame" not in repr(bark.Config.from_env({"BARK_API_KEY": "sesame"}))


def test_a_container_of_vasts_is_known_by_its_number_and_key(bark: ModuleType) -> None:
    """As anything may be called so elsewhere, what is neither is no fault."""
    given = {"CONTAINER_ID": "7", "CONTAINER_API_KEY": "sesame"}
    container = bark.Config.from_env(given).container
    assert (container.instance, container.key, container.url) == (
        "7", "sesame", "https://console.vast.ai")
    assert "sesame" not in repr(container)
    assert bark.Config.from_env({**given, "VAST_URL": "http://a:1/"}).container.url == "http://a:1"
    for wrong in ({"CONTAINER_ID": "0af3c2"}, {"CONTAINER_ID": ""}, {"CONTAINER_API_KEY": ""},
                  {"CONTAINER_API_KEY": "a b"}):
        assert bark.Config.from_env({**given, **wrong}).container is None


def test_defaults_in_help_are_the_real_ones(bark: ModuleType) -> None:
    shown = {variable.field: variable.default for variable in bark.VARIABLES}
    real = {name: str(value) for name, value in vars(bark.Config()).items() if value is not None}
    real |= {"deterministic": "off", "timeout": "600", "cors_origins": "none",
             "expression": "on", "quality": "on", "idle_stop": "0", "start_limit": "0",
             "max_hours": "0"}
    assert real.items() <= shown.items()
    assert {variable.name for variable in bark.VARIABLES} | {"HF_HOME"} == DOCUMENTED


def test_help_lists_every_variable_with_its_default(
        bark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bark.main(["--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name in DOCUMENTED:
        row = next(line for line in lines if line.startswith(f"  {name} "))
        assert "(default: " in row
    for variable in bark.VARIABLES:
        assert any(variable.meaning in line and variable.default in line for line in lines)


def test_wrong_configuration_names_every_wrong_variable_and_no_key(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"PORT": "http", "TTS_MAX_LENGTH": "0", "BARK_DEVICE": "tpu", "BARK_DTYPE": "int4",
             "BARK_MAX_BATCH": "1e3", "BARK_MAX_QUEUE": "-1", "BARK_TIMEOUT": "soon",
             "BARK_DETERMINISTIC": "yes", "BARK_API_KEY": "my secret"}
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bark, "serve", lambda *_: pytest.fail("served all the same"))
    with pytest.raises(SystemExit) as end:
        bark.main([])
    assert end.value.code == 2
    told = capsys.readouterr()
    output = told.err
    for name, value in wrong.items():
        assert name in output and (name == "BARK_API_KEY" or repr(value) in output)
    assert told.out == "" and "secret" not in output and "Traceback" not in output


@pytest.mark.parametrize(("words", "settings", "status"), [
    (["--help"], {}, 0), (["--version"], {}, 0), (["--hlep"], {}, 2), ([], {"PORT": "x"}, 2)])
def test_nobody_waits_for_torch_to_learn_what_takes_none(
        tmp_path: Path, words: list[str], settings: dict[str, str], status: int) -> None:
    """Torch, transformers and numpy are not even touched, with which it would take seconds."""
    for name in ("torch", "transformers", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was asked for')")
    done = subprocess.run([sys.executable, WORKER, *words], capture_output=True, text=True,
                          env=clean_environment(PYTHONPATH=str(tmp_path), **settings))
    assert (done.returncode, "asked for" in done.stderr) == (status, False)
    assert done.stdout or "PORT is 'x'" in done.stderr or "--hlep" in done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_worker_that_is_still_importing(
        tmp_path: Path, number: int, status: int) -> None:
    """Process 1 of a container has no end but its own handlers."""
    (tmp_path / "torch.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)")
    with subprocess.Popen([sys.executable, WORKER], stdout=subprocess.PIPE, text=True,
                          env=clean_environment(PYTHONPATH=str(tmp_path))) as process:
        assert process.stdout and process.stdout.readline() == "here\n"
        process.send_signal(number)
        assert process.wait(5) == status and process.stdout.read() == ""


def test_a_listener_that_has_nothing_to_judge_is_told_of(bark: ModuleType) -> None:
    def told(**environ: str) -> list[str]:
        return bark.warnings_about(bark.Config.from_env(environ), environ)

    (warning,) = told(BARK_LISTEN="tiny", BARK_QUALITY="off")
    assert "nothing is judged or heard" in warning
    assert told(BARK_LISTEN="tiny") == told(BARK_LISTEN="off", BARK_QUALITY="off") == []


def test_an_unknown_variable_of_ours_is_told_apart(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict.fromkeys(DOCUMENTED | bark.MANAGER_VARIABLES, "")
    settings = {**known, "BARK_VIOCE": "male", "BARKING": "1", "TTS_HOME": "/x", "PORT": "0"}
    monkeypatch.setattr(bark.os, "environ", settings)
    monkeypatch.setattr(bark, "serve", lambda config, warnings: warnings)
    assert bark.main([]) == [
        "BARK_VIOCE is set, but there is no such setting; --help lists them"]


def test_a_device_that_is_not_there_is_an_error_that_tells_what_to_do(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bark.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bark.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(bark.ConfigError, match=r"BARK_DEVICE is cuda:3, .* 0 GPUs; .*=cpu"):
        bark.resolve_device(bark.Config(device="cuda:3"))
    assert bark.resolve_device(bark.Config()) == bark.torch.device("cpu")


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, "cuda:0"), ({"device": "cuda:1"}, "cuda:1"), ({"device": "cpu"}, "cpu")])
def test_a_gpu_is_used_unless_told_otherwise(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str],
        expected: str) -> None:
    monkeypatch.setattr(bark.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bark.torch.cuda, "device_count", lambda: 2)
    assert str(bark.resolve_device(bark.Config(**settings))) == expected


@pytest.mark.parametrize(("device", "settings", "build", "words"), [
    ("cuda:0", {}, "12.6", []),
    ("cpu", {}, None, ["no GPU: suno/bark-small on the CPU", "builtin-voice"]),
    ("cpu", {}, "12.6", ["no GPU that torch", "CUDA 12.6", "--gpus all", "builtin-voice"]),
    ("cpu", {"device": "cpu"}, "12.6", ["BARK_DEVICE is cpu: suno/bark-small"])])
def test_who_gets_no_gpu_is_told_why_and_what_to_choose(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch, device: str, settings: dict[str, str],
        build: str | None, words: list[str]) -> None:
    monkeypatch.setattr(bark.torch.version, "cuda", build)
    notice = bark.cpu_notice(bark.Config(**settings), bark.torch.device(device), "suno/bark-small",
                             "builtin-voice")
    assert all(word in notice for word in words) and bool(notice) == bool(words)


@pytest.mark.parametrize(("device", "abilities", "hidden_size", "expected"), [
    ("cuda:0", {}, 1024, "float16"), ("cpu", {"avx512_bf16": True}, 768, "bfloat16"),
    ("cpu", {"amx_bf16": True}, 1024, "bfloat16"), ("cpu", {"bf16": True}, 1024, "bfloat16"),
    ("cpu", {"avx512_bf16": True}, 192, "float32"),
    ("cpu", {"avx512_f": True, "avx512_bf16": False}, 1024, "float32")])
def test_precision_is_halved_where_that_is_faster(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch, device: str,
        abilities: dict[str, bool], hidden_size: int, expected: str) -> None:
    monkeypatch.setattr(bark.torch.cpu, "get_capabilities", lambda: abilities)
    assert bark.best_dtype(bark.torch.device(device), hidden_size) == expected
