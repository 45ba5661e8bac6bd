"""The commands on what is rented: status, test, logs, stop, destroy, ssh, tunnel, open, env; keys.

All of it is played side by side, each act on an account of its own (see renting.py): one story with
the real worker, and the awkward cases with workers that merely say how they are.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
import wave
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from conftest import wait_until
from fake_vast import VOLUME, Instance
from manager import RUN_SECONDS, Run, executable
from renting import Act, Acts, Scene, acts_of, ids_named, make_worker_real, plays

GB_AT_50 = 0.15 * 50 / 720  # $/h that 50 GB of an ordinary offer cost
NASTY_KEY = "q\"u'o\\t$e`*;#&(!~"  # all of it may be in a worker's key
FOLLOW_SECONDS = 60.0  # until a followed log shows what was written
STORY_SECONDS = 400.0  # on a machine with much else to do; 45 alone
STOP_SECONDS = 200.0  # `stop` gives Vast two minutes


@pytest.fixture(scope="module")
def acts(request: pytest.FixtureRequest,
         tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acts]:
    with acts_of(request, tmp_path_factory.mktemp("acts")) as playing:
        yield playing


def run(stage: Scene, command: str, *words: str, stdin: int = subprocess.DEVNULL,
        seconds: float = RUN_SECONDS, **settings: str) -> Run:
    """A command's end; of the files that it made for itself none may be left."""
    scratch = stage.manager.home / f"scratch-{len(stage.manager.runs)}"
    scratch.mkdir()
    done = stage.launch(*words, command=command, stdin=stdin, TMPDIR=str(scratch), **settings)
    done.wait(seconds)
    assert list(scratch.iterdir()) == []
    return done


def ended(done: Run, status: int, *words: str) -> None:
    """It ended so, said these words to people and printed no answer."""
    assert (done.status, done.stdout) == (status, "")
    assert [word for word in words if word not in done.stderr] == []


def says(stage: Scene, command: str, *words: str, **settings: str) -> str:
    """What a command that succeeds prints."""
    done = run(stage, command, *words, **settings)
    assert (done.status, done.stderr) == (0, "")
    return done.stdout


# The whole story


class CommandLines:
    """Notes, while used as a context manager, the command lines of all processes that are new."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, args=(set(os.listdir("/proc")),))

    def __enter__(self) -> CommandLines:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        self.thread.join()

    def watch(self, old: set[str]) -> None:
        """Reads each process's again and again in its first second, as it may become another."""
        first_seen: dict[str, float] = {}
        while not self.over.wait(0.04):
            now = time.monotonic()
            for number in filter(str.isdigit, set(os.listdir("/proc")) - old):
                if now - first_seen.setdefault(number, now) < 1.0:
                    with contextlib.suppress(OSError):
                        self.seen.add(Path("/proc", number, "cmdline").read_bytes())

    def holding(self, secret: str) -> list[list[str]]:
        return [line.decode().split("\0") for line in self.seen if secret.encode() in line]


