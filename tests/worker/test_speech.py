"""Is it speech? The running worker speaks with the built-in voice and a recogniser writes it down.

pocketsphinx listens with a grammar that allows every word at each place, so that a wrong, missing
or additional word shows. Digit strings begin with any digit but six: in this voice the recogniser
writes an initial "six" down as "two" in a third of the cases. Of the texts here none is misheard
over six seeds.
"""

from __future__ import annotations

import base64
import functools
import io
import wave
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import Worker
from pocketsphinx import Decoder
from scipy.signal import resample_poly

RATE = 16_000  # of the recogniser's acoustic model
DIGITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ADJECTIVES = ["red", "blue", "green", "small", "big", "old", "new", "good", "happy", "sad",
              "little", "nice", "warm", "cold", "black", "white", "quiet", "bright", "clean",
              "beautiful"]
ANIMALS = ["cat", "dog", "bird", "horse", "fish", "cow", "mouse", "rabbit", "lion", "bear"]
PLACES = ["garden", "kitchen", "school", "park", "river", "forest", "city", "market", "station",
          "library", "street", "house", "field", "beach", "mountain", "office"]

DIGIT_STRINGS = (  # every digit three times or more
    "one two three four five", "seven six eight nine one", "four nine two seven six",
    "eight five one three seven", "two four six eight nine", "nine three five six two",
)  # fmt: skip
SENTENCES = (
    "the red cat is in the garden", "the little bird is in the field",
    "the quiet horse is in the kitchen", "the happy lion is in the forest",
    "the black fish is in the office", "the beautiful bear is in the station",
)  # fmt: skip
STORY = (
    "the white cow is in the river", "the old dog is in the city",
    "the green mouse is in the library", "the bright rabbit is in the school",
    "the small horse is in the street",
)  # fmt: skip
STORY_TEXT = ". ".join(STORY)


@functools.cache
def decoder(rule: str) -> Decoder:
    recogniser = Decoder(lm=None, loglevel="FATAL")
    recogniser.add_jsgf_string("heard", f"#JSGF V1.0;\ngrammar heard;\npublic <heard> = {rule};")
    recogniser.activate_search("heard")
    return recogniser


def one_of(words: list[str]) -> str:
    return f"({' | '.join(words)})"


SENTENCE_RULE = f"the {one_of(ADJECTIVES)} {one_of(ANIMALS)} is in the {one_of(PLACES)}"
DIGITS_RULE = f"{one_of(DIGITS)}+"  # any number of digits
STORY_RULE = f"({SENTENCE_RULE})+"  # any number of sentences


def heard(samples: np.ndarray, rate: int, rule: str) -> str:
    """What the recogniser makes of int16 samples, in words of `rule`."""
    speech = resample_poly(samples.astype(float), RATE, rate)
    silence, loudest = np.zeros(RATE // 4), np.abs(speech).max(initial=1.0)
    padded = np.concatenate([silence, speech * 0.7 / loudest, silence])
    padded += np.random.default_rng(0).normal(0, 3e-4, len(padded))
    recogniser = decoder(rule)
    recogniser.start_utt()
    recogniser.process_raw((padded * 32767).astype("<i2").tobytes(), full_utt=True)
    recogniser.end_utt()
    return recogniser.hyp().hypstr if recogniser.hyp() else ""


def read_wav(answer: dict[str, Any]) -> np.ndarray:
    with wave.open(io.BytesIO(base64.b64decode(answer["audio"]))) as file:
        assert file.getframerate() == answer["sample_rate"]
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


@pytest.fixture(scope="module")
def spoken(builtin_worker: Worker) -> dict[str, dict[str, Any]]:
    """The worker's answers, all texts asked for at once, so that they share the engine."""
    texts = [STORY_TEXT, *DIGIT_STRINGS, *SENTENCES]
    with ThreadPoolExecutor(len(texts)) as clients:
        answers = clients.map(lambda text: builtin_worker.speak(text, seed=2), texts)
        return {text: answer.json for text, answer in zip(texts, answers, strict=True)}


@pytest.mark.parametrize("text", DIGIT_STRINGS)
def test_digits_are_recognised_in_a_free_loop(
        spoken: dict[str, dict[str, Any]], text: str) -> None:
    assert heard(read_wav(spoken[text]), 24_000, DIGITS_RULE) == text


@pytest.mark.parametrize("text", SENTENCES)
def test_a_sentence_is_recognised_word_for_word(
        spoken: dict[str, dict[str, Any]], text: str) -> None:
    assert heard(read_wav(spoken[text]), 24_000, SENTENCE_RULE) == text


def test_a_text_of_several_segments_is_recognised_whole_and_in_order(
        spoken: dict[str, dict[str, Any]]) -> None:
    assert heard(read_wav(spoken[STORY_TEXT]), 24_000, STORY_RULE) == " ".join(STORY)


def test_each_segment_lies_where_the_answer_says(spoken: dict[str, dict[str, Any]]) -> None:
    answer = spoken[STORY_TEXT]
    samples, rate = read_wav(answer), answer["sample_rate"]
    assert len(answer["segments"]) == len(STORY)
    for segment, sentence in zip(answer["segments"], STORY, strict=True):
        assert STORY_TEXT[segment["from"] : segment["to"]].rstrip(".") == sentence
        part = samples[round(segment["start"] * rate) : round(segment["end"] * rate)]
        assert heard(part, rate, SENTENCE_RULE) == sentence
