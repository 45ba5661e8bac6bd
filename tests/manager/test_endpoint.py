"""`endpoint up|status|test|logs|down`, with the real `vastai` on fake_serverless, side by side.

The workers of these scenes are stand-ins for PyWorker; test_serverless.py has the real ones.
"""

from __future__ import annotations

import json
import re
import signal
import wave
from collections.abc import Iterator

import pytest
from conftest import wait_until
from fake_serverless import ServerlessVast, docker_options
from fake_vast import Request
from manager import SCRIPT, Run
from renting import Act, Acts, Scene, acts_of, drawn_out, ids_named, in_a_hurry, plays
from test_rented import CommandLines

# It reports to Vast that it is ready, and speaks a tone to who brings a signature.
PYWORKER = """
import base64, http.server, io, json, os, struct, sys, threading, urllib.request, wave
port, name = int(os.environ["WORKER_PORT"]), int(os.environ["CONTAINER_ID"])
assert [os.path.basename(word) for word in sys.argv] == ["pyworker.py"]
def tell(path, body):
    body = json.dumps({**body, "mtoken": os.environ["MASTER_TOKEN"]}).encode()
    address = os.environ["REPORT_ADDR"] + path
    urllib.request.urlopen(urllib.request.Request(address, body)).read()
sound = io.BytesIO()
with wave.open(sound, "wb") as tone:
    tone.setnchannels(1), tone.setsampwidth(2), tone.setframerate(24000)
    tone.writeframes(b"".join(struct.pack("<h", 9000 * (-1) ** (i // 40)) for i in range(24000)))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert "api_key" not in self.path and asked["session_id"] is None
        signed, voice = asked["auth_data"]["signature"], asked["payload"].get("voice")
        status = 401 if not signed else 400 if voice == "nobody" else 200
        answer = {"audio": base64.b64encode(sound.getvalue()).decode()}
        if status == 400:
            answer = {"error": {"message": "there is no voice 'nobody'"}}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        tell("/delete_requests/", {"worker_id": name, "requests": [
            {"request_idx": asked["auth_data"]["request_idx"], "status": "Success"}]})
    def log_message(self, *words):
        print("POST", flush=True)
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
threading.Thread(target=server.serve_forever).start()
print("MASTER_TOKEN=" + os.environ["MASTER_TOKEN"], flush=True)
tell("/worker_status/", {"id": name, "max_perf": 50.0, "error_msg": "",
                         "url": f"http://127.0.0.1:{port}"})
"""
UP = ("up", "--yes")


@pytest.fixture(scope="module")
def acts(request: pytest.FixtureRequest,
         tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acts]:
    with acts_of(request, tmp_path_factory.mktemp("acts"), PYWORKER, ServerlessVast) as playing:
        yield playing


def endpoint(stage: Scene, *words: str, **settings: str) -> Run:
    return stage.launch(*words, command="endpoint", **settings).wait()


def ended(done: Run, status: int, *words: str) -> None:
    assert (done.status, done.stdout) == (status, "")
    assert [word for word in words if word not in done.stderr] == []


def made(stage: Scene) -> int:
    """The id of the endpoint that `up` makes of a fresh account."""
    if not stage.vast.offers:
        stage.vast.add_offer()
    done = endpoint(stage, *UP)
    match = re.fullmatch(r"VASTAI_ENDPOINT_ID=(\d+)\n", done.stdout)
    assert done.status == 0 and match and int(match[1]) in stage.vast.endpoints
    return int(match[1])


def nothing_is_left(stage: Scene) -> None:
    vast = stage.vast
    assert (vast.groups, vast.endpoints, vast.templates, vast.instances) == ({}, {}, {}, {})


# The whole story


