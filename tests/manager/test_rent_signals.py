"""`start` when it is ended by a signal, runs twice at once, or never hears of what it ordered.

Whatever happens, afterwards nothing is billed that was not there before and that neither the answer
nor the last lines name.
"""

from __future__ import annotations

import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import manager
import pytest
from conftest import wait_until
from fake_vast import Request
from manager import BASH, Run
from renting import Act, Acts, Scene, acts_of, drawn_out, ids_named, plays

LIST, ORDER, ANY_ID = "/api/v1/instances/", "/asks/", r"/instances/\d+/"
HUP, INT, TERM = signal.SIGHUP, signal.SIGINT, signal.SIGTERM
# Makes the terminal on stdin the controlling one, so that its Ctrl-C and its end are signals.
ON_TERMINAL = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.fixture(scope="module")
def acts(request: pytest.FixtureRequest,
         tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acts]:
    kept = signal.signal(INT, signal.default_int_handler)  # a child of `pytest &` would ignore it
    with acts_of(request, tmp_path_factory.mktemp("acts")) as playing:
        yield playing
    signal.signal(INT, kept)


def strike(stage: Scene, number: signal.Signals,
           group: bool = False) -> Callable[[Request | None], None]:
    """What sends a signal to the scene's run: to the script only, or as the terminal does."""
    def send(request: Request | None = None) -> None:
        (os.killpg if group else os.kill)(stage.manager.runs[-1].process.pid, number)
    return send


def assert_ended(stage: Scene, run: Run, number: signal.Signals,
                 left: dict[int, str] | None = None) -> None:
    """It ended by the signal, said no address, and left exactly this billed."""
    assert (run.status, run.stdout) == (128 + number, "")
    assert stage.billed() == (left or {})
    assert ids_named(run) == set()


def start_and_wait_for(stage: Scene, words: str, *options: str) -> Run:
    run = stage.launch("--yes", *options)
    wait_until(lambda: words in run.stderr, words, 60)
    return run


# Before anything is rented


def int_while_searching(stage: Scene) -> None:
    stage.vast.add_offer()
    stage.vast.on("POST", "/bundles/", strike(stage, INT, group=True))
    assert_ended(stage, stage.start("--yes"), INT)
    assert stage.changes() == []


def term_at_the_question(stage: Scene) -> None:
    stage.vast.add_offer()
    keyboard, terminal = pty.openpty()
    run = stage.launch(stdin=terminal)
    wait_until(lambda: "on demand" in run.stderr, "offer")
    strike(stage, TERM)(None)
    assert_ended(stage, run.wait(), TERM)
    assert stage.changes() == []
    os.close(keyboard)
    os.close(terminal)


# While an order is on its way


def term_before_the_order_has_its_effect(stage: Scene) -> None:
    stage.vast.add_offer()
    stage.vast.on("PUT", ORDER, strike(stage, TERM))
    stage.vast.fault("PUT", ORDER, delay=2.0)
    run = stage.start("--yes")
    assert_ended(stage, run, TERM)
    assert len(stage.vast.destroyed) == 1
    assert "is destroyed" in run.stderr


def int_after_the_order_had_its_effect(stage: Scene) -> None:
    """With the ordinary `vastai`, which gets the signal, too."""
    stage.path = stage.manager.environment()["PATH"]
    stage.vast.add_offer()
    stage.vast.on("PUT", ORDER, strike(stage, INT, group=True), when="after")
    assert_ended(stage, stage.start("--yes"), INT)
    assert len(stage.vast.destroyed) == 1


def hup_while_an_order_is_refused(stage: Scene) -> None:
    stage.vast.add_offer()
    hang_up = strike(stage, HUP)
    stage.vast.on("PUT", ORDER, lambda request: (stage.vast.offers.clear(), hang_up(request)))
    assert_ended(stage, stage.start("--yes"), HUP)
    assert stage.vast.calls("DELETE", ANY_ID) == []


# While waiting


def hup_while_the_image_is_pulled(stage: Scene) -> None:
    stage.vast.loading = 1e9
    stage.vast.add_offer()
    run = start_and_wait_for(stage, "loading: Pulling")
    strike(stage, HUP, group=True)(None)
    assert_ended(stage, run.wait(), HUP)
    assert len(stage.vast.destroyed) == 1


