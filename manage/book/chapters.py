"""What a book is once it is read, and what all kinds share on the way there: what counts as a word,
and where chapters end.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

INVISIBLE = dict.fromkeys(map(ord, "\0\xad\u200b\u2060\ufeff\x1f"))  # soft hyphens and the like
LINE_ENDS = str.maketrans("\r\n", "  ")
STOPS = ".!?…:;,。！？：；，、।॥؟"
CLOSING = "\"'”’»›“‘«‹)]}*_"
ORNAMENTS = frozenset("#*＊∗⁂⁎⁑※§○●◇◆◊□■△▽☆★☙❖❦❧" + "".join(map(chr, range(0x2722, 0x274C))))
RULES = frozenset("-‐–—―⸺⸻─━═~～=_+·・•◦\\")  # a backslash: Markdown's \* stays escaped


class BookError(ValueError):
    """A file that cannot be read aloud, for the person: what, which file, what next."""


@dataclass(frozen=True)
class Paragraph:
    """`line` is where it begins in its source, from 1; a note's `label` is its number or sign. A
    "\\n" in `text` parts lines of verse. `after_break`: a scene's end as "* * *" stands before it.
    """

    text: str
    line: int
    kind: str = "text"  # or "heading", "note"
    label: str = ""
    after_break: bool = False


@dataclass(frozen=True)
class Chapter:
    title: str                         # "" where it has none
    paragraphs: tuple[Paragraph, ...]  # its heading among them
    source: str = ""                   # the file within an EPUB


@dataclass(frozen=True)
class Book:
    title: str
    author: str
    language: str                  # "" where unknown
    chapters: tuple[Chapter, ...]  # none is empty
    remarks: tuple[str, ...] = ()  # what was left out or guessed
    cover: bytes = b""             # JPEG or PNG


class Piece(NamedTuple):
    """A paragraph while the chapters are not known; `level` of a heading is 1 to 6."""

    paragraph: Paragraph
    source: str = ""
    level: int = 0


def squeezed(text: str) -> str:
    return " ".join(text.translate(INVISIBLE).split())


def is_speakable(text: str) -> bool:
    return any(map(str.isalnum, text))


def is_break(text: str) -> bool:
    """Whether a paragraph is the sign of a scene's end: an ornament, or a rule of three signs."""
    signs = "".join(text.split())
    return (ORNAMENTS | RULES).issuperset(signs) and \
        (len(signs) >= 3 or not ORNAMENTS.isdisjoint(signs))


def primary(language: str | None) -> str:
    """"en" of "en-GB"; "" of what is no code of a language."""
    code = re.split(r"[-_]", (language or "").strip().lower())[0]
    return code if code.isascii() and code.isalpha() and code != "und" else ""


def chapters_of(pieces: Sequence[Piece], titles: dict[int, str]) -> tuple[Chapter, ...]:
    """Chapters that begin at these pieces; one without a title before, where there are some."""
    starts = sorted({0, *titles, len(pieces)})
    return tuple(
        Chapter(titles.get(start, ""), tuple(piece.paragraph for piece in pieces[start:end]),
                pieces[start].source)
        for start, end in itertools.pairwise(starts))


def told_left(left: Counter[str], source: str) -> Iterator[str]:
    where = f"{source}: " if source else ""
    for what, count in left.items():
        if count:
            yield f"{where}left out: {what}" + (f" ({count} times)" if count > 1 else "")
