"""A day of an operator's bad luck: two faults at once, a second terminal, odd answers, no file.

As in test_rent.py, the real script and the real `vastai` play against the fake API, side by side.
What counts is the money: what is billed afterwards, and whether the last lines name it.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import wait_until
from fake_vast import Instance, Request
from manager import Run
from renting import Act, Acts, Scene, acts_of, drawn_out, ids_named, in_a_hurry, plays

LIST, ORDER, ANY_ID = "/api/v1/instances/", "/asks/", r"/instances/\d+/"
BAD_GATEWAY = {"status": 502, "body": "<html>Bad Gateway</html>"}
NO_LISTS: list[object] = [
    {"success": False}, {"instances": None}, {"success": False, "msg": "sorry"}, {}, [], None,
    {"success": True, "instances": {}}, {"success": True, "instances": "none"}, "", "nothing",
    {"success": False, "instances": [], "next_token": None}]


@pytest.fixture(scope="module")
def acts(request: pytest.FixtureRequest,
         tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acts]:
    with acts_of(request, tmp_path_factory.mktemp("acts")) as playing:
        yield playing


def run(stage: Scene, command: str, *words: str, **settings: str) -> Run:
    return stage.launch(*words, command=command, **settings).wait()


def last_lines(done: Run, count: int = 2) -> str:
    return "\n".join(done.stderr.rstrip("\n").splitlines()[-count:])


# Orders without a clear answer


def lost_reply_while_the_list_fails(stage: Scene) -> None:
    """It is looked for until a look succeeds, and nothing else is ordered."""
    offer = stage.vast.add_offer()
    stage.vast.add_offer(dph_base=0.07)
    stage.vast.fault("PUT", ORDER, drop="after")
    stage.vast.fault("GET", LIST, skip=1, times=5, **BAD_GATEWAY)
    done = run(stage, "start", "--yes")
    assert (done.status, stage.orders()) == (0, [offer])
    assert done.stdout == f"{stage.only().worker_url}\n"


@drawn_out
def lost_reply_and_a_list_that_never_answers(stage: Scene) -> None:
    for price in (0.06, 0.07, 0.08):
        stage.vast.add_offer(dph_base=price)
    stage.vast.fault("PUT", ORDER, drop="after")
    stage.vast.fault("GET", LIST, skip=1, times=math.inf, **BAD_GATEWAY)
    done = in_a_hurry(stage, "--yes").wait()
    assert (done.status, done.stdout, len(stage.orders())) == (4, "", 1)
    assert "nothing came of it" not in done.stderr
    for words in ("'bark-worker'", "vastai show instances", "vastai destroy instance ID -y"):
        assert words in last_lines(done)


@drawn_out
def order_that_never_arrived(stage: Scene) -> None:
    """That is certain half a minute later; then the next one is ordered."""
    offers = [stage.vast.add_offer(), stage.vast.add_offer(dph_base=0.07)]
    stage.vast.fault("PUT", ORDER, status=502)
    done = in_a_hurry(stage, "--yes").wait()
    assert (done.status, stage.orders()) == (0, offers)
    assert "nothing came of it" in done.stderr
    second = stage.vast.calls("PUT", ORDER)[1]
    assert len([one for one in stage.vast.calls("GET", LIST) if one.time < second.time]) > 3


UNCLEAR: dict[str, object] = {
    "an empty object": {}, "a list": [], "no id": {"success": True},
    "a word": {"success": True, "new_contract": "soon"}, "a page": "<html>Hello</html>"}


def empty_answer(stage: Scene) -> None:
    """As the CLI gives at times, with exit status 0; the order had its effect."""
    offer = stage.vast.add_offer()
    stage.vast.fault("PUT", ORDER, status=200, body="", effect=True)
    done = run(stage, "start", "--yes")
    assert (done.status, stage.orders()) == (0, [offer])
    assert done.stdout == f"{stage.only().worker_url}\n"


def unclear_answers(stage: Scene) -> None:
    """Each order had its effect: the instance is found and used."""
    for answer in UNCLEAR.values():
        offer = stage.vast.add_offer()
        stage.vast.fault("PUT", ORDER, status=200, body=answer, effect=True)
        done = run(stage, "start", "--yes")
        assert (done.status, stage.orders()[-1]) == (0, offer)
        assert done.stdout == f"{stage.only().worker_url}\n"
        with stage.vast.lock:
            stage.vast.instances.pop(stage.only().id).destroy()
        stage.vast.offers.clear()
    assert len(stage.orders()) == len(UNCLEAR)


@plays(lost_reply_and_a_list_that_never_answers, lost_reply_while_the_list_fails)
def test_while_an_order_has_no_clear_answer_there_is_no_other(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# Answers that are none


def no_list(stage: Scene, answer: object) -> None:
    """From now on."""
    stage.vast.fault("GET", LIST, status=200, times=3, body=answer)


def lists_that_are_none(stage: Scene) -> None:
    """None of them says that the account is empty."""
    instance = stage.vast.add_instance(fate="silent")
    stage.vast.add_offer()
    for answer in NO_LISTS[:1]:
        for command, *words in (["status"], ["start", "--yes"], ["destroy", "--yes"]):
            no_list(stage, answer)
            done = in_a_hurry(stage, *words, command=command).wait()
            assert (done.status, done.stdout) == (4, "")
            assert "the instances cannot be listed" in done.stderr
    assert (stage.changes(), stage.billed()) == ([], {instance.id: "running"})


def other_lists_that_are_none(stage: Scene) -> None:
    instance = stage.vast.add_instance(fate="silent")
    for answer in NO_LISTS[1:]:
        no_list(stage, answer)
        done = in_a_hurry(stage, command="status").wait()
        assert (done.status, done.stdout) == (4, "")
        assert "billed under" not in done.stderr
    assert stage.billed() == {instance.id: "running"}


def list_that_is_none_after_destroying(stage: Scene) -> None:
    """Vast does not do it, and then does not tell."""
    instance = stage.vast.add_instance(fate="refuses_destroy")
    stage.vast.fault("GET", LIST, skip=1, times=math.inf, status=200, body={"instances": None})
    done = in_a_hurry(stage, "--yes", command="destroy").wait()
    assert (done.status, ids_named(done)) == (4, {instance.id})
    assert "is destroyed" not in done.stderr


def pages_without_end(stage: Scene) -> None:
    """Each leads to itself."""
    stage.vast.add_instance(fate="silent")
    page = {"success": True, "instances": [], "next_token": "again"}
    stage.vast.fault("GET", LIST, times=math.inf, status=200, body=page)
    done = in_a_hurry(stage, command="status").wait()
    assert done.status == 4 and "cannot be listed" in done.stderr


def offers_that_are_none(stage: Scene) -> None:
    """An odd row is left out; an answer without a list is none."""
    offer = stage.vast.add_offer()
    row = {**stage.vast.offers[offer], "dph_total": 0.07}
    odd = [None, 7, {**row, "dph_total": "0.01"}, {**row, "inet_down_cost": "0.01"},
           {**row, "gpu_ram": []}, {**row, "dph_total": -0.07}]
    json = {"Content-Type": "application/json"}
    stage.vast.fault("POST", "/bundles/", status=200, headers=json, body={"offers": [*odd, row]})
    assert stage.search() == [offer]
    for answer in ({"success": False}, {"offers": None}, {"offers": {}}):
        stage.vast.fault("POST", "/bundles/", status=200, headers=json, times=3, body=answer)
        done = in_a_hurry(stage, "--yes").wait()
        assert (done.status, done.stdout, stage.orders()) == (4, "", [])
        assert "the offers cannot be searched" in done.stderr and "jq" not in done.stderr


@plays(lists_that_are_none, list_that_is_none_after_destroying, offers_that_are_none)
def test_an_answer_that_is_not_what_was_asked_for_is_no_answer(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# Rows that cannot be read

ODD_FIELDS: list[tuple[str, object]] = [
    ("dph_total", "0.07"), ("extra_env", "BARK_API_KEY=x"), ("extra_env", [["A"]]),
    ("extra_env", [{"key": "A"}]), ("start_date", "yesterday"), ("actual_status", 7),
    ("id", None)]


def make_odd(instance: Instance, name: str, value: object) -> None:
    """From now on, this is what Vast's list has there."""
    real = instance.row
    instance.row = lambda: {**real(), name: value}  # type: ignore[method-assign]


