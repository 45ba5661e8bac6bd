"""manage/book.py: what is read aloud of a file, in which order, and what is refused."""

from __future__ import annotations

import contextlib
import http.server
import io
import os
import resource
import struct
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from epubs import XHTML, epub, packed

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "manage"))

import book as module
from book import Book, BookError, read_book

LONG = ("It was a bright cold day in spring, and the clocks of the town struck one after the other "
        "while nobody was there to count them.")


ONE = {"a.xhtml": "<p>A.</p>"}
WESTERN = "Der Käse hier kostet nur 5 € – „sehr günstig“, l’été dernier, ¿qué tal? 1 ½ × 2°"


def texts(book: Book) -> list[list[str]]:
    return [[paragraph.text for paragraph in chapter.paragraphs] for chapter in book.chapters]


def titles(book: Book) -> list[str]:
    return [chapter.title for chapter in book.chapters]


def kinds(book: Book) -> list[tuple[str, str, str]]:
    return [(paragraph.kind, paragraph.label, paragraph.text)
            for chapter in book.chapters for paragraph in chapter.paragraphs]


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


# -----------------------------------------------------------------------------
# Plain text


def test_blank_lines_part_paragraphs_and_each_knows_its_line() -> None:
    book = txt("One.\n\n\n  Two\tand  more.\n \nThree.\n")
    assert texts(book) == [["One.", "Two and more.", "Three."]]
    assert [each.line for each in book.chapters[0].paragraphs] == [1, 4, 6]
    assert titles(book) == [""] and book.title == "a" and book.remarks == ()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_unicode_is_known_by_its_mark_or_by_being_valid(encoding: str, line_end: str) -> None:
    text = f"Größe, 山.{line_end}{line_end}Второй."
    data = (b"\xfe\xff" + text.encode("utf-16-be") if encoding == "utf-16-le-bom"
            else text.encode(encoding))
    book = txt(data)
    assert texts(book) == [["Größe, 山.", "Второй."]] and book.remarks == ()


def test_what_is_not_unicode_is_read_as_western_and_said_to_be_guessed() -> None:
    book = txt(WESTERN.encode("cp1252"))
    assert texts(book) == [[WESTERN]]
    assert "Windows-1252, a guess" in book.remarks[0] and "iconv" in book.remarks[0]


@pytest.mark.parametrize(("text", "encoding"), [
    ("Все счастливые семьи похожи друг на друга.", "cp1251"),
    ("吾輩は猫である。名前はまだ無い。", "shift_jis"), ("我叫小明。", "gb18030"),
    ("Zażółć gęślą jaźń, którą łódź", "cp1250"),
    ("Kot siedział na płocie i patrzył w stronę domu, w którym nikt nie mieszkał", "cp1250")])
def test_what_is_in_another_encoding_is_refused_with_what_to_do(text: str, encoding: str) -> None:
    assert "iconv" in refusal(text.encode(encoding), "a.txt")


def test_a_few_broken_signs_leave_the_rest() -> None:
    book = txt("Größe und Übermut,\nschöne Bäume".encode() + b"\xff." + " Äpfel.".encode())
    assert texts(book) == [["Größe und Übermut,\nschöne Bäume. Äpfel."]]
    assert "1 broken signs" in book.remarks[0] and "line 2" in book.remarks[0]


def test_lines_wrapped_to_a_width_are_one_paragraph() -> None:
    wrapped = (f"{LONG[:62].rstrip()}\n{LONG[62:].strip()}\n\n"
               f"{LONG[:58].rstrip()}\n{LONG[58:].strip()}\n\nShort.")
    (found,) = texts(txt(wrapped))
    assert found == [LONG, LONG, "Short."]


def wrap(text: str, width: int = 66, dent: str = "") -> str:
    import textwrap
    return textwrap.fill(text, width, initial_indent=dent, break_on_hyphens=False)


def test_wrapped_paragraphs_without_blank_lines_are_told_by_their_dents_or_last_lines() -> None:
    paragraphs = [f"{LONG} {LONG} Or so.", f"“No,” he said. {LONG}", f"{LONG} Nobody."]
    dented = "\n".join(wrap(each, dent="   ") for each in paragraphs)
    assert texts(txt(dented)) == [paragraphs]
    flush = "\n".join(wrap(each) for each in paragraphs)
    assert texts(txt(flush)) == [paragraphs]


