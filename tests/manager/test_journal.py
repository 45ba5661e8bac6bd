"""The journal of orders: what stands in it, what it is for, that nothing is ordered without it."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import clean_environment, wait_until
from fake_vast import Request
from manager import sourcing
from renting import Act, Acts, Scene, acts_of, plays

ORDER = "/asks/"


@pytest.fixture(scope="module")
def acts(request: pytest.FixtureRequest,
         tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acts]:
    with acts_of(request, tmp_path_factory.mktemp("acts")) as playing:
        yield playing


def journal(stage: Scene) -> Path:
    return stage.manager.home / "state/bark-worker/orders.log"


def lines(stage: Scene) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal(stage).read_text().splitlines()]


def events(stage: Scene) -> list[str]:
    return [line["event"] for line in lines(stage)]


# What stands in it


def order_and_answer(stage: Scene) -> None:
    """The one before the other; in a file and a folder for their owner alone."""
    offer = stage.vast.add_offer(machine_id=777)
    before: list[list[str]] = []
    stage.vast.on("PUT", ORDER, lambda request: before.append(events(stage)))
    assert stage.start("--yes").status == 0
    worker = stage.only()
    assert before == [["order"]] and events(stage) == ["order", "rented", "ready"]
    order, rented, _ = lines(stage)
    assert (order["offer"], order["machine"], order["label"]) == (offer, 777, "bark-worker")
    assert order["price"] == pytest.approx(0.06 + 0.15 * 50 / 720)
    assert abs(time.time() - time.mktime(time.strptime(order["time"], "%Y-%m-%dT%H:%M:%SZ"))
               + time.timezone) < 60
    assert "id" not in order and rented == {**order, "time": rented["time"], "event": "rented",
                                            "id": worker.id}
    file = journal(stage)
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    text = file.read_text()
    assert [key for key in (worker.key, *stage.vast.secrets) if str(key) in text] == []
    stage.launch("--yes", command="destroy").wait()
    assert events(stage)[3:] == ["destroyed"] and lines(stage)[3]["id"] == worker.id


def refused_and_vanished(stage: Scene) -> None:
    stage.vast.add_offer()
    stage.vast.fault("PUT", ORDER, status=200, body={"success": False, "msg": "not now"})
    assert stage.start("--yes").status == 4
    assert events(stage) == ["order", "refused"]


def sleeping_and_waking(stage: Scene) -> None:
    """Waking costs money as renting does; what does not get healthy is noted as asleep again."""
    instance = stage.vast.add_instance(state="stopped")
    assert stage.start().status == 0
    stage.launch(command="stop").wait()
    stage.workers_say("failed", error="no weights here")
    assert stage.start().status == 1
    assert events(stage) == ["wake", "ready", "stopped", "wake", "stopped"]
    assert {line["id"] for line in lines(stage)} == {instance.id}


@plays(order_and_answer, refused_and_vanished, sleeping_and_waking)
def test_a_line_stands_there_before_each_order_and_after_each_answer(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# Without it


def a_file_for_a_folder(stage: Scene) -> None:
    folder = journal(stage).parent
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("")
    no_order_but_an_end(stage)


def a_pipe(stage: Scene) -> None:
    """Which nobody reads, so that whoever opened it would wait."""
    journal(stage).parent.mkdir(parents=True)
    os.mkfifo(journal(stage))
    no_order_but_an_end(stage)


def a_link_to_what_is_no_file(stage: Scene) -> None:
    journal(stage).parent.mkdir(parents=True)
    journal(stage).symlink_to("/dev/null")
    no_order_but_an_end(stage)


def no_order_but_an_end(stage: Scene) -> None:
    stage.vast.add_offer()
    done = stage.start("--yes")
    assert (done.status, done.stdout, stage.changes()) == (3, "", [])
    assert f"the journal {journal(stage)} cannot be written" in done.stderr
    assert "XDG_STATE_HOME" in done.stderr and "nothing is rented" in done.stderr
    asleep = stage.vast.add_instance(state="stopped")
    assert stage.start().status == 3 and stage.billed() == {asleep.id: "stopped"}
    assert stage.launch("--yes", command="destroy").wait().status == 0 and stage.billed() == {}


def gone_while_it_is_rented(stage: Scene) -> None:
    """Giving back never needs it."""
    stage.vast.add_offer(fate="exited")

    def lose(request: Request) -> None:
        journal(stage).unlink()
        journal(stage).mkdir()
    stage.vast.on("PUT", ORDER, lose)
    done = stage.start("--yes")
    assert (done.status, stage.billed(), len(stage.vast.destroyed)) == (4, {}, 1)


@plays(a_file_for_a_folder, a_pipe, a_link_to_what_is_no_file, gone_while_it_is_rented)
def test_nothing_is_ordered_whose_line_cannot_be_written(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# What it is read for


def power_cut(stage: Scene) -> None:
    """While it waits for the worker; a later start takes the instance over, which ends it."""
    stage.vast.add_offer()
    stage.workers_say("loading")
    run = stage.launch("--yes")
    wait_until(lambda: "is rented" in run.stderr, "instance")
    os.killpg(run.process.pid, signal.SIGKILL)
    run.wait()
    instance = stage.only()
    told = stage.launch(command="status").wait().stderr
    assert f"instance {instance.id} was ordered at 20" in told
    assert re.search(rf"this ends it: VAST_API_KEY=\S+.* destroy instance {instance.id} -y", told)
    assert "was ordered at" not in stage.launch(command="status", BARK_LABEL="o").wait().stderr
    stage.workers_say("ready")
    assert stage.start().status == 0
    assert stage.launch(command="status").wait().stderr == ""


def power_cut_during_the_order(stage: Scene) -> None:
    """Vast has it, the journal no answer: the machine tells which it is, and else it is said."""
    stage.vast.add_offer()
    stage.vast.fault("PUT", ORDER, delay=60.0, effect=True)
    run = stage.launch("--yes")
    stage.vast.wait_for_call("PUT", ORDER)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.wait()
    assert events(stage) == ["order"]
    told = stage.launch(command="status").wait().stderr
    assert "the journal tells no answer" in told and "vastai show instances" in told
    machine = lines(stage)[0]["machine"]
    instance = stage.vast.add_instance(machine_id=machine, created=time.time())
    told = stage.launch(command="status").wait().stderr
    assert f"instance {instance.id} was ordered at" in told


def machine_that_failed(stage: Scene) -> None:
    """It is left out for a day, whatever its price, unless it is asked for."""
    stage.vast.add_offer(machine_id=66, fate="exited")
    stage.vast.add_offer(machine_id=66, dph_base=0.061)
    good = stage.vast.add_offer(dph_base=0.07)
    run = stage.start("--yes")
    assert run.status == 0 and stage.orders()[1:] == [good]  # not the other offer of that machine
    stage.launch("--yes", command="destroy").wait()
    bad = stage.vast.add_offer(machine_id=66)
    fair = stage.vast.add_offer(dph_base=0.1)
    assert bad not in stage.search() and stage.search()[-1] == fair
    assert bad in stage.search("--any-machine")
    stage.vast.offers.pop(fair)
    run = stage.start("--yes")
    assert (run.status, len(stage.orders())) == (4, 2)
    assert f"{bad}" in run.stderr and "to try these again: --any-machine" in run.stderr
    journal(stage).write_text(journal(stage).read_text().replace(
        time.strftime("%Y-", time.gmtime()), "2001-"))
    assert bad in stage.search()


def settings_are_no_fault_of_the_machine(stage: Scene) -> None:
    stage.vast.add_offer(machine_id=66)
    stage.workers_say("failed", error="bad", exit_status=2)
    assert stage.start("--yes").status == 4
    again = stage.vast.add_offer(machine_id=66)
    assert stage.search() == [again] and "failed" not in events(stage)


def interrupted_is_no_fault_of_the_machine(stage: Scene) -> None:
    stage.vast.add_offer(machine_id=66)
    stage.workers_say("loading")
    run = stage.launch("--yes")
    wait_until(lambda: "is rented" in run.stderr, "instance")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait().status == 130 and stage.billed() == {}
    again = stage.vast.add_offer(machine_id=66)
    assert stage.search() == [again] and events(stage) == ["order", "rented", "destroyed"]


@plays(power_cut, power_cut_during_the_order, machine_that_failed,
       settings_are_no_fault_of_the_machine, interrupted_is_no_fault_of_the_machine)
def test_it_tells_what_a_crash_left_and_which_machines_failed(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# Without an account


def shell(code: str, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {"XDG_STATE_HOME": str(folder), **settings}
    return subprocess.run(sourcing(code), capture_output=True, text=True, timeout=60,
                          env=clean_environment(**environment))


@pytest.mark.parametrize(("settings", "folder"), [
    ({"XDG_STATE_HOME": "/a b"}, "/a b/bark-worker"),
    ({"XDG_STATE_HOME": ""}, "/h/.local/state/bark-worker"),
    ({"XDG_STATE_HOME": "state"}, "/h/.local/state/bark-worker"),
    ({"XDG_STATE_HOME": "../x"}, "/h/.local/state/bark-worker"),
])
def test_it_lies_where_xdg_says(settings: dict[str, str], folder: str, tmp_path: Path) -> None:
    assert shell("state_folder", tmp_path, HOME="/h", **settings).stdout == f"{folder}\n"


def test_without_a_home_it_lies_in_this_users(tmp_path: Path) -> None:
    told = shell("unset HOME XDG_STATE_HOME; state_folder", tmp_path).stdout
    home = pwd.getpwuid(os.getuid()).pw_dir
    assert told == f"{home}/.local/state/bark-worker\n"


def test_lines_of_runs_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    code = 'for i in {1..8}; do (for j in 1 2 3; do note "order" "$i$j"; done) & done; wait'
    assert shell(code, tmp_path).returncode == 0
    found = [json.loads(line) for line in
             (tmp_path / "bark-worker/orders.log").read_text().splitlines()]
    assert sorted(line["id"] for line in found) == [
        10 * i + j for i in range(1, 9) for j in (1, 2, 3)]


def test_it_does_not_grow_without_end_and_is_read_with_what_was_put_aside(tmp_path: Path) -> None:
    file = tmp_path / "bark-worker/orders.log"
    file.parent.mkdir()
    old = '{"time": "2026-11-26T00:00:00Z", "event": "failed", "machine": 5}\n'
    file.write_text("x" * 300_000 + "\n" + old)
    done = shell("note order 7; journal 'map(.machine // .id) | tojson'", tmp_path)
    assert (done.returncode, done.stdout) == (0, "[5,7]\n")
    assert file.stat().st_size < 200 and (file.parent / "orders.log.old").stat().st_size > 300_000


def test_what_is_no_line_of_ours_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "bark-worker/orders.log"
    file.parent.mkdir()
    file.write_text('{"event": "failed"}\nnonsense\n[1]\n{"time": 7, "id": "x"}\n{"ti')
    code = ("for reading in open_orders failed_machines 'slept(7; true)'; do journal \"$reading"
            " | tojson\"; done; printf '\\0\\0' >>\"$(state_folder)/orders.log\"; note"
            " order 7; journal 'map(.id | numbers) | tojson'")
    done = shell(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n[]\n0\n[7]\n", "")


def test_only_what_is_its_own_fault_counts_against_a_machine(tmp_path: Path) -> None:
    faults = {"outcome=dead": "yes", "outcome=late": "yes", "outcome=late timeout=60": "no",
              "outcome=failed reason='the worker failed'": "yes",
              "outcome=failed reason='the worker failed' model=a/b": "no",
              "outcome=failed reason='instance 7: no CDI' model=a/b": "yes",
              "state=outbid wanted='' message=''; judge_state 7": "no",
              "state=exited wanted='' message=''; judge_state 7": "yes",
              **{f"outcome={other}": "no" for other in ("no-image", "settings", "dear", "taken")}}
    code = "".join(f"({one}; if is_fault_of_machine; then echo yes; else echo no; fi); "
                   for one in faults)
    assert shell(code, tmp_path).stdout.split() == list(faults.values())


HOUR = 3600


@pytest.mark.parametrize(("told", "sleeps", "hours"), [
    ([], "true", 0), ([("stopped", 5)], "true", 5), ([("stopped", 5)], "false", 0),
    ([("stopped", 9), ("wake", 6)], "false", 3), ([("stopped", 9), ("wake", 6)], "true", 3),
    ([("stopped", 9), ("wake", 6), ("ready", 5.9), ("stopped", 2)], "true", 5),
    ([("stopped", 9), ("stopped", 8)], "true", 9), ([("stopped", 99)], "true", 99),
])
def test_hours_asleep_cost_storage_alone(told: list[tuple[str, float]], sleeps: str, hours: float,
                                         tmp_path: Path) -> None:
    file = tmp_path / "bark-worker/orders.log"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({
        "event": event, "id": 7,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - ago * HOUR))}) + "\n"
        for event, ago in told))
    done = shell(f"journal 'slept(7; {sleeps})'", tmp_path)
    assert float(done.stdout) == pytest.approx(hours * HOUR, abs=30)
    row = {"state": "stopped", "price": 0.07, "storage": 0.01, "started": time.time() - 10 * HOUR}
    code = f"slept={hours * HOUR} facts 'visible.cost_at_most' <<<'{json.dumps([row, None])}'"
    assert float(shell(code, tmp_path).stdout) == pytest.approx(
        0.07 * max(10 - hours, 0) + 0.01 * min(hours, 10), abs=1e-3)
