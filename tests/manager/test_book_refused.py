"""manage/book/: broken and hostile EPUBs are refused with a word, at little cost."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import resource
import select
import socket
import struct
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from epubs import XHTML, epub, packed
from reading import (
    LONG,
    NAV,
    NCX,
    ONE,
    PAGES,
    BookError,
    md,
    page,
    point,
    read_book,
    refusal,
    texts,
)


def test_what_is_no_epub_is_refused_with_a_word() -> None:
    whole = epub(ONE)
    assert "no EPUB" in refusal(b"no zip", "a.epub") and "no EPUB" in refusal(b"", "a.epub")
    assert "broken" in refusal(whole[: len(whole) // 2], "a.epub")
    assert "container.xml" in refusal(packed({"mimetype": "application/epub+zip"}), "a.epub")
    assert "book.opf" in refusal(epub({}, others={"OEBPS/book.opf": None}), "a.epub")
    for nothing in (b" ", b"\0\0", b"<x"):
        assert "container.xml" in refusal(epub({}, others={"META-INF/container.xml": nothing}),
                                          "a.epub")
    assert "names no book" in refusal(epub({}, others={"META-INF/container.xml": "<x/>"}), "a.epub")
    assert "no text to speak" in refusal(epub({}), "a.epub")
    assert "images only" in refusal(epub({"a.xhtml": "<img src='x'/>"}), "a.epub")


def test_bytes_at_random_places_never_break_it_otherwise_than_with_a_word() -> None:
    import random
    whole = epub(PAGES, nav=NAV, ncx=NCX)
    chance = random.Random(7)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 3, 30))):
            data[chance.randrange(4, len(data))] = chance.randrange(256)
        try:
            assert read_book(bytes(data[: chance.choice((len(data), 900))]), "a.epub").chapters
        except BookError as error:
            assert str(error).startswith("a.epub")  # noqa: PT017


@pytest.mark.parametrize("path", ["../evil.xhtml", "/etc/passwd", "O/../../x", "C:/x", "a\\..\\x"])
def test_paths_out_of_the_book_are_refused(path: str) -> None:
    assert "outside of it" in refusal(epub(ONE, others={path: "x"}), "a.epub")


def test_links_in_the_file_system_are_refused() -> None:
    target = io.BytesIO(epub(ONE))
    with zipfile.ZipFile(target, "a") as archive:
        link = zipfile.ZipInfo("OEBPS/link.xhtml")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert "outside of it" in refusal(target.getvalue(), "a.epub")


def test_manifest_entries_that_lead_out_of_the_book_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.xhtml").write_text(XHTML.format("<p>secret</p>"))
    for path in (f"..{tmp_path}/secret.xhtml", f"../../../../../../..{tmp_path}/secret.xhtml",
                 f"file://{tmp_path}/secret.xhtml"):
        book = read_book(epub({"a.xhtml": "<p>A.</p>", path: ""},
                              others={f"OEBPS/{path}": None}), "a.epub")
        assert texts(book) == [["A."]] and "missing" in book.remarks[0]


def encryption(algorithm: str, uri: str = "OEBPS/a.xhtml") -> str:
    return ('<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container" '
            'xmlns:enc="http://www.w3.org/2001/04/xmlenc#"><enc:EncryptedData>'
            f'<enc:EncryptionMethod Algorithm="{algorithm}"/><enc:CipherData>'
            f'<enc:CipherReference URI="{uri}"/></enc:CipherData></enc:EncryptedData></encryption>')


@pytest.mark.parametrize("others", [
    {"META-INF/encryption.xml": encryption("http://www.w3.org/2001/04/xmlenc#aes128-cbc")},
    {"META-INF/rights.xml": "<x/>"}, {"META-INF/sinf.xml": "<x/>"},
    {"META-INF/license.lcpl": "{}"}])
def test_protected_books_are_refused_with_the_word_for_it(others: dict[str, str]) -> None:
    said = refusal(epub(ONE, others=others), "a.epub")
    assert "this book is protected (DRM)" in said


@pytest.mark.parametrize("algorithm", ["http://www.idpf.org/2008/embedding",
                                       "http://ns.adobe.com/pdf/enc#RC"])
def test_masked_fonts_are_no_protection(algorithm: str) -> None:
    masked = {"META-INF/encryption.xml": encryption(algorithm, "OEBPS/font.otf")}
    assert texts(read_book(epub(ONE, others=masked), "a.epub")) == [["A."]]


def test_an_encrypted_zip_is_refused() -> None:
    data = bytearray(epub(ONE))
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    assert "password" in refusal(bytes(data), "a.epub")


# -----------------------------------------------------------------------------
# Outside entities


SUBSETS = {
    "general": '<!DOCTYPE html [<!ENTITY x SYSTEM "{}">]>',
    "public": '<!DOCTYPE html [<!ENTITY x PUBLIC "-//W3C//ENTITIES//EN" "{}">]>',
    "parameter": '<!DOCTYPE html [<!ENTITY % x SYSTEM "{}"> %x;]>',
    "subset": '<!DOCTYPE html SYSTEM "{}">',
    "public subset": '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.1//EN" "{}">'}


@pytest.mark.parametrize("kind", SUBSETS)
@pytest.mark.parametrize("where", ["page", "package", "container", "ncx", "encryption"])
def test_nothing_outside_is_read_or_fetched(
        kind: str, where: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    with watched(secret) as opened, socket.create_server(("127.0.0.1", 0)) as server:
        for address in (secret.as_uri(), str(secret),
                        f"http://127.0.0.1:{server.getsockname()[1]}/x"):
            data = hostile(where, SUBSETS[kind].format(address))
            if "subset" in kind:
                book = read_book(data, "a.epub")
                assert "secret" not in repr(book) and texts(book) == [["A."]]
            else:
                assert "is not read" in refusal(data, "a.epub")
        assert opened == [] and select.select([server], [], [], 0)[0] == []  # nobody knocked


@contextlib.contextmanager
def watched(path: Path) -> Iterator[list[str]]:
    """A file to be read of which it is told when somebody opens it: a pipe."""
    opened: list[str] = []
    os.mkfifo(path)

    def wait() -> None:
        with path.open("w") as file:  # waits for who reads
            opened.append("opened")
            with contextlib.suppress(OSError):
                file.write('<!ENTITY x "secret">')
                file.flush()

    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        yield opened
    finally:
        end = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        waiting.join()
        os.close(end)


def test_a_watched_file_tells_when_it_is_read(tmp_path: Path) -> None:
    with watched(tmp_path / "x") as opened:
        assert opened == [] and (tmp_path / "x").read_text() == '<!ENTITY x "secret">'
        assert opened == ["opened"]


def hostile(where: str, doctype: str) -> bytes:
    """A book with that in front of one of its files, and the entity x in its text."""
    whole = epub(ONE, ncx=point("T&x;", "a.xhtml"),
                 others={"META-INF/encryption.xml": encryption("http://ns.adobe.com/pdf/enc#RC")})
    path = {"page": "OEBPS/a.xhtml", "package": "OEBPS/book.opf", "ncx": "OEBPS/toc.ncx",
            "container": "META-INF/container.xml", "encryption": "META-INF/encryption.xml"}[where]
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    text = files[path].replace('<?xml version="1.0"?>', "").replace(
        '<?xml version="1.0" encoding="utf-8"?>', "")
    text = text.replace("A.", "A.&x;").replace("<dc:title>T", "<dc:title>&x;")
    files[path] = f"{doctype}\n{text}"
    return packed(files)


def laughs(body: str) -> str:
    nested = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
    return f'<!DOCTYPE html [<!ENTITY l0 "haha">{nested}]><html><body>{body}</body></html>'


@pytest.mark.parametrize("body", ["<p>&l11;</p>", "<p title='&l11;'>A</p>"])
def test_entities_of_entities_are_refused_and_never_unfolded(body: str) -> None:
    began = time.process_time()
    try:
        book = read_book(epub({"a.xhtml": laughs(body)}), "a.epub")
    except BookError as error:
        assert "is not read" in str(error)  # noqa: PT017
    else:
        assert len(repr(book)) < 3000
    assert time.process_time() - began < 5


# -----------------------------------------------------------------------------
# Bombs


@functools.cache
def bomb() -> bytes:
    """A book with a page of 80 MB, which never lie in memory."""
    target = io.BytesIO(epub({"a.xhtml": ""}, others={"OEBPS/a.xhtml": None}))
    with zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED) as archive, \
            archive.open("OEBPS/a.xhtml", "w") as page:
        for _ in range(80):
            page.write(b"<p>" + b"a" * (2**20 - 3))
    return target.getvalue()


def said_to_have(size: int, data: bytes) -> bytes:
    """The same book, whose page says to have that size."""
    return data.replace(struct.pack("<I", 80 * 2**20), struct.pack("<I", size))


def grown_while(data: bytes) -> tuple[str, float, float]:
    """What is said of a book, the megabytes that the process grew by, and the seconds it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    said = refusal(data, "a.epub")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return said, grown, time.process_time() - began


