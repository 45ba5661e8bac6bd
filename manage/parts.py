"""What a book comes to in requests, and what was made of them, kept beside the output.

A part is a request's speech in a file whose name is made of all that decides it. It is written
aside and renamed, and begins with its own hash, so that whatever is there is whole or made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from binding import NO_SOUND, RATE, Loudness, Mark
from book import Book, Chapter, Paragraph

# Seconds of silence. The first three are what bark-worker.py makes.
CLAUSE_PAUSE, SENTENCE_PAUSE, PARAGRAPH_PAUSE = 0.1, 0.25, 0.5
HEADING_PAUSE, SCENE_PAUSE, CHAPTER_PAUSE = 1.0, 1.5, 2.0
LONGEST = 1000  # characters of one request, where the worker takes more: so much is lost at most
LONGEST_TITLE = 200  # an MP3 or MP4 loses chapters whose title passes 64 kB
LETTER_SECONDS, WIDE_SECONDS = 1 / 15, 1 / 5  # of speech, blanks included; from WIDE on, as 漢
WIDE = "\u2e80"
NOTES = {"de": "Anmerkung", "en": "Note", "es": "Nota", "fr": "Note", "it": "Nota", "pl": "Przypis",
         "pt": "Nota", "ru": "Примечание", "tr": "Not", "hi": "टिप्पणी", "ja": "注", "ko": "주",
         "zh": "注释"}

# -----------------------------------------------------------------------------
# Cutting what is longer than a request may be

CLOSERS = "\"'”’»›)\\]」』）"
END_RE = re.compile(rf"(?P<word>[^\W\d_]*)(?P<sign>[.!?…؟۔]+)[{CLOSERS}]*\s+"
                    rf"|[。！？।॥։][{CLOSERS}]*\s*")
CLAUSE_RE = re.compile(rf"[,;:،؛—–][{CLOSERS}]*\s+|[，、；：][{CLOSERS}]*")
BLANK_RE = re.compile(r"\s+")
SURE_WORD = 5  # letters before a full stop that is no abbreviation's


def is_sure_end(match: re.Match[str]) -> bool:
    """Whether a sentence ends there beyond doubt: `Dr. Who` and `No. 7` go on."""
    after = match.string[match.end() :].lstrip("\"'“‘«„([¿¡—–- ")[:1]
    return not after.islower() and (match["sign"] != "." or len(match["word"]) >= SURE_WORD)


def between_letters(text: str, limit: int) -> int:
    """The last place up to `limit` that is within no letter of several characters."""
    for pos in range(limit, 0, -1):
        joined = "\u200d" in text[pos - 1 : pos + 1] or "🏻" <= text[pos] <= "🏿"  # skin tones
        joined |= unicodedata.combining(text[pos - 1]) == 9  # a virama, as in क्ष
        if not joined and not unicodedata.category(text[pos]).startswith("M"):
            return pos
    return limit


def best_cut(text: str, limit: int) -> tuple[int, float]:
    """Where a text longer than `limit` is parted best, and the pause that belongs there."""
    def last(matches: Iterable[re.Match[str]]) -> int:
        return max((match.end() for match in matches if match.end() <= limit), default=0)
    reach = text[: limit + 1]
    for pattern, pause, holds in ((END_RE, SENTENCE_PAUSE, is_sure_end),
                                  (CLAUSE_RE, CLAUSE_PAUSE, None), (BLANK_RE, CLAUSE_PAUSE, None)):
        end = last(filter(holds, pattern.finditer(text, 0, len(reach))))
        if end > limit // 3:
            return end, pause
    return between_letters(text, limit), 0.0


def cut(text: str, limit: int) -> Iterator[tuple[str, float]]:
    """The pieces of a paragraph, of at most `limit` characters, each with the pause after it."""
    while len(text) > limit:
        end, pause = best_cut(text, limit)
        yield text[:end].strip(), pause
        text = text[end:].lstrip()
    if text:
        yield text, 0.0


# -----------------------------------------------------------------------------
# Plan


class Piece(NamedTuple):
    """What one request says, where it stands in the book, and the silence after it."""

    text: str
    chapter: int  # from 0
    line: int
    pause: float


def seconds_for(text: str) -> float:
    """About how long a text is in speech."""
    wide = sum(char >= WIDE for char in text)
    return wide * WIDE_SECONDS + (len(text) - wide) * LETTER_SECONDS


def words_of(paragraph: Paragraph, language: str) -> str:
    """What is said of it: a note is announced."""
    if paragraph.kind != "note":
        return paragraph.text
    named = f"{NOTES.get(language, NOTES['en'])} {paragraph.label}".rstrip()
    return f"{named}: {paragraph.text}"


def pieces_of(book: Book, limit: int, notes: bool = True, language: str = "en") -> list[Piece]:
    found: list[Piece] = []
    for number, chapter in enumerate(book.chapters):
        breaks = False  # a scene ended since what is spoken last
        for paragraph in chapter.paragraphs:
            breaks |= paragraph.after_break
            if paragraph.kind == "note" and not notes:
                continue
            if breaks and found:
                found[-1] = found[-1]._replace(pause=max(found[-1].pause, SCENE_PAUSE))
            breaks = False
            pause = HEADING_PAUSE if paragraph.kind == "heading" else PARAGRAPH_PAUSE
            words = cut(words_of(paragraph, language), min(limit, LONGEST))
            found += [Piece(text, number, paragraph.line, inner) for text, inner in words]
            found[-1] = found[-1]._replace(pause=pause)
        if found:
            found[-1] = found[-1]._replace(pause=CHAPTER_PAUSE)
    return [*found[:-1], *(piece._replace(pause=0.0) for piece in found[-1:])]


Seeds = dict[str, int]  # a segment's index and the seed it has instead


@dataclass(frozen=True)
class Manner:
    """All that decides how a text sounds, beside the text and the seeds of single segments."""

    model: str
    voice: str
    seed: int | None = None
    expressive: bool = True

    def name_of(self, text: str, seeds: Seeds | None = None) -> str:
        told = json.dumps([1, text, self.model, self.voice, self.seed, self.expressive,
                           sorted((seeds or {}).items())])
        return hashlib.sha256(told.encode()).hexdigest()[:40]

    def request(self, text: str) -> dict[str, Any]:
        """For /synthesize; the audio comes as FLAC, which is half as long and loses nothing."""
        asked: dict[str, Any] = {"text": text, "format": "flac", "expressive": self.expressive}
        if self.voice:
            asked["voice"] = self.voice
        if self.seed is not None:
            asked["seed"] = self.seed
        return asked


@dataclass(frozen=True)
class Plan:
    """A book as requests, each under the name of the part that it brings."""

    pieces: list[Piece]
    manner: Manner
    seeds: Mapping[str, Seeds] = field(default_factory=dict)  # by the name without them

    @cached_property
    def plain_names(self) -> list[str]:
        return [self.manner.name_of(piece.text) for piece in self.pieces]

    @cached_property
    def names(self) -> list[str]:
        return [self.manner.name_of(piece.text, self.seeds.get(name))
                for piece, name in zip(self.pieces, self.plain_names, strict=True)]

    @cached_property
    def firsts(self) -> dict[str, int]:
        """Each name, and the first piece that has it."""
        found: dict[str, int] = {}
        for place, name in enumerate(self.names):
            found.setdefault(name, place)
        return found


# -----------------------------------------------------------------------------
# Parts


@dataclass(frozen=True)
class Part:
    """A request's speech: int16 PCM, what the worker tells of its segments, how loud it is.

    Where there was nothing to speak, it is empty.
    """

    pcm: bytes
    segments: list[dict[str, Any]] = field(default_factory=list)
    loudness: Loudness = NO_SOUND

    @property
    def seconds(self) -> float:
        return len(self.pcm) / 2 / RATE

    def in_brief(self) -> Brief:
        return Brief(self.seconds, self.segments)


class Brief(NamedTuple):
    """A part without its sound."""

    seconds: float
    segments: list[dict[str, Any]]


def spliced(old: Part, new: Part, indexes: Iterable[int]) -> Part:
    """`old` with some segments as they are in `new`; the rest stays sample for sample."""
    pcm, segments = bytearray(), []
    position = 0
    for index, segment in enumerate(old.segments):
        start, end = samples_of(segment)
        pcm += old.pcm[2 * position : 2 * start]
        taken, sound = segment, old.pcm[2 * start : 2 * end]
        if index in indexes:
            taken = new.segments[index]
            first, last = samples_of(taken)
            sound = new.pcm[2 * first : 2 * last]
        begins = len(pcm) // 2
        pcm += sound
        segments.append({**taken, "start": begins / RATE, "end": len(pcm) / 2 / RATE})
        position = end
    pcm += old.pcm[2 * position :]
    peak = max(old.loudness.peak, new.loudness.peak)
    return Part(bytes(pcm), segments, old.loudness._replace(peak=peak))


def samples_of(segment: Mapping[str, Any]) -> tuple[int, int]:
    """Where it begins and ends in its part."""
    return round(segment["start"] * RATE), round(segment["end"] * RATE)


class Locked(Exception):
    """Another `speak` is at work on this output."""


class Parts:
    """The folder beside the output, for one `speak` at a time."""

    def __init__(self, out: Path):
        self.folder = out.with_name(out.name + ".parts")
        self._lock: int | None = None

    def __enter__(self) -> Parts:
        """Raises Locked; OSError if the folder cannot be made."""
        while True:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / "lock"
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise Locked from None
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                self._lock = lock
                break
            os.close(lock)  # the one before removed the folder just now
        if self.noted("whole"):
            self.remove()
        return self

    def __exit__(self, *exc: object) -> None:
        """Leaves no folder without a part in it."""
        if self._lock is not None:
            if not self.are_there():
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.part"

    def save(self, name: str, part: Part) -> None:
        told = json.dumps({"segments": part.segments, "loudness": part.loudness}).encode()
        body = told + b"\n" + part.pcm
        digest = hashlib.sha256(body).hexdigest().encode()
        self._write(self._path(name), digest + b"\n" + body)

    def _write(self, path: Path, data: bytes) -> None:
        aside = path.with_suffix(".new")
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise

    def load(self, name: str) -> Part | None:
        """None if it is not there, or not whole."""
        try:
            digest, _, body = self._path(name).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return None
        told, _, pcm = body.partition(b"\n")
        facts = json.loads(told)
        return Part(pcm, facts["segments"], Loudness(*facts["loudness"]))

    def briefs(self, names: Iterable[str]) -> dict[str, Brief]:
        """Of those that are there and whole."""
        loaded = ((name, self.load(name)) for name in names)
        return {name: part.in_brief() for name, part in loaded if part}

    def note(self, name: str, value: object) -> None:
        """Keeps what is no part."""
        self._write(self.folder / f"{name}.json", json.dumps(value).encode())

    def noted(self, name: str) -> Any:
        """None if nothing is."""
        try:
            return json.loads((self.folder / f"{name}.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def forget_others(self, names: Iterable[str]) -> None:
        """Removes the parts of earlier versions, and what was being written when a run ended."""
        kept = {self._path(name).name for name in names}
        for path in self.folder.iterdir():
            if path.suffix == ".new" or (path.suffix == ".part" and path.name not in kept):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Killed meanwhile, it leaves a note, so that the next one goes on with it."""
        with suppress(OSError):  # a full disk
            self.note("whole", True)
        names = {path.name for path in self.folder.iterdir()} - {"lock", "whole.json"}
        for name in [*names, "whole.json"]:
            (self.folder / name).unlink(missing_ok=True)

    def are_there(self) -> bool:
        return any(self.folder.glob("*.part"))

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def room(self) -> int:
        return shutil.disk_usage(self.folder).free