def signals_while_giving_back(stage: Scene) -> None:
    """The first one is served to the end, and tells the exit status."""
    stage.workers_say("loading")
    stage.vast.add_offer()
    run = start_and_wait_for(stage, " $: loading")
    for number in (TERM, INT, HUP):
        stage.vast.on("DELETE", ANY_ID, strike(stage, number, group=True))
    stage.vast.on("DELETE", ANY_ID, strike(stage, INT, group=True), when="after")
    stage.vast.fault("DELETE", ANY_ID, status=500)
    strike(stage, INT, group=True)(None)
    stage.vast.wait_for_call("DELETE", ANY_ID)
    stage.vast.on("GET", LIST, strike(stage, TERM))
    assert_ended(stage, run.wait(), INT)
    assert len(stage.vast.destroyed) == 1


def signal_while_a_failed_one_is_given_back(stage: Scene) -> None:
    """The next offer is not tried then."""
    stage.vast.add_offer(fate="exited")
    stage.vast.add_offer(dph_base=0.07)
    stage.vast.on("DELETE", ANY_ID, strike(stage, TERM, group=True))
    assert_ended(stage, stage.start("--yes"), TERM)
    assert len(stage.orders()) == 1


# What was there before


def int_while_one_is_woken(stage: Scene) -> None:
    """Before Vast has taken the order to start it, which takes a while."""
    old = stage.vast.add_instance(state="stopped")
    stage.vast.on("PUT", f"/{old.id}/", strike(stage, INT, group=True))
    stage.vast.fault("PUT", f"/{old.id}/", delay=2.0)
    assert_ended(stage, stage.start(), INT, {old.id: "stopped"})
    assert old.touched == ["running", "stopped"]


def hup_while_the_woken_one_loads(stage: Scene) -> None:
    old = stage.vast.add_instance(state="stopped")
    stage.workers_say("loading")
    run = start_and_wait_for(stage, " $: loading")
    stage.vast.fault("PUT", f"/{old.id}/", drop="before")
    strike(stage, HUP)(None)
    assert_ended(stage, run.wait(), HUP, {old.id: "stopped"})


def term_while_a_running_one_loads(stage: Scene) -> None:
    old = stage.vast.add_instance()
    stage.workers_say("loading")
    run = start_and_wait_for(stage, " $: loading")
    strike(stage, TERM, group=True)(None)
    assert_ended(stage, run.wait(), TERM, {old.id: "running"})
    assert stage.changes() == []


def int_while_a_replacement_loads(stage: Scene) -> None:
    old = stage.vast.add_instance(state="stopped", fate="gpu_taken")
    stage.vast.add_offer()
    stage.workers_say("loading")
    run = start_and_wait_for(stage, " $: loading", "--replace", "--timeout", "6")
    strike(stage, INT)(None)
    assert_ended(stage, run.wait(), INT, {old.id: "stopped"})


def term_while_the_replaced_one_goes(stage: Scene) -> None:
    """The new one is healthy and its address said: it stays."""
    old = stage.vast.add_instance(fate="offline")
    stage.vast.add_offer()
    stage.vast.on("DELETE", f"/{old.id}/", strike(stage, TERM))
    run = stage.start("--replace", "--yes")
    assert (run.status, run.stdout) == (143, f"{stage.only().worker_url}\n")
    assert stage.vast.destroyed == [old.id]


# Terminals


class Terminal:
    """One on which the script runs; `text` is what stands there."""

    def __init__(self, stage: Scene, *words: str) -> None:
        self.keyboard, side = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-IS", "-c", ON_TERMINAL, BASH, str(manager.SCRIPT), *words],
            stdin=side, start_new_session=True, cwd=stage.manager.home,
            env=stage.manager.environment(PATH=stage.path))
        os.close(side)
        self.text = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := os.read(self.keyboard, 4096):
                self.text += data.decode(errors="replace")
        except OSError:
            pass  # what a terminal answers when nobody is there any more

    def type(self, text: str, after: str) -> None:
        wait_until(lambda: after in self.text, after, 60)
        os.write(self.keyboard, text.encode())


def ctrl_c_on_the_terminal(stage: Scene) -> None:
    stage.workers_say("loading")
    stage.vast.add_offer()
    terminal = Terminal(stage, "start")
    terminal.type("y\n", after="[y/N]")
    terminal.type("\x03", after="$: loading")
    terminal.type("\x03", after="giving back")
    assert terminal.process.wait(60) == 130
    assert (stage.billed(), len(stage.vast.destroyed)) == ({}, 1)
    wait_until(lambda: "nothing rented any more" in terminal.text, "last words")
    assert [secret for secret in stage.vast.secrets if secret in terminal.text] == []
    os.close(terminal.keyboard)