def test_lines_that_are_paragraphs_are_seen_as_such() -> None:
    lines = [LONG, "“No,” he said.", f"{LONG} {LONG}", "She went."]
    assert texts(txt("\n".join(lines))) == [lines]
    assert texts(txt(f"{LONG} so\n{LONG} on\n\nEnd.")) == [[f"{LONG} so", f"{LONG} on", "End."]]
    assert texts(txt("Hello there.\nHow are you?\nI am well!\n")) == \
        [["Hello there.", "How are you?", "I am well!"]]


def test_verse_keeps_its_lines() -> None:
    verse = "O rose, so red in morning light,\nyou open and you close at night,\nand so do I"
    assert texts(txt(f"{LONG}\n\n{verse}\n\n{verse}")) == [[LONG, verse, verse]]


def test_a_word_parted_at_a_lines_end_is_left_to_the_worker() -> None:
    parted = f"{LONG[:39]} and the beau-\ntiful town was still asleep when the others came\nalong."
    (found,) = texts(txt(f"{parted}\n\n{wrap(LONG)}"))
    assert "beau-\ntiful town" in found[0] and found[0].count("\n") == 1


def test_chinese_lines_are_joined_without_blanks() -> None:
    line = "他走在路上看见一只猫" * 4
    assert texts(txt(f"{line}\n{line}\n{line[:9]}。")) == [[f"{line}{line}{line[:9]}。"]]


@pytest.mark.parametrize("heading", [
    "Chapter 1", "CHAPTER I.", "Chapter One", "CHAPTER THE FIRST", "Chapter 12: The Storm",
    "CHAPTER XIV.\nThe Storm", "Kapitel 3", "Erstes Kapitel", "3. Kapitel", "Chapitre II",
    "Capítulo 4 – La casa", "Глава первая", "Rozdział 2", "Bölüm 5", "第三章 山の家", "Part Two"])
def test_a_chapters_heading_begins_one(heading: str) -> None:
    book = txt(f"Before.\n\n{heading}\n\n{LONG}\n\nMore.")
    assert len(book.chapters) == 2
    assert book.chapters[1].title == " ".join(heading.split()).rstrip(".")
    assert book.chapters[1].paragraphs[0].kind == "heading"
    assert [each.text for each in book.chapters[1].paragraphs] == [heading, LONG, "More."]


@pytest.mark.parametrize("text", [
    "Chapter and verse, he said.", "Part I think is true.", "Book him now.", "Part of me hoped.",
    "Chapter 3 was dull.", "Chapter 1", "Chapter 1\nChapter 2\nChapter 3", "Kapitel 3, und dann?",
    "Part 1 is over,", "Kapitelweise", "Chapter 100000 people", "Chapter IV,"])
def test_what_only_looks_like_a_heading_begins_none(text: str) -> None:
    assert titles(txt(f"Before.\n\n{text}")) == [""]
    if text != "Chapter 1":
        assert titles(txt(f"Before.\n\n{text}\n\nAfter.")) == [""]


def test_a_table_of_contents_begins_no_chapters_and_a_part_goes_with_its_first() -> None:
    book = txt("A Tale\n\nChapter 1\n\nChapter 2\n\nBy me.\n\nPART ONE\n\nChapter 1\n\nA.\n\n"
               "Chapter 2\n\nB.\n")
    assert titles(book) == ["", "PART ONE. Chapter 1", "Chapter 2"]
    assert texts(book)[1:] == [["PART ONE", "Chapter 1", "A."], ["Chapter 2", "B."]]


def test_gutenbergs_licence_is_left_out_only_where_its_marks_are() -> None:
    text = ("The Project Gutenberg eBook of X\n\nTitle: The Mill\n\nAuthor: A. Miller\n\n"
            "*** START OF THE PROJECT GUTENBERG EBOOK THE MILL ***\n\nOnce.\n\n"
            "*** END OF THE PROJECT GUTENBERG EBOOK THE MILL ***\n\nLicence.\n")
    book = txt(text)
    assert texts(book) == [["Once."]] and book.chapters[0].paragraphs[0].line == 9
    assert (book.title, book.author) == ("The Mill", "A. Miller")
    assert "licence" in book.remarks[0]
    unmarked = text.replace("*** START", "** START")
    assert texts(txt(unmarked))[0][0].startswith("The Project Gutenberg") and \
        texts(txt(unmarked))[0][-1] == "Licence."


