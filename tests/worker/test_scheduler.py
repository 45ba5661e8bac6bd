"""The scheduler alone, with an engine whose steps the test lets happen one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import wait_until

SECONDS = 10.0  # more than anything here takes


@dataclass(eq=False)
class Piece:
    """Stands for a segment: `steps` steps long, or without audio because of `error`."""

    name: str
    steps: int = 1
    error: str = ""

    @property
    def identity(self) -> str:
        return self.name


@dataclass
class FakeEngine:
    """Keeps book of what the scheduler does, and waits in every step for the test's leave."""

    bark: ModuleType
    slots: int = 1
    live: dict[Piece, int] = field(default_factory=dict)  # piece to its steps left
    events: list[str] = field(default_factory=list)  # "add a0", "step a0 b0", "abort a0", "reset"
    failures: list[Exception] = field(default_factory=list)  # of the next steps
    threads: set[int] = field(default_factory=set)
    entered: int = 0
    leave: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @property
    def free_slots(self) -> int:
        self.threads.add(threading.get_ident())
        return self.slots - len(self.live)

    def add(self, piece: Piece, urgent: bool = False) -> None:
        assert self.free_slots > 0
        self.live[piece] = piece.steps
        self.events.append(f"add {piece.name}")

    def memory(self) -> dict[str, int]:
        self.threads.add(threading.get_ident())
        return {"free": self.entered}

    def abort(self, piece: Piece) -> None:
        self.threads.add(threading.get_ident())
        if self.live.pop(piece, None):
            self.events.append(f"abort {piece.name}")

    def reset(self) -> None:
        self.threads.add(threading.get_ident())
        self.live.clear()
        self.events.append("reset")

    def step(self) -> list[Any]:
        self.threads.add(threading.get_ident())
        self.entered += 1
        assert self.leave.acquire(timeout=SECONDS), "the test forgot a step"
        self.events.append(f"step {' '.join(piece.name for piece in self.live)}")
        if self.failures:
            raise self.failures.pop(0)
        for piece in self.live:
            self.live[piece] -= 1
        done = [piece for piece, left in self.live.items() if left == 0]
        for piece in done:
            del self.live[piece]
        return [self.bark.Finished(piece, None if piece.error else sound(piece.name), piece.error)
                for piece in done]

    # For the test

    def wait_for_step(self) -> None:
        """Returns when the scheduler is in the first step."""
        wait_until(lambda: self.entered, "first step", SECONDS)

    def advance(self) -> None:
        """One step, and back when the next one has begun; there must be work left for it."""
        entered = self.entered
        self.leave.release()
        wait_until(lambda: self.entered > entered, "next step", SECONDS)

    def run_free(self) -> None:
        self.leave.release(10_000)

    def added(self) -> list[str]:
        return [event.removeprefix("add ") for event in self.events if event.startswith("add ")]


@dataclass
class Bench:
    """A scheduler at work on a fake engine."""

    bark: ModuleType
    engine: FakeEngine
    state: Any
    scheduler: Any

    def request(self, name: str, segments: int = 1, *, steps: int = 1, error: str = "",
                deadline: float = SECONDS, left: Callable[[], bool] = lambda: False,
                patient: bool = False) -> Any:
        pieces = [Piece(f"{name}{index}", steps, error) for index in range(segments)]
        speech = self.bark.Speech("", "", 0, [], pieces, [])
        return self.bark.Request(speech, time.monotonic() + deadline, left, patient)

    def submit(self, name: str, segments: int = 1, **options: Any) -> Any:
        request = self.request(name, segments, **options)
        self.scheduler.submit(request)
        return request


@pytest.fixture
def make_bench(bark: ModuleType) -> Iterator[Callable[..., Bench]]:
    """Makes running benches; at the end of the test it looks that one thread used each engine."""
    benches: list[Bench] = []

    def make(slots: int = 1, max_queue: int = 32, cache: int = 0) -> Bench:
        engine, state = FakeEngine(bark, slots), bark.State()
        bench = Bench(bark, engine, state, bark.Scheduler(
            lambda state: engine, state, max_queue, bark.SegmentCache(cache)))
        bench.scheduler.start()
        wait_until(lambda: state.status == "ready", "ready", SECONDS)
        benches.append(bench)
        return bench

    yield make
    for bench in benches:
        bench.engine.run_free()
        bench.scheduler.drain(SECONDS)
        assert len(bench.engine.threads) <= 1, "more than one thread touched the engine"
        assert threading.get_ident() not in bench.engine.threads


