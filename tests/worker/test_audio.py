"""Samples to bytes: PCM, pauses, WAV; which format a client wants; and seeds that never change."""

from __future__ import annotations

import struct
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


@pytest.mark.parametrize(("sample", "expected"), [
    (0.0, 0), (1.0, 32767), (-1.0, -32767), (1.7, 32767), (-40.0, -32767), (np.inf, 32767),
    (0.4 / 32767, 0), (0.6 / 32767, 1), (-0.6 / 32767, -1), (100.4 / 32767, 100), (0.5, 16384)])
def test_a_sample_becomes_the_nearest_16_bit_number_and_loud_ones_are_clipped(
        bark: ModuleType, sample: float, expected: int) -> None:
    pcm = bark.to_pcm16(np.array([sample], np.float32))
    assert pcm.dtype == np.int16 and pcm.tolist() == [expected]


def test_every_16_bit_number_but_the_lowest_survives_the_way_through_float(
        bark: ModuleType) -> None:
    numbers = np.arange(-32767, 32768)
    assert np.array_equal(bark.to_pcm16((numbers / 32767).astype(np.float32)), numbers)


def lay_out(bark: ModuleType, pieces: list[np.ndarray], pauses: list[float], rate: int,
            speed: float = 1.0) -> list[Any]:
    """The parts of a speech whose segments are "a", "b", ... with these samples and pauses."""
    spans = [bark.Span(index, index + 1, pause) for index, pause in enumerate(pauses)]
    speech = bark.Speech("abcdefgh", "", 0, spans, [], list("ABCDEFGH"[: len(spans)]))
    return list(bark.lay_out(speech, map(bark.Take, pieces), rate, speed))


def test_segments_stand_in_order_with_their_pauses_after_them(bark: ModuleType) -> None:
    first, second, third = (np.full(n, n, np.int16) for n in (2400, 1200, 600))
    parts = lay_out(bark, [first, second, third], [0.25, 0.5, 0.0], 24_000)
    silence = np.zeros(6000, np.int16), np.zeros(12_000, np.int16)
    joined = np.concatenate([part.audio for part in parts])
    expected = np.concatenate([first, silence[0], second, silence[1], third])
    assert joined.dtype == np.int16 and np.array_equal(joined, expected)
    rest = {"seed": 0, "takes": 1, "warnings": []}
    assert [part.place for part in parts] == [place | rest for place in (
        {"text": "a", "spoken": "A", "from": 0, "to": 1, "start": 0.0, "end": 0.1},
        {"text": "b", "spoken": "B", "from": 1, "to": 2, "start": 0.35, "end": 0.4},
        {"text": "c", "spoken": "C", "from": 2, "to": 3, "start": 0.9, "end": 0.925})]


def test_times_point_at_the_samples_also_when_pauses_do_not_fit_the_rate(
        bark: ModuleType) -> None:
    pieces = [np.full(n, 1 + n % 7, np.int16) for n in (331, 77, 1000, 5)]
    parts = lay_out(bark, pieces, [0.0101, 0.33333, 0.1, 0.0], 22_050)
    joined = np.concatenate([part.audio for part in parts])
    for piece, part in zip(pieces, parts, strict=True):
        start, end = part.place["start"], part.place["end"]
        assert abs(len(piece) - (end - start) * 22_050) <= 3  # times have four places
        at = round(start * 22_050)
        assert np.array_equal(joined[at + 3 : at + len(piece) - 3], piece[3:-3])
    assert abs(len(joined) - parts[-1].place["end"] * 22_050) <= 3


def test_all_of_a_speech_goes_faster_its_pauses_too(bark: ModuleType) -> None:
    pieces = [np.full(24_000, 1000, np.int16)] * 2
    parts = lay_out(bark, pieces, [0.5, 0.0], 24_000, speed=2)
    assert [(part.place["start"], part.place["end"]) for part in parts] == [(0, 0.5), (0.75, 1.25)]


def test_a_pause_is_needed_for_each_segment(bark: ModuleType) -> None:
    with pytest.raises(ValueError, match="longer"):
        lay_out(bark, [np.zeros(3, np.int16)] * 2, [0.0], 24_000)


@pytest.mark.parametrize("samples", [[], [1], [-32768, 32767, 258], list(range(-500, 500))])
def test_a_wav_has_true_sizes_and_little_endian_mono_samples(
        bark: ModuleType, samples: list[int]) -> None:
    wav = bark.encode(np.array(samples, np.int16), 24_000, "wav")
    riff, size, wave, fmt, length, kind, channels, rate, speed, align, bits, data, count = \
        struct.unpack("<4sI4s4sIHHIIHH4sI", wav[:44])
    assert (riff, wave, fmt, data) == (b"RIFF", b"WAVE", b"fmt ", b"data")
    assert (size, count, length) == (len(wav) - 8, len(wav) - 44, 16)
    assert (kind, channels, rate, bits) == (1, 1, 24_000, 16)  # PCM
    assert (speed, align) == (48_000, 2)
    assert struct.unpack(f"<{len(samples)}h", wav[44:]) == tuple(samples)


