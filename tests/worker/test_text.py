"""Text: what counts as speakable, how long it takes to say, and where it is cut into segments."""

from __future__ import annotations

import textwrap
import time
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import load_words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="session")
def bark() -> ModuleType:
    return load_words()


PROPERTY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LANGUAGES = ["de", "en", "es", "fr", "hi", "it", "ja", "ko", "pl", "pt", "ru", "tr", "zh"]


def limits(bark: ModuleType, chars: int = 175, seconds: float = 12.0, tokens: int = 256):
    return bark.SegmentLimits(_count_words_and_marks, tokens, seconds, max_chars=chars)


def _count_words_and_marks(text: str) -> int:
    return sum(1 + len(word) // 4 for word in text.split())


def pieces(bark: ModuleType, text: str, language: str = "en", **kwargs: float) -> list[str]:
    spans = bark.split_text(text, language, limits(bark, **kwargs))
    return [text[span.start : span.end] for span in spans]


def pauses(bark: ModuleType, text: str, **kwargs: float) -> list[float]:
    return [span.pause for span in bark.split_text(text, "en", limits(bark, **kwargs))]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  a\r\n\tb\u00a0c\u3000d  ", "a b c d"),
        ("a\x00b\u200bc", "a b c"),
        ("syl\u00adla\u2060ble\ufeff", "syllable"),
        ("cafe\u0301", "café"),
        ("lone \ud800surrogate", "lone surrogate"),
        ("", ""),
    ],
)
def test_normalizing_leaves_single_blanks_and_composed_letters(bark, text, normal):
    assert bark.normalize_text(text) == normal
    assert bark.normalize_text(normal) == normal


@pytest.mark.parametrize("text", ["Hi", "7", "½", "你", "न", "[laughs]", "♪", "*** a ***", "é"])
def test_letters_digits_cues_and_notes_are_speakable(bark, text):
    assert bark.is_speakable(text)


@pytest.mark.parametrize("text", ["", " \n", "***", "...", "🎉", "[]", "—", "\u0301", "\ud800"])
def test_marks_and_emoji_are_not_speakable(bark, text):
    assert not bark.is_speakable(text)
    assert bark.split_text(text, "en", limits(bark)) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("The quick brown fox jumps over the lazy dog, twice.", 51 / 15),
        ("Съешь же ещё этих мягких французских булок.", 43 / 15),
        ("今天天气很好我们去公园散步", 13 / 4.5),
        ("これはひらがなです", 9 / 7),
        ("안녕하세요 반갑습니다", 10 / 5),
        ("सभी मनुष्यों को गौरव और अधिकार", 30 / 12),
        ("1990", 1.6),
        ("5%", 0.8),
    ],
)
def test_an_estimate_follows_the_script(bark, text, seconds):
    assert bark.estimate_seconds(text) == pytest.approx(seconds, rel=0.15)


def test_composed_and_decomposed_letters_take_the_same_time(bark):
    text = "Él añadió: «Où êtes-vous ?»"
    assert bark.estimate_seconds(unicodedata.normalize("NFD", text)) == bark.estimate_seconds(text)


def test_a_short_text_is_one_segment_without_its_edges(bark):
    (span,) = bark.split_text(" \u200b Hello, world!\r\n", "en", limits(bark))
    assert (span.start, span.end, span.pause) == (3, 16, 0.0)


def test_short_neighbours_are_merged_and_a_tiny_sentence_never_stands_alone(bark):
    text = "Yes. No. Well. " + "It rained all day, and the river rose above the stone bridge. " * 4
    assert pieces(bark, text)[0].startswith("Yes. No. Well. It rained")
    assert all(60 <= len(piece) <= 175 for piece in pieces(bark, text))


def test_pauses_tell_sentences_paragraphs_and_clauses_apart(bark):
    long = "Here is a sentence of some length, which goes on and on; it does not end before it must"
    text = f"One short line.\n\n{long}. The end, I am told, is quite near now.\n * * * \nLast."
    assert pauses(bark, text, chars=60) == [0.5, 0.1, 0.25, 0.5, 0.0]


def test_pauses_survive_what_is_skipped_between_the_segments(bark):
    assert pauses(bark, "Hello. " + "*" * 50 + "\n\n" + "?" * 50 + "\nBye.", chars=20) == [0.5, 0.0]
    assert pauses(bark, "Hello there. " + "*** " * 9 + "Bye now.", chars=20) == [0.25, 0.0]


