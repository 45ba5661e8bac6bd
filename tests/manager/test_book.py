"""manage/book/: what is read aloud of plain text and Markdown, and what is no book at all."""

from __future__ import annotations

import pytest
from epubs import packed
from reading import LONG, WESTERN, breaks, kinds, md, refusal, texts, titles, txt

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


def test_a_sign_that_was_lost_before_is_no_other_encodings() -> None:
    assert texts(txt("A caf\ufffd in town.".encode()))[0] == ["A caf\ufffd in town."]


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


ORNAMENTS = ["* * *", "***", "*", "#", "⁂", "❦", "~ * ~", "—❦—", "---", "- - -", "———", "• • •",
             "=====", "○"]


@pytest.mark.parametrize("ornament", ORNAMENTS)
def test_what_follows_an_ornament_is_after_a_scene_break(ornament: str) -> None:
    assert breaks(txt(f"One.\n\n  {ornament}\n\nTwo.\n\nThree.\n\n{ornament}\n")) == ["Two."]
    assert breaks(txt(f"One.\n{ornament}\nTwo.\nThree.\n")) == ["Two."]


@pytest.mark.parametrize("text", ["…", "...", "—", "--", "?!", "“”", "😀", "\\", "* a *", "(*)"])
def test_what_may_be_speech_or_a_scrap_is_no_scene_break(text: str) -> None:
    assert breaks(txt(f"One.\n\n{text}\n\nTwo.")) == []


def test_an_ornament_among_lines_parts_them_and_an_underline_does_not() -> None:
    paragraphs = [f"{LONG} {LONG} Or so.", f"{LONG} Nobody.", f"“No,” he said. {LONG}"]
    for ornament in ("***", "        * * *"):
        book = txt("\n".join([wrap(paragraphs[0]), ornament, *map(wrap, paragraphs[1:])]))
        assert texts(book) == [paragraphs] and breaks(book) == [paragraphs[1]]
    table = "Name  Age\n----  ---\nAnn   7"
    assert breaks(txt(f"{table}\n\n{LONG}")) == [] and len(texts(txt(table))[0]) == 1


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


@pytest.mark.parametrize("sign", [
    "***", "* * *", "---", "___", "\\* \\* \\*", "\\*\\*\\*", "#", "###", "⁂", "<hr>",
    "<p align=center>* * *</p>"])
def test_a_thematic_break_or_an_ornament_is_a_scene_break(sign: str) -> None:
    book = md(f"# T\n\nOne.\n\n{sign}\n\nTwo.\n\nThree.\n")
    assert texts(book) == [["T", "One.", "Two.", "Three."]] and breaks(book) == ["Two."]