def story(stage: Scene) -> None:
    stage.vast.add_offer(dph_base=0.15)
    with CommandLines() as lines:
        number = made(stage)
        the_endpoint_has_explicit_limits(stage, number)
        told = endpoint(stage, "status")
        assert told.status == 0 and told.stdout == (
            f"endpoint {number}, bark-worker: active, at most 2 workers of at most 0.2000 $/h\n"
            "  now 0.0000 $/h: no worker\n")
        it_speaks(stage, cold=True)
        it_speaks(stage, cold=False)
        its_worker_is_shown(stage, number)
        again = endpoint(stage, *UP)
        assert (again.status, again.stdout) == (0, f"VASTAI_ENDPOINT_ID={number}\n")
        assert (f"endpoint {number} is there already, active, with at most 2 workers, and stays as"
                f" it is; for another, end it first: {SCRIPT} endpoint down\n" in again.stderr)
        assert list(stage.vast.endpoints) == [number]
        gone = endpoint(stage, "down", "--yes")
        ended(gone, 0, "nothing of it is billed any more")
        nothing_is_left(stage)
    assert [kind for kind, _ in stage.vast.removed] == ["group", "endpoint", "template"]
    assert len(stage.vast.destroyed) == 1
    assert [lines.holding(secret) for secret in stage.vast.secrets if lines.holding(secret)] == []
    ended(endpoint(stage, "down", "--yes"), 5,
          "no endpoint is called 'bark-worker'; the account has: none\n")
    ended(endpoint(stage, "status"), 5, "no endpoint is called 'bark-worker'")
    told = endpoint(stage, "status", "--json")
    assert told.status == 5 and json.loads(told.stdout) == {
        "id": None, "name": "bark-worker", "state": "absent", "max_workers": None,
        "cold_workers": None, "inactivity_timeout": None, "worker_groups": [], "workers": [],
        "cost_per_hour": 0}


def the_endpoint_has_explicit_limits(stage: Scene, number: int) -> None:
    row = stage.vast.endpoints[number]
    assert {name: row[name] for name in ("endpoint_name", "max_workers", "cold_workers", "min_load",
                                         "inactivity_timeout")} == {
        "endpoint_name": "bark-worker", "max_workers": 2, "cold_workers": 0, "min_load": 0.0,
        "inactivity_timeout": 600}
    (template,), (group,) = stage.vast.templates.values(), stage.vast.groups.values()
    assert docker_options(template["env"]) == {
        "-p 3000:3000": "1", "BARK_LABEL": "bark-worker", "HF_HOME": "/workspace/models"}
    assert (template["image"], template["tag"]) == ("ghcr.io/darvondoom/libread-bark-tts", "latest")
    assert (template["runtype"], template["ssh_direct"], template["private"]) == ("ssh", True, True)
    assert "python -u /app/pyworker.py\n" in template["onstart"]
    assert "dph_total<=0.20" in group["search_params"] and group["endpoint_id"] == number


def it_speaks(stage: Scene, cold: bool) -> None:
    out = stage.manager.home / "said.wav"
    done = endpoint(stage, "test", "Hello there.", "--out", str(out))
    assert done.status == 0
    match = re.fullmatch(r"(.*): 1\.00 s of speech in (\S+) s, real-time factor (\S+);"
                         r" queued (\d+) s, (.*)\n", done.stdout)
    assert match and match[1] == str(out) and match[2] == match[3]
    assert match[5] == (f"cold start {match[4]} s" if cold
                        else "no cold start: a worker was ready")
    with wave.open(str(out)) as speech:
        assert speech.getnframes() == 24_000
    if not cold:
        ended(endpoint(stage, "test", "--voice", "nobody", "--out", str(out)), 1,
              "HTTP 400", "there is no voice 'nobody'")


def its_worker_is_shown(stage: Scene, number: int) -> None:
    (worker,) = stage.vast.workers()
    told = endpoint(stage, "status").stdout
    assert f"now {0.15 + 0.15 * 50 / 720:.4f} $/h\n  worker {worker.id}: idle, instance" in told
    shown = json.loads(endpoint(stage, "status", "--json", VASTAI_ENDPOINT_ID=str(number)).stdout)
    assert shown["id"] == number and shown["max_workers"] == 2
    assert shown["worker_groups"][0]["max_price"] == 0.2
    assert shown["workers"][0]["characters_per_second"] == 50.0
    logs = endpoint(stage, "logs", "--tail", "5")
    assert logs.status == 0
    assert logs.stdout == (f"endpoint {number}\nworker {worker.id} idle\n-- worker {worker.id}\n"
                           + worker.log.replace(worker.master_token, "[key]"))


