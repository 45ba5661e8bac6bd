"""`start`: what it rents, wakes or leaves alone, and that nothing else is billed afterwards.

The real script and the real `vastai` against the fake API. All acts are played side by side, each
on an account of its own (see renting.py).
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest
from conftest import wait_until
from fake_vast import Request
from manager import Run, sourcing
from renting import Act, Acts, Scene, acts_of, drawn_out, ids_named, in_a_hurry, plays

IMAGE = "ghcr.io/darvondoom/libread-bark-tts:latest"
STORAGE = 0.15 * 50 / 720  # $/h that 50 GB of an ordinary offer cost
LIST, ORDER, ANY_ID = "/api/v1/instances/", "/asks/", r"/instances/\d+/"


@pytest.fixture(scope="module")
def acts(request: pytest.FixtureRequest,
         tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acts]:
    with acts_of(request, tmp_path_factory.mktemp("acts")) as playing:
        yield playing


def assert_rented(stage: Scene, run: Run, *offers: int) -> None:
    """It ordered these in turn, and the last one's instance is all that is billed."""
    assert (run.status, stage.orders()) == (0, list(offers))
    assert stage.only().offer["id"] == offers[-1]
    assert stage.billed() == {stage.only().id: "running"}
    assert run.stdout == f"{stage.only().worker_url}\n"


def assert_gave_up(stage: Scene, run: Run, status: int, *words: str) -> None:
    """It said why, and nothing that it rented is billed."""
    assert (run.status, run.stdout, stage.billed()) == (status, "", {})
    assert [word for word in words if word not in run.stderr] == []
    assert ids_named(run) == set()


# What is ordered


def plain_order(stage: Scene) -> None:
    """The dearer GPU has the cheaper storage, which counts."""
    stage.vast.add_offer(dph_base=0.05, storage_cost=0.6)
    best = stage.vast.add_offer(dph_base=0.06)
    run = stage.start("--yes")
    assert_rented(stage, run, best)
    assert re.fullmatch(r"[0-9a-f]{48}", stage.only().key or "")
    assert_body(stage, {"-p 8080:8080": "1", "BARK_API_KEY": stage.only().key,
                        "HF_HOME": "/workspace/models", "BARK_IDLE_STOP": "30",
                        "BARK_START_LIMIT": "60"})
    assert "0.0704 $/h (1.69 $ a day)" in run.stderr


def order_with_every_option(stage: Scene) -> None:
    best = stage.vast.add_offer(geolocation="France, FR", gpu_name="RTX 3060 Ti")
    stage.vast.add_offer(dph_base=0.01, min_bid=0.01)
    run = stage.start(
        "--interruptible", "--gpu=rtx_3060_ti", "--region", "EU", "--image", "ghcr.io/me/bark:9",
        "--disk=40", "--model", "suno/bark-small", "--voice", "female", "--listen", "base",
        "--timeout", "60", "--yes", TTS_MAX_LENGTH="900", BARK_MAX_BATCH="3", BARK_SECRET="never")
    assert_rented(stage, run, best)
    env = {"-p 8080:8080": "1", "BARK_API_KEY": stage.only().key, "HF_HOME": "/workspace/models",
           "BARK_MODEL": "suno/bark-small", "BARK_VOICE": "female", "BARK_LISTEN": "base",
           "TTS_MAX_LENGTH": "900", "BARK_MAX_BATCH": "3", "BARK_IDLE_STOP": "30",
           "BARK_START_LIMIT": "60"}
    assert_body(stage, env, image="ghcr.io/me/bark:9", disk=40.0, price=0.0375)


def assert_body(stage: Scene, env: dict[str, str | None], **different: object) -> None:
    """The one order is this to the last field; the CLI sends what is null or false."""
    (order,) = stage.vast.calls("PUT", ORDER)
    on_start = subprocess.run(sourcing('printf "%s" "$ON_START"'), capture_output=True, text=True,
                              check=True).stdout
    assert "/app/bark-worker.py" in on_start and ">/proc/1/fd/1" in on_start
    unset = ("extra", "image_login", "jupyter_dir", "price", "template_hash_id")
    off = ("force", "lang_utf8", "python_utf8", "use_jupyter_lab")
    assert order.body == {
        **dict.fromkeys(unset), **dict.fromkeys(off, False), "client_id": "me", "image": IMAGE,
        "disk": 50.0, "label": "bark-worker", "runtype": "ssh_direc ssh_proxy", "user": "root",
        "cancel_unavail": True, "onstart": on_start, "env": env, **different}


