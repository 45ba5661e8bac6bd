"""The benchmark counts rightly, tells what went wrong, and runs."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import bench
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

FULL, SMALL = bench.SIZES["full"], bench.SIZES["small"]
TOY = ["--device", "cpu", "--size", "toy", "--seconds", "0.9"]


@pytest.fixture(scope="module")
def facts(bark: ModuleType, toy: Path) -> Any:
    return bark.ModelFacts(toy)


@pytest.fixture
def toy_bench(bark: ModuleType, toy: Path) -> bench.Bench:
    return bench.Bench(bench.parse_arguments(TOY), bark, toy, time.perf_counter())


def voice_of(semantic: int, frames: int) -> SimpleNamespace:
    return SimpleNamespace(semantic=np.zeros(semantic), coarse=np.zeros((2, frames)),
                           fine=np.zeros((8, frames)))


def test_the_shapes_count_as_the_published_models() -> None:
    assert FULL.block_weights == 301_989_888  # 24 x 12 x 1024^2
    assert SMALL.block_weights == 84_934_656  # 12 x 12 x 768^2
    assert (FULL.cache_bytes(2), SMALL.cache_bytes(2)) == (98_304, 36_864)


def test_five_seconds_have_the_lengths_counted_by_hand(facts: Any) -> None:
    lengths = bench.lengths_of(facts, voice_of(300, 600), 250)
    assert (lengths.prompt, lengths.semantic, lengths.frames) == (257, 250, 375)
    # 256 semantic, infer and 626 coarse, later at most 630; 750 are 12 windows of 60 and 30 more
    assert lengths.windows == ((883, 60), *[(887, 60)] * 11, (887, 30))
    assert (lengths.fine, lengths.fine_passes) == (((1024, 512),), 6)


def test_ten_seconds_need_a_second_fine_window(facts: Any) -> None:
    lengths = bench.lengths_of(facts, voice_of(300, 600), 499)
    assert lengths.frames == 750  # 749 in double precision
    assert lengths.fine == ((1024, 512), (1024, 512))


def test_a_short_voice_makes_short_windows(facts: Any) -> None:
    lengths = bench.lengths_of(facts, voice_of(101, 1000), 20)
    assert lengths.windows == ((257 + 301 - 2, 60),)  # 100 semantic tokens are 301 coarse ones
    assert bench.lengths_of(facts, voice_of(300, 400), 20).fine == ((1024, 624),)


def test_five_seconds_are_the_work_counted_by_hand(facts: Any) -> None:
    work = bench.count_work(FULL, bench.lengths_of(facts, voice_of(300, 600), 250))
    assert work.steps == 249 + 737  # each prefill makes a token, too
    # contexts 258 to 506; 884 to 942, eleven times 888 to 946, 888 to 916
    assert work.cached == 249 * 382 + 59 * 913 + 11 * 59 * 917 + 29 * 902
    heads = (249 * 10_001 + 737 * 2048) * 1024
    assert work.weights == 986 * 301_989_888 + heads
    prompt = 2 * 301_989_888 * 257 + 4 * 24 * 1024 * (257 * 258 // 2) + 2 * 1024 * 10_001
    assert work.flops["prompt"] == prompt
    fine = 2 * 301_989_888 * 1024 + 4 * 24 * 1024 * 1024**2 + 2 * 1024 * 512 * 1024
    assert work.flops["fine passes"] == 6 * fine


def test_the_floor_shares_the_weights_and_nothing_else(facts: Any) -> None:
    work = bench.count_work(FULL, bench.lengths_of(facts, voice_of(300, 600), 250))
    rates = bench.Rates(bandwidth=4e12, matmul=6e14, itemsize=2)
    floors = [bench.floor_seconds(FULL, work, rates, batch) for batch in (1, 2, 3)]
    each = work.cached * 98_304 / 4e12 + sum(work.flops.values()) / 6e14
    assert floors[0] == pytest.approx(2 * work.weights / 4e12 + each)
    assert [floors[1] - floors[0], floors[2] - floors[1]] == pytest.approx([each, each])


def test_operations_are_those_that_torch_counts(toy_bench: bench.Bench) -> None:
    fine = toy_bench.model("float32").fine_acoustics
    with FlopCounterMode(display=False) as counter:
        fine(2, torch.zeros(1, 1024, 8, dtype=torch.long))
    assert counter.get_total_flops() == toy_bench.widths.flops(1024, 1024**2, 1024 * 1056)


def test_generate_makes_the_passes_that_are_counted(toy_bench: bench.Bench) -> None:
    model, lengths = toy_bench.model("float32"), toy_bench.lengths
    passes: dict[str, list[int]] = {"semantic": [], "coarse_acoustics": [], "fine_acoustics": []}
    for name, seen in passes.items():
        block = getattr(model, name).layers[0]
        block.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(
            inputs[0].shape[1]))
    assert toy_bench.generate(model, 1, toy_bench.tokens) == [toy_bench.samples]
    assert passes["semantic"] == [lengths.prompt, *[1] * (lengths.semantic - 1)]
    assert passes["coarse_acoustics"] == [
        length for prefill, made in lengths.windows for length in (prefill, *[1] * (made - 1))]
    assert passes["fine_acoustics"] == [window for window, _ in lengths.fine
                                        for _ in range(lengths.fine_passes)]


def test_the_voices_that_are_used_are_the_same_work(toy_bench: bench.Bench) -> None:
    assert len(toy_bench.voices) > 8
    assert len({bench.lengths_of(toy_bench.facts, voice, 100) for voice in toy_bench.voices}) == 1


def test_another_number_of_samples_is_told(toy_bench: bench.Bench) -> None:
    right = toy_bench.samples
    toy_bench.attempt("right", 2, "float32", lambda *_: (1.0, 0.5, [right, right]))
    assert not toy_bench.wrong
    toy_bench.attempt("odd", 2, "float32", lambda *_: (1.0, 0.5, [right, right - 320]))
    assert toy_bench.wrong and "WRONG: odd at 2" in bench.closing(toy_bench)


def test_a_row_that_fails_or_does_not_fit_leaves_the_others(toy_bench: bench.Bench) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    toy_bench.rates["float32"] = bench.Rates(1e10, 1e11, 4)
    done = (4.0, 1.0, [toy_bench.samples])
    toy_bench.attempt(bench.ALONE, 1, "float32", lambda *_: done)
    toy_bench.attempt(bench.OURS, 2, "float32", full)
    toy_bench.attempt(bench.OURS, 1000, "float32", lambda *_: done)  # 4000 s of 8 minutes
    notes = [line.split(" | ")[3] for line in bench.table(toy_bench).splitlines()[2:]]
    assert notes[1:] == ["out of memory", "not run (time)"]
    assert float(notes[0]) == pytest.approx(toy_bench.audio / 4, rel=0.01)


@pytest.mark.long  # run.sh has no room for it
def test_the_command_prints_a_table_with_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cpu", "--size", "toy", "--seconds", "0.3", "--batches", "1,2",
                       "--baseline-batches", "2", "--profile"]) == 0
    told = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in told.splitlines() if "|" in line]
    header, rows = lines[0], lines[2:]
    assert [(row[0], row[1]) for row in rows] == [
        (bench.ALONE, "1"), (bench.OURS, "1"), (bench.OURS, "2"), (bench.BATCHED, "2")]
    speed, ratio = header.index("audio s/s"), header.index("x generate one by one")
    for row in rows:
        alone = float(row[speed]) / float(rows[0][speed])
        assert float(row[ratio]) == pytest.approx(alone, rel=0.02)
    assert "Random weights" in told and "ms in all" in told
