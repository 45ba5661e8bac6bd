"""`--serverless`: the real PyWorker in front of the worker, called as Vast's clients call it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import socket
import ssl
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, Answer, wait_until
from Crypto.PublicKey import RSA
from fake_serverless import ServerlessVast, ServerlessWorker, sign, signing_key
from manager import BASH, SCRIPT, managed
from vastai import Serverless

PLACE = {"WORKER_PORT": "3000", "CONTAINER_ID": "7", "REPORT_ADDR": "http://127.0.0.1:9",
         "PUBLIC_IPADDR": "127.0.0.1", "VAST_TCP_PORT_3000": "41234"}
ROUTE_SECONDS = 150.0  # from a request to a worker that was not there: PyWorker reports every 10 s
BURST = 40
BURST_SECONDS = 400.0  # on a machine with much else to do; 30 to 100 s seen


# Settings


def test_all_that_vast_must_set_is_there_or_all_that_is_not_is_named_at_once(
        bark: ModuleType) -> None:
    assert bark.Config.from_env(PLACE, serverless=True) == bark.replace(
        bark.Config(), worker_port=3000)
    with pytest.raises(bark.ConfigError) as error:
        bark.Config.from_env({"PORT": "x"}, serverless=True)
    _, *lines = str(error.value).splitlines()
    assert [line.split()[0] for line in lines] == [
        "PORT", "WORKER_PORT", "CONTAINER_ID", "REPORT_ADDR", "PUBLIC_IPADDR",
        "VAST_TCP_PORT_<WORKER_PORT>"]
    assert all("is not set, and --serverless needs it; allowed: " in line for line in lines[1:])


@pytest.mark.parametrize(("name", "value", "allowed"), [
    ("WORKER_PORT", "0", "from 1 to 65534"), ("WORKER_PORT", "65535", "from 1 to 65534"),
    ("CONTAINER_ID", "C.7", "a whole number"), ("REPORT_ADDR", "run.vast.ai", "http:// or https:"),
    ("REPORT_ADDR", "https://a b", "joined by commas"), ("PUBLIC_IPADDR", "1.2.3.4\n", "address"),
    ("VAST_TCP_PORT_3000", "65536", "from 1 to 65535"), ("UNSECURED", "true", "false or not set"),
    ("UNSECURED", "", "false or not set")])
def test_a_wrong_value_is_named_with_what_is_allowed(bark: ModuleType, name: str, value: str,
                                                     allowed: str) -> None:
    with pytest.raises(bark.ConfigError) as error:
        bark.Config.from_env({**PLACE, name: value}, serverless=True)
    (line,) = str(error.value).splitlines()[1:] if name != "WORKER_PORT" else str(
        error.value).splitlines()[1:2]
    assert line.startswith(f"  {name} is {value!r}") and allowed in line


def test_without_serverless_none_of_it_is_asked_for(bark: ModuleType) -> None:
    assert bark.Config.from_env({"WORKER_PORT": "x", "UNSECURED": "x"}) == bark.Config()


def test_a_start_without_vasts_variables_ends_with_2_and_one_message(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bark.os, "environ", {"PORT": "0"})
    monkeypatch.setattr(bark, "serve", lambda *_: pytest.fail("served all the same"))
    with pytest.raises(SystemExit) as end:
        bark.main(["--serverless"])
    assert end.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 6


def test_a_port_that_is_taken_is_an_error_before_anything_is_loaded(bark: ModuleType) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config = bark.Config(host="127.0.0.1", worker_port=port)
        with pytest.raises(bark.ConfigError, match=rf"WORKER_PORT {port}: Address already in use"):
            bark.check_port(config)
    bark.check_port(config)


def test_an_sdk_that_does_not_import_is_an_error_that_tells_what_to_install(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "vastai.serverless.server", None)
    with pytest.raises(bark.ConfigError, match=r"worker SDK.* pip install -r requirements\.txt"):
        bark.PyWorker(bark.Config(worker_port=3000), 1, tmp_path)


# What PyWorker is told


def test_only_ready_and_failed_stand_in_the_status_file_which_is_private(bark: ModuleType) -> None:
    status, other = bark.StatusFile(), bark.StatusFile()
    try:
        path = Path(status.path)
        for name in ("loading", "warming", "ready", "draining", "failed"):
            status.follow(name)
        assert path.read_text() == f"{bark.READY_LINE}\n{bark.FAILED_LINE}\n"
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
def test_a_request_is_worth_its_characters(bark: ModuleType, payload: dict[str, Any],
                                           worth: float) -> None:
    assert bark.character_count("text")(payload) == worth


def test_pyworker_serves_every_path_that_takes_a_text_and_one_has_the_benchmark(
        bark: ModuleType) -> None:
    from vastai.serverless.server import worker as sdk

    made = bark.handlers(sdk, bark.Config(timeout=77.0, max_text_length=9))
    assert [one.route for one in made] == [path for path, route in bark.ROUTES.items()
                                           if route.method == "POST"]
    assert [one.workload_calculator({"input": "four"}) for one in made] == [0.0, 4.0]
    assert {(one.allow_parallel_requests, one.max_queue_time) for one in made} == {(True, 77.0)}
    (benchmark,) = [one.benchmark_config for one in made if one.benchmark_config]
    assert benchmark.dataset == [{"text": bark.BENCHMARK_TEXT[:9], "seed": -1}]


def test_a_signature_that_was_refused_does_not_stay_in_the_log(
        bark: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("of/vastai/backend.py")
    logger.addFilter(bark.WithoutSignatures())
    logger.error("Signature error: signature verification failed, sig:c2VjcmV0")
    logger.error("Failed to fetch pubkey after 5 attempts")
    assert [record.getMessage() for record in caplog.records] == [
        "PyWorker refused a request: its signature is wrong",
        "Failed to fetch pubkey after 5 attempts"]


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
    return subprocess.run([BASH, "-c", 'source "$1"; endpoint_on_start', "test", SCRIPT],
                          capture_output=True, text=True, check=True).stdout


def add_endpoint(vast: ServerlessVast, max_workers: int, **env: str) -> None:
    """What `endpoint up` makes, by hand."""
    options = {"BARK_MODEL": "suno/bark-small", "HF_HOME": "/workspace/models",
               "BARK_MAX_BATCH": "2", **env}
    row = vast.add_endpoint(max_workers=max_workers, cold_workers=0, inactivity_timeout=600)
    vast.templates[1] = {
        "id": 1, "hash_id": "abc", "image": "ghcr.io/darvondoom/libread-bark-tts:latest",
        "onstart": on_start(), "recommended_disk_space": "50", "tag": None,
        "env": " ".join(["-p 3000:3000", *(f"-e {name}={options[name]}" for name in options)])}
    vast.groups[1] = {"id": 1, "endpoint_id": row["id"], "template_hash": "abc",
                      "search_params": "gpu_ram>=8"}


def direct(worker: ServerlessWorker, path: str, body: object) -> Answer:
    """From the worker's own port, past PyWorker."""
    return post(f"http://127.0.0.1:{worker.port}{path}", body)


