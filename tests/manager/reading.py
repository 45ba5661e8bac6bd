"""What tests of manage/book/ read, and what they look at in what was read."""

from __future__ import annotations

import pytest
from book import Book, BookError, read_book
from epubs import epub

LONG = ("It was a bright cold day in spring, and the clocks of the town struck one after the other "
        "while nobody was there to count them.")
ONE = {"a.xhtml": "<p>A.</p>"}
WESTERN = "Der Käse hier kostet nur 5 € – „sehr günstig“, l’été dernier, ¿qué tal? 1 ½ × 2°"
PAGES = {
    "p1.xhtml": "<h1>Part</h1>",
    "c1.xhtml": "<h2 id='c1'>1</h2><p>A.</p><h2 id='c2'>2</h2><p>B.</p>",
    "c1b.xhtml": "<p>B goes on.</p>",
    "c3.xhtml": "<p>Epigraph.</p><h2 id='c3'>3</h2><p>C.</p>"}
NAV = ("<ol><li><a href='p1.xhtml'>Part One</a><ol><li><a href='c1.xhtml#c1'>The first</a></li>"
       "<li><a href='c1.xhtml#c2'>The <i>second</i></a></li>"
       "<li><a href='c3.xhtml'>Chapter three</a><ol><li><a href='c3.xhtml'>Its start</a></li>"
       "<li><a href='absent.xhtml'>x</a></li></ol></li></ol></li></ol>")


def texts(book: Book) -> list[list[str]]:
    return [[paragraph.text for paragraph in chapter.paragraphs] for chapter in book.chapters]


def titles(book: Book) -> list[str]:
    return [chapter.title for chapter in book.chapters]


def kinds(book: Book) -> list[tuple[str, str, str]]:
    return [(paragraph.kind, paragraph.label, paragraph.text)
            for chapter in book.chapters for paragraph in chapter.paragraphs]


def breaks(book: Book) -> list[str]:
    """What stands after a scene break."""
    return [paragraph.text for chapter in book.chapters for paragraph in chapter.paragraphs
            if paragraph.after_break]


def txt(text: str | bytes, name: str = "a.txt") -> Book:
    return read_book(text if isinstance(text, bytes) else text.encode(), name)


def md(text: str) -> Book:
    return read_book(text.encode(), "a.md")


def page(body: str, **more: str) -> Book:
    return read_book(epub({"a.xhtml": body}, **more), "a.epub")


def refusal(data: bytes, name: str) -> str:
    with pytest.raises(BookError) as caught:
        read_book(data, name)
    return str(caught.value)


def point(title: str, src: str, inner: str = "") -> str:
    return (f"<navPoint id='{src}'><navLabel><text>{title}</text></navLabel>"
            f"<content src='{src}'/>{inner}</navPoint>")


NCX = point("Part One", "p1.xhtml", point("The first", "c1.xhtml#c1")
            + point("The second", "c1.xhtml#c2")
            + point("Chapter three", "c3.xhtml", point("Its start", "c3.xhtml")))