def order_with_a_bid(stage: Scene) -> None:
    """Whoever asks more than the bid is left out, and so is what comes too dear with it."""
    stage.vast.add_offer(min_bid=0.06, storage_cost=0.0)
    stage.vast.add_offer(min_bid=0.01, storage_cost=1.0)
    offers = [stage.vast.add_offer(fate="outbid"), stage.vast.add_offer(storage_cost=0.16)]
    options = ("--interruptible", "--bid", "0.05", "--max-price", "0.1")
    assert stage.search(*options) == offers
    run = stage.start(*options, "--yes")
    assert_rented(stage, run, *offers)
    assert stage.only().price == 0.05
    assert "interruptible, bid 0.05 $/h" in run.stderr and "is outbid" in run.stderr
    assert f"{0.05 + STORAGE:.4f} $/h" in run.stderr


def order_that_takes_its_time(stage: Scene) -> None:
    """Rows without facts, a pull, ports that come late, a download: each is shown."""
    vast = stage.vast
    vast.null_rows = True
    vast.provisioning = vast.loading = vast.late_ports = math.inf
    stage.workers_say("loading", progress={"bytes_done": 43, "bytes_total": 100})
    offer = vast.add_offer()
    run = stage.launch("--yes")
    for words, knob in (("provisioning", "provisioning"), ("loading: Pulling from", "loading"),
                        ("the worker does not answer yet", "late_ports")):
        wait_until(lambda words=words: words in run.stderr, words)
        setattr(vast, knob, 0.0)
    wait_until(lambda: "loading 43 %" in run.stderr, "progress")
    assert run.stdout == ""
    stage.workers_say("ready")
    assert_rented(stage, run.wait(), offer)


