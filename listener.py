#!/usr/bin/env python3
"""What a take says: a speech recogniser hears it and counts the words that differ.

The companion of bark-worker.py for BARK_LISTEN; without this file the worker judges takes by ear of
its detector alone. The recogniser, Whisper by faster-whisper, runs in processes of its own, so that
one that hangs, dies or runs out of memory costs a take's words and never the speech. Two halves:

  Listener  the worker's side: processes kept ready, a time limit for each, a rest after a failure
  Ear       the process's side: this file as a program, which hears and compares

A question is a line of JSON and the samples, an answer a line of JSON; see `Ear.answer`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

RATE = 16_000          # Hz, of Whisper's ear
START_SECONDS = 60.0   # to load the weights
PATIENCE = 10.0        # seconds that a take waits for an ear before it is passed unheard
LEAST_SECONDS, SECONDS_EACH = 10.0, 2.0  # to hear a take: so many, and so many for each of its own
LATE = 0.08            # seconds that Whisper tells a word late (tiny.en, see test_word_times)
REST_SECONDS = 60.0    # after a failure, in which nothing is heard
LETTERS = ("ja", "ko", "zh")  # compared by letters: their blanks are few, or anybody's choice
NUMBERS = ("de", "es", "fr", "it", "pt")  # whose number words text2num reads, beside English


class Word(NamedTuple):
    """A word as it was heard, and its seconds in the take."""

    text: str
    start: float
    end: float


class Heard(NamedTuple):
    """What a take says: its text, and the words that are wrong, of so many that were to be said."""

    text: str
    wrong: int
    of: int
    words: tuple[Word, ...] = ()

    @property
    def word_errors(self) -> float:
        """Share of the words that was put in, left out or changed; above 1 for many put in."""
        return self.wrong / max(self.of, 1)

    def differs(self, limit: float) -> bool:
        """Whether more than `limit` of the words are wrong: of one or two, more than two are."""
        return self.word_errors > limit and (self.of > 2 or self.wrong > 2)


class Unheard(Exception):
    """Why a take was not listened to."""


class Broken(Unheard):
    """What an ear is ended for."""


class Listener:
    """Hears takes in processes that it starts as they are needed. Any thread may call it.

    `folder` is a model of faster-whisper's (CTranslate2's layout), `command` what starts an ear.
    """

    def __init__(self, folder: str, ears: int, threads: int, command: list[str] | None = None):
        self._command = command or [sys.executable, __file__, folder, str(threads)]
        self._ears: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(ears):
            self._ears.put(None)  # not started yet
        self._resting_until, self.trouble = 0.0, ""

    @classmethod
    def for_cores(cls, folder: str, cores: int) -> Listener:
        """As many ears as leave half of the cores to others, four at most."""
        ears = min(4, max(1, cores // 2))
        return cls(folder, ears, max(1, cores // 2 // ears))

    def check(self) -> None:
        """Starts an ear, so that the first take finds it awake. Raises Unheard."""
        with self._ear(time.monotonic()):
            pass

    def hear(self, samples: np.ndarray, language: str, text: str, since: float) -> Heard:
        """What float32 samples at RATE say beside `text`. Two letters are the language.

        `since` is the time.monotonic() of which PATIENCE counts. Raises Unheard.
        """
        if time.monotonic() < self._resting_until:
            raise Unheard(self.trouble)
        seconds = LEAST_SECONDS + SECONDS_EACH * len(samples) / RATE
        question = json.dumps({"language": language, "text": text, "samples": len(samples)})
        data = np.ascontiguousarray(samples, np.float32).tobytes()
        with self._ear(since) as ear:
            return parse_answer(ask(ear, seconds, question.encode() + b"\n" + data))

    @property
    def status(self) -> str:
        """For /health."""
        resting = time.monotonic() < self._resting_until
        return f"resting: {self.trouble}" if resting else "listening"

    @contextlib.contextmanager
    def _ear(self, since: float) -> Iterator[subprocess.Popen[bytes]]:
        """An ear for one's own; one that fails is ended, and then all rest."""
        try:
            ear = self._ears.get(timeout=max(0.0, since + PATIENCE - time.monotonic()))
        except queue.Empty:
            raise Unheard(f"the listener had no time for it in {PATIENCE:.0f} s") from None
        try:
            if ear is None or ear.poll() is not None:
                ear = self._start()
            yield ear
        except Broken as error:
            if ear is not None:
                end(ear)
            ear, self.trouble = None, str(error)
            self._resting_until = time.monotonic() + REST_SECONDS
            raise
        finally:
            self._ears.put(ear)

    def _start(self) -> subprocess.Popen[bytes]:
        ear = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            told = ask(ear, START_SECONDS, b"")
            if not told.get("ready"):
                why = told.get("error", "it talks nonsense")
                raise Broken(f"the listener does not start: {why}")
        except Broken:
            end(ear)
            raise
        return ear

    def close(self) -> None:
        while not self._ears.empty():
            if ear := self._ears.get_nowait():
                end(ear)