# -----------------------------------------------------------------------------
# The whole: where in it each part is heard


class Heard(NamedTuple):
    """A piece in the whole. `brief` is None where it could not be spoken."""

    piece: Piece
    name: str
    start: float  # seconds
    brief: Brief | None

    @property
    def seconds(self) -> float:
        return self.brief.seconds if self.brief else 0.0


def timeline(plan: Plan, briefs: Mapping[str, Brief]) -> list[Heard]:
    heard, at = [], 0
    for piece, name in zip(plan.pieces, plan.names, strict=True):
        one = Heard(piece, name, at / RATE, briefs.get(name))
        heard.append(one)
        at += round(one.seconds * RATE) + round(piece.pause * RATE)
    return heard


def length_of(heard: Sequence[Heard]) -> float:
    return heard[-1].start + heard[-1].seconds + heard[-1].piece.pause if heard else 0.0


def marks_of(chapters: Sequence[Chapter], heard: Sequence[Heard]) -> list[Mark]:
    """Where each chapter begins and ends. One without a title goes by its number."""
    marks = []
    for number, group in groupby(heard, key=lambda one: one.piece.chapter):
        first, *rest = group
        last = [first, *rest][-1]
        end = last.start + last.seconds + last.piece.pause
        title = chapters[number].title[:LONGEST_TITLE] or str(number + 1)
        marks.append(Mark(title, first.start, end))
    return marks


def segment_at(heard: Sequence[Heard], seconds: float) -> tuple[Heard, int] | None:
    """The piece, and which of its segments, is heard then, or was heard last."""
    found = None
    for one in heard:
        for index, segment in enumerate(one.brief.segments if one.brief else ()):
            if one.start + segment["start"] > seconds:
                return found or (one, index)
            found = one, index
    return found if seconds <= length_of(heard) else None

