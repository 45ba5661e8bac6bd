"""The toy model has the properties that the other tests lean on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_model
from transformers import AutoTokenizer, BarkModel, BarkProcessor
from transformers.generation.logits_process import AlternatingCodebooksLogitsProcessor
from transformers.models.bark.generation_configuration_bark import BarkSemanticGenerationConfig

TEXTS = (
    "x", "Hi.", "Hello, world!", "你好,世界。", "The red cat is in the park.",
    "Good morning, how are you today?", "She laughed, and then she was gone.",
    "It was the best of times, it was the worst of times.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "In the light of the moon, a little egg lay on a leaf, and it waited for the sun.",
)  # fmt: skip
WORDS = ("Hello", "Žluťoučký", "Ελλάδα", "Привет", "नमस्ते", "ひらがな", "カタカナ", "漢字", "한국어")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    toy_model.build(directory, greedy=True)
    return directory


@pytest.fixture(scope="module")
def model(toy: Path) -> BarkModel:
    return load(toy)[0]


@pytest.fixture(scope="module")
def processor(toy: Path) -> BarkProcessor:
    return load(toy)[1]


def semantic_length(
    model: BarkModel,
    processor: BarkProcessor,
    text: str,
    voice: str,
    min_eos_p: float | None = None,
    **kwargs: object,
) -> int:
    """Semantic tokens before the end token, as `BarkModel.generate` makes them.

    Like it, this passes min_eos_p always, so that the configuration's own does not count.
    """
    config = BarkSemanticGenerationConfig(**model.generation_config.semantic_config)
    inputs = processor(text, voice_preset=voice)
    kwargs = {**kwargs, "min_eos_p": min_eos_p, "semantic_generation_config": config}
    with torch.no_grad():
        tokens = model.semantic.generate(**inputs, **kwargs)
    return int((tokens != toy_model.SEMANTIC_PAD).sum())


def load(directory: Path) -> tuple[BarkModel, BarkProcessor]:
    processor = BarkProcessor.from_pretrained(directory)
    processor.speaker_embeddings["repo_or_path"] = str(directory)
    return BarkModel.from_pretrained(directory), processor


def test_model_loads_without_missing_or_unexpected_keys(toy: Path) -> None:
    _, info = BarkModel.from_pretrained(toy, output_loading_info=True)
    assert not any(info.values()), info


def test_weights_file_has_the_old_key_layout(toy: Path) -> None:
    state = torch.load(toy / "pytorch_model.bin", weights_only=True)
    assert "codec_model.decoder.layers.0.conv.weight_g" in state
    assert state["semantic.layers.0.attn.bias"].dtype == torch.bool
    assert not any("parametrizations" in name for name in state)


def test_same_seed_builds_the_same_files_and_another_seed_does_not(
    toy: Path, tmp_path: Path
) -> None:
    toy_model.build(tmp_path / "same", greedy=True)
    toy_model.build(tmp_path / "other", seed=1, greedy=True)
    for name in ("pytorch_model.bin", "speaker_embeddings/v2/en_speaker_6_fine_prompt.npy"):
        original = (toy / name).read_bytes()
        assert original == (tmp_path / "same" / name).read_bytes()
        assert original != (tmp_path / "other" / name).read_bytes()


def test_folder_stays_under_40_megabytes(toy: Path) -> None:
    assert sum(p.stat().st_size for p in toy.rglob("*")) < 40e6


def test_table_lists_the_130_voices_with_the_hubs_shapes(toy: Path) -> None:
    table = json.loads((toy / "speaker_embeddings_path.json").read_text())
    table.pop("repo_or_path")
    assert len(table) == 130
    frames = []
    for paths in table.values():
        semantic, coarse, fine = (np.load(toy / paths[f"{kind}_prompt"])
                                  for kind in ("semantic", "coarse", "fine"))  # fmt: skip
        assert (semantic.dtype, coarse.dtype, fine.dtype) == (np.int64, np.int64, np.int32)
        assert len(coarse) == 2 and len(fine) == 8
        assert abs(fine.shape[1] / 75 - len(semantic) / 49.9) < 0.02
        frames.append(fine.shape[1])
    assert min(frames) < 384 < 512 < max(frames)  # 384 frames are 256 semantic tokens


@pytest.mark.parametrize("text", WORDS)
def test_every_script_tokenizes(toy: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids and max(ids) < 119_547
    assert tokenizer.decode(ids).replace(" ", "") == text


@pytest.mark.long  # run.sh has no room for it
def test_greedy_lengths_differ_by_text_and_voice(
    model: BarkModel, processor: BarkProcessor
) -> None:
    lengths = [
        semantic_length(model, processor, text, voice)
        for text in TEXTS
        for voice in ("v2/en_speaker_6", "v2/de_speaker_3")
    ]
    assert len(set(lengths)) >= 8, lengths
    assert min(lengths) >= 10 and max(lengths) <= 200, lengths
    short, long = lengths[:6], lengths[-6:]
    assert np.mean(long) > np.mean(short) + 20, lengths


@pytest.mark.long  # run.sh has no room for it
@pytest.mark.parametrize("min_eos_p", [None, 0.2])
def test_sampled_speech_ends_and_varies_with_the_seed(
    model: BarkModel, processor: BarkProcessor, min_eos_p: float | None
) -> None:
    lengths = set()
    for seed in range(4):
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": 0.7, "top_k": 50, "min_eos_p": min_eos_p}
        lengths.add(semantic_length(model, processor, TEXTS[4], "v2/en_speaker_9", **sampling))
    assert len(lengths) > 1 and max(lengths) < 300, lengths


def test_min_eos_p_changes_some_greedy_length(model: BarkModel, processor: BarkProcessor) -> None:
    voice = "v2/de_speaker_3"
    plain = [semantic_length(model, processor, text, voice) for text in TEXTS[-4:]]
    early = [semantic_length(model, processor, text, voice, 0.2) for text in TEXTS[-4:]]
    assert all(e <= p for e, p in zip(early, plain, strict=True)) and early != plain


def test_greedy_audio_is_finite_audible_and_not_clipped(
    model: BarkModel, processor: BarkProcessor
) -> None:
    audio = model.generate(**processor("Hello, world!", voice_preset="v2/en_speaker_6"))[0]
    assert torch.isfinite(audio).all() and len(audio) % 320 == 0
    assert audio.std() > 0.01 and audio.abs().max() < 1


def test_one_changed_code_of_any_codebook_is_heard(model: BarkModel) -> None:
    codes = torch.randint(1024, (1, 8, 75), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        original = model.codec_decode(codes)
        for codebook in range(8):
            changed = codes.clone()
            changed[0, codebook, 40] = (changed[0, codebook, 40] + 500) % 1024
            difference = (model.codec_decode(changed) - original).abs().max()
            assert difference * 32767 > 100, codebook


def test_coarse_steps_choose_ids_that_are_no_codes_when_not_restricted(
    model: BarkModel, processor: BarkProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    original = AlternatingCodebooksLogitsProcessor.__call__

    def spy(self: object, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        processed = original(self, ids, scores)
        chosen.append(int(processed.argmax()))
        return processed

    monkeypatch.setattr(AlternatingCodebooksLogitsProcessor, "__call__", spy)
    model.generate(**processor("Hello, world!", voice_preset="v2/en_speaker_6"))
    assert any(token >= toy_model.COARSE_END for token in chosen)
    assert any(token < toy_model.COARSE_END for token in chosen[1::2])


@pytest.mark.parametrize(("eos", "shortest", "longest"), [("late", 341, 767), ("first", 0, 0)])
def test_eos_moves_the_end(tmp_path: Path, eos: str, shortest: int, longest: int) -> None:
    toy_model.build(tmp_path, greedy=True, eos=eos)
    assert shortest <= semantic_length(*load(tmp_path), "Hi.", "v2/en_speaker_9") <= longest


@pytest.mark.long  # run.sh has no room for it
def test_eos_never_runs_to_max_new_tokens(tmp_path: Path) -> None:
    toy_model.build(tmp_path, greedy=True, eos="never")
    assert semantic_length(*load(tmp_path), "Hi.", "v2/en_speaker_9") == 768


def test_unknown_eos_is_refused_with_the_allowed_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'sometimes'; allowed: soon, late, never, first"):
        toy_model.build(tmp_path, eos="sometimes")
