"""A text of any length as chapters of paragraphs: plain text, Markdown, EPUB 2 and 3.

    book = read_book(path.read_bytes(), path.name)

What an author wrote to be read stays, in order; what only serves a page or a screen is left out
(contents, page numbers, code, images), and `remarks` say so. What looks like prose to a listener is
decided here, how it is spoken by the worker: that reads signs, and joins hyphenated lines. No
network, no sound, and nothing is read but the bytes that are given: no file, no address that a book
names.
"""

from __future__ import annotations

import codecs
import contextlib
import html
import io
import itertools
import posixpath
import re
import stat
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html.entities import html5
from pathlib import PurePath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from lxml import etree
from markdown_it import MarkdownIt
from mdit_py_plugins.footnote import footnote_plugin
from mdit_py_plugins.front_matter import front_matter_plugin


class BookError(ValueError):
    """A file that cannot be read aloud, for the person: what, which file, what next."""


@dataclass(frozen=True)
class Paragraph:
    """`line` is where it begins in its source, from 1. `language` is a code as "de" where it is not
    the book's own; a note's `label` is its number or sign. A "\\n" in `text` parts lines of verse.
    """

    text: str
    line: int
    kind: str = "text"  # or "heading", "note"
    label: str = ""
    language: str = ""


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


def read_book(data: bytes, name: str) -> Book:
    """The book in a file of that name; the name tells Markdown from plain text, the rest `data`.

    Raises BookError.
    """
    if what := foreign_kind(data):
        raise BookError(f"{name} is {what}; save it as .epub, .txt or .md (Calibre converts most "
                        "books) and give that")
    if data.startswith(ZIP) or name.lower().endswith(".epub"):
        book = read_epub(data, name)
    else:
        text, remarks = decoded(data, name)
        read = read_markdown if name.lower().endswith((".md", ".markdown")) else read_text
        book = read(text)
        book = replace(book, remarks=(*remarks, *book.remarks))
    if not book.chapters:
        raise BookError(" ".join([f"{name} has no text to speak.", *book.remarks]))
    return replace(book, title=book.title or ("" if name == "-" else PurePath(name).stem))


def foreign_kind(data: bytes) -> str:
    """What a file is that is none of ours, by its first bytes; "" where it may be one."""
    known = {b"%PDF-": "a PDF", b"{\\rtf": "an RTF file", b"AT&TFORM": "a DjVu file",
             b"\xd0\xcf\x11\xe0": "a Word file of the old kind", b"ITSF": "a CHM file",
             b"\x1f\x8b": "a gzip file", b"Rar!": "a RAR file", b"7z\xbc\xaf": "a 7-Zip file"}
    if data[60:68] in (b"BOOKMOBI", b"TEXtREAd"):
        return "a Kindle book (MOBI, AZW)"
    if data.startswith(b"\xeaDRMION\xee"):
        return "a protected Kindle book (KFX)"
    return next((what for start, what in known.items() if data.startswith(start)), "")


# -----------------------------------------------------------------------------
# Words and chapters

INVISIBLE = dict.fromkeys(map(ord, "\xad\u200b\u2060\ufeff\x1f"))  # soft hyphens and the like
LINE_ENDS = str.maketrans("\r\n", "  ")
STOPS = ".!?…:;,。！？：；，、।॥؟"
CLOSING = "\"'”’»›“‘«‹)]}*_"


def squeezed(text: str) -> str:
    return " ".join(text.translate(INVISIBLE).split())


def is_speakable(text: str) -> bool:
    return any(map(str.isalnum, text))


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


# -----------------------------------------------------------------------------
# Plain text

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
    with_holes = data.decode("utf-8", "replace")
    holes, signs = with_holes.count("\ufffd"), sum(char > "\x7f" for char in with_holes)
    if not holes:
        return with_holes, []
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
    blocks = list(blocks_of(text))
    parted = len(blocks) > 1 and any(len(block.lines) > 1 for block in blocks)
    widths = sorted(len(line) for block in blocks for line in block.lines[:-1]
                    if len(line) <= LONG_LINE)
    measure = widths[int(0.95 * len(widths))] if widths else 0  # few are wider: tables, addresses
    found = [Piece(paragraph) for block in blocks
             for paragraph in paragraphs_of(block, measure, parted)
             if is_speakable(paragraph.text)]
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


# -----------------------------------------------------------------------------
# Pages: HTML to paragraphs

BLOCKS = frozenset([
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details",
    "dialog", "dir", "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1",
    "h2", "h3", "h4", "h5", "h6", "header", "hgroup", "hr", "html", "legend", "li", "main", "menu",
    "ol", "p", "pre", "section", "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr",
    "ul"])
