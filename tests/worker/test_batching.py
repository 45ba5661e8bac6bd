"""Work done together: recorded steps, bursts, batched prefills, urgency, and too little memory.

What the engine does on a GPU alone is switched on here by hand, and graphs are stood in for by
plain calls: each way of working must give the samples that the plain engine gives.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench import SIZES, Widths
from conftest import wait_until
from engines import TEXTS, Bench, assert_same_pcm, generate_parts
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

EIGHT = list(TEXTS.items())[:8]
HEAVY_WORK = ("semantic.prompts", "coarse.prompts", "fine._fill_windows")  # of an engine


def recorder(spoil: float = 0.0, refuse: Callable[[int], bool] = lambda rows: False) -> Any:
    """A stand-in for CudaCapture, and the shapes (rows,) that were replayed."""
    replayed: list[int] = []

    def capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        result = run().clone()
        if refuse(len(result)):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

        def replay() -> None:
            replayed.append(len(result))
            result.copy_(run() + spoil)
        return replay, result

    return lambda: capture, replayed


@pytest.fixture(scope="module")
def plain(bark: ModuleType, toy: Path) -> list[np.ndarray]:
    """What the plain engine makes of eight texts, sampled."""
    bench = Bench(bark, toy)
    return bench.samples([bench.segment(*item) for item in EIGHT])


def heavy_work(bench: Bench, place: str) -> tuple[Any, str]:
    """Whose method that is, and its name."""
    owner, _, name = place.rpartition(".")
    return operator.attrgetter(owner)(bench.engine), name


def samples_of(bench: Bench) -> list[np.ndarray]:
    return bench.samples([bench.segment(*item) for item in EIGHT])


def assert_all_same(bark: ModuleType, ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert_same_pcm(bark, one, other)


@pytest.mark.parametrize("slots", [8, 11])
def test_recorded_steps_and_bursts_give_the_same_audio(
        bark: ModuleType, toy: Path, plain: list[np.ndarray], slots: int) -> None:
    capture, replayed = recorder()
    bench = Bench(bark, toy, slots=slots, capture=capture, burst=12)
    replayed.clear()  # of the checks at the start
    assert_all_same(bark, samples_of(bench), plain)
    assert set(replayed) >= {1, 2, 4, 8}  # as segments end, the steps get smaller


def test_prefills_and_fine_windows_done_together_give_the_same_audio(
        bark: ModuleType, toy: Path, plain: list[np.ndarray],
        monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(bark, toy, burst=12)
    monkeypatch.setattr(bench.engine.turns, "group", 4)
    sizes: dict[str, int] = {}

    def watch(place: str) -> None:
        owner, name = heavy_work(bench, place)
        work = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda several: (
            sizes.update({place: max(len(several), sizes.get(place, 0))}), work(several))[1])

    for place in (*HEAVY_WORK, "fine.codec._waves"):
        watch(place)
    assert_all_same(bark, samples_of(bench), plain)
    assert sizes["semantic.prompts"] == 4 and min(sizes.values()) > 1 and len(sizes) == 4


def test_one_fixed_shape_uses_one_recorded_step_a_stage(bark: ModuleType, toy: Path) -> None:
    capture, replayed = recorder()
    bench = Bench(bark, toy, slots=3, capture=capture, fixed_shape=True)
    assert [list(s.batch.graphs) for s in (bench.engine.semantic, bench.engine.coarse)] == [
        [(3, 1024)]] * 2
    bench.samples([bench.segment("Hi.", "v2/en_speaker_6")])
    assert set(replayed) == {3}


def test_a_step_that_cannot_be_recorded_is_left_out_with_a_warning(
        bark: ModuleType, toy: Path, plain: list[np.ndarray],
        caplog: pytest.LogCaptureFixture) -> None:
    capture, replayed = recorder(refuse=lambda rows: rows == 4)
    bench = Bench(bark, toy, capture=capture)
    assert {rows for rows, _ in bench.engine.semantic.batch.graphs} == {1, 2, 8}
    assert "no CUDA graph for 4 semantic slots: CUDA error: operation not permitted" in caplog.text
    assert_all_same(bark, samples_of(bench), plain)
    assert 4 not in replayed


def test_a_recorded_step_that_differs_is_left_out_with_a_warning(
        bark: ModuleType, toy: Path, plain: list[np.ndarray],
        caplog: pytest.LogCaptureFixture) -> None:
    capture, replayed = recorder(spoil=10.0)
    bench = Bench(bark, toy, capture=capture)
    assert bench.engine.semantic.batch.graphs == bench.engine.coarse.batch.graphs == {}
    assert "its logits differ by" in caplog.text
    replayed.clear()
    assert_all_same(bark, samples_of(bench), plain)
    assert replayed == []


def test_a_recorded_step_that_moves_nothing_on_is_left_out(
        bark: ModuleType, toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    def capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        result, batch = run().clone(), inspect.getclosurevars(run).nonlocals["self"]

        def replay() -> None:
            kept = batch.ints.clone()
            result.copy_(run())
            batch.ints.copy_(kept)
        return replay, result

    assert Bench(bark, toy, slots=1, capture=lambda: capture).engine.coarse.batch.graphs == {}
    assert "does not move its slots on" in caplog.text


@pytest.mark.parametrize("change", [
    {"temperature": 1.3, "top_k": 0}, {"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.8}])
def test_sampling_wider_than_the_recorded_steps_know_is_done_without_them(
        bark: ModuleType, toy: Path, change: dict[str, float]) -> None:
    capture, replayed = recorder()
    recorded, usual = Bench(bark, toy, slots=2, capture=capture), Bench(bark, toy, slots=2)
    replayed.clear()

    def made(bench: Bench) -> np.ndarray:
        how = bark.Sampling(**change)
        segment = bench.segment("Hello.", "v2/en_speaker_6", semantic_sampling=how,
                                coarse_sampling=how, max_new_tokens=60)
        return bench.samples([segment])[0]

    assert_same_pcm(bark, made(recorded), made(usual))
    assert bool(replayed) == (change == {"temperature": 0.0})


def test_buckets_waste_few_slots(bark: ModuleType) -> None:
    assert bark.buckets(1) == [1]
    assert bark.buckets(8) == [8, 4, 2, 1]
    assert bark.buckets(20) == [20, 16, 8, 4, 2, 1]
    for slots in range(1, 65):
        held = sorted(bark.buckets(slots))
        assert held[-1] == slots and len(set(held)) == len(held)
        assert all(big - small <= 8 for small, big in itertools.pairwise(held))


# CUDA graphs, on a tape


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Records the operations of a block and does them again on the same memory, as a graph does.

    What a graph could not hold fails: whatever reads a tensor on the host or brings host data in.
    """

    HOST = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "item")

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.HOST:
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        kwargs = kwargs or {}
        given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        result = func(*args, **kwargs)
        fresh = [x for x in tensors(result) if x.untyped_storage().data_ptr() not in given]
        if fresh or func._schema.is_mutable:  # not a view
            self.done.append((func, args, kwargs, fresh))
        return result

    def replay(self) -> None:
        for func, args, kwargs, fresh in self.done:
            again = tensors(func(*args, **kwargs))
            for kept, new in zip(fresh, again if fresh else [], strict=True):
                kept.copy_(new)

    def pool(self) -> int:
        return 1


