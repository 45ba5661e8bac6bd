"""The tokens of suno/bark itself: real weights must give what transformers' own tests expect.

Sequences and settings are those of BarkModelIntegrationTests in transformers'
tests/models/bark/test_modeling_bark.py: suno/bark in float32, the v1 voice en_speaker_6, greedy in
every stage. There the semantic stage runs with the folder's own generation config, its min_eos_p
included, and the coarse stage may choose 48 ids beyond the second codebook; none is in the
expected sequence, so that barring them changes nothing.

Set BARK_GOLDEN_MODEL to a folder in the hub's layout, or have suno/bark in the hub's cache.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from engines import OwnCodebookOnly
from transformers import BarkModel, BarkProcessor
from transformers.models.bark import generation_configuration_bark as configs
from transformers.models.bark import modeling_bark

TEXT, VOICE = "In the light of the moon, a little egg lay on a leaf", "en_speaker_6"


class Tokens(NamedTuple):
    """What the stages of one generation made, in Bark's own ids."""

    semantic: list[int]
    coarse: list[int]  # two codebooks, interleaved
    fine: list[list[int]]  # eight codebooks

    def start(self, semantic: int, coarse: int, fine: int) -> Tokens:
        return Tokens(self.semantic[:semantic], self.coarse[:coarse],
                      [row[:fine] for row in self.fine])


EXPECTED = Tokens(
    semantic=[7363, 321, 41, 1461, 6915, 952, 326, 41, 41, 927],
    coarse=[11018, 11391, 10651, 11418, 10857, 11620, 10642, 11366, 10312, 11528, 10531, 11516,
            10474, 11051, 10524, 11051],
    fine=[[1018, 651, 857, 642, 312, 531, 474, 524, 524, 776],
          [367, 394, 596, 342, 504, 492, 27, 27, 822, 822],
          [961, 955, 221, 955, 955, 686, 939, 939, 479, 176],
          [638, 365, 218, 944, 853, 363, 639, 22, 884, 456],
          [302, 912, 524, 38, 174, 209, 879, 23, 910, 227],
          [440, 673, 861, 666, 372, 558, 49, 172, 232, 342],
          [244, 358, 123, 356, 586, 520, 499, 877, 542, 637],
          [806, 685, 905, 848, 803, 810, 921, 208, 625, 203]],
)  # fmt: skip


def worker_tokens(bark: ModuleType, folder: Path, device: str, monkeypatch: Any) -> Tokens:
    """TEXT through the worker's engine, greedy, with the tokens that each stage hands on."""
    found: dict[str, Any] = {}

    def record(stage: Any, method: str, tokens: Any) -> None:
        original = getattr(stage, method)

        def recording(self: Any, handed: Any) -> Any:
            found[stage.__name__] = tokens(handed)
            return original(self, handed)
        monkeypatch.setattr(stage, method, recording)

    record(bark.Coarse, "add", lambda sequence: list(sequence.semantic))
    record(bark.Fine, "add", lambda sequence: list(sequence.coarse))
    record(bark.Codec, "decode", lambda codes: codes[0].T.tolist())
    facts, greedy = bark.ModelFacts(folder), bark.Sampling(0.0)
    model = bark.load_weights(folder, torch.device(device), torch.float32)
    engine = bark.Engine(model, facts, slots=1)
    engine.add(bark.Segment(facts.tokenize(TEXT), facts.voices[VOICE], 0, greedy, greedy, greedy,
                            facts.semantic.min_eos_p))
    while not engine.step():
        pass
    return Tokens(found["Coarse"], found["Fine"], found["Codec"])


def generate_tokens(folder: Path, monkeypatch: Any) -> Tokens:
    """The same, stage by stage, with transformers, called as its own tests call it."""
    model = BarkModel.from_pretrained(folder).eval()
    inputs = BarkProcessor.from_pretrained(folder)(TEXT, voice_preset=VOICE)
    monkeypatch.setattr(modeling_bark, "AlternatingCodebooksLogitsProcessor", OwnCodebookOnly)
    own = model.generation_config
    semantic_config = configs.BarkSemanticGenerationConfig(**own.semantic_config)
    coarse_config = configs.BarkCoarseGenerationConfig(**own.coarse_acoustics_config)
    fine_config = configs.BarkFineGenerationConfig(**own.fine_acoustics_config)
    shared = {"history_prompt": inputs["history_prompt"], "codebook_size": own.codebook_size,
              "semantic_generation_config": semantic_config,
              "coarse_generation_config": coarse_config}
    greedy = {"do_sample": False, "temperature": 1.0}
    semantic = model.semantic.generate(
        **inputs, semantic_generation_config=semantic_config, **greedy)
    ids = [token for token in semantic[0].tolist() if token != semantic_config.eos_token_id]
    coarse = model.coarse_acoustics.generate(semantic, **shared, **greedy)
    fine = model.fine_acoustics.generate(
        coarse, fine_generation_config=fine_config, temperature=None, **shared)
    return Tokens(ids, coarse[0].tolist(), fine[0].tolist())


def real_model(bark: ModuleType) -> Path | None:
    if folder := os.environ.get("BARK_GOLDEN_MODEL"):
        return Path(folder)
    return bark.cached_model("suno/bark")


def with_v1_voice(source: Path, target: Path) -> Path:
    """A copy of a model folder that also has VOICE, which is there as v2 alone."""
    shutil.copytree(source, target)
    table = target / "speaker_embeddings_path.json"
    voices = json.loads(table.read_text())
    table.write_text(json.dumps({**voices, VOICE: voices[f"v2/{VOICE}"]}))
    return target


def test_real_weights_give_the_tokens_that_transformers_expects(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = real_model(bark)
    if folder is None:
        pytest.skip("suno/bark is not in the cache and BARK_GOLDEN_MODEL names no folder")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    tokens = worker_tokens(bark, folder, device, monkeypatch)
    assert tokens.start(10, 16, 10) == EXPECTED


def test_the_tokens_compared_are_those_that_transformers_makes_of_the_toy(
        bark: ModuleType, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the golden test compares, for a model that is always here; one that samples."""
    folder = with_v1_voice(toy, tmp_path / "toy")
    ours = worker_tokens(bark, folder, "cpu", monkeypatch)
    assert ours == generate_tokens(folder, monkeypatch)
    assert len(ours.semantic) > 10 and len(ours.coarse) > 60 and len(ours.fine) == 8
    assert ours.start(10, 16, 10) != EXPECTED  # a comparison that can fail
