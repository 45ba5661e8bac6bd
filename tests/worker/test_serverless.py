"""pyworker.py: the real PyWorker in front of the worker, called as Vast's clients call it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import (
    PYWORKER,
    ROOT,
    START_SECONDS,
    WORKER,
    Answer,
    clean_environment,
    wait_until,
)
from Crypto.PublicKey import RSA
from fake_serverless import ServerlessVast, ServerlessWorker, sign, signing_key
from fake_vast import reserve_port
from manager import managed, sourcing
from vastai import Serverless
from vastai.serverless.server import worker as sdk
from vastai.serverless.server.lib import metrics as sdk_metrics
from vastai.serverless.server.lib.data_types import RequestMetrics

PLACE = {"WORKER_PORT": "3000", "CONTAINER_ID": "7", "REPORT_ADDR": "http://127.0.0.1:9",
         "PUBLIC_IPADDR": "127.0.0.1", "VAST_TCP_PORT_3000": "41234"}
ROUTE_SECONDS = 150.0  # from a request to a worker that was not there: PyWorker reports every 10 s
# What the manager had a worker of an endpoint run when --serverless was the worker's own: such
# templates are out there, and come to the newest image.
OLD_ON_START = """\
export WORKER_PORT="${WORKER_PORT:-3000}"
export REPORT_ADDR="${REPORT_ADDR:-https://run.vast.ai}"
(: >/proc/1/fd/1) 2>/dev/null && exec >/proc/1/fd/1 2>&1
while :; do
  python -u /app/bark-worker.py --serverless
  status=$?
  echo "bark-worker ended with status $status"
  case $status in 0 | 2) break ;; esac
  sleep 5