def ask(worker: Instance, text: str) -> dict[str, Any]:
    """The worker's answer to a request with its key."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {worker.key}"}
    request = urllib.request.Request(f"{worker.worker_url}/synthesize",
                                     json.dumps({"text": text}).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def running_requests(worker: Instance) -> int:
    with urllib.request.urlopen(f"{worker.worker_url}/health", timeout=10) as reply:
        return json.load(reply)["queue"]["running"]


def status_tells_of(stage: Scene, worker: Instance) -> None:
    """In three calls at most, which is what `status` may cost."""
    before = len(stage.vast.requests)
    told = says(stage, "status", PATH=stage.manager.environment()["PATH"])  # not a warm vastai
    assert len(stage.vast.requests) - before <= 3
    assert told.endswith("credit 12.34 $, which lasts 7.3 days at 0.0704 $/h\n")
    assert told.startswith(f"instance {worker.id}: running, RTX 3060, Sweden, SE\n")
    for part in (worker.worker_url, "0.0704 $/h", "worker ready, 0 running, 0 waiting",
                 "suno/bark-small"):
        assert part in told


def env_leads_to(stage: Scene, worker: Instance) -> None:
    told = says(stage, "env")
    lines = [line for line in told.splitlines() if not line.startswith("#")]
    assert lines == [f"BARK_URL={worker.worker_url}", f"BARK_API_KEY={worker.key}",
                     "VASTAI_ENDPOINT_ID="]
    assert told.startswith(f"# instance {worker.id} on Vast; ") and "# VASTAI_API_KEY=" in told
    stage.manager.runs[-1].stdout = ""  # the one place where the key may show


def speech_is_checked(stage: Scene, out: Path) -> None:
    told = says(stage, "test", "Hello there.", "--voice", "v2/de_speaker_3", "--out", str(out))
    with wave.open(str(out)) as speech:
        seconds = speech.getnframes() / speech.getframerate()
    match = re.fullmatch(r"(.*): (\S+) s of speech in (\S+) s, real-time factor (\S+)\n", told)
    assert match and match[1] == str(out)
    sound, took, factor = map(float, match.groups()[1:])
    assert sound == pytest.approx(seconds, abs=0.01)
    assert factor == pytest.approx(took / sound, abs=0.1)
    first = out.read_bytes()
    says(stage, "test", "Hello there.", "--voice", "v2/de_speaker_3", "--out", str(out))
    before = out.read_bytes()
    assert before != first  # made anew, not taken from the worker's memory
    ended(run(stage, "test", "--voice", "nobody", "--out", str(out)), 1, "HTTP 400", "nobody")
    assert out.read_bytes() == before


def log_is_followed(stage: Scene, worker: Instance) -> None:
    """While `test` speaks; in the end the lines are those of the log, once each."""
    follower = stage.launch("-f", command="logs")
    wait_until(lambda: "status=ready" in follower.stdout, "log", FOLLOW_SECONDS)
    speech_is_checked(stage, stage.manager.home / "speech.wav")
    wait_until(lambda: follower.stdout == worker.log, "rest of the log", FOLLOW_SECONDS)
    os.killpg(follower.process.pid, signal.SIGINT)
    assert follower.wait().status == 130 and follower.stderr == ""
    assert "POST /synthesize status=200" in follower.stdout


def stop_waits_for(stage: Scene, worker: Instance) -> None:
    with ThreadPoolExecutor() as pool:
        answer: Future[dict[str, Any]] = pool.submit(ask, worker, "Hello there, you. " * 12)
        wait_until(lambda: running_requests(worker) == 1, "running request")
        stage.vast.on("PUT", f"/instances/{worker.id}/",
                      lambda request: answered_before.append(answer.done()))
        answered_before: list[bool] = []
        ended(run(stage, "stop"), 0, "waiting for requests: 1 running, 0 waiting",
              f"instance {worker.id} is stopped", "0.0104 $/h")
        assert answer.result()["status"] == "success" and answered_before == [True]
    assert stage.billed() == {worker.id: "stopped"}


def start_wakes(stage: Scene, worker: Instance) -> None:
    """From now on the worker has another key, as the manual route may have given it."""
    worker.env["BARK_API_KEY"] = NASTY_KEY
    before = worker.id
    done = run(stage, "start", "--yes")
    assert (done.status, done.stdout) == (0, f"{worker.worker_url}\n")
    assert stage.only().id == before and worker.intended == "running"
    player = stage.manager.home / "players/aplay"
    player.parent.mkdir()
    executable(player, '#!/bin/sh\necho "$@" >"$HOME/played"\n')
    path = os.pathsep.join((str(player.parent), stage.path))
    assert "s of speech" in says(stage, "test", "Hello again.", "--play", PATH=path)
    assert (stage.manager.home / "played").read_text() == "bark-test.wav\n"


def whole_story(stage: Scene) -> None:
    make_worker_real(stage)
    stage.vast.add_offer()
    with CommandLines() as lines:
        done = run(stage, "start", "--yes")
        worker = stage.only()
        assert (done.status, done.stdout) == (0, f"{worker.worker_url}\n")
        drawn_key = str(worker.key)
        status_tells_of(stage, worker)
        env_leads_to(stage, worker)
        log_is_followed(stage, worker)
        stop_waits_for(stage, worker)
        start_wakes(stage, worker)
        ended(run(stage, "destroy", "--yes"), 0, f"instance {worker.id} is destroyed")
    assert stage.vast.destroyed == [worker.id] and stage.billed() == {}
    assert [key for key in (drawn_key, NASTY_KEY) if key in stage.manager.said()] == []
    assert lines.holding(stage.vast.account_key) == lines.holding(NASTY_KEY) == []
    (order,) = lines.holding(drawn_key)  # which has no other way to pass it
    assert "/vastai create instance " in " ".join(order)


@pytest.mark.timeout(STORY_SECONDS)
@plays(whole_story)
def test_a_worker_is_rented_used_put_to_sleep_woken_and_destroyed(act: Act, acts: Acts) -> None:
    acts.end_of(act)


def worker_that_crashes(stage: Scene) -> None:
    """What `start` ordered starts it again, and the log tells."""
    stage.vast.add_offer()
    assert run(stage, "start", "--yes").status == 0
    worker = stage.only()
    loop = worker.workers()[0].parent()
    worker.crash_worker()
    loop.suspend()  # else it would be there again in 5 s
    ended(run(stage, "test"), 1, "does not speak")
    loop.resume()
    assert run(stage, "start").stdout == f"{worker.worker_url}\n"
    assert "bark-worker ended with status 137\n" in says(stage, "logs")
    assert stage.orders() == [worker.offer["id"]]


@plays(worker_that_crashes)
def test_a_worker_that_crashes_is_started_again(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# status


def every_state(stage: Scene) -> None:
    add = stage.vast.add_instance
    state = {add(state="stopped").id: "stopped", add(fate="outbid", price=0.05).id: "outbid",
             add(fate="offline").id: "offline", add(fate="stuck").id: "loading",
             add(fate="error: Failed to pull image").id: "error", add(fate="exited").id: "exited"}
    before = len(stage.vast.requests)
    done = run(stage, "status")
    assert len(stage.vast.requests) - before <= 6  # up to four of them are of a new HOME
    assert (done.status, done.stderr) == (1, "")
    told = dict(re.findall(r"^instance (\d+): (\w+)", done.stdout, re.M))
    assert told == {str(number): name for number, name in state.items()}
    for part in ("(Failed to pull image)", "0.0604 $/h when it runs; interruptible",
                 "rented 1.0 h ago, at most 0.07", "0.0704 $/h, of it 0.0104 $/h for storage",
                 "now 0.0104 $/h for storage (0.25 $ a day), 0.0704 $/h when it runs"):
        assert part in done.stdout
    done = run(stage, "status", "--json")
    found = json.loads(done.stdout)["instances"]
    assert done.status == 1 and {one["id"]: one["state"] for one in found} == state
    assert [one["health"] for one in found] == [None] * 6


def one_of_two_is_ready(stage: Scene) -> None:
    """One is enough, and the key is nowhere."""
    ready, silent = stage.vast.add_instance(), stage.vast.add_instance(fate="silent")
    wait_until(lambda: ready.port, "worker")
    told = says(stage, "status")
    assert told.count("worker ready") == told.count("worker: no answer") == 1
    as_json = says(stage, "status", "--json")
    row = json.loads(as_json)["instances"][0]
    assert (row["id"], row["state"], row["address"]) == (ready.id, "running", ready.worker_url)
    assert row["health"]["ready"] and row["price_per_hour"] == pytest.approx(0.06 + GB_AT_50)
    assert [key for key in (ready.key, silent.key) if str(key) in told + as_json] == []


def not_ready(stage: Scene) -> None:
    stage.workers_say("failed", error="no weights")
    instance = stage.vast.add_instance()
    wait_until(lambda: instance.port, "worker")
    done = run(stage, "status")
    assert done.status == 1 and "worker failed" in done.stdout and "no weights" in done.stdout


def nothing_there(stage: Scene) -> None:
    """But the stranger, whose label is another's."""
    ended(run(stage, "stop"), 5, "no instance labelled 'bark-worker'")
    done = run(stage, "status", "--json")
    assert done.status == 5
    assert json.loads(done.stdout) == {"label": "bark-worker", "instances": [], "credit": 12.34}