def terminal_that_is_closed(stage: Scene) -> None:
    """Writing there fails from then on, which is no reason to keep anything."""
    stage.workers_say("loading")
    stage.vast.add_offer()
    terminal = Terminal(stage, "start", "--yes")
    wait_until(lambda: "$: loading" in terminal.text, "loading", 60)
    os.close(terminal.keyboard)
    assert terminal.process.wait(60) == 129
    assert (stage.billed(), len(stage.vast.destroyed)) == ({}, 1)


@plays(int_while_searching, term_at_the_question, term_before_the_order_has_its_effect,
       int_after_the_order_had_its_effect, hup_while_an_order_is_refused,
       hup_while_the_image_is_pulled, signals_while_giving_back,
       signal_while_a_failed_one_is_given_back, int_while_one_is_woken,
       hup_while_the_woken_one_loads, term_while_a_running_one_loads,
       int_while_a_replacement_loads, term_while_the_replaced_one_goes, ctrl_c_on_the_terminal,
       terminal_that_is_closed)
def test_a_signal_leaves_what_was_there_and_nothing_else(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# Two at once, and replies that are lost


@drawn_out
def two_starts_at_once(stage: Scene) -> None:
    """Both look before either orders. Together they look more often than one may."""
    stage.vast.rate_violations = lambda: []  # type: ignore[method-assign]
    for price in (0.06, 0.07, 0.08):
        stage.vast.add_offer(dph_base=price)
    both = threading.Barrier(2)
    stage.vast.on("POST", "/bundles/", lambda request: both.wait(30), when="after", times=2)
    runs = [launch_at_once(stage), launch_at_once(stage)]
    assert [run.wait().status for run in runs] == [0, 0]
    assert [run.stdout for run in runs] == [f"{stage.only().worker_url}\n"] * 2
    assert stage.billed() == {min(stage.vast.instances): "running"}
    assert len(stage.vast.destroyed) == 1 and stage.vast.destroyed[0] > stage.only().id


def reply_to_the_order_that_is_lost(stage: Scene) -> None:
    """What was ordered is known by its key, and used."""
    offer = stage.vast.add_offer()
    stage.vast.add_offer(dph_base=0.07)
    stage.vast.fault("PUT", ORDER, drop="after")
    run = stage.start("--yes")
    assert (run.status, run.stdout) == (0, f"{stage.only().worker_url}\n")
    assert (stage.orders(), stage.billed()) == ([offer], {stage.only().id: "running"})


def reply_that_is_lost_of_one_that_fails(stage: Scene) -> None:
    stage.vast.add_offer(fate="exited")
    stage.vast.fault("PUT", ORDER, drop="after")
    run = stage.start("--yes")
    assert (run.status, run.stdout, stage.billed()) == (4, "", {})
    assert len(stage.vast.destroyed) == 1 and ids_named(run) == set()


def list_that_lags(stage: Scene) -> None:
    """What is not listed yet is not gone: it is waited for, and after a signal destroyed."""
    stage.vast.add_offer()
    nothing = {"success": True, "instances": [], "next_token": None}
    stage.vast.fault("GET", LIST, skip=1, times=3, status=200, body=nothing)
    run = start_and_wait_for(stage, "not in the list of Vast yet")
    strike(stage, TERM, group=True)(None)
    assert_ended(stage, run.wait(), TERM)
    assert len(stage.vast.destroyed) == 1


@plays(two_starts_at_once, reply_to_the_order_that_is_lost, reply_that_is_lost_of_one_that_fails,
       list_that_lags)
def test_nothing_is_rented_twice_or_forgotten(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# Long ones


def lose_order(stage: Scene, seconds: float,
               meanwhile: Callable[[Request], None] = lambda request: None) -> None:
    """The next order is lost, and has its effect after so many seconds."""
    def order_later(request: Request) -> None:
        threading.Timer(seconds, stage.vast.answer, [request]).start()
        meanwhile(request)
    stage.vast.on("PUT", ORDER, order_later)
    stage.vast.fault("PUT", ORDER, drop="before")


def late_fruit_of_a_lost_order(stage: Scene) -> None:
    """It is waited for, and used."""
    offer = stage.vast.add_offer()
    stage.vast.add_offer(dph_base=0.07)
    lose_order(stage, 20.0)
    run = stage.start("--yes")
    assert (run.status, stage.orders()) == (0, [offer])
    assert stage.billed() == {stage.only().id: "running"}


def fruit_that_comes_when_nobody_waits_for_it(stage: Scene) -> None:
    """The next one was rented, and is still loading."""
    offers = [stage.vast.add_offer(), stage.vast.add_offer(dph_base=0.07)]
    stage.workers_say("loading")
    lose_order(stage, 50.0)
    run = stage.launch("--yes")
    wait_until(lambda: len(stage.vast.instances) == 2, "late one", 90)
    stage.workers_say("ready")
    assert (run.wait().status, stage.orders()) == (0, offers)
    assert stage.only().offer["id"] == offers[1]
    assert stage.billed() == {stage.only().id: "running"}


def late_fruit_after_a_signal(stage: Scene) -> None:
    stage.vast.add_offer()
    lose_order(stage, 25.0, meanwhile=strike(stage, INT, group=True))
    stage.vast.null_rows = True
    assert_ended(stage, stage.start("--yes"), INT)
    assert len(stage.vast.destroyed) == 1


def lost_reply_and_a_list_that_lags(stage: Scene) -> None:
    """Four looks do not find it; nothing else is rented meanwhile."""
    offer = stage.vast.add_offer()
    stage.vast.add_offer(dph_base=0.07)
    nothing = {"success": True, "instances": [], "next_token": None}
    stage.vast.fault("PUT", ORDER, drop="after")
    stage.vast.fault("GET", LIST, skip=1, times=4, status=200, body=nothing)
    run = stage.start("--yes")
    assert (run.status, stage.orders()) == (0, [offer])
    assert run.stdout == f"{stage.only().worker_url}\n"
    assert (stage.billed(), stage.vast.destroyed) == ({stage.only().id: "running"}, [])


def lost_order_and_a_signal(stage: Scene) -> None:
    stage.vast.add_offer()
    stage.vast.on("PUT", ORDER, strike(stage, TERM))
    stage.vast.fault("PUT", ORDER, drop="before")
    assert_ended(stage, stage.start("--yes"), TERM)
    assert stage.vast.destroyed == []


def giving_back_fails_after_a_signal(stage: Scene) -> None:
    stage.workers_say("loading")
    stage.vast.add_offer(fate="refuses_destroy")
    run = start_and_wait_for(stage, " $: loading")
    strike(stage, INT, group=True)(None)
    run.wait(300)
    assert (run.status, stage.billed()) == (130, {stage.only().id: "running"})
    assert ids_named(run) == {stage.only().id}


@pytest.mark.long
@pytest.mark.timeout(600)
@plays(fruit_that_comes_when_nobody_waits_for_it, late_fruit_of_a_lost_order,
       late_fruit_after_a_signal, lost_reply_and_a_list_that_lags,
       lost_order_and_a_signal, giving_back_fails_after_a_signal)
def test_what_comes_late_is_found_and_what_stays_is_named(act: Act, acts: Acts) -> None:
    acts.end_of(act)


def pair(seed: int) -> Act:
    """A second start at a random moment of the first."""
    def act(stage: Scene) -> None:
        draw = random.Random(seed)
        offset = draw.uniform(0.0, 6.0)
        slow_orders(stage, draw.choice((0.0, 2.0)))
        stage.vast.rate_violations = lambda: []  # type: ignore[method-assign]
        for i, fate in enumerate((draw.choice(("healthy", "exited")), "healthy", "healthy")):
            stage.vast.add_offer(fate=fate, dph_base=0.06 + i / 100)
        stage.remark = f"seed {seed}: the second after {offset:.2f} s"
        runs = [launch_at_once(stage)]
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + offset, "second one's moment")
        runs.append(launch_at_once(stage))
        statuses = {run.wait(300).status for run in runs}
        assert 0 in statuses and stage.billed() == {stage.only().id: "running"}
        answers = {run.stdout for run in runs if run.status == 0}
        assert answers == {f"{stage.only().worker_url}\n"}
    act.__name__ = f"pair_{seed}"
    return act


def launch_at_once(stage: Scene) -> Run:
    """Without the pause that one person's runs have between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.manager, "keep_vasts_pause", lambda: None)
        return stage.launch("--yes")


@pytest.mark.long
@pytest.mark.timeout(900)
@plays(*(pair(seed) for seed in range(16)))
def test_two_starts_rent_one_whatever_their_distance(act: Act, acts: Acts) -> None:
    acts.end_of(act)


def instant(seed: int) -> Act:
    """One or two signals at random instants of a random story.

    An instant is so many requests after the beginning, and then some time: where it falls in the
    story does not depend on how fast the machine is.
    """
    def act(stage: Scene) -> None:
        draw = random.Random(seed)
        story = STORIES[seed % len(STORIES)]
        before = story(stage)
        after = [draw.randint(2, 13)]
        if draw.random() < 0.4:
            after.append(after[0] + draw.randint(0, 3))
        blows = [(count, draw.choice((0.0, 0.2, 0.7, 1.5)) * draw.random(),
                  draw.choice((HUP, INT, TERM)), draw.random() < 0.5) for count in after]
        stage.remark = f"seed {seed}, {story.__name__}: {blows}"
        run = stage.launch("--replace", "--yes", "--timeout", "10")
        for count, seconds, number, group in blows:
            wait_for_instant(stage, run, count, seconds)
            if run.process.poll() is None:
                strike(stage, number, group)(None)
        run.wait(300)
        played.append(stage)
        assert_accounted(stage, run, before)
    act.__name__ = f"instant_{seed}"
    return act


played: list[Scene] = []  # of which the signal, if any, came and the run has ended


def wait_for_instant(stage: Scene, run: Run, count: int, seconds: float) -> None:
    """Returns so many seconds after so many requests, or at the run's end."""
    def has_ended() -> bool:
        return run.process.poll() is not None
    wait_until(lambda: len(stage.vast.requests) >= count or has_ended(), "request", 300)
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > until or has_ended(), "instant")


