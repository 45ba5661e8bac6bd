"""Getting a model from a hub: a real client and worker against a hub on loopback."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import BUILTIN, Worker, running_worker, wait_until
from fake_hub import FakeHub
from huggingface_hub import constants

MODEL = "suno/bark-like"
CHUNK = 10 << 20  # bytes that the hub's client holds before it writes them (DOWNLOAD_CHUNK_SIZE)
OTHERS = {  # what suno/bark on the hub holds besides, and never has to be fetched
    "text.pt": 2_320_000_000, "coarse_2.pt": 3_930_000_000, "fine_2.pt": 3_740_000_000,
    "text_2.pt": 5_350_000_000, "README.md": 9000, ".gitattributes": 1500,
    "speaker_embeddings/en_speaker_6_semantic_prompt.npy": 2000,
    "speaker_embeddings/v2/en_speaker_6.npz": 40_000, "onnx/model.safetensors": 1_000_000_000,
}
QUIET_VOICES = ("v2/de_speaker_0", "v2/en_speaker_6", "v2/tr_speaker_0")
NEVER: Callable[..., None] = lambda *_: pytest.fail("not before the weights")  # noqa: E731


def online(hub: FakeHub, home: Path, **settings: str) -> contextlib.AbstractContextManager[Worker]:
    """A worker that gets MODEL from `hub`; an empty HF_HUB_OFFLINE is off."""
    return running_worker(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_OFFLINE="",
                          BARK_MODEL=MODEL, HF_HUB_DISABLE_TELEMETRY="1", **settings)


def files_asked_for(hub: FakeHub) -> set[str]:
    marker = "/resolve/"
    return {request.path.partition(marker)[2].partition("/")[2]
            for request in list(hub.requests) if marker in request.path}


def files_of(folder: Path) -> set[str]:
    """What a worker needs of a model folder: everything but what is for people."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".md"}


def statuses(worker: Worker) -> list[str]:
    """What the log says the worker went through, up to ready."""
    def entered() -> list[str]:
        found = [re.search(r" INFO status=(\w+)", line) for line in list(worker.log)]
        return [match[1] for match in found if match]
    wait_until(lambda: "ready" in entered(), "log line")
    return entered()


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Points this process's hub client, which read its settings long ago, at a hub's url."""
    def point_at(url: str) -> None:
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return point_at


@pytest.fixture(scope="module")
def quiet_toy(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with three of its 130 voices, as each is six requests."""
    folder = tmp_path_factory.mktemp("quiet") / "toy"
    shutil.copytree(toy, folder, copy_function=os.link)
    table = folder / "speaker_embeddings_path.json"
    kept = {name: prompts for name, prompts in json.loads(table.read_text()).items()
            if name in ("repo_or_path", *QUIET_VOICES)}
    assert len(kept) == 1 + len(QUIET_VOICES)
    table.unlink()  # a link to the toy's own
    table.write_text(json.dumps(kept))
    for prompt in folder.glob("speaker_embeddings/*/*.npy"):
        if not prompt.name.startswith(tuple(name[3:] for name in QUIET_VOICES)):
            prompt.unlink()
    return folder


@pytest.fixture
def toy_hub(quiet_toy: Path, use_hub: Callable[[str], None]) -> Iterator[FakeHub]:
    with FakeHub({MODEL: quiet_toy}, OTHERS) as hub:
        use_hub(hub.url)
        yield hub


