"""A page of HTML as paragraphs: what is left out of it, and what lists, tables and verse become."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from html.entities import html5
from typing import NamedTuple

from lxml import etree

from .chapters import (
    LINE_ENDS,
    STOPS,
    Paragraph,
    Piece,
    is_break,
    is_speakable,
    squeezed,
)
from .markup import (
    BLOCKS,
    Place,
    declared_entities,
    has_class,
    is_hidden,
    link_target,
    local,
    places_of,
    roles,
)
from .notes import note_label, without_label

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
BREAK_CLASSES = frozenset(["scene-break", "scenebreak", "ornamental-break", "asterism"])
BACK_CLASSES = frozenset(["footnote-backref", "footnote-back", "backlink", "noteback"])
CELL = "\x1f"         # parts a row's cells


class Frame(NamedTuple):
    """What holds within an element."""

    kind: str = "text"
    label: str = ""
    level: int = 0
    line: int = 0
    verbatim: bool = False  # lines are kept
    row: bool = False       # its cells are one paragraph


class Page:
    """Reads a page, element by element, into pieces; no depth of nesting can break it."""

    def __init__(self, source: str, notes: dict[Place, str]):
        self.pieces: list[Piece] = []
        self.spots: dict[str, int] = {}  # the piece that an id stands in or before
        self.left: Counter[str] = Counter()
        self.images = 0
        self._source, self._notes = source, notes
        self._contents: set[etree._Element] = set()
        self._entities: dict[str, str] = {}
        self._buffer: list[str] = []
        self._begun: Frame | None = None   # where the buffer's first words stand
        self._prefix = ""                  # the number of the item that begins
        self._numbers: list[int] = []      # of the next items of the lists that are open
        self._after_break = False
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
        self._after_break |= name == "hr" or has_class(element, BREAK_CLASSES)
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
        text = joined_cells(text) if CELL in text else text
        lines = map(squeezed, text.split("\n"))
        for _, group in itertools.groupby(lines, bool):
            text = "\n".join(group)
            if is_speakable(text):
                self._keep(self._prefix + text, frame)
                self._prefix = ""
            else:
                self._after_break |= is_break(text)

    def _keep(self, text: str, frame: Frame) -> None:
        label = frame.label
        if frame.kind == "note":
            label, text = without_label(text, label)
        if is_speakable(text):
            paragraph = Paragraph(text, frame.line, frame.kind, label, self._after_break)
            self.pieces.append(Piece(paragraph, self._source, frame.level))
            self._after_break = False


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
