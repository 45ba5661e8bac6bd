"""Decodes what the worker sends, and tells how much of one sound is in another."""

from __future__ import annotations

import io
from typing import NamedTuple

import av
import numpy as np

RATE = 24_000
MP3_FRAME, AAC_FRAME = 576, 1024
# Samples that a stream may decode to beyond its length, since nothing in it says where sound
# starts and ends: the encoder's delay before it, and the rest of the last frame after it.
STREAM_EXCESS = {"mp3": 3 * MP3_FRAME, "aac": 2 * AAC_FRAME}
WHOLE_EXCESS = {"aac": STREAM_EXCESS["aac"]}  # ADTS is always a stream


def decode(data: bytes, form: str) -> np.ndarray:
    """The int16 samples at 24 kHz of a file or a stream. Raises av.error.FFmpegError."""
    if form == "pcm":
        return np.frombuffer(data, "<i2")
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        decoder = stream.codec_context
        if form == "opus":  # FFmpeg's own decoder makes some pure tones five times as loud
            decoder = av.CodecContext.create("libopus", "r")
            decoder.extradata = stream.codec_context.extradata
        resampler = av.AudioResampler("s16", "mono", RATE)
        decoded = [frame for packet in container.demux(stream) for frame in decoder.decode(packet)]
        frames = [piece for frame in [*decoded, None] for piece in resampler.resample(frame)]
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


class Match(NamedTuple):
    """Where a sound starts in another, and how alike they are there: 1 same, -1 inverted."""

    at: int
    likeness: float


def find(sound: np.ndarray, heard: np.ndarray) -> Match:
    """`sound` in `heard`, which must have all of it."""
    a, b = sound.astype(float), heard.astype(float)
    assert len(b) >= len(a), f"{len(b)} samples cannot hold {len(a)}"
    size = 2 * len(b)
    products = np.fft.irfft(np.conj(np.fft.rfft(a, size)) * np.fft.rfft(b, size), size)
    at = int(products[: len(b) - len(a) + 1].argmax())
    part = b[at : at + len(a)]
    norm = np.linalg.norm(a) * np.linalg.norm(part)
    return Match(at, float(a @ part / norm) if norm else 0.0)