def test_form_feeds_part_and_what_cannot_be_spoken_is_no_paragraph() -> None:
    assert texts(txt("One.\fTwo.\n\n* * *\n\n---\n\n…\n\nThree.\n")) == [["One.", "Two.", "Three."]]


@pytest.mark.parametrize(("data", "says"), [
    (b"%PDF-1.7\n", "a PDF"), (b"{\\rtf1 x}", "RTF"), (b"AT&TFORM\0\0", "DjVu"),
    (b"\xd0\xcf\x11\xe0" + bytes(99), "Word"), (bytes(60) + b"BOOKMOBI" + bytes(9), "Kindle"),
    (b"\x1f\x8b\x08" + bytes(9), "gzip"), (b"Rar!\x1a", "RAR"),
    (packed({"[Content_Types].xml": "x", "word/document.xml": "x"}), "Word"),
    (packed({"mimetype": "application/vnd.oasis.opendocument.text", "content.xml": "x"}), "Open"),
    (b"MZ\0\0 binary", "NUL"), ("Hi".encode("utf-16-le"), "UTF-16"),
    (b"", "no text"), (b" \n\n ", "no text"), (b"* * *\n", "no text"),
    (b"\xef\xbb\xbf", "no text")])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "-"])
def test_what_is_no_text_is_refused_with_a_word(data: bytes, says: str, name: str) -> None:
    said = refusal(data, name)
    assert says in said and said.startswith(name)


# -----------------------------------------------------------------------------
# Markdown


def test_the_highest_headings_used_twice_begin_chapters() -> None:
    book = md("# The Book\n\nBy me.\n\n## One\n\nA.\n\n### Sub\n\nB.\n\nTwo\n---\n\nC.\n")
    assert titles(book) == ["The Book", "One", "Two"] and book.title == "The Book"
    assert texts(book) == [["The Book", "By me."], ["One", "A.", "Sub", "B."], ["Two", "C."]]
    assert kinds(book)[4] == ("heading", "", "Sub")
    assert [each.line for chapter in book.chapters for each in chapter.paragraphs] == \
        [1, 3, 5, 7, 9, 11, 13, 16]


def test_one_heading_alone_is_the_title_and_goes_with_what_follows() -> None:
    book = md("# *The* Book\n\n## One\n\nA.\n\n## Two\n\nB.")
    assert titles(book) == ["One", "Two"] and book.title == "The Book"
    assert texts(book)[0] == ["*The* Book", "One", "A."]
    assert titles(md("A.\n\nB.")) == [""] and titles(md("# X\n\nA.")) == ["X"]


def test_what_the_worker_reads_stays_and_links_give_their_words() -> None:
    book = md("I *really* mean **it** and _that_, `a_b*c` too, "
              "[the guide](http://x.org/a) &amp; \\*no\\* ![cat](c.png)&eacute;.")
    assert texts(book) == [["I *really* mean it and *that*, `a_b*c` too, the guide & \\*no\\* é."]]


def test_lists_tables_and_quotes_go_piece_by_piece() -> None:
    book = md("1. Wash\n2. Dry\n   well\n\n- a\n  - b\n\n> Quoted\n> on.\n\n"
              "| Name | Age? |\n|---|---|\n| Ann | 7 |\n| Bo | |\n")
    assert texts(book) == [["1. Wash", "2. Dry well", "a", "b", "Quoted on.", "Name, Age?",
                            "Ann, 7", "Bo"]]
    assert [each.line for each in book.chapters[0].paragraphs] == [1, 2, 5, 6, 8, 11, 13, 14]


def test_code_comments_and_front_matter_are_left_out_and_said_to_be() -> None:
    book = md("---\ntitle: \"The X\"\nauthor: Me\nlang: de-DE\n---\nA.\n\n```py\nx = 1\n```\n\n"
              "    y = 2\n\n<!-- secret -->\n\nB <!-- too --> c.\n")
    assert texts(book) == [["A.", "B c."]]
    assert (book.title, book.author, book.language) == ("The X", "Me", "de")
    assert book.remarks == ("left out: code (2 times)", "left out: comments (2 times)")