def test_paragraphs_are_never_merged_but_lines_are(bark):
    assert pieces(bark, "A title\n\nWrapped\nlines. Go.\n \t\nEnd") == [
        "A title",
        "Wrapped\nlines. Go.",
        "End",
    ]


@pytest.mark.parametrize(
    ("language", "kept"),
    [
        ("en", "Dr. Smith"), ("en", "e.g. this"), ("en", "U.S. Army"), ("en", "J. R. R. Tolkien"),
        ("en", "No. 5"), ("en", "3 000"), ("en", "1,234.56"), ("en", "10:30"), ("en", "v2.0"),
        ("en", "[clears throat]"), ("en", "[so :) Deep. Now]"), ("en", "St. Paul's"),
        ("en", "\"Really?\""), ("de", "Dr. Müller"), ("de", "z. B. hier"), ("de", "3. Oktober"),
        ("fr", "M. Dupont"), ("fr", "Mme. Curie"), ("fr", "« Viens"), ("fr", "oui !"),
        ("fr", "1\u202f000"), ("es", "Sr. García"), ("it", "dott. Rossi"), ("pl", "prof. Nowak"),
        ("pl", "r. w"), ("pt", "Dra. Costa"), ("ru", "т. е. да"), ("ru", "г. Москва"),
        ("tr", "3. sınıf"), ("tr", "Dr. Ahmet"), ("hi", "डॉ. शर्मा"),
    ],
)  # fmt: skip
def test_nothing_that_belongs_together_is_cut(bark, language, kept):
    for before in range(30):  # so that the cut has to fall at every place around it
        text = "la " * before + f"lala {kept} lala la lala la " + "la " * 12
        cut = pieces(bark, text, language, chars=32)
        assert len(cut) > 1
        assert sum(piece.count(kept) for piece in cut) == 1, cut


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", 'He said "Go. Now!" Then he left.', ['He said "Go. Now!"', "Then he left."]),
        ("en", "“It is late.” She ran away then.", ["“It is late.”", "She ran away then."]),
        ("en", "(It is very late.) She ran away.", ["(It is very late.)", "She ran away."]),
        ("de", "„Es ist jetzt spät.“ Sie lief weg.", ["„Es ist jetzt spät.“", "Sie lief weg."]),
        ("fr", "« Il est bien tard ! » Elle partit.", ["« Il est bien tard ! »", "Elle partit."]),
        ("es", "¿Qué pasa aquí hoy? ¡No pasa nada!", ["¿Qué pasa aquí hoy?", "¡No pasa nada!"]),
        ("ru", "— Это правда, да? — Нет, неправда.", ["— Это правда, да?", "— Нет, неправда."]),
        ("hi", "मैं घर जा रहा हूँ। तुम कहाँ हो अभी?", ["मैं घर जा रहा हूँ।", "तुम कहाँ हो अभी?"]),
        ("zh", "他说：“天气很好。”我们去公园吧！", ["他说：“天气很好。”", "我们去公园吧！"]),
        ("ja", "吾輩は猫である。名前はまだ無い。", ["吾輩は猫である。", "名前はまだ無い。"]),
        ("ja", "「これは何ですか。」と彼は言った。", ["「これは何ですか。」", "と彼は言った。"]),
        ("ko", "안녕하세요 여러분. 반갑습니다 모두.", ["안녕하세요 여러분.", "반갑습니다 모두."]),
        ("xx", "It is unknown now. It works here.", ["It is unknown now.", "It works here."]),
    ],
)
def test_sentences_and_their_closing_marks_stay_whole(bark, language, text, expected):
    assert pieces(bark, text, language, chars=len(text) - 4) == expected


def marked(bark: ModuleType, text: str, language: str) -> str:
    """The text with | where its sentences end."""
    text = text.replace("|", "")
    for start in reversed(bark.Sentences(text, 0, len(text), language).ends):
        end = len(text[:start].rstrip())
        text = f"{text[:end]}|{text[end:]}"
    return text


# Rows of sentences.tsv: sentences with an abbreviation inside them, and texts of several sentences.
# sentencex 1.0.32 with our rules as of 2026-11 held 59 % of the first in German, 70 in English, 75
# in Spanish, 42 in French, 85 in Italian, 28 in Polish, 31 in Portuguese, 51 in Russian, 36 in
# Turkish, and missed as many true ends as stands here.
MISSED = {"de": 12, "en": 5, "es": 6, "fr": 6, "it": 6, "pl": 3, "pt": 0, "ru": 8, "tr": 2}