def sound(name: str) -> np.ndarray:
    """Samples that say which segment's they are: its name's bytes, in steps of 1/32767."""
    return np.frombuffer(name.encode(), np.uint8).astype(np.float32) / 32767


def names(request: Any) -> list[str]:
    return [bytes(part.result(SECONDS).samples.astype(np.uint8)).decode()
            for part in request.parts]


def failure(request: Any) -> Any:
    error = request.parts[-1].exception(SECONDS)
    assert error, "the request was answered"
    return error


def refusal(bench: Bench, name: str = "late") -> Any:
    with pytest.raises(bench.bark.Unavailable) as caught:
        bench.submit(name)
    assert caught.value.retry_after > 0
    return caught.value


def test_requests_are_served_in_order_of_arrival(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    requests = [bench.submit(name) for name in "abcd"]
    bench.engine.run_free()
    assert [names(request) for request in requests] == [["a0"], ["b0"], ["c0"], ["d0"]]
    assert bench.engine.added() == ["a0", "b0", "c0", "d0"]


def test_samples_keep_the_order_of_segments_that_finish_out_of_order(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=3)
    request = bench.request("a", 3)
    request.trials[0].segment.steps = 5
    bench.scheduler.submit(request)
    bench.engine.run_free()
    assert names(request) == ["a0", "a1", "a2"]


def test_a_long_text_does_not_starve_a_short_one(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    long = bench.submit("long", 20)
    bench.engine.wait_for_step()
    short = bench.submit("short")
    bench.engine.run_free()
    assert (names(short), len(names(long))) == (["short0"], 20)
    assert bench.engine.added().index("short0") <= 2


def test_a_stream_of_short_texts_does_not_starve_a_long_one(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    long = bench.submit("long", 5)
    bench.engine.wait_for_step()
    for number in range(20):  # one new text for each that is served
        bench.submit(f"short{number}-")
        bench.engine.advance()
    assert len(names(long)) == 5
    assert bench.scheduler.stats()["waiting"] > 0


def test_two_long_texts_share_the_engine(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=2)
    first = bench.submit("a", 6)
    bench.engine.wait_for_step()
    second = bench.submit("b", 6)
    bench.engine.run_free()
    assert (len(names(first)), len(names(second))) == (6, 6)
    added = bench.engine.added()
    assert {name[0] for name in added[3:7]} == {"a", "b"}


def test_a_patient_request_waits_for_all_others_also_for_later_ones(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    first = bench.submit("a", 2)
    bench.engine.wait_for_step()
    patient, later = bench.submit("p", patient=True), bench.submit("b", 2)
    bench.engine.run_free()
    assert names(patient) == ["p0"] and names(first) and names(later)
    assert bench.engine.added() == ["a0", "a1", "b0", "b1", "p0"]


def test_a_patient_request_makes_way_for_others_and_is_taken_up_again(
        make_bench: Callable[..., Bench]) -> None:
    bench, waits, paces = make_bench(), [], []
    bench.scheduler.metrics.started = waits.append
    bench.scheduler.metrics.spoke = lambda compute, audio: paces.append(compute / audio)
    patient = bench.submit("p", 2, steps=3, patient=True)
    bench.engine.wait_for_step()
    bench.submit("a", 1)
    bench.engine.advance()
    assert bench.engine.events[-2:] == ["abort p0", "add a0"]
    assert bench.scheduler.stats() == {"running": 1, "waiting": 1, "capacity": 32}
    bench.engine.run_free()
    assert names(patient) == ["p0", "p1"]
    assert bench.engine.added() == ["p0", "a0", "p0", "p1"]
    assert len(waits) == len(paces) == 1, "that of the other: patience is not what people wait"


def test_a_patient_request_stays_where_there_is_a_slot_for_all(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=2)
    patient = bench.submit("p", steps=2, patient=True)
    bench.engine.wait_for_step()
    other = bench.submit("a")
    bench.engine.run_free()
    assert names(patient) == ["p0"] and names(other) == ["a0"]
    assert not [event for event in bench.engine.events if event.startswith("abort")]


def test_patient_requests_take_no_place_in_the_queue_from_others(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_queue=1)
    patient = [bench.submit("p", patient=True), bench.submit("q", patient=True)]
    bench.engine.wait_for_step()
    with pytest.raises(bench.bark.Unavailable, match="1 requests are waiting"):
        bench.submit("r", patient=True)
    others = [bench.submit("a"), bench.submit("b")]
    assert refusal(bench).code == "queue_full"
    bench.engine.run_free()
    assert [names(each) for each in others + patient] == [["a0"], ["b0"], ["p0"], ["q0"]]


def test_every_free_slot_is_used(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=4)
    request = bench.submit("a", 4, steps=2)
    bench.engine.wait_for_step()
    assert len(bench.engine.live) == 4
    bench.engine.run_free()
    assert len(names(request)) == 4


def test_full_queue_refuses_with_queue_full_and_keeps_what_waits(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=1, max_queue=2)
    running = bench.submit("a")
    bench.engine.wait_for_step()
    waiting = [bench.submit("b"), bench.submit("c")]
    assert bench.scheduler.stats() == {"running": 1, "waiting": 2, "capacity": 2}
    error = refusal(bench)
    assert error.code == "queue_full" and "2" in str(error)
    bench.engine.run_free()
    assert [names(request) for request in (running, *waiting)] == [["a0"], ["b0"], ["c0"]]
    assert names(bench.submit("d")) == ["d0"]


def test_free_slots_do_not_count_as_queue(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=3, max_queue=1)
    bench.submit("a", steps=3)
    bench.engine.wait_for_step()
    for name in "bcd":  # two for the free slots, one that waits
        bench.submit(name)
    assert refusal(bench).code == "queue_full"


def test_request_past_its_deadline_times_out_and_frees_its_slots(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=2)
    request = bench.request("slow", 3, steps=1000)
    bench.scheduler.submit(request)
    bench.engine.wait_for_step()
    bench.submit("next")
    request.deadline = time.monotonic()
    bench.engine.advance()
    error = failure(request)
    assert isinstance(error, bench.bark.RequestTimeout) and error.code == "timeout"
    assert sorted(piece.name for piece in bench.engine.live) == ["next0"]


def test_request_that_times_out_while_it_waits_never_starts(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.submit("a", steps=3)
    bench.engine.wait_for_step()
    request = bench.submit("late", deadline=0.0)
    bench.engine.advance()
    assert isinstance(failure(request), bench.bark.RequestTimeout)
    assert bench.scheduler.stats()["waiting"] == 0
    assert "late0" not in bench.engine.added()


def test_abandoned_request_is_freed_before_the_next_step(
        make_bench: Callable[..., Bench]) -> None:
    bench, left = make_bench(slots=2), threading.Event()
    gone = bench.submit("gone", 2, steps=1000, left=left.is_set)
    bench.engine.wait_for_step()
    stays = bench.submit("stays", steps=2)
    left.set()
    bench.engine.advance()
    assert isinstance(failure(gone), bench.bark.Abandoned)
    assert sorted(bench.engine.events[3:5]) == ["abort gone0", "abort gone1"]
    bench.engine.advance()
    assert bench.engine.events[-1] == "step stays0"
    bench.engine.run_free()
    assert names(stays) == ["stays0"]


def test_abandoned_request_leaves_the_queue(make_bench: Callable[..., Bench]) -> None:
    bench, left = make_bench(max_queue=1), threading.Event()
    bench.submit("a", steps=3)
    bench.engine.wait_for_step()
    gone = bench.submit("gone", left=left.is_set)
    left.set()
    bench.engine.advance()
    assert isinstance(failure(gone), bench.bark.Abandoned)
    assert bench.scheduler.stats() == {"running": 1, "waiting": 0, "capacity": 1}


def test_drain_finishes_what_was_accepted_and_refuses_new_requests(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    accepted = [bench.submit("a", 2), bench.submit("b")]
    bench.engine.wait_for_step()
    drain = threading.Thread(target=bench.scheduler.drain, args=(SECONDS,))
    drain.start()
    wait_until(lambda: bench.state.status == "draining", "draining", SECONDS)
    assert refusal(bench).code == "draining"
    bench.engine.run_free()
    assert [names(request) for request in accepted] == [["a0", "a1"], ["b0"]]
    drain.join(SECONDS)
    assert not drain.is_alive()


def test_drain_gives_up_after_its_time(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    requests = [bench.submit("running", steps=1000), bench.submit("waiting")]
    bench.engine.wait_for_step()
    began = time.monotonic()
    bench.scheduler.drain(0.05)
    assert 0.05 <= time.monotonic() - began < 2.0
    assert {failure(request).code for request in requests} == {"draining"}
    assert bench.scheduler.stats()["running"] == 0


def test_drain_of_an_idle_scheduler_returns_at_once(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    began = time.monotonic()
    bench.scheduler.drain(SECONDS)
    assert time.monotonic() - began < 2.0
    assert refusal(bench).code == "draining"


def test_failing_step_fails_what_was_in_it_and_nothing_else(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.engine.failures = [RuntimeError("CUDA out of memory")]
    broken = bench.submit("broken", 3)
    waiting = bench.submit("waiting")
    bench.engine.run_free()
    assert isinstance(failure(broken), bench.bark.GenerationFailed)
    assert names(waiting) == ["waiting0"] and names(bench.submit("next")) == ["next0"]
    assert bench.engine.events.count("reset") == 1
    assert "broken1" not in bench.engine.added()
    assert bench.state.status == "ready"


def test_three_failing_steps_in_a_row_fail_the_worker(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.engine.failures = [RuntimeError("device lost")] * 3
    requests = [bench.submit(name) for name in "abcd"]
    bench.engine.run_free()
    errors = [failure(request) for request in requests]
    assert [error.code for error in errors[:3]] == ["generation_failed"] * 3
    assert errors[3].code == "not_ready"
    assert bench.state.status == "failed" and "device lost" in str(bench.state.error)
    assert refusal(bench).code == "not_ready" and "device lost" in str(refusal(bench))


def test_a_good_step_forgives_failures_before_it(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.engine.run_free()
    for _ in range(2):
        bench.engine.failures = [RuntimeError("hiccup")] * 2
        for name in "ab":
            assert failure(bench.submit(name)).code == "generation_failed"
        assert names(bench.submit("c")) == ["c0"]
    assert bench.state.status == "ready"


def test_segment_without_audio_fails_its_request_and_frees_the_rest(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=2)
    request = bench.request("bad", 4, steps=5)
    request.trials[1].segment = Piece("bad1", error="the samples are not finite")
    bench.scheduler.submit(request)
    other = bench.submit("other")
    bench.engine.run_free()
    error = failure(request)
    assert isinstance(error, bench.bark.GenerationFailed) and error.code == "generation_failed"
    assert "segment 1" in str(error) and "not finite" in str(error)
    assert names(other) == ["other0"]
    assert "abort bad0" in bench.engine.events and "bad2" not in bench.engine.added()


def test_two_failing_segments_of_one_request_in_one_step_fail_it_once(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=2)
    request = bench.submit("bad", 2, error="empty")
    bench.engine.run_free()
    assert failure(request).code == "generation_failed"
    assert names(bench.submit("next")) == ["next0"]


def test_requests_are_refused_while_the_model_loads(bark: ModuleType) -> None:
    loaded, state = threading.Event(), bark.State()

    def load(state: Any) -> FakeEngine:
        assert loaded.wait(SECONDS)
        return FakeEngine(bark)

    scheduler = bark.Scheduler(load, state, 1, bark.SegmentCache(0))
    scheduler.start()
    bench = Bench(bark, FakeEngine(bark), state, scheduler)
    assert refusal(bench).code == "not_ready" and "loading" in str(refusal(bench))
    loaded.set()
    wait_until(lambda: state.status == "ready", "ready", SECONDS)
    scheduler.drain(SECONDS)


@pytest.mark.parametrize("unexpected", [False, True])
def test_failed_load_tells_its_reason(bark: ModuleType, unexpected: bool) -> None:
    state = bark.State()

    def load(state: Any) -> FakeEngine:
        raise ZeroDivisionError("no room") if unexpected else bark.ModelError("no room")

    scheduler = bark.Scheduler(load, state, 1, bark.SegmentCache(0))
    scheduler.start()
    wait_until(lambda: state.error, "failure", SECONDS)
    assert state.status == "failed" and isinstance(state.error, bark.ModelError)
    error = refusal(Bench(bark, FakeEngine(bark), state, scheduler))
    assert error.code == "not_ready" and "no room" in str(error)


# What is kept

def test_a_segment_can_be_had_before_those_after_it_are_made(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    request = bench.submit("a", 2)
    bench.engine.wait_for_step()
    bench.engine.advance()
    results = request.results()
    assert next(results).samples.tobytes() and not request.is_done()
    bench.engine.run_free()
    assert len(list(results)) == 1 and request.is_done()


def test_what_was_made_once_is_not_made_again(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(cache=1000)
    bench.engine.run_free()
    assert names(bench.submit("a", 3)) == names(bench.submit("a", 3)) == ["a0", "a1", "a2"]
    assert bench.engine.added() == ["a0", "a1", "a2"]


def test_a_retry_goes_on_where_the_first_attempt_was_cut(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(cache=1000)
    left = threading.Event()
    bench.submit("a", 4, left=left.is_set)
    bench.engine.wait_for_step()
    bench.engine.advance()
    bench.engine.advance()
    left.set()
    again = bench.submit("a", 4)
    bench.engine.run_free()
    assert names(again) == ["a0", "a1", "a2", "a3"]
    assert [bench.engine.added().count(f"a{index}") for index in range(4)] in (
        [1, 1, 2, 1], [1, 1, 1, 1])  # the third was under way, or was just done


def test_without_a_cache_everything_is_made_again(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(cache=0)
    bench.engine.run_free()
    assert names(bench.submit("a")) == names(bench.submit("a"))
    assert bench.engine.added() == ["a0", "a0"]


def test_what_is_kept_is_answered_while_the_queue_is_full(
        make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_queue=1, cache=1000)
    kept = bench.submit("kept")
    bench.engine.wait_for_step()
    bench.engine.leave.release()
    assert names(kept) == ["kept0"]
    bench.submit("running", steps=50)
    bench.submit("waiting")
    assert refusal(bench).code == "queue_full"
    assert names(bench.submit("kept")) == ["kept0"]


def test_failures_are_not_kept(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(cache=1000)
    bench.engine.run_free()
    assert failure(bench.submit("a", error="empty")).permanent
    assert names(bench.submit("a")) == ["a0"]


def test_the_cache_lets_go_of_what_was_not_used_for_longest(bark: ModuleType) -> None:
    def samples(count: int) -> Any:
        return bark.Take(np.zeros(count, np.int16))

    cache, (a, b, c, big) = bark.SegmentCache(400), map(Piece, ("a", "b", "c", "big"))
    cache.put(a, samples(100))
    cache.put(b, samples(100))
    assert cache.get(a) is not None and cache.size == 400
    cache.put(c, samples(50))
    assert cache.get(b) is None and cache.get(a) is not None and cache.size == 300
    cache.put(big, samples(201))
    assert cache.get(big) is None and cache.get(c) is not None
    cache.put(c, samples(90))  # two requests made it at once
    assert cache.size == 300


@pytest.mark.parametrize("change", [
    {"text_ids": [1, 2]}, {"voice": object()}, {"seed": 8}, {"min_eos_p": 0.1},
    {"semantic_sampling": 2}, {"coarse_sampling": 2}, {"fine_sampling": 2}, {"max_new_tokens": 9}])
def test_only_segments_that_sound_the_same_share_what_is_kept(
        bark: ModuleType, change: dict[str, Any]) -> None:
    segment = bark.Segment([1, 3], object(), 7, 1, 1, 1, 0.2)
    assert replace(segment).identity == segment.identity
    assert replace(segment, **change).identity != segment.identity


def test_a_state_that_failed_tells_of_no_download_any_more(bark: ModuleType) -> None:
    state = bark.State()
    state.progress = lambda: {"bytes_done": 1, "bytes_total": 2}
    state.enter("downloading")
    assert state.progress
    state.fail(bark.ModelError("the disk is full"))
    assert state.progress is None and state.status == "failed"


def test_the_gpus_memory_is_looked_at_now_and_then(
        make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch,
        bark: ModuleType) -> None:
    monkeypatch.setattr(bark, "MEMORY_SECONDS", 3600.0)
    bench = make_bench()
    bench.engine.run_free()
    names(bench.submit("a", steps=3))
    assert bench.scheduler.memory == {"free": 0}  # as at the start
    monkeypatch.setattr(bark, "MEMORY_SECONDS", 0.0)
    names(bench.submit("b", steps=3))
    wait_until(lambda: bench.scheduler.memory["free"] > 3, "second look", SECONDS)
