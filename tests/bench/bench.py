#!/usr/bin/env python3
"""How fast is the engine: against `BarkModel.generate` on the same work, and against the device.

    python3 tests/bench/bench.py                            # bark's shape on a GPU, under 8 minutes
    python3 tests/bench/bench.py --device cpu --size small  # bark-small's shape, for a CPU

Nothing is downloaded: the networks have the shapes of suno/bark or suno/bark-small and random
weights, tokenizer, windows, sampling and voices are those of toy_model.py, which are Suno's. Every
segment is made to last exactly --seconds, for the end token can never be drawn: its logit is 0
where 10,000 others are random, far from the best 50. All voices fill their history windows, so
that each segment is the same work, also for `generate`, which takes one voice for a whole batch.

The table goes to stdout as Markdown, progress to stderr. The floor is the time that the device,
by its own measured rates, needs for what has to be read and computed if nothing overlaps. The exit
status is 1 if an engine made another number of samples than it should have.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import math
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers looks
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fakes"))

import torch
import toy_model
import transformers
from transformers import BarkConfig, BarkModel, GenerationConfig

WORKER = Path(__file__).resolve().parents[2] / "bark-worker.py"
TEXT = "The rain came down in sheets, and nobody spoke a word until the lamp went out at last."
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
REPEATS, REPEAT_SECONDS = 3, 30.0  # of one-by-one generate: as often as fits
RATE_REPEATS = 7  # of the device's own rates
PROFILE_SECONDS, PROFILE_SKIPPED, PROFILE_ROWS = 0.2, 5, 15
WARM_TOKENS = 16
OURS, ALONE, BATCHED = "bark-worker", "generate, one by one", "generate, batched"


# Counting: what one segment takes, from shapes and lengths alone

@dataclass(frozen=True)
class Widths:
    """The shape that the three transformers share."""

    layers: int
    heads: int
    hidden: int

    @property
    def block_weights(self) -> int:
        """Elements of the blocks' matrices: a layer has 4 h^2 in attention and 8 h^2 in its MLP."""
        return self.layers * 12 * self.hidden ** 2

    def cache_bytes(self, itemsize: int) -> int:
        """Keys and values of one position."""
        return 2 * self.layers * self.hidden * itemsize

    def flops(self, tokens: int, pairs: int, logits: int) -> int:
        """Of `tokens` through the blocks, `pairs` of query and key, `logits` computed."""
        attention = 4 * self.layers * self.hidden * pairs  # QK and AV, 2 each
        return 2 * self.block_weights * tokens + attention + 2 * self.hidden * logits


SIZES = {"full": Widths(24, 16, 1024), "small": Widths(12, 12, 768), "toy": Widths(2, 2, 32)}


@dataclass(frozen=True)
class Lengths:
    """Tokens of one segment, stage by stage."""

    prompt: int                           # positions of the semantic prefill
    semantic: int                         # tokens made
    windows: tuple[tuple[int, int], ...]  # coarse: positions of each prefill, tokens made after it
    fine: tuple[tuple[int, int], ...]     # positions of each fine window, frames filled in it
    fine_passes: int                      # for each window
    frames: int
    semantic_ids: int                     # logits a step can choose from
    coarse_ids: int
    fine_ids: int


@dataclass(frozen=True)
class Work:
    """One segment's work; the weights are read once for all segments that step together."""

    steps: int
    weights: int         # elements read in all steps
    cached: int          # positions of the KV cache read, summed over the steps
    flops: dict[str, int]


def coarse_frames(tokens: int, ratio: float) -> int:
    """Frames for `tokens` semantic ones, in float32 as `generate` counts them."""
    return int(torch.floor(torch.tensor(tokens) * ratio / 2))


def coarse_windows(history: int, total: int, facts: Any) -> tuple[tuple[int, int], ...]:
    """(prefill positions, tokens made) of each window for `total` coarse tokens."""
    numbers = facts.coarse
    prefix, step = numbers.max_coarse_input_length + 1, numbers.sliding_window_len
    return tuple((prefix + min(numbers.max_coarse_history, history + made),
                  min(step, total - made)) for made in range(0, total, step))