@pytest.mark.parametrize("language", MISSED)
def test_abbreviations_are_held_and_no_more_true_ends_are_missed_than_before(bark, language):
    table = Path(__file__).with_name("sentences.tsv").read_text(encoding="utf-8").splitlines()
    rows = [row.partition("\t")[2] for row in table if row.startswith(f"{language}\t")]
    whole = [row for row in rows if "|" not in row]
    torn = [cut for row in whole if "|" in (cut := marked(bark, row, language))]
    assert len(whole) > 80 and len(torn) <= 0.05 * len(whole), torn
    several = [(_marks(row), _marks(marked(bark, row, language))) for row in rows if "|" in row]
    assert len(several) > 20
    assert sum(len(true - found) for true, found in several) <= MISSED[language]
    assert not [found - true for true, found in several if found - true]


def _marks(text: str) -> set[int]:
    places = [pos for pos, char in enumerate(text) if char == "|"]
    return {pos - count for count, pos in enumerate(places)}


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "i saw her.| she was sad.| they had no job.| it was cold"),
        ("en", "she was sad.| they had no job!| nobody cared.| the end"),
        ("en", "we met at approx. ten in st. louis.| it was, e.g. this, fine.| he left"),
        ("de", "er kam um fünf.| sie ging z. b. nach hause.| es war am 3. mai.| ende"),
        ("en", "He bought it.| iPhone sales rose.| eBay was there."),
        ("en", "He weighs approx. eighty kilos.| The end."),
        ("en", "It was years ago!|Come in.| I saw him.|She left?|No, he did."),
        ("en", "Node.js, U.S.A., e.g.This, 3.5, McDonald, www.Foo.com, a@B.co, Math.Pi."),
        ("ru", "Это было давно.|Он ушёл!|Мы остались."),
        ("de", "›Halt.‹| Dann ging er.| ‚Ja.‘| Er kam."),
        ("de", "»Er sagte: ›Halt.‹ Dann ging er.«| Sie kam.| „Er rief: ‚Ja.‘“| Ende."),
        ("en", "(It was late. We went home.)| She slept."),
        ("en", "1. Milk\n2. Eggs"),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(bark, language, text):
    assert marked(bark, text, language) == text


def test_sentences_within_a_quotation_are_better_cuts_than_commas(bark):
    first, second = "“The road was empty, and it rained.", "We went home, as one does in March.”"
    assert pieces(bark, f"{first} {second}", chars=60) == [first, second]
    assert pauses(bark, f"{first} {second}", chars=60) == [0.25, 0.0]


@pytest.mark.parametrize("text", ["La la la oui ! la la", "La « oui ? » la la la", "La la — la"])
def test_no_segment_starts_with_a_closing_mark(bark, text):
    for chars in range(9, len(text)):
        assert not any(piece[0] in "!?»:—" for piece in pieces(bark, text, "fr", chars=chars))


def test_a_long_sentence_is_cut_at_its_best_clause_boundary(bark):
    text = "The house was old, very old and grey; the garden behind it, though, was in bloom again"
    assert pieces(bark, text, chars=70)[0].endswith("grey;")
    assert pieces(bark, text.replace(";", ""), chars=70)[0].endswith("behind it,")
    assert pieces(bark, "alpha beta gamma delta and epsilon zeta eta theta", chars=40) == [
        "alpha beta gamma delta",
        "and epsilon zeta eta theta",
    ]


def test_pieces_of_an_endless_sentence_are_alike_in_length(bark):
    lengths = [len(piece) for piece in pieces(bark, "word " * 120)]
    assert max(lengths) - min(lengths) <= 10
    assert min(lengths) >= 110


@pytest.mark.parametrize("cluster", ["e\u0301\u0323", "👩🏽", "👨‍👩‍👧", "क्षि"])
def test_a_word_longer_than_a_segment_is_cut_between_whole_letters(bark, cluster):
    text = "x" + cluster * 60 + "x"
    cut = pieces(bark, text, chars=20)
    assert all(piece.lstrip("x").startswith(cluster[0]) for piece in cut[:-1] if piece != "x")
    assert not any(unicodedata.category(piece[0]).startswith("M") for piece in cut)
    assert not any(piece[0] in "\u200d🏽" or piece[-1] == "\u200d" for piece in cut)


