"""The guards by which an instance stops itself, against the fake API.

The worker's own part by itself and in the real worker, the on-start command's as it is ordered, and
both as `start` rents them.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import clean_environment, running_worker, wait_until
from fake_vast import FakeVast, Instance
from manager import BASH, RUN_SECONDS, sourcing
from renting import Act, Acts, Scene, acts_of, make_worker_real, plays


@pytest.fixture
def vast(tmp_path: Path) -> Iterator[FakeVast]:
    with FakeVast(tmp_path / "vast", {}) as fake:
        yield fake


# The fake


def status_of(vast: FakeVast, method: str, path: str, key: str, body: object = None) -> int:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(vast.url + path, data, {"Authorization": f"Bearer {key}"},
                                     method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_a_containers_key_may_start_stop_and_destroy_its_own_instance_alone(
        vast: FakeVast) -> None:
    one, other = (vast.add_instance(fate="silent") for _ in range(2))
    stop = {"state": "stopped"}

    def status(instance: Instance, method: str, body: object = None) -> int:
        return status_of(vast, method, f"/api/v0/instances/{instance.id}/", one.api_key, body)
    assert status(other, "PUT", stop) == status(other, "DELETE") == 403
    assert status(one, "PUT", {"label": "x"}) == status(one, "GET") == 403
    assert status_of(vast, "GET", "/api/v1/instances/", one.api_key) == 403
    assert status_of(vast, "PUT", f"/api/v0/instances/{one.id}/", "nobody's", stop) == 401
    assert (one.touched, other.touched) == ([], [])
    assert status(one, "PUT", stop) == status(one, "DELETE") == 200
    assert (one.touched, vast.destroyed) == (["stopped", "destroy"], [one.id])


# What Vast answers


@pytest.mark.parametrize(("status", "body", "words", "seconds"), [
    (200, b'{"success": true}', "still runs", 120.0),
    (200, b'{"success": false, "msg": "no"}', "no success", 0.0),
    (200, b'{"success": "true"}', "no success", 0.0),
    *[(200, body, "what is no answer", 20.0) for body in
      (b"", b"<html>", b"[]", b"null", b"{}", b'{"a', b"\xff", b"[" * 9999)],
    (302, b"", "HTTP 302", 0.0), (401, b"", "does not take the container's key", 0.0),
    (403, b"", "the container's key may not", 0.0), (404, b"", "no such instance", 0.0),
    (408, b"", "HTTP 408", 20.0), (429, b"", "too many requests", 0.0),
    (500, b"", "HTTP 500", 20.0), (502, b"", "HTTP 502", 20.0),
])
def test_an_answer_is_told_and_may_have_an_effect_unless_it_is_a_clear_no(
        bark: ModuleType, status: int, body: bytes, words: str, seconds: float) -> None:
    answer = bark.judge_answer(status, body)
    assert words in answer.problem and answer.seconds == seconds


def container(bark: ModuleType, instance: Instance, url: str) -> Any:
    return bark.Container(str(instance.id), instance.api_key, url)


def test_one_order_stops_the_instance_by_its_own_key(bark: ModuleType, vast: FakeVast) -> None:
    instance = vast.add_instance(fate="silent")
    assert "still runs" in bark.order_stop(container(bark, instance, vast.url)).problem
    assert instance.touched == ["stopped"] and instance.intended == "stopped"


@pytest.mark.parametrize("fault", [
    {"drop": "before"}, {"drop": "after"}, {"status": 302, "headers": {"Location": "/elsewhere"}},
    {"status": 307, "headers": {"Location": "/elsewhere"}}, {"status": 429, "body": "slow down"},
    {"status": 502, "body": "<html>"}, {"status": 200, "body": "stopped"},
    {"status": 200, "body": {"success": False}}])
def test_a_failed_order_raises_nothing_and_goes_nowhere_else(
        bark: ModuleType, vast: FakeVast, fault: dict[str, Any]) -> None:
    instance = vast.add_instance(fate="silent")
    vast.fault("PUT", f"/{instance.id}/", **fault)
    answer = bark.order_stop(container(bark, instance, vast.url))
    assert answer.problem and "still runs" not in answer.problem
    assert instance.api_key not in answer.problem
    assert len(vast.calls("*", "/")) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://nobody.invalid", "nonsense", "file:",
                                 "http://[", "http://a b/"])
def test_an_address_where_nobody_answers_is_told(bark: ModuleType, url: str) -> None:
    answer = bark.order_stop(bark.Container("7", "sesame", url))
    assert f"no answer from {url}" in answer.problem and "sesame" not in answer.problem
    assert answer.seconds == bark.UNCLEAR_SECONDS


def test_an_answer_that_never_ends_is_none(bark: ModuleType) -> None:
    release = threading.Event()
    answer = bark.within(0.01, lambda: release.wait(30) and None)
    release.set()
    assert "no answer from Vast within" in answer.problem


# The time file


def times(bark: ModuleType, *folders: Path, run: str = "run") -> Any:
    return bark.TimeFile(folders, run)


def test_the_time_outlasts_a_worker_and_no_run_of_the_container(
        bark: ModuleType, tmp_path: Path) -> None:
    since = time.monotonic() - 7
    times(bark, tmp_path / "a/b").save(since)
    assert times(bark, tmp_path / "a/b").load() == since
    assert times(bark, tmp_path / "a/b", run="another").load() is None
    times(bark, tmp_path / "a/b").forget()
    assert times(bark, tmp_path / "a/b").load() is None


def test_workers_of_one_container_share_its_run_and_no_others(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though their disk may be one; an on-start command begins a session of its own."""
    one, other = (bark.Container("7", key) for key in ("sesame", "another"))
    run = bark.container_run(one)
    assert run == bark.container_run(one) != bark.container_run(other) and "sesame" not in run
    monkeypatch.setattr(bark.os, "getsid", lambda process: 4_194_305)
    assert bark.container_run(one) != run