def fine_windows(history: int, frames: int, facts: Any) -> tuple[tuple[int, int], ...]:
    """(positions, frames filled) of each window, the first of which starts with the history."""
    window, hop = facts.fine.max_fine_input_length, facts.fine.max_fine_history_length
    count = 1 + max(0, math.ceil((frames - (window - history)) / hop))
    length = max(window, history + frames)
    fills = (min(history + i * hop, length - hop) - min(i * hop, length - window)
             for i in range(count))
    return tuple((window, window - fill) for fill in fills)


def lengths_of(facts: Any, voice: Any, tokens: int) -> Lengths:
    """The lengths of a segment of `tokens` semantic tokens in the windows of `facts`."""
    ratio, books = facts.semantic_to_coarse, facts.coarse.n_coarse_codebooks
    frames = coarse_frames(tokens, ratio)
    heard = min(int(facts.coarse.max_coarse_history // ratio),
                len(voice.semantic) - len(voice.semantic) % 2,
                int(voice.coarse.size // ratio))
    history = round(heard * ratio) - 2  # the last two are dropped
    kept = min(voice.fine.shape[1], facts.fine.max_fine_history_length)
    return Lengths(
        facts.semantic.max_input_semantic_length + 1, tokens,
        coarse_windows(history, frames * books, facts), fine_windows(kept, frames, facts),
        facts.fine.n_fine_codebooks - books, frames, facts.semantic.semantic_vocab_size + 1,
        books * facts.codebook_size, facts.codebook_size)


def sum_to(length: int) -> int:
    return length * (length + 1) // 2


def steps_after(prefill: int, made: int) -> tuple[int, int]:
    """Decode steps for `made` tokens, the first of which is the prefill's, and their contexts."""
    return made - 1, sum_to(prefill + made - 1) - sum_to(prefill)


def count_work(widths: Widths, lengths: Lengths) -> Work:
    """Prefills and fine passes by operations, decode steps by weights and cache read as well."""
    semantic_steps, semantic_context = steps_after(lengths.prompt, lengths.semantic)
    coarse = [steps_after(prefill, made) for prefill, made in lengths.windows]
    coarse_steps, coarse_context = sum(s for s, _ in coarse), sum(c for _, c in coarse)
    steps, cached = semantic_steps + coarse_steps, semantic_context + coarse_context
    logits = semantic_steps * lengths.semantic_ids + coarse_steps * lengths.coarse_ids
    flops = {
        "prompt": widths.flops(lengths.prompt, sum_to(lengths.prompt), lengths.semantic_ids),
        "window restarts": sum(widths.flops(prefill, sum_to(prefill), lengths.coarse_ids)
                               for prefill, _ in lengths.windows),
        "fine passes": lengths.fine_passes * sum(
            widths.flops(window, window ** 2, filled * lengths.fine_ids)
            for window, filled in lengths.fine),
        "decode": widths.flops(steps, cached, logits)}
    return Work(steps, steps * widths.block_weights + logits * widths.hidden, cached, flops)


@dataclass(frozen=True)
class Rates:
    """What the device does at best in one dtype, measured."""

    bandwidth: float  # bytes a second, read and written
    matmul: float     # operations a second
    itemsize: int     # bytes an element


def floor_seconds(widths: Widths, work: Work, rates: Rates, batch: int) -> float:
    """For `batch` segments at once if nothing overlaps: weights once, cache and flops for each."""
    read = work.weights * rates.itemsize
    read += batch * work.cached * widths.cache_bytes(rates.itemsize)
    return read / rates.bandwidth + batch * sum(work.flops.values()) / rates.matmul


# The device

def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    times = []
    for _ in range(RATE_REPEATS):
        began = clock(device)
        run()
        times.append(clock(device) - began)
    return statistics.median(times)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """A large copy and a large square matmul of random numbers."""
    on_gpu = device.type == "cuda"
    source = torch.ones((2 << 30) if on_gpu else (256 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device)
    side = 8192 if on_gpu else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    square = median_seconds(lambda: torch.mm(a, b, out=product), device)
    return Rates(2 * source.numel() / copy, 2 * side ** 3 / square, dtype.itemsize)


def forget_peak(device: torch.device) -> None:
    """From here on `peak_bytes` counts anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Linux; elsewhere the peak is the whole run's
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


# Model and worker

def load_worker(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bark_worker", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bark_worker"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def bark_config(widths: Widths) -> BarkConfig:
    """The hub's vocabularies, blocks and codec; the toy's codec is narrow too."""
    size = {"num_layers": widths.layers, "num_heads": widths.heads, "hidden_size": widths.hidden,
            "bias": False, "block_size": 1024}
    wide = widths is not SIZES["toy"]
    return BarkConfig(
        semantic_config={**size, "input_vocab_size": 129_600, "output_vocab_size": 10_048},
        coarse_acoustics_config={
            **size, "input_vocab_size": 12_096, "output_vocab_size": 12_096},
        fine_acoustics_config={
            **size, "input_vocab_size": 1056, "output_vocab_size": 1056,
            "n_codes_total": 8, "n_codes_given": 1},
        codec_config={
            "model_type": "encodec", "sampling_rate": 24_000, "num_filters": 32 if wide else 2,
            "hidden_size": 128 if wide else 16, "codebook_dim": 128 if wide else 16,
            "codebook_size": 1024, "upsampling_ratios": [8, 5, 4, 2], "num_lstm_layers": 2,
            "norm_type": "weight_norm", "use_causal_conv": True,
            "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0]})


def random_model(widths: Widths, device: torch.device, dtype: torch.dtype,
                 folder: Path, eos: int) -> BarkModel:
    """Seeded weights N(0, 0.02), drawn on the device; the codec in float32 as in the worker."""
    torch.manual_seed(0)
    with torch.device(device):
        model = BarkModel(bark_config(widths)).eval().requires_grad_(False)
    for layer in model.codec_model.quantizer.layers:
        layer.codebook.embed.normal_()
    model.semantic.lm_head.weight[eos] = 0  # never the best nor among the best 50
    for stage in (model.semantic, model.coarse_acoustics, model.fine_acoustics):
        stage.to(dtype)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def full_voices(facts: Any) -> list[Any]:
    """Voices that fill every history window: the same work with each of them."""
    def is_full(voice: Any) -> bool:
        return (len(voice.semantic) >= facts.semantic.max_input_semantic_length
                and voice.fine.shape[1] >= facts.fine.max_fine_history_length
                and voice.coarse.size >= facts.coarse.max_coarse_history)

    return [voice for voice in facts.voices.values() if is_full(voice)]


# Runs

@dataclass(frozen=True)
class Row:
    """`batch` segments made in `wall` seconds, or `note` tells why not."""

    engine: str
    batch: int
    dtype: str
    wall: float = math.nan
    first: float = math.nan  # seconds until the first segment is finished
    memory: int = 0
    note: str = ""


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@dataclass
class Bench:
    """One device, one size, one length of segment; rows are made one after the other."""

    options: argparse.Namespace
    worker: ModuleType
    folder: Path
    began: float
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # what an engine made otherwise than told
    notes: list[str] = field(default_factory=list)
    rates: dict[str, Rates] = field(default_factory=dict)
    loaded: tuple[str, BarkModel] | None = None
    warm: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.device = torch.device(self.options.device)
        if self.device.type == "cpu":
            self.notes.append(f"Load average at the start: {os.getloadavg()[0]:.1f} on"
                              f" {os.cpu_count()} cores; what else runs distorts the ratios.")
        self.widths = SIZES[self.options.size]
        self.facts = self.worker.ModelFacts(self.folder)
        self.voices = full_voices(self.facts)
        self.tokens = round(self.options.seconds * self.facts.semantic.semantic_rate_hz)
        self.lengths = lengths_of(self.facts, self.voices[0], self.tokens)
        self.work = count_work(self.widths, self.lengths)
        hop = math.prod(bark_config(self.widths).codec_config.upsampling_ratios)
        self.samples = self.lengths.frames * hop
        self.audio = self.samples / self.facts.sample_rate  # seconds, of one segment

    def model(self, dtype: str) -> BarkModel:
        """The network in `dtype`; only one is kept, so that peak memory is one model's."""
        if self.loaded is None or self.loaded[0] != dtype:
            self.loaded = None
            gc.collect()
            say(f"{self.spent():6.1f} s  building the {self.options.size} model in {dtype}")
            eos = self.facts.semantic.eos_token_id
            self.loaded = dtype, random_model(
                self.widths, self.device, DTYPES[dtype], self.folder, eos)
        return self.loaded[1]

    def spent(self) -> float:
        return time.perf_counter() - self.began

    def fits(self, engine: str, batch: int) -> bool:
        """Whether the row ends in time, if it takes each segment as long as the last row did."""
        done = [r for r in self.rows if r.wall > 0 and (r.engine == engine or r.engine == ALONE)]
        guess = done[-1].wall / done[-1].batch * batch if done else 0.0
        return self.spent() + guess < 60 * self.options.max_minutes

    def attempt(self, engine: str, batch: int, dtype: str,
                run: Callable[[int, str], tuple[float, float, list[int]]]) -> None:
        """Adds the row of `run(batch, dtype)` -> seconds, seconds to the first, sample counts."""
        if not self.fits(engine, batch):
            self.rows.append(Row(engine, batch, dtype, note="not run (time)"))
            return
        say(f"{self.spent():6.1f} s  {engine}, {batch} at once, {dtype}")
        self.model(dtype)
        forget_peak(self.device)
        try:
            wall, first, counts = run(batch, dtype)
        except torch.OutOfMemoryError:
            self.rows.append(Row(engine, batch, dtype, note="out of memory"))
            return
        if counts != [self.samples] * batch:
            self.wrong.append(f"{engine} at {batch} made {sorted(set(counts))} samples a segment,"
                              f" not {self.samples}")
        self.rows.append(Row(engine, batch, dtype, wall, first, peak_bytes(self.device)))
        say(f"{self.spent():6.1f} s  {batch * self.audio / wall:.2f} s of audio a second")

    # Ours

    def segment(self, index: int, tokens: int) -> Any:
        facts = self.facts
        return self.worker.Segment(
            text_ids=facts.tokenize(TEXT), voice=self.voices[index % len(self.voices)],
            seed=index, semantic_sampling=facts.semantic_sampling,
            coarse_sampling=facts.coarse_sampling, fine_sampling=facts.fine_sampling,
            min_eos_p=facts.semantic.min_eos_p, max_new_tokens=tokens)

    def engine(self, batch: int, dtype: str) -> Any:
        """A new engine, warmed up by the worker's own function, on a CPU only the first one."""
        began = clock(self.device)
        engine = self.worker.Engine(self.model(dtype), self.facts, batch, self.options.fixed_shape)
        if self.device.type == "cuda" or OURS not in self.warm:
            speech = SimpleNamespace(segments=[self.segment(0, WARM_TOKENS)])
            self.worker.warm_up(engine, SimpleNamespace(plan=lambda *_: speech))
            self.warm.add(OURS)
        say(f"{self.spent():6.1f} s  engine ready in {clock(self.device) - began:.1f} s")
        return engine

    def run_ours(self, batch: int, dtype: str) -> tuple[float, float, list[int]]:
        engine = self.engine(batch, dtype)
        waiting = [self.segment(index, self.tokens) for index in range(batch)]
        done: list[Any] = []
        first = math.nan
        began = clock(self.device)
        while len(done) < batch:
            while waiting and engine.free_slots > 0:  # all at once, unless memory made it fewer
                engine.add(waiting.pop(0))
            done += engine.step()
            if done and math.isnan(first):
                first = clock(self.device) - began
        wall = clock(self.device) - began
        if engine.slots < batch:
            self.notes.append(f"{OURS} at {batch} had memory for {engine.slots} at once.")
        counts = [-1 if f.samples is None else len(f.samples) for f in done]
        return wall, first, counts

    # BarkModel.generate

    def generate(self, model: BarkModel, batch: int, tokens: int) -> list[int]:
        """Sample counts of a batch of equal texts in the first voice."""
        facts, voice = self.facts, self.voices[0]
        ids = facts.tokenize(TEXT)
        padded = torch.zeros(batch, facts.semantic.max_input_semantic_length, dtype=torch.long)
        padded[:, : len(ids)] = torch.tensor(ids)
        mask = (torch.arange(padded.shape[1]) < len(ids)).long().expand_as(padded)
        history = {f"{name}_prompt": torch.from_numpy(getattr(voice, name)).to(self.device)
                   for name in ("semantic", "coarse", "fine")}
        audio = model.generate(
            padded.to(self.device), history_prompt=history, attention_mask=mask.to(self.device),
            semantic_max_new_tokens=tokens, min_eos_p=facts.semantic.min_eos_p)
        return [len(samples) for samples in audio.float().cpu().numpy()]

    def run_generate(self, batch: int, dtype: str) -> tuple[float, float, list[int]]:
        """Alone it is the median of some runs."""
        model = self.model(dtype)
        torch.manual_seed(batch)
        if self.device.type == "cuda" or ALONE not in self.warm:
            self.generate(model, batch, WARM_TOKENS)
            self.warm.add(ALONE)
        times: list[float] = []
        while not times or (batch == 1 and len(times) < REPEATS
                            and sum(times) + times[-1] < REPEAT_SECONDS):
            began = clock(self.device)
            counts = self.generate(model, batch, self.tokens)
            times.append(clock(self.device) - began)
        wall = statistics.median(times)
        return wall, wall, counts

    def run(self) -> None:
        """One-by-one generate first, which the others are compared with; batched generate last."""
        options = self.options
        self.measure_device()
        self.attempt(ALONE, 1, options.baseline_dtype, self.run_generate)
        for batch in options.batches:
            self.attempt(OURS, batch, options.dtype, self.run_ours)
        for batch in options.baseline_batches:
            self.attempt(BATCHED, batch, options.baseline_dtype, self.run_generate)
        self.measure_device()

    def measure_device(self) -> None:
        """Its rates, before and after the rows; the better count, for others may disturb."""
        for dtype in dict.fromkeys((self.options.dtype, self.options.baseline_dtype)):
            new = measure_rates(self.device, DTYPES[dtype])
            old = self.rates.get(dtype, new)
            self.rates[dtype] = Rates(max(old.bandwidth, new.bandwidth),
                                      max(old.matmul, new.matmul), new.itemsize)

    def profile(self) -> str:
        """Where the time goes in a short while of decoding one segment."""
        from torch.profiler import ProfilerActivity, profile

        engine = self.engine(1, self.options.dtype)
        engine.add(self.segment(0, self.tokens))
        for _ in range(PROFILE_SKIPPED):
            engine.step()
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        steps, began = 0, clock(self.device)
        with profile(activities=activities) as profiler:
            while engine.free_slots == 0 and time.perf_counter() - began < PROFILE_SECONDS:
                engine.step()
                steps += 1
            wall = clock(self.device) - began
        return f"Profile of {steps} steps, {1000 * wall:.0f} ms:" + top_events(profiler, activities)


def top_events(profiler: Any, activities: list[Any]) -> str:
    """The kernels of a GPU, or else the operations, that took longest; and the time of all."""
    from torch.autograd import DeviceType

    on_gpu = len(activities) > 1
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    seen = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
            for event in profiler.key_averages() if event.device_type == kind]
    seen.sort(key=lambda pair: -pair[0])
    lines = [f"{micros / 1000:8.2f} ms {event.count:6d} x  {event.key[:75]}"
             for micros, event in seen[:PROFILE_ROWS]]
    lines.append(f"{sum(micros for micros, _ in seen) / 1000:8.2f} ms in all")
    return "\n\n```\n" + "\n".join(lines) + "\n```"


# The report

def short(value: float) -> str:
    """Three significant digits, - for none."""
    if math.isnan(value):
        return "-"
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def table_line(bench: Bench, row: Row) -> str:
    cells = [row.engine, str(row.batch), row.dtype]
    if row.note:
        return "| " + " | ".join([*cells, row.note, *["-"] * 6]) + " |"
    rate = row.batch * bench.audio / row.wall
    alone = next((bench.audio / r.wall for r in bench.rows if r.engine == ALONE), math.nan)
    floor = floor_seconds(bench.widths, bench.work, bench.rates[row.dtype], row.batch)
    cells += [short(rate), short(1 / rate), short(row.first), f"{row.memory / 1e9:.2f}",
              short(rate / alone), short(floor), f"{100 * floor / row.wall:.0f} %"]
    return "| " + " | ".join(cells) + " |"


HEADER = ("engine", "at once", "dtype", "audio s/s", "RTF", "first segment s", "peak memory GB",
          "x generate one by one", "floor s", "of the floor")


def table(bench: Bench) -> str:
    head = ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
    return "\n".join(head + [table_line(bench, row) for row in bench.rows])


def heading(bench: Bench) -> str:
    options, widths = bench.options, bench.widths
    numbers = bench.facts
    voice = (f"temperature {numbers.semantic_sampling.temperature} and"
             f" {numbers.coarse_sampling.temperature}, top_k {numbers.semantic_sampling.top_k},"
             f" fine temperature {numbers.fine_sampling.temperature}")
    return (
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}; {device_name(bench.device)};"
        f" torch {torch.__version__}, transformers {transformers.__version__}.\n\n"
        f"Random weights in the shape of {options.size} Bark ({widths.layers} layers,"
        f" {widths.heads} heads, {widths.hidden} channels); fixed counts: every segment is"
        f" {bench.tokens} semantic tokens, {sum(made for _, made in bench.lengths.windows)} coarse"
        f" ones, {bench.audio:.2f} s; the end token never comes, and each voice fills its history"
        f" windows, so that all segments are the same work. Sampling of both: {voice}."
        + (" One fixed step shape." if options.fixed_shape else ""))


def roofline(bench: Bench) -> str:
    """What the floor is made of, for each second of audio."""
    work, lines = bench.work, []
    flops = ", ".join(f"{name} {value / bench.audio / 1e9:.0f}"
                      for name, value in work.flops.items())
    for dtype, rates in bench.rates.items():
        weights = work.weights * rates.itemsize / bench.audio / 1e9
        cached = work.cached * bench.widths.cache_bytes(rates.itemsize) / bench.audio / 1e9
        lines.append(
            f"- {dtype}: {weights:.1f} GB of weights in {work.steps / bench.audio:.0f} steps,"
            f" shared by all segments at once, and {cached:.1f} GB of KV cache; the device copies"
            f" {rates.bandwidth / 1e9:.0f} GB/s (read and written) and multiplies"
            f" {rates.matmul / 1e12:.3g} TFLOP/s.")
    lines.append(f"- GFLOP: {flops}. Not counted: EnCodec, embeddings, norms, sampling.")
    return "Floor, if nothing overlaps; for a second of audio:\n\n" + "\n".join(lines)


def closing(bench: Bench) -> str:
    same = [f"Every engine made {bench.samples} samples a segment."]
    if not any(row.wall > 0 for row in bench.rows):
        same = []
    lines = [f"WRONG: {line}." for line in bench.wrong] or same
    lines += bench.notes
    lines.append("Suno's own loop: not run, needs suno-ai/bark.")
    if bench.device.type == "cpu":
        lines.append("Peak memory is the process's, with libraries and weights.")
    if bench.options.dtype != bench.options.baseline_dtype:
        lines.append("The two dtypes differ: the ratio holds both the engine's part and theirs.")
    return "\n".join(f"- {line}" for line in lines)


def integers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part]
    if any(number < 1 for number in numbers):
        raise argparse.ArgumentTypeError("whole numbers from 1, with commas")
    return numbers


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--size", choices=SIZES, metavar="full|small", help="default: full on a GPU, else small")
    add("--seconds", type=float, help="of audio a segment (default: 5 on a GPU, else 2)")
    add("--batches", type=integers, help="default: 1,2,4,8,16,32,64 on a GPU, else 1,8")
    add("--baseline-batches", type=integers, help="default: 8,32 on a GPU, else 8")
    add("--dtype", choices=DTYPES, help="default: float16 on a GPU, else float32")
    add("--baseline-dtype", choices=DTYPES, help="default: the same")
    add("--threads", type=int, help="of a CPU; 1 where others use it, too (default: torch's own)")
    add("--fixed-shape", action="store_true", help="as with BARK_DETERMINISTIC=on")
    add("--profile", action="store_true", help="also show the slowest operations of decoding")
    add("--max-minutes", type=float, default=8.0, help="rows that fit no more are left out")
    add("--worker", type=Path, default=WORKER, help="another version of bark-worker.py")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device.startswith("cuda")
    options.size = options.size or ("full" if on_gpu else "small")
    options.seconds = options.seconds or (5.0 if on_gpu else 2.0)
    if options.batches is None:
        options.batches = [1, 2, 4, 8, 16, 32, 64] if on_gpu else [1, 8]
    if options.baseline_batches is None:
        options.baseline_batches = [8, 32] if on_gpu else [8]
    options.dtype = options.dtype or ("float16" if on_gpu else "float32")
    options.baseline_dtype = options.baseline_dtype or options.dtype
    return options


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    options = parse_arguments(arguments)
    transformers.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        say("  0.0 s  building tokenizer and voices")
        toy_model.build(Path(directory))
        bench = Bench(options, load_worker(options.worker), Path(directory), began)
        bench.run()
        print("\n\n".join([heading(bench), table(bench), roofline(bench), closing(bench)]))
        if options.profile:
            print(f"\n{bench.profile()}")
    say(f"{bench.spent():6.1f} s  done")
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