@pytest.fixture
def taped_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.cuda's capture, on tapes; the pools that it was given."""
    pools: list[Any] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    def graph(tape: Tape, pool: Any, stream: Any) -> Tape:
        pools.append(pool)
        return tape

    for name, stub in {"Stream": lambda: stream, "current_stream": lambda: stream,
                       "stream": contextlib.nullcontext, "CUDAGraph": Tape, "graph": graph}.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    return pools


def test_steps_hold_nothing_that_a_cuda_graph_could_not_replay(
        bark: ModuleType, toy: Path, plain: list[np.ndarray], taped_cuda: list[Any],
        caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(bark, toy, capture=bark.CudaCapture, burst=12)
    semantic, coarse = bench.engine.semantic.batch, bench.engine.coarse.batch
    assert len(semantic.graphs) == 4 * 3 and len(coarse.graphs) == 4
    assert taped_cuda == [None] + [1] * 15  # the first one's memory serves all
    assert "no CUDA graph" not in caplog.text
    for batch in (semantic, coarse):
        batch.decode_step = None  # only replays are left
    assert_all_same(bark, samples_of(bench), plain)


@pytest.mark.parametrize("stage", ["semantic", "coarse"])
def test_a_decode_step_is_few_kernels(bark: ModuleType, toy: Path, stage: str) -> None:
    """Alone, a segment waits for kernels to start: 9 a layer, and 45 or 46 for all the rest."""
    batch = getattr(Bench(bark, toy, slots=2).engine, stage).batch
    with torch.inference_mode(), Tape() as tape:
        batch.decode_step(2, 512)
    assert len(tape.done) <= 9 * len(batch.gpt.model.layers) + 46


def test_a_tape_refuses_what_a_cuda_graph_refuses() -> None:
    numbers = torch.arange(3)
    for work in (numbers.sum().item, numbers.nonzero, lambda: torch.tensor([1.0]) + numbers):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), Tape():
            work()


# Urgency


def test_an_urgent_segment_is_done_first_though_it_came_last(
        bark: ModuleType, toy: Path) -> None:
    bench = Bench(bark, toy)
    segments = [bench.segment(text, voice, max_new_tokens=50) for text, voice in EIGHT]
    for segment in segments[:-1]:
        bench.engine.add(segment)
    bench.engine.add(segments[-1], urgent=True)
    first = []
    wait_until(lambda: first.extend(bench.engine.step()) or first, "first segment")
    assert first[0].segment is segments[-1]