def test_footnotes_are_notes_with_their_labels() -> None:
    book = md("So it was[^1] and is[^b].\n\n[^1]: The first.\n\n[^b]: The *second*,\n    longer.\n")
    assert kinds(book) == [("text", "", "So it was and is."), ("note", "1", "The first."),
                           ("note", "2", "The *second*, longer.")]


def test_verse_and_html_in_markdown_are_read_as_a_page_shows_them() -> None:
    book = md("Roses  \nare red\n\n<p>A &mdash; <b>b</b></p>\n\n<script>x</script>\n\nC")
    assert texts(book) == [["Roses\nare red", "A — b", "C"]]


# -----------------------------------------------------------------------------
# Pages


def test_a_page_is_read_block_by_block() -> None:
    book = page("<hgroup><h1>One</h1><p>Sub</p></hgroup>"
                "<p>A <b>b</b>c\n d.</p>loose<div>E<p>f</p>g</div>"
                "<blockquote><p>q</p></blockquote><ul><li>i</li><li><p>j</p></li></ul>"
                "<ol start='3'><li>k<ul><li>l</li></ul></li><li><p>m</p><p>n</p></li></ol>"
                "<dl><dt>t</dt><dd>d</dd></dl><hr/><figure><figcaption>c</figcaption></figure>")
    assert texts(book) == [["One", "Sub", "A bc d.", "loose", "E", "f", "g", "q", "i", "j", "3. k",
                            "l", "4. m", "n", "t", "d", "c"]]
    assert [kind for kind, _, _ in kinds(book)[:3]] == ["heading", "heading", "text"]


def test_verse_pre_and_breaks_keep_their_lines_and_two_breaks_part() -> None:
    book = page("<p>Roses<br/>are  red,<br/>\nviolets</p><pre>a\n  b\n\nc</pre>"
                "<p>One<br/><br/>two</p>")
    assert texts(book) == [["Roses\nare red,\nviolets", "a\nb", "c", "One", "two"]]


def test_a_tables_rows_are_its_cells_unless_it_only_lays_out() -> None:
    book = page("<table><caption>Ages</caption><thead><tr><th>Name</th><th>Age?</th></tr></thead>"
                "<tr><td> Ann.</td><td>7<br/>8</td><td/></tr></table>"
                "<table><tr><td><p>a</p><p>b</p></td><td>c</td></tr></table>")
    assert texts(book) == [["Ages", "Name, Age?", "Ann. 7 8", "a", "b", "c"]]


def test_what_is_not_for_reading_aloud_is_left_out() -> None:
    book = page("<script>s</script><style>t</style><p hidden='hidden'>h</p>"
                "<p style='color:red; display : none'>n</p><svg><text>v</text></svg>"
                "<p>a<span epub:type='pagebreak' title='9'>9</span>b"
                "<span class='pagenum'>[12]</span> <ruby>漢<rp>(</rp><rt>kan</rt></ruby>"
                " so\u00adft\u200b<img src='x' alt='An ornament'/></p>"
                "<nav epub:type='page-list'><ol><li>1</li></ol></nav>"
                "<pre><code>x = 1</code></pre><!-- c --><?pi x?>")
    assert texts(book) == [["ab 漢 soft"]]
    assert "OEBPS/a.xhtml: left out: code" in book.remarks


def test_an_image_is_read_only_where_it_is_a_heading_or_a_first_letter() -> None:
    book = page("<h2><img alt='Chapter One' src='x'/></h2><p><img alt='T' src='t'/>he sun.</p>"
                "<p>Look: <img alt='A cat' src='c'/></p>")
    assert texts(book) == [["Chapter One", "The sun.", "Look:"]]


def test_formulas_are_read_as_they_say_themselves() -> None:
    book = page("<p>So <math alttext='E is m'><mi>E</mi></math> and <math><mi>x</mi></math>.</p>")
    assert texts(book) == [["So E is m and ."]]
    assert book.remarks == ("OEBPS/a.xhtml: left out: formulas",)