def test_a_first_start_tells_how_far_it_is_and_a_restart_goes_on_from_there(
        tmp_path: Path) -> None:
    prompt, weights = "speaker_embeddings/v2/en_speaker_9_fine_prompt.npy", "model.safetensors"
    total = sum((BUILTIN / name).stat().st_size for name in files_of(BUILTIN))
    size = (BUILTIN / weights).stat().st_size
    with FakeHub({MODEL: BUILTIN}, {**OTHERS, "pytorch_model.bin": 10**9}) as hub:
        hub.hold(weights, after=CHUNK + 1)
        with online(hub, tmp_path) as worker:
            assert CHUNK <= wait_for_progress(worker, CHUNK, total) <= total - size + CHUNK
            assert worker.speak("Hello.").json["error"]["code"] == "not_ready"
            worker.stop(signal.SIGKILL)
        hub.faults.hold.clear()
        last = hub.hold(prompt)
        with online(hub, tmp_path) as worker:
            assert size <= wait_for_progress(worker, size, total) < total
            last.set()
            assert "progress" not in worker.wait_for("ready")
            assert statuses(worker) == ["downloading", "loading", "warming", "ready"]
        assert [get.range for get in hub.downloads(weights)] == [None, f"bytes={CHUNK}-"]
        assert files_asked_for(hub) == files_of(BUILTIN)


def wait_for_progress(worker: Worker, least: int, total: int) -> int:
    """The first count of bytes that is `least` or more; all the while the total must be right."""
    def progress() -> int:
        health = worker.health()
        if health["status"] == "loading":
            return 0
        assert health["status"] == "downloading" and health["progress"]["bytes_total"] == total
        done = health["progress"]["bytes_done"]
        return done if done >= least else 0
    return wait_until(progress, f"{least} bytes")


def test_a_filled_cache_serves_a_start_without_asking_the_hub(
        bark: ModuleType, toy_hub: FakeHub, tmp_path: Path) -> None:
    bark.find_model(MODEL, lambda voices: None, lambda total, blobs: None)
    toy_hub.requests.clear()
    toy_hub.fail(500)
    with online(toy_hub, tmp_path) as worker:
        worker.wait_for("ready")
        assert statuses(worker) == ["warming", "ready"]
        assert worker.speak("Hello.").status == 200
    assert toy_hub.requests == []


def test_only_what_is_needed_is_fetched_and_the_second_time_nothing(
        bark: ModuleType, toy: Path, use_hub: Callable[[str], None]) -> None:
    told: list[int] = []
    with FakeHub({MODEL: toy}, OTHERS) as hub:
        use_hub(hub.url)
        folder = bark.find_model(MODEL, lambda voices: None, lambda total, _: told.append(total))
    assert files_asked_for(hub) == files_of(toy) == files_of(folder)
    assert told == [sum(path.stat().st_size for path in toy.rglob("*") if path.is_file())]
    assert bark.find_model(MODEL, NEVER, NEVER) == folder  # where nobody listens any more


def test_a_cache_that_lost_a_file_is_filled_up_again(
        bark: ModuleType, toy_hub: FakeHub) -> None:
    prompt = "speaker_embeddings/v2/de_speaker_0_coarse_prompt.npy"
    folder = bark.find_model(MODEL, lambda voices: None, lambda total, blobs: None)
    (folder / prompt).resolve().unlink()
    (folder / prompt).unlink()
    toy_hub.requests.clear()
    assert bark.find_model(MODEL, lambda voices: None, lambda total, blobs: None) == folder
    assert (folder / prompt).is_file()
    assert len(toy_hub.downloads(prompt)) == 1 and not toy_hub.downloads("pytorch_model.bin")