SKIPPED = frozenset([
    "audio", "button", "canvas", "head", "iframe", "input", "label", "map", "noscript", "object",
    "rp", "rt", "rtc", "script", "select", "style", "svg", "template", "textarea", "title",
    "video"])
HEADINGS = {**{f"h{level}": level for level in range(1, 7)}, "hgroup": 2}
HOLDERS = frozenset(["body", "div", "dl", "ol", "section", "table", "ul"])  # of many links
CONTENTS = frozenset(["toc", "toc-brief", "page-list", "landmarks", "lot", "loi", "index",
                      "navigation"])
NOTES = frozenset(["footnote", "endnote", "rearnote"])
NOTE_LISTS = frozenset(["footnotes", "endnotes", "rearnotes"])
PAGE_CLASSES = frozenset(["pagenum", "pageno", "page-number", "pagebreak", "pagenumber"])
BACK_CLASSES = frozenset(["footnote-backref", "footnote-back", "backlink", "noteback"])
REF_CLASSES = frozenset(["noteref", "footnote-ref", "fnanchor", "footnoteref"])
XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
EPUB_TYPE = "{http://www.idpf.org/2007/ops}type"
LABEL_RE = re.compile(r"\d{1,4}|[*†‡§¶]{1,3}|[a-z]|[ivxlc]{1,6}", re.I)
CELL = "\x1f"         # parts a row's cells

Place = tuple[str, str]  # a file of an EPUB and an id in it


def local(element: etree._Element) -> str:
    """An element's name without its namespace; "" of a comment and the like."""
    return element.tag.rpartition("}")[2].lower() if isinstance(element.tag, str) else ""


def roles(element: etree._Element) -> set[str]:
    """What EPUB and ARIA say that it is: "footnote", "toc" ..."""
    told = f"{element.get(EPUB_TYPE, '')} {element.get('epub:type', '')}".split()
    return {*told, *(role.removeprefix("doc-") for role in element.get("role", "").split())}


def has_class(element: etree._Element, names: frozenset[str]) -> bool:
    return not names.isdisjoint(element.get("class", "").lower().split())


def is_hidden(element: etree._Element) -> bool:
    style = element.get("style", "").replace(" ", "").lower()
    return element.get("hidden") is not None or "display:none" in style


def all_text(element: etree._Element) -> str:
    return squeezed("".join(element.itertext(etree.Element)))


def parsed(data: bytes, name: str, is_page: bool = True) -> etree._Element | None:
    """A file's root, as XML, else a page as a browser would take it. No entity is ever expanded,
    and nothing is fetched; what declares entities from outside, or of others, is refused.
    """
    try:
        root = etree.fromstring(data, xml_parser())
    except etree.XMLSyntaxError:
        root = parsed_as_html(data) if is_page else etree.fromstring(data, xml_parser(recover=True))
    if root is None:
        return None
    for entity in declared_entities(root):
        if entity.content is None or re.search(r"[&%]\w", entity.orig or ""):
            raise BookError(f"{name} declares the entity {entity.name!r}, which would bring in "
                            "what is not in the book; such a book is not read")
    return root


def xml_parser(**options: bool) -> etree.XMLParser:
    return etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False,
                           remove_comments=True, remove_pis=True, **options)


def declared_entities(root: etree._Element) -> Iterator[etree._DTDEntityDecl]:
    dtd = root.getroottree().docinfo.internalDTD
    return dtd.iterentities() if dtd is not None else iter(())


def parsed_as_html(data: bytes) -> etree._Element | None:
    if b"\0" in data:
        return None
    try:
        data.decode("utf-8")
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = None  # as it says itself
    parser = etree.HTMLParser(no_network=True, huge_tree=False, remove_comments=True,
                              remove_pis=True, encoding=encoding)
    try:
        return etree.fromstring(data, parser)
    except etree.XMLSyntaxError:  # nothing in it
        return None


def link_target(element: etree._Element, source: str) -> Place | None:
    """Where in the book a link leads; None for one that leads out of it."""
    return place_of(element.get("href", ""), source)


def place_of(address: str, source: str) -> Place | None:
    """The same of an address that stands in the file `source`."""
    try:
        parts = urlsplit(address.strip())
    except ValueError:
        return None
    if parts.scheme or parts.netloc or not (parts.path or parts.fragment):
        return None
    if not parts.path:
        return source, unquote(parts.fragment)
    path = posixpath.join(posixpath.dirname(source), unquote(parts.path))
    return posixpath.normpath(path), unquote(parts.fragment)


class Reference(NamedTuple):
    """A link that looks like a note's mark; `places` are its own, where a link back may lead."""

    target: Place
    label: str
    places: frozenset[Place]