@pytest.mark.parametrize("content", [
    b"", b"nonsense", b"\xff\xfe", b"[]", b"null", b"7", b'{"run": "run"}', b"[" * 5000,
    *[b'{"run": "run", "since": %b}' % since for since in
      (b"null", b"-1", b"NaN", b"Infinity", b"1e300", b'"7"', b"true", b"[]")]])
def test_a_file_that_says_no_time_counts_for_nothing(
        bark: ModuleType, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bark-idle.json").write_bytes(content)
    assert times(bark, tmp_path).load() is None
    times(bark, tmp_path).save(1.0)
    assert times(bark, tmp_path).load() == 1.0


def test_where_one_folder_cannot_be_written_the_next_is_and_else_it_is_told_once(
        bark: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    kept = times(bark, tmp_path / "file/none", tmp_path)
    kept.save(1.0)
    assert kept.load() == 1.0
    lost = times(bark, tmp_path / "file/none")
    lost.save(1.0)
    lost.save(2.0)
    assert lost.load() is None
    assert [record.message for record in caplog.records if "cannot be kept" in record.message] == [
        f"the time of the last speech cannot be kept ({tmp_path}/file/none/bark-idle.json:"
        " Not a directory): a worker that is started again counts anew"]


# The worker's guard, on a clock of ours


class Clock:
    """Seconds that pass only when told to, or a little with each look while something waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now


class Stage:
    """A guard of a minute and a half that looks when told to; Vast gives `answers` in turn."""

    def __init__(self, bark: ModuleType, patch: pytest.MonkeyPatch, folder: Path,
                 answers: list[Any], clock: Clock | None = None) -> None:
        self.clock, self.orders, self.answers = clock or Clock(), [], answers
        self.meanwhile: Callable[[], None] = lambda: None
        patch.setattr(bark, "time", SimpleNamespace(monotonic=self.clock.monotonic))
        patch.setattr(bark, "LOOK_SECONDS", 0.0)
        self.guard = bark.Guard(90.0, self.order, times(bark, folder), {}, [])

    def order(self) -> Any:
        self.orders.append(round(self.clock.now))
        self.meanwhile()
        return self.answers.pop(0)

    def pass_time(self, seconds: int) -> None:
        """Looks at each second."""
        for _ in range(seconds):
            self.clock.now += 1
            self.guard._look()


@pytest.fixture
def stage(bark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    return Stage(bark, monkeypatch, tmp_path, [bark.Answer("Vast answers HTTP 403")] * 50)


def test_before_the_first_time_that_it_is_ready_nothing_counts(stage: Stage) -> None:
    stage.pass_time(200)
    assert stage.orders == [] and stage.guard.facts() == {
        "idle_stop": {"limit": 90.0, "left": None}}
    stage.guard.ready()
    stage.pass_time(80)
    assert stage.orders == [] and stage.guard.facts()["idle_stop"]["left"] == pytest.approx(10, 0.1)
    stage.guard.ready()  # again: that does not count anew
    stage.pass_time(11)
    assert len(stage.orders) == 1


def test_work_counts_from_its_end_and_is_never_cut(stage: Stage) -> None:
    stage.guard.ready()
    stage.pass_time(80)
    with stage.guard.work():
        stage.pass_time(300)
        assert stage.guard.left() == 90.0 and stage.orders == []
    stage.pass_time(89)
    assert stage.orders == []
    stage.pass_time(3)
    assert len(stage.orders) == 1


def test_work_that_is_not_let_in_does_not_count(bark: ModuleType, stage: Stage) -> None:
    stage.guard.ready()
    stage.pass_time(80)
    refused = bark.Unavailable("full", code="queue_full", retry_after=1)
    with pytest.raises(bark.Unavailable), stage.guard.work():
        raise refused
    stage.pass_time(11)
    assert len(stage.orders) == 1


def test_while_an_order_is_on_its_way_no_work_is_let_in(bark: ModuleType, stage: Stage) -> None:
    refusals = []

    def arrive() -> None:
        with pytest.raises(bark.Unavailable) as refusal, stage.guard.work():
            pass
        refusals.append(refusal.value)
    stage.meanwhile = arrive
    stage.guard.ready()
    stage.pass_time(91)
    assert [one.code for one in refusals] == ["draining"] and "start" in str(refusals[0])
    with stage.guard.work():  # the order was refused, so work goes on
        stage.pass_time(100)
    assert len(stage.orders) == 1


def test_refusals_are_met_with_growing_pauses_and_told(
        stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.guard.ready()
    stage.pass_time(3000)
    pauses = [after - before for before, after in zip(stage.orders, stage.orders[1:], strict=False)]
    assert pauses[:7] == pytest.approx([5, 10, 20, 40, 80, 160, 320], abs=1)
    assert set(pauses[7:]) <= {600, 601, 602}
    facts = stage.guard.facts()
    assert facts["attempts"] == len(stage.orders) and facts["idle_stop"]["left"] == 0
    assert "HTTP 403" in facts["error"] and "manage-bark-worker.sh stop" in facts["error"]
    assert sum("HTTP 403" in record.message for record in caplog.records) == len(stage.orders)


def test_it_warns_a_minute_ahead_and_once(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> int:
        return sum("stops itself in" in record.message for record in caplog.records)
    stage.guard.ready()
    stage.pass_time(28)
    assert warnings() == 0
    stage.pass_time(30)
    assert warnings() == 1
    with stage.guard.work():
        stage.pass_time(1)
    stage.pass_time(40)
    assert warnings() == 2 and stage.orders == []


def test_a_worker_that_is_started_again_goes_on_counting(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: Stage) -> None:
    """Also before it is ready."""
    stage.guard.ready()
    stage.pass_time(80)
    second = Stage(bark, monkeypatch, tmp_path, [bark.Answer("x")], stage.clock)
    second.pass_time(5)
    assert second.orders == []
    second.pass_time(6)
    assert len(second.orders) == 1


def test_of_two_workers_the_one_that_works_counts(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: Stage) -> None:
    second = Stage(bark, monkeypatch, tmp_path, [bark.Answer("x")] * 9, stage.clock)
    stage.guard.ready()
    second.guard.ready()
    with second.guard.work():
        for _ in range(200):
            second.pass_time(1)
            stage.pass_time(1)
    stage.pass_time(80)
    assert stage.orders == second.orders == []


def test_whoever_wakes_the_instance_begins_anew(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: Stage) -> None:
    stage.guard.ready()
    stage.meanwhile = lambda: left.append(times(bark, tmp_path).load())
    left: list[float | None] = []
    stage.pass_time(91)
    assert left == [None]
    stage.pass_time(1)
    assert times(bark, tmp_path).load() is not None  # it was refused, so the time counts


def test_a_worker_that_ends_orders_nothing(stage: Stage) -> None:
    stage.guard.ready()
    stage.guard.close()
    stage.pass_time(200)
    assert stage.orders == []


# What is armed where


ALL = {"BARK_IDLE_STOP": "30", "BARK_START_LIMIT": "60", "BARK_MAX_HOURS": "8"}
ON_VAST = {"CONTAINER_ID": "7", "CONTAINER_API_KEY": "sesame"}


@pytest.mark.parametrize(("settings", "armed", "words"), [
    ({**ALL, **ON_VAST}, ["idle_stop", "start_limit", "max_hours"], "guard of instance 7:"),
    ({"BARK_MAX_HOURS": "8", **ON_VAST}, ["max_hours"], "BARK_MAX_HOURS=8"),
    (ALL, [], "BARK_IDLE_STOP, BARK_START_LIMIT, BARK_MAX_HOURS: of no effect here: this is"
     " no container of Vast's"),
    ({"BARK_IDLE_STOP": "30", "CONTAINER_ID": "7"}, [], "BARK_IDLE_STOP: of no effect"),
    (ON_VAST, [], ""), ({**ON_VAST, "BARK_IDLE_STOP": "0"}, [], ""),
])
def test_guards_are_armed_on_vast_alone_and_elsewhere_say_so(
        bark: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture,
        settings: dict[str, str], armed: list[str], words: str) -> None:
    caplog.set_level(logging.INFO)
    guard = bark.build_guard(bark.Config.from_env(settings), [tmp_path])
    assert list(guard.facts()) == armed
    said = [record.message for record in caplog.records]
    assert len(said) == bool(words) and words in "".join(said) and "sesame" not in "".join(said)


def test_what_the_on_start_command_counts_is_told_from_its_note(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
        caplog: pytest.LogCaptureFixture) -> None:
    """While it is fresh; without one, that nothing counts."""
    config = bark.Config.from_env({"BARK_START_LIMIT": "60", "BARK_MAX_HOURS": "8", **ON_VAST})
    clock = Clock()
    monkeypatch.setattr(bark, "time", SimpleNamespace(monotonic=clock.monotonic))
    guard = bark.build_guard(config, [tmp_path / "none", tmp_path])
    note = {"at": clock.now, "start_limit": clock.now + 100, "max_hours": clock.now + 9,
            "attempts": 2, "problem": "Vast answers HTTP 500"}
    (tmp_path / "bark-guard.json").write_text(json.dumps(note))
    guard._read_note()
    facts = guard.facts()
    assert facts["start_limit"] == {"limit": 3600.0, "left": pytest.approx(100, abs=1)}
    assert facts["max_hours"] == {"limit": 28_800.0, "left": pytest.approx(9, abs=1)}
    assert facts["attempts"] == 2 and facts["error"].startswith("Vast answers HTTP 500; end the")
    clock.now += 200
    guard._read_note()
    guard._read_note()
    assert guard.facts()["max_hours"] == {"limit": 28_800.0, "left": None}
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    for nonsense in ("", "[]", '{"at": true}', '{"at": -1}', '{"at": 1e999}', "{" * 9999):
        (tmp_path / "bark-guard.json").write_text(nonsense)
        guard._read_note()
        assert guard.facts()["max_hours"]["left"] is None


# The real worker


def guarded_worker(vast: FakeVast, toy: Path, instance: Instance, **settings: str) -> Any:
    """One that outlives the stop of its instance, which is none of its own."""
    return running_worker(**{
        "BARK_MODEL": str(toy), "BARK_IDLE_STOP": "0.05", "CONTAINER_ID": str(instance.id),
        "CONTAINER_API_KEY": instance.api_key, "VAST_URL": vast.url,
        "HF_HOME": str(vast.folder / "models"), "BARK_API_KEY": "mine", **settings})


def test_a_worker_that_is_asked_for_everything_but_speech_stops_its_instance(
        vast: FakeVast, toy: Path) -> None:
    """After refusals, which do it no harm, and which /health and the log tell."""
    instance = vast.add_instance(fate="silent")
    vast.fault("PUT", f"/{instance.id}/", status=403, body={"success": False, "msg": "no"})
    with guarded_worker(vast, toy, instance) as worker:
        worker.wait_for("ready")

        def refused() -> Any:
            for path in ("/ready", "/voices", "/v1/models", "/"):
                worker.call(path, headers={"Authorization": "Bearer mine"})
            worker.call("/synthesize", {"text": ""}, headers={"Authorization": "Bearer mine"})
            return worker.health()["guard"].get("error")
        error = wait_until(refused, "refusal")
        assert "HTTP 403" in error and "manage-bark-worker.sh stop" in error
        answer = worker.call("/synthesize", {"text": "Hi."}, headers={
            "Authorization": "Bearer mine"})
        assert answer.status == 200
        wait_until(lambda: instance.touched == ["stopped"], "stop")
        log = "".join(worker.log)
        assert "stops itself in" in log and "HTTP 403" in log and instance.api_key not in log
        assert worker.call("/synthesize", {"text": "Hi."}, headers={
            "Authorization": "Bearer mine"}).json["error"]["code"] == "draining"
        assert worker.stop() == 0
    assert len(vast.calls("PUT", f"/{instance.id}/")) == 2


@pytest.mark.long
def test_long_work_outlasts_the_limit(vast: FakeVast, toy: Path) -> None:
    """It takes several times as long as the worker may be idle."""
    instance = vast.add_instance(fate="silent")
    with guarded_worker(vast, toy, instance, BARK_IDLE_STOP="0.02", BARK_API_KEY="",
                        BARK_MAX_BATCH="1", BARK_CACHE_MB="0") as worker:
        worker.wait_for("ready")
        began = time.monotonic()
        while time.monotonic() < began + 6.0:
            assert worker.speak("Hello there, you. " * 24).status == 200
        assert instance.touched == []
        wait_until(lambda: instance.touched == ["stopped"], "stop")
        assert time.monotonic() > began + 6.0


def test_elsewhere_than_on_vast_the_worker_says_that_nothing_is_armed(toy: Path) -> None:
    with running_worker(BARK_MODEL=str(toy), BARK_IDLE_STOP="0.01") as worker:
        assert worker.wait_for("ready")["guard"] == {}
        assert "BARK_IDLE_STOP: of no effect here" in "".join(worker.log)


# The on-start command's part, as `start` orders it


@pytest.fixture(scope="module")
def watch() -> str:
    return subprocess.run(sourcing('printf "%s" "$WATCH"'), capture_output=True, text=True,
                          check=True).stdout


class Watching:
    """It runs beside no worker, in a container that outlives its stop; `log` is what it prints."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.folder, self.log = process, folder, ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.log += line

    def note(self) -> dict[str, Any]:
        """What it left for the worker, once it has."""
        path = self.folder / "bark-guard.json"
        wait_until(path.exists, "note")
        return json.loads(path.read_text())


@contextlib.contextmanager
def watching(watch: str, vast: FakeVast, instance: Instance, *, shell: str = BASH,
             **settings: str) -> Iterator[Watching]:
    models = vast.folder / "models"
    environment = clean_environment(**{
        "CONTAINER_ID": str(instance.id), "CONTAINER_API_KEY": instance.api_key,
        "VAST_URL": vast.url, "HF_HOME": str(models), "PORT": "9", **settings})
    process = subprocess.Popen([shell, "-c", f"{watch}\nwait"], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    one = Watching(process, models / "bark-worker")
    try:
        yield one
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        one.reader.join(10)
        print(one.log)
        assert instance.api_key not in one.log


@contextlib.contextmanager
def answering(status: int) -> Iterator[str]:
    """The port of what answers every request so, for as long as it is there."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *words: object) -> None:
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield str(server.server_port)
        server.shutdown()


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_without_a_worker_that_is_ready_the_instance_is_stopped(
        watch: str, vast: FakeVast, shell: str) -> None:
    instance = vast.add_instance(fate="silent")
    with answering(503) as port, watching(
            watch, vast, instance, shell=shell, PORT=port, BARK_START_LIMIT="0.02") as one:
        wait_until(lambda: instance.touched == ["stopped"], "stop")
        wait_until(lambda: "no worker was ready for 0.02 min" in one.log, "log")


def test_a_worker_that_is_ready_holds_it_off_until_it_is_gone(watch: str, vast: FakeVast) -> None:
    """Its time is told only while it counts."""
    instance = vast.add_instance(fate="silent")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(answering(200))
        with watching(watch, vast, instance, PORT=port, BARK_START_LIMIT="0.03") as one:
            wait_until(lambda: time.monotonic() > began + 4, "time")
            assert instance.touched == [] and not one.note()["start_limit"]
            stack.close()
            wait_until(lambda: one.note()["start_limit"], "limit")
            wait_until(lambda: instance.touched == ["stopped"], "stop")


def test_at_the_latest_it_stops_whatever_the_worker_does(watch: str, vast: FakeVast) -> None:
    """Having given the hours back before, for whoever wakes it at once."""
    instance = vast.add_instance(fate="silent")
    with answering(200) as port, watching(
            watch, vast, instance, PORT=port, BARK_MAX_HOURS="0.0005",
            BARK_START_LIMIT="60") as one:
        vast.on("PUT", f"/{instance.id}/", lambda request: before.append(one.note()["spent"]))
        before: list[float] = []
        wait_until(lambda: instance.touched == ["stopped"], "stop")
        assert before == [0]
        wait_until(lambda: one.note()["spent"] > 1.8, "hours taken again")


@pytest.mark.parametrize(("content", "age", "spent"), [
    ('{"spent": 3500}', 0, 3500), ('{"spent": 3500}', 840, 3500), ('{"spent": 3500}', 960, 0),
    ('{"spent": 3500}', -7200, 3500), ('{"spent": -9}', 0, 0), ('{"spent": NaN}', 0, 0),
    ("", 0, 0), ("[]", 0, 0), ("nonsense", 0, 0), ('{"spent": null}', 0, 0)])
def test_a_young_heartbeat_goes_on_counting_and_an_old_one_begins_anew(
        watch: str, vast: FakeVast, content: str, age: int, spent: int) -> None:
    """One from the future is young: the clock was set back."""
    instance = vast.add_instance(fate="silent")
    file = vast.folder / "models/bark-worker/bark-guard.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    os.utime(file, (time.time() - age,) * 2)
    with watching(watch, vast, instance, BARK_MAX_HOURS="1") as one:
        wait_until(lambda: '"at"' in file.read_text(), "heartbeat")
        note = one.note()
        assert spent <= note["spent"] < spent + 20 and abs(time.time() - file.stat().st_mtime) < 20
        assert note["max_hours"] == pytest.approx(time.monotonic() + 3600 - spent, abs=20)


@pytest.mark.long
def test_refusals_are_met_with_pauses_and_told_in_the_note(watch: str, vast: FakeVast) -> None:
    instance = vast.add_instance(fate="silent")
    vast.fault("PUT", f"/{instance.id}/", status=403, body="no")
    with watching(watch, vast, instance, BARK_START_LIMIT="0.01") as one:
        wait_until(lambda: one.note()["problem"], "refusal")
        assert "HTTP 403" in one.note()["problem"] and one.note()["attempts"] == 1
        wait_until(lambda: instance.touched == ["stopped"], "stop")
        first, second = (call.time for call in vast.calls("PUT", f"/{instance.id}/")[:2])
        assert second - first > 9 and "again in 10 s" in one.log
        assert "manage-bark-worker.sh stop" in one.log


@contextlib.contextmanager
def trickling() -> Iterator[str]:
    """The address of what sends a byte a second and never comes to an end."""
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not over.wait(1.0):
                self.wfile.write(b"x")

        def log_message(self, format: str, *words: object) -> None:
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        over.set()
        server.shutdown()


@pytest.mark.long
def test_an_answer_that_never_ends_is_tried_again(watch: str, vast: FakeVast) -> None:
    instance = vast.add_instance(fate="silent")
    with trickling() as url, watching(
            watch, vast, instance, BARK_START_LIMIT="0.01", VAST_URL=url) as one:
        wait_until(lambda: "again in" in one.log, "end of the attempt", 60)
        assert "no answer from Vast: no answer in time" in one.log


@pytest.mark.long
def test_an_answer_that_does_not_come_is_tried_again(watch: str, vast: FakeVast) -> None:
    instance = vast.add_instance(fate="silent")
    vast.fault("PUT", f"/{instance.id}/", delay=60.0, drop="before")
    with watching(watch, vast, instance, BARK_START_LIMIT="0.01") as one:
        wait_until(lambda: instance.touched == ["stopped"], "stop", 90)
        assert "no answer from Vast: timed out" in one.log


def test_where_it_cannot_write_beside_the_models_it_does_elsewhere(
        watch: str, vast: FakeVast, tmp_path: Path) -> None:
    instance = vast.add_instance(fate="silent")
    (vast.folder / "models").write_text("a file")
    with watching(watch, vast, instance, BARK_START_LIMIT="0.02", TMPDIR=str(tmp_path)) as one:
        one.folder = tmp_path
        assert one.note()["start_limit"]
        wait_until(lambda: instance.touched == ["stopped"], "stop")


@pytest.mark.parametrize(("settings", "limit"), [
    ({"BARK_START_LIMIT": "soon"}, 3600), ({"BARK_START_LIMIT": "nan"}, 3600),
    ({"BARK_START_LIMIT": "inf"}, 3600), ({"BARK_START_LIMIT": "-1"}, 3600),
    ({"BARK_START_LIMIT": "2", "BARK_MAX_HOURS": "x"}, 120)])
def test_a_limit_that_the_worker_refuses_is_an_hour(
        watch: str, vast: FakeVast, settings: dict[str, str], limit: int) -> None:
    instance = vast.add_instance(fate="silent")
    with watching(watch, vast, instance, **settings) as one:
        assert one.note()["start_limit"] == pytest.approx(time.monotonic() + limit, abs=20)
        assert instance.touched == []


@pytest.mark.parametrize("settings", [
    {}, {"BARK_START_LIMIT": "", "BARK_MAX_HOURS": ""}, {"BARK_START_LIMIT": "0"},
    {"BARK_START_LIMIT": "0.01", "CONTAINER_API_KEY": ""},
    {"BARK_START_LIMIT": "0.01", "CONTAINER_ID": "abc"}])
def test_what_is_not_armed_ends_at_once(watch: str, vast: FakeVast,
                                        settings: dict[str, str]) -> None:
    instance = vast.add_instance(fate="silent")
    with watching(watch, vast, instance, **settings) as one:
        assert one.process.wait(30) == 0 and instance.touched == []
    assert one.log == ""


# What `start` rents


@pytest.fixture(scope="module")
def acts(request: pytest.FixtureRequest,
         tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acts]:
    with acts_of(request, tmp_path_factory.mktemp("acts")) as playing:
        yield playing


SHORT = 0.1  # minutes


def killed_start(stage: Scene, method: str, path: str, when: str = "before",
                 **settings: str) -> None:
    """A start that is killed by SIGKILL at a request; what it ordered takes its way."""
    def kill(request: object) -> None:
        stage.manager.runs[-1].process.kill()
    stage.vast.on(method, path, kill, when=when)
    run = stage.launch("--yes", BARK_START_LIMIT=str(SHORT), **settings).wait()
    assert (run.status, run.stdout) == (-signal.SIGKILL, "")


def stopped(stage: Scene, seconds: float = 60.0) -> Instance:
    """The one instance, once it has stopped itself and by its own key."""
    instance = wait_until(lambda: list(stage.vast.instances.values()), "instance")[0]
    wait_until(lambda: stage.billed() == {instance.id: "stopped"}, "stop", seconds)
    wait_until(lambda: not instance.container.processes(), "end of its processes")
    assert {one.container for one in stage.vast.calls("PUT", f"/instances/{instance.id}/")} == {
        instance.id}
    return instance


def start_killed_while_it_orders(stage: Scene) -> None:
    stage.workers_say("loading")
    stage.vast.add_offer()
    killed_start(stage, "PUT", "/asks/")
    stopped(stage)


def start_killed_while_the_worker_loads(stage: Scene) -> None:
    stage.workers_say("loading")
    stage.vast.add_offer()
    stage.vast.on("PUT", "/asks/", lambda request: stage.vast.on(
        "GET", "/api/v1/instances/",
        lambda request: stage.manager.runs[-1].process.kill()), when="after")
    run = stage.launch("--yes", BARK_START_LIMIT=str(SHORT)).wait()
    assert run.status == -signal.SIGKILL
    stopped(stage)


def start_killed_while_it_wakes(stage: Scene) -> None:
    stage.workers_say("loading")
    on_start = subprocess.run(sourcing('printf "%s" "$ON_START"'), capture_output=True, text=True,
                              check=True).stdout
    old = stage.vast.add_instance(state="stopped", onstart=on_start, env={
        "BARK_API_KEY": "k", "BARK_START_LIMIT": str(SHORT)})
    stage.vast.on("PUT", f"/instances/{old.id}/",
                  lambda request: stage.manager.runs[-1].process.kill(), when="after")
    assert stage.start("--yes").status == -signal.SIGKILL
    assert old.touched == ["running"]
    wait_until(lambda: old.touched == ["running", "stopped"], "stop", 60)


def start_killed_while_it_searches(stage: Scene) -> None:
    stage.vast.add_offer()
    killed_start(stage, "POST", "/bundles/")
    assert stage.billed() == {}


def worker_that_ends(stage: Scene, status: str) -> None:
    stage.vast.container_env["ENDS"] = status
    stage.vast.add_offer()
    killed_start(stage, "PUT", "/asks/", when="after")
    assert f"bark-worker ended with status {status}" in stopped(stage).log


def worker_that_ends_with_0(stage: Scene) -> None:
    worker_that_ends(stage, "0")


def worker_that_refuses_its_settings(stage: Scene) -> None:
    worker_that_ends(stage, "2")


def worker_in_a_crash_loop(stage: Scene) -> None:
    worker_that_ends(stage, "1")


def at_the_latest(stage: Scene) -> None:
    """The worker is ready and stays it, unless this machine is so slow that it never gets there."""
    stage.vast.add_offer()
    stage.start("--yes", "--idle-stop", "0", "--max-hours", "0.002")
    assert "BARK_MAX_HOURS are over" in stopped(stage).log


def told_and_kept(stage: Scene) -> None:
    stage.vast.add_offer()
    run = stage.start("--yes", "--idle-stop", "0", "--max-hours", "9")
    assert run.status == 0
    last = " ".join(run.stderr.splitlines()[-2:])
    assert "stops itself after 60 min without a worker that is ready, 9 h in all" in last
    assert "an application gets no connection until" in last and "start wakes it" in last
    assert "not tried it live" in last
    again = stage.start("--idle-stop", "7", "--max-hours", "3")
    assert "keeps what it was rented with; for a new one with --idle-stop, --max-hours" in (
        again.stderr)
    assert "9 h in all" in again.stderr.splitlines()[-2]
    assert stage.billed() == {stage.only().id: "running"}


@plays(start_killed_while_it_orders, worker_in_a_crash_loop)
def test_what_nobody_watches_any_more_stops_itself(act: Act, acts: Acts) -> None:
    acts.end_of(act)


@pytest.mark.long  # not by themselves, but run.sh is full
@plays(start_killed_while_it_searches, start_killed_while_the_worker_loads,
       start_killed_while_it_wakes, worker_that_ends_with_0, worker_that_refuses_its_settings,
       at_the_latest)
def test_whatever_is_gone_the_instance_stops_itself(act: Act, acts: Acts) -> None:
    acts.end_of(act)


@plays(told_and_kept)
def test_start_tells_what_stops_an_instance_and_changes_none(act: Act, acts: Acts) -> None:
    acts.end_of(act)


def status_says(stage: Scene) -> str:
    return stage.launch(command="status").wait().stdout


def idle_one_is_woken(stage: Scene) -> None:
    """With the real worker: it speaks, falls asleep, and has its minutes again when it is woken."""
    make_worker_real(stage)
    stage.vast.add_offer()
    run = stage.start("--yes", "--idle-stop", "0.3", "--max-hours", "1")
    assert run.status == 0
    assert "after 0.3 min without speech" in run.stderr.splitlines()[-2]
    assert "no connection until" in run.stderr.splitlines()[-2]
    told = status_says(stage)
    assert "stops itself after 0.3 min without speech (0 min left)" in told
    assert "1 h in all (" in told
    assert stage.launch(command="test").wait().status == 0
    instance = stopped(stage)
    assert "the instance stops itself in" in instance.log
    assert stage.start().status == 0
    assert instance.touched == ["stopped", "running"]
    wait_until(lambda: instance.touched[2:] == ["stopped"], "second stop", 60)


def ready_one_whose_start_was_killed(stage: Scene) -> None:
    make_worker_real(stage)
    stage.vast.add_offer()
    run = stage.launch("--yes", "--idle-stop", "0.1")
    wait_until(lambda: "is rented" in run.stderr, "order")
    run.process.kill()
    assert "status=ready" in stopped(stage, RUN_SECONDS).log


@pytest.mark.long
@plays(idle_one_is_woken)
def test_an_idle_instance_stops_itself_and_is_woken(act: Act, acts: Acts) -> None:
    acts.end_of(act)


def idle_worker_that_crashes(stage: Scene) -> None:
    """Each start of it goes on counting, so that it stops though none lives as long as that."""
    make_worker_real(stage)
    stage.vast.add_offer()
    assert stage.start("--yes", "--idle-stop", "0.5").status == 0
    instance, began = stage.only(), time.monotonic()
    while instance.intended == "running" and time.monotonic() < began + 120:
        before = instance.log.count("status=ready")
        with contextlib.suppress(AssertionError):
            instance.crash_worker()
        wait_until(lambda before=before: instance.log.count("status=ready") > before
                   or instance.intended == "stopped", "next start", RUN_SECONDS)
    stopped(stage)
    assert instance.log.count("ended with status 137") > 1
    assert 25 < time.monotonic() - began < 90


def refusals_and_hanging_answers(stage: Scene) -> None:
    """With the real worker, which goes on speaking meanwhile; `status` tells of it."""
    make_worker_real(stage)
    stage.vast.add_offer()
    own = r"/instances/\d+/$"
    stage.vast.fault("PUT", own, status=403, body={"success": False, "msg": "no"})
    stage.vast.fault("PUT", own, times=2, status=200, body={"success": False})
    stage.vast.fault("PUT", own, delay=60.0, drop="before")
    assert stage.start("--yes", "--idle-stop", "0.05").status == 0
    wait_until(lambda: "HTTP 403" in stage.only().log, "refusal")
    told = wait_until(lambda: (said := status_says(stage)) and "cannot stop itself" in said
                      and said, "what status tells", 60)
    assert "end the rent by hand" in told
    assert stage.launch(command="test").wait().status == 0
    instance = stopped(stage, 300)
    assert "no answer from" in instance.log and "no success" in instance.log


def outbid_one_that_comes_back(stage: Scene) -> None:
    """Its hours go on, as it was away for less than 15 minutes; its minutes begin anew."""
    make_worker_real(stage)
    stage.vast.add_offer(min_bid=0.03)
    assert stage.start("--yes", "--interruptible", "--bid", "0.05", "--idle-stop", "1",
                       "--max-hours", "0.012").status == 0
    instance = stage.only()
    heartbeat = instance.container.root / "workspace/models/bark-worker/bark-guard.json"
    wait_until(lambda: json.loads(heartbeat.read_text())["spent"] > 15, "hours", 60)
    instance.outbid()
    spent = json.loads(heartbeat.read_text())["spent"]
    with stage.vast.lock:
        instance.price, instance.is_outbid = instance.min_bid, False
        instance.boot()
    began = time.monotonic()
    wait_until(lambda: json.loads(heartbeat.read_text())["spent"] > spent, "hours that go on")
    wait_until(lambda: instance.intended == "stopped", "stop", 60)
    assert time.monotonic() - began < 0.012 * 3600 - spent + 10
    assert "BARK_MAX_HOURS are over" in instance.log


def all_three_together(stage: Scene) -> None:
    """The hours end it while it works; woken at once it has them again, and falls asleep."""
    make_worker_real(stage)
    stage.vast.add_offer()
    assert stage.start("--yes", "--idle-stop", "0.3", "--max-hours", "0.02").status == 0
    instance = stage.only()
    while instance.intended == "running":
        stage.launch(command="test").wait()
    assert "BARK_MAX_HOURS are over" in instance.log and "stopping the instance: nobody" not in (
        instance.log)
    assert stage.start().status == 0
    stopped_again = "stopping the instance: nobody wanted speech for 0.3 min"
    wait_until(lambda: stopped_again in instance.log, "idle stop", 60)


@pytest.mark.long
@pytest.mark.timeout(400)
@plays(ready_one_whose_start_was_killed, idle_worker_that_crashes, refusals_and_hanging_answers,
       outbid_one_that_comes_back, all_three_together)
def test_guards_hold_with_the_real_worker(act: Act, acts: Acts) -> None:
    acts.end_of(act)