def another_label(stage: Scene) -> None:
    stage.vast.add_instance(label="mine-2", state="stopped")
    stage.vast.add_instance(fate="offline")
    done = run(stage, "status", BARK_LABEL="mine-2")
    assert ": stopped" in done.stdout and ": offline" not in done.stdout


def credit_that_is_not_told(stage: Scene) -> None:
    """To this key, or not as a number, or not in time: nothing is said of it, and all goes on."""
    stage.vast.add_instance(state="stopped")
    user = stage.vast.user
    odd = [{"status": 403, "body": {"success": False, "msg": "no user_read"}}, {"drop": "before"},
           {"status": 200, "body": "<html>"}, {"status": 200, "body": {**user, "credit": "much"}},
           {"status": 200, "body": {"id": 1}}, {"delay": 60.0}]
    says_nothing_of_it(stage)  # of a new HOME, whose CLI asks by itself, too
    for fault in odd:
        stage.vast.fault("GET", "/users/current", **fault)
        began = time.monotonic()
        told = says_nothing_of_it(stage, known=False)
        assert time.monotonic() - began < 40
        assert "credit" not in json.loads(told)


def says_nothing_of_it(stage: Scene, known: bool = True) -> str:
    done = run(stage, "status", "--json")
    assert (done.status, done.stderr) == (1, "") and ("credit" in done.stdout) == known
    return done.stdout


def credit_that_is_used_up(stage: Scene) -> None:
    """Where there is no credit, the balance serves."""
    stage.vast.add_instance(state="stopped")
    del stage.vast.user["credit"]
    stage.vast.user["balance"] = 1.5
    assert "credit 1.50 $, which lasts 6.0 days at 0.0104 $/h" in run(stage, "status").stdout
    stage.vast.user["credit"] = -0.05
    assert "the account has no credit left (-0.05 $)" in run(stage, "status").stdout


def all_of_the_account(stage: Scene) -> None:
    """Ours are marked, others named, and the sum is that of what bills now."""
    vast = stage.vast
    own, asleep = vast.add_instance(fate="silent"), vast.add_instance(state="stopped", label="mine")
    worker = vast.add_instance(fate="silent", label=None, env={"BARK_LABEL": "bark-worker"})
    vast.volumes += [VOLUME, {**VOLUME, "id": 901, "storage_cost": None, "label": None}]
    stranger = vast.strangers[0]
    told = says(stage, "status", "--all")
    price, storage, volume = 0.06 + GB_AT_50, GB_AT_50, 20 * 0.1 / 720
    for line in (f"ours: instance {own.id}: running, RTX 3060, Sweden, SE, {price:.4f} $/h",
                 f"ours: instance {worker.id}: running", f"instance {stranger.id} (bark-worker-2)",
                 f"instance {asleep.id} (mine): stopped, RTX 3060, Sweden, SE, {storage:.4f} $/h",
                 f"volume 900 (weights): active, 20 GB, Sweden, SE, {volume:.4f} $/h",
                 "volume 901: active, 20 GB, Sweden, SE\n", "which lasts "):
        assert line in told
    total = 3 * price + storage + volume
    assert f"in all {total:.4f} $/h, {24 * total:.2f} $ a day, and traffic; without 901, of" in told
    found = json.loads(says(stage, "status", "--all", "--json"))
    assert found["cost_per_hour"] == pytest.approx(total) and found["credit"] == 12.34
    assert {one["id"] for one in found["billed"] if one["ours"]} == {own.id, worker.id}
    assert found["without_price"] == [901]
    vast.fault("GET", "/volumes", times=math.inf, status=403, body={"msg": "not yours to see"})
    done = run(stage, "status", "--all")
    assert done.status == 1 and f"instance {own.id}" in done.stdout
    assert "what volumes the account has is not known: Vast says: not yours to see" in done.stderr


