"""An engine on a model folder, and what `BarkModel.generate` makes of the same text and voice."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BarkModel, BarkProcessor
from transformers.models.bark import modeling_bark

TEXTS = {  # text to voice; lengths, languages and voices that differ
    "Hi.": "v2/en_speaker_6",
    "The rain came down in sheets, and nobody spoke.": "v2/en_speaker_9",
    "Guten Morgen, wie geht es Ihnen?": "v2/de_speaker_3",
    "It was the best of times, it was the worst of times, it was the age of wisdom.":
        "v2/en_speaker_1",
    "こんにちは、世界。": "v2/ja_speaker_2",
    "Well... [laughs] I never did.": "v2/en_speaker_0",
    "Сегодня хорошая погода.": "v2/ru_speaker_5",
    "One more, for luck, before we close the book and go to sleep.": "v2/fr_speaker_1",
    "No.": "v2/it_speaker_4",
    "She laughed, then thought better of it.": "v2/en_speaker_3",
    "¿Dónde está la biblioteca?": "v2/es_speaker_8",
    "Le train de neuf heures est parti sans nous, comme toujours.": "v2/fr_speaker_7",
    "♪ In the jungle, the mighty jungle ♪": "v2/en_speaker_4",
    "Dzień dobry!": "v2/pl_speaker_0",
    "Chapter One": "v2/en_speaker_2",
    "Bir varmış, bir yokmuş; evvel zaman içinde.": "v2/tr_speaker_6",
    "नमस्ते, आप कैसे हैं?": "v2/hi_speaker_9",
    "O mar estava calmo naquela manhã.": "v2/pt_speaker_2",
    "안녕하세요.": "v2/ko_speaker_0",
    "WAIT — was that the door? Or only the wind, as it was the night before?":
        "v2/zh_speaker_5",
}


class OwnCodebookOnly(modeling_bark.AlternatingCodebooksLogitsProcessor):
    """The restriction that `generate` lacks: odd steps stop at the second codebook's end."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = super().__call__(input_ids, scores)
        scores[:, self.semantic_vocab_size + 2 * self.codebook_size :] = -float("inf")
        return scores


@functools.cache
def generate_parts(folder: Path) -> tuple[BarkProcessor, BarkModel]:
    return BarkProcessor.from_pretrained(folder), BarkModel.from_pretrained(folder).eval()


def reference(folder: Path, text: str, voice: str, **options: Any) -> np.ndarray:
    """What `BarkModel.generate` makes of `text`, alone, with Suno's restriction applied."""
    processor, model = generate_parts(folder)
    window = model.generation_config.semantic_config["max_input_semantic_length"]
    inputs = processor(text, voice_preset=voice, max_length=window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_bark, "AlternatingCodebooksLogitsProcessor", OwnCodebookOnly)
        return model.generate(**inputs, **options)[0].numpy()


class Bench:
    """An engine on `folder` and what tests ask of it."""

    def __init__(self, bark: ModuleType, folder: Path, slots: int = 8,
                 dtype: torch.dtype = torch.float32, **options: Any):
        self.bark = bark
        self.facts = bark.ModelFacts(folder)
        model = bark.load_weights(folder, torch.device("cpu"), dtype)
        self.engine = bark.Engine(model, self.facts, slots, **options)

    def segment(self, text: str, voice: str, seed: int = 1, **changes: Any) -> Any:
        facts = self.facts
        segment = self.bark.Segment(
            facts.tokenize(text), facts.voices[voice], seed, facts.semantic_sampling,
            facts.coarse_sampling, facts.fine_sampling, facts.semantic.min_eos_p)
        return self.bark.replace(segment, **changes)

    def run(self, segments: list[Any]) -> list[Any]:
        """Each segment's `Finished`, in order, all of them in the engine at once."""
        for segment in segments:
            self.engine.add(segment)
        done: dict[Any, Any] = {}
        while len(done) < len(segments):
            done |= {finished.segment: finished for finished in self.engine.step()}
        return [done[segment] for segment in segments]

    def samples(self, segments: list[Any]) -> list[np.ndarray]:
        return [finished.samples for finished in self.run(segments)]


def assert_same_pcm(bark: ModuleType, ours: np.ndarray, theirs: np.ndarray) -> None:
    assert len(ours) == len(theirs)
    difference = bark.to_pcm16(ours).astype(int) - bark.to_pcm16(theirs)
    assert np.abs(difference).max() <= 1
    assert np.abs(theirs).max() > 0.01  # not two silences
