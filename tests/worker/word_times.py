"""When each word of a text is said: in the built-in voice by its tokens, in a recording by Whisper.

A word is what stands between blanks in the text, with its punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from engines import Bench
from listening import Heard, heard_words, words_of
from recordings import RATE, Recording

Span = tuple[float, float]  # seconds from the samples' start


class Timed(NamedTuple):
    """Samples, float32 at RATE and not trimmed, with one span for each word of the text."""

    text: str
    samples: np.ndarray
    spans: list[Span]
    heard: list[Heard]


def errors(truth: Sequence[Span], got: Sequence[Span]) -> np.ndarray:
    """Seconds by which each word's start is off."""
    assert len(truth) == len(got)
    return np.abs(np.array(truth)[:, 0] - np.array(got)[:, 0])


# The built-in voice: a semantic id is (phone * 10 + frames of the phone left) * 10 + pointer, where
# phone 0 is a pause and the pointer the place of the word's first token in the text, modulo 10
# (builtin-voice/README.md).

def runs_of(semantic: list[int]) -> list[tuple[int, int, int]]:
    """Pointer, first id and the one after the last of each word that is said."""
    runs: list[list[int]] = []
    for at, token in enumerate(semantic):
        if token // 100 == 0:
            continue
        if runs and runs[-1][0] == token % 10:
            runs[-1][2] = at + 1
        else:
            runs.append([token % 10, at, at + 1])
    return [tuple(run) for run in runs]


def spans_of(bench: Bench, text: str, semantic: list[int]) -> list[Span] | None:
    """By word; None where a word is left out or said twice, or the ids point at no next word."""
    tokens = bench.facts.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    rate, place, said = bench.facts.semantic.semantic_rate_hz, -1, {}
    for pointer, start, end in runs_of(semantic):
        place += 1 + (pointer - place - 1) % 10
        if place >= len(tokens.ids):
            return None
        said.setdefault(tokens.offsets[place][0], []).append((start / rate, end / rate))
    spans = [[span for at, each in said.items() if word.start() <= at < word.end()
              for span in each] for word in re.finditer(r"\S+", text)]
    return [(parts[0][0], parts[-1][1]) for parts in spans] if all(spans) else None


def spoken_words(bench: Bench, texts: list[str], voice: str) -> list[Timed]:
    """The texts that are said word for word. Each has to fit one segment."""
    handed: dict[Any, list[int]] = {}
    with pytest.MonkeyPatch.context() as patch:
        add = bench.bark.Coarse.add

        def recording(stage: Any, sequence: Any) -> Any:
            handed[sequence.segment] = list(sequence.semantic)
            return add(stage, sequence)

        patch.setattr(bench.bark.Coarse, "add", recording)
        segments = [bench.segment(text, voice) for text in texts]
        slots = bench.engine.slots
        samples = [sound for at in range(0, len(segments), slots)
                   for sound in bench.samples(segments[at : at + slots])]
    return [Timed(text, sound, spans, heard_words(sound, RATE))
            for text, segment, sound in zip(texts, segments, samples, strict=True)
            if (spans := spans_of(bench, text, handed[segment]))]


# Recordings

def heard_right(recording: Recording) -> Timed | None:
    """An English recording with Whisper's times; None where it hears other words."""
    heard, words = heard_words(recording.samples, RATE), recording.text.split()
    if [words_of(each.word) for each in heard] != [words_of(word) for word in words]:
        return None
    spans = [(each.start, each.end) for each in heard]
    return Timed(recording.text, recording.samples, spans, heard)
