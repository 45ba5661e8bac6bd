"""Takes heard and judged beside the device: the detector on real speech, and what becomes of a
request whose judge is slow, breaks or is missing."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BUILTIN, wait_until
from defects import DEFECTS
from engines import Bench
from test_scheduler import SECONDS, FakeEngine, Piece, sound

RATE = 24_000
TEXT = "the old boat is in the harbor"
PASSED = ("music under it, 10 dB below", "in white noise, 5 dB", "backwards")  # for a listener


# The detector itself

@pytest.fixture(scope="module")
def said(bark: ModuleType) -> tuple[np.ndarray, Any]:
    """What the built-in voice makes of TEXT, and what it should be."""
    bench = Bench(bark, BUILTIN, slots=1)
    speech = bark.Narrator(bench.facts, "v2/en_speaker_6", quality=True).plan(TEXT, None, 3)
    (samples,) = bench.samples(speech.segments)
    return samples, speech.wanted[0]


@pytest.fixture(scope="module")
def judge(bark: ModuleType) -> Any:
    judge = bark.Judge()
    judge.prepare()
    assert judge.detector == "listening"
    return judge


def test_what_the_built_in_voice_says_passes_and_is_found_where_it_is(
        judge: Any, said: tuple[np.ndarray, Any]) -> None:
    samples, wanted = said
    surrounded = np.concatenate([np.zeros(RATE, np.float32), samples, np.zeros(RATE, np.float32)])
    verdict = judge.submit(surrounded, RATE, wanted).result()
    assert verdict.faults == ()
    starts, ends = zip(*verdict.hearing.speech, strict=True)
    assert starts[0] == pytest.approx(1, abs=0.3)
    assert ends[-1] == pytest.approx(1 + len(samples) / RATE, abs=0.3)


@pytest.mark.parametrize("defect", [name for name in DEFECTS if name not in PASSED])
def test_what_is_planted_into_it_is_caught(judge: Any, said: tuple[np.ndarray, Any],
                                           defect: str) -> None:
    samples, wanted = said
    spoilt = DEFECTS[defect](samples)
    first, second = (judge.submit(spoilt, RATE, wanted).result() for _ in range(2))
    assert first.faults and first == second, "the same take must be judged alike"


@pytest.mark.parametrize("count", [0, 1, 100])
def test_a_take_of_next_to_nothing_is_silent(bark: ModuleType, judge: Any, count: int) -> None:
    (fault,) = judge.submit(np.zeros(count, np.float32), RATE, bark.Wanted(1.0)).result().faults
    assert fault.kind == "silent"


def test_the_detectors_package_leaves_torch_its_threads(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("silero_vad")]:
        monkeypatch.delitem(sys.modules, name)  # it sets them when it is imported
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        bark.Detector()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# Without it

def judged_without(judge: Any, said: tuple[np.ndarray, Any]) -> None:
    samples, wanted = said
    assert judge.submit(samples, RATE, wanted).result().faults == ()
    (fault,) = judge.submit(np.zeros(RATE, np.float32), RATE, wanted).result().faults
    assert fault.kind == "silent"


def test_without_the_detectors_package_takes_are_judged_by_level_and_length(
        bark: ModuleType, said: tuple[np.ndarray, Any], monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    judge = bark.Judge()
    judge.prepare()
    assert judge.detector.startswith("missing: ") and "pip install silero-vad" in caplog.text
    judged_without(judge, said)


def test_a_detector_that_breaks_is_told_of_once_and_done_without(
        bark: ModuleType, said: tuple[np.ndarray, Any], monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    def broken(self: Any, samples: np.ndarray) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(bark.Detector, "speech", broken)
    judge = bark.Judge()
    judge.prepare()
    judged_without(judge, said)
    assert judge.detector == "missing: RuntimeError: no memory"
    assert caplog.text.count("speech is not told from noise") == 1


# Beside the device

@dataclass(eq=False)
class Voiced(Piece):
    """A piece that may be made again."""

    seed: int = 1
    semantic_sampling: Any = None
    coarse_sampling: Any = None


@dataclass
class SlowJudge:
    """Gives its verdicts when the test says so."""

    asked: list[Future[Any]] = field(default_factory=list)

    def submit(self, samples: np.ndarray, rate: int, wanted: Any) -> Future[Any]:
        self.asked.append(Future())
        return self.asked[-1]


@dataclass
class Court:
    """A scheduler with a fake engine and a judge that waits for the test."""

    bark: ModuleType
    engine: FakeEngine
    judge: SlowJudge
    scheduler: Any

    def submit(self, name: str, steps: int = 1) -> Any:
        bark, sampling = self.bark, self.bark.Sampling(0.7)
        piece = Voiced(name, steps, semantic_sampling=sampling, coarse_sampling=sampling)
        speech = bark.Speech("", "", 0, [], [piece], [], RATE, [bark.Wanted(1.0)])
        request = bark.Request(speech, bark.time.monotonic() + SECONDS, lambda: False)
        self.scheduler.submit(request)
        return request

    def verdict(self, *kinds: str) -> Any:
        faults = tuple(self.bark.Fault(kind, 1.0, f"so {kind}") for kind in kinds)
        return self.bark.Verdict(faults, 0.0, slice(0, 3))


@pytest.fixture
def court(bark: ModuleType) -> Any:
    engine, judge, state = FakeEngine(bark, 1), SlowJudge(), bark.State()
    engine.run_free()
    scheduler = bark.Scheduler(lambda state: engine, state, 32, bark.SegmentCache(0), 2, judge)
    scheduler.start()
    wait_until(lambda: state.status == "ready", "ready", SECONDS)
    yield Court(bark, engine, judge, scheduler)
    scheduler.drain(SECONDS)


def asked(court: Court, count: int) -> None:
    wait_until(lambda: len(court.judge.asked) == count, f"{count} takes handed over", SECONDS)


def test_the_device_goes_on_while_a_take_is_judged(court: Court) -> None:
    first = court.submit("a")
    asked(court, 1)
    second = court.submit("b", steps=5)  # in the same slot, which the first has left
    asked(court, 2)
    assert not first.is_done() and court.engine.events.count("step b") == 5
    court.judge.asked[1].set_result(court.verdict())
    assert len(list(second.results())) == 1 and not first.is_done()
    court.judge.asked[0].set_result(court.verdict())
    assert next(first.results()).warnings == ()


def test_a_take_refused_is_made_again_and_counted_by_its_fault(court: Court) -> None:
    request = court.submit("a")
    for count in (1, 2, 3):
        asked(court, count)
        court.judge.asked[-1].set_result(court.verdict("noise", "short"))
    take = next(request.results())
    assert (take.takes, take.warnings) == (3, ("so noise", "so short"))
    told = court.scheduler.tally.told()
    assert told["faults"] == {"noise": 3, "short": 3}
    assert told["quality"] == {"segments": 1, "retakes": 2, "warnings": 1}


def test_a_verdict_on_what_nobody_waits_for_any_more_is_dropped(court: Court) -> None:
    request = court.submit("a")
    asked(court, 1)
    request.abandon()
    wait_until(lambda: not court.scheduler.stats()["running"], "abandoned", SECONDS)
    court.judge.asked[0].set_result(court.verdict("noise"))
    quality = court.scheduler.tally.told()["quality"]
    assert quality["segments"] == quality["retakes"] == 0
    again = court.submit("b")
    asked(court, 2)
    court.judge.asked[1].set_result(court.verdict())
    assert next(again.results()).takes == 1


def test_takes_are_judged_by_threads_of_their_own(bark: ModuleType, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    where: list[str] = []

    def noted(*arguments: Any) -> Any:
        where.append(threading.current_thread().name)
        return bark.Verdict((), 0.0)

    monkeypatch.setattr(bark, "judge", noted)
    bark.Judge().submit(sound("a"), RATE, bark.Wanted(1.0)).result()
    assert where and where[0].startswith("judge")