class Survey:
    """What a book's pages say of notes, before any of them is read."""

    def __init__(self) -> None:
        self.notes: dict[Place, str] = {}  # where a note stands, and its label
        self._starts: dict[Place, str] = {}
        self._blocks: set[Place] = set()
        self._back: dict[Place, set[Place]] = {}  # where the links in an element lead
        self._references: list[Reference] = []

    def look(self, root: etree._Element, source: str) -> None:
        for element in root.iter(etree.Element):
            for place in places_of(element, source):
                self._starts[place] = first_signs(element)
                if local(element) in BLOCKS:
                    self._blocks.add(place)
            if local(element) == "a" and (target := link_target(element, source)):
                self._look_at_link(element, target, source)

    def _look_at_link(self, element: etree._Element, target: Place, source: str) -> None:
        near = [element, *itertools.islice(element.iterancestors(), 3)]
        places = frozenset(place for each in near for place in places_of(each, source))
        for place in places:
            self._back.setdefault(place, set()).add(target)
        label = note_label(element)
        if label and "noteref" in roles(element):
            self.notes.setdefault(target, label)
        elif label and is_raised(element):
            self._references.append(Reference(target, label, places))

    def decide(self) -> None:
        """Of links that only look like a note's mark, those are one whose end begins with their
        label, or is a paragraph that leads back to them.
        """
        for target, label, places in self._references:
            start = self._starts.get(target, "").lstrip("[(")
            begins = start.startswith(label) and not start[len(label) :][:1].isalnum()
            leads_back = target in self._blocks and self._back.get(target, set()) & places
            if begins or leads_back:
                self.notes.setdefault(target, label)


def places_of(element: etree._Element, source: str) -> Iterator[Place]:
    if name := element.get("id"):
        yield source, name
    if local(element) == "a" and (name := element.get("name")):
        yield source, name


def first_signs(element: etree._Element) -> str:
    """How the paragraph begins that an element is or stands in."""
    while local(element) not in BLOCKS and element.getparent() is not None:
        element = element.getparent()
    signs = ""
    for text in itertools.islice(element.itertext(etree.Element), 20):
        signs += text
        if len(signs) > 99:
            break
    return squeezed(signs)[:12]


def note_label(element: etree._Element) -> str:
    """A link's text if it may be a note's number or sign, without brackets."""
    texts = list(itertools.islice(element.itertext(etree.Element), 8))
    label = squeezed("".join(texts)).strip("[]() ")
    return label if LABEL_RE.fullmatch(label) else ""


def is_raised(element: etree._Element) -> bool:
    """Whether a link looks like a note's: raised, in brackets, or of such a class."""
    near = [element, *itertools.islice(element.iterancestors(), 2)]
    return (any(local(each) == "sup" for each in [*near, *element])
            or has_class(element, REF_CLASSES)
            or squeezed("".join(element.itertext(etree.Element)))[:1] in ("[", "("))


def contents_in(root: etree._Element, source: str, is_toc: bool) -> set[etree._Element]:
    """Lists, tables and pages that are hardly more than links into the book."""
    links: Counter[etree._Element | None] = Counter(
        link for link in root.iter("{*}a") if link_target(link, source))
    if len(links) < 2:
        return set()
    letters: Counter[etree._Element | None] = Counter()
    linked: Counter[etree._Element | None] = Counter()
    found = set()
    for element in reversed(list(root.iter(etree.Element))):  # what is in one comes before it
        letters[element] += len(squeezed(element.text or ""))
        if local(element) == "a" and links[element]:
            linked[element] = letters[element]
        is_page = is_toc and local(element) == "body"
        if local(element) in HOLDERS and links[element] >= (2 if is_page else 4) and \
                linked[element] >= (0.5 if is_page else 0.8) * letters[element]:
            found.add(element)
        above = element.getparent()
        letters[above] += letters[element] + len(squeezed(element.tail or ""))
        linked[above] += linked[element]
        links[above] += links[element]
    return found


class Frame(NamedTuple):
    """What holds within an element."""

    kind: str = "text"
    label: str = ""
    language: str = ""
    level: int = 0
    line: int = 0
    verbatim: bool = False  # lines are kept
    row: bool = False       # its cells are one paragraph