@plays(drawn_out(story))
def test_an_endpoint_is_made_speaks_from_nothing_and_goes_without_a_trace(
        acts: Acts, act: Act) -> None:
    acts.end_of(act)


# Making it


def up_asks(stage: Scene) -> None:
    stage.vast.add_offer()
    ended(endpoint(stage, "up", "--max-workers", "3", "--max-price", "0.5"), 2,
          "at most 3 workers of at most 0.5 $/h: 1.50 $/h (36.00 $ a day)", "say --yes")
    no = stage.typed("n\n", "up", command="endpoint")
    ended(no, 1, "nothing is made")
    nothing_is_left(stage)
    yes = stage.typed("y\n", "up", "--max-workers=3", "--model", "builtin-voice",
                      command="endpoint")
    assert yes.status == 0
    (row,), (template,) = stage.vast.endpoints.values(), stage.vast.templates.values()
    assert row["max_workers"] == 3
    assert docker_options(template["env"])["BARK_MODEL"] == "/app/builtin-voice"


def up_without_an_offer_makes_nothing(stage: Scene) -> None:
    stage.vast.add_offer(dph_base=0.9)
    ended(endpoint(stage, *UP), 4, "No suitable GPU found")
    nothing_is_left(stage)


CREATES = {"template": "/api/v0/template/", "endpoint": "/api/v0/endptjobs/",
           "group": "/api/v0/autojobs/"}


def refusal(what: str) -> Act:
    def act(stage: Scene) -> None:
        stage.vast.add_offer()
        stage.vast.fault("POST", CREATES[what], status=403)
        done = endpoint(stage, *UP)
        ended(done, 4, "cannot be made", "no endpoint was made")
        nothing_is_left(stage)
    act.__name__ = f"refused_{what}"
    return drawn_out(act)


@drawn_out
def template_that_the_key_may_not_make(stage: Scene) -> None:
    """The CLI keeps Vast's reason to itself."""
    stage.vast.add_offer()
    stage.vast.fault("POST", CREATES["template"], status=403)
    ended(endpoint(stage, *UP), 4, "cannot be made: Vast says no", "permission user_write",
          "no endpoint was made")
    nothing_is_left(stage)


def lost_answer(what: str) -> Act:
    def act(stage: Scene) -> None:
        stage.vast.add_offer()
        stage.vast.fault("POST", CREATES[what], drop="after")
        number = made(stage)
        vast = stage.vast
        assert (len(vast.templates), list(vast.endpoints), len(vast.groups)) == (1, [number], 1)
    act.__name__ = f"lost_{what}"
    return drawn_out(act)


def cut(what: str, number: signal.Signals) -> Act:
    """By a signal while the order is on its way; it arrives all the same."""
    def act(stage: Scene) -> None:
        stage.vast.add_offer()
        run: list[Run] = []

        def interrupt(_: Request) -> None:
            wait_until(lambda: run, "run")
            run[0].process.send_signal(number)
        stage.vast.on("POST", CREATES[what], interrupt)
        run.append(stage.launch(*UP, command="endpoint"))
        ended(run[0].wait(), 128 + number, "giving back", "no endpoint was made")
        nothing_is_left(stage)
    act.__name__ = f"cut_{what}_{number.name}"
    return drawn_out(act)


def limits_that_vast_does_not_keep(stage: Scene) -> None:
    """Five workers asleep cost money, whatever was asked for."""
    stage.vast.add_offer()

    def spoil(_: Request) -> None:
        for row in stage.vast.endpoints.values():
            row["cold_workers"] = 5
    stage.vast.on("POST", CREATES["endpoint"], spoil, when="after")
    ended(endpoint(stage, *UP), 4, "with the limits that were asked for", "no endpoint was made")
    nothing_is_left(stage)