def test_a_cache_that_lacks_only_a_voice_serves_when_the_hub_fails(
        bark: ModuleType, toy_hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    folder = bark.find_model(MODEL, lambda _: None, lambda *_: None)
    (folder / "speaker_embeddings" / "v2" / "tr_speaker_0_fine_prompt.npy").unlink()
    toy_hub.fail(503)
    assert bark.find_model(MODEL, lambda _: None, lambda *_: None) == folder
    assert "some voices are missing" in caplog.text and "try again later" in caplog.text


def test_a_cache_that_lacks_a_shard_of_the_weights_is_not_whole(
        bark: ModuleType, toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(toy, folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00002.bin")
    shards = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    assert bark.missing_files(folder) == ["pytorch_model-00002-of-00002.bin"]


def test_a_connection_that_breaks_mid_file_is_taken_up_again(
        bark: ModuleType, toy: Path, toy_hub: FakeHub) -> None:
    weights = "pytorch_model.bin"
    toy_hub.cut(weights, after=CHUNK + CHUNK // 2)
    folder = bark.find_model(MODEL, lambda voices: None, lambda total, blobs: None)
    assert (folder / weights).read_bytes() == (toy / weights).read_bytes()
    whole, rest = toy_hub.downloads(weights)
    assert whole.range is None and rest.range == f"bytes={CHUNK}-"


def part_of(tmp_path: Path, weights: Path, content: bytes) -> Path:
    """A part of `weights` in the cache, as a killed worker leaves it."""
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    blobs = tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{digest}.part").write_bytes(content)
    return blobs / f"{digest}.part"


@pytest.mark.parametrize("kept", ["nothing", "some", "all", "more than all"])
def test_whatever_part_is_left_the_whole_file_comes_of_it(
        bark: ModuleType, toy: Path, toy_hub: FakeHub, tmp_path: Path, kept: str) -> None:
    content = (toy / "pytorch_model.bin").read_bytes()
    left = {"nothing": b"", "some": content[:12345], "all": content, "more than all": content * 2}
    part = part_of(tmp_path, toy / "pytorch_model.bin", left[kept])
    folder = bark.find_model(MODEL, lambda voices: None, lambda total, blobs: None)
    assert (folder / "pytorch_model.bin").read_bytes() == content and not part.exists()
    expected = {"nothing": [None], "some": ["bytes=12345-"], "all": [], "more than all": [None]}
    assert [get.range for get in toy_hub.downloads("pytorch_model.bin")] == expected[kept]


def test_a_damaged_part_is_removed_so_that_the_next_start_succeeds(
        bark: ModuleType, toy: Path, toy_hub: FakeHub, tmp_path: Path) -> None:
    part = part_of(tmp_path, toy / "pytorch_model.bin", b"damaged")
    with pytest.raises(bark.ModelError, match=r"pytorch_model.bin of suno/bark-like .* damaged"):
        bark.find_model(MODEL, lambda voices: None, lambda total, blobs: None)
    assert not part.exists()
    folder = bark.find_model(MODEL, lambda voices: None, lambda total, blobs: None)
    assert (folder / "pytorch_model.bin").read_bytes() == (toy / "pytorch_model.bin").read_bytes()


# A cache that cannot be filled


def test_a_disk_without_room_is_told_before_anything_large_is_fetched(
        bark: ModuleType, toy_hub: FakeHub, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bark.shutil, "disk_usage", lambda folder: SimpleNamespace(free=12_000_000))
    told = (rf"suno/bark-like needs 0\.\d+ GB more on the disk of {tmp_path}/\S+, where 0\.01 GB"
            r" are free; make room, or set HF_HOME")
    with pytest.raises(bark.ModelError, match=told):
        bark.find_model(MODEL, lambda voices: None, NEVER)
    assert not toy_hub.downloads("pytorch_model.bin")


def test_a_disk_that_fills_up_on_the_way_is_told(
        bark: ModuleType, toy_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(bark, "fetch_blob", full)
    with pytest.raises(bark.ModelError, match=r"the disk of \S+ is full \(\S+ GB are free\); make"):
        bark.find_model(MODEL, lambda voices: None, lambda *_: None)


def test_a_home_that_is_a_file_is_told(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with FakeHub({MODEL: toy}, OTHERS) as hub, online(hub, tmp_path / "home") as worker:
        error = worker.wait_for("failed")["error"]
        assert "is a file where a folder is needed (HF_HOME is home); remove it, or set" in error
        assert worker.stop() == 1
    assert str(tmp_path / "home") in "".join(worker.log)


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Work as a user who owns nothing here, as root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("leftover", [
    "hub", f"hub/models--{MODEL.replace('/', '--')}",
    f"hub/models--{MODEL.replace('/', '--')}/blobs"])
def test_a_cache_that_this_user_may_not_write_is_told(
        bark: ModuleType, toy_hub: FakeHub, monkeypatch: pytest.MonkeyPatch,
        leftover: str) -> None:
    home = Path(tempfile.mkdtemp(prefix="bark-home-"))  # pytest's own folder is its user's alone
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    (home / leftover).mkdir(parents=True)
    for folder in (home, *home.rglob("*")):
        folder.chmod(0o777)
    (home / leftover).chmod(0o555)
    try:
        with nobody(), pytest.raises(bark.ModelError) as error:
            bark.find_model(MODEL, lambda voices: None, lambda *_: None)
    finally:
        (home / leftover).chmod(0o755)
        shutil.rmtree(home)
    user = pwd.getpwuid(65534 if os.geteuid() == 0 else os.geteuid()).pw_name
    assert re.search(rf"^user {user} may not write {home}/hub\S*; as root: chown -R {user} {home},"
                     r" or set HF_HOME to a folder of this user's$", str(error.value))


@pytest.mark.parametrize(("status", "expected"), [
    (401, r"the hub refuses suno/bark-like: .*401.*; check BARK_MODEL, and HF_TOKEN"),
    (404, r"the hub refuses suno/bark-like: .*404.*; check BARK_MODEL, and HF_TOKEN"),
    (503, r"suno/bark-like.*503")])
def test_a_refusal_names_the_model_and_what_to_check(
        bark: ModuleType, toy_hub: FakeHub, status: int, expected: str) -> None:
    toy_hub.fail(status)
    with pytest.raises(bark.ModelError, match=expected):
        bark.find_model(MODEL, NEVER, NEVER)


def test_a_model_that_the_hub_does_not_have_is_named(
        bark: ModuleType, toy_hub: FakeHub) -> None:
    with pytest.raises(bark.ModelError, match=r"the hub refuses suno/brak: .*check BARK_MODEL"):
        bark.find_model("suno/brak", NEVER, NEVER)


def test_a_hub_that_nobody_reaches_is_told_from_one_that_refuses(
        bark: ModuleType, use_hub: Callable[[str], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    use_hub(url)
    with pytest.raises(bark.ModelError, match="downloading suno/bark-like broke off: Connect"):
        bark.find_model(MODEL, NEVER, NEVER)


def test_a_repository_without_a_voice_table_or_weights_is_no_bark_model(
        bark: ModuleType, toy: Path, tmp_path: Path, use_hub: Callable[[str], None]) -> None:
    (tmp_path / "half").mkdir()
    for name in ("config.json", "generation_config.json", "vocab.txt"):
        (tmp_path / "half" / name).write_bytes((toy / name).read_bytes())
    with FakeHub({MODEL: tmp_path / "half"}) as hub:
        use_hub(hub.url)
        with pytest.raises(bark.ModelError, match=r"no Bark model: it lacks speaker_embeddings"):
            bark.find_model(MODEL, NEVER, NEVER)


@pytest.mark.parametrize("name", ["bark", "../../etc/passwd", "a/b/c", "./nowhere", "/nowhere"])
def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_refused(
        bark: ModuleType, name: str) -> None:
    with pytest.raises(bark.ModelError, match=r"BARK_MODEL is .*hub id such as suno/bark"):
        bark.find_model(name, NEVER, NEVER)


def test_a_local_folder_that_lacks_files_is_named_with_what_it_lacks(
        bark: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(bark.ModelError) as error:
        bark.find_model(str(tmp_path), NEVER, NEVER)
    assert all(name in str(error.value) for name in (
        str(tmp_path), "generation_config.json", "speaker_embeddings_path.json",
        "vocab.txt", "pytorch_model.bin"))


def test_a_default_voice_that_is_not_there_fails_before_the_weights_are_asked_for(
        toy: Path, tmp_path: Path) -> None:
    with FakeHub({MODEL: toy}, OTHERS) as hub, \
            online(hub, tmp_path, BARK_VOICE="v2/en_speaker_66") as worker:
        health = worker.wait_for("failed")
        assert "BARK_VOICE" in health["error"] and "v2/en_speaker_6 " in health["error"]
        assert not hub.downloads("pytorch_model.bin") and not hub.downloads("_prompt.npy")
        assert worker.call("/ready").status == 503
        assert worker.stop() == 2


def test_an_empty_cache_with_the_hub_switched_off_fails_with_what_to_do(
        tmp_path: Path) -> None:
    with running_worker(BARK_MODEL=MODEL, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1") as worker:
        health = worker.wait_for("failed")
        assert health["error"] == (
            f"{MODEL} is not in the cache and the hub is off; unset HF_HUB_OFFLINE or set"
            " BARK_MODEL to a local folder")
        answer = worker.speak("Hello.")
        assert answer.status == 503 and health["error"] in answer.json["error"]["message"]
        assert worker.stop() == 1


# The listener's weights

WHISPER = "me/whisper"


@pytest.fixture
def whisper_hub(tmp_path: Path, use_hub: Callable[[str], None]) -> Iterator[FakeHub]:
    folder = tmp_path / "whisper"
    folder.mkdir()
    for name, size in (("config.json", 2), ("tokenizer.json", 2), ("model.bin", 2 << 20),
                       ("vocabulary.txt", 20)):
        (folder / name).write_bytes(b"{}" if size == 2 else os.urandom(size))
    with FakeHub({WHISPER: folder}, {"README.md": 9000, "onnx/model.onnx": 10**9}) as hub:
        use_hub(hub.url)
        yield hub


def test_a_listener_is_fetched_as_a_model_is_and_then_comes_from_the_cache(
        bark: ModuleType, whisper_hub: FakeHub) -> None:
    told: list[int] = []
    folder = bark.find_listener(WHISPER, lambda total, blobs: told.append(total))
    assert files_asked_for(whisper_hub) == files_of(folder) == {
        "config.json", "tokenizer.json", "model.bin", "vocabulary.txt"}
    assert told == [sum(path.stat().st_size for path in folder.iterdir())]
    whisper_hub.__exit__()  # nobody listens any more
    assert bark.find_listener(WHISPER, NEVER) == folder


def test_a_listener_whose_download_breaks_off_goes_on_from_there(
        bark: ModuleType, whisper_hub: FakeHub, tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / f"models--{WHISPER.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    weights = (tmp_path / "whisper" / "model.bin").read_bytes()
    part = blobs / f"{hashlib.sha256(weights).hexdigest()}.part"
    part.write_bytes(weights[:1_000_000])
    assert (bark.find_listener(WHISPER, lambda *_: None) / "model.bin").read_bytes() == weights
    assert [get.range for get in whisper_hub.downloads("model.bin")] == ["bytes=1000000-"]


def test_what_is_no_listener_is_refused_with_what_it_lacks(
        bark: ModuleType, toy_hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(bark.ModelError, match=r"no Whisper of CTranslate2's: it lacks model\.bin"):
        bark.find_listener(MODEL, NEVER)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(bark.ModelError, match=r"lacks model\.bin, tokenizer\.json"):
        bark.find_listener(str(tmp_path), NEVER)
    toy_hub.fail(404)
    with pytest.raises(bark.ModelError, match="check BARK_LISTEN"):
        bark.find_listener("tiny", NEVER)


@pytest.mark.parametrize("has_companion", [True, False])
def test_speech_goes_on_where_the_listener_is_missing(
        bark: ModuleType, toy_hub: FakeHub, tmp_path: Path, has_companion: bool,
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in bark.LISTENER_FILES:
        (tmp_path / name).write_text("{}")
    name = "tiny" if has_companion else str(tmp_path)
    toy_hub.fail(500)
    if not has_companion:
        monkeypatch.setattr(bark, "LISTENER", tmp_path / "listener.py")
    judge = bark.Judge(0.35)
    bark.prepare_listener(judge, name, NEVER)
    assert judge.listener.startswith("missing: ") and "words are not heard: " in caplog.text
    assert ("later" if has_companion else "listener.py is missing") in judge.listener
    verdict = judge.submit(np.zeros(24_000, np.float32), 24_000, bark.Wanted(1.0)).result()
    assert verdict.warnings == ("silent",)
