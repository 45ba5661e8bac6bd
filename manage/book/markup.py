"""XML and HTML as trees, from hands that need not be trusted: what an element is, and where in the
book a link leads.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

from lxml import etree

from .chapters import BookError, squeezed

BLOCKS = frozenset([
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details",
    "dialog", "dir", "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1",
    "h2", "h3", "h4", "h5", "h6", "header", "hgroup", "hr", "html", "legend", "li", "main", "menu",
    "ol", "p", "pre", "section", "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr",
    "ul"])
EPUB_TYPE = "{http://www.idpf.org/2007/ops}type"

Place = tuple[str, str]  # a file of an EPUB and an id in it


def parsed(data: bytes, name: str, is_page: bool = True) -> etree._Element | None:
    """A file's root, as XML, else a page as a browser would take it. No entity is ever expanded,
    and nothing is fetched; what declares entities from outside, or of others, is refused.
    """
    try:
        root = etree.fromstring(data, xml_parser())
    except etree.XMLSyntaxError:
        root = parsed_as_html(data) if is_page else parsed_by(xml_parser(recover=True), data)
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
    return parsed_by(parser, data)


def parsed_by(parser: etree.XMLParser | etree.HTMLParser, data: bytes) -> etree._Element | None:
    try:
        return etree.fromstring(data, parser)
    except etree.XMLSyntaxError:  # nothing in it
        return None


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
    return posixpath.normpath(path).lstrip("/"), unquote(parts.fragment)  # "/" is the book's root


def places_of(element: etree._Element, source: str) -> Iterator[Place]:
    if name := element.get("id"):
        yield source, name
    if local(element) == "a" and (name := element.get("name")):
        yield source, name