def assert_accounted(stage: Scene, run: Run, before: dict[int, str]) -> None:
    """What is billed was so before, or is the worker whose address was told, or is named."""
    for number, state in stage.billed().items():
        told = run.stdout == f"{stage.vast.instances[number].worker_url}\n" \
            if state == "running" else False
        assert before.get(number) == state or told or number in ids_named(run), number
    assert run.status in (0, 1, 4, 6, 129, 130, 143, -HUP, -INT, -TERM)  # < 0: before any trap
    assert (run.status == 0) <= bool(run.stdout)


def fresh_story(stage: Scene) -> dict[int, str]:
    stage.vast.loading = 1.0
    stage.vast.add_offer(fate="exited")
    stage.vast.add_offer(dph_base=0.07)
    return {}


def slow_story(stage: Scene) -> dict[int, str]:
    """The order takes a second before and after its effect, and the row is bare at first."""
    slow_orders(stage, 1.0)
    stage.workers_say("loading")
    stage.vast.add_offer()
    stage.vast.add_offer(dph_base=0.07)
    return {}


def slow_orders(stage: Scene, seconds: float) -> None:
    stage.vast.null_rows, stage.vast.provisioning = True, seconds
    stage.vast.fault("PUT", ORDER, delay=seconds, times=6)
    stage.vast.on("PUT", ORDER, lambda request: stage.vast.closing.wait(seconds), when="after",
                  times=6)


