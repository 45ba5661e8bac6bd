"""Foot- and endnotes: which links of a book are a note's mark, and where the notes stand."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from lxml import etree

from .chapters import squeezed
from .markup import BLOCKS, Place, has_class, link_target, local, places_of, roles

REF_CLASSES = frozenset(["noteref", "footnote-ref", "fnanchor", "footnoteref"])
LABEL_RE = re.compile(r"\d{1,4}|[*†‡§¶]{1,3}|[a-z]|[ivxlc]{1,6}", re.I)


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