@pytest.mark.parametrize("size", [2**31, 2**24 + 100, 1000, 10])
def test_a_bomb_is_refused_whatever_size_it_says_to_have(size: int) -> None:
    said, grown, seconds = grown_while(said_to_have(size, bomb()))
    assert ("this is no book" in said) == (size > 2**20)
    assert "missing or broken" in said or size > 2**20  # its checksum is not that of its start
    assert grown < 70 and seconds < 5


def test_what_is_packed_by_a_method_that_no_epub_has_is_not_unpacked() -> None:
    """As there it would have no bound."""
    target = io.BytesIO(epub({"a.xhtml": ""}, others={"OEBPS/a.xhtml": None}))
    with zipfile.ZipFile(target, "a", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("OEBPS/a.xhtml", XHTML.format("<p>A.</p>"))
    assert "missing or broken" in refusal(target.getvalue(), "a.epub")


def test_many_pages_that_are_each_small_enough_are_refused_in_all(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("book.archive.MAX_READ", 2**20)
    body = f"<p>{LONG}</p>" * 2000
    assert "this is no book" in refusal(
        epub({f"{n}.xhtml": body for n in range(6)}), "a.epub")
    assert len(read_book(epub({f"{n}.xhtml": body for n in range(3)}), "a.epub").chapters) == 3


def test_more_files_than_a_book_has_are_refused_before_they_are_listed() -> None:
    data = epub(ONE)
    said, grown, seconds = grown_while(data + b"PK\1\2" + b"PK\1\2" * 2_000_000)
    assert "more than 20000 files" in said and grown < 60 and seconds < 3


def test_more_tags_than_a_book_has_are_refused_before_they_are_a_tree() -> None:
    said, grown, seconds = grown_while(
        epub({"a.xhtml": "<p>A.</p>" + "<b/>1" * 2_000_000}))
    assert "tags" in said or "no book" in said
    assert grown < 300 and seconds < 10


@pytest.mark.parametrize("tag", ["div", "b", "ol", "table"])
def test_depth_of_nesting_breaks_nothing(tag: str) -> None:
    began = time.process_time()
    depth = 50_000
    try:
        book = page(f"<p>A.</p>{f'<{tag}>' * depth}x{f'</{tag}>' * depth}<p>B.</p>")
        assert book.chapters[0].paragraphs[0].text == "A."
    except BookError:
        pass
    assert time.process_time() - began < 10


@pytest.mark.long  # a few thousand would not tell
def test_links_by_the_thousand_take_little_time() -> None:
    began = time.process_time()
    links = "".join(f"<a id='r{n}' href='#f{n % 7}'><sup>{n}</sup></a> w " for n in range(20_000))
    cells = "".join(f"<td id='c{n}'>*</td>" for n in range(20_000))
    book = page(f"{'<div>' * 200}<p>{links}</p><table><tr>{cells}</tr></table>{'</div>' * 200}")
    assert book.chapters and time.process_time() - began < 20


def test_numbers_that_are_none_or_too_long_break_nothing() -> None:
    many = "9" * 5000
    assert texts(page(f"<ol start='{many}'><li>a</li></ol><ol start='-3'><li>b</li></ol>")) == \
        [["1. a", "1. b"]]
    assert texts(md(f"<p data-line='x'>a</p><p data-line='{many}'>b</p>")) == [["a", "b"]]
