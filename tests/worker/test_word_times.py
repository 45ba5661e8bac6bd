"""Words timed: how far off each word's start is, estimated and heard. With -s, in tables.

The built-in voice's own tokens tell the truth; of a person's words Whisper tells something near it.
"""

from __future__ import annotations

import re
import textwrap
from types import ModuleType

import numpy as np
import pytest
from conftest import BUILTIN, LISTENER, ROOT, load_module
from engines import Bench
from listening import Heard
from recordings import RATE, judge_of, need_recordings, recordings
from word_times import Span, Timed, errors, heard_right, spoken_words

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

VOICES = ("v2/en_speaker_6", "v2/en_speaker_9")
MOST_CHARACTERS, PIECES = 48, 30  # of a piece, which the built-in voice says whole; of a voice
ESTIMATED, HEARD = 0.15, 0.06  # seconds that the median may be off
listener = load_module(LISTENER)


def timed_words(bark: ModuleType, samples: np.ndarray, text: str, language: str,
                heard: list[Heard] | None = None) -> list[Span]:
    """The worker's span for each word between blanks, from what is `heard` or by estimate: all
    that these tests know of its timing.
    """
    wanted = bark.Wanted(bark.estimate_seconds(text), text, language)
    hearing = judge_of(bark).submit(samples, RATE, wanted).result().hearing
    if heard is not None:
        words = tuple(listener.Word(each.word, each.start - listener.LATE,
                                    each.end - listener.LATE) for each in heard)
        hearing = hearing._replace(heard=listener.Heard("", 0, 1, words))
    times, told = bark.word_times(text, text, hearing, len(samples) / RATE)
    assert told == ("estimated" if heard is None else "heard")
    inside = [[time for time in times if word.start() <= time.start < word.end()]
              for word in re.finditer(r"\S+", text)]
    return [(parts[0].begins, parts[-1].ends) for parts in inside]


def pieces() -> list[str]:
    lines = (ROOT / "tests/worker/heard_sentences.tsv").read_text(encoding="utf-8").splitlines()
    texts = [piece for line in lines
             for piece in textwrap.wrap(line.partition("\t")[2], MOST_CHARACTERS)]
    return [text for text in texts if len(text.split()) > 2][:PIECES]


@pytest.fixture(scope="module")
def spoken(bark: ModuleType) -> dict[str, list[Timed]]:
    bench = Bench(bark, BUILTIN)
    return {voice: spoken_words(bench, pieces(), voice) for voice in VOICES}


@pytest.fixture(scope="module")
def said_by_a_person() -> list[Timed]:
    need_recordings()
    fit = [one for one in recordings("en") if len(one.text.split()) > 3 and len(one.text) <= 200]
    return [timed for one in fit if (timed := heard_right(one))]


def hold(takes: list[Timed], got: list[list[Span]], what: str, limit: float) -> None:
    """Prints how far off the starts are, and holds their median to `limit`."""
    off = np.concatenate([errors(take.spans, spans)
                          for take, spans in zip(takes, got, strict=True)])
    median, most = np.percentile(off, [50, 95])
    print(f"\n{what}: {len(off)} words off by {1000 * median:.0f} ms in the median, "
          f"{1000 * most:.0f} ms at 95 %")
    assert median <= limit


# What is taken for the truth

def level_of(samples: np.ndarray, start: float, end: float) -> float:
    part = samples[round(start * RATE) : round(end * RATE)]
    return 10 * np.log10(np.mean(part**2) + 1e-12)


@pytest.mark.parametrize("voice", VOICES)
def test_the_tokens_tell_where_the_first_word_begins(
        spoken: dict[str, list[Timed]], voice: str) -> None:
    takes = spoken[voice]
    assert len(takes) > 0.8 * PIECES  # nearly all are said word for word
    begins = [take.spans[0][0] for take in takes]
    rises = [level_of(take.samples, at + 0.02, at + 0.12) - level_of(
                 take.samples, at - 0.06, at - 0.02)
             for take, at in zip(takes, begins, strict=True)]
    assert np.mean(np.array(rises) > 15) > 0.9  # dB


def test_spans_follow_each_other(spoken: dict[str, list[Timed]]) -> None:
    for take in [take for takes in spoken.values() for take in takes]:
        edges = np.array(take.spans).ravel()
        assert len(take.spans) == len(take.text.split())
        assert (np.diff(edges) >= 0).all() and edges[-1] <= len(take.samples) / RATE


def test_whisper_hears_enough_recordings_right(said_by_a_person: list[Timed]) -> None:
    assert len(said_by_a_person) > 100


# The worker's times

@pytest.mark.parametrize("voice", VOICES)
def test_words_of_the_built_in_voice_are_timed_by_estimate(
        bark: ModuleType, spoken: dict[str, list[Timed]], voice: str) -> None:
    takes = spoken[voice]
    hold(takes, [timed_words(bark, take.samples, take.text, "en") for take in takes],
         f"{voice}, estimated", ESTIMATED)


@pytest.mark.parametrize("voice", VOICES)
def test_words_of_the_built_in_voice_are_timed_as_heard(
        bark: ModuleType, spoken: dict[str, list[Timed]], voice: str) -> None:
    takes = spoken[voice]
    hold(takes, [timed_words(bark, take.samples, take.text, "en", take.heard) for take in takes],
         f"{voice}, heard", HEARD)


def test_words_of_a_person_are_timed_by_estimate(
        bark: ModuleType, said_by_a_person: list[Timed]) -> None:
    takes = said_by_a_person
    hold(takes, [timed_words(bark, take.samples, take.text, "en") for take in takes],
         "a person, estimated", ESTIMATED)