class Page:
    """Reads a page, element by element, into pieces; no depth of nesting can break it."""

    def __init__(self, source: str, language: str, notes: dict[Place, str]):
        self.pieces: list[Piece] = []
        self.spots: dict[str, int] = {}  # the piece that an id stands in or before
        self.left: Counter[str] = Counter()
        self.images = 0
        self._source, self._language, self._notes = source, language, notes
        self._contents: set[etree._Element] = set()
        self._entities: dict[str, str] = {}
        self._buffer: list[str] = []
        self._begun: Frame | None = None   # where the buffer's first words stand
        self._prefix = ""                  # the number of the item that begins
        self._numbers: list[int] = []      # of the next items of the lists that are open
        self._line = 1

    def read(self, root: etree._Element, is_toc: bool = False) -> None:
        self._contents = contents_in(root, self._source, is_toc)
        self._entities = {entity.name: entity.content for entity in declared_entities(root)
                          if len(entity.content) <= 40 and "<" not in entity.content}
        stack = [(root, self._open(root, Frame()), iter(root))]
        while stack:
            element, frame, children = stack[-1]
            child = next(children, None)
            if child is None:
                stack.pop()
                self._close(element, frame)
                if stack:
                    self._add(element.tail, stack[-1][1])
            elif child.tag is etree.Entity:
                self._add(self._meant(child.name), frame)
                self._add(child.tail, frame)
            elif self._is_skipped(child, frame):
                self._add(child.tail, frame)
            else:
                stack.append((child, self._open(child, frame), iter(child)))
        self._flush()

    def _meant(self, entity: str) -> str:
        """The sign that an entity stands for."""
        return self._entities.get(entity) or html5.get(f"{entity};", "")

    # What is left out

    def _is_skipped(self, element: etree._Element, frame: Frame) -> bool:
        name = local(element)
        if name in ("img", "image", "svg"):
            self.images += 1
            self._add(spoken_alt(element, frame), frame)
        self._note_place(element)
        if name == "math":
            self._add(element.get("alttext"), frame)
            self.left["formulas"] += not element.get("alttext")
            return True
        told = roles(element)
        if element in self._contents or name == "nav" or not told.isdisjoint(CONTENTS):
            self.left["contents"] += 1
            return True
        if name == "pre" and is_code(element):
            self.left["code"] += 1
            return True
        return (name in SKIPPED or name == "img" or is_hidden(element)
                or "pagebreak" in told or has_class(element, PAGE_CLASSES)
                or (name == "a" and self._is_note_link(element, frame)))

    def _is_note_link(self, element: etree._Element, frame: Frame) -> bool:
        """Whether it is the mark of a note, or leads back from one."""
        if not roles(element).isdisjoint(("noteref", "backlink")):
            return True
        target = link_target(element, self._source)
        label = squeezed("".join(itertools.islice(element.itertext(etree.Element), 8)))
        if target is None or not label:
            return False
        is_own = frame.kind == "note" and label.strip("[]().") == frame.label
        return (is_own or not is_speakable(label) or has_class(element, BACK_CLASSES)
                or (target in self._notes and note_label(element) != ""))

    # Elements

    def _note_place(self, element: etree._Element) -> None:
        for _, name in places_of(element, self._source):
            self.spots.setdefault(name, len(self.pieces) + self._ends_before(element))

    def _ends_before(self, element: etree._Element) -> bool:
        """Whether a paragraph that is not a piece yet ends where an element begins."""
        return local(element) in BLOCKS and self._begun is not None

    def _open(self, element: etree._Element, frame: Frame) -> Frame:
        name = local(element)
        if language := primary(element.get(XML_LANG) or element.get("lang")):
            frame = frame._replace(language=language)
        self._line = (element.sourceline if self._source else
                      number(element.get("data-line", ""), 0)) or self._line
        frame = self._as_note(element, frame._replace(line=self._line))
        if name in BLOCKS and not frame.row:
            self._flush()
            frame = self._as_block(element, name, frame)
        elif name == "br":
            self._buffer.append("\n")
        elif name == "q":
            self._add("“", frame)
        self._add(element.text, frame)
        return frame

    def _as_block(self, element: etree._Element, name: str, frame: Frame) -> Frame:
        if name in ("ol", "ul"):
            counted = name == "ol" and element.get("type", "1") == "1" and frame.kind != "note"
            self._numbers.append(number(element.get("start", ""), 1) if counted else -1)
        elif name == "li" and self._numbers and self._numbers[-1] >= 0 and frame.kind != "note":
            self._prefix = f"{self._numbers[-1]}. "
            self._numbers[-1] += 1
        elif name == "tr":
            return frame._replace(row=not any(local(each) in BLOCKS for cell in element
                                              for each in cell.iterdescendants()))
        elif name == "pre":
            return frame._replace(verbatim=True)
        elif level := HEADINGS.get(name):
            return frame._replace(kind="heading", level=level)
        return frame

    def _as_note(self, element: etree._Element, frame: Frame) -> Frame:
        told = roles(element)
        label = next((self._notes[place] for place in places_of(element, self._source)
                      if place in self._notes), None)
        if label is None and told.isdisjoint(NOTES | NOTE_LISTS):
            return frame
        if local(element) in BLOCKS:
            return frame._replace(kind="note", label=label or "")
        if label is not None and self._begun is None:  # at its paragraph's start
            self._begun = frame._replace(kind="note", label=label)
        return frame

    def _close(self, element: etree._Element, frame: Frame) -> None:
        name = local(element)
        if name == "q":
            self._add("”", frame)
        elif frame.row and name in ("td", "th"):
            self._buffer.append(CELL)
        elif name in BLOCKS and (name == "tr" or not frame.row):
            self._flush()
            if name in ("ol", "ul"):
                self._numbers.pop()

    # Words

    def _add(self, text: str | None, frame: Frame) -> None:
        if not text:
            return
        if self._begun is None and not text.isspace():
            self._begun = frame
        text = text.replace(CELL, "")
        self._buffer.append(text if frame.verbatim else text.translate(LINE_ENDS))

    def _flush(self) -> None:
        """Ends the paragraph; two line ends make two of it."""
        text, frame = "".join(self._buffer), self._begun or Frame()
        self._buffer, self._begun = [], None
        if not is_speakable(text):
            return
        text = joined_cells(text) if CELL in text else text
        lines = map(squeezed, text.split("\n"))
        for is_empty, group in itertools.groupby(lines, lambda line: not line):
            text = self._prefix + "\n".join(group)
            if not is_empty and is_speakable(text):
                self._prefix = ""
                self._keep(text, frame)

    def _keep(self, text: str, frame: Frame) -> None:
        label = frame.label
        if frame.kind == "note":
            label, text = without_label(text, label)
        language = "" if frame.language == self._language else frame.language
        if is_speakable(text):
            self.pieces.append(Piece(Paragraph(text, frame.line, frame.kind, label, language),
                                     self._source, frame.level))


