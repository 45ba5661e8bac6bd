"""The engine against `BarkModel.generate`: same folder, same text, same voice, same samples."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import toy_model
from conftest import BUILTIN
from engines import TEXTS, Bench, assert_same_pcm, reference


@pytest.fixture(scope="module")
def greedy(bark: ModuleType, greedy_toy: Path) -> Bench:
    return Bench(bark, greedy_toy, slots=20)


@pytest.fixture(scope="module")
def sampling(bark: ModuleType, toy: Path) -> Bench:
    return Bench(bark, toy)


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.long)])
def test_greedy_audio_of_many_texts_equals_generate_alone_and_together(
        bark: ModuleType, greedy: Bench, greedy_toy: Path, count: int) -> None:
    chosen = list(TEXTS.items())[:count]
    together = greedy.samples([greedy.segment(*item) for item in chosen])
    assert len({len(samples) for samples in together}) >= count * 0.6  # that really differ
    for beside, (text, voice) in zip(together, chosen, strict=True):
        expected = reference(greedy_toy, text, voice, min_eos_p=0.2)
        assert_same_pcm(bark, beside, expected)
        assert_same_pcm(bark, greedy.samples([greedy.segment(text, voice)])[0], expected)


def test_greedy_audio_of_several_fine_windows_equals_generate(
        bark: ModuleType, tmp_path: Path) -> None:
    toy_model.build(tmp_path, greedy=True, eos="late")
    text, bench = "A longer tale, told by the fire.", Bench(bark, tmp_path, slots=1)
    voice = next(name for name, v in bench.facts.voices.items() if v.fine.shape[1] > 512)
    ours = bench.samples([bench.segment(text, voice)])[0]
    assert len(ours) / 320 + 512 > 1024  # frames, with the voice's: more than one window
    assert_same_pcm(bark, ours, reference(tmp_path, text, voice, min_eos_p=0.2))


def test_greedy_audio_of_another_layout_of_ids_and_windows_equals_generate(
        bark: ModuleType) -> None:
    bench, greedy = Bench(bark, BUILTIN), bark.Sampling(0.0)
    text, voice = "The old horse is in the field.", "v2/en_speaker_9"
    segment = bench.segment(text, voice, semantic_sampling=greedy, coarse_sampling=greedy)
    expected = reference(BUILTIN, text, voice, min_eos_p=0.2, semantic_do_sample=False,
                         coarse_do_sample=False)
    assert_same_pcm(bark, bench.samples([segment])[0], expected)


def test_sampled_audio_depends_on_the_seed_and_not_on_the_neighbours(
        bark: ModuleType, sampling: Bench) -> None:
    segments = [sampling.segment(text, voice, seed=7) for text, voice in list(TEXTS.items())[:8]]
    together = sampling.samples(segments)
    for segment, beside in list(zip(segments, together, strict=True))[:3]:
        assert_same_pcm(bark, sampling.samples([segment])[0], beside)
    other = sampling.samples([bark.replace(segments[1], seed=8)])[0]
    assert len(other) != len(together[1]) or not np.allclose(other, together[1])


def test_one_fixed_step_shape_gives_the_same_bits_in_half_precision(
        bark: ModuleType, toy: Path) -> None:
    bench = Bench(bark, toy, slots=3, dtype=torch.bfloat16, fixed_shape=True)
    segments = [bench.segment(text, voice) for text, voice in list(TEXTS.items())[:3]]
    together = bench.samples(segments)
    for segment, beside in zip(segments, together, strict=True):
        assert np.array_equal(bench.samples([segment])[0], beside)


def test_min_eos_p_ends_speech_sooner_just_as_in_generate(
        greedy: Bench, greedy_toy: Path) -> None:
    text, voice = "The rain came down in sheets.", "v2/en_speaker_6"
    lengths = []
    for min_eos_p in (None, 1e-6):
        ours = greedy.samples([greedy.segment(text, voice, min_eos_p=min_eos_p)])[0]
        assert len(ours) == len(reference(greedy_toy, text, voice, min_eos_p=min_eos_p))
        lengths.append(len(ours))
    assert lengths[1] < lengths[0]


def test_coarse_tokens_stay_in_their_own_codebook(
        bark: ModuleType, sampling: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    start = bark.Fine.add
    monkeypatch.setattr(bark.Fine, "add",
                        lambda fine, s: (seen.extend(s.coarse), start(fine, s))[1])
    sampling.samples([sampling.segment("Hello there.", "v2/en_speaker_6")])
    assert len(seen) > 60
    assert all(10_000 + 1024 * (i % 2) <= token < 11_024 + 1024 * (i % 2)
               for i, token in enumerate(seen))


def test_an_empty_generation_is_made_again_with_a_plausible_length(
        bark: ModuleType, tmp_path: Path) -> None:
    toy_model.build(tmp_path, eos="first")
    bench = Bench(bark, tmp_path, slots=2)
    short, longer = bench.samples([bench.segment("Hi", "v2/en_speaker_6"),
                                   bench.segment("Hello there, you", "v2/en_speaker_6")])
    assert 0.15 * 24_000 < len(short) < len(longer)
    assert np.abs(short).max() > 0.01


def test_a_generation_never_exceeds_its_limit_of_new_tokens(
        bark: ModuleType, tmp_path: Path) -> None:
    toy_model.build(tmp_path, eos="never")
    bench = Bench(bark, tmp_path, slots=1)
    segment = bench.segment("Hello", "v2/en_speaker_6", max_new_tokens=100)
    assert len(bench.samples([segment])[0]) == int(100 * 75 / 49.9) * 320


def test_what_is_not_finite_is_an_error_and_leaves_the_neighbour_alone(
        bark: ModuleType, toy: Path) -> None:
    bench = Bench(bark, toy)
    good, bad = (bench.segment(text, "v2/en_speaker_6") for text in ("Hello", "Q"))
    expected = bench.samples([good])[0]
    numbers, embeddings = bench.facts.semantic, bench.engine.model.semantic.input_embeds_layer
    with torch.no_grad():
        embeddings.weight[numbers.text_encoding_offset + bad.text_ids[0]] = math.nan
    fine, broken = bench.run([good, bad])
    assert broken.samples is None and "not finite" in broken.error
    assert_same_pcm(bark, fine.samples, expected)


def test_samples_that_are_not_finite_are_an_error(bark: ModuleType, toy: Path) -> None:
    bench = Bench(bark, toy)
    with torch.no_grad():
        next(bench.engine.model.codec_model.decoder.parameters())[:] = math.inf
    assert bench.run([bench.segment("Hello", "v2/en_speaker_6")])[0].samples is None


def test_an_aborted_segment_frees_its_slot_within_a_step(bark: ModuleType, greedy: Bench) -> None:
    kept = greedy.segment("The rain came down in sheets, and nobody spoke.", "v2/en_speaker_9")
    expected = greedy.samples([kept])[0]
    for steps in (1, 5, 60, 100):  # in every stage
        dropped = greedy.segment("It was the best of times.", "v2/en_speaker_1")
        for segment in (dropped, kept):
            greedy.engine.add(segment)
        done = [f for _ in range(steps) for f in greedy.engine.step()]
        greedy.engine.abort(dropped)
        assert greedy.engine.free_slots == greedy.engine.slots - 1
        while not done:
            done = greedy.engine.step()
        assert_same_pcm(bark, done[0].samples, expected)


def draw(bark: ModuleType, scores: torch.Tensor, mixed: list[Any], seed: int) -> torch.Tensor:
    """What `sample` picks for rows of scores, each with its own sampling and random stream."""
    states = bark.stream_states(torch.full((len(mixed),), seed), torch.arange(len(mixed)))
    floats = torch.tensor([bark.sampling_floats(one) for one in mixed]).T
    return bark.sample(scores.expand(len(mixed), -1), states, bark.reach_of(mixed, len(scores)),
                       floats, torch.tensor([one.top_k for one in mixed]))


def test_noise_follows_the_softmax(bark: ModuleType) -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(-1)
    picked = draw(bark, scores, [bark.Sampling(1.0)] * 20_000, 3)
    shares = torch.bincount(picked, minlength=4) / len(picked)
    assert torch.allclose(shares, scores.exp(), atol=0.015)  # four standard errors


@pytest.mark.parametrize(("sampling", "allowed"), [
    ({"temperature": 1.0, "top_k": 2}, {0, 1}), ({"temperature": 1.0, "top_p": 0.7}, {0, 1}),
    ({"temperature": 0.0}, {0}), ({"temperature": 1.0, "top_k": 50}, {0, 1, 2, 3}),
    ({"temperature": 0.01}, {0}), ({"temperature": 1.0, "top_k": 3, "top_p": 0.99}, {0, 1, 2})])
@pytest.mark.parametrize("beside", [{"temperature": 1.0}, {"temperature": 0.0}])
def test_each_row_has_its_own_sampling(bark: ModuleType, sampling: dict[str, float],
                                       allowed: set[int], beside: dict[str, float]) -> None:
    scores = torch.tensor([1.0, 0.8, -0.5, -1.5])
    picked = draw(bark, scores, [bark.Sampling(**sampling), bark.Sampling(**beside)] * 500, 5)
    assert set(picked[::2].tolist()) == allowed
    assert set(picked[1::2].tolist()) == ({0, 1, 2, 3} if beside["temperature"] else {0})


@pytest.mark.parametrize(("section", "expected"), [
    ({}, (0.0, 0, 1.0)),
    ({"do_sample": False, "temperature": 0.7}, (0.0, 0, 1.0)),
    ({"do_sample": True}, (1.0, 50, 1.0)),
    ({"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9}, (0.6, 0, 0.9)),
    ({"do_sample": True, "temperature": None, "top_k": None}, (1.0, 50, 1.0))])
def test_sampling_is_read_as_generate_reads_it(
        bark: ModuleType, section: dict[str, Any], expected: tuple[float, int, float]) -> None:
    assert bark.read_sampling(section) == bark.Sampling(*expected)


@pytest.mark.parametrize(("temperature", "do_sample", "coarse", "expected"), [
    (0.5, False, 0.7, 0.5), (0.5, False, 0.0, 0.0), (0.5, None, 0.0, 0.5), (1.0, None, 0.7, 0.0),
    (None, None, 0.7, 0.0)])
def test_the_fine_stage_reads_its_temperature_as_bark_means_it(
        bark: ModuleType, temperature: float | None, do_sample: bool | None, coarse: float,
        expected: float) -> None:
    section = {"temperature": temperature, "do_sample": do_sample}
    assert bark.read_fine_sampling(section, bark.Sampling(coarse)).temperature == expected


def altered(source: Path, target: Path, file: str, change: Any) -> Path:
    """A copy of a model folder in which `change` has edited one JSON file."""
    shutil.copytree(source, target)
    content = json.loads((target / file).read_text())
    change(content)
    (target / file).write_text(json.dumps(content))
    return target


def test_windows_that_do_not_fit_the_network_are_refused(
        bark: ModuleType, toy: Path, tmp_path: Path) -> None:
    folder = altered(toy, tmp_path / "m", "generation_config.json",
                     lambda c: c["coarse_acoustics_config"].update(max_coarse_history=720))
    with pytest.raises(bark.ModelError, match="coarse_acoustics has 1024 positions"):
        Bench(bark, folder)


def test_a_voice_outside_the_folder_or_with_wrong_ids_is_left_out(
        bark: ModuleType, toy: Path, tmp_path: Path) -> None:
    folder = altered(toy, tmp_path / "m", "speaker_embeddings_path.json", lambda table:
                     table["v2/en_speaker_1"].update(semantic_prompt="../secret.npy"))
    prompts = folder / "speaker_embeddings" / "v2"
    np.save(tmp_path / "secret.npy", np.arange(300))
    np.save(prompts / "en_speaker_2_semantic_prompt.npy", np.array([1, 10_000]))
    np.save(prompts / "en_speaker_3_fine_prompt.npy", np.zeros((2, 300), np.int32))
    np.save(prompts / "en_speaker_4_semantic_prompt.npy", np.arange(300, dtype=np.uint16))
    (prompts / "en_speaker_5_coarse_prompt.npy").write_bytes(b"no array")
    voices = bark.ModelFacts(folder).voices
    gone = {f"v2/en_speaker_{i}" for i in range(10)} - voices.keys()
    assert gone == {f"v2/en_speaker_{i}" for i in (1, 2, 3, 5)}


def test_weights_that_lack_a_tensor_are_refused(
        bark: ModuleType, toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy, tmp_path / "m")
    state = torch.load(tmp_path / "m" / "pytorch_model.bin", weights_only=True)
    del state["semantic.lm_head.weight"]
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(bark.ModelError, match=r"lack 1 tensors: semantic.lm_head.weight"):
        Bench(bark, tmp_path / "m")


def test_a_slot_that_was_not_finite_once_does_not_spoil_its_next_holder(
        bark: ModuleType, toy: Path) -> None:
    bench = Bench(bark, toy, slots=2)
    long_text = "The rain came down in sheets, and nobody spoke."
    segments = [bench.segment(long_text, "v2/en_speaker_9"), bench.segment("Hi", "v2/en_speaker_6")]
    for batch in (bench.engine.semantic.batch, bench.engine.coarse.batch):
        with torch.inference_mode():
            batch.gpt.kv[:, :, 1, :, -1] = math.nan  # past every token, but under the mask
        batch.fixed_shape = True  # every step looks at every column
    assert all(finished.samples is not None for finished in bench.run(segments))


def test_the_codec_computes_in_float32_whatever_the_weights_are(
        bark: ModuleType, toy: Path) -> None:
    model = Bench(bark, toy, slots=1, dtype=torch.bfloat16).engine.model
    assert {p.dtype for p in model.codec_model.parameters()} == {torch.float32}
    assert model.semantic.lm_head.weight.dtype == torch.bfloat16