def test_samples_of_the_other_byte_order_or_with_gaps_are_written_right(
        bark: ModuleType) -> None:
    samples = np.array([1, 2, 300, 4], np.int16)
    assert bark.encode(samples.astype(">i2"), 8000, "wav") == bark.encode(samples, 8000, "wav")
    assert bark.encode(samples[::2], 8000, "wav")[44:] == struct.pack("<2h", 1, 300)


@pytest.mark.parametrize(("accept", "form"), [
    ("", None), ("*/*", None), ("application/json", None), ("text/html", None),
    ("audio/wav", "wav"), ("AUDIO/WAV", "wav"), ("audio/x-wav", "wav"), ("audio/*", "wav"),
    ("audio/wav, */*", "wav"), ("audio/wav, application/json", "wav"),
    ("application/json, audio/wav;q=0.5", None), ("audio/wav;q=0.5, application/json;q=0.4", "wav"),
    ("audio/wav;q=0", None), ("audio/wav;q=0.0, */*", None),
    ("audio/wav ; q=0.9 , */*;q=0.1", "wav"), ("audio/wav;q=abc", "wav"),
    ("audio/wav;q=", "wav"), (",,;;", None), ("audio/wav;codec=1;q=0.2, application/json", None),
    ("audio/mpeg", "mp3"), ("audio/mpeg;q=0.1, audio/wav", "wav"), ("audio/midi", None),
    ("audio/ogg, audio/wav", "opus"), ("audio/flac;q=0.2, audio/aac;q=0.3, */*;q=0.1", "aac")])
def test_audio_itself_is_sent_to_whom_it_is_no_worse_than_json(
        bark: ModuleType, accept: str, form: str | None) -> None:
    assert bark.accepted_format(accept, None) == form
    assert bark.accepted_format(accept, "flac") == (form and "flac")


@pytest.mark.parametrize(("parts", "seed"), [
    (("v2/en_speaker_6", "Hello, world!"), 4223033231954360),
    (("v2/ja_speaker_2", "こんにちは、世界。"), 4180879345774454),
    ((7, 0), 4411819796043341), ((7, 1), 1065677976869311),
    ((2**53 - 1, 12), 8793703476451973)])
def test_a_derived_seed_is_the_same_in_every_version(
        bark: ModuleType, parts: tuple[object, ...], seed: int) -> None:
    assert bark.derived_seed(*parts) == seed


def test_derived_seeds_are_exact_in_json_and_differ(bark: ModuleType) -> None:
    seeds = {bark.derived_seed(first, second) for first in range(50) for second in range(50)}
    assert len(seeds) == 2500
    assert 2**52 < max(seeds) <= 2**53 - 1 and min(seeds) >= 0


def test_random_bits_are_those_of_splitmix64(bark: ModuleType) -> None:
    """The generator's published first outputs from state 0, but for the bits that are not used."""
    first = bark.stream_states(torch.tensor([0]), torch.tensor([0]))[:, None]
    states = torch.add(first, torch.tensor([1, 2, 3]), alpha=bark.as_int64(bark.GOLDEN))
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert (bark.mix64(states)[0] >> 33).tolist() == [bark.as_int64(n) >> 33 for n in expected]


def test_draws_do_not_overlap_and_streams_differ(bark: ModuleType) -> None:
    keys, made = torch.tensor([7, 7, -1]), torch.tensor([0, 1, 0])
    states = bark.stream_states(keys, made)
    wide = bark.gumbel_noise(states[:1], torch.arange((1 << 20) + 5))[0]
    others = bark.gumbel_noise(states[1:], torch.arange(5))
    assert torch.equal(wide[1 << 20 :], others[0])  # the second draw starts where the first ends
    assert not torch.isin(others[1], wide[:10_000]).any()


def test_the_noise_of_a_seed_is_the_same_in_every_version(bark: ModuleType) -> None:
    states = bark.stream_states(torch.tensor([7, -1]), torch.tensor([0, 59]))
    noise = bark.gumbel_noise(states, torch.arange(1024))
    assert noise.argmax(-1).tolist() == [99, 321]
    assert noise[:, 0].tolist() == pytest.approx([-0.9623, 6.1488], abs=1e-4)


@pytest.mark.parametrize("count", [0, 1, 500, 24_000, 24_001])
def test_what_is_resampled_for_listeners_is_the_same_sound(bark: ModuleType, count: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(count) / 24_000).astype(np.float32)
    heard = bark.resample(tone, 24_000, 16_000)
    assert heard.dtype == np.float32 and len(heard) == pytest.approx(count * 2 / 3, abs=2)
    expected = np.sin(2 * np.pi * 440 * np.arange(len(heard)) / 16_000)
    assert np.abs(heard - expected)[100:-100].max(initial=0) < 0.01
    assert np.array_equal(heard, bark.resample(tone, 24_000, 16_000))