def number(text: str, otherwise: int) -> int:
    return int(text) if text.isdecimal() and len(text) < 9 else otherwise


def spoken_alt(image: etree._Element, frame: Frame) -> str:
    """What an image stands for where it is a heading, or a paragraph's first letter; else it only
    adorns or shows what cannot be heard.
    """
    alt = squeezed(image.get("alt", ""))
    return alt if frame.kind == "heading" or (len(alt) == 1 and alt.isalpha()) else ""


def is_code(element: etree._Element) -> bool:
    return (any(local(child) in ("code", "samp", "kbd") for child in element)
            or any(re.search("code|listing|highlight|screen", each.get("class", ""))
                   for each in (element, *itertools.islice(element.iterancestors(), 1))))


def joined_cells(text: str) -> str:
    """A row of a table, with pauses between its cells."""
    row = ""
    for cell in filter(None, map(squeezed, text.split(CELL))):
        pause = " " if row[-1:] in STOPS else ", "
        row += f"{pause}{cell}" if row else cell
    return row


def without_label(text: str, label: str) -> tuple[str, str]:
    """A note's label, which may stand before its text, and its text."""
    # what stood around a link back, which is left out
    text = re.sub(r"^(?:[\[(]\s?[\])][.:]?\s*|[.):]\s+)", "", text)
    found = re.match(r"[\[(]?(\d{1,4}|[*†‡§¶]{1,3}|[a-z]|[ivxlc]{1,6})(?:[\])]\W?|\.|:|\s)\s*",
                     text)
    if found and (found[1] == label or (not label and not found[1].isalpha())):
        return found[1], text[found.end() :]
    if label and text.startswith(label) and not text[len(label) :][:1].isalnum():
        return label, text[len(label) :].lstrip("])}.: ")
    return label, text


# -----------------------------------------------------------------------------
# Markdown: as HTML to the same pages


def read_markdown(text: str) -> Book:
    """Chapters begin at the highest headings of which there are two."""
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    markdown.use(footnote_plugin).use(front_matter_plugin).disable("text_join")
    markdown.add_render_rule("em_open", lambda *_: "*")  # the worker reads it
    markdown.add_render_rule("em_close", lambda *_: "*")
    markdown.add_render_rule("code_inline", render_code)
    markdown.add_render_rule("text_special", render_special)
    tokens = markdown.parse(text)
    for token in tokens:
        if token.map and token.nesting >= 0:
            token.attrSet("data-line", str(token.map[0] + 1))
    page = html_page(markdown.renderer.render(tokens, markdown.options, {}))
    tags = dict(line.split(":", 1) for token in tokens if token.type == "front_matter"
                for line in token.content.splitlines() if ":" in line)
    facts = {key.strip().lower(): value.strip().strip("\"'") for key, value in tags.items()}
    comments = sum(each.content.startswith("<!--") for token in tokens
                   for each in [token, *(token.children or ())])
    page.left["comments"] += comments
    titles = markdown_titles(page.pieces)
    first = [piece.paragraph.text for piece in page.pieces if piece.level == 1]
    title = facts.get("title") or (plain(first[0]) if len(first) == 1 else "")
    return Book(title, facts.get("author", ""), primary(facts.get("lang", facts.get("language"))),
                chapters_of(page.pieces, titles), tuple(told_left(page.left, "")))


