"""An EPUB's zip: what it may hold and how much of it is ever unpacked, and whether it is locked."""

from __future__ import annotations

import io
import itertools
import re
import stat
import zipfile
import zlib
from collections import Counter

from lxml import etree

from .chapters import BookError
from .markup import parsed

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


def check_is_book(archive: Archive) -> None:
    for path, what in {"word/document.xml": "a Word file", "content.xml": "an OpenDocument file",
                       "xl/workbook.xml": "a table of Excel",
                       "ppt/presentation.xml": "a presentation"}.items():
        if path in archive and "META-INF/container.xml" not in archive:
            raise BookError(f"{archive.name} is {what}; save it as .epub, .txt or .md and give "
                            "that")