def ask(ear: subprocess.Popen[bytes], seconds: float, question: bytes) -> dict[str, Any]:
    """The ear's answer, which it has so many seconds for. Raises Broken."""
    assert ear.stdin and ear.stdout
    late = threading.Event()

    def stop() -> None:
        late.set()
        ear.kill()  # then writing and reading end

    limit = threading.Timer(seconds, stop)
    limit.start()
    try:
        ear.stdin.write(question)
        ear.stdin.flush()
        answer = json.loads(ear.stdout.readline())
    except (OSError, ValueError):
        answer = None
    finally:
        limit.cancel()
    if not isinstance(answer, dict):
        what = (f"gave no answer in {seconds:.0f} s" if late.is_set()
                else "died or answered nonsense")
        raise Broken(f"the listener {what}")
    return answer


def parse_answer(answer: dict[str, Any]) -> Heard:
    """Raises Unheard for an error that the ear tells, Broken for what is no answer."""
    if error := answer.get("error"):
        raise Unheard(f"the listener failed: {error}")
    try:
        words = tuple(Word(str(text), float(start), float(end))
                      for text, start, end in answer["words"])
        return Heard(str(answer["heard"]), int(answer["wrong"]), int(answer["of"]), words)
    except (KeyError, TypeError, ValueError):
        raise Broken("the listener answered nonsense") from None


def end(ear: subprocess.Popen[bytes]) -> None:
    ear.kill()
    ear.wait()
    for pipe in (ear.stdin, ear.stdout):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()


# The process's side


class Ear:
    """A recogniser that answers questions, one after the other."""

    def __init__(self, folder: str, threads: int):
        from faster_whisper import WhisperModel

        self.model = WhisperModel(folder, device="cpu", compute_type="int8", cpu_threads=threads,
                                  local_files_only=True)

    def answer(self, question: dict[str, Any], samples: np.ndarray) -> dict[str, Any]:
        """What is heard, its words with their seconds, and how many are wrong of how many."""
        text, language = question["text"], question["language"]
        if language != "en" and not self.model.model.is_multilingual:
            return {"error": f"it knows English alone, and this is {language}"}
        words = self.words(samples, language, most_tokens(text))
        heard = "".join(word for word, _, _ in words).strip()
        wanted = units(text, language)
        return {"heard": heard, "wrong": differences(wanted, units(heard, language)),
                "of": len(wanted), "words": words}

    def words(self, samples: np.ndarray, language: str,
              tokens: int) -> list[tuple[str, float, float]]:
        """Greedily and in one go, so that the same take is heard alike whenever it comes."""
        segments, _ = self.model.transcribe(
            samples, language=language, beam_size=1, temperature=0.0, max_new_tokens=tokens,
            condition_on_previous_text=False, word_timestamps=True, no_speech_threshold=None,
            log_prob_threshold=None, compression_ratio_threshold=None)
        return [(word.word, round(float(word.start) - LATE, 3), round(float(word.end) - LATE, 3))
                for segment in segments for word in segment.words or ()]


def most_tokens(text: str) -> int:
    """Enough for the text said twice: a token is a few letters, or in some scripts a byte."""
    return min(200, 32 + len(text.encode()))


@functools.cache
def normalizer(language: str) -> Callable[[str], str]:
    """A text as Whisper's authors compare them, and numbers as digits where somebody reads them."""
    from text_to_num import alpha2digit
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer
    from whisper_normalizer.international import ChineseTextNormalizer, RussianTextNormalizer

    own = {"en": EnglishTextNormalizer, "ru": RussianTextNormalizer, "zh": ChineseTextNormalizer}
    plain = own.get(language, BasicTextNormalizer)()
    if language in NUMBERS:
        return lambda text: plain(alpha2digit(text, language))
    return plain


def units(text: str, language: str) -> list[str]:
    """What is compared: words, or letters where words are not told apart by blanks."""
    text = text.replace("’", "'").replace("-", " ").replace("‑", " ")
    plain = normalizer(language)(text)
    return [char for char in plain if not char.isspace()] if language in LETTERS else plain.split()


def differences(wanted: list[str], heard: list[str]) -> int:
    """Words put in, left out or changed; none where they differ by their blanks alone."""
    from rapidfuzz.distance import Levenshtein

    if "".join(wanted) == "".join(heard):
        return 0
    return Levenshtein.distance(wanted, heard)


def converse(ear: Ear, questions: BinaryIO, tell: Callable[[dict[str, Any]], None]) -> None:
    """Answers until nobody asks any more."""
    while line := questions.readline():
        question = json.loads(line)
        samples = np.frombuffer(questions.read(4 * question["samples"]), np.float32)
        try:
            tell(ear.answer(question, samples))
        except Exception as error:  # its message might hold the text
            tell({"error": type(error).__name__})


def main() -> int:
    parser = argparse.ArgumentParser(description="Hears what bark-worker.py says; it starts this.")
    parser.add_argument("folder", help="a Whisper model in CTranslate2's layout")
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the worker too
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        ear = Ear(options.folder, options.threads)
        normalizer("en")
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"})
        return 1
    tell({"ready": True})
    converse(ear, sys.stdin.buffer, tell)
    return 0


if __name__ == "__main__":
    sys.exit(main())