def test_urgent_segments_without_end_do_not_stop_the_others(bark: ModuleType, toy: Path) -> None:
    bench = Bench(bark, toy, slots=3)
    waiting = {bench.segment("Well... [laughs] I never did.", f"v2/en_speaker_{i}") for i in (0, 1)}
    for segment in waiting:
        bench.engine.add(segment)
    done, urgent = set(), 0
    while not waiting <= done:
        if bench.engine.free_slots:
            bench.engine.add(bench.segment("Hi.", "v2/en_speaker_6", seed=urgent), urgent=True)
            urgent += 1
        done |= {finished.segment for finished in bench.engine.step()}
        assert urgent < 60
    assert urgent > 1


# Memory


def gpu_with(free: float, widths: Widths, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of these widths in float16, on a GPU with so many bytes free beside it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(6.4e9)))
    config = SimpleNamespace(num_layers=widths.layers, hidden_size=widths.hidden, block_size=1024)
    stage = SimpleNamespace(config=config)
    return SimpleNamespace(semantic=stage, coarse_acoustics=stage, dtype=torch.float16,
                           device=torch.device("cuda:0"))


@pytest.mark.parametrize(("free", "slots"), [
    (6.4e9 - 0.6e9 - 2.3e9, 12), (11.6e9 - 2.3e9, 40), (1.2e9, 1), (0.5e9, 1), (80e9, 64)])
def test_a_gpu_gets_as_many_slots_as_fit_beside_the_weights(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch, free: float, slots: int) -> None:
    """6 GiB less driver and weights hold 12 segments of the full model; its KV cache is 98,304
    bytes a token in each of two stages."""
    assert bark.slots_for(gpu_with(free, SIZES["full"], monkeypatch)) == slots


def short_of_memory(real: Callable[..., Any], times: int) -> Callable[..., Any]:
    """Fails so many times with what CUDA raises, then does its work."""
    def wanting(*arguments: Any, **options: Any) -> Any:
        nonlocal times
        if times:
            times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(*arguments, **options)
    return wanting


def test_slots_that_do_not_fit_are_halved_until_they_do(
        bark: ModuleType, toy: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(bark, "CausalGPT", short_of_memory(bark.CausalGPT, 2))
    bench = Bench(bark, toy, slots=8)
    assert bench.engine.slots == bench.engine.free_slots == 2
    assert "out of memory: going on with 2 segments at once" in caplog.text


def test_one_slot_that_does_not_fit_is_an_error(
        bark: ModuleType, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bark, "CausalGPT", short_of_memory(bark.CausalGPT, 2))
    with pytest.raises(torch.OutOfMemoryError):
        Bench(bark, toy, slots=2)


@pytest.mark.parametrize("place", [
    "semantic.prompts", "fine.codec._waves",  # the first and the last; run.sh has no room for more
    *(pytest.param(place, marks=pytest.mark.long)
      for place in ("coarse.prompts", "fine._fill_windows", "fine._lay_out"))])
def test_memory_that_runs_out_costs_slots_and_no_segment(
        bark: ModuleType, toy: Path, plain: list[np.ndarray], place: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(bark, toy)
    owner, name = heavy_work(bench, place)
    monkeypatch.setattr(owner, name, short_of_memory(getattr(owner, name), 1))
    assert_all_same(bark, samples_of(bench), plain)
    assert bench.engine.slots == 4 and bench.engine.free_slots == 4


def test_memory_that_runs_out_with_one_slot_is_an_error(
        bark: ModuleType, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(bark, toy, slots=1)
    monkeypatch.setattr(bench.engine.fine, "_fill_windows", short_of_memory(lambda chosen: None, 1))
    with pytest.raises(torch.OutOfMemoryError):
        bench.samples([bench.segment("Hi.", "v2/en_speaker_6")])


# Half precision


def test_half_precision_logits_err_no_more_than_transformers_own(
        bark: ModuleType, toy: Path) -> None:
    """Teacher-forced steps of both causal stages, against float32."""
    exact, half = Bench(bark, toy, slots=2), Bench(bark, toy, slots=2, dtype=torch.bfloat16)
    ids = torch.randint(0, 10_000, (2, 300), generator=torch.Generator().manual_seed(1))
    for stage, name, head in (("semantic", "semantic", slice(0, 10_001)),
                              ("coarse", "coarse_acoustics", slice(10_000, 12_048))):
        expected, ours = (forced(getattr(b.engine, stage).batch.gpt, ids) for b in (exact, half))
        with torch.inference_mode():
            theirs = getattr(generate_parts(toy)[1], name).bfloat16()(ids).logits.float()
        error, usual = (float((x - expected).norm() / expected.norm())
                        for x in (ours, theirs[:, 256:, head]))
        assert error < 1.5 * usual and usual < 0.05
    generate_parts.cache_clear()  # its model is in half precision now


def forced(gpt: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, steps, V) after a prefill of 257 ids and after each of the rest."""
    with torch.inference_mode():
        rows = torch.arange(len(ids))
        found = [gpt.prefill(rows, gpt.embed(ids[:, :257]), torch.full((len(ids),), 256))]
        for at in range(257, ids.shape[1]):
            found.append(gpt.decode(ids[:, at], torch.full((len(ids),), at), at + 1))
        return torch.stack(found, dim=1)