def signed(url: str, signature: str, payload: object) -> dict[str, Any]:
    return {"auth_data": {"cost": "5", "endpoint": "bark-worker", "reqnum": 9, "request_idx": 9,
                          "url": url, "signature": signature}, "session_id": None,
            "payload": payload}


@pytest.fixture(scope="module")
def served(toy: Path, tmp_path_factory: pytest.TempPathFactory,
           ) -> Iterator[tuple[ServerlessVast, ServerlessWorker, dict[str, Any]]]:
    """An endpoint whose only worker the first request has brought, and that request's result."""
    with ServerlessVast(tmp_path_factory.mktemp("served"), {"suno/bark-small": toy}) as vast:
        vast.add_offer()
        add_endpoint(vast, max_workers=1, BARK_API_KEY="of-no-use-here", BARK_IDLE_STOP="0.01",
                     BARK_START_LIMIT="0.01", BARK_MAX_HOURS="0.0001")
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


def test_the_call_from_python_in_the_readme_brings_speech(
        served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vast, worker, _ = served
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n([^`]*Serverless[^`]*)```", readme)
    monkeypatch.setattr("vastai.Serverless", lambda: Client(
        vast.account_key, webserver_url=vast.url, autoscaler_url=vast.url))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    straight = direct(worker, "/synthesize", {"text": "Hello, world!"}).json
    assert (tmp_path / "hello.wav").read_bytes() == base64.b64decode(straight["audio"])


def test_the_worker_reports_its_speed_in_characters_once_its_batch_was_tried(
        served: Served, bark: ModuleType) -> None:
    _, worker, _ = served
    before_ready, _, _ = worker.log.partition("PyWorker tells Vast: ready")
    tried = before_ready.count("POST /synthesize status=200")
    whole = bark.BENCHMARK_RUNS * 2  # of two slots; the last line may come a moment late
    assert whole - 1 <= tried <= whole
    seeds = re.findall(r"seed=(\d+)\n", before_ready)
    assert len(set(seeds)) == len(seeds), "a run was answered from the cache"
    assert worker.is_ready and worker.report["max_perf"] > len(bark.BENCHMARK_TEXT) / 60
    (kept,) = (worker.container.root / "workspace/models/bark-worker").glob("benchmark-*")
    assert float(kept.read_text()) == worker.report["max_perf"]
    assert list(worker.container.root.rglob(".has_benchmark")) == []


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


def test_what_needs_no_signature_is_not_served(served: Served, bark: ModuleType) -> None:
    _, worker, _ = served
    session = signed(worker.worker_url, "", {"lifetime": 0.1, "on_close_route": "/synthesize",
                                             "on_close_payload": {"text": "For nothing."}})
    for path in bark.UNSIGNED_PATHS:
        answer = post(worker.worker_url + path, session)
        assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")
    long = signed(worker.worker_url, "", {"text": "x" * 3_000_000})
    assert post(f"{worker.worker_url}/synthesize", long).status == 413


def test_no_request_can_forge_the_lines_that_say_ready_or_failed(
        served: Served, bark: ModuleType) -> None:
    vast, worker, _ = served
    (status_file,) = (worker.container.root / "tmp").glob("bark-worker-*")
    lines, url = f"{bark.FAILED_LINE}\n{bark.READY_LINE}\n", worker.worker_url
    for payload in ({"text": lines}, {"text": "Hi.", "voice": lines}, {lines: lines}):
        direct(worker, "/synthesize", payload)
        post(f"{url}/synthesize", signed(url, sign(signing_key(), url), payload))
    good = signed(url, sign(signing_key(), url), {"text": "Hello."})
    assert post(f"{url}/synthesize", good).status == 200
    reports = len(vast.calls("POST", "/worker_status/"))
    vast.wait_for_call("POST", "/worker_status/", reports + 1)
    assert status_file.read_text() == f"{bark.READY_LINE}\n"
    assert worker.errors == [] and worker.log.count("PyWorker tells Vast: ready") == 1


def test_its_log_has_neither_keys_nor_signatures_nor_what_was_said(served: Served) -> None:
    vast, worker, first = served
    secrets = [*vast.secrets, first["auth_data"]["signature"], "of-no-use-here", "Hello there"]
    assert [secret for secret in secrets if secret in worker.log] == []
    assert "BARK_API_KEY is of no use with --serverless" in worker.log
    assert not re.search(r"DEBUG|api_key=|Worker Status", worker.log)


def test_nothing_has_it_stop_by_itself(served: Served) -> None:
    """It has been there for much longer than what it was given, idle for the most part."""
    vast, worker, _ = served
    with urllib.request.urlopen(f"http://127.0.0.1:{worker.port}/health", timeout=60) as reply:
        health = json.load(reply)
    assert health["guard"] == {} and health["uptime"] > 0.6
    assert (worker.intended, vast.calls("PUT", r"/instances/\d+/?$")) == ("running", [])
    assert ("BARK_IDLE_STOP, BARK_START_LIMIT, BARK_MAX_HOURS: of no effect here: Vast itself ends"
            " the workers of an endpoint") in worker.log and "bark-guard" not in worker.log


def test_terminated_it_finishes_and_leaves_nothing_behind(served: Served) -> None:
    """The last test on this worker: it comes to an end here."""
    _, worker, _ = served
    (process,) = worker.workers()
    process.terminate()
    process.wait(20)
    assert "status=draining" in worker.log
    assert list((worker.container.root / "tmp").glob("bark-worker-*")) == []


# Two workers


@pytest.mark.long
@pytest.mark.timeout(BURST_SECONDS + 60)
def test_a_burst_over_two_workers_loses_no_request_and_serves_each_once(
        bark: ModuleType, tmp_path: Path) -> None:
    """From no worker at all; on the built-in voice, as it speaks from its own folder."""
    with ServerlessVast(tmp_path, {}) as vast:
        vast.add_offer()
        vast.add_offer()
        add_endpoint(vast, max_workers=2, BARK_MODEL="/app/builtin-voice")
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