def one_odd_row(stage: Scene) -> None:
    """It is named with what ends it, the other is served, and nothing is rented beside it."""
    odd, other = stage.vast.add_instance(fate="silent"), stage.vast.add_instance(state="stopped")
    make_odd(odd, "dph_total", "0.07")
    done = run(stage, "status")
    assert done.status == 1 and done.stdout.startswith(f"instance {other.id}: stopped")
    assert "its dph_total is no number" in done.stderr and ids_named(done) == {odd.id}
    done = run(stage, "destroy", "--yes")
    assert (done.status, ids_named(done)) == (4, {odd.id})
    assert stage.vast.destroyed == [other.id] and stage.billed() == {odd.id: "running"}
    stage.vast.add_offer()
    done = run(stage, "start", "--yes")
    assert (done.status, stage.orders()) == (4, []) and str(odd.id) in done.stderr
    for command in ("test", "logs", "env", "status"):
        done = run(stage, command)
        assert (done.status, done.stdout, ids_named(done)) == (1, "", {odd.id})
    done = run(stage, "stop", str(odd.id))
    assert (done.status, ids_named(done), odd.touched) == (4, {odd.id}, [])
    assert run(stage, "destroy", str(odd.id), "--yes").status == 0
    assert stage.billed() == {}


def every_odd_row(stage: Scene) -> None:
    other = stage.vast.add_instance(state="stopped")
    odd = [stage.vast.add_instance(fate="silent") for _ in ODD_FIELDS]
    for instance, (name, value) in zip(odd, ODD_FIELDS, strict=True):
        make_odd(instance, name, value)
    done = run(stage, "status")
    assert done.status == 1 and done.stdout.startswith(f"instance {other.id}: stopped")
    named = set(map(int, re.findall(r"vastai destroy instance (\d+)", done.stderr)))
    assert named == {one.id for one in odd if one is not odd[-1]}
    assert "instance without an id may be ours" in done.stderr