done &
"""
BURST = 40
BURST_SECONDS = 400.0  # on a machine with much else to do; 30 to 100 s seen


# Settings


def test_all_that_vast_must_set_is_there_or_all_that_is_not_is_named_at_once(
        pyworker: ModuleType) -> None:
    settings = pyworker.Settings.from_env(PLACE)
    assert (settings.worker_port, settings.host, settings.timeout) == (3000, "0.0.0.0", 600.0)
    with pytest.raises(pyworker.SettingsError) as error:
        pyworker.Settings.from_env({"PORT": "x"})
    _, *lines = str(error.value).splitlines()
    assert [line.split()[0] for line in lines] == [
        "WORKER_PORT", "CONTAINER_ID", "REPORT_ADDR", "PUBLIC_IPADDR",
        "VAST_TCP_PORT_<WORKER_PORT>"]
    assert all("is not set, and a worker here needs it; allowed: " in line for line in lines)


@pytest.mark.parametrize(("name", "value", "allowed"), [
    ("WORKER_PORT", "0", "from 1 to 65534"), ("WORKER_PORT", "65535", "from 1 to 65534"),
    ("CONTAINER_ID", "C.7", "a whole number"), ("REPORT_ADDR", "run.vast.ai", "http:// or https:"),
    ("REPORT_ADDR", "https://a b", "joined by commas"), ("PUBLIC_IPADDR", "1.2.3.4\n", "address"),
    ("VAST_TCP_PORT_3000", "65536", "from 1 to 65535"), ("UNSECURED", "true", "false or not set"),
    ("UNSECURED", "", "false or not set")])
def test_a_wrong_value_is_named_with_what_is_allowed(pyworker: ModuleType, name: str, value: str,
                                                     allowed: str) -> None:
    with pytest.raises(pyworker.SettingsError) as error:
        pyworker.Settings.from_env({**PLACE, name: value})
    (line,) = str(error.value).splitlines()[1:] if name != "WORKER_PORT" else str(
        error.value).splitlines()[1:2]
    assert line.startswith(f"  {name} is {value!r}") and allowed in line


def test_the_worker_itself_asks_for_none_of_it(bark: ModuleType) -> None:
    assert bark.Config.from_env({"WORKER_PORT": "x", "UNSECURED": "x"}) == bark.Config()


@pytest.mark.parametrize("line", [(str(PYWORKER),), (str(WORKER), "--serverless")],
                         ids=["new", "old"])
def test_a_start_without_vasts_variables_ends_with_2_and_one_message(line: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, *line], env=clean_environment(), text=True,
                          capture_output=True, timeout=START_SECONDS, check=False)
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 6


@pytest.mark.parametrize(("words", "status", "said"), [
    (["--help"], 0, "VAST_TCP_PORT_N"), (["--version"], 0, "0.1"), ([], 2, "WORKER_PORT is not")])
def test_what_it_answers_at_once_needs_neither_torch_nor_vasts_sdk(
        tmp_path: Path, words: list[str], status: int, said: str) -> None:
    for name in ("torch", "vastai", "aiohttp"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    done = subprocess.run([sys.executable, str(PYWORKER), *words], text=True, timeout=30,
                          env=clean_environment(PYTHONPATH=str(tmp_path)), check=False,
                          capture_output=True)
    assert done.returncode == status and said in done.stdout + done.stderr


def test_it_is_of_the_workers_version(bark: ModuleType, pyworker: ModuleType) -> None:
    assert pyworker.VERSION == bark.VERSION


def test_the_worker_gets_all_but_what_is_of_no_use_there_and_that_is_told(
        bark: ModuleType, pyworker: ModuleType) -> None:
    of_no_use = {"BARK_API_KEY": "sesame", **dict.fromkeys(bark.GUARDS, "5")}
    rest = {**PLACE, "BARK_VOICE": "male", "BARK_TIMEOUT": "77"}
    settings = pyworker.Settings.from_env({**rest, **of_no_use})
    assert settings.worker_environment == rest and settings.timeout == 77.0
    assert "sesame" not in repr(settings)
    key, guards = pyworker.warnings_of(of_no_use)
    assert key.startswith("BARK_API_KEY is of no use") and "sesame" not in key
    assert guards.startswith(f"{', '.join(bark.GUARDS)}: of no effect here: Vast itself ends")
    assert list(pyworker.warnings_of(dict.fromkeys(of_no_use, ""))) == []
    assert list(pyworker.warnings_of({"BARK_IDLE_STOP": "0", "BARK_MAX_HOURS": "0.0"})) == []


def test_a_port_that_is_taken_is_an_error_before_anything_is_loaded(pyworker: ModuleType) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        settings = pyworker.Settings.from_env({
            **PLACE, "HOST": "127.0.0.1", "WORKER_PORT": str(port), f"VAST_TCP_PORT_{port}": "1"})
        with pytest.raises(pyworker.SettingsError,
                           match=rf"WORKER_PORT {port}: Address already in use"):
            pyworker.check_port(settings)
    pyworker.check_port(settings)


def test_an_sdk_that_does_not_import_is_an_error_that_tells_what_to_install(
        pyworker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vastai.serverless.server", None)
    with pytest.raises(pyworker.SettingsError,
                       match=r"worker SDK.* pip install -r requirements\.txt"):
        pyworker.import_sdk()


def test_a_worker_without_pyworker_beside_it_says_what_is_missing(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    assert bark.PYWORKER == PYWORKER
    monkeypatch.setattr(bark, "PYWORKER", tmp_path / "pyworker.py")
    with pytest.raises(SystemExit) as end:
        bark.main(["--serverless"])
    assert end.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith(
        f"--serverless starts {tmp_path}/pyworker.py, which is missing; put it there, of")


# What PyWorker is told


@pytest.fixture
def front(pyworker: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """PyWorker made of the SDK's real parts, none of which runs."""
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger().level  # the SDK changes it
    settings = pyworker.Settings.from_env({**PLACE, "HF_HOME": str(tmp_path / "models")})
    made = pyworker.PyWorker(pyworker.import_sdk(), settings, 1)
    yield made
    made.close()
    logging.getLogger().setLevel(level)


