"""When each word is heard: words found, laid into the speech, taken from a listener, in order.

What is measured against the built-in voice's tokens and a recogniser stands in test_recordings.
"""

from __future__ import annotations

import base64
import json
from types import ModuleType
from typing import Any

import pytest
from conftest import LISTENER, Worker, load_module, load_words
from hypothesis import given, settings
from hypothesis import strategies as st

listener = load_module(LISTENER)


@pytest.fixture(scope="module")
def bark_words() -> ModuleType:
    return load_words()


def times(bark: ModuleType, text: str, seconds: float = 4.0, spoken: str = "",
          speech: Any = None, heard: list[tuple[str, float, float]] | None = None) -> list[Any]:
    margin = bark.MARGIN  # which the detector leaves around speech
    speech = speech and tuple((a - margin, b + margin) for a, b in speech)
    told = heard and listener.Heard("", 0, 1, tuple(listener.Word(*word) for word in heard))
    found, timing = bark.word_times(text, spoken or text, bark.Hearing(speech, told), seconds)
    assert timing == ("heard" if heard else "estimated")
    return [(text[word.start : word.end], round(word.begins, 2), round(word.ends, 2))
            for word in found]


# Words

@pytest.mark.parametrize(("text", "words"), [
    ("“Well—no,” she said…", "Well|no|she|said"), ("It's a well-known £5 note.",
                                                     "It's|a|well-known|£5|note"),
    ("[laughs] Oh! *** 50%", "Oh|50%"), ("and/or", "and|or"), ("नमस्ते दुनिया।", "नमस्ते|दुनिया"),
    ("世界、你好 OK", "世|界|你|好|OK"), ("東京タワー", "東|京|タ|ワー"), ("… — !", ""),
    ("안녕하세요 여러분", "안녕하세요|여러분"), ("¿Qué?", "Qué"), ("A.B. 3.5", "A.B|3.5")])
def test_words_are_found_without_what_surrounds_them(bark_words: ModuleType, text: str,
                                                     words: str) -> None:
    assert "|".join(text[a:b] for a, b in bark_words.words_in(text)) == words


# Estimated

def test_words_share_the_speech_by_their_lengths(bark_words: ModuleType) -> None:
    assert times(bark_words, "ab abcd ab", speech=((1.0, 3.0),)) == [
        ("ab", 1.0, 1.5), ("abcd", 1.5, 2.5), ("ab", 2.5, 3.0)]
    assert times(bark_words, "ab ab", seconds=2.0) == [("ab", 0.0, 1.0), ("ab", 1.0, 2.0)]


def test_pauses_fall_where_a_word_ends_and_rather_at_a_comma(bark_words: ModuleType) -> None:
    def after_the_pause(text: str) -> str:
        found = times(bark_words, text, speech=((0.0, 1.1), (2.0, 3.9)))
        assert [end for _, start, end in found if start < 1.5][-1] == 1.1
        return next(word for word, start, _ in found if start >= 1.5)

    assert after_the_pause("one two three four five six") == "three"
    assert after_the_pause("one two three, four five six") == "four"
    assert after_the_pause("one, two three four five six") == "three"  # that comma is too far off


def test_a_pause_inside_a_word_parts_no_words(bark_words: ModuleType) -> None:
    speech = ((0.0, 0.3), (0.6, 4.0))
    found = times(bark_words, "incomprehensibilities so", speech=speech)
    assert found[0][1] == 0.0 and found[0][2] == found[1][1] and found[1][2] == 4.0


def test_what_was_left_out_takes_no_time_and_what_was_written_out_takes_its_own(
        bark_words: ModuleType) -> None:
    found = times(bark_words, "we go (quietly) now", spoken="we go now")
    assert found[2][1] == found[2][2] and found[3][2] == 4.0
    (_, _, short), (_, _, long) = (
        times(bark_words, "5 cats", spoken=spoken)[0]
        for spoken in ("5 cats", "five hundred thousand cats"))
    assert long > short


# Heard

HEARD = [(" The", 0.0, 0.4), (" boat", 0.4, 0.9), (" is", 0.9, 1.1), (" here.", 1.1, 1.6)]


def test_heard_words_keep_their_times(bark_words: ModuleType) -> None:
    assert times(bark_words, "“The boat is HERE!”", heard=HEARD) == [
        ("The", 0.0, 0.4), ("boat", 0.4, 0.9), ("is", 0.9, 1.1), ("HERE", 1.1, 1.6)]