@pytest.mark.parametrize("doctype", [
    "", "<!DOCTYPE html>", '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.1//EN" '
    '"http://www.w3.org/TR/xhtml11/DTD/xhtml11.dtd">', '<!DOCTYPE html SYSTEM "absent.dtd">'])
def test_entities_are_their_signs_whether_declared_or_not(doctype: str) -> None:
    body = XHTML.format("<p>A&nbsp;b&mdash;c &eacute;&#233;&#x5c71; &amp;lt; &unknown;x</p>")
    whole = body.replace("?>\n", f"?>\n{doctype}", 1)
    (found,) = texts(read_book(epub({"a.xhtml": whole}), "a.epub"))
    assert found[0].replace("&unknown;", "") == "A b—c éé山 &lt; x"


def test_an_entity_of_the_books_own_is_its_text() -> None:
    doctype = '<!DOCTYPE html [<!ENTITY who "Ann Lee"><!ENTITY dash "&#8212;">]>'
    whole = XHTML.format("<p>By &who;&dash;x.</p>").replace("?>\n", f"?>\n{doctype}", 1)
    assert texts(read_book(epub({"a.xhtml": whole}), "a.epub")) == [["By Ann Lee—x."]]


def test_what_is_no_xml_is_read_as_a_browser_would() -> None:
    book = read_book(epub({"a.html": "<!doctype html><p epub:type=x>One<br>two<p>Th&eacute; "
                                     "<a id='x'/>end <b>bold</i></b>"}), "a.epub")
    assert texts(book) == [["One\ntwo", "Thé end bold"]]


@pytest.mark.parametrize("encoding", ["iso-8859-1", "utf-16", "windows-1251"])
def test_a_pages_encoding_is_what_it_says(encoding: str) -> None:
    word = "Слово" if encoding == "windows-1251" else "Größe"
    whole = XHTML.format(f"<p>{word}</p>").replace("utf-8", encoding).encode(encoding)
    assert texts(read_book(epub({"a.xhtml": whole}), "a.epub")) == [[word]]


def test_a_paragraphs_language_is_told_where_it_is_another_than_the_books() -> None:
    book = page("<p>One</p><p xml:lang='fr-FR'>Deux <i lang='de'>drei</i></p>"
                "<div lang='DE'><p>Vier</p></div><p lang='en-GB'>Five</p><p lang='und'>Six</p>")
    assert book.language == "en"
    assert [each.language for each in book.chapters[0].paragraphs] == ["", "fr", "de", "", ""]


def test_scripts_of_all_kinds_come_through() -> None:
    samples = ["مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "می‌خواهم", "สวัสดี", "안녕하세요",
               "你好，世界。", "Γειά", "👩‍🚀 go", "𝔘𝔫"]
    assert texts(page("".join(f"<p dir='rtl'>{each}</p>" for each in samples))) == [samples]


def test_quotations_that_a_page_only_marks_get_their_signs() -> None:
    assert texts(page("<p><q>No</q>, he said.</p>")) == [["“No”, he said."]]


def test_lines_are_those_of_the_page() -> None:
    book = page("<p>One</p>\n\n<p>\n\nTwo <i>x</i>\n<br/>y</p>\n<p>Three</p>")
    assert [each.line for each in book.chapters[0].paragraphs] == [2, 4, 8]


# -----------------------------------------------------------------------------
# Notes


def test_notes_that_are_marked_as_such_are_notes_and_their_marks_go() -> None:
    book = read_book(epub({
        "a.xhtml": "<p>So<a epub:type='noteref' href='n.xhtml#n1'>1</a> it"
                   "<a role='doc-noteref' href='#n2'>*</a> was.</p>"
                   "<aside epub:type='footnote' id='n2'><p>* Aside. <a href='#x'>↩</a></p></aside>",
        "n.xhtml": "<section epub:type='endnotes'><h2>Notes</h2><ol>"
                   "<li id='n1'><p>End <i>note</i>.</p><p>More. <a role='doc-backlink' "
                   "href='a.xhtml'>Back to text</a></p></li></ol></section>"}), "a.epub")
    assert kinds(book) == [
        ("text", "", "So it was."), ("note", "*", "Aside."), ("heading", "", "Notes"),
        ("note", "1", "End note."), ("note", "1", "More.")]


