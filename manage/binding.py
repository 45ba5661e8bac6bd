"""Speech bound into one sound file: loudness, joins, chapters, encoding.

    part = level(pcm, gain_for(measure(pcm)))
    bind(Path("story.m4b"), [part, silence(0.4), ...], [Mark("One", 0.0, 61.5)], title="Story")

All of it through FFmpeg's libraries (PyAV); it knows no text and no network. PCM is int16, mono, at
RATE, as the worker speaks. A book never lies in memory: `bind` takes one piece of it at a time.
"""

from __future__ import annotations

import array
import base64
import io
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import av
from av.filter import Graph

RATE = 24_000         # Hz
MAX_WAV = 2**32 - 1   # bytes that a RIFF's sizes can tell
TARGET = -19.0        # LUFS; mono at that is as loud as stereo at -16, what podcasts have
PEAK = -1.0           # dB, the highest true peak; what is coded with loss goes a little beyond
MAX_GAIN = 20.0       # dB; more would only lift noise
SILENT = -70.0        # LUFS; R128 counts nothing below
MEASURED = 1.0        # seconds that a measurement needs at least; R128 looks at 0.4 s at a time
FADE = RATE // 200    # samples of fade at an edge: 5 ms


class BindingError(Exception):
    """What keeps a sound file from being written, for the person: what, where, what next."""


class UnusableName(BindingError):
    """Nothing can be written under that name."""


class Mark(NamedTuple):
    """A chapter, in seconds."""

    title: str
    start: float
    end: float


class Loudness(NamedTuple):
    """Integrated loudness by EBU R128 in LUFS, and the true peak in dB; -70 for silence."""

    lufs: float
    peak: float


NO_SOUND = Loudness(SILENT, SILENT)


class Format(NamedTuple):
    """A kind of file, in FFmpeg's names; `size` in bytes a second at most, for the estimate."""

    container: str
    codec: str
    size: int
    bit_rate: int | None = None
    options: Mapping[str, str] = MappingProxyType({})  # of the container


# Bit rates as the worker's own. An M4B is an MP4 with a brand; media type 2 is an audiobook.
KINDS = {
    ".wav": Format("wav", "pcm_s16le", 48_000),
    ".mp3": Format("mp3", "libmp3lame", 12_100, 96_000),
    ".opus": Format("ogg", "libopus", 7_500, 48_000),
    ".flac": Format("flac", "flac", 40_000),
    ".m4b": Format("mp4", "aac", 8_300, 64_000, {"brand": "M4B ", "movflags": "+faststart"}),
}
FORMATS = tuple(KINDS)
# MP4 and ID3 have languages of three letters; those that Bark speaks.
THREE_LETTERS = {"de": "deu", "en": "eng", "es": "spa", "fr": "fra", "hi": "hin", "it": "ita",
                 "ja": "jpn", "ko": "kor", "pl": "pol", "pt": "por", "ru": "rus", "tr": "tur",
                 "zh": "zho"}


# -----------------------------------------------------------------------------
# PCM


def frame_of(pcm: bytes, start: int = 0) -> av.AudioFrame:
    """PCM that begins at sample `start` of its stream."""
    frame = av.AudioFrame("s16", "mono", len(pcm) // 2)
    frame.planes[0].update(pcm)
    frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), start
    return frame


def filtered(pcm: bytes, name: str, arguments: str) -> Iterator[av.AudioFrame]:
    """What one of FFmpeg's filters makes of it, as int16."""
    graph = Graph()
    graph.link_nodes(
        graph.add_abuffer(sample_rate=RATE, format="s16", layout="mono",
                          time_base=Fraction(1, RATE)),
        graph.add(name, arguments), graph.add("aformat", "sample_fmts=s16"),
        graph.add("abuffersink")).configure()
    graph.push(frame_of(pcm))
    graph.push(None)
    with suppress(av.error.EOFError, av.error.BlockingIOError):
        while True:
            yield graph.pull()