def test_silence_that_the_recogniser_counts_to_a_word_is_taken_off(bark_words: ModuleType) -> None:
    found = times(bark_words, "The boat is here", heard=HEARD, speech=((0.2, 1.5),))
    assert found[0] == ("The", 0.2, 0.4) and found[-1] == ("here", 1.1, 1.5)


@pytest.mark.parametrize(("heard", "place"), [
    ([HEARD[0], (" goat", 0.4, 0.9), *HEARD[2:]], (0.4, 0.9)),  # misheard
    ([HEARD[0], *HEARD[2:]], (0.4, 0.9)),                       # missed
    ([HEARD[0], (" go", 0.4, 0.6), (" at", 0.6, 0.9), *HEARD[2:]], (0.4, 0.9))])
def test_what_is_missed_or_misheard_lies_between_its_neighbours(
        bark_words: ModuleType, heard: list[tuple[str, float, float]],
        place: tuple[float, float]) -> None:
    assert times(bark_words, "The boat is here", heard=heard)[1] == ("boat", *place)


def test_words_missed_at_the_ends_reach_to_the_ends_of_the_speech(bark_words: ModuleType) -> None:
    found = times(bark_words, "The boat is here", heard=HEARD[1:3], speech=((0.1, 1.5),))
    assert found[0] == ("The", 0.1, 0.4) and found[-1] == ("here", 1.1, 1.5)


WORDS = st.lists(st.sampled_from(
    ["the", "boat,", "is", "—", "here.", "世界", "“No!”", "3.5", "[laughs]"]), max_size=12)
TIMES = st.lists(st.floats(-1, 6), min_size=2, max_size=2)


@settings(max_examples=200, deadline=None)
@given(WORDS, st.lists(TIMES, max_size=4), st.lists(st.tuples(
    st.sampled_from(["the", "boat", "so", "here", ""]), TIMES), max_size=8))
def test_every_word_has_its_time_in_order_without_overlap_whatever_is_heard(
        bark_words: ModuleType, words: list[str], speech: Any, heard: Any) -> None:
    text = " ".join(words)
    told = [(word, *when) for word, when in heard]
    found = times(bark_words, text, 4.0, speech=tuple(map(tuple, speech)), heard=told)
    assert [word for word, _, _ in found] == [text[a:b] for a, b in bark_words.words_in(text)]
    edges = [edge for _, start, end in found for edge in (start, end)]
    assert edges == sorted(edges) and all(0 <= edge <= 4 for edge in edges)


# The whole worker

def test_words_are_told_in_the_whole_with_speed_and_pauses(worker: Worker) -> None:
    text = "So it goes.\n\n“Well,” said Dr. Ames, “no.”"
    plain, fast = (worker.speak(text, words=True, seed=1, speed=speed).json for speed in (1, 2))
    for reply in (plain, fast):
        assert [segment["timing"] for segment in reply["segments"]] == ["estimated"] * 2
        told = [word for segment in reply["segments"] for word in segment["words"]]
        assert [text[word["from"] : word["to"]] for word in told] == [
            "So", "it", "goes", "Well", "said", "Dr", "Ames", "no"]
        edges = [word[edge] for word in told for edge in ("start", "end")]
        assert edges == sorted(edges)
        for segment in reply["segments"]:
            assert segment["start"] <= segment["words"][0]["start"]
            assert segment["words"][-1]["end"] <= segment["end"] + 1e-4
    last = [reply["segments"][1]["words"][-1]["end"] for reply in (plain, fast)]
    assert last[0] == pytest.approx(2 * last[1], rel=0.02)


def test_a_stream_tells_the_same_words_and_without_asking_there_are_none(worker: Worker) -> None:
    fields = {"text": "So it goes. And on.", "seed": 1}
    whole = worker.speak(**fields, words=True).json
    lines = worker.speak(**fields, words=True, stream=True).body.splitlines()
    assert [json.loads(line)["words"] for line in lines[:-1]] == [
        segment["words"] for segment in whole["segments"]]
    plain = worker.speak(**fields).json
    assert not {"words", "timing", "heard"} & plain["segments"][0].keys()
    assert base64.b64decode(plain["audio"]) == base64.b64decode(whole["audio"])


def test_words_that_is_no_flag_is_refused(worker: Worker) -> None:
    answer = worker.speak("Hi.", words="yes")
    assert (answer.status, answer.json["error"]["param"]) == (400, "words")