def test_only_ready_and_failed_stand_in_the_status_file_which_is_private(
        pyworker: ModuleType) -> None:
    status, other = pyworker.StatusFile(), pyworker.StatusFile()
    try:
        path = Path(status.path)
        for name in ("loading", "warming", "ready", "draining", "failed"):
            status.follow(name)
        assert path.read_text() == f"{pyworker.READY_LINE}\n{pyworker.FAILED_LINE}\n"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert other.path != status.path and Path(other.path).read_text() == ""
    finally:
        status.remove()
        other.remove()
    assert not path.exists()


def test_a_state_tells_each_change_once(bark: ModuleType) -> None:
    heard: list[str] = []
    state = bark.State()
    state.on_change = heard.append
    for status in ("loading", "warming", "ready", "ready"):
        state.enter(status)
    state.fail(bark.ModelError("gone"))
    assert heard == ["warming", "ready", "failed"]


@pytest.mark.parametrize(("payload", "worth"), [
    ({"text": "Hello."}, 6.0), ({"text": "héé"}, 3.0), ({"text": ""}, 0.0), ({}, 0.0),
    ({"text": 7}, 0.0), ({"text": None}, 0.0), ({"input": "Hello."}, 0.0)])
def test_a_request_is_worth_its_characters(pyworker: ModuleType, payload: dict[str, Any],
                                           worth: float) -> None:
    assert pyworker.character_count("text")(payload) == worth


def test_pyworker_serves_every_path_that_takes_a_text_and_one_has_the_benchmark(
        bark: ModuleType, pyworker: ModuleType, front: Any) -> None:
    made = pyworker.handlers(sdk, 77.0, front._sample)
    assert [one.route for one in made] == [path for path, route in bark.ROUTES.items()
                                           if route.method == "POST"]
    assert [one.workload_calculator({"input": "four"}) for one in made] == [0.0, 4.0]
    assert {(one.allow_parallel_requests, one.max_queue_time) for one in made} == {(True, 77.0)}
    (benchmark,) = [one.benchmark_config for one in made if one.benchmark_config]
    front.follow({"status": "loading", "max_text_length": 9})
    assert benchmark.generator() == {"text": pyworker.BENCHMARK_TEXT[:9], "seed": -1}


