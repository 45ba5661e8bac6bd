"""manage/book/: what is read of a page, element by element, and what a note is."""

from __future__ import annotations

import pytest
from epubs import XHTML, epub
from reading import breaks, kinds, page, read_book, texts

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


@pytest.mark.parametrize("between", [
    "<hr/>", "<div><hr class='x'/></div>", "<p>* * *</p>", "<div>⁂</div>", "<p>&#160;*<br/>* *</p>",
    "<p class='Scene-Break'>&#160;</p>", "<div class='x asterism'><img src='x' alt=''/></div>"])
def test_a_rule_or_an_ornament_is_a_scene_break(between: str) -> None:
    book = page(f"<p>One.</p>{between}<p>Two.</p><h2>Three</h2>")
    assert texts(book) == [["One.", "Two.", "Three"]] and breaks(book) == ["Two."]


def test_a_scene_break_stands_before_headings_first_lines_and_within_paragraphs_too() -> None:
    assert breaks(page("<p>One.</p><hr/><h2>Two</h2><p>Three.</p>")) == ["Two"]
    assert breaks(page("<p>One.</p><p class='scenebreak'>Two.</p><p>Three.</p>")) == ["Two."]
    assert breaks(page("<p>One.<br/><br/>* * *<br/><br/>Two.<br/><br/>Three.</p>")) == ["Two."]


@pytest.mark.parametrize("between", [
    "<hr hidden='hidden'/>", "<hr class='pagebreak'/>", "<p>&#160;</p>", "<p>…</p>", "<p>—</p>",
    "<div/>", "<p><br/></p>", "<pre><code>***</code></pre>", "<img src='x' alt='* * *'/>"])
def test_what_only_parts_a_page_is_no_scene_break(between: str) -> None:
    assert breaks(page(f"<p>One.</p>{between}<p>Two.</p>")) == []


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