def html_page(body: str) -> Page:
    root = parsed_as_html(f"<html><body>{body}</body></html>".encode())
    survey = Survey()
    survey.look(root, "")
    survey.decide()
    page = Page("", "", survey.notes)
    page.read(root)
    return page


def render_code(_: object, tokens: Sequence, index: int, *__: object) -> str:
    """With its marks, so that signs in it stay signs to the worker."""
    token = tokens[index]
    return html.escape(f"{token.markup}{token.content}{token.markup}")


def render_special(_: object, tokens: Sequence, index: int, *__: object) -> str:
    """An escaped sign stays escaped for the worker; an entity is its sign."""
    token = tokens[index]
    return html.escape(token.markup if token.info == "escape" else token.content)


def plain(text: str) -> str:
    """A heading as a title, without marks for the worker."""
    return squeezed(re.sub(r"\\(?=\W)|(?<!\\)[*`]", "", text))


def markdown_titles(pieces: Sequence[Piece]) -> dict[int, str]:
    levels = Counter(piece.level for piece in pieces if piece.level)
    level = min((level for level in levels if levels[level] > 1), default=min(levels, default=0))
    titles: dict[int, str] = {}
    for index, piece in enumerate(pieces):
        if 0 < piece.level <= level:  # a heading that stands alone goes with the next one
            start = max(titles, default=-1)
            alone = start >= 0 and all(each.level for each in pieces[start:index])
            titles[start if alone else index] = plain(piece.paragraph.text)
    return titles


def told_left(left: Counter[str], source: str) -> Iterator[str]:
    where = f"{source}: " if source else ""
    for what, count in left.items():
        if count:
            yield f"{where}left out: {what}" + (f" ({count} times)" if count > 1 else "")


# -----------------------------------------------------------------------------
# EPUB: the zip

ZIP = b"PK\x03\x04"
MAX_ENTRIES = 20_000
MAX_PAGE, MAX_READ = 16 * 2**20, 128 * 2**20  # bytes of one file, and of all that are read
MAX_TAGS = 1_500_000                          # and entities; a Mahabharata has 0.66 million
MAX_RATIO = 200                               # prose packs to a third, the dullest table to 1/50
FONT_MASKS = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")
RIGHTS = ("META-INF/rights.xml", "META-INF/sinf.xml", "META-INF/license.lcpl")
BROKEN = (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError, OSError,
          ValueError, IndexError)


class Archive:
    """The files in an EPUB, read one by one, no more of them than a book can have."""

    def __init__(self, data: bytes, name: str):
        self.name = name
        self._read, self._tags = Counter[str](), Counter[str]()  # by file
        if data.count(b"PK\x01\x02") > MAX_ENTRIES:  # before zipfile makes an object of each
            raise BookError(f"{name} has more than {MAX_ENTRIES} files in it, which no book has")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except BROKEN as error:
            raise BookError(f"{name} is no EPUB, or a broken one: {error}; get it again") from error
        entries = self._zip.infolist()
        self._entries = {entry.filename: entry for entry in entries}
        self._folded = {entry.filename.casefold(): entry for entry in entries}
        for entry in entries:
            self._check(entry)

    def _check(self, entry: zipfile.ZipInfo) -> None:
        path = entry.orig_filename
        if re.match(r"[/\\]|[A-Za-z]:", path) or "\0" in path or \
                ".." in re.split(r"[/\\]", path) or stat.S_ISLNK(entry.external_attr >> 16):
            raise BookError(f"{self.name} has a file that would lie outside of it, {path[:80]!r}; "
                            "such a book is not read")
        if entry.flag_bits & 1:
            raise BookError(f"{self.name} is encrypted with a password; unpack it and pack it anew")

    def __contains__(self, path: str) -> bool:
        return path in self._entries

    def read(self, path: str) -> bytes | None:
        """A file's bytes; None for one that is absent or broken. Raises BookError for a bomb."""
        entry = self._entries.get(path) or self._folded.get(path.casefold())
        if entry is None:
            return None
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return None  # an EPUB has no other, and zipfile would unpack those without a bound
        if entry.file_size > 2**20 and entry.file_size > MAX_RATIO * entry.compress_size:
            raise self._bomb(path, entry.file_size)
        try:
            with self._zip.open(entry) as file:
                data = file.read(MAX_PAGE + 1)
        except BROKEN:
            return None
        self._read[entry.filename] = len(data)
        if len(data) > MAX_PAGE or self._read.total() > MAX_READ:
            raise self._bomb(path, entry.file_size)
        return data

    def _bomb(self, path: str, size: int) -> BookError:
        return BookError(f"{self.name}: {path} would unpack to {size / 2**20:.0f} MB; a book's "
                         f"pages have {MAX_PAGE >> 20} MB each and {MAX_READ >> 20} MB in all at "
                         "most: this is no book")

    def tree(self, path: str, is_page: bool = False) -> etree._Element | None:
        data = self.read(path)
        if not data:
            return None
        self._tags[path] = data.count(b"<") + data.count(b"&")
        if self._tags.total() > MAX_TAGS:
            raise BookError(f"{self.name} has more than {MAX_TAGS} tags and entities, which no "
                            "book has")
        return parsed(data, f"{self.name}: {path}", is_page)