def own_row_that_turns_odd(stage: Scene) -> None:
    """While `start` waits for it: that is no reason to take it for gone."""
    stage.vast.add_offer(fate="silent")
    stage.vast.on("PUT", ORDER, lambda request: make_odd(stage.only(), "dph_total", "0.07"),
                  when="after")
    waiting = stage.launch("--yes")
    wait_until(lambda: "cannot be read" in waiting.stderr, "words", 60)
    os.kill(waiting.process.pid, signal.SIGTERM)
    assert waiting.wait().status == 143
    assert (stage.billed(), len(stage.vast.destroyed)) == ({}, 1)


@plays(one_odd_row)
def test_a_row_that_cannot_be_read_is_named_and_the_rest_goes_on(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# What somebody else does meanwhile


def second_terminal(stage: Scene, command: str, *words: str) -> None:
    done = run(stage, command, *words)
    assert done.status == 0, done.stderr


def waiting_start(stage: Scene, words: str = "the worker does not answer yet") -> Run:
    waiting = stage.launch("--yes")
    wait_until(lambda: words in waiting.stderr, words, 60)
    stage.vast.rate_violations = list  # type: ignore[method-assign]
    return waiting


def rented_one_that_is_destroyed(stage: Scene) -> None:
    stage.vast.add_offer(fate="silent")
    stage.vast.add_offer(dph_base=0.07)
    waiting = waiting_start(stage)
    number = stage.only().id
    second_terminal(stage, "destroy", "--yes")
    assert waiting.wait().status == 5
    assert f"instance {number} was destroyed meanwhile, and not by this run" in waiting.stderr
    assert (len(stage.orders()), stage.billed()) == (1, {})


def rented_one_that_is_stopped(stage: Scene) -> None:
    """Its disk was meant to be kept."""
    stage.vast.add_offer(fate="silent")
    stage.vast.add_offer(dph_base=0.07)
    waiting = waiting_start(stage)
    second_terminal(stage, "stop", "--now")
    assert waiting.wait().status == 4
    assert f"instance {stage.only().id} was stopped meanwhile" in waiting.stderr
    assert f"destroy {stage.only().id}" in last_lines(waiting)
    assert (len(stage.orders()), stage.billed()) == (1, {stage.only().id: "stopped"})
    assert stage.vast.calls("DELETE", ANY_ID) == []


def woken_one_that_is_stopped(stage: Scene) -> None:
    old = stage.vast.add_instance(state="stopped", fate="silent")
    waiting = waiting_start(stage)
    second_terminal(stage, "stop")
    assert waiting.wait().status == 4 and "was stopped meanwhile" in waiting.stderr
    assert (old.touched, stage.billed()) == (["running", "stopped"], {old.id: "stopped"})


def woken_one_that_is_destroyed(stage: Scene) -> None:
    old = stage.vast.add_instance(state="stopped", fate="silent")
    stage.vast.add_offer()
    waiting = waiting_start(stage)
    second_terminal(stage, "destroy", "--yes")
    assert waiting.wait().status == 5
    assert (old.touched, stage.orders()) == (["running", "destroy"], [])


def running_one_that_is_stopped(stage: Scene) -> None:
    old = stage.vast.add_instance(fate="silent")
    waiting = waiting_start(stage)
    second_terminal(stage, "stop", "--now")
    assert waiting.wait().status == 4 and "was stopped meanwhile" in waiting.stderr
    assert (old.touched, stage.billed()) == (["stopped"], {old.id: "stopped"})


def running_one_that_is_destroyed(stage: Scene) -> None:
    stage.vast.add_instance(fate="silent")
    waiting = waiting_start(stage)
    second_terminal(stage, "destroy", "--yes")
    assert waiting.wait().status == 5 and stage.orders() == []


def replacement_that_is_destroyed(stage: Scene) -> None:
    """The old one is kept as it was."""
    old = stage.vast.add_instance(fate="outbid", price=0.05)
    stage.vast.add_offer(fate="silent")
    waiting = stage.launch("--yes", "--replace")
    wait_until(lambda: "the worker does not answer yet" in waiting.stderr, "words", 60)
    stage.vast.rate_violations = list  # type: ignore[method-assign]
    (new,) = (number for number in stage.vast.instances if number != old.id)
    second_terminal(stage, "destroy", str(new), "--yes")
    assert waiting.wait().status == 5 and f"instance {old.id} is kept" in waiting.stderr
    assert list(stage.billed()) == [old.id]


def list_that_loses_it_once(stage: Scene) -> None:
    """Absent in one look is not gone."""
    stage.vast.add_offer()
    stage.workers_say("loading")
    stage.vast.late_ports = math.inf
    waiting = waiting_start(stage)
    empty = {"success": True, "instances": [], "next_token": None}
    stage.vast.fault("GET", LIST, status=200, body=empty)
    wait_until(lambda: "not in the list of Vast any more" in waiting.stderr, "words", 60)
    stage.workers_say("ready")
    stage.vast.late_ports = 0.0
    assert waiting.wait().stdout == f"{stage.only().worker_url}\n"


@plays(rented_one_that_is_stopped, rented_one_that_is_destroyed)
def test_what_somebody_else_ended_stays_as_he_left_it(act: Act, acts: Acts) -> None:
    acts.end_of(act)


def host_away_for_a_moment(stage: Scene) -> None:
    """Two looks in a row say so, several times."""
    stage.vast.add_offer()
    stage.vast.late_ports = math.inf
    waiting = waiting_start(stage)
    for status in ("offline", "unknown", "offline"):
        stage.only().set_status(status)
        wait_until(lambda status=status: f": {status}" in waiting.stderr.splitlines()[-1], "look")
        count = len(stage.vast.calls("GET", LIST))
        stage.vast.wait_for_call("GET", LIST, count + 1)
        stage.only().set_status("loading")
        wait_until(lambda: ": loading" in waiting.stderr.splitlines()[-1], "look")
    stage.vast.late_ports = 0.0
    stage.only()._frozen = False
    assert waiting.wait().stdout == f"{stage.only().worker_url}\n"
    assert stage.vast.destroyed == []


@drawn_out
def host_away_for_good(stage: Scene) -> None:
    offers = [stage.vast.add_offer(fate="offline"), stage.vast.add_offer(dph_base=0.07)]
    done = run(stage, "start", "--yes")
    assert (done.status, stage.orders()) == (0, offers)
    order, given_back = (stage.vast.calls(*one)[0] for one in (("PUT", ORDER), ("DELETE", ANY_ID)))
    looks = [one.time for one in stage.vast.calls("GET", LIST)
             if order.time < one.time < given_back.time]
    assert len(looks) >= 3 and looks[-1] - looks[0] >= 6
    assert "is offline, in 3 looks" in done.stderr


def host_away_at_the_first_look(stage: Scene) -> None:
    """With --replace, too: one look is not enough to destroy the old one."""
    old = stage.vast.add_instance()
    wait_until(lambda: old.port, "worker")
    old.set_status("unknown")
    stage.vast.on("GET", LIST, lambda request: old.set_status("running"), when="after")
    old.container.ports or old.boot()
    stage.vast.add_offer()
    waiting = stage.launch("--replace", "--yes")
    stage.vast.wait_for_call("GET", LIST, 2)
    with stage.vast.lock:
        old._frozen = False
        old.boot()
    assert waiting.wait().stdout == f"{old.worker_url}\n"
    assert (stage.orders(), stage.vast.destroyed) == ([], [])


def sleeping_one_whose_host_is_away(stage: Scene) -> None:
    """Nobody has stopped it meanwhile."""
    old = stage.vast.add_instance(state="stopped")
    old.go_offline()
    done = run(stage, "start", "--yes")
    assert (done.status, stage.changes()) == (4, []) and "is offline, in 3 looks" in done.stderr


@plays(host_away_for_good)
def test_only_three_looks_in_a_row_make_a_host_lost(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# Faults that every machine would have, or that cannot be seen


def settings_refused(stage: Scene, done: Run) -> None:
    assert (done.status, done.stdout, stage.billed(), len(stage.orders())) == (4, "", {}, 1)
    assert "refuses its settings" in done.stderr


@drawn_out
def settings_refused_in_the_log(stage: Scene) -> None:
    stage.vast.container_env["ENDS"] = "2"
    for price in (0.06, 0.07):
        stage.vast.add_offer(dph_base=price)
    done = in_a_hurry(stage, "--yes", BARK_POLL="10").wait()
    settings_refused(stage, done)
    assert done.stderr.count("bad key [key]") == 1


def settings_refused_on_health(stage: Scene) -> None:
    """As an unknown voice is, which shows once the model is there."""
    for price in (0.06, 0.07):
        stage.vast.add_offer(dph_base=price)
    stage.workers_say("failed", error="BARK_VOICE is 'nobody'", exit_status=2)
    done = run(stage, "start", "--yes")
    settings_refused(stage, done)
    assert done.stderr.count("BARK_VOICE is 'nobody'") == 1


@drawn_out
def ports_that_never_come(stage: Scene) -> None:
    """The container runs, and is billed, and nobody can reach it."""
    offers = [stage.vast.add_offer(), stage.vast.add_offer(dph_base=0.07)]
    stage.vast.late_ports = math.inf
    stage.vast.on("DELETE", ANY_ID, lambda request: setattr(stage.vast, "late_ports", 0.0))
    done = in_a_hurry(stage, "--yes", BARK_POLL="20").wait()
    assert (done.status, stage.orders()) == (0, offers)
    assert "Vast tells no port of it" in done.stderr


@plays(settings_refused_in_the_log, settings_refused_on_health)
def test_what_no_waiting_helps_is_said_once_and_ends_it(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# Traffic


def dear_traffic(stage: Scene) -> None:
    """10 GB at 0.05 $ are half a dollar: as much as 0.02 $/h more for a day."""
    low = stage.vast.add_offer(dph_base=0.06, inet_down_cost=0.05)
    fair = stage.vast.add_offer(dph_base=0.07, inet_down_cost=0.0)
    dear = stage.vast.add_offer(dph_base=0.01, inet_down_cost=0.5)
    assert stage.search() == [fair, low]
    assert set(stage.search("--max-traffic", "0.5")) == {fair, low, dear}
    assert stage.search("--max-traffic=0") == [fair]
    stage.vast.offers.pop(fair)
    done = stage.start("--dry-run")
    assert "the first start downloads some 10 GB: 0.50 $ (traffic: 0.050 $/GB)" in done.stdout
    stage.workers_say("loading")
    waiting = stage.launch("--yes")
    wait_until(lambda: "$: loading" in waiting.stderr, "words", 60)
    assert "s, 0.5000 $: " in waiting.stderr
    stage.workers_say("ready")
    assert waiting.wait().status == 0
    stage.vast.offers.pop(low)
    stage.vast.instances.pop(stage.only().id).destroy()
    done = stage.start("--yes")
    assert done.status == 4 and "with --max-traffic 0.5: RTX 3060" in done.stderr


@plays(dear_traffic)
def test_the_first_starts_traffic_counts_and_has_a_limit(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# Cut in the middle


def cut(stage: Scene, number: signal.Signals = signal.SIGINT) -> Callable[[Request], None]:
    def send(request: Request) -> None:
        os.killpg(stage.manager.runs[-1].process.pid, number)
    return send


def destroy_cut_between_two(stage: Scene) -> None:
    one, other = (stage.vast.add_instance(state="stopped") for _ in range(2))
    stage.vast.on("GET", LIST, lambda request: stage.vast.on("GET", LIST, cut(stage)),
                  when="after")
    done = run(stage, "destroy", "--yes")
    assert (done.status, stage.vast.destroyed) == (130, [one.id])
    assert other.id in ids_named(done)


def destroy_cut_in_a_slow_call(stage: Scene) -> None:
    """What is being waited for is said at once."""
    instance = stage.vast.add_instance(fate="silent")
    stage.vast.on("DELETE", ANY_ID, cut(stage))
    stage.vast.fault("DELETE", ANY_ID, delay=6.0, status=500)
    cutting = stage.launch("--yes", command="destroy")
    asked = stage.vast.wait_for_call("DELETE", ANY_ID).time
    wait_until(lambda: "waiting for Vast's answer to 'destroy instance'" in cutting.stderr, "words")
    assert time.monotonic() < asked + 5.0
    assert cutting.wait().status == 130 and ids_named(cutting) == {instance.id}


def destroy_cut_while_vast_is_out_of_order(stage: Scene) -> None:
    one, other = (stage.vast.add_instance(fate="silent") for _ in range(2))
    stage.vast.fault("DELETE", ANY_ID, times=math.inf, status=500)
    cutting = stage.launch("--yes", command="destroy")
    stage.vast.wait_for_call("DELETE", ANY_ID, 2)
    cut(stage, signal.SIGTERM)(stage.vast.requests[-1])
    assert cutting.wait().status == 143 and ids_named(cutting) == {one.id, other.id}


def stop_cut_in_the_middle(stage: Scene) -> None:
    one, other = (stage.vast.add_instance(fate="silent") for _ in range(2))
    stage.vast.on("PUT", f"/instances/{other.id}/", cut(stage))
    stage.vast.fault("PUT", f"/instances/{other.id}/", status=500)
    done = run(stage, "stop")
    assert (done.status, ids_named(done)) == (130, {other.id})
    assert stage.billed() == {one.id: "stopped", other.id: "running"}


def stop_that_is_refused(stage: Scene) -> None:
    one, other = (stage.vast.add_instance(fate="silent") for _ in range(2))
    stage.vast.fault("PUT", ANY_ID, times=math.inf, status=403)
    done = run(stage, "stop")
    assert done.status == 4 and ids_named(done) == {one.id, other.id}


def replace_cut_while_the_old_one_goes(stage: Scene) -> None:
    old = stage.vast.add_instance(fate="outbid", price=0.05)
    stage.vast.add_offer()
    stage.vast.on("DELETE", f"/{old.id}/", cut(stage, signal.SIGTERM))
    stage.vast.fault("DELETE", f"/{old.id}/", status=500)
    done = run(stage, "start", "--replace", "--yes")
    assert done.status == 143 and ids_named(done) == {old.id}
    assert len(stage.billed()) == 2


def slow_order_that_is_cut(stage: Scene) -> None:
    stage.vast.add_offer()
    stage.vast.on("PUT", ORDER, cut(stage))
    stage.vast.fault("PUT", ORDER, delay=6.0)
    cutting = stage.launch("--yes")
    wait_until(lambda: "waiting for Vast's answer to 'create instance'" in cutting.stderr, "words",
               60.0)
    assert "120 s at most" in cutting.stderr and len(stage.vast.instances) == 0
    assert cutting.wait().status == 130
    assert (stage.billed(), len(stage.vast.destroyed)) == ({}, 1)


@plays(destroy_cut_in_a_slow_call, slow_order_that_is_cut, destroy_cut_between_two)
def test_whatever_ends_a_change_the_last_lines_name_what_is_billed(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# A machine out of order: no file, another clock, no home, nobody who reads


def no_place_for_files(stage: Scene) -> None:
    """Neither renting nor giving back needs one."""
    stage.vast.add_offer(fate="exited")
    stage.vast.add_offer(dph_base=0.07)
    done = run(stage, "start", "--yes", TMPDIR="/proc")
    assert done.stdout == f"{stage.only().worker_url}\n" and len(stage.vast.destroyed) == 1
    assert run(stage, "status", TMPDIR="/proc").status == 0
    assert run(stage, "stop", TMPDIR="/proc").status == 0
    done = run(stage, "test", TMPDIR="/proc")
    assert (done.status, stage.billed()) == (1, {stage.only().id: "stopped"})
    assert run(stage, "destroy", "--yes", TMPDIR="/proc").status == 0
    assert stage.billed() == {} and "line " not in stage.manager.said()


def folder_that_is_swept(stage: Scene) -> None:
    """While an order is on its way."""
    folder = stage.manager.home / "tmp"
    folder.mkdir()
    stage.vast.add_offer(fate="exited")
    stage.vast.on("PUT", ORDER, lambda request: shutil.rmtree(folder))
    done = run(stage, "start", "--yes", TMPDIR=str(folder))
    assert (done.status, stage.billed()) == (4, {}) and "No such file" not in done.stderr


BACK = "sleep() { SECONDS=$((SECONDS - 3600)); command sleep \"$1\"; }"
FORTH = "sleep() { SECONDS=$((SECONDS + 3600)); command sleep \"$1\"; }"


def clock_that_is_set(stage: Scene) -> None:
    """An hour back or forth at every pause."""
    for way in (BACK, FORTH):
        stage.vast.add_offer()
        stage.vast.loading = 3.0
        stage.vast.rate_violations = list  # type: ignore[method-assign]
        done = stage.launch("--yes", prelude=way).wait()
        assert done.stdout == f"{stage.only().worker_url}\n"
        done = stage.launch("--yes", command="destroy", prelude=way).wait()
        assert (done.status, stage.billed()) == (0, {})


def no_home(stage: Scene) -> None:
    """As under a timer of systemd."""
    instance = stage.vast.add_instance(fate="silent")
    settings = {name: value for name, value in stage.manager.environment(PATH=stage.path).items()
                if name != "HOME"}
    done = subprocess.run(["bash", stage.manager.launch.__globals__["SCRIPT"], "stop"],
                          env=settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "unbound" not in done.stderr
    assert stage.billed() == {instance.id: "stopped"}


def nobody_who_reads(stage: Scene) -> None:
    """The status is ours, and stderr has none of the tools' own words."""
    for number in range(30):
        stage.vast.add_offer(dph_base=0.05 + number / 1000)
    stage.vast.add_instance(state="stopped")
    for words, status in ((("search",), 0), (("status",), 1), (("status", "--json"), 1),
                          (("help",), 0), (("help", "start"), 0), (("completion", "bash"), 0),
                          (("start", "--help"), 0), (("start", "--dry-run"), 0), (("logs",), 0),
                          (("env",), 1)):
        done = closed_pipe(stage, *words)
        assert done.returncode == status, (words, done)
        assert re.search("jq|printf|write error|[Bb]roken|line [0-9]", done.stderr) is None


def closed_pipe(stage: Scene, *words: str) -> subprocess.CompletedProcess[str]:
    """Nobody reads what the command prints, from the beginning."""
    reading, writing = os.pipe()
    os.close(reading)
    stage.manager.keep_vasts_pause()
    try:
        return subprocess.run(
            ["bash", stage.manager.launch.__globals__["SCRIPT"], *words], text=True, timeout=60,
            env=stage.manager.environment(PATH=stage.path), stdout=writing,
            stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False)
    finally:
        os.close(writing)


@plays(no_place_for_files, clock_that_is_set, no_home, nobody_who_reads)
def test_a_machine_out_of_order_costs_nothing(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# What is printed to be copied


def rescue_lines_work(stage: Scene) -> None:
    """From another folder, and in a shell that has the key under its own name or asks for it."""
    instance = stage.vast.add_instance(fate="exited")
    stage.vast.rate_violations = list  # type: ignore[method-assign]
    done = run(stage, "start", "--yes")
    line = re.search(r"to end that: (.*)$", done.stderr, re.M)
    assert done.status == 4 and line and str(stage.vast.account_key) not in line[1]
    environment = stage.manager.environment(PATH=stage.path)
    without = {name: value for name, value in environment.items() if name != "VASTAI_API_KEY"}
    asks = subprocess.run(["sh", "-c", line[1]], env=without, cwd="/", capture_output=True,
                          text=True, timeout=60)
    assert asks.returncode != 0 and "VASTAI_API_KEY: your key of Vast" in asks.stderr
    done = subprocess.run(["sh", "-c", f"{line[1]} --yes"], env=environment, cwd="/",
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and stage.vast.destroyed == [instance.id]


def revoked_key(stage: Scene) -> None:
    """Vast may answer that with 404, also to an order to destroy."""
    instance = stage.vast.add_instance(fate="silent")
    auth = {"status": 404, "body": {"success": False, "error": "auth_error",
                                    "msg": "Invalid user key"}}
    stage.vast.fault("GET", LIST, **auth)
    done = run(stage, "status")
    assert done.status == 4 and "https://cloud.vast.ai/manage-keys/" in done.stderr
    stage.vast.fault("DELETE", ANY_ID, times=math.inf, **auth)
    done = in_a_hurry(stage, "--yes", command="destroy").wait()
    assert (done.status, ids_named(done)) == (4, {instance.id})


def unknown_gpu(stage: Scene) -> None:
    stage.vast.add_offer(gpu_name="RTX 4070S")
    stage.vast.add_offer(gpu_name="RTX 4060 Ti")
    assert len(stage.search("--gpu", "4070 super,rtx 4060TI")) == 2
    for command, *words in (["search"], ["start", "--yes"]):
        done = run(stage, command, *words, "--gpu", "3060,RTX 4071")
        assert (done.status, done.stdout) == (2, "")
        assert "unknown GPU 'RTX 4071'; did you mean one of: RTX 4070S" in done.stderr
    assert stage.vast.calls("POST", "/bundles/") == stage.vast.calls("POST", "/bundles/")[:1]


@plays(rescue_lines_work, revoked_key, unknown_gpu)
def test_what_is_said_helps(act: Act, acts: Acts) -> None:
    acts.end_of(act)


@pytest.mark.long  # not by themselves, but run.sh is full
@plays(empty_answer, own_row_that_turns_odd, woken_one_that_is_stopped, ports_that_never_come,
       replace_cut_while_the_old_one_goes, order_that_never_arrived, unclear_answers,
       other_lists_that_are_none, pages_without_end, every_odd_row, woken_one_that_is_destroyed,
       running_one_that_is_stopped, replacement_that_is_destroyed, list_that_loses_it_once,
       host_away_for_a_moment, host_away_at_the_first_look, sleeping_one_whose_host_is_away,
       destroy_cut_while_vast_is_out_of_order, running_one_that_is_destroyed,
       stop_that_is_refused, stop_cut_in_the_middle, folder_that_is_swept)
def test_rarer_luck_costs_no_more(act: Act, acts: Acts) -> None:
    acts.end_of(act)