@plays(plain_order, order_with_every_option, order_with_a_bid, order_that_takes_its_time)
def test_the_cheapest_offer_is_rented_and_ordered_to_the_last_field(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# What is asked before


def no_terminal(stage: Scene) -> None:
    stage.vast.add_offer()
    assert_gave_up(stage, stage.start(), 2, "--yes")
    assert stage.changes() == []


def terminal_and_no(stage: Scene) -> None:
    stage.vast.add_offer()
    for text in ("n\n", "\n", "\x04"):
        run = stage.typed(text)
        assert_gave_up(stage, run, 1, "nothing is rented")
        assert run.stderr.count("[y/N]") == 1
    assert stage.changes() == []


def terminal_and_yes(stage: Scene) -> None:
    """The one yes is for the next offer, too, as the price of the first rises with the order."""
    offers = [stage.vast.add_offer(), stage.vast.add_offer(dph_base=0.07)]
    stage.vast.on("PUT", ORDER, lambda request: stage.only().offer.update(dph_base=0.5),
                  when="after")
    run = stage.typed("y\n")
    assert_rented(stage, run, *offers)
    assert run.stderr.count("[y/N]") == 1
    assert run.stderr.index("credit 12.34 $, which lasts 7.3 days at") < run.stderr.index("[y/N]")
    assert "more than --max-price 0.20" in run.stderr


def dry_runs(stage: Scene) -> None:
    offer = stage.vast.add_offer()
    done = stage.start("--dry-run")
    assert (done.status, done.stderr) == (0, "credit 12.34 $, which lasts 7.3 days at 0.0704 $/h\n"
                                          "dry run: nothing is rented\n")
    assert done.stdout.startswith(
        f"offer {offer}: RTX 3060, 12 GB, Sweden, SE: 0.0704 $/h (1.69 $ a day)\n")
    assert "of it storage: 0.0104 $/h" in done.stdout
    sleeping = stage.vast.add_instance(state="stopped")
    done = stage.start("--dry-run", "--yes")
    assert done.status == 0
    assert f"instance {sleeping.id} is stopped" in done.stderr
    assert (stage.changes(), stage.billed()) == ([], {sleeping.id: "stopped"})


@plays(no_terminal, terminal_and_no, terminal_and_yes, dry_runs)
def test_nothing_is_rented_without_a_yes(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# Which offers count


DEFECTS = {
    "unverified": {"verified": False}, "unreliable": {"reliability": 0.94},
    "at the limit of reliability": {"reliability": 0.95}, "little memory": {"gpu_ram": 6144},
    "dear": {"dph_base": 0.195}, "small disk": {"disk_space": 40.0},
    "slow download": {"inet_down": 150.0}, "old driver": {"cuda_max_good": 12.4},
    "too new a card": {"compute_cap": 1200}, "another processor": {"cpu_arch": "arm64"},
    "two GPUs": {"num_gpus": 2}, "no open port": {"direct_port_count": 0},
    "rented": {"rentable": False}, "from outside": {"external": True},
    "not a card we know": {"gpu_name": "RTX 4090"},
}


def offers_that_search_shows(stage: Scene) -> None:
    ids = {name: stage.vast.add_offer(**fields) for name, fields in DEFECTS.items()}
    fair = stage.vast.add_offer(dph_base=0.15, geolocation="Germany, DE", min_bid=0.15)
    best = stage.vast.add_offer(dph_base=0.07, gpu_ram=8192, reliability=0.96, min_bid=0.15)
    assert stage.search() == [best, fair]
    assert stage.search("--region", "EU,US") == [best, fair]
    assert stage.search("--region=de") == [fair]
    assert stage.search("--min-vram", "12") == [fair]
    assert stage.search("--disk", "8", "--max-price=0.18")[-1] == fair
    wide = stage.search("--gpu", "any", "--max-price", "0.3", "--min-reliability", "0.9",
                        "--min-vram", "6", "--disk", "40")
    let_in = ("unreliable", "at the limit of reliability", "little memory", "dear", "small disk",
              "not a card we know")
    assert set(wide) == {best, fair, *(ids[name] for name in let_in)}


def offers_for_other_wishes(stage: Scene) -> None:
    """An image built for CUDA 13 runs on newer cards and wants newer drivers."""
    new = stage.vast.add_offer(compute_cap=1200, cuda_max_good=13.0, gpu_name="RTX 5060",
                               min_bid=0.5)
    old = stage.vast.add_offer(min_bid=0.02)
    assert stage.search("--gpu", "any") == [old]
    assert stage.search("--gpu", "5060", "--image", "ghcr.io/me/bark:cu130") == [new]
    assert stage.search("--interruptible") == [old]
    assert stage.launch("--interruptible", "--bid", "0.01", command="search").wait().status == 4


def no_offer_that_fits(stage: Scene) -> None:
    """Each advice, followed, finds what it promised."""
    near = {"--max-price": stage.vast.add_offer(dph_base=0.3),
            "--min-vram": stage.vast.add_offer(gpu_ram=6144, dph_base=0.1),
            "--gpu": stage.vast.add_offer(gpu_name="RTX 4090", dph_base=0.15),
            "--region": stage.vast.add_offer(geolocation="Peru, PE", dph_base=0.11),
            "--min-reliability": stage.vast.add_offer(reliability=0.9, dph_base=0.12)}
    stage.vast.add_offer(verified=False)
    run = stage.start("--yes", "--region", "SE")
    assert_gave_up(stage, run, 4, "No suitable GPU found", "nothing is rented")
    advice = re.findall(r"^  with (--\S+ (?:'[^']+'|\S+)): .*: (\S+) [$]/h", run.stderr, re.M)
    assert {words.split()[0] for words, _ in advice} == near.keys()
    for words, price in advice:
        option = shlex.split(words)
        offer = stage.vast.offers[near[option[0]]]
        assert float(price) == pytest.approx(offer["dph_base"] + STORAGE, abs=1e-4)
        assert stage.search("--region", "SE", *option) == [near[option[0]]]
    assert stage.changes() == []


def no_offer_near_by(stage: Scene) -> None:
    """Where one option alone lets nothing in, the nearest offer tells which together do."""
    run = stage.start("--yes")
    assert_gave_up(stage, run, 4, "No suitable GPU found")
    assert "nearest" not in run.stderr
    far = stage.vast.add_offer(dph_base=0.3, gpu_ram=6144)
    run = stage.start("--yes")
    assert_gave_up(stage, run, 4, "RTX 3060, 6 GB, Sweden, SE: 0.3104 $/h (7.45 $ a day)")
    assert "the nearest: --max-price 0.32 --min-vram 6:" in run.stderr
    assert stage.search("--max-price", "0.32", "--min-vram", "6") == [far]
    assert stage.changes() == []


@plays(offers_that_search_shows, offers_for_other_wishes, no_offer_that_fits, no_offer_near_by)
def test_the_offers_shown_suit_and_the_options_widen_them(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# What is there already


def running_one(stage: Scene) -> None:
    instance = stage.vast.add_instance()
    stage.vast.add_offer()
    run = stage.start()
    assert (run.status, run.stdout) == (0, f"{instance.worker_url}\n")
    assert "it keeps what it was rented with" not in run.stderr
    run = stage.start("--gpu", "3060", "--interruptible", BARK_MAX_BATCH="2", BARK_LISTEN="tiny")
    assert (run.status, run.stdout) == (0, f"{instance.worker_url}\n")
    assert "a new one with --gpu, --interruptible, BARK_LISTEN, BARK_MAX_BATCH, destroy it first" \
        in run.stderr
    assert (stage.changes(), stage.billed()) == ([], {instance.id: "running"})


def running_one_that_never_answers(stage: Scene) -> None:
    instance = stage.vast.add_instance(fate="silent")
    run = stage.start("--timeout", "2", "--yes")
    assert (run.status, run.stdout) == (6, "")
    assert f"instance {instance.id} is left as it is" in run.stderr
    assert (stage.changes(), stage.billed()) == ([], {instance.id: "running"})


def running_one_whose_worker_failed(stage: Scene) -> None:
    instance = stage.vast.add_instance()
    stage.workers_say("failed", error="no weights here")
    run = stage.start("--yes")
    assert (run.status, run.stdout) == (1, "")
    assert "no weights here" in run.stderr
    assert (stage.changes(), stage.billed()) == ([], {instance.id: "running"})


def running_one_that_goes_offline(stage: Scene) -> None:
    """While `start` waits for it."""
    instance = stage.vast.add_instance(fate="silent")
    stage.vast.on("GET", LIST, lambda request: instance.go_offline(), when="after")
    run = stage.start("--yes")
    assert (run.status, run.stdout) == (1, "")
    assert "is offline" in run.stderr and "is left as it is, and billed" in run.stderr
    assert (stage.changes(), stage.billed()) == ([], {instance.id: "running"})


def running_one_that_is_outbid(stage: Scene) -> None:
    """The command that `start` names brings it back, at once."""
    instance = stage.vast.add_instance(price=0.05)
    instance.outbid()
    run = stage.start("--yes")
    assert (run.status, run.stdout, stage.changes()) == (4, "", [])
    advice = re.search(r"VAST_API_KEY=.* change bid [0-9]+", run.stderr)
    assert advice and "start --replace" in run.stderr
    assert re.search(rf"storage is billed; to end that: .*destroy {instance.id}\n", run.stderr)
    subprocess.run(["sh", "-c", advice[0]], check=True, capture_output=True, timeout=30,
                   env=stage.manager.environment(PATH=stage.path))
    assert stage.start().stdout == f"{instance.worker_url}\n"
    assert (instance.touched, stage.orders()) == (["bid"], [])


def one_of_many(stage: Scene) -> None:
    """Vast lists 25 at a time; the one that runs is the last."""
    sleeping = [stage.vast.add_instance(state="stopped").id for _ in range(27)]
    instance = stage.vast.add_instance()
    run = stage.start()
    assert (run.status, run.stdout) == (0, f"{instance.worker_url}\n")
    assert stage.changes() == []
    assert stage.billed() == {**dict.fromkeys(sleeping, "stopped"), instance.id: "running"}


def stopped_one(stage: Scene) -> None:
    instance = stage.vast.add_instance(state="stopped")
    stage.vast.add_offer()
    run = stage.start("--model=suno/bark-small")
    assert "a new one with --model, destroy it first" in run.stderr
    assert (run.status, run.stdout) == (0, f"{instance.worker_url}\n")
    assert (instance.touched, stage.orders()) == (["running"], [])
    assert stage.billed() == {instance.id: "running"}


def stopped_one_whose_worker_fails(stage: Scene) -> None:
    instance = stage.vast.add_instance(state="stopped")
    stage.workers_say("failed", error="no weights here")
    run = stage.start()
    assert (run.status, run.stdout) == (1, "")
    assert "start --replace" in run.stderr and "no weights here" in run.stderr
    assert instance.touched == ["running", "stopped"]
    assert stage.billed() == {instance.id: "stopped"}


def stopped_one_whose_gpu_is_taken(stage: Scene) -> None:
    instance = stage.vast.add_instance(state="stopped", fate="gpu_taken")
    stage.vast.add_offer()
    run = stage.start("--timeout", "3", "--yes")
    assert (run.status, run.stdout) == (4, "")
    assert "start --replace" in run.stderr and ids_named(run) == set()
    assert (instance.touched, stage.orders()) == (["running", "stopped"], [])
    assert stage.billed() == {instance.id: "stopped"}


def stopped_one_that_vast_does_not_start(stage: Scene) -> None:
    instance = stage.vast.add_instance(state="stopped")
    stage.vast.fault("PUT", ANY_ID, status=400, body={"success": False, "msg": "no such host"})
    run = stage.start()
    assert (run.status, run.stdout) == (4, "")
    assert "no such host" in run.stderr
    assert stage.billed() == {instance.id: "stopped"}


@plays(running_one, running_one_that_never_answers, running_one_whose_worker_failed,
       running_one_that_goes_offline, running_one_that_is_outbid, one_of_many, stopped_one,
       stopped_one_whose_worker_fails, stopped_one_whose_gpu_is_taken,
       stopped_one_that_vast_does_not_start)
def test_what_runs_stays_and_what_sleeps_is_woken_or_sleeps_again(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# --replace


@drawn_out
def replacement(stage: Scene) -> None:
    """The old one goes when a new one's worker is ready, and not before."""
    old = stage.vast.add_instance(state="stopped", fate="gpu_taken")
    offers = [stage.vast.add_offer(), stage.vast.add_offer(dph_base=0.07)]
    stage.workers_say("failed", error="no weights here")
    stage.vast.on("DELETE", ANY_ID, lambda request: stage.workers_say("ready"))
    healths = []

    def ask_the_new(request: Request) -> None:
        (new,) = [one for one in stage.vast.instances.values() if one is not old]
        with urllib.request.urlopen(f"{new.worker_url}/health") as reply:
            healths.append(json.load(reply)["status"])

    stage.vast.on("DELETE", f"/{old.id}/", ask_the_new, when="after")
    run = stage.start("--replace", "--timeout", "15", "--yes", BARK_POLL="5")
    assert_rented(stage, run, *offers)
    assert (healths, stage.vast.destroyed[1:]) == (["ready"], [old.id])
    assert "the worker failed: no weights here" in run.stderr


def replacement_that_fails(stage: Scene) -> None:
    old = stage.vast.add_instance(state="stopped", fate="gpu_taken")
    stage.vast.add_offer(fate="exited")
    run = stage.start("--replace", "--timeout", "3", "--yes")
    assert (run.status, run.stdout) == (4, "")
    assert f"instance {old.id} is kept as it was" in run.stderr
    assert stage.billed() == {old.id: "stopped"}


def replacement_that_nobody_agreed_to(stage: Scene) -> None:
    old = stage.vast.add_instance(state="stopped", fate="gpu_taken")
    stage.vast.add_offer()
    run = stage.start("--replace", "--timeout", "3")
    assert (run.status, run.stdout, stage.orders()) == (2, "", [])
    assert stage.billed() == {old.id: "stopped"}


def replacement_of_a_dead_one(stage: Scene) -> None:
    """One that cannot be woken is not touched without --replace."""
    old = stage.vast.add_instance(fate="offline")
    offer = stage.vast.add_offer()
    run = stage.start("--yes")
    assert (run.status, run.stdout, stage.changes()) == (4, "", [])
    assert "offline" in run.stderr and "start --replace" in run.stderr
    assert_rented(stage, stage.start("--yes", "--replace"), offer)
    assert stage.vast.destroyed == [old.id]


@pytest.mark.long
@plays(replacement, replacement_that_fails, replacement_that_nobody_agreed_to,
       replacement_of_a_dead_one)
def test_replace_rents_another_and_destroys_the_old_one_after_that(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# What fails


@drawn_out
def three_that_fail(stage: Scene) -> None:
    fates = ("error: OCI runtime create failed", "unknown", "offline", "healthy")
    offers = [stage.vast.add_offer(fate=fate, dph_base=0.06 + i / 100)
              for i, fate in enumerate(fates)]
    run = stage.start("--yes")
    assert_gave_up(stage, run, 4, "OCI runtime create failed", "is unknown", "is offline",
                   "3 tried", "nothing is rented")
    assert stage.orders() == offers[:3]
    assert len(stage.vast.destroyed) == 3


@drawn_out
def one_that_is_stuck_before_a_healthy_one(stage: Scene) -> None:
    offers = [stage.vast.add_offer(fate="stuck"), stage.vast.add_offer(dph_base=0.07)]
    run = stage.start("--yes", "--timeout", "15", BARK_POLL="5")
    assert_rented(stage, run, *offers)
    assert "not healthy within 15 s: loading: Pulling" in run.stderr


def worker_that_fails_before_a_healthy_one(stage: Scene) -> None:
    """Its word is enough: nobody waits for the timeout."""
    offers = [stage.vast.add_offer(), stage.vast.add_offer(dph_base=0.07)]
    stage.workers_say("failed", error="no weights here")
    stage.vast.on("DELETE", ANY_ID, lambda request: stage.workers_say("ready"))
    run = stage.start("--yes")
    assert_rented(stage, run, *offers)
    assert "the worker failed: no weights here" in run.stderr


def nothing_ready_in_time(stage: Scene) -> None:
    """What counts for the exit status is the last one."""
    stage.vast.add_offer(fate="exited")
    stage.vast.add_offer(fate="silent", dph_base=0.07)
    assert_gave_up(stage, stage.start("--yes", "--timeout", "2"), 6, "nothing is rented")
    assert len(stage.vast.destroyed) == 2


def image_that_is_not_there(stage: Scene) -> None:
    """No host can have it, so the next one is not tried."""
    offers = [stage.vast.add_offer(fate="error: Error response from daemon: manifest for x unknown:"
                                   " manifest unknown"), stage.vast.add_offer(dph_base=0.07)]
    assert_gave_up(stage, stage.start("--yes"), 4, f"the image {IMAGE} cannot be pulled")
    assert stage.orders() == offers[:1]


@drawn_out
def instance_of_which_nobody_knows(stage: Scene) -> None:
    """It is destroyed, but Vast never lists anything again."""
    stage.vast.add_offer(fate="offline")
    stage.vast.add_offer(dph_base=0.07)
    stage.vast.on("DELETE", ANY_ID, lambda request: stage.vast.fault(
        "GET", LIST, times=math.inf, status=500), when="after")
    run = in_a_hurry(stage, "--yes").wait()
    assert (run.status, run.stdout, stage.billed(), len(stage.orders())) == (4, "", {}, 1)
    assert run.stderr.splitlines()[-1].endswith("VAST_API_KEY=${VASTAI_API_KEY:?your key of Vast}"
                                                " vastai destroy instance"
                                                f" {stage.vast.destroyed[0]} -y")
    assert run.stderr.count("may still be billed") == 1


@plays(three_that_fail, one_that_is_stuck_before_a_healthy_one,
       instance_of_which_nobody_knows, worker_that_fails_before_a_healthy_one,
       nothing_ready_in_time, image_that_is_not_there)
def test_what_fails_is_destroyed_before_the_next_is_tried(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# What Vast refuses, and what the net loses


def wrong_key(stage: Scene) -> None:
    stage.vast.add_offer()
    run = stage.start("--yes", VASTAI_API_KEY="wrong")
    assert_gave_up(stage, run, 4, "Invalid user key", "VASTAI_API_KEY")
    assert (stage.changes(), len(stage.vast.calls("GET", LIST))) == ([], 1)


def key_that_may_not_rent(stage: Scene) -> None:
    stage.vast.add_offer()
    stage.vast.add_offer()
    stage.vast.fault("PUT", ORDER, status=403, times=math.inf,
                     body={"success": False, "error": "forbidden", "msg": "not permitted"})
    assert_gave_up(stage, stage.start("--yes"), 4, "not permitted", "instance_write")
    assert len(stage.orders()) == 1


def offer_that_vanishes(stage: Scene) -> None:
    gone, there = stage.vast.add_offer(), stage.vast.add_offer(dph_base=0.07)
    stage.vast.on("POST", "/bundles/", lambda request: stage.vast.offers.pop(gone), when="after")
    run = stage.start("--yes")
    assert_rented(stage, run, gone, there)
    assert f"offer {gone} is gone" in run.stderr


def offers_that_all_vanish(stage: Scene) -> None:
    offers = [stage.vast.add_offer(), stage.vast.add_offer(dph_base=0.07)]
    stage.vast.on("POST", "/bundles/", lambda request: stage.vast.offers.clear(), when="after")
    run = stage.start("--yes")
    assert_gave_up(stage, run, 4, "no offer could be had", "nothing is rented")
    assert stage.orders() == offers


@drawn_out
def requests_too_many(stage: Scene) -> None:
    """429 for a look, a search and an order, the last as text: each is asked again."""
    offer = stage.vast.add_offer()
    busy = {"status": 429, "headers": {"Retry-After": "2"}}
    stage.vast.fault("GET", LIST, **busy)
    stage.vast.fault("POST", "/bundles/", **busy)
    stage.vast.fault("PUT", ORDER, **busy, body="API requests too frequent")
    assert_rented(stage, stage.start("--yes"), offer, offer)


def searches_used_up(stage: Scene) -> None:
    """Waiting some seconds cannot help against a quota of a day."""
    stage.vast.fault("POST", "/bundles/", status=429, times=math.inf,
                     headers={"X-RateLimit-Reset": "1900000000"},
                     body={"success": False, "error": "search_quota_exceeded", "msg": "quota"})
    assert_gave_up(stage, stage.start("--yes"), 4, "cannot be searched")
    assert len(stage.vast.calls("POST", "/bundles/")) == 1


@drawn_out
def trouble_with_every_look(stage: Scene) -> None:
    offer = stage.vast.add_offer()
    stage.vast.fault("GET", LIST, drop="before")
    stage.vast.fault("GET", LIST, status=502, body="<html>Bad Gateway</html>")
    stage.vast.fault("POST", "/bundles/", drop="after")
    stage.vast.fault("POST", "/bundles/", status=200, body="<html>Hello</html>")
    stage.vast.fault("GET", LIST, skip=1, status=500)  # the first look at what is rented
    stage.vast.fault("GET", LIST, skip=1, status=200, body={"success": False, "msg": "sorry"})
    assert_rented(stage, stage.start("--yes"), offer)


def order_that_vast_declines(stage: Scene) -> None:
    offers = [stage.vast.add_offer(), stage.vast.add_offer(dph_base=0.07)]
    stage.vast.fault("PUT", ORDER, status=200, body={"success": False, "msg": "not now"})
    run = stage.start("--yes")
    assert_rented(stage, run, *offers)
    assert "not now" in run.stderr


def order_answered_with_an_error_after_the_effect(stage: Scene) -> None:
    offer = stage.vast.add_offer()
    stage.vast.add_offer(dph_base=0.07)
    stage.vast.fault("PUT", ORDER, status=502, effect=True)
    assert_rented(stage, stage.start("--yes"), offer)


def trouble_with_every_destroy(stage: Scene) -> None:
    """In the end Vast says that it went, and it did not."""
    stage.vast.add_offer(fate="exited")
    stage.vast.on("PUT", ORDER, lambda request: setattr(stage.only(), "destroy_refusals", 2),
                  when="after")
    stage.vast.fault("DELETE", ANY_ID, drop="before")
    stage.vast.fault("DELETE", ANY_ID, status=200, body={"success": False, "msg": "busy"})
    assert_gave_up(stage, stage.start("--yes"), 4, "is exited", "nothing is rented")
    assert len(stage.vast.calls("DELETE", ANY_ID)) == 5


@plays(requests_too_many, trouble_with_every_look, order_that_vast_declines,
       trouble_with_every_destroy, offer_that_vanishes,
       order_answered_with_an_error_after_the_effect, offers_that_all_vanish, wrong_key,
       key_that_may_not_rent, searches_used_up)
def test_what_vast_refuses_or_the_net_loses_leaves_nothing_behind(act: Act, acts: Acts) -> None:
    acts.end_of(act)


# Long ones, with the pauses as they are


def gpu_taken_for_a_minute(stage: Scene) -> None:
    old = stage.vast.add_instance(state="stopped", fate="gpu_taken")
    offer = stage.vast.add_offer()
    run = stage.start("--replace", "--yes", BARK_POLL="5")
    assert_rented(stage, run, offer)
    assert "the GPU of instance" in run.stderr and stage.vast.destroyed == [old.id]
    begun, ended = (one.time for one in stage.vast.calls("PUT", f"/instances/{old.id}/"))
    assert ended - begun >= 60


def destroy_that_never_works(stage: Scene) -> None:
    stage.vast.add_offer(fate="refuses_destroy")
    stage.workers_say("failed")
    run = stage.launch("--yes").wait(300)
    assert (run.status, stage.billed()) == (4, {stage.only().id: "running"})
    assert ids_named(run) == {stage.only().id}


def stop_that_never_works(stage: Scene) -> None:
    old = stage.vast.add_instance(state="stopped", fate="gpu_taken")
    stage.vast.fault("PUT", f"/instances/{old.id}/", skip=1, times=math.inf, status=500)
    stage.vast.add_offer()
    run = stage.launch("--replace", "--yes", "--timeout", "3").wait(300)
    assert (run.status, run.stdout, stage.orders()) == (4, "", [])
    assert stage.billed() == {old.id: "running"}
    assert run.stderr.splitlines()[-1].endswith(f"vastai stop instance {old.id}")


def worker_that_crashes_again_and_again(stage: Scene) -> None:
    stage.vast.container_env["ENDS"] = "1"
    stage.vast.add_offer()
    run = stage.start("--yes", BARK_POLL="10")
    assert_gave_up(stage, run, 4, "ended with status 1", "nothing is rented")


def order_lost_before_the_effect(stage: Scene) -> None:
    """It may still bring something for a minute."""
    offers = [stage.vast.add_offer(), stage.vast.add_offer(dph_base=0.07)]
    stage.vast.fault("PUT", ORDER, drop="before")
    assert_rented(stage, stage.start("--yes", BARK_POLL="5"), *offers)


def nine_offers_that_vanish(stage: Scene) -> None:
    offers = [stage.vast.add_offer(dph_base=0.06 + i / 100) for i in range(10)]
    stage.vast.on("POST", "/bundles/", lambda request: stage.vast.offers.clear(), when="after")
    run = stage.launch("--yes").wait(300)
    assert_gave_up(stage, run, 4, "no offer could be had")
    assert stage.orders() == offers[:8]


@pytest.mark.long
@plays(gpu_taken_for_a_minute, destroy_that_never_works, stop_that_never_works,
       worker_that_crashes_again_and_again, order_lost_before_the_effect,
       nine_offers_that_vanish)
def test_patience_has_its_ends(act: Act, acts: Acts) -> None:
    acts.end_of(act)