def test_a_signature_that_was_refused_does_not_stay_in_the_log(
        pyworker: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    """Nor what the SDK says below errors, whatever levels it sets."""
    caplog.handler.addFilter(words := pyworker.OwnWords())
    logger = logging.getLogger("of/vastai/backend.py")
    logger.error("Signature error: signature verification failed, sig:c2VjcmV0")
    logger.error("Failed to fetch pubkey after 5 attempts")
    logger.warning("http://127.0.0.1?api_key=secret")
    pyworker.log.warning("Vast's signatures guard the way in")
    caplog.handler.removeFilter(words)
    assert [record.getMessage() for record in caplog.records] == [
        "PyWorker refused a request: its signature is wrong",
        "Failed to fetch pubkey after 5 attempts", "Vast's signatures guard the way in"]


# What is used of the SDK beside its options: here is told if a new one has it no more


READY = {"status": "ready", "version": "0", "slots": 3, "model_id": "suno/bark", "device": "cuda:0",
         "dtype": "float16", "max_text_length": 500}


def test_the_benchmark_has_a_request_for_each_slot_and_its_result_stays_in_the_folder(
        front: Any, pyworker: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    async def answer(handler: Any, payload: Any) -> SimpleNamespace:
        asked.append(payload.generate_payload_json())
        return SimpleNamespace(status=200)
    backend = front._worker.backend
    monkeypatch.setattr(backend, "_Backend__call_backend", answer)
    front.follow(READY)
    speed = asyncio.run(backend._Backend__run_benchmark())
    assert asked == [{"text": pyworker.BENCHMARK_TEXT, "seed": -1}] * 3 * pyworker.BENCHMARK_RUNS
    (kept,) = (tmp_path / "models/bark-worker").glob("benchmark-*/.has_benchmark")
    assert float(kept.read_text()) == speed == asyncio.run(backend._Backend__run_benchmark())
    assert len(asked) == 3 * pyworker.BENCHMARK_RUNS
    other = pyworker.benchmark_folder(tmp_path / "models", {**READY, "slots": 4})
    assert other != kept.parent


def test_the_log_tells_what_vast_is_told_and_vast_hears_of_a_ready_model_at_once(
        front: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sent(Exception):
        pass

    async def send() -> None:
        raise Sent
    metrics = front._worker.backend.metrics
    caplog.set_level(logging.INFO, "pyworker")
    front.report()
    assert caplog.messages == [] and not metrics.update_pending
    metrics._model_loaded(max_throughput=5.0)
    front.report()
    front._worker.backend.backend_errored("no key\nand more")
    front.report()
    front.report()
    assert caplog.messages == ["PyWorker tells Vast: ready, 5.0 characters a second",
                               "PyWorker reports an error to Vast: no key"]
    monkeypatch.setattr(sdk_metrics, "METRICS_UPDATE_INTERVAL", 0)
    monkeypatch.setattr(metrics, "_Metrics__send_metrics_and_reset", send)
    metrics.last_metric_update = time.time()  # so that only `update_pending` has it send
    with pytest.raises(Sent):
        asyncio.run(asyncio.wait_for(metrics._send_metrics_loop(), 5))


def test_pyworker_is_idle_when_its_last_request_has_ended(
        front: Any, pyworker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, request = front._worker.backend.metrics, RequestMetrics(1, 1, 5.0, "Created")
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            metrics._request_end(request)
    metrics._request_start(request)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(front.wait_idle(60))
    last = pyworker.LAST_WORDS_SECONDS
    assert slept == [last / 10] * 3 + [last]


def test_its_routes_are_ours_and_its_loggers_speak_through_ours(
        front: Any, pyworker: ModuleType) -> None:
    assert [route.path for route in front._worker.routes] == [
        *pyworker.UNSIGNED_PATHS, *pyworker.TEXT_FIELDS]
    names = [name for name in logging.root.manager.loggerDict if "vastai" in name]
    assert names and not any(logging.getLogger(name).handlers for name in names)
    assert logging.getLogger("vastai").propagate


# It and the worker end together


# It says its number, and what STATUS has for its /health; or it ends with ENDS.
STAND_IN = """
import http.server, json, os, sys
print("child", os.getpid(), file=sys.stderr, flush=True)
if "ENDS" in os.environ:
    sys.exit(int(os.environ["ENDS"]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"status": os.environ["STATUS"]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()
"""


class Pair:
    """pyworker.py and a worker: the real one, or a stand-in in a folder."""

    def __init__(self, folder: Path | None, port: int, **env: str):
        script = PYWORKER
        if folder:
            (folder / "bark-worker.py").write_text(STAND_IN)
            script = Path(shutil.copy(PYWORKER, folder))
        place = {**PLACE, "WORKER_PORT": str(port), f"VAST_TCP_PORT_{port}": str(port)}
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stderr=subprocess.PIPE, text=True,
            env=clean_environment(**{"STATUS": "loading", "WORKER_HTTP_PORT": "0", **place, **env}))
        self.children: list[psutil.Process] = []

    def read_until(self, words: str) -> str:
        """What it has said when these words come."""
        said = ""
        for line in self.process.stderr:
            said += line
            if words in line:
                return said
        raise AssertionError(f"it never said {words!r}, but {said}")

    def child(self) -> psutil.Process:
        number = int(self.read_until("child ").rpartition("child ")[2])
        self.children.append(psutil.Process(number))
        return self.children[-1]

    def end(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=START_SECONDS)[1]
        return self.process.returncode, said


@pytest.fixture
def free_port() -> Iterator[int]:
    with reserve_port() as reserved:
        yield reserved.getsockname()[1]


@contextlib.contextmanager
def running(*arguments: Any, **env: str) -> Iterator[Pair]:
    pair = Pair(*arguments, **env)
    try:
        yield pair
    finally:
        for process in (pair.process, *pair.children):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        pair.process.communicate()


@pytest.mark.parametrize("status", [0, 3])
def test_a_worker_that_ends_by_itself_gives_its_status(tmp_path: Path, free_port: int,
                                                       status: int) -> None:
    with running(tmp_path, free_port, ENDS=str(status)) as pair:
        assert pair.end()[0] == status


def test_a_wrong_setting_of_the_workers_is_told_by_it_and_ends_both_with_2(free_port: int) -> None:
    with running(None, free_port, BARK_DTYPE="fp16", BARK_TIMEOUT="soon") as pair:
        status, said = pair.end()
    assert status == 2 and "wrong configuration:\n  BARK_DTYPE is 'fp16'" in said
    assert "BARK_TIMEOUT is 'soon'" in said and "Traceback" not in said


def test_a_worker_that_is_killed_is_told_as_a_shell_tells_it(tmp_path: Path,
                                                             free_port: int) -> None:
    with running(tmp_path, free_port) as pair:
        pair.child().kill()
        status, said = pair.end()
    assert status == 137 and "bark-worker.py ended by itself, with status 137" in said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_worker_also_before_it_can_say_how_it_ends(
        tmp_path: Path, free_port: int, number: signal.Signals, status: int) -> None:
    with running(tmp_path, free_port) as pair:
        child = pair.child()
        pair.process.send_signal(number)
        assert pair.end()[0] == status and not child.is_running()


def test_no_worker_is_left_when_pyworker_is_killed(tmp_path: Path, free_port: int) -> None:
    with running(tmp_path, free_port) as pair:
        child = pair.child()
        pair.process.kill()
        child.wait(10)
        assert not child.is_running()


def test_a_model_that_fails_is_told_to_vast(tmp_path: Path, free_port: int) -> None:
    with running(tmp_path, free_port, STATUS="failed") as pair:
        pair.read_until("PyWorker reports an error to Vast: bark-worker: the model has failed")


# A real one, started by the first request


class Client(Serverless):
    """The SDK's own client; it needs Vast's root certificate for https alone."""

    async def get_ssl_context(self) -> ssl.SSLContext:
        return ssl.create_default_context()


def ask(vast: ServerlessVast, *payloads: dict[str, Any], route: str = "/synthesize",
        seconds: float = ROUTE_SECONDS) -> list[dict[str, Any]]:
    """What comes of requests to the endpoint, all at once."""
    async def run() -> list[dict[str, Any]]:
        async with Client(vast.account_key, webserver_url=vast.url,
                          autoscaler_url=vast.url, max_poll_interval=0.5) as client:
            found = await client.get_endpoint(name="bark-worker")
            return await asyncio.gather(*(
                found.request(route, payload, cost=len(payload.get("text", "")), timeout=seconds)
                for payload in payloads))
    return asyncio.run(run())


def post(url: str, body: object) -> Answer:
    request = urllib.request.Request(url, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return Answer(reply.status, dict(reply.headers), reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), error.read())


def on_start() -> str:
    """What the manager has a worker of an endpoint run."""
    return subprocess.run(sourcing("endpoint_on_start"), capture_output=True, text=True,
                          check=True).stdout


def add_endpoint(vast: ServerlessVast, max_workers: int, command: str, **env: str) -> None:
    """What `endpoint up` makes, by hand."""
    options = {"BARK_MODEL": "suno/bark-small", "HF_HOME": "/workspace/models",
               "BARK_MAX_BATCH": "2", **env}
    row = vast.add_endpoint(max_workers=max_workers, cold_workers=0, inactivity_timeout=600)
    vast.templates[1] = {
        "id": 1, "hash_id": "abc", "image": "ghcr.io/darvondoom/libread-bark-tts:latest",
        "onstart": command, "recommended_disk_space": "50", "tag": None,
        "env": " ".join(["-p 3000:3000", *(f"-e {name}={options[name]}" for name in options)])}
    vast.groups[1] = {"id": 1, "endpoint_id": row["id"], "template_hash": "abc",
                      "search_params": "gpu_ram>=8"}


def direct(worker: ServerlessWorker, path: str, body: object) -> Answer:
    """From the worker's own port, past PyWorker."""
    return post(f"http://127.0.0.1:{worker.port}{path}", body)


def health_of(worker: ServerlessWorker) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{worker.port}/health", timeout=60) as reply:
        return json.load(reply)


def signed(url: str, signature: str, payload: object) -> dict[str, Any]:
    return {"auth_data": {"cost": "5", "endpoint": "bark-worker", "reqnum": 9, "request_idx": 9,
                          "url": url, "signature": signature}, "session_id": None,
            "payload": payload}


@pytest.fixture(scope="module")
def served(toy: Path, tmp_path_factory: pytest.TempPathFactory,
           ) -> Iterator[tuple[ServerlessVast, ServerlessWorker, dict[str, Any]]]:
    """An endpoint whose only worker the first request has brought, and that request's result.

    Its template is an old one, made when --serverless was the worker's own.
    """
    with ServerlessVast(tmp_path_factory.mktemp("served"), {"suno/bark-small": toy}) as vast:
        vast.add_offer()
        add_endpoint(vast, max_workers=1, command=OLD_ON_START, BARK_API_KEY="of-no-use-here",
                     BARK_IDLE_STOP="0.01", BARK_START_LIMIT="0.01", BARK_MAX_HOURS="0.0001")
        assert vast.workers() == []
        (first,) = ask(vast, {"text": "Hello there.", "seed": 7})
        (worker,) = vast.workers()
        yield vast, worker, first
        print(worker.log)


Served = tuple[ServerlessVast, ServerlessWorker, dict[str, Any]]


def test_a_request_along_vasts_route_brings_the_audio_that_the_worker_itself_gives(
        served: Served) -> None:
    _, worker, first = served
    assert (first["ok"], first["status"]) == (True, 200)
    straight = direct(worker, "/synthesize", {"text": "Hello there.", "seed": 7}).json
    assert base64.b64decode(first["response"]["audio"]) == base64.b64decode(straight["audio"])
    assert first["response"]["segments"] == straight["segments"]


def test_openais_route_brings_audio_and_its_stream_intact(served: Served) -> None:
    vast, worker, _ = served
    payload = {"input": "One word.\n\nTwo words more.", "voice": "alloy", "response_format": "pcm"}
    (streamed,) = ask(vast, payload, route="/v1/audio/speech")
    straight = direct(worker, "/v1/audio/speech", payload)
    assert straight.headers["Content-Type"] == "audio/pcm" and len(straight.body) > 10_000
    assert streamed["response"] == straight.body


def test_the_call_from_python_in_the_docs_brings_speech(
        served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vast, worker, _ = served
    page = (ROOT / "docs/renting.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n([^`]*Serverless[^`]*)```", page)
    monkeypatch.setattr("vastai.Serverless", lambda: Client(
        vast.account_key, webserver_url=vast.url, autoscaler_url=vast.url))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "renting.md", "exec"), {})
    straight = direct(worker, "/synthesize", {"text": "Hello, world!"}).json
    assert (tmp_path / "hello.wav").read_bytes() == base64.b64decode(straight["audio"])


def test_the_worker_reports_its_speed_in_characters_once_its_batch_was_tried(
        served: Served, pyworker: ModuleType) -> None:
    _, worker, _ = served
    before_ready, _, _ = worker.log.partition("PyWorker tells Vast: ready")
    tried = before_ready.count("POST /synthesize status=200")
    whole = pyworker.BENCHMARK_RUNS * 2  # of two slots; the last line may come a moment late
    assert whole - 1 <= tried <= whole
    seeds = re.findall(r"seed=(\d+)\n", before_ready)
    assert len(set(seeds)) == len(seeds), "a run was answered from the cache"
    assert worker.is_ready and worker.report["max_perf"] > len(pyworker.BENCHMARK_TEXT) / 60
    (kept,) = (worker.container.root / "workspace/models/bark-worker").glob("benchmark-*/*")
    assert float(kept.read_text()) == worker.report["max_perf"]
    assert list(worker.container.root.rglob(".has_benchmark")) == [kept]


def test_who_has_no_signature_of_vasts_for_this_worker_is_refused(served: Served) -> None:
    _, worker, _ = served
    url, payload = worker.worker_url, {"text": "Let me in.", "seed": 4242}
    strangers = [sign(RSA.generate(2048), url), sign(signing_key(), "http://127.0.0.1:1"), "", "AA"]
    answers = [post(f"{url}/synthesize", signed(url, one, payload)) for one in strangers]
    assert [answer.status for answer in answers] == [401] * 4
    assert post(f"{url}/synthesize", payload).status == 422
    good = post(f"{url}/synthesize", signed(url, sign(signing_key(), url), payload))
    assert good.status == 200 and good.json["status"] == "success"
    wait_until(lambda: "seed=4242\n" in worker.log, "line of the request")
    assert worker.log.count("seed=4242\n") == 1


def test_what_needs_no_signature_is_not_served(served: Served, pyworker: ModuleType) -> None:
    _, worker, _ = served
    session = signed(worker.worker_url, "", {"lifetime": 0.1, "on_close_route": "/synthesize",
                                             "on_close_payload": {"text": "For nothing."}})
    for path in pyworker.UNSIGNED_PATHS:
        answer = post(worker.worker_url + path, session)
        assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")
    long = signed(worker.worker_url, "", {"text": "x" * 3_000_000})
    assert post(f"{worker.worker_url}/synthesize", long).status == 413


def test_no_request_can_forge_the_lines_that_say_ready_or_failed(
        served: Served, pyworker: ModuleType) -> None:
    vast, worker, _ = served
    (status_file,) = (worker.container.root / "tmp").glob("bark-worker-*")
    lines, url = f"{pyworker.FAILED_LINE}\n{pyworker.READY_LINE}\n", worker.worker_url
    for payload in ({"text": lines}, {"text": "Hi.", "voice": lines}, {lines: lines}):
        direct(worker, "/synthesize", payload)
        post(f"{url}/synthesize", signed(url, sign(signing_key(), url), payload))
    good = signed(url, sign(signing_key(), url), {"text": "Hello."})
    assert post(f"{url}/synthesize", good).status == 200
    reports = len(vast.calls("POST", "/worker_status/"))
    vast.wait_for_call("POST", "/worker_status/", reports + 1)
    assert status_file.read_text() == f"{pyworker.READY_LINE}\n"
    assert worker.errors == [] and worker.log.count("PyWorker tells Vast: ready") == 1


def test_its_log_has_neither_keys_nor_signatures_nor_what_was_said(served: Served) -> None:
    vast, worker, first = served
    secrets = [*vast.secrets, first["auth_data"]["signature"], "of-no-use-here", "Hello there"]
    assert [secret for secret in secrets if secret in worker.log] == []
    assert "BARK_API_KEY is of no use here" in worker.log
    assert not re.search(r"DEBUG|api_key=|Worker Status", worker.log)


def test_nothing_has_it_stop_by_itself(served: Served) -> None:
    """It has been there for much longer than what it was given, idle for the most part."""
    vast, worker, _ = served
    health = health_of(worker)
    assert health["guard"] == {} and health["uptime"] > 0.6
    assert (worker.intended, vast.calls("PUT", r"/instances/\d+/?$")) == ("running", [])
    assert ("BARK_IDLE_STOP, BARK_START_LIMIT, BARK_MAX_HOURS: of no effect here: Vast itself ends"
            " the workers of an endpoint") in worker.log and "bark-guard" not in worker.log


def test_the_old_command_has_become_pyworker_before_a_worker_on_loopback(
        served: Served, bark: ModuleType) -> None:
    _, worker, _ = served
    (front,), (child,) = worker.workers("pyworker.py"), worker.workers()
    assert front.cmdline()[1:] == ["-u", str(PYWORKER)] and child.ppid() == front.pid
    assert {place.laddr.ip for place in child.net_connections() if place.status == "LISTEN"} == {
        "127.0.0.1"}
    assert not {"BARK_API_KEY", *bark.GUARDS} & child.environ().keys()


def test_terminated_it_finishes_and_leaves_nothing_behind(served: Served) -> None:
    """The last test on this worker: it comes to an end here."""
    _, worker, _ = served
    url, answers = worker.worker_url, []
    request = signed(url, sign(signing_key(), url), {"text": "Last words.", "seed": 5151})
    asking = threading.Thread(target=lambda: answers.append(post(f"{url}/synthesize", request)))
    (front,), (child,) = worker.workers("pyworker.py"), worker.workers()
    asking.start()
    wait_until(lambda: health_of(worker)["queue"]["running"], "request under way")
    front.terminate()
    front.wait(20)
    asking.join(20)
    assert [(answer.status, answer.json["seed"]) for answer in answers] == [(200, 5151)]
    assert "status=draining" in worker.log and not child.is_running()
    assert list((worker.container.root / "tmp").glob("bark-worker-*")) == []
    wait_until(lambda: "bark-worker ended with status 0\n" in worker.log, "end of the command")


# Two workers


@pytest.mark.long
@pytest.mark.timeout(BURST_SECONDS + 60)
def test_a_burst_over_two_workers_loses_no_request_and_serves_each_once(
        bark: ModuleType, tmp_path: Path) -> None:
    """From no worker at all; on the built-in voice, as it speaks from its own folder."""
    with ServerlessVast(tmp_path, {}) as vast:
        vast.add_offer()
        vast.add_offer()
        add_endpoint(vast, max_workers=2, command=on_start(), BARK_MODEL="/app/builtin-voice")
        payloads = [{"text": f"Number {('one', 'two', 'three')[i % 3]}.", "seed": 1000 + i}
                    for i in range(BURST)]
        answers = ask(vast, *payloads, seconds=BURST_SECONDS)
        assert [answer["status"] for answer in answers] == [200] * BURST
        assert [answer["response"]["seed"] for answer in answers] == [
            payload["seed"] for payload in payloads]
        first, second = vast.workers()
        served = Counter(re.findall(r"seed=(1\d{3})\n", first.log + second.log))
        assert served == Counter(str(payload["seed"]) for payload in payloads)
        shares = [len(re.findall(r"seed=1\d{3}\n", one.log)) for one in (first, second)]
        assert min(shares) > 0 and sum(shares) == BURST
        wait_until(lambda: sum(len(one.outcomes) for one in vast.asked.values()) >= BURST,
                   "report of every request")
        assert {tuple(one.outcomes) for one in vast.asked.values()} == {("Success",)}
        straight = direct(first, "/synthesize", payloads[0]).json
        assert straight["audio"] == answers[0]["response"]["audio"]
        vast.hurry = 1e6
        wait_until(lambda: vast.workers() == [], "end of idle workers")


# From the manager to the model


@pytest.mark.long
def test_the_manager_makes_an_endpoint_whose_real_worker_speaks_and_ends_it(
        toy: Path, tmp_path: Path) -> None:
    with managed(tmp_path, toy, ServerlessVast) as manager:
        vast = manager.vast
        assert isinstance(vast, ServerlessVast)
        vast.add_offer()
        up = manager.run("endpoint", "up", "--yes", "--model", "suno/bark-small",
                         BARK_MAX_BATCH="2")
        (number,) = vast.endpoints
        assert (up.status, up.stdout) == (0, f"VASTAI_ENDPOINT_ID={number}\n")
        out = tmp_path / "speech.wav"
        spoken = manager.run("endpoint", "test", "Hello there.", "--out", str(out))
        assert spoken.status == 0 and "; queued " in spoken.stdout
        (worker,) = vast.workers()
        seed = int(re.findall(r" seed=(\d+)\n", worker.log)[-1])  # `endpoint test` drew it
        straight = direct(worker, "/synthesize", {"text": "Hello there.", "seed": seed}).json
        assert out.read_bytes() == base64.b64decode(straight["audio"])
        (answer,) = ask(vast, {"text": "Hello there.", "seed": seed})
        assert answer["response"]["audio"] == straight["audio"]
        assert manager.run("endpoint", "down", "--yes").status == 0
        assert (vast.endpoints, vast.groups, vast.templates, vast.instances) == ({}, {}, {}, {})
        assert vast.processes() == []
