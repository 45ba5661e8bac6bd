"""manage/book/: an EPUB's pages, in which order, and where its chapters begin."""

from __future__ import annotations

import io
import zipfile

import pytest
from epubs import XHTML, epub
from reading import LONG, NAV, NCX, ONE, PAGES, page, read_book, texts, titles


@pytest.mark.parametrize("kind", ["nav", "ncx"])
def test_chapters_are_what_the_nested_contents_point_to(kind: str) -> None:
    book = read_book(epub(PAGES, **{kind: NAV if kind == "nav" else NCX}), "a.epub")
    assert titles(book) == ["Part One", "The first", "The second", "Its start"]
    assert texts(book) == [["Part"], ["1", "A."], ["2", "B.", "B goes on."],
                           ["Epigraph.", "3", "C."]]
    assert [chapter.source for chapter in book.chapters] == [
        "OEBPS/p1.xhtml", "OEBPS/c1.xhtml", "OEBPS/c1.xhtml", "OEBPS/c3.xhtml"]


def test_without_contents_each_page_is_a_chapter() -> None:
    assert titles(read_book(epub(PAGES), "a.epub")) == ["Part", "1", "", ""]


def test_what_comes_before_the_first_chapter_is_one_without_a_title() -> None:
    book = read_book(epub({"t.xhtml": "<p>By me.</p>", **PAGES}, nav=NAV), "a.epub")
    assert titles(book)[:2] == ["", "Part One"] and texts(book)[0] == ["By me."]


def test_pages_come_in_the_order_of_the_spine_and_paths_may_be_escaped() -> None:
    book = read_book(epub({"z%20ü.xhtml": "", "a.xhtml": "<p>Second.</p>", "/c.xhtml": ""},
                          others={"OEBPS/z%20ü.xhtml": None, "OEBPS//c.xhtml": None,
                                  "OEBPS/z ü.xhtml": XHTML.format("<p>First.</p>"),
                                  "c.xhtml": XHTML.format("<p>From the root.</p>")}), "a.epub")
    assert texts(book) == [["First."], ["Second."], ["From the root."]]


def test_navigation_in_the_reading_order_is_left_out() -> None:
    links = "".join(f"<li><a href='c{n}.xhtml'>The chapter {n}</a></li>" for n in range(5))
    pages = {
        "nav.xhtml": f"<h1>Contents</h1><nav epub:type='toc'><ol>{links}</ol></nav>",
        "toc.xhtml": f"<h1>Inhalt</h1><p>{links.replace('li>', 'span>')}</p>",
        "list.xhtml": f"<p>{LONG}</p><ul>{links}</ul>",
        "index.xhtml": "<section epub:type='index'><p>Ann, 5</p></section>",
        **{f"c{n}.xhtml": f"<p>Text {n}.</p>" for n in range(5)}}
    book = read_book(epub(pages, item={"nav.xhtml": 'properties="nav"'}, guide=(
        "<guide><reference type='toc' href='toc.xhtml'/></guide>")), "a.epub")
    assert texts(book) == [[LONG], *([f"Text {n}."] for n in range(5))]
    assert {"OEBPS/list.xhtml: left out: contents", "OEBPS/index.xhtml: left out: contents"} <= \
        set(book.remarks)


def test_links_within_a_text_are_no_navigation() -> None:
    body = "".join(f"<li>{LONG} <a href='#x'>See there</a></li>" for _ in range(6))
    assert len(texts(page(f"<ul id='x'>{body}</ul>"))[0]) == 6


def test_a_page_of_images_is_remarked_and_the_cover_found() -> None:
    jpeg = b"\xff\xd8\xff picture"
    book = read_book(epub(
        {"cover.xhtml": "<img src='c.jpg' alt='Cover'/>", **ONE, "i.svg": "<svg/>"},
        item={"c.jpg": 'properties="cover-image"'}, others={"OEBPS/c.jpg": jpeg}), "a.epub")
    assert texts(book) == [["A."]] and book.cover == jpeg
    assert book.remarks == (
        "OEBPS/i.svg: left out, as image/svg+xml is no page of text",
        "OEBPS/cover.xhtml: left out, as it has images only")
    old = read_book(epub(ONE, item={"c.jpg": ""}, others={"OEBPS/c.jpg": jpeg},
                         metadata="<meta name='cover' content='i1'/>"), "my book.epub")
    huge = read_book(epub(ONE, item={"c.jpg": 'properties="cover-image"'}, others={
        "OEBPS/c.jpg": jpeg + bytes(2**24)}), "a.epub")
    assert huge.cover == b"" and texts(huge) == [["A."]]
    assert old.cover == jpeg and (old.title, old.author, old.language) == ("my book", "", "")


def test_title_authors_and_language_are_the_packages() -> None:
    book = page("<p>A.</p>", metadata="<dc:title>A &amp; B</dc:title><dc:title>sub</dc:title>"
                "<dc:creator>X</dc:creator><dc:creator>Y</dc:creator>"
                "<dc:language>pt-BR</dc:language>")
    assert (book.title, book.author, book.language) == ("A & B", "X, Y", "pt")


def test_an_epub_is_known_by_its_content() -> None:
    for name in ("a.txt", "-", "book", "a.md"):
        assert texts(read_book(epub(ONE), name)) == [["A."]]


def test_what_the_spine_names_and_the_manifest_lacks_is_remarked_once() -> None:
    with zipfile.ZipFile(io.BytesIO(epub(ONE))) as archive:
        opf = archive.read("OEBPS/book.opf").decode()
    opf = opf.replace('<itemref idref="i0"', '<itemref idref="lost"/>' * 2 + '<itemref idref="i0"')
    book = read_book(epub(ONE, others={"OEBPS/book.opf": opf}), "a.epub")
    assert texts(book) == [["A."]]
    assert book.remarks == (
        "OEBPS/book.opf: 'lost' of the spine is left out, as the manifest does not list it",)


def test_missing_and_broken_pages_are_remarked_and_the_rest_is_read() -> None:
    data = epub({**ONE, "gone.xhtml": "<p>x</p>", "torn.xhtml": "<p>torn</p>",
                 "void.xhtml": "<?xml?>", "noise.xhtml": b"<?" + bytes(range(256))},
                others={"OEBPS/gone.xhtml": None})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        at = archive.getinfo("OEBPS/torn.xhtml").header_offset + 30 + len("OEBPS/torn.xhtml")
    data = data[:at + 20] + bytes(8) + data[at + 28 :]
    book = read_book(data, "a.epub")
    assert texts(book) == [["A."]]
    assert book.remarks == tuple(f"OEBPS/{name}.xhtml: left out, as it is missing or broken"
                                 for name in ("gone", "torn", "void", "noise"))