def test_plain_old_notes_are_known_by_where_their_marks_lead() -> None:
    book = read_book(epub({
        "a.xhtml": "<p id='p'>So<a id='r1' href='n.html#f1'><sup>1</sup></a> it<sup>"
                   "<a id='r2' href='n.html#f2'>2</a></sup> was<a href='n.html#f3'>[3]</a>, "
                   "see <a href='n.html#c4'>4</a> and x<sup>2</sup>.</p>",
        "n.html": "<p id='f1'><a href='a.xhtml#r1'>1</a>. One.</p>"
                  "<p><a name='f2' href='a.xhtml#r2'><sup>2</sup></a> Two.</p>"
                  "<div id='f3'><p>[3] Three.</p><p>Still.</p></div><p id='c4'>4 is a number.</p>",
    }), "a.epub")
    assert kinds(book) == [
        ("text", "", "So it was, see 4 and x2."), ("note", "1", "One."), ("note", "2", "Two."),
        ("note", "3", "Three."), ("note", "3", "Still."), ("text", "", "4 is a number.")]


def test_a_mark_that_leads_to_no_note_stays() -> None:
    book = page("<p>See<a href='#x'><sup>1</sup></a> there.</p><p id='x'>Nothing of it.</p>"
                "<p>And <a href='http://x.org/#1'>[1]</a>.</p>")
    assert kinds(book) == [("text", "", "See1 there."), ("text", "", "Nothing of it."),
                           ("text", "", "And [1].")]


def test_notes_that_stand_outside_of_the_reading_order_come_last() -> None:
    book = read_book(epub({
        "n.xhtml": "<aside epub:type='footnote' id='n1'>1. Note.</aside>", "x.xhtml": "<p>Buy.</p>",
        "a.xhtml": "<p>So<a epub:type='noteref' href='n.xhtml#n1'>1</a>.</p>"},
        itemref={"n.xhtml": 'linear="no"', "x.xhtml": 'linear="no"'}), "a.epub")
    assert texts(book) == [["So."], ["Note."]]
    assert book.remarks == ("left out, as they stand outside of the reading order: OEBPS/x.xhtml",)


# -----------------------------------------------------------------------------
# Chapters of an EPUB

PAGES = {
    "p1.xhtml": "<h1>Part</h1>",
    "c1.xhtml": "<h2 id='c1'>1</h2><p>A.</p><h2 id='c2'>2</h2><p>B.</p>",
    "c1b.xhtml": "<p>B goes on.</p>",
    "c3.xhtml": "<p>Epigraph.</p><h2 id='c3'>3</h2><p>C.</p>"}
NAV = ("<ol><li><a href='p1.xhtml'>Part One</a><ol><li><a href='c1.xhtml#c1'>The first</a></li>"
       "<li><a href='c1.xhtml#c2'>The <i>second</i></a></li>"
       "<li><a href='c3.xhtml'>Chapter three</a><ol><li><a href='c3.xhtml'>Its start</a></li>"
       "<li><a href='absent.xhtml'>x</a></li></ol></li></ol></li></ol>")


def point(title: str, src: str, inner: str = "") -> str:
    return (f"<navPoint id='{src}'><navLabel><text>{title}</text></navLabel>"
            f"<content src='{src}'/>{inner}</navPoint>")


NCX = point("Part One", "p1.xhtml", point("The first", "c1.xhtml#c1")
            + point("The second", "c1.xhtml#c2")
            + point("Chapter three", "c3.xhtml", point("Its start", "c3.xhtml")))


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
    book = read_book(epub({"z%20ü.xhtml": "<p>First.</p>", "a.xhtml": "<p>Second.</p>"},
                          others={"OEBPS/z%20ü.xhtml": None,
                                  "OEBPS/z ü.xhtml": XHTML.format("<p>First.</p>")}), "a.epub")
    assert texts(book) == [["First."], ["Second."]]


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


# -----------------------------------------------------------------------------
# What is refused



