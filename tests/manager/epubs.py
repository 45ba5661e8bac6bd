"""EPUBs for tests, whole or broken: `epub({"a.xhtml": "<p>Hi.</p>"})` is one that can be read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

CONTAINER = """<?xml version="1.0"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/>
</rootfiles></container>"""
XHTML = ('<?xml version="1.0" encoding="utf-8"?>\n<html xmlns="http://www.w3.org/1999/xhtml" '
         'xmlns:epub="http://www.idpf.org/2007/ops"><head><title>Page</title></head><body>{}'
         '</body></html>')
KINDS = {"xhtml": "application/xhtml+xml", "html": "text/html", "ncx": "application/x-dtbncx+xml",
         "jpg": "image/jpeg", "svg": "image/svg+xml", "css": "text/css"}


def package(pages: list[str], others: list[str], metadata: str, guide: str,
            item: Mapping[str, str], itemref: Mapping[str, str]) -> str:
    items = "".join(f'<item id="i{n}" href="{name}" media-type="{KINDS[name.rpartition(".")[2]]}" '
                    f'{item.get(name, "")}/>' for n, name in enumerate([*pages, *others]))
    spine = "".join(f'<itemref idref="i{n}" {itemref.get(name, "")}/>'
                    for n, name in enumerate(pages))
    return (f'<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata '
            f'xmlns:dc="http://purl.org/dc/elements/1.1/">{metadata}</metadata>'
            f'<manifest>{items}</manifest><spine>{spine}</spine>{guide}</package>')


def epub(pages: Mapping[str, str | bytes], *, nav: str = "", ncx: str = "", guide: str = "",
         metadata: str = "<dc:title>T</dc:title><dc:language>en</dc:language>",
         item: Mapping[str, str] | None = None, itemref: Mapping[str, str] | None = None,
         others: Mapping[str, str | bytes | None] | None = None) -> bytes:
    """`pages` in the spine's order, as bodies or, where they start with `<?` or `<!`, whole; `nav`
    and `ncx` are what stands in their tables; `item` and `itemref` give attributes by name;
    `others` adds files by their paths in the zip, or with None leaves one out.
    """
    files: dict[str, str | bytes] = {
        "mimetype": "application/epub+zip", "META-INF/container.xml": CONTAINER}
    item, listed = dict(item or {}), []
    for name, page in pages.items():
        is_whole = isinstance(page, bytes) or page.startswith(("<?", "<!"))
        files[f"OEBPS/{name}"] = page if is_whole else XHTML.format(page)
    if nav:
        files["OEBPS/nav.xhtml"] = XHTML.format(f'<nav epub:type="toc">{nav}</nav>')
        item["nav.xhtml"] = 'properties="nav"'
        listed.append("nav.xhtml")
    if ncx:
        files["OEBPS/toc.ncx"] = ('<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/">'
                                  f"<navMap>{ncx}</navMap></ncx>")
        listed.append("toc.ncx")
    listed += [name for name in item if name not in pages and name not in listed]
    files["OEBPS/book.opf"] = package(list(pages), listed, metadata, guide, item, itemref or {})
    for path, data in (others or {}).items():
        files.pop(path, None)
        if data is not None:
            files[path] = data
    return packed(files)


def packed(files: Mapping[str, str | bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return target.getvalue()