def check_rights(archive: Archive) -> None:
    """Raises BookError for a book that is encrypted; fonts may be masked."""
    root = archive.tree("META-INF/encryption.xml")
    methods = [] if root is None else [
        method.get("Algorithm", "") for data in root.iter("{*}EncryptedData")
        for method in itertools.islice(data.iter("{*}EncryptionMethod"), 1)]
    if any(path in archive for path in RIGHTS) or not set(methods) <= set(FONT_MASKS):
        raise BookError(f"{archive.name}: this book is protected (DRM) and cannot be read; only "
                        "who sold it can give it without")


# -----------------------------------------------------------------------------
# EPUB: the package, and how it is read

PAGE_KINDS = ("application/xhtml+xml", "text/html", "text/x-oeb1-document", "application/xml")


class Item(NamedTuple):
    """A file that the package lists."""

    path: str
    kind: str
    properties: frozenset[str]
    linear: bool = True


class Entry(NamedTuple):
    """A line of the table of contents."""

    title: str
    place: Place
    depth: int


class Package:
    """What the OPF says."""

    def __init__(self, archive: Archive):
        self.path = root_file(archive)
        root = archive.tree(self.path)
        if root is None:
            raise BookError(f"{archive.name} is a broken EPUB: it has no {self.path}; get it again")
        self._root = root
        self.items = {each.get("id", ""): self._item(each) for each in root.iter("{*}item")}
        self.title = next(self._told("title"), "")
        self.author = ", ".join(itertools.islice(self._told("creator"), 3))
        self.language = primary(next(self._told("language"), ""))
        self.spine = [self.items[each.get("idref", "")]._replace(linear=each.get("linear") != "no")
                      for each in root.iter("{*}itemref") if each.get("idref", "") in self.items]
        self.guide = {each.get("type", "").lower(): place for each in root.iter("{*}reference")
                      if (place := link_target(each, self.path))}

    def _item(self, element: etree._Element) -> Item:
        path, _ = link_target(element, self.path) or ("", "")
        return Item(path, element.get("media-type", ""),
                    frozenset(element.get("properties", "").split()))

    def _told(self, name: str) -> Iterator[str]:
        for element in self._root.iter(f"{{http://purl.org/dc/elements/1.1/}}{name}",
                                       f"{{http://purl.org/dc/elements/1.0/}}{name}"):
            if text := all_text(element):
                yield text

    def navigation(self, archive: Archive) -> list[Entry]:
        """The table of contents, of EPUB 3 or else of EPUB 2."""
        entries: list[Entry] = []
        for item in self.items.values():
            if "nav" in item.properties and (root := archive.tree(item.path, True)) is not None:
                entries += nav_entries(root, item.path)
        for item in self.items.values():
            if not entries and item.kind == "application/x-dtbncx+xml" and \
                    (root := archive.tree(item.path)) is not None:
                entries = list(ncx_entries(root, item.path))
        return entries

    def cover(self, archive: Archive) -> bytes:
        named = [each.get("content", "") for each in self._root.iter("{*}meta")
                 if each.get("name") == "cover"]
        items = [item for item in self.items.values() if "cover-image" in item.properties]
        items += [self.items[name] for name in named if name in self.items]
        data = None
        with contextlib.suppress(BookError):  # one that is too large is none
            data = archive.read(items[0].path) if items else None
        return data if data and data.startswith((b"\xff\xd8\xff", b"\x89PNG")) else b""


def root_file(archive: Archive) -> str:
    root = archive.tree("META-INF/container.xml")
    if root is None:
        raise BookError(f"{archive.name} is no EPUB, or a broken one: it has no "
                        "META-INF/container.xml")
    paths = [each.get("full-path") for each in root.iter("{*}rootfile")
             if each.get("media-type") == "application/oebps-package+xml" and each.get("full-path")]
    if not paths:
        raise BookError(f"{archive.name} is a broken EPUB: its container.xml names no book")
    return posixpath.normpath(unquote(paths[0]))


