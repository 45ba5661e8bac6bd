"""Encoding and stretching: whole lengths and the same sound in every format, on every decoder."""

from __future__ import annotations

import contextlib
import functools
import gc
import http.server
import io
import json
import os
import queue
import re
import shutil
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import psutil
import pytest
from conftest import Worker, running_worker
from decoding import MP3_FRAME, RATE, STREAM_EXCESS, WHOLE_EXCESS, decode, find
from hypothesis import given, settings
from hypothesis import strategies as st

FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")
LOSSLESS = ("flac", "wav", "pcm")
SPEEDS = (0.25, 0.5, 0.9, 1.5, 2, 4)
OPUS_DELAY = 0.0066  # seconds, which an Ogg's duration includes
KEY = "sesame-9f2c"
TEXT = "The boat left at noon. Nobody waved.\n\nA week later it came back, empty."


# Sounds

def tone(hertz: float, samples: int, volume: float = 0.5) -> np.ndarray:
    wave = np.sin(2 * np.pi * hertz / RATE * np.arange(samples))
    return np.round(volume * 32767 * wave).astype(np.int16)


@functools.cache
def vowel(samples: int = 48_777) -> np.ndarray:
    """Rises and has overtones, louder and softer like speech: no part is like another."""
    t = np.arange(samples) / RATE
    phase = 2 * np.pi * (110 * t + 20 * t**2)
    wave = sum(np.sin(n * phase) / n for n in range(1, 20))
    return np.round(0.3 * 32767 * (0.6 + 0.4 * np.sin(19 * t)) * wave).astype(np.int16)


def stream(bark: ModuleType, samples: np.ndarray, form: str, cuts: list[int]) -> bytes:
    encoder = bark.Encoder(form, RATE)
    return b"".join([*map(encoder.feed, np.split(samples, cuts)), encoder.finish()])


def loudness(samples: np.ndarray) -> float:
    return float(np.sqrt((samples.astype(float) ** 2).mean()))


# Encoding

@pytest.mark.parametrize("form", FORMATS)
def test_a_whole_file_decodes_to_its_length_and_the_same_sound(
        bark: ModuleType, form: str) -> None:
    heard = decode(bark.encode(vowel(), RATE, form), form)
    assert 0 <= len(heard) - len(vowel()) <= WHOLE_EXCESS.get(form, 0)
    check_same_sound(heard, form)


@pytest.mark.parametrize("form", FORMATS)
def test_a_stream_decodes_to_its_length_and_the_same_sound(bark: ModuleType, form: str) -> None:
    heard = decode(stream(bark, vowel(), form, [1000, 20_000]), form)
    assert 0 <= len(heard) - len(vowel()) <= STREAM_EXCESS.get(form, 0)
    check_same_sound(heard, form)


def check_same_sound(heard: np.ndarray, form: str) -> None:
    if form in LOSSLESS:
        assert np.array_equal(heard, vowel())
        return
    match = find(vowel(), heard)
    assert match.likeness > 0.99  # inverted it would be below 0
    assert loudness(heard[match.at :][: len(vowel())]) == pytest.approx(
        loudness(vowel()), rel=0.06)  # LAME takes 5 % off, lest anything clips


@pytest.mark.parametrize("form", FORMATS)
def test_the_loudest_sound_is_neither_clipped_nor_wrapped_round(
        bark: ModuleType, form: str) -> None:
    sound = tone(440, 24_000, volume=1.0)
    heard = decode(bark.encode(sound, RATE, form), form)
    match = find(sound, heard)
    assert match.likeness > 0.999
    error = heard[match.at :][: len(sound)].astype(int) - sound
    assert np.abs(error[1000:-1000]).max() < 8000  # wrapped would be 65 535


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(st.integers(0, 9000), max_size=12).map(sorted))
def test_a_stream_does_not_depend_on_how_its_samples_come(
        bark: ModuleType, form: str, cuts: list[int]) -> None:
    sound = vowel()[:9000]
    assert stream(bark, sound, form, cuts) == stream(bark, sound, form, [])


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_of_a_stream_is_kept_back_until_its_end(bark: ModuleType, form: str) -> None:
    encoder = bark.Encoder(form, RATE)
    fed = encoder.feed(vowel())
    heard = len(decode(fed, form)) / len(vowel())
    assert heard > 0.85  # an Ogg page is 0.2 s
    assert decode(fed + encoder.finish(), form).size >= len(vowel())


