"""What Bark does wrong, planted into good speech: pure functions of float32 samples.

Chance is seeded by the samples' number, so that the same speech is always spoiled alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from recordings import RATE

AFTER = 3.0  # seconds of whatever comes after the speech
LEVEL = -25.0  # dBFS of what is not speech, as loud as the recordings or a little less
MUSIC = ("chords", "melody", "beat")


# What is no speech: functions of a number of samples

def at_level(sound: np.ndarray, level: float) -> np.ndarray:
    return (sound * 10 ** (level / 20) / np.sqrt(np.mean(sound**2))).astype(np.float32)


def white(count: int, level: float = LEVEL) -> np.ndarray:
    return at_level(np.random.default_rng(count).standard_normal(count), level)


def pink(count: int, level: float = LEVEL) -> np.ndarray:
    """Noise whose power falls by 3 dB an octave, from 20 Hz on."""
    spectrum = np.fft.rfft(np.random.default_rng(count).standard_normal(count))
    hertz = np.fft.rfftfreq(count, 1 / RATE)
    return at_level(np.fft.irfft(spectrum / np.sqrt(np.maximum(hertz, 20)), count), level)


def hum(count: int, level: float = LEVEL) -> np.ndarray:
    """Mains: 50 Hz and nine harmonics, the odd ones louder."""
    time = np.arange(count) / RATE
    return at_level(sum((1 if n % 2 else 0.4) / n * np.sin(2 * np.pi * 50 * n * time + n)
                        for n in range(1, 11)), level)


def notes(semitones: Iterable[float], seconds: float, decay: float) -> np.ndarray:
    """Notes struck together, counted from A at 220 Hz, with six harmonics that die away."""
    time = np.arange(round(seconds * RATE)) / RATE
    sound = sum(np.sin(2 * np.pi * n * 220 * 2 ** (key / 12) * time) / n**1.5
                for key in semitones for n in range(1, 7))
    return sound * np.exp(-time / decay) * np.minimum(1, time / 0.01)


def drums(beat: float, count: int) -> np.ndarray:
    """A kick that falls in pitch on each beat of so many seconds, and a hat between them."""
    time = np.arange(count) / RATE
    since, since_half = time % beat, (time + beat / 2) % beat
    kick = np.sin(2 * np.pi * (60 * since + 6 * (1 - np.exp(-since / 0.02)))) * np.exp(-since / 0.1)
    return 3 * kick + 0.5 * white(count, 0.0) * np.exp(-since_half / 0.03)


def music(kind: str, count: int, level: float = LEVEL) -> np.ndarray:
    """A song of chords, a plucked melody, or chords over drums, in a key and tempo drawn."""
    random = np.random.default_rng(count)
    beat, key, parts = random.uniform(0.3, 0.6), random.integers(-5, 6), []
    while sum(map(len, parts)) < count:
        if kind == "melody":
            length = beat * random.choice([0.5, 1.0, 1.5])
            parts.append(notes([key + random.choice([0, 2, 4, 7, 9, 12, 14])], length, 0.3))
        else:
            root, third = random.choice([(0, 4), (5, 4), (7, 4), (-3, 3)])
            chord = [key + root + each for each in (-12, 0, third, 7)]
            parts.append(notes(chord, 2 * beat, 0.8))
    sound = np.concatenate(parts)[:count]
    return at_level(sound + drums(beat, count) if kind == "beat" else sound, level)


# What is planted: functions of a speech, most of them made of the above

def quietest(speech: np.ndarray, seconds: float, near: float = 0.4) -> int:
    """The middle of the quietest 20 ms within `near` seconds."""
    size, start = round(0.02 * RATE), max(0, round((seconds - near) * RATE))
    part = speech[start : round((seconds + near) * RATE)]
    frames = part[: len(part) // size * size].reshape(-1, size)
    return start + int(np.argmin(np.mean(frames**2, axis=1))) * size + size // 2


def stops(share: float, speech: np.ndarray) -> np.ndarray:
    return speech[: quietest(speech, share * len(speech) / RATE)]


def said(times: int, speech: np.ndarray) -> np.ndarray:
    return np.tile(speech, times)


def after(sound: Callable[[int], np.ndarray], speech: np.ndarray) -> np.ndarray:
    """The seed moves with the speech's length, by less than is heard."""
    return np.concatenate([speech, sound(round(AFTER * RATE) + len(speech) % 1000)])


def instead(sound: Callable[[int], np.ndarray], speech: np.ndarray) -> np.ndarray:
    return sound(len(speech))


def under(sound: Callable[[int], np.ndarray], below: float, speech: np.ndarray) -> np.ndarray:
    """`sound` at `below` dB less than the speech's RMS, under all of it."""
    loudness = 20 * np.log10(np.sqrt(np.mean(speech**2)))
    return np.clip(speech + at_level(sound(len(speech)), loudness - below), -1, 1)


def any_music(count: int) -> np.ndarray:
    return music(MUSIC[count // 1000 % len(MUSIC)], count)


def silence_inside(speech: np.ndarray) -> np.ndarray:
    cut = quietest(speech, len(speech) / RATE / 2)
    return np.concatenate([speech[:cut], white(3 * RATE, -75.0), speech[cut:]])


def clipped(speech: np.ndarray) -> np.ndarray:
    return np.clip(speech * 8 / np.abs(speech).max(), -1, 1)


def backwards(speech: np.ndarray) -> np.ndarray:
    return speech[::-1].copy()


DEFECTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "stops after a quarter": partial(stops, 1 / 4),
    "stops after half": partial(stops, 1 / 2),
    "said twice": partial(said, 2),
    "said three times": partial(said, 3),
    "white noise after": partial(after, white),
    "white noise after, -40 dB": partial(after, partial(white, level=-40.0)),
    "white noise instead": partial(instead, white),
    "pink noise after": partial(after, pink),
    "pink noise instead": partial(instead, pink),
    **{f"music after, {kind}": partial(after, partial(music, kind)) for kind in MUSIC},
    **{f"music instead, {kind}": partial(instead, partial(music, kind)) for kind in MUSIC},
    "music under it, 10 dB below": partial(under, any_music, 10.0),
    "hum after": partial(after, hum),
    "hum instead": partial(instead, hum),
    "in white noise, 5 dB": partial(under, white, 5.0),
    "3 s of silence inside": silence_inside,
    "clipped": clipped,
    "silent": partial(instead, partial(white, level=-75.0)),
    "backwards": backwards,
}