def test_the_tokens_of_a_small_model_bound_the_segments_too(bark):
    calls: list[str] = []

    def count_letters(text: str) -> int:
        calls.append(text)
        return len(text) - text.count(" ")

    text = "The quick brown fox jumps over the lazy dog, and it is not tired at all. " * 10
    small = bark.SegmentLimits(count_letters, max_tokens=48, max_seconds=6.5)
    spans = bark.split_text(text, "en", small)
    assert all(count_letters(text[span.start : span.end]) <= 48 for span in spans)
    assert len(calls) - len(spans) <= 3 * len(spans)


def _assert_contract(bark: ModuleType, text: str, language: str, bounds) -> None:
    spans = bark.split_text(text, language, bounds)
    assert spans == bark.split_text(text, language, bounds)
    done = 0
    for span in spans:
        piece = text[span.start : span.end]
        assert done <= span.start < span.end <= len(text)
        assert not bark.is_speakable(text[done : span.start])
        assert bark.is_speakable(piece) and piece == piece.strip()
        assert len(piece) <= bounds.max_chars
        assert bark.estimate_seconds(piece) <= bounds.max_seconds
        assert bounds.count_tokens(bark.normalize_text(piece)) <= bounds.max_tokens
        done = span.end
    assert not bark.is_speakable(text[done:])
    assert [span.pause > 0 for span in spans] == [True] * (len(spans) - 1) + [False] * bool(spans)
    assert {span.pause for span in spans} <= {0.0, 0.1, 0.25, 0.5}


SPICE = [*' \n\r\t.,;:!?…"“”‘’«»()[]—-。、」字ーカあ한کक🎉', "\u200d", "\u0301", "\ufeff", "\x00"]
SPICE += ["Dr. ", "e.g. ", "[laughs]", "3 000", "1,234.56", "word ", "\n\n", "\u202e", "\ud800"]


@PROPERTY
@given(
    st.one_of(st.text(max_size=300), st.lists(st.sampled_from(SPICE), max_size=150).map("".join)),
    st.sampled_from([*LANGUAGES, "xx", ""]),
    st.tuples(st.integers(8, 175), st.sampled_from([1.0, 6.5, 12.0]), st.integers(4, 256)),
)
def test_any_text_is_covered_in_order_within_every_limit(bark, text, language, bounds):
    _assert_contract(bark, text, language, limits(bark, *bounds))


ATOMS = ["Dr. Smith", "e.g. this", "U.S. Army", "3 000", "1,234.56", "10:30", "v2.0", "don't"]
ATOMS += ["[clears throat]", "well-known", "café", "cafe\u0301", "слово", "the end.", "Ah!", "so,"]


@PROPERTY
@given(st.lists(st.sampled_from(ATOMS), min_size=5, max_size=60), st.integers(40, 175))
def test_no_cut_falls_inside_a_word_a_number_an_abbreviation_or_a_cue(bark, atoms, chars):
    text, inside = "", set()
    for atom in atoms:
        inside |= set(range(len(text) + 1, len(text) + len(atom)))
        text += atom + " "
    spans = bark.split_text(text, "en", limits(bark, chars))
    assert not inside & {edge for span in spans for edge in (span.start, span.end)}


PROSE = (
    "The ship came slowly round the point at last, and all of them went down to the Quay to see"
    " her. It was a cold morning in March, and old Captain Hale, who had waited for this day since"
    " Easter, did not say a word. Then the bells of St. Mary rang over the roofs of Market Street."
)
GERMAN = (
    "Der alte Mann ging langsam durch die Straße und sah in jedes Fenster der Häuser, in denen"
    " Kinder mit bunten Bällen spielten. Niemand kannte seinen Namen, und Tante Grete sagte, er sei"
    " vor Jahren aus Hamburg gekommen. Am Abend saß er auf der Bank unter der Linde."
)


def with_line_ends(bark: ModuleType, text: str, language: str = "en") -> str:
    """The text as it is cut: what is spoken at its lines' ends stands there."""
    spoken, done = "", 0
    for start, end, mark in bark.spoken_line_ends(text, language):
        spoken, done = spoken + text[done:start] + mark, end
    return spoken + text[done:]


