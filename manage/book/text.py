"""Plain text: its encoding, its paragraphs however their lines are wrapped, its chapters."""

from __future__ import annotations

import codecs
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from .chapters import (
    CLOSING,
    ORNAMENTS,
    STOPS,
    Book,
    BookError,
    Paragraph,
    Piece,
    chapters_of,
    is_break,
    is_speakable,
    squeezed,
)

MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32",
         codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}
LONG_LINE = 100   # columns; nothing is wrapped wider, so that longer lines are paragraphs
MIN_WRAP = 36     # columns; nothing is wrapped closer
CHAPTER_WORDS = ("chapter|kapitel|chapitre|cap[ií]tulo|capitolo|rozdział|глава|bölüm"
                 "|part|teil|partie|parte|część|часть|book|buch|livre|libro")
COUNTED = ("one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
           "fifteen sixteen seventeen eighteen nineteen twenty thirty forty first second third "
           "fourth fifth sixth seventh eighth ninth tenth last").replace(" ", "|")
# takes: "CHAPTER IV. The Storm" "Kapitel 3" "Erstes Buch" "第三章"  not: "Part I think is true."
CHAPTER_RE = re.compile(
    rf"(?:(?P<word>{CHAPTER_WORDS})\s(?:the\s)?(?:\d{{1,3}}|(?-i:[IVXLC]{{1,8}})|{COUNTED}"
    rf"|[^\W\d_]+ая)(?![^\W_])(?P<title>.{{0,80}})"
    r"|(?:[^\W\d_]+te[sr]?|\d{1,3}\.)\s(?P<after>kapitel|buch|teil)[.:]?"
    r"|第\s?[\d一二三四五六七八九十百〇零]+\s?[章回部].{0,40})", re.I | re.S)
GUTENBERG_RE = re.compile(r"^\*\*\* ?(START|END) OF (?:THE|THIS) PROJECT GUTENBERG .*$", re.M)