def nav_entries(root: etree._Element, path: str) -> Iterator[Entry]:
    navs = list(root.iter("{*}nav"))
    for nav in [each for each in navs if "toc" in roles(each)][:1]:
        for link in nav.iter("{*}a"):
            depth = sum(1 for _ in link.iterancestors("{*}ol"))
            if (place := link_target(link, path)) and (title := all_text(link)):
                yield Entry(title, place, depth)


def ncx_entries(root: etree._Element, path: str) -> Iterator[Entry]:
    for point in root.iter("{*}navPoint"):
        depth = sum(1 for _ in point.iterancestors("{*}navPoint"))
        for label, content in zip(point.iterchildren("{*}navLabel"),
                                  point.iterchildren("{*}content"), strict=False):
            if place := place_of(content.get("src", ""), path):
                yield Entry(all_text(label), place, depth)


class EpubReader:
    """Reads the pages of the spine in order, and finds where chapters begin."""

    def __init__(self, archive: Archive, package: Package):
        self.archive, self.package = archive, package
        self.remarks: list[str] = []
        self.pieces: list[Piece] = []
        self._spots: dict[Place, int] = {}  # (file, "") is where it begins
        toc = package.guide.get("toc", ("", ""))
        self._toc = "" if toc[1] else toc[0]

    def read(self) -> tuple[Chapter, ...]:
        items = self._pages()
        survey = Survey()
        for item in items:
            if (root := self.archive.tree(item.path, is_page=True)) is not None:
                survey.look(root, item.path)
        survey.decide()
        noted = {path for path, _ in survey.notes}
        apart = [item for item in items if not item.linear and item.path not in noted]
        if apart:
            self.remarks.append("left out, as they stand outside of the reading order: " +
                                ", ".join(item.path for item in apart))
        for item in sorted(items, key=lambda item: not item.linear):
            if item not in apart:
                self._read_page(item, survey.notes)
        return chapters_of(self.pieces, self._titles())

    def _pages(self) -> list[Item]:
        spine = list({item.path: item for item in self.package.spine}.values())
        if not any(item.linear for item in spine):
            spine = [item._replace(linear=True) for item in spine]
        pages = [item for item in spine if item.kind in PAGE_KINDS or
                 item.path.lower().endswith((".xhtml", ".html", ".htm"))]
        self.remarks += [f"{item.path}: left out, as {item.kind or 'it'} is no page of text"
                         for item in spine if item not in pages]
        return pages

    def _read_page(self, item: Item, notes: dict[Place, str]) -> None:
        root = self.archive.tree(item.path, is_page=True)
        if root is None:
            self.remarks.append(f"{item.path}: left out, as it is missing or broken")
            return
        page = Page(item.path, self.package.language, notes)
        page.read(root, item.path == self._toc)
        if page.left["contents"] and all(piece.level for piece in page.pieces):
            page.pieces.clear()  # no more than "Contents"
        start = len(self.pieces)
        self._spots[item.path, ""] = start
        self._spots |= {(item.path, name): start + at for name, at in page.spots.items()}
        self.pieces += page.pieces
        self.remarks += told_left(page.left, item.path)
        if not page.pieces and page.images:
            self.remarks.append(f"{item.path}: left out, as it has images only")

    def _titles(self) -> dict[int, str]:
        """Where chapters begin, by the table of contents: of entries that point to one spot the
        deepest counts. A book without one has a chapter for each page.
        """
        found: dict[int, Entry] = {}
        for entry in self.package.navigation(self.archive):
            spot = self._spots.get(entry.place, self._spots.get((entry.place[0], "")))
            if spot is not None and spot < len(self.pieces) and \
                    (spot not in found or entry.depth >= found[spot].depth):
                found[spot] = entry
        if len(found) > 1:
            return {spot: entry.title for spot, entry in found.items()}
        starts = {spot for (_, name), spot in self._spots.items() if not name}
        return {spot: self._first_heading(spot) for spot in starts if spot < len(self.pieces)}

    def _first_heading(self, spot: int) -> str:
        paragraph = self.pieces[spot].paragraph
        return squeezed(paragraph.text) if paragraph.kind == "heading" else ""


def read_epub(data: bytes, name: str) -> Book:
    archive = Archive(data, name)
    check_is_book(archive)
    check_rights(archive)
    package = Package(archive)
    reader = EpubReader(archive, package)
    chapters = reader.read()
    return Book(package.title, package.author, package.language, chapters, tuple(reader.remarks),
                package.cover(archive))


def check_is_book(archive: Archive) -> None:
    for path, what in {"word/document.xml": "a Word file", "content.xml": "an OpenDocument file",
                       "xl/workbook.xml": "a table of Excel",
                       "ppt/presentation.xml": "a presentation"}.items():
        if path in archive and "META-INF/container.xml" not in archive:
            raise BookError(f"{archive.name} is {what}; save it as .epub, .txt or .md and give "
                            "that")