def read(bark: ModuleType, text: str, language: str = "en", **kwargs: float) -> str:
    """What is spoken of the text, its segments parted by |."""
    spoken = with_line_ends(bark, text, language)
    spans = bark.split_text(spoken, language, limits(bark, **kwargs))
    return "|".join(bark.normalize_text(spoken[span.start : span.end]) for span in spans)


@pytest.mark.parametrize("columns", [38, 44, 52, 60, 66, 72, 80])
@pytest.mark.parametrize(("language", "prose"), [("en", PROSE), ("de", GERMAN)])
def test_prose_is_cut_and_read_alike_however_it_is_wrapped(bark, language, prose, columns):
    wrapped = textwrap.fill(prose, columns)
    for chars in (175, 90, 50):
        whole = read(bark, prose, language, chars=chars)
        assert whole.replace("|", " ") == prose
        assert read(bark, wrapped, language, chars=chars) == whole
        assert read(bark, f"{wrapped}\n\n{wrapped}", language, chars=chars) == f"{whole}|{whole}"


@pytest.mark.parametrize(
    ("language", "text", "spoken"),
    [
        ("en", "It was a nega-\ntive answer.", "It was a negative answer."),
        ("en", "He is a well-\nknown man.", "He is a well-known man."),
        ("en", "My mother-in-\nlaw knew some-\nthing.", "My mother-in-law knew something."),
        ("en", "An Anglo-\nSaxon king.", "An Anglo-Saxon king."),
        ("en", "The Quorgle! A Quor-\ngle.", "The Quorgle! A Quorgle."),
        ("en", "A re-wilded park. It was re-\nwilded.", "A re-wilded park. It was re-wilded."),
        ("en", "The syl\xad\nlable ends.", "The syllable ends."),
        ("de", "Ein- \nund Ausgang am Bahn-\nhof.", "Ein- und Ausgang am Bahnhof."),
        ("fr", "C'est peut-\nêtre un maga-\nsin.", "C'est peut-être un magasin."),
        ("pl", "To jest kamie-\nnica.", "To jest kamienica."),
    ],
)
def test_a_word_that_is_hyphenated_over_a_lines_end_is_one_word(bark, language, text, spoken):
    assert read(bark, text, language) == spoken


def test_no_cut_falls_inside_a_word_that_is_hyphenated_over_a_lines_end(bark):
    text = "It was, as far as I know, a nega-\ntive answer to a question that nobody asked."
    for chars in range(30, len(text)):
        assert any("nega-\ntive" in piece for piece in pieces(bark, text, chars=chars))


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("Red\nBlue\nGreen", "Red. Blue. Green"),
        ("milk\neggs\nrye bread", "milk. eggs. rye bread"),
        ("To do:\n- Call Ann\n- Buy milk and\n  eggs!\n- Rest",
         "To do: - Call Ann. - Buy milk and eggs! - Rest"),
        ("1. Milk\n2. Eggs", "1. Milk. 2. Eggs"),
        ("He said “no”\n*Never*\n[laughs]\nYes", "He said “no”. *Never*. [laughs] Yes"),
        ("The Garden\n" + textwrap.fill(PROSE, 72), f"The Garden. {PROSE}"),
        ("are you coming\ni have tickets 🎉\nbye", "are you coming. i have tickets 🎉 bye"),
        ("Whose woods these are I think I know.\nHis house is in the village though;\n"
         "He will not see me stopping here\nTo watch his woods fill up with snow",
         "Whose woods these are I think I know. His house is in the village though; He will not see"
         " me stopping here, To watch his woods fill up with snow"),
        ("Я помню чудное мгновенье\nПередо мной явилась ты",
         "Я помню чудное мгновенье, Передо мной явилась ты"),
        ("红\n绿\n蓝", "红。绿。蓝"),
        ("I never thought that you\nwould come back", "I never thought that you would come back"),
    ],
)  # fmt: skip
def test_a_line_of_a_list_or_of_verse_is_heard_to_end(bark, text, spoken):
    assert read(bark, text).replace("|", " ") == spoken


def test_lines_of_a_list_are_cut_like_sentences_and_keep_their_marks(bark):
    assert read(bark, "Apples from the garden\nPears from the market", chars=30) == (
        "Apples from the garden,|Pears from the market"
    )
    text = "Fresh apples\nPears, plums and nuts\nBread"
    assert read(bark, text, chars=24) == "Fresh apples.|Pears, plums and nuts.|Bread"
    assert pauses(bark, text, chars=24) == [0.25, 0.25, 0.0]


