"""Human speech with its words: the prompts that Debian has for the telephone exchange Asterisk.

Studio recordings by one voice a language, 8 kHz, CC-BY-SA (Russian CC-BY); never committed here.
"""

from __future__ import annotations

import functools
import gzip
import wave
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy.signal import resample_poly

RATE = 24_000  # of the samples given
SOUNDS, DOCS = Path("/usr/share/asterisk/sounds"), Path("/usr/share/doc")
VOICES = {"en": "en_US_f_Allison", "fr": "fr_CA_f_June", "es": "es_MX_f_Allison",
          "it": "it_IT_m_Carlo", "ru": "ru_RU_f_IvrvoiceRU"}


WRONG = {  # by language, by their length: beeps, half of the text, or another text
    "en": (), "fr": ("vm-mismatch",), "es": ("vm-mismatch",), "ru": (),
    "it": ("beep", "beeperr", "confbridge-join", "confbridge-leave", "confbridge-mute-extended",
           "vm-tempremoved")}


class Recording(NamedTuple):
    """`samples` are float32 in [-1, 1] at RATE."""

    language: str
    name: str
    text: str
    samples: np.ndarray


def need_recordings() -> None:
    """Skips the test that calls it where a package is missing."""
    missing = [package for language, voice in VOICES.items()
               for package, path in ((f"asterisk-core-sounds-{language}", list_of(language)),
                                     (f"asterisk-core-sounds-{language}-wav", SOUNDS / voice))
               if not path.exists()]
    if missing:
        pytest.skip(f"no recordings: sudo apt install {' '.join(missing)}")


def list_of(language: str) -> Path:
    package = f"asterisk-core-sounds-{language}"
    return DOCS / package / f"core-sounds-{language}.txt.gz"


def texts(language: str) -> dict[str, str]:
    """Text by name, of what is spoken as written: brackets hold notes of sounds and of accents."""
    with gzip.open(list_of(language), "rt", encoding="utf-8-sig") as file:
        rows = [line.partition(":") for line in file if not line.startswith(";")]
    return {name.strip(): " ".join(text.split()) for name, _, text in rows
            if any(map(str.isalnum, text)) and not any(sign in text for sign in "<([")
            and name not in WRONG[language]}


def samples_of(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2), path
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        speech = resample_poly(sound.astype(np.float32) / 32768, RATE, file.getframerate())
        return np.clip(speech, -1, 1)


@functools.cache
def recordings(language: str) -> tuple[Recording, ...]:
    """All that can be used, by name. A list names a few that no file is there for."""
    return tuple(Recording(language, name, text, samples_of(path))
                 for name, text in sorted(texts(language).items())
                 if (path := SOUNDS / VOICES[language] / f"{name}.wav").exists())


def some(each: int, seed: int = 0) -> list[Recording]:
    """`each` of every language, drawn among those of a text that is worth one segment."""
    random, drawn = np.random.default_rng(seed), []
    for language in VOICES:
        fit = [one for one in recordings(language) if 40 <= len(one.text) <= 200]
        drawn += [fit[at] for at in random.choice(len(fit), each, replace=False)]
    return drawn


@functools.cache
def judge_of(bark: ModuleType) -> Any:
    """The worker's judge with its detector."""
    judge = bark.Judge()
    judge.prepare()
    return judge