def many_pages(stage: Scene) -> None:
    stage.vast.page_rows = 2
    for _ in range(5):
        stage.vast.add_instance(state="stopped")
    assert run(stage, "status").stdout.count(": stopped") == 5


# The account's key


def stored_key(stage: Scene) -> None:
    """Neither of two empty variables hides what `vastai set api-key` stored."""
    stage.vast.add_instance(state="stopped")
    stored = stage.manager.home / "config/vastai/vast_api_key"
    stored.parent.mkdir(parents=True)
    stored.write_text(stage.vast.account_key)
    done = run(stage, "status", VASTAI_API_KEY="", VAST_API_KEY="")
    assert done.status == 1 and ": stopped" in done.stdout


def wrong_key(stage: Scene) -> None:
    ended(run(stage, "status", VASTAI_API_KEY="0123-wrong", VAST_API_KEY=stage.vast.account_key),
          4, "Invalid user key", "HTTP 401", "https://cloud.vast.ai/manage-keys/")
    assert "0123-wrong" not in stage.manager.said()


def no_key_that_could_be_one(stage: Scene) -> None:
    ended(run(stage, "status", VASTAI_API_KEY=""), 3, "no Vast API key", "VASTAI_API_KEY")
    for key in (f"{stage.vast.account_key}\n", f"{stage.vast.account_key}\nmore", "with blank"):
        ended(run(stage, "start", "--yes", VASTAI_API_KEY=key), 3, "VASTAI_API_KEY")
    assert "with blank" not in stage.manager.said() and stage.vast.requests == []


def key_without_rights(stage: Scene) -> None:
    stage.vast.add_instance(fate="silent")
    stage.vast.fault("PUT", "/instances/", times=9, status=403,
                     body={"success": False, "error": "forbidden", "msg": "not yours to stop"})
    ended(run(stage, "stop"), 4, "not yours to stop", "HTTP 403", "permissions")


@plays(nothing_there, every_state, one_of_two_is_ready, not_ready, another_label, stored_key,
       wrong_key, no_key_that_could_be_one, key_without_rights, credit_that_is_not_told,
       credit_that_is_used_up, all_of_the_account)