def measure(pcm: bytes) -> Loudness:
    """How loud a part is. Of less than a second it is the loudness of the part over and over."""
    if not pcm:
        return NO_SOUND
    pcm *= math.ceil(MEASURED * RATE * 2 / len(pcm))
    pcm += bytes(-len(pcm) % (RATE // 10 * 2))  # the filter tells only of whole tenths of a second
    told: dict[str, str] = {}
    for frame in filtered(pcm, "ebur128", "metadata=1:peak=true"):
        told = frame.metadata or told
    peak = float(told["lavfi.r128.true_peak"])
    decibels = 20 * math.log10(peak) if peak > 0 else SILENT
    return Loudness(max(float(told["lavfi.r128.I"]), SILENT), round(max(decibels, SILENT), 3))


def gain_for(loudness: Loudness) -> float:
    """What brings a part to TARGET without clipping, in dB."""
    if loudness.lufs <= SILENT:
        return 0.0
    return math.floor(100 * min(TARGET - loudness.lufs, PEAK - loudness.peak, MAX_GAIN)) / 100


def level(pcm: bytes, gain_db: float) -> bytes:
    """A part `gain_db` louder, faded at its edges, so that it begins and ends without a click."""
    if gain_db and pcm:
        frames = filtered(pcm, "volume", f"volume={gain_db}dB:precision=float")
        pcm = b"".join(bytes(frame.planes[0])[: frame.samples * 2] for frame in frames)
    samples = array.array("h", pcm)
    length = min(FADE, len(samples) // 2)
    for index in range(length):
        samples[index] = samples[index] * index // length
        samples[-1 - index] = samples[-1 - index] * index // length
    return samples.tobytes()


def silence(seconds: float) -> bytes:
    return bytes(2 * round(seconds * RATE))


# -----------------------------------------------------------------------------
# The file


def kind_of(out: Path) -> Format:
    if out.suffix.lower() not in KINDS:
        raise UnusableName(f"{out}: {out.suffix or 'no suffix'} is no kind of sound file that can "
                           f"be written; use one of {', '.join(FORMATS)}")
    return KINDS[out.suffix.lower()]


def check_output(out: Path, seconds: float) -> None:
    """That so much speech can be written there; raises BindingError if not."""
    size = round(seconds * kind_of(out).size)
    if out.is_dir():
        raise UnusableName(f"{out} is a folder; name a file in it")
    if not out.parent.is_dir():
        raise UnusableName(f"{out}: there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise UnusableName(f"{out}: nothing may be written into {out.parent}")
    if out.suffix.lower() == ".wav" and size > MAX_WAV:
        raise too_long(out, size)
    free = shutil.disk_usage(out.parent).free
    if size > free:
        raise BindingError(f"{out} would have about {shown(size)}, and {out.parent} has "
                           f"{shown(free)} free; make room, or use .opus, which takes the least")


def too_long(out: Path, size: int) -> BindingError:
    return BindingError(f"{out} would have about {shown(size)}; a WAV can have 4.29 GB at most: "
                        "use .flac, which loses nothing either, or .m4b, which has chapters")


def shown(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


class Writer:
    """An encoder and its file, which is ended only where no exception leaves its `with`."""

    def __init__(self, file: Path, kind: Format, tags: dict[str, str],
                 marks: Sequence[Mark], cover: bytes):
        # bitexact, of container and codec: no version of the library in the head
        self._container = av.open(f"file:{file}", "w", format=kind.container,
                                  options={**kind.options, "fflags": "+bitexact"})
        self._stream = self._container.add_stream(kind.codec, rate=RATE, layout="mono")
        self._stream.codec_context.flags |= av.codec.context.Flags.bitexact
        if kind.bit_rate:
            self._stream.bit_rate = kind.bit_rate
        self.bytes_fed = 0
        if kind.container == "mp3":
            marks = marks[:255]  # ID3 counts them in one byte, and FFmpeg would count on from 0
        tags["language"] = THREE_LETTERS.get(tags["language"], tags["language"])
        if kind.container == "mp4":
            tags["media_type"] = "2"
            self._stream.metadata["language"] = tags.pop("language")
        if kind.container == "flac":
            tags |= chapter_comments(marks)
        cover = cover if is_picture(cover) else b""
        if cover and kind.container == "ogg":
            tags["METADATA_BLOCK_PICTURE"] = picture_comment(cover)
        self._container.metadata.update({key: value for key, value in tags.items() if value})
        self._container.set_chapters([
            {"id": index, "start": round(1000 * mark.start), "end": round(1000 * mark.end),
             "time_base": Fraction(1, 1000), "metadata": {"title": mark.title}}
            for index, mark in enumerate(marks)])
        self._begin(cover if kind.container in ("mp3", "mp4", "flac") else b"")

    def _begin(self, cover: bytes) -> None:
        """Writes the head; a cover is a picture of video that is attached."""
        if not cover:
            self._container.start_encoding()
            return
        with av.open(io.BytesIO(cover), format=f"{picture_type(cover)}_pipe") as source:
            picture = self._container.add_stream_from_template(source.streams.video[0])
            picture.disposition = av.stream.Disposition.attached_pic
            picture.metadata["comment"] = "Cover (front)"
            self._container.start_encoding()
            packet = next(source.demux(video=0))
            packet.stream, packet.pts, packet.dts = picture, 0, 0
            self._container.mux(packet)

    def feed(self, pcm: bytes) -> None:
        if len(pcm) % 2:
            raise ValueError(f"{len(pcm)} bytes are no whole number of int16 samples")
        for at in range(0, len(pcm), 20 * RATE):  # 10 s at a time: encoders copy what they get
            piece = pcm[at : at + 20 * RATE]
            self._container.mux(self._stream.encode(frame_of(piece, self.bytes_fed // 2)))
            self.bytes_fed += len(piece)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with suppress(Exception) if kind else nullcontext():  # the tail fails where the rest did
            if not kind:
                self._container.mux(self._stream.encode(None))
            self._container.close()


def chapter_comments(marks: Sequence[Mark]) -> dict[str, str]:
    """Chapters as Vorbis comments, which FFmpeg writes for Ogg by itself, but not for FLAC."""
    comments = {}
    for index, mark in enumerate(marks):
        millis = round(1000 * mark.start)
        comments[f"CHAPTER{index:03}"] = (f"{millis // 3_600_000:02}:{millis // 60_000 % 60:02}:"
                                          f"{millis // 1000 % 60:02}.{millis % 1000:03}")
        comments[f"CHAPTER{index:03}NAME"] = mark.title
    return comments


def picture_type(cover: bytes) -> str:
    return "png" if cover.startswith(b"\x89PNG") else "jpeg"


def is_picture(cover: bytes) -> bool:
    """Whether it can be decoded; a book goes without a cover that is broken."""
    try:
        with av.open(io.BytesIO(cover), format=f"{picture_type(cover)}_pipe") as source:
            return next(source.decode(video=0)).width > 0
    except (av.error.FFmpegError, IndexError, StopIteration):
        return False


def picture_comment(cover: bytes) -> str:
    """A front cover as a FLAC picture block in base64, as Ogg has it; its size in pixels untold."""
    mime = f"image/{picture_type(cover)}".encode()
    head = struct.pack(">II", 3, len(mime)) + mime + bytes(20)
    return base64.b64encode(head + struct.pack(">I", len(cover)) + cover).decode()


def bind(out: Path, sounds: Iterable[bytes], marks: Sequence[Mark] = (), *, title: str = "",
         author: str = "", language: str = "", cover: bytes = b"",
         on_progress: Callable[[float], None] | None = None) -> None:
    """Writes what `sounds` yields, in order, as one file with a chapter for each mark.

    It is written aside and renamed when whole: whatever is raised, `out` stays as it was. Pieces
    may have any size; `on_progress` is called with the seconds written after each. `cover` is a
    JPEG or PNG. Raises BindingError where the disk refuses, or a WAV grows past what it can tell.
    """
    kind = kind_of(out)
    tags = {"title": title, "artist": author, "album": title, "genre": "Audiobook"}
    aside = out.with_name(f".{out.name}.part")
    try:
        with Writer(aside, kind, {**tags, "language": language}, marks, cover) as writer:
            for pcm in sounds:
                if writer.bytes_fed + len(pcm) > MAX_WAV - 4096 and kind.container == "wav":
                    raise too_long(out, writer.bytes_fed + len(pcm))
                writer.feed(pcm)
                if on_progress:
                    on_progress(writer.bytes_fed / 2 / RATE)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(out)
    except OSError as error:
        raise BindingError(f"{out} could not be written: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)