def another_endpoint_is_left_alone(stage: Scene) -> None:
    """One of another name, and its worker."""
    other = stage.vast.add_endpoint(endpoint_name="other")
    own = stage.vast.add_instance(label=None, fate="silent", env={"BARK_LABEL": "other"})
    number = made(stage)
    ended(endpoint(stage, "down", "--yes"), 0)
    assert number not in stage.vast.endpoints and other["id"] in stage.vast.endpoints
    assert list(stage.vast.instances) == [own.id] and own.touched == []


QUICK_UPS = (up_asks, lost_answer("group"), cut("endpoint", signal.SIGINT))
LONG_UPS = (up_without_an_offer_makes_nothing, template_that_the_key_may_not_make,
            *map(refusal, ("endpoint", "group")), lost_answer("template"), lost_answer("endpoint"),
            cut("template", signal.SIGTERM), cut("group", signal.SIGHUP),
            drawn_out(limits_that_vast_does_not_keep), another_endpoint_is_left_alone)


@plays(*QUICK_UPS)
def test_up_makes_all_of_it_or_leaves_nothing(acts: Acts, act: Act) -> None:
    acts.end_of(act)


@pytest.mark.long
@plays(*LONG_UPS)
def test_up_makes_all_of_it_or_leaves_nothing_whatever_goes_wrong(acts: Acts, act: Act) -> None:
    acts.end_of(act)


# Ending it


@drawn_out
def down_names_what_it_cannot_end(stage: Scene) -> None:
    number = made(stage)
    stage.vast.fault("DELETE", CREATES["endpoint"], times=99, status=500)
    done = endpoint(stage, "down", "--yes")
    ended(done, 4, f"vastai delete endpoint {number}")
    assert list(stage.vast.endpoints) == [number] and stage.vast.groups == {}


@drawn_out
def down_names_a_worker_that_stays(stage: Scene) -> None:
    made(stage)
    stage.vast.offers.clear()
    stage.vast.add_offer(fate="refuses_destroy")
    assert endpoint(stage, "test", "--out", str(stage.manager.home / "a.wav")).status == 0
    (worker,) = stage.vast.workers()
    done = endpoint(stage, "down", "--yes")
    assert done.status == 4 and ids_named(done) == {worker.id}
    assert (stage.vast.groups, stage.vast.endpoints) == ({}, {})


def down_finds_workers_whose_endpoint_is_gone(stage: Scene) -> None:
    """As after a `down` that was killed: they are billed all the same."""
    left = stage.vast.add_instance(label=None, fate="silent", env={"BARK_LABEL": "bark-worker"})
    told = endpoint(stage, "status")
    assert (told.status, told.stderr) == (1, "")
    assert told.stdout.startswith("no endpoint is called bark-worker, and workers of one that was")
    assert f"\n  now 0.0704 $/h\n  worker {left.id}: " in told.stdout
    ended(endpoint(stage, "down", "--yes"), 0, f"worker {left.id}: ")
    nothing_is_left(stage)


def down_asks(stage: Scene) -> None:
    number = made(stage)
    asked = len(stage.vast.requests)
    ended(endpoint(stage, "down"), 2, "this is no terminal, so say --yes")
    assert len(stage.vast.requests) == asked
    ended(stage.typed("n\n", "down", command="endpoint"), 1,
          f"endpoint {number}: bark-worker", "nothing is deleted")
    assert stage.vast.removed == []


def the_id_of_the_environment_counts(stage: Scene) -> None:
    number = made(stage)
    other = stage.vast.add_endpoint(endpoint_name="other", max_workers=7)["id"]
    told = endpoint(stage, "status", VASTAI_ENDPOINT_ID=str(other))
    assert told.status == 1 and told.stdout.startswith(f"endpoint {other}, other: ")
    ended(endpoint(stage, "test", VASTAI_ENDPOINT_ID=str(other)), 1,
          f"endpoint {other} has no worker group, so no worker can start; to make one: ")
    ended(endpoint(stage, "status", VASTAI_ENDPOINT_ID="12"), 5, "no such endpoint",
          f"{number} (bark-worker), {other} (other)\nSet it to one of these numbers, or unset it")
    ended(endpoint(stage, "test", BARK_LABEL="third"), 5,
          f"is called 'third'; the account has: {number} (bark-worker), {other} (other)\n")
    ended(endpoint(stage, "up", "--yes", VASTAI_ENDPOINT_ID="x"), 2, "VASTAI_ENDPOINT_ID is 'x'")
    ended(endpoint(stage, "down", "--yes", VASTAI_ENDPOINT_ID=str(other)), 0)
    assert list(stage.vast.endpoints) == [number] and len(stage.vast.groups) == 1