@pytest.mark.parametrize("form", FORMATS)
def test_a_stream_has_one_head(bark: ModuleType, form: str) -> None:
    data = stream(bark, vowel(), form, [12_000, 24_000])
    magic = {"opus": b"OpusHead", "flac": b"fLaC", "wav": b"RIFF"}.get(form)
    assert magic is None or (data.count(magic) == 1 and magic in data[:40])
    assert form != "mp3" or not any(tag in data for tag in (b"Xing", b"Info", b"ID3"))


def test_an_ogg_starts_at_its_start(bark: ModuleType) -> None:
    for data in (bark.encode(vowel(), RATE, "opus"), stream(bark, vowel(), "opus", [9999])):
        with av.open(io.BytesIO(data)) as container:
            assert container.start_time == 0
            delay = 312  # of libopus, at 48 kHz, which an Ogg's duration includes
            assert container.streams[0].duration == 2 * len(vowel()) + delay


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", [100, 1200])
def test_the_shortest_sounds_are_files_too(bark: ModuleType, form: str, length: int) -> None:
    """1200 samples are the shortest take at the highest speed."""
    sound = vowel()[:length]
    slack = MP3_FRAME if form == "mp3" else 0  # FFmpeg does not cut the end off so few frames
    for data, excess in ((bark.encode(sound, RATE, form), WHOLE_EXCESS),
                         (stream(bark, sound, form, [length // 2]), STREAM_EXCESS)):
        assert 0 <= len(decode(data, form)) - length <= excess.get(form, slack)


def test_an_abandoned_stream_holds_no_memory_until_it_is_collected(bark: ModuleType) -> None:
    speech = bark.Speech("ab", "", 0, [bark.Span(0, 1, 0.0), bark.Span(1, 2, 0.0)], [], ["a", "b"])
    request = SimpleNamespace(results=lambda: iter([bark.Take(vowel()[:5000])] * 2))
    process = psutil.Process()
    gc.disable()
    try:
        for number in range(120):
            if number == 20:
                before = process.memory_info().rss
            assert next(bark.Delivery(speech, request, "flac", RATE, 1.0).stream())
        assert process.memory_info().rss - before < 10e6  # 700 MB, if not closed
    finally:
        gc.enable()


def test_a_whole_wav_says_its_true_sizes(bark: ModuleType) -> None:
    data = bark.encode(vowel(), RATE, "wav")
    assert wav_sizes(data) == (len(data) - 8, 2 * len(vowel())) == (len(data) - 8, len(data) - 44)


def test_a_streamed_wav_leaves_its_sizes_open_as_openai_does(bark: ModuleType) -> None:
    assert wav_sizes(stream(bark, vowel(), "wav", [])) == (0xFFFFFFFF, 0xFFFFFFFF)


def wav_sizes(data: bytes) -> tuple[int, int]:
    riff, size, wave, fmt, length, kind, channels, rate, speed, align, bits, tag, count = \
        struct.unpack("<4sI4s4sIHHIIHH4sI", data[:44])
    assert (riff, wave, fmt, tag) == (b"RIFF", b"WAVE", b"fmt ", b"data")
    assert (length, kind, channels, rate, speed, align, bits) == (16, 1, 1, RATE, 48_000, 2, 16)
    return size, count


@pytest.mark.parametrize("form", FORMATS)
def test_no_file_tells_the_version_of_the_library_that_made_it(
        bark: ModuleType, form: str) -> None:
    assert not re.search(rb"Lav[cf][0-9]|libopus [0-9]", bark.encode(vowel(), RATE, form))


# Stretching

@pytest.mark.parametrize("length", [1, 100, 1000, 240_000])
@pytest.mark.parametrize("speed", SPEEDS)
def test_a_stretched_sound_has_exactly_its_length(
        bark: ModuleType, speed: float, length: int) -> None:
    stretched = bark.stretch(tone(220, length), RATE, speed)
    assert stretched.dtype == np.int16 and len(stretched) == round(length / speed)


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_stretched_sound_keeps_its_pitch_and_its_loudness(
        bark: ModuleType, speed: float) -> None:
    sound = tone(220, 120_000)
    stretched = bark.stretch(sound, RATE, speed)
    spectrum = np.abs(np.fft.rfft(stretched * np.hanning(len(stretched))))
    assert spectrum.argmax() * RATE / len(stretched) == pytest.approx(220, rel=0.01)
    tenths = np.array_split(stretched, 10)
    assert [loudness(tenth) for tenth in tenths] == pytest.approx(
        [loudness(sound)] * 10, rel=0.05)


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_stretched_sound_keeps_its_order_and_its_end(bark: ModuleType, speed: float) -> None:
    """Three beeps of 40 ms, the last one 10 ms before the end, stay where and what they were."""
    beeps = {600.0: 6000, 900.0: 24_000, 1200.0: 48_000 - 1200}
    sound = np.zeros(48_000, np.int16)
    for hertz, at in beeps.items():
        sound[at : at + 960] = tone(hertz, 960)
    stretched = bark.stretch(sound, RATE, speed)
    for hertz, at in beeps.items():
        start, end = round((at - 1200) / speed), round((at + 2160) / speed)
        part = stretched[max(start, 0) : end]
        spectrum = np.abs(np.fft.rfft(part, 24_000))
        assert spectrum.argmax() == pytest.approx(hertz, rel=0.05), f"{hertz} Hz at {at}"
        assert np.abs(part.astype(int)).max() > 8000


@pytest.mark.parametrize("speed", SPEEDS)
def test_stretching_neither_clips_nor_wraps_round_nor_inverts(
        bark: ModuleType, speed: float) -> None:
    sound = tone(220, 48_000, volume=1.0)
    stretched = bark.stretch(sound, RATE, speed).astype(int)
    steepest = np.abs(np.diff(sound.astype(int))).max()
    assert np.abs(np.diff(stretched)).max() < 1.2 * steepest  # a wrapped one jumps by 65 535
    assert stretched.max() > 32_000 and stretched.min() < -32_000
    pulses = np.zeros(48_000, np.int16)  # all upwards, which inverted ones would not be
    pulses[np.arange(48_000) % 240 < 40] = 20_000
    heard = bark.stretch(pulses, RATE, speed)
    assert heard.min() > -1000 and heard.max() > 19_000


def test_speed_one_changes_nothing(bark: ModuleType) -> None:
    assert np.array_equal(bark.stretch(vowel(), RATE, 1.0), vowel())


# Other decoders: Debian's FFmpeg and Chromium, on what the worker sends

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--autoplay-policy=no-user-gesture-required")

# Fetches each format, whole and streamed, and decodes and plays it as pages do.
PAGE = """\
<script>
const api = %(api)s, key = %(key)s, text = %(text)s
const headers = {"Authorization": `Bearer ${key}`, "Content-Type": "application/json"}

function metadata(url) {
  return new Promise(resolve => {
    const player = new Audio(url)
    player.onerror = () => resolve(`error ${player.error.code} ${player.error.message}`)
    player.onended = () => resolve(player.currentTime)
    player.onloadedmetadata = () => { player.playbackRate = 8; player.play() }
  })
}

function throughMediaSource(kind, bytes) {
  if (!MediaSource.isTypeSupported(kind)) return "not supported"
  return new Promise(resolve => {
    const source = new MediaSource(), player = new Audio(URL.createObjectURL(source))
    player.onerror = () => resolve(`error ${player.error.message}`)
    source.onsourceopen = () => {
      const buffer = source.addSourceBuffer(kind)
      buffer.onupdateend = () => resolve(buffer.buffered.length && buffer.buffered.end(0))
      buffer.appendBuffer(bytes)
    }
  })
}

async function one(form, stream, seed) {
  const body = JSON.stringify({input: text, response_format: form, stream, seed})
  const reply = await fetch(`${api}/v1/audio/speech`, {method: "POST", headers, body})
  const bytes = await reply.arrayBuffer(), kind = reply.headers.get("Content-Type")
  const result = {form, stream, status: reply.status, id: reply.headers.get("X-Request-Id"),
                  bytes: bytes.byteLength}
  try {
    const context = new OfflineAudioContext(1, 24000, 24000)
    result.decoded = (await context.decodeAudioData(bytes.slice(0))).length
  } catch (error) { result.decoded = String(error) }
  result.played = await metadata(URL.createObjectURL(new Blob([bytes], {type: kind})))
  result.appended = await throughMediaSource(kind, bytes)
  return result
}

async function all() {
  const results = []
  let seed = 1
  for (const form of ["mp3", "opus", "aac", "flac", "wav"])
    for (const stream of [false, true]) results.push(await one(form, stream, seed++))
  return results
}

all().catch(error => String(error)).then(
  results => fetch("/result", {method: "POST", body: JSON.stringify(results)}))
</script>
"""


@dataclass
class Pages:
    """A site on loopback with one page, and what the page reports."""

    server: http.server.ThreadingHTTPServer
    page: str = ""
    results: queue.Queue[Any] = field(default_factory=queue.Queue)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def pages() -> Iterator[Pages]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(site.page.encode())

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            site.results.put(json.loads(self.rfile.read(length)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site = Pages(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield site
        server.shutdown()


def ask(worker: Worker, form: str, stream: bool, seed: int) -> bytes:
    answer = worker.call("/v1/audio/speech", {"input": TEXT, "response_format": form,
                                              "stream": stream, "seed": seed},
                         headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status == 200, answer.body
    assert ("Content-Length" in answer.headers) is not stream
    return answer.body


def length_of(worker: Worker, seed: int) -> int:
    return len(ask(worker, "pcm", False, seed)) // 2


@contextlib.contextmanager
def one_at_a_time(toy: Path, **more: str) -> Iterator[Worker]:
    """Its second segment is never done with the first, so that whatever may be is streamed."""
    with running_worker(BARK_MODEL=str(toy), BARK_API_KEY=KEY, BARK_MAX_BATCH="1",
                        BARK_CACHE_MB="0", **more) as worker:
        worker.wait_for("ready")
        yield worker


def ffmpeg(name: str, *arguments: str, data: bytes) -> bytes:
    done = subprocess.run([name, "-v", "error", *arguments], input=data, capture_output=True,
                          timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("ffprobe"), reason="no ffprobe; apt install ffmpeg")
def test_ffmpeg_finds_each_format_at_its_full_length(toy: Path, tmp_path: Path) -> None:
    with one_at_a_time(toy) as worker:
        length = length_of(worker, 1)
        for form in FORMATS:
            for stream in (False, True):
                data = ask(worker, form, stream, 1)
                file = tmp_path / f"speech.{form}"
                file.write_bytes(data)
                raw = ("-f", "s16le", "-ar", "24000", "-ac", "1") if form == "pcm" else ()
                decoded = ffmpeg("ffmpeg", *raw, "-i", str(file), "-f", "s16le", "-ar", "24000",
                                 "-ac", "1", "-", data=b"")
                probe = json.loads(ffmpeg("ffprobe", *(raw[:4]), "-i", str(file), "-show_format",
                                          "-show_streams", "-of", "json", data=b""))
                told = float(probe["format"].get("duration", "nan"))
                [track] = probe["streams"]
                print(f"{form} {'streamed' if stream else 'whole'}: {len(data)} bytes,"
                      f" {len(decoded) // 2 - length:+d} of {length} samples,"
                      f" ffprobe {told:.4f} s of {length / RATE:.4f}")
                excess = (STREAM_EXCESS if stream else WHOLE_EXCESS).get(form, 0)
                assert 0 <= len(decoded) // 2 - length <= excess
                assert (track["codec_type"], track["channels"]) == ("audio", 1)
                assert int(track["sample_rate"]) == (48_000 if form == "opus" else RATE)
                if not stream and form != "aac":  # of ADTS it guesses
                    # Debian's takes an MP3's delay and the rest of its last frame for sound
                    slack = 3 * MP3_FRAME / RATE if form == "mp3" else OPUS_DELAY
                    assert -1e-4 <= told - length / RATE <= slack


@pytest.mark.long
@pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium; apt install chromium")
def test_chromium_fetches_decodes_and_plays_each_format(
        toy: Path, tmp_path: Path, pages: Pages) -> None:
    with one_at_a_time(toy, BARK_CORS_ORIGINS=pages.origin) as worker:
        pages.page = PAGE % {"api": json.dumps(worker.url), "key": json.dumps(KEY),
                             "text": json.dumps(TEXT)}
        with subprocess.Popen([str(CHROMIUM), *CHROMIUM_OPTIONS,
                               f"--user-data-dir={tmp_path / 'profile'}", pages.origin],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              start_new_session=True) as chromium:
            try:
                results = pages.results.get(timeout=150)
            finally:
                os.killpg(chromium.pid, signal.SIGKILL)
        assert isinstance(results, list), results
        lengths = [length_of(worker, seed) for seed in range(1, len(results) + 1)]
    for result, length in zip(results, lengths, strict=True):
        print(f"{result['form']} {'streamed' if result['stream'] else 'whole'}: decoded"
              f" {result['decoded']} of {length} samples, played {result['played']} and appended"
              f" {result['appended']} of {length / RATE:.3f} s")
    for result, length in zip(results, lengths, strict=True):
        assert result["status"] == 200 and result["id"]
        excess = (STREAM_EXCESS if result["stream"] else WHOLE_EXCESS).get(result["form"], 0)
        assert 0 <= result["decoded"] - length <= excess, result
        # where it guesses a length, from bytes and bit rate, as of ADTS, it plays to that
        slack = 0.1 * length / RATE if result["form"] == "aac" else OPUS_DELAY + excess / RATE
        assert -0.01 <= result["played"] - length / RATE <= slack, result
