"""`speak` under what takes long: twenty kills, a full disk, a book in many scripts, a listener, and
how full the worker is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import BUILTIN, ROOT, Worker, running_worker, wait_until
from listening import taken_down, words_of
from manager import Run
from renting import Scene, light_stage, make_worker_real, scene
from speaking import KEY, Desk, gate_before, make_program, pcm_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

KILLS = 20
CHAPTER = ROOT / "tests/worker/chapter.txt"
# Of the Universal Declaration of Human Rights, article 1, and words of our own.
SCRIPTS = (
    "All human beings are born free.", "Alle Menschen sind frei geboren.",
    "Tous les êtres humains naissent libres.", "Todos los seres humanos nacen libres.",
    "Все люди рождаются свободными.", "人人生而自由，在尊严和权利上一律平等。",
    "すべての人間は、生れながらにして自由である。", "모든 인간은 태어날 때부터 자유롭다.",
    "सभी मनुष्यों को गौरव और अधिकार प्राप्त हैं।", "يولد جميع الناس أحرارا.",
    "כל בני האדם נולדו בני חורין.", "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระ", "Tất cả mọi người sinh ra đều được tự do.",
    "ყველა ადამიანი იბადება თავისუფალი.", "Բոլոր մարդիկ ծնվում են ազատ։",
    "የሰው ልጅ ሁሉ ሲወለድ ነጻ ነው።", "👩‍👩‍👧‍👦 🎉", "Wszyscy ludzie rodzą się wolni.", "1948, § 1: 30 %.")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_program(tmp_path_factory.mktemp("program"))


@contextlib.contextmanager
def desk_at(program: Path, folder: Path, **settings: str) -> Iterator[tuple[Desk, Worker]]:
    with running_worker(BARK_API_KEY=KEY, **settings) as worker:
        worker.wait_for("ready")
        desk = Desk(program, folder, worker.url)
        try:
            yield desk, worker
        finally:
            desk.end()


# Twenty kills


class Storm:
    """Kills the client, its worker or its instance, whatever it is doing; keeps what was spoken."""

    def __init__(self, stage: Scene, seed: int):
        self.stage, self.draw = stage, random.Random(seed)
        self.run = self.launch()
        self.kept: dict[str, bytes] = {}
        self.kinds: list[str] = []

    def launch(self) -> Run:
        return self.stage.launch("t.txt", "-o", "o.wav", "--json", "--keep", "--start",
                                 command="speak")

    def parts(self) -> dict[str, bytes]:
        found = self.stage.manager.home.glob("o.wav.parts/*.part")
        return {path.name: path.read_bytes() for path in found}

    def blow(self) -> None:
        """At a random moment: some parts after the last, or while there is no worker at all."""
        more, deadline = self.draw.randint(0, 5), time.monotonic() + 90
        wait_until(lambda: len(self.parts()) >= len(self.kept) + more
                   or time.monotonic() > deadline, "parts", 120)
        time.sleep(self.draw.uniform(0.0, 1.0))
        parts = self.parts()
        assert self.kept.items() <= parts.items()
        self.kept = parts
        kind = self.draw.choice(("client", "worker", "instance"))
        self.kinds.append(kind)
        if kind == "client":
            os.kill(self.run.process.pid, signal.SIGKILL)
            assert self.run.wait().status == -signal.SIGKILL, self.run.stderr
            self.run = self.launch()
        elif kind == "worker":
            with contextlib.suppress(AssertionError):  # it has none just now
                self.stage.only().crash_worker()
        else:
            with self.stage.vast.lock:
                self.stage.only().stop()


def test_after_twenty_kills_the_whole_is_as_without_one(
        tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manager.SCRIPT", program)
    text = "\n\n".join(f"This is paragraph {number}." for number in range(100))
    with light_stage(tmp_path / "stage") as warm, scene(tmp_path / "one", warm) as stage:
        home = stage.manager.home
        stage.vast.rate_violations = list  # type: ignore[method-assign]
        make_worker_real(stage)
        (home / "t.txt").write_text(text)
        stage.vast.add_offer()
        assert stage.launch("--yes", "--model", "suno/bark-small", BARK_DETERMINISTIC="on",
                            BARK_QUALITY="off").wait().status == 0
        storm = Storm(stage, seed=24)
        for _ in range(KILLS):
            storm.blow()
        run = storm.run.wait(900)
        assert run.status == 0, run.stderr
        answer = json.loads(run.stdout)
        print("kills:", *storm.kinds, f"; {len(storm.kept)} parts were kept before the last")
        parts = storm.parts()
        assert len(parts) == 100 == answer["parts"] and storm.kept.items() <= parts.items()
        assert answer["failed"] == []
        with desk_at(program, home, BARK_MODEL=str(home / "toy"), BARK_QUALITY="off",
                     BARK_DETERMINISTIC="on") as (desk, _):
            desk.spoken("t.txt", "-o", "calm.wav")
        assert pcm_of(home / "o.wav") == pcm_of(home / "calm.wav")


# A full disk


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, program: Path, toy: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder],
                      check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        with desk_at(program, folder, BARK_MODEL=str(toy)) as (desk, worker), \
                gate_before(worker.url) as gate:
            desk.url = gate.url
            desk.write("t.txt", "\n\n".join(f"Paragraph {number}." for number in range(12)))
            filler = folder / "filler"

            def fill(text: str, count: int) -> None:
                if count == 6:
                    room = shutil.disk_usage(folder).free - 100_000
                    filler.write_bytes(bytes(max(0, room)))

            gate.spoil = fill
            run = desk.speak("t.txt", "-o", "o.flac")
            assert (run.status, run.stdout) == (1, "")
            assert "No space left on device" in run.stderr
            assert "what is spoken stays, and the same command goes on" in run.stderr
            kept = len(desk.parts("o.flac"))
            assert 0 < kept < 12 and not (folder / "o.flac").exists()
            filler.unlink()
            gate.spoil = lambda text, count: None
            assert desk.spoken("t.txt", "-o", "o.flac")["reused"] == kept
    finally:
        subprocess.run(["umount", folder], check=True)


# Many scripts


def test_a_book_of_three_hundred_paragraphs_in_many_scripts_is_spoken_to_its_end(
        tmp_path: Path, program: Path, toy: Path) -> None:
    """Some are longer than a request may be, and are cut where no letter is."""
    draw = random.Random(24)
    paragraphs = [" ".join(draw.choice(SCRIPTS) for _ in range(draw.choice((1, 1, 2, 3, 12))))
                  for _ in range(300)]
    with desk_at(program, tmp_path, BARK_MODEL=str(toy), BARK_MAX_BATCH="8",
                 TTS_MAX_LENGTH="150") as (desk, worker), gate_before(worker.url) as gate:
        desk.url = gate.url
        desk.write("t.txt", "\n\n".join(paragraphs))
        answer = desk.spoken("t.txt", "-o", "o.opus")
    assert answer["failed"] == []
    asked = set(gate.texts)
    assert all(len(text) <= 150 for text in asked)
    assert set("".join("".join(paragraphs).split())) == set("".join("".join(asked).split()))
    assert len(gate.bodies) == len(asked) == answer["parts"]


# The listener


def test_a_chapter_is_heard_in_order_and_complete(tmp_path: Path, program: Path) -> None:
    """By an independent recogniser, on the built-in voice, which is no great speaker."""
    with desk_at(program, tmp_path, BARK_MODEL=str(BUILTIN), BARK_QUALITY="on") as (desk, _):
        text = CHAPTER.read_text(encoding="utf-8")[:3000].rpartition("\n\n")[0]
        desk.write("t.txt", text)
        answer = desk.spoken("t.txt", "-o", "o.wav")
    with wave.open(str(tmp_path / "o.wav")) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    heard = words_of(taken_down(samples, 24_000))
    wanted = words_of(text)
    from rapidfuzz.distance import Levenshtein

    wrong = Levenshtein.distance(wanted, heard) / len(wanted)
    print(f"{len(wanted)} words, {len(heard)} heard, {wrong:.3f} wrong;"
          f" {answer['seconds']:.0f} s of speech")
    assert wrong < 0.20 and abs(len(heard) / len(wanted) - 1) < 0.1


# How full the worker is kept


def test_the_worker_is_kept_full_and_little_is_added_to_its_own_time(
        tmp_path: Path, program: Path, toy: Path) -> None:
    """Against the same texts asked for by nobody who keeps or binds them. Numbers with -s."""
    text = "\n\n".join(f"This is paragraph {number}, and it has some words more." for number
                       in range(160))
    shares: list[float] = []
    over = threading.Event()
    with desk_at(program, tmp_path, BARK_MODEL=str(toy), BARK_MAX_BATCH="8",
                 BARK_CACHE_MB="0") as (desk, worker):

        def watch() -> None:
            while not over.wait(0.05):
                health = worker.health()
                running = health["queue"]["running"]
                shares.append(min(1.0, running / health["slots"]))

        desk.write("t.txt", text)
        watching = threading.Thread(target=watch)
        began = time.monotonic()
        run = desk.launch("t.txt", "-o", "o.wav", "--json")
        wait_until(lambda: worker.health()["queue"]["running"], "first request")
        first = time.monotonic()
        watching.start()
        wait_until(lambda: len(desk.parts("o.wav")) >= 150, "most of it", 600)
        over.set()
        watching.join()
        assert run.wait().status == 0
        took = time.monotonic() - began
        worked = sum(float(line.split(" ms=")[1].split()[0]) for line in worker.log
                     if "POST /synthesize" in line) / 1000
    full = float(np.mean(shares))
    print(f"slots at work: {100 * full:.1f} % (least {100 * min(shares):.0f} %, of {len(shares)}"
          f" looks); {took:.1f} s in all, {first - began:.1f} s until the first request,"
          f" {worked / took:.1f} requests at once")
    assert full > 0.9