def without_a_worker_the_test_gives_up_in_time(stage: Scene) -> None:
    made(stage)
    stage.vast.recruits = False
    done = endpoint(stage, "test", "--timeout", "3")
    ended(done, 6, " s: no worker is ready", "no worker was ready within 3 s; what Vast does: ")


def a_suspended_endpoint_is_not_waited_for(stage: Scene) -> None:
    number = made(stage)
    stage.vast.endpoints[number]["endpoint_state"] = "suspended"
    ended(endpoint(stage, "test"), 1, f"endpoint {number} is suspended, and starts no worker",
          f"vastai update endpoint {number} --endpoint_state active\n")


@drawn_out
def answers_that_are_none(stage: Scene) -> None:
    """Vast deletes nothing, and then does not tell what there is: that is not gone."""
    number = made(stage)
    for path, answers in (("/endptjobs/", ({"success": False, "msg": "sorry"}, {"results": None},
                                           {"success": True, "results": [7]})),
                          ("/instances/", ({"success": False}, {"instances": {}}))):
        for answer in answers:
            stage.vast.fault("GET", path, times=3, status=200, body=answer)
            done = in_a_hurry(stage, "down", "--yes", command="endpoint").wait()
            assert done.status == 4 and "is gone" not in done.stderr
    assert stage.vast.removed == []
    stage.vast.fault("DELETE", CREATES["endpoint"], times=99, status=500)
    stage.vast.fault("GET", "/instances/", skip=2, times=99, status=200, body={"instances": None})
    done = in_a_hurry(stage, "down", "--yes", command="endpoint").wait()
    ended(done, 4, f"vastai delete endpoint {number}")


def status_looks_for_an_endpoint_of_that_name(stage: Scene) -> None:
    """Where there is no instance; the other commands say that they did not look."""
    number = made(stage)
    ended(stage.launch(command="status").wait(), 5, f"but endpoint {number} has that name, and may")
    ended(stage.launch(command="stop").wait(), 5, "an endpoint of that name was not looked at: ")
    ended(endpoint(stage, "down", "--yes"), 0)
    ended(stage.launch(command="status").wait(), 5, "nothing is billed under it")
    stage.vast.fault("GET", "/endptjobs/", status=403)
    ended(stage.launch(command="status").wait(), 5, "an endpoint has that name is not known")


def row_of_a_worker_that_cannot_be_read(stage: Scene) -> None:
    """It may be one, so it is not called gone."""
    left = stage.vast.add_instance(label=None, fate="silent", env={"BARK_LABEL": "bark-worker"})
    odd = stage.vast.add_instance(label=None, fate="silent")
    real = odd.row
    odd.row = lambda: {**real(), "extra_env": "A=b"}  # type: ignore[method-assign]
    done = in_a_hurry(stage, "down", "--yes", command="endpoint").wait()
    assert (done.status, stage.vast.destroyed) == (0, [left.id])
    assert f"instance {odd.id} comes up and does not tell whose it is" in done.stderr


@plays(down_finds_workers_whose_endpoint_is_gone, the_id_of_the_environment_counts,
       status_looks_for_an_endpoint_of_that_name)
def test_down_ends_what_is_meant_and_nothing_else(acts: Acts, act: Act) -> None:
    acts.end_of(act)


@pytest.mark.long
@plays(answers_that_are_none, row_of_a_worker_that_cannot_be_read, down_names_what_it_cannot_end,
       down_names_a_worker_that_stays, down_asks,
       without_a_worker_the_test_gives_up_in_time, a_suspended_endpoint_is_not_waited_for)
def test_what_cannot_be_done_is_said(acts: Acts, act: Act) -> None:
    acts.end_of(act)