def decoded(data: bytes, name: str) -> tuple[str, list[str]]:
    """A file's text, and what had to be guessed. Raises BookError for what is no text."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return data.decode(encoding, "replace"), []
    if b"\0" in data:
        raise BookError(f"{name} is no text: it has NUL bytes; if it is UTF-16 without a mark, "
                        f"convert it: iconv -f UTF-16LE -t UTF-8 {name}")
    with suppress(UnicodeDecodeError):
        return data.decode("utf-8"), []
    with_holes = data.decode("utf-8", "replace")
    holes, signs = with_holes.count("\ufffd"), sum(char > "\x7f" for char in with_holes)
    if signs > 5 * holes:
        line = with_holes[: with_holes.index("\ufffd")].count("\n") + 1
        return with_holes.replace("\ufffd", ""), [
            f"{name}: {holes} broken signs are left out, the first in line {line}"]
    guess = data.decode("cp1252", "replace")
    if not looks_western(guess):
        raise BookError(f"{name} is not in UTF-8, and in which encoding cannot be told; convert "
                        f"it, as from Windows' Cyrillic: iconv -f CP1251 -t UTF-8 {name}")
    return guess, [f"{name} is not in UTF-8; it is read as Windows-1252, a guess. If letters are "
                   f"wrong, convert it: iconv -f ENCODING -t UTF-8 {name}"]


def looks_western(text: str) -> bool:
    """Whether its accents are as rare as they are there, and no signs stand within words."""
    letters = Counter("plain" if char.isascii() else "accented" for char in text if char.isalpha())
    odd = re.search(r"[^\W\d_][¡-©«¬®-´¶¸-»¼-¿€ƒ‰†‡\ufffd][^\W\d_]|[a-zß-ÿ][À-ÖØ-Þ]", text)
    return letters["accented"] <= 0.2 * letters["plain"] and not odd


class Lines(NamedTuple):
    """Lines that no blank one parts, trimmed at their ends; `line` is the number of the first."""

    lines: list[str]
    line: int


def read_text(text: str) -> Book:
    """Paragraphs are what blank lines part, or lines; chapters only where they are sure."""
    text = re.sub(r"\r\n?|[\x0b\x85\u2028]", "\n", text).replace("\f", "\n\n")
    text = text.replace("\u2029", "\n\n")
    text, tags, remarks = without_licence(text)
    found = list(pieces_of(list(blocks_of(text))))
    titles = text_titles([piece.paragraph.text for piece in found])
    for index in titles:
        found[index] = Piece(replace(found[index].paragraph, kind="heading"))
    return Book(tags.get("Title", ""), tags.get("Author", ""), "", chapters_of(found, titles),
                tuple(remarks))


def without_licence(text: str) -> tuple[str, dict[str, str], list[str]]:
    """A text without what Project Gutenberg puts around it, and what its head tells."""
    marks = list(GUTENBERG_RE.finditer(text))
    if not marks or marks[0][1] != "START":
        return text, {}, []
    end = next((mark.start() for mark in marks if mark[1] == "END"), len(text))
    head = text[: marks[0].start()]
    tags = dict(re.findall(r"^(Title|Author): +(\S.*?)\s*$", head, re.M))
    lines = "\n" * text.count("\n", 0, marks[0].end())  # so that lines keep their numbers
    return lines + text[marks[0].end() : end], tags, [
        "left out: Project Gutenberg's head and licence"]


def blocks_of(text: str) -> Iterator[Lines]:
    lines: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            yield Lines(lines, number - len(lines))
            lines = []


def pieces_of(blocks: Sequence[Lines]) -> Iterator[Piece]:
    parted = len(blocks) > 1 and any(len(block.lines) > 1 for block in blocks)
    widths = sorted(len(line) for block in blocks for line in block.lines[:-1]
                    if len(line) <= LONG_LINE)
    measure = widths[int(0.95 * len(widths))] if widths else 0  # few are wider: tables, addresses
    after_break = False
    for block in blocks:
        for paragraph in paragraphs_of(block, measure, parted):
            if is_speakable(paragraph.text):
                yield Piece(replace(paragraph, after_break=after_break))
                after_break = False
            else:
                after_break |= is_break(paragraph.text)


def paragraphs_of(block: Lines, measure: int, parted: bool) -> Iterator[Paragraph]:
    """A block's paragraphs; `measure` is the width that the text is wrapped to, and `parted` says
    whether its author parts paragraphs with blank lines.
    """
    lines = [line.strip() for line in block.lines]
    full = [is_full(line, after, measure) for line, after in itertools.pairwise(lines)]
    wrapped = len(full) > 0 and sum(full) >= 0.7 * len(full) and max(map(len, lines)) <= LONG_LINE
    dents = [line[0].isspace() for line in block.lines]
    starts = {0}
    if wrapped and not all(dents[1:]):
        starts |= {index for index, dent in enumerate(dents) if dent}
    elif max(map(len, lines)) > LONG_LINE or (not parted and end_with_stops(lines)):
        starts |= set(range(len(lines)))
    if wrapped and not parted:  # the last line of a paragraph is short
        starts |= {index + 1 for index, is_whole in enumerate(full)
                   if not is_whole and lines[index].rstrip(CLOSING)[-1:] in STOPS}
    # a rule within a block underlines a heading or a table's
    starts |= {edge for index, line in enumerate(lines)
               if is_break(line) and not ORNAMENTS.isdisjoint(line) for edge in (index, index + 1)}
    for start, end in itertools.pairwise(sorted({*starts, len(lines)})):
        text = joined(lines[start:end]) if wrapped else "\n".join(lines[start:end])
        yield Paragraph("\n".join(map(squeezed, text.split("\n"))), block.line + start)


def is_full(line: str, after: str, measure: int) -> bool:
    """Whether a line had no room for the next one's first word, more or less."""
    word = after.split(maxsplit=1)[0]
    return measure >= MIN_WRAP and len(line) + 1 + min(len(word), 20) > 0.85 * measure


def end_with_stops(lines: list[str]) -> bool:
    """Whether most lines are sentences of their own."""
    ended = sum(line.rstrip(CLOSING)[-1:] in STOPS[:4] + "。！？।॥؟" for line in lines)
    return 3 * ended >= 2 * len(lines)


def joined(lines: list[str]) -> str:
    """Wrapped lines as one; where a word is parted the worker decides what its hyphen was."""
    text = lines[0]
    for line in lines[1:]:
        if text[-1] in "-\u2010\xad" and text[-2:-1].isalpha() and line[0].isalpha():
            text += f"\n{line}"
        elif unicodedata.east_asian_width(text[-1]) in "WF" and not "가" <= text[-1] <= "힣":
            text += line
        else:
            text += f" {line}"
    return text


def text_titles(texts: list[str]) -> dict[int, str]:
    """Where chapters begin. Headings in a row are one, unless they are a table of contents."""
    titles: dict[int, str] = {}
    words = [heading_word(text) for text in texts]
    for is_head, run in itertools.groupby(range(len(texts)), lambda index: words[index] != ""):
        indices = list(run)
        kinds = {words[index] for index in indices}
        if is_head and len(kinds) == len(indices) and indices[-1] + 1 < len(texts):
            titles[indices[0]] = ". ".join(squeezed(texts[index]).rstrip(".:") for index in indices)
    return titles


def heading_word(text: str) -> str:
    """The word of a chapter's heading, as "part"; "" of what is none for sure."""
    found = CHAPTER_RE.fullmatch(text)
    if not found or text.count("\n") > 2 or text[-1] in ",;!?…":
        return ""
    title = (found["title"] or "").lstrip(" .:-–—\n")
    listed = any(map(CHAPTER_RE.fullmatch, text.split("\n")[1:]))
    if title[:1].islower() or listed:
        return ""
    return (found["word"] or found["after"] or "第").lower()
