"""Markdown: its HTML is read as a page, with the marks that the worker reads."""

from __future__ import annotations

import html
import itertools
import re
from collections import Counter
from collections.abc import Sequence

from markdown_it import MarkdownIt
from mdit_py_plugins.footnote import footnote_plugin
from mdit_py_plugins.front_matter import front_matter_plugin

from .chapters import Book, Piece, chapters_of, primary, squeezed, told_left
from .markup import parsed_as_html
from .notes import Survey
from .page import Page


def read_markdown(text: str) -> Book:
    """Chapters begin at the highest headings of which there are two."""
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    markdown.use(footnote_plugin).use(front_matter_plugin).disable("text_join")
    markdown.add_render_rule("em_open", lambda *_: "*")  # the worker reads it
    markdown.add_render_rule("em_close", lambda *_: "*")
    markdown.add_render_rule("code_inline", render_code)
    markdown.add_render_rule("text_special", render_special)
    tokens = markdown.parse(text)
    for token in tokens:
        if token.map and token.nesting >= 0:
            token.attrSet("data-line", str(token.map[0] + 1))
    for token, within in itertools.pairwise(tokens):
        if token.type == "heading_open" and not within.content:  # a "#" that stands alone
            token.attrSet("class", "scene-break")
    page = html_page(markdown.renderer.render(tokens, markdown.options, {}))
    tags = dict(line.split(":", 1) for token in tokens if token.type == "front_matter"
                for line in token.content.splitlines() if ":" in line)
    facts = {key.strip().lower(): value.strip().strip("\"'") for key, value in tags.items()}
    comments = sum(each.content.startswith("<!--") for token in tokens
                   for each in [token, *(token.children or ())])
    page.left["comments"] += comments
    titles = markdown_titles(page.pieces)
    first = [piece.paragraph.text for piece in page.pieces if piece.level == 1]
    title = facts.get("title") or (plain(first[0]) if len(first) == 1 else "")
    return Book(title, facts.get("author", ""), primary(facts.get("lang", facts.get("language"))),
                chapters_of(page.pieces, titles), tuple(told_left(page.left, "")))


def html_page(body: str) -> Page:
    root = parsed_as_html(f"<html><body>{body}</body></html>".encode())
    survey = Survey()
    survey.look(root, "")
    survey.decide()
    page = Page("", survey.notes)
    page.read(root)
    return page


def render_code(_: object, tokens: Sequence, index: int, *__: object) -> str:
    """With its marks, so that signs in it stay signs to the worker."""
    token = tokens[index]
    return html.escape(f"{token.markup}{token.content}{token.markup}")


def render_special(_: object, tokens: Sequence, index: int, *__: object) -> str:
    """An escaped sign stays escaped for the worker; an entity is its sign."""
    token = tokens[index]
    return html.escape(token.markup if token.info == "escape" else token.content)


def plain(text: str) -> str:
    """A heading as a title, without marks for the worker."""
    return squeezed(re.sub(r"\\(?=\W)|(?<!\\)[*`]", "", text))


def markdown_titles(pieces: Sequence[Piece]) -> dict[int, str]:
    levels = Counter(piece.level for piece in pieces if piece.level)
    level = min((level for level in levels if levels[level] > 1), default=min(levels, default=0))
    titles: dict[int, str] = {}
    for index, piece in enumerate(pieces):
        if 0 < piece.level <= level:  # a heading that stands alone goes with the next one
            start = max(titles, default=-1)
            alone = start >= 0 and all(each.level for each in pieces[start:index])
            titles[start if alone else index] = plain(piece.paragraph.text)
    return titles
