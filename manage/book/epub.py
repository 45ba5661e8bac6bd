"""EPUB: its package and contents, and its pages in the order of the spine."""

from __future__ import annotations

import contextlib
import itertools
import posixpath
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote

from lxml import etree

from .archive import Archive, check_is_book, check_rights
from .chapters import Book, BookError, Chapter, Piece, chapters_of, primary, squeezed, told_left
from .markup import Place, all_text, link_target, place_of, roles
from .notes import Survey
from .page import Page

PAGE_KINDS = ("application/xhtml+xml", "text/html", "text/x-oeb1-document", "application/xml")


def read_epub(data: bytes, name: str) -> Book:
    archive = Archive(data, name)
    check_is_book(archive)
    check_rights(archive)
    package = Package(archive)
    reader = EpubReader(archive, package)
    chapters = reader.read()
    return Book(package.title, package.author, package.language, chapters, tuple(reader.remarks),
                package.cover(archive))


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
        refs = [(each.get("idref", ""), each.get("linear") != "no")
                for each in root.iter("{*}itemref")]
        self.spine = [self.items[name]._replace(linear=linear) for name, linear in refs
                      if name in self.items]
        self.unlisted = list(dict.fromkeys(name for name, _ in refs if name not in self.items))
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
        self.remarks += [f"{self.package.path}: {name!r} of the spine is left out, as the manifest "
                         "does not list it" for name in self.package.unlisted]
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
        page = Page(item.path, notes)
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
