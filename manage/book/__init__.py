"""A text of any length as chapters of paragraphs: plain text, Markdown, EPUB 2 and 3.

    book = read_book(path.read_bytes(), path.name)

What an author wrote to be read stays, in order; what only serves a page or a screen is left out
(contents, page numbers, code, images), and `remarks` say so. What looks like prose to a listener is
decided here, how it is spoken by the worker: that reads signs, and joins hyphenated lines. No
network, no sound, and nothing is read but the bytes that are given: no file, no address that a book
names.

This file tells of which kind a book is: text.py, markdown.py and epub.py read one each, the latter
two by page.py. What they give is in chapters.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath

from .archive import ZIP
from .chapters import Book, BookError, Chapter, Paragraph
from .epub import read_epub
from .markdown import read_markdown
from .text import decoded, read_text

__all__ = ["Book", "BookError", "Chapter", "Paragraph", "read_book"]



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
