"""`speak` through what is rented: the real script and `vastai` on the fake API, whose instances
pass on to one real worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import running_worker, wait_until
from fake_serverless import ServerlessVast
from fake_vast import FakeVast
from manager import Run
from renting import Scene, light_stage, scene
from speaking import KEY, Gate, gate_before, make_program
from test_rented import CommandLines

# Passes on to the worker at TARGET.
PASSER = """
import http.server, json, os, threading, urllib.error, urllib.request
class Passer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))
    def pass_on(self, body, key):
        headers = {"Authorization": "Bearer " + key, "Content-Type": "application/json"}
        asked = urllib.request.Request(os.environ["TARGET"] + self.path, body, headers)
        try:
            with urllib.request.urlopen(asked) as reply:
                status, answer = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, answer = error.code, error.read()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *words):
        pass
def serve(handler, host, port):
    server = http.server.ThreadingHTTPServer((host, port), handler)
    threading.Thread(target=server.serve_forever).start()
    print(f"listening on http://{host}:{server.server_port}", flush=True)
"""
# A worker on an instance, which takes only its own key.
WORKER = PASSER + """
class Worker(Passer):
    def do_GET(self):
        self.pass_on(None, "")
    def do_POST(self):
        own = self.headers["Authorization"] == "Bearer " + os.environ["BARK_API_KEY"]
        self.pass_on(self.body(), os.environ["TARGET_KEY"] if own else "none")
serve(Worker, os.environ["HOST"], int(os.environ["PORT"]))
"""
# As PyWorker: it reports that it is ready, and unwraps what it passes on.
PYWORKER = PASSER + """
port, name = int(os.environ["WORKER_PORT"]), int(os.environ["CONTAINER_ID"])
def tell(path, body):
    body = json.dumps({**body, "mtoken": os.environ["MASTER_TOKEN"]}).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["REPORT_ADDR"] + path, body)).read()
class PyWorker(Passer):
    def do_POST(self):
        asked = json.loads(self.body())
        assert "Authorization" not in self.headers and asked["auth_data"]["signature"]
        self.pass_on(json.dumps(asked["payload"]).encode(), os.environ["TARGET_KEY"])
        tell("/delete_requests/", {"worker_id": name, "requests": [
            {"request_idx": asked["auth_data"]["request_idx"], "status": "Success"}]})
serve(PyWorker, "127.0.0.1", port)
tell("/worker_status/", {"id": name, "max_perf": 50.0, "error_msg": "",
                         "url": f"http://127.0.0.1:{port}"})
"""
TEXT = "\n\n".join(f"Paragraph {number} is here." for number in range(8))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def gate(toy: Path) -> Iterator[Gate]:
    with running_worker(BARK_MODEL=str(toy), BARK_API_KEY=KEY, BARK_MAX_BATCH="4") as worker:
        worker.wait_for("ready")
        with gate_before(worker.url) as gate:
            yield gate


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path, program: Path, gate: Gate,
          monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """An account whose instances' workers are all the one behind the gate."""
    worker, fake = getattr(request, "param", None) or (WORKER, FakeVast)
    monkeypatch.setattr("manager.SCRIPT", program)
    gate.bodies.clear()
    gate.spoken.clear()
    with light_stage(tmp_path / "stage", worker) as warm, \
            scene(tmp_path / "one", warm, fake) as stage:
        stage.vast.container_env |= {"TARGET": gate.url, "TARGET_KEY": KEY}
        (stage.manager.home / "t.txt").write_text(TEXT)
        yield stage


def speaking(stage: Scene, *words: str) -> Run:
    return stage.launch("t.txt", "-o", "o.wav", "--json", *words, command="speak")


def rented(stage: Scene) -> None:
    stage.vast.add_offer()
    assert stage.start("--yes").status == 0


@pytest.mark.long  # run.sh has no room for it
def test_the_rented_worker_is_found_and_what_it_costs_is_told(stage: Scene) -> None:
    rented(stage)
    with CommandLines() as lines:
        run = speaking(stage).wait()
    assert run.status == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["spoken"] == 8 and 0 < told["dollars"] < 0.1
    assert "the worker goes on costing 0.0" in run.stderr and " stop\n" in run.stderr
    assert [key for key in (*stage.workers_keys(), *stage.vast.secrets) if lines.holding(key)] == []


@pytest.mark.long  # run.sh has no room for it
@pytest.mark.parametrize("wakes", [True, False], ids=["with --start", "woken by hand"])
def test_it_goes_on_with_an_instance_that_was_stopped_meanwhile(
        stage: Scene, gate: Gate, wakes: bool) -> None:
    """Whose address is another then."""
    rented(stage)
    if not wakes:  # two terminals know nothing of each other's pauses
        stage.vast.rate_violations = list  # type: ignore[method-assign]
    before = stage.only().worker_url
    gate.spoil = lambda text, count: gate.open.clear() if count == 3 else None
    run = speaking(stage, *["--start"] * wakes)
    wait_until(lambda: len(list(stage.manager.home.glob("o.wav.parts/*.part"))) >= 1, "a part")
    with stage.vast.lock:
        stage.only().stop()
    gate.spoil = lambda text, count: None
    gate.open.set()
    wait_until(lambda: "waiting for the worker" in run.stderr, "a word of it")
    if not wakes:
        wait_until(lambda: "cannot be called: it is stopped" in run.stderr, "what it is")
        assert stage.billed() == {stage.only().id: "stopped"}
        assert stage.start().status == 0
    assert run.wait().status == 0, run.stderr
    assert json.loads(run.stdout)["spoken"] == 8
    assert stage.only().worker_url != before
    assert set(gate.spoken.values()) <= {1, 2} and len(gate.spoken) == 8


def test_without_an_instance_it_says_so_and_rents_none(stage: Scene) -> None:
    stage.vast.add_offer()
    run = speaking(stage, "--start").wait()
    assert run.status == 5 and "no instance labelled 'bark-worker'" in run.stderr
    assert stage.changes() == []


@pytest.mark.parametrize("stage", [(PYWORKER, ServerlessVast)], indirect=True, ids=[""])
def test_an_endpoints_workers_speak_along_vasts_route(stage: Scene, gate: Gate) -> None:
    stage.vast.add_offer()
    assert stage.launch("up", "--yes", command="endpoint").wait().status == 0
    with CommandLines() as lines:
        run = speaking(stage, "--endpoint").wait()
    assert run.status == 0, run.stderr
    assert json.loads(run.stdout)["spoken"] == 8 and set(gate.spoken.values()) == {1}
    assert [key for key in stage.vast.secrets if lines.holding(key)] == []