def sleeping_story(stage: Scene) -> dict[int, str]:
    stage.vast.loading = 2.0
    stage.vast.fault("PUT", ANY_ID, delay=1.0)
    return {stage.vast.add_instance(state="stopped").id: "stopped"}


def running_story(stage: Scene) -> dict[int, str]:
    stage.workers_say("loading")
    return {stage.vast.add_instance().id: "running"}


def replacing_story(stage: Scene) -> dict[int, str]:
    old = stage.vast.add_instance(state="stopped", fate="gpu_taken")
    stage.vast.add_offer()
    return {old.id: "stopped"}


def lost_story(stage: Scene) -> dict[int, str]:
    stage.vast.fault("PUT", ORDER, drop="after")
    stage.vast.add_offer()
    return {}


STORIES = (fresh_story, slow_story, lost_story, replacing_story, fresh_story, slow_story,
           sleeping_story, fresh_story, replacing_story, running_story)
INSTANTS = 100


@pytest.mark.long
@pytest.mark.timeout(900)
@plays(*(instant(seed) for seed in range(INSTANTS)))
def test_at_any_instant_a_signal_leaves_nothing_unnoticed(act: Act, acts: Acts) -> None:
    acts.end_of(act)


@pytest.mark.long
def test_the_instants_are_in_all_parts_of_the_story() -> None:
    if len(played) < INSTANTS:
        pytest.skip("not all of them were played")
    runs = [stage.manager.runs[-1] for stage in played]
    assert sum(run.status in (129, 130, 143) for run in runs) > INSTANTS / 2
    assert sum(bool(stage.orders()) for stage in played) > INSTANTS / 3
    assert sum(bool(stage.vast.destroyed) for stage in played) > INSTANTS / 4
    assert sum(run.status == 0 for run in runs) > 1