def test_what_is_no_epub_is_refused_with_a_word() -> None:
    whole = epub(ONE)
    assert "no EPUB" in refusal(b"no zip", "a.epub") and "no EPUB" in refusal(b"", "a.epub")
    assert "broken" in refusal(whole[: len(whole) // 2], "a.epub")
    assert "container.xml" in refusal(packed({"mimetype": "application/epub+zip"}), "a.epub")
    assert "book.opf" in refusal(epub({}, others={"OEBPS/book.opf": None}), "a.epub")
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


# Outside entities


@pytest.fixture
def asked() -> Iterator[list[str]]:
    """What was asked of a server whose address stands at its start."""
    found: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    found.append(f"http://127.0.0.1:{server.server_port}")
    yield found
    server.shutdown()
    server.server_close()


SUBSETS = {
    "general": '<!DOCTYPE html [<!ENTITY x SYSTEM "{}">]>',
    "public": '<!DOCTYPE html [<!ENTITY x PUBLIC "-//W3C//ENTITIES//EN" "{}">]>',
    "parameter": '<!DOCTYPE html [<!ENTITY % x SYSTEM "{}"> %x;]>',
    "subset": '<!DOCTYPE html SYSTEM "{}">',
    "public subset": '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.1//EN" "{}">'}


@pytest.mark.parametrize("kind", SUBSETS)
@pytest.mark.parametrize("where", ["page", "package", "container", "ncx", "encryption"])
def test_nothing_outside_is_read_or_fetched(
        kind: str, where: str, tmp_path: Path, asked: list[str]) -> None:
    secret = tmp_path / "secret.txt"
    with watched(secret) as opened:
        for address in (secret.as_uri(), str(secret), f"{asked[0]}/x"):
            data = hostile(where, SUBSETS[kind].format(address))
            if "subset" in kind:
                book = read_book(data, "a.epub")
                assert "secret" not in repr(book) and texts(book) == [["A."]]
            else:
                assert "is not read" in refusal(data, "a.epub")
        assert opened == [] and len(asked) == 1


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


# Bombs


def stored(name: str, packed_bytes: bytes, size: int, method: int = 8) -> bytes:
    """A book whose page `name` has these packed bytes, and says to have that size."""
    data = epub({name: "<p>@@</p>"})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = [(info, archive.read(info)) for info in archive.infolist()]
    target = io.BytesIO()
    directory = b""
    for info, content in files:
        path, raw = info.filename.encode(), content
        own = info.filename == f"OEBPS/{name}"
        body = packed_bytes if own else raw
        told = (method if own else 0, 0, 0, zlib.crc32(raw), len(body), size if own else len(raw))
        head = struct.pack("<HHHHHIII", 20, 0, *told[:3], *told[3:])
        directory += b"PK\1\2" + struct.pack("<H", 20) + head + struct.pack(
            "<HHHHHII", len(path), 0, 0, 0, 0, 0, target.tell()) + path
        target.write(b"PK\3\4" + head + struct.pack("<HH", len(path), 0) + path + body)
    at = target.tell()
    target.write(directory + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, len(files), len(files),
                                                     len(directory), at, 0))
    return target.getvalue()


def deflated(chunk: bytes, times: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join([*(packer.compress(chunk) for _ in range(times)), packer.flush()])


def grown_while(data: bytes) -> tuple[str, float, float]:
    """What is said of a book, the megabytes that the process grew by, and the seconds it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    said = refusal(data, "a.epub")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return said, grown, time.process_time() - began


@pytest.mark.parametrize("size", [2**31, 2**24 + 100, 1000, 10])
def test_a_bomb_is_refused_whatever_size_it_says_to_have(size: int) -> None:
    bomb = deflated(b"<p>" + b"a" * (2**20 - 3), 120)
    said, grown, seconds = grown_while(stored("a.xhtml", bomb, size))
    assert ("this is no book" in said) == (size > 2**20)
    assert "missing or broken" in said or size > 2**20  # its checksum is not that of its start
    assert grown < 70 and seconds < 5


def test_a_bomb_by_a_method_that_no_epub_has_is_not_unpacked() -> None:
    import bz2
    packed_bytes = bz2.compress(bytes(120 * 2**20))
    said, grown, seconds = grown_while(stored("a.xhtml", packed_bytes, 5000, method=12))
    assert "missing or broken" in said and grown < 70 and seconds < 5


def test_many_pages_that_are_each_small_enough_are_refused_in_all(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_READ", 2**20)
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