def test_status_tells_of_each_instance_and_no_key(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# test


def unfit_answer(stage: Scene) -> None:
    """The stage's workers cannot speak."""
    instance = stage.vast.add_instance()
    wait_until(lambda: instance.port, "worker")
    ended(run(stage, "test"), 1, "HTTP 501")
    assert not (stage.manager.home / "bark-test.wav").exists()


def uncallable(stage: Scene) -> None:
    instance = stage.vast.add_instance(fate="stuck")
    ended(run(stage, "env"), 1, f"instance {instance.id} cannot be called: it is loading")


def silent_worker(stage: Scene) -> None:
    stage.vast.add_instance(fate="silent")
    ended(run(stage, "test"), 1, "does not speak")


# logs


def follow_few(stage: Scene) -> None:
    """From the last two lines on; one arrives in two pieces, and one answer is missing."""
    instance = stage.vast.add_instance(fate="silent")
    log = instance.container.log
    log.write_text("".join(f"line {number}\n" for number in range(10)))
    follower = stage.launch("-f", "--tail", "2", command="logs")
    wait_until(lambda: "line 9" in follower.stdout, "log", FOLLOW_SECONDS)
    stage.vast.wait_for_call("PUT", "request_logs", 2)
    stage.vast.fault("PUT", "request_logs", status=502)
    with log.open("a") as sink:
        sink.write("line 9\nhalf a")
        sink.flush()
        wait_until(lambda: "half a" in follower.stdout, "half a line", FOLLOW_SECONDS)
        sink.write(" line\nlast\n")
    wait_until(lambda: "last" in follower.stdout, "rest of it", FOLLOW_SECONDS)
    os.killpg(follower.process.pid, signal.SIGTERM)
    assert follower.wait().status == 143
    assert follower.stdout == "line 8\nline 9\nline 9\nhalf a\nhalf a line\nlast\n"


def follow_until_destroyed(stage: Scene) -> None:
    instance = stage.vast.add_instance(fate="silent")
    instance.container.log.write_text("hello\n")
    follower = stage.launch("--follow", command="logs")
    wait_until(lambda: follower.stdout, "log", FOLLOW_SECONDS)
    with stage.vast.lock:
        stage.vast.instances.pop(instance.id).destroy()
    assert follower.wait().status == 4
    assert (follower.stdout, "HTTP 404" in follower.stderr) == ("hello\n", True)


def daemon_log(stage: Scene) -> None:
    """Docker's own words have the whole environment in them; end() looks for the other keys."""
    plain = stage.vast.add_instance(fate="silent")
    told = says(stage, "logs", "--daemon")
    assert "docker create" in told and str(plain.key) not in told
    plain.env["BARK_API_KEY"] = NASTY_KEY
    told = says(stage, "logs", "--daemon")
    assert "docker create" in told and NASTY_KEY not in told


def short_log(stage: Scene) -> None:
    """The worker's key does not show, though it should not be there."""
    instance = stage.vast.add_instance(fate="silent")
    instance.container.log.write_text(f"one\ntwo {instance.key}\nthree\n")
    assert says(stage, "logs", "--tail", "2") == "two [key]\nthree\n"


# stop


def busy(stage: Scene) -> Instance:
    """An instance whose worker says that it has much to do."""
    stage.workers_say("ready", queue={"running": 1, "waiting": 2, "capacity": 32})
    instance = stage.vast.add_instance()
    wait_until(lambda: instance.port, "worker")
    return instance


def stop_now(stage: Scene) -> None:
    instance = busy(stage)
    done = run(stage, "stop", "--now")
    ended(done, 0, "this cuts requests: 1 running, 2 waiting", f"instance {instance.id} is stopped")
    assert "waiting for requests" not in done.stderr
    assert stage.billed() == {instance.id: "stopped"}
    before = stage.changes()
    ended(run(stage, "stop"), 0, f"instance {instance.id} is stopped already", "0.0104 $/h")
    assert stage.changes() == before


def stop_interrupted(stage: Scene) -> None:
    """While it waits for the worker nothing has happened yet."""
    instance = busy(stage)
    stopping = stage.launch(command="stop")
    wait_until(lambda: "waiting for requests: 1 running, 2 waiting" in stopping.stderr, "words")
    os.killpg(stopping.process.pid, signal.SIGINT)
    assert stopping.wait().status == 130 and stage.changes() == []
    assert stage.billed() == {instance.id: "running"}


def stop_refused_at_first(stage: Scene) -> None:
    """`success: false`, and the CLI's exit status is 0."""
    instance = stage.vast.add_instance(fate="silent")
    stage.vast.fault("PUT", f"/instances/{instance.id}/", status=200,
                     body={"success": False, "msg": "try again"})
    ended(run(stage, "stop"), 0, f"instance {instance.id} is stopped")
    assert stage.billed() == {instance.id: "stopped"} and len(stage.changes()) == 2


def stop_without_reply(stage: Scene) -> None:
    instance = stage.vast.add_instance(fate="silent")
    stage.vast.fault("PUT", f"/instances/{instance.id}/", drop="after")
    ended(run(stage, "stop"), 0, f"instance {instance.id} is stopped")
    assert stage.billed() == {instance.id: "stopped"} and len(stage.changes()) == 1


def stop_takes_a_while(stage: Scene) -> None:
    stage.vast.stopping = 4.0
    instance = stage.vast.add_instance(fate="silent")
    ended(run(stage, "stop"), 0, f"instance {instance.id} is stopped")
    assert instance.actual == "exited" and len(stage.changes()) == 1


def stop_what_is_offline(stage: Scene) -> None:
    """Its host may come back, so it counts that Vast means it to be stopped."""
    instance = stage.vast.add_instance(fate="offline")
    stage.vast.fault("PUT", f"/instances/{instance.id}/", status=200,
                     body={"success": False, "msg": "try again"})
    ended(run(stage, "stop"), 0, f"instance {instance.id} is stopped")
    assert stage.billed() == {instance.id: "stopped"}


def stop_what_is_outbid(stage: Scene) -> None:
    """It would come back by itself, and be billed."""
    instance = stage.vast.add_instance(fate="outbid", price=0.05)
    ended(run(stage, "stop"), 0, f"instance {instance.id} is stopped")
    assert stage.billed() == {instance.id: "stopped"}


def stop_one_of_two(stage: Scene) -> None:
    one, other = (stage.vast.add_instance(fate="silent") for _ in range(2))
    ended(run(stage, "stop", str(other.id)), 0, f"instance {other.id} is stopped")
    assert stage.billed() == {one.id: "running", other.id: "stopped"}


def foreign_instance(stage: Scene) -> None:
    """It is there, but not ours; end() asserts that nobody touched it."""
    instance = stage.vast.add_instance(fate="silent")
    stranger = str(stage.vast.strangers[0].id)
    for words in (("stop", stranger), ("destroy", stranger, "--yes"), ("start", stranger),
                  ("logs", stranger), ("ssh", stranger, "ls"), ("test", "--id", stranger)):
        ended(run(stage, *words), 5, "is labelled 'bark-worker'", str(instance.id))
    assert stage.changes() == []


# destroy


def destroy_asks(stage: Scene) -> None:
    instance = stage.vast.add_instance(state="stopped")
    ended(run(stage, "destroy"), 2, "say --yes")
    for text in ("n\n", "\x04"):
        done = stage.typed(text, command="destroy")
        ended(done, 1, "nothing is destroyed", f"instance {instance.id}: stopped")
        assert done.stderr.count("[y/N]") == 1
    assert stage.changes() == []
    done = stage.typed("y\n", command="destroy")
    ended(done, 0, f"instance {instance.id} is destroyed", f"RTX 3060, {GB_AT_50:.4f} $/h\n")
    assert stage.vast.destroyed == [instance.id]


def destroy_without_effect(stage: Scene) -> None:
    """Vast says `success: true`, and at first the instance stays."""
    instance = stage.vast.add_instance(fate="silent")
    instance.destroy_refusals = 1
    ended(run(stage, "destroy", "--yes"), 0, f"instance {instance.id} is destroyed")
    assert stage.vast.destroyed == [instance.id] and len(stage.changes()) == 2


def destroy_without_reply(stage: Scene) -> None:
    instance = stage.vast.add_instance(fate="silent")
    stage.vast.fault("DELETE", f"/instances/{instance.id}/", drop="after")
    ended(run(stage, "destroy", "--yes"), 0, f"instance {instance.id} is destroyed")
    assert stage.vast.destroyed == [instance.id] and len(stage.changes()) == 1


def destroy_two(stage: Scene) -> None:
    ids = [stage.vast.add_instance(**fields).id
           for fields in ({"state": "stopped"}, {"fate": "offline"})]
    ended(run(stage, "destroy", "--yes"), 0, *(f"instance {one} is destroyed" for one in ids))
    assert stage.vast.destroyed == ids


def destroy_refused_at_first(stage: Scene) -> None:
    instance = stage.vast.add_instance(fate="silent")
    stage.vast.fault("DELETE", "/instances/", status=200,
                     body={"success": False, "msg": "try again"})
    ended(run(stage, "destroy", "--yes"), 0, f"instance {instance.id} is destroyed")
    assert stage.vast.destroyed == [instance.id] and len(stage.changes()) == 2


def destroy_one_of_two(stage: Scene) -> None:
    one, other = stage.vast.add_instance(fate="offline"), stage.vast.add_instance(state="stopped")
    ended(run(stage, "destroy", str(other.id), "--yes"), 0, f"instance {other.id} is destroyed")
    assert stage.vast.destroyed == [other.id] and stage.billed() == {one.id: "running"}


@plays(destroy_asks, destroy_without_effect, stop_now, stop_refused_at_first, stop_what_is_offline,
       stop_without_reply, stop_interrupted, stop_what_is_outbid, destroy_without_reply,
       destroy_one_of_two, foreign_instance)
def test_stop_and_destroy_are_confirmed_by_vast_whatever_the_cli_says(act: Act,
                                                                      acts: Acts) -> None:
    acts.end_of(act)


def destroy_never(stage: Scene) -> None:
    instance = stage.vast.add_instance(fate="refuses_destroy")
    other = stage.vast.add_instance(state="stopped")
    done = run(stage, "destroy", "--yes")
    ended(done, 4, f"instance {other.id} is destroyed")
    assert f"vastai destroy instance {instance.id} -y" in done.stderr
    assert stage.billed() == {instance.id: "running"}


def stop_never(stage: Scene) -> None:
    instance = stage.vast.add_instance(fate="silent")
    stage.vast.fault("PUT", f"/instances/{instance.id}/", times=math.inf, status=200,
                     body={"success": False, "msg": "no"})
    done = run(stage, "stop", seconds=STOP_SECONDS, BARK_POLL="5")
    ended(done, 6)
    assert ids_named(done) == {instance.id}


def stop_waits_a_minute(stage: Scene) -> None:
    instance = busy(stage)
    ended(run(stage, "stop"), 0, "after 60 s still 1 running, 2 waiting: stopping all the same",
          f"instance {instance.id} is stopped")


def vast_out_of_order(stage: Scene) -> None:
    """A question is put again, three times in all."""
    stage.vast.add_instance(state="stopped")
    stage.vast.fault("GET", "/api/v1/instances", status=502)
    stage.vast.fault("GET", "/api/v1/instances", drop="before")
    assert ": stopped" in run(stage, "status").stdout
    stage.vast.fault("GET", "/api/v1/instances", times=3, status=500)
    ended(run(stage, "status"), 4, "the instances cannot be listed", "HTTP 500")


@pytest.mark.long  # up to two minutes
@pytest.mark.timeout(STOP_SECONDS + 30.0)
@plays(destroy_never, stop_never, stop_waits_a_minute, vast_out_of_order)
def test_patience_has_an_end_and_what_stays_billed_is_named(act: Act, acts: Acts) -> None:
    acts.end_of(act)


def one_that_is_named(stage: Scene) -> None:
    """And not the first of two; every command that means one instance takes its id."""
    first, second = stage.vast.add_instance(), stage.vast.add_instance()
    wait_until(lambda: first.port and second.port, "workers")
    assert says(stage, "logs", str(second.id), "-n", "1") == f"{second.log.splitlines()[-1]}\n"
    told = says(stage, "env", str(second.id))
    assert f"BARK_URL={second.worker_url}\n" in told
    stage.manager.runs[-1].stdout = ""
    told = says(stage, "status", str(second.id))
    assert f"instance {first.id}" not in told and f" at {2 * (0.06 + GB_AT_50):.4f} $/h" in told
    port = str(second.container.ports["22/tcp"].getsockname()[1])
    for words in (("ssh", str(second.id), "ls", "7"), ("tunnel", str(second.id))):
        run(stage, *words, PATH=stub_ssh(stage, 0))
        assert port in ssh_words(stage)
    done = run(stage, "start", str(second.id))
    assert done.stdout == f"{second.worker_url}\n"
    number = second.id
    assert re.search(rf"env {number}; .* test --id {number}; .* stop {number},", done.stderr)
    assert stage.changes() == []


def start_of_one_that_sleeps(stage: Scene) -> None:
    """Though another one runs."""
    running, asleep = stage.vast.add_instance(), stage.vast.add_instance(state="stopped")
    assert run(stage, "start", str(asleep.id)).stdout == f"{asleep.worker_url}\n"
    assert stage.billed() == {running.id: "running", asleep.id: "running"}
    assert (running.touched, asleep.touched) == ([], ["running"])


# ssh, tunnel, open, env


def stub_ssh(stage: Scene, status: int, then: str = "", refused: str = "") -> str:
    """A PATH whose ssh writes its words down, one a line, and ends with `status`.

    At 0 it was connected, and then the real one runs the local command; `then` comes after it.
    There is no way to the host `refused`.
    """
    folder = stage.manager.home / "bin"
    folder.mkdir(exist_ok=True)
    executable(folder / "ssh", f'''#!/bin/sh
printf "%s\\n" "$@" >"$HOME/words"
case "$*" in *{refused or "nosuch"}*) exit 255 ;; esac
[ {status} = 0 ] || exit {status}
for word; do case "$word" in LocalCommand=*) eval "${{word#*=}}" ;; esac; done
{then}
''')
    return os.pathsep.join((str(folder), stage.path))


def ssh_words(stage: Scene) -> list[str]:
    return (stage.manager.home / "words").read_text().splitlines()


def real_ssh_reads(words: list[str]) -> dict[str, str]:
    """What the real client makes of them, by option; it goes nowhere."""
    if not shutil.which("ssh"):
        return {}
    done = subprocess.run(["ssh", "-G", "-F", "none", *words], capture_output=True, text=True,
                          check=True, timeout=30)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def shell_on_it(stage: Scene) -> None:
    instance = stage.vast.add_instance(fate="silent")
    port = str(instance.container.ports["22/tcp"].getsockname()[1])
    done = run(stage, "ssh", "ls", "-l", "a b", PATH=stub_ssh(stage, 7))
    assert (done.status, done.stdout, done.stderr) == (7, "", "")
    words = ssh_words(stage)
    assert words[-4:] == ["root@127.0.0.1", "ls", "-l", "a b"]
    read = real_ssh_reads(words)
    assert not read or (read["hostname"], read["user"], read["port"]) == ("127.0.0.1", "root", port)


def shell_through_the_proxy(stage: Scene) -> None:
    """Where no port leads straight to it, or it does not answer there."""
    instance = stage.vast.add_instance(fate="silent", runtype="ssh_proxy")
    run(stage, "ssh", PATH=stub_ssh(stage, 0))
    assert ssh_words(stage)[-3:] == ["-p", "9", "root@localhost"]
    stage.vast.instances.pop(instance.id)
    stage.vast.add_instance(fate="silent")
    for words in (("ssh", "ls"), ("tunnel",)):
        done = run(stage, *words, PATH=stub_ssh(stage, 0, refused="root@127.0.0.1"))
        assert done.status == 0 and "root@localhost" in ssh_words(stage)
    done = run(stage, "ssh", PATH=stub_ssh(stage, 0, "exit 255"))  # of a shell that it had
    assert done.status == 255 and "root@127.0.0.1" in ssh_words(stage)


def host_keys(stage: Scene) -> None:
    """Each is taken as it comes, and kept for its instance and route, whatever the address."""
    first = stage.vast.add_instance(fate="silent")
    second = stage.vast.add_instance(fate="silent")
    seen, folder = [], str(stage.manager.home / "a b%")
    for number in (first.id, second.id):
        run(stage, "ssh", str(number), PATH=stub_ssh(stage, 0), XDG_STATE_HOME=folder)
        read = real_ssh_reads(ssh_words(stage))
        if read:
            assert read["stricthostkeychecking"] == "accept-new" and read["checkhostip"] == "no"
            assert read["userknownhostsfile"] .strip('"') == f"{folder}/bark-worker/known_hosts"
            seen.append(read["hostkeyalias"])
    assert seen == [f"vast-{one.id}-direct" for one in (first, second)][:len(seen)]


def tunnel_to_it(stage: Scene) -> None:
    stage.vast.add_instance(fate="silent")
    done = run(stage, "tunnel", "--port=18080", PATH=stub_ssh(stage, 0))
    assert (done.status, done.stdout) == (0, "http://127.0.0.1:18080\n")
    words = ssh_words(stage)
    assert words[-1] == "root@127.0.0.1" and "-N" in words
    read = real_ssh_reads(words)
    assert not read or read["localforward"] == "[127.0.0.1]:18080 [127.0.0.1]:8080"
    assert not read or (read["exitonforwardfailure"], read["permitlocalcommand"]) == ("yes", "yes")
    done = run(stage, "tunnel", PATH=stub_ssh(stage, 255))
    assert (done.status, done.stdout) == (255, "")
    assert "127.0.0.1:8080:127.0.0.1:8080" in ssh_words(stage)
    assert "root@localhost" in ssh_words(stage)


def opened(stage: Scene, *words: str, **settings: str) -> tuple[Run, Path, str]:
    """A running `open`, the file that a browser got, and what stood in it."""
    home = stage.manager.home
    browser = home / "bin"
    executable(browser / "xdg-open", """#!/bin/sh
[ -f "$1" ] && cat "$1" >"$HOME/read" || : >"$HOME/read"
[ $# = 1 ] && printf "%s\n" "$1" >"$HOME/shown.new"
mv "$HOME/shown.new" "$HOME/shown"
""")
    begun = stage.launch(*words, command="open", **settings)
    wait_until((home / "shown").exists, "page in a browser")
    wait_until(lambda: "Ctrl-C ends this" in begun.stderr, "last line")
    return begun, Path((home / "shown").read_text().rstrip("\n")), (home / "read").read_text()


def ends_clean(begun: Run, file: Path) -> None:
    """Ctrl-C ends it, and neither the file nor the key is left anywhere."""
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    os.killpg(begun.process.pid, signal.SIGINT)
    assert begun.wait().status == 130 and not file.parent.exists()
    assert begun.stderr.endswith("Ctrl-C ends this\n")  # also of ssh's end nothing is said
    assert NASTY_KEY not in begun.stdout + begun.stderr


def leads_to(page: str) -> tuple[str, str]:
    """The address that a page opens, and the key that it hands over."""
    ((address, key),) = re.findall(
        r'address = "([^"<>&\s]+)", key = decodeURIComponent\("([^"<>&\s\\]*)"\);', page)
    return address, unquote(key)


def page_through_ssh(stage: Scene) -> None:
    stage.vast.add_instance(fate="silent", env={"BARK_API_KEY": NASTY_KEY})
    path = stub_ssh(stage, 0, 'echo $$ >"$HOME/ssh-pid"; exec sleep 60')
    begun, file, text = opened(stage, "--port", "18081", PATH=path)
    assert leads_to(text) == ("http://127.0.0.1:18081/", NASTY_KEY)
    wait_until(lambda: begun.stdout == "http://127.0.0.1:18081/\n", "the address")
    assert str(file) in begun.stderr
    ends_clean(begun, file)
    number = int((stage.manager.home / "ssh-pid").read_text())
    wait_until(lambda: not Path(f"/proc/{number}").exists(), "end of ssh")


def page_over_the_open_net(stage: Scene) -> None:
    instance = stage.vast.add_instance(fate="silent", env={"BARK_API_KEY": NASTY_KEY})
    begun, file, text = opened(stage, "--direct", PATH=stub_ssh(stage, 9))
    assert leads_to(text) == (f"{instance.worker_url}/", NASTY_KEY)
    assert begun.stderr.index("can read the texts and the key") < begun.stderr.index("xdg-open")
    assert not (stage.manager.home / "words").exists()
    ends_clean(begun, file)


def page_of_a_worker_without_a_key(stage: Scene) -> None:
    """Whose tunnel ends by itself, and then one that never opens."""
    stage.vast.add_instance(fate="silent", env={})
    begun, file, text = opened(stage, PATH=stub_ssh(stage, 0, "sleep 2"))
    assert (str(file), text) == (str(Path("http://127.0.0.1:8080/")), "")
    assert begun.wait().status == 1
    assert "the tunnel ended by itself; run: " in begun.stderr
    ended(run(stage, "open", PATH=stub_ssh(stage, 255)), 1, "the tunnel did not open")


def env_for_a_shell(stage: Scene) -> None:
    """Whatever the key is, and what stands in VASTAI_ENDPOINT_ID, an endpoint's number or not."""
    instance = stage.vast.add_instance(fate="silent", env={"BARK_API_KEY": NASTY_KEY})
    lines = stage.manager.home / "env"
    for number in ("7001", "a'b $(exit 9); #"):
        lines.write_text(says(stage, "env", VASTAI_ENDPOINT_ID=number))
        stage.manager.runs[-1].stdout = ""
        for shell in ("bash", "sh"):
            done = subprocess.run(
                [shell, "-c", 'set -eu; eval "$(cat "$0")"; printf "%s\n" "$BARK_URL"'
                 ' "$BARK_API_KEY" "$VASTAI_ENDPOINT_ID"', str(lines)], capture_output=True,
                text=True, timeout=10)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.splitlines() == [instance.worker_url, NASTY_KEY, number]


@plays(one_that_is_named, start_of_one_that_sleeps)
def test_an_id_names_one_of_several(act: Act, acts: Acts) -> None:
    acts.end_of(act)


@plays(follow_few, follow_until_destroyed, daemon_log, short_log, shell_on_it,
       shell_through_the_proxy, host_keys, tunnel_to_it,
       page_through_ssh, page_over_the_open_net, page_of_a_worker_without_a_key, env_for_a_shell,
       unfit_answer, uncallable)
def test_test_logs_ssh_tunnel_open_and_env_reach_the_instance(act: Act, acts: Acts) -> None:
    acts.end_of(act)


@pytest.mark.long  # not by themselves, but run.sh is full
@plays(many_pages, stop_takes_a_while, stop_one_of_two, destroy_two, destroy_refused_at_first,
       silent_worker)
def test_rarer_cases_end_like_the_others(act: Act, acts: Acts) -> None:
    acts.end_of(act)