@PROPERTY
@given(st.lists(st.sampled_from([*SPICE, "-\n", "so", "Well"]), max_size=80).map("".join))
def test_reading_lines_adds_and_loses_no_letter(bark, text):
    spoken = with_line_ends(bark, text)
    letters = [[char for char in each if char.isalnum()] for each in (text, spoken)]
    assert letters[0] == letters[1]


UNITS = ["a", ".", "“", "[", "字", "\n", "a\n\n", "\u200d", "a. ", "Dr. ", '"A. ', "‹a.‹ ", "("]
UNITS += ["Red\n", "- a\n", "a-\nb", "word word, word. ", ". . ", "a.B "]


PROSE_AND_WORDS = """\
The ship came slowly round the point at last and all of them went down on the
Quay to see her come in with the tide, and the nega-
tive was well-
known to all of the people who had stood there since
dawn."""


def test_wrapped_prose_is_not_cut_at_its_lines_ends_though_words_go_over_them(
        bark: ModuleType) -> None:
    assert read(bark, PROSE_AND_WORDS) == (
        "The ship came slowly round the point at last and all of them went down on the Quay to see"
        " her come in with the tide,|and the negative was well-known to all of the people who had"
        " stood there since dawn.")


@pytest.mark.parametrize("unit", UNITS)
def test_time_grows_with_the_length_and_not_with_its_square(bark, unit):
    def seconds(length: int) -> float:
        began = time.process_time()
        text = (unit * length)[:length]
        bark.split_text(with_line_ends(bark, text), "en", limits(bark))
        return time.process_time() - began

    def grows_evenly() -> bool:
        return seconds(40_000) < 24 * max(seconds(5000), 0.005)  # 8 times as long; 64 if squared

    seconds(1000)
    assert any(grows_evenly() for _ in range(3))  # a busy machine's time is not the code's


# The first piece


def soon(bark: ModuleType, **kwargs: int) -> Any:
    return replace(limits(bark, **kwargs), soon=True)


OPENING = "The boat left at noon, and nobody on the quay waved to those who stood at its rail. "


@pytest.mark.parametrize(("text", "first"), [
    ("The boat left at noon and nobody waved at it. " + OPENING, "The boat left at noon and nobody"
     " waved at it."),
    ("It left. " + OPENING * 2, "It left. The boat left at noon, and nobody on the quay waved to"
     " those"),
    ("“I give up on it, I do, and then I go home…” And " + OPENING,
     "“I give up on it, I do, and then I go home…”"),
    ("The old miller who had lived beside the brown river, which was slow in summer and quick after"
     " the rain, walked down to it and looked at the water for a long while.",
     "The old miller who had lived beside the brown river,"),
    ("Chapter One\n\n" + OPENING * 2, "Chapter One"),
    (OPENING.strip(), OPENING.strip())])
def test_the_first_piece_of_a_long_text_is_short_and_whole(
        bark: ModuleType, text: str, first: str) -> None:
    spans = bark.split_text(text, "en", soon(bark))
    assert text[spans[0].start : spans[0].end] == first


def test_only_the_first_piece_is_short(bark: ModuleType) -> None:
    text = OPENING * 6 + "\n\n" + OPENING * 6
    lengths = [span.end - span.start for span in bark.split_text(text, "en", soon(bark))]
    assert lengths[0] < 90 and min(lengths[1:]) >= len(OPENING) - 1
    assert sum(length > 110 for length in lengths[1:]) >= 4


def test_a_text_that_fits_a_piece_of_110_characters_stays_whole(bark: ModuleType) -> None:
    text = ("The boat left at noon, as ever. " * 3 + "Nobody waved.")[:109] + "."
    assert len(text) == 110 and len(bark.split_text(text, "en", soon(bark))) == 1
    assert len(bark.split_text(text + " No.", "en", soon(bark))) > 1


def test_a_model_that_takes_short_texts_fills_its_first_piece(bark: ModuleType) -> None:
    text = "The boat left at noon. Nobody on the quay waved to it, and it was seen by no one. " * 3
    short = limits(bark, chars=48, tokens=48)
    assert bark.split_text(text, "en", replace(short, soon=True)) == (
        bark.split_text(text, "en", short))