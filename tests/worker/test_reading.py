"""Reading: the author's words, all of them, and no signs; what is left out, and where it stood."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import ModuleType

import pytest
from conftest import BUILTIN, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PROPERTY = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read(bark: ModuleType, text: str, language: str = "en") -> str:
    """A text as it is read, its lines by bars and its paragraphs by two."""
    script = bark.read(text, language)
    lines = re.sub(r"\n\s*\n", "||", script.text.strip()).replace("\n", "|")
    return re.sub(r" *(\|+) *", r"\1", lines)


def left_out(bark: ModuleType, text: str) -> list[str]:
    return [words for _, _, words in bark.read(text, "en").directions]


def loud(bark: ModuleType, text: str) -> list[str]:
    script = bark.read(text, "en")
    return [script.text[start:end] for start, end in script.emphases]


@pytest.mark.parametrize(("text", "spoken"), [
    ("# Chapter One\nIt rained.", "Chapter One.||It rained."),
    ("It rained.\n## What now? ##\nIt poured.", "It rained.||What now?||It poured."),
    ("Title\n=====\nText", "Title.|=====|Text"),
    ("- Red\n- Blue\n\n* Green\n* [x] Grey!", "Red.|Blue.||Green.|Grey!"),
    ("Buy:\n1. Milk\n2. Eggs, and\n   bread", "Buy:|1. Milk.|2. Eggs, and bread."),
    ("> I think about it,\n> > so do I.", "I think about it,|so do I."),
    ("One.\n\n---\n\nTwo.", "One.||---||Two."),
    ("| Name | Age |\n|:--|---|\n| Tom | 7 |\n| Ann. | |", "Name, Age.|Tom, 7.|Ann."),
    ("Name | Age\n--- | ---\nTom | 7", "Name, Age.|Tom, 7."),
    ("See [the guide](https://x.org/a_(b) 'A') or [it][1].\n\n[1]: https://y.org/z",
     "See the guide or it."),
    ("![A cat](cat.png), [![so](a.svg)](https://b.org)", "A cat, so"),
    ("At https://www.example.com/a/b?c=d#e, <http://x.org/y> or www.z.org/q.",
     "At www.example.com, x.org or www.z.org."),
    ("(see https://en.wikipedia.org/wiki/Bark_(tree))", "(see en.wikipedia.org)"),
    ("Mail <tom@x.org> or mailto:ann@y.org!", "Mail tom@x.org or ann@y.org!"),
    ("Call `f(*x, **y)` with ``_z_``.", "Call f(*x, **y) with _z_."),
    ("So:\n```python\nx = *a*\n```\nDone.", "So:||x = *a*||Done."),
    ("<p>Hello <b>dear</b> reader</p><br/>Go<script>x = 1;</script>.<!-- no -->",
     "Hello dear reader||Go."),
    ("<ul><li>Red</li><li>Blue</li></ul><h1>Go</h1>on", "Red.||Blue.||Go.||on"),
    ("<table><tr><td>A</td><td>B</td></tr></table>", "A, B."),
    ('Wait<break time="1s"/>here, <speak>you</speak>. <img src="a" alt="A dog">', 
     "Wait here, you.  A dog"),
    ("AT&amp;T, caf&eacute;&nbsp;&#8211; &lt;b&gt; &copy; &amp;hellip;",
     "AT&T, café\xa0– <b> © …"),
    ("Red\\\nBlue", "Red|Blue"),
    ("~~Old~~ \\*new\\* and a\\_b.", "Old *new* and a_b."),
    ("So[^1] it is.\n\n[^1]: Or not.", "So it is.||Or not."),
    ("这是**重要**的。[链接](https://a.b/c)", "这是重要的。链接"),
    ("**bold *and* loud**, ***all***, __so__", "bold and loud, all, so"),
])
def test_markup_is_read_as_a_person_would(bark: ModuleType, text: str, spoken: str) -> None:
    assert read(bark, text) == spoken


@pytest.mark.parametrize("text", [
    "5 * 3, 2*3*4, a ** b, a < b > c, a<b, <3, x > y, #1, C#, AT&T, R&D;, &notso;, f(_x_), a[i]",
    "snake_case_name, __init__, *.txt and *args, /_z_/, C:\\new\\dir, 5'2\", ~5, a ~~ b, 1^2, $5",
    "Press <Enter>, List<String>, #include <stdio.h>, <name>. The price* was low.|*Terms apply.",
    "[1] [MAN] [12]", "He ran (fast) - very fast - and the boy(s) (late) too; 50% | 30%", "a|b",
    "'Twas [a](b) ``quoted'' `a' and `b'", "--help, x - y, 10–12", "++ -- == !! ??", "e.g. -5 * -3",
])  # fmt: skip
def test_what_is_no_markup_stays(bark: ModuleType, text: str) -> None:
    text = text.replace("|*", "\n*")
    assert bark.read(text, "en").text == text


@pytest.mark.parametrize(("text", "spoken"), [
    ("Press [Pause] to stop the film.", "Press Pause to stop the film."),
    ("His horse, *Smile*, ran.", "His horse, Smile, ran."),
    ("Hold *pause*, then *play*.", "Hold pause, then play."),
    ("We saw *Whispers* twice. *Dune* too.", "We saw Whispers twice. Dune too."),
    ("Keys: [Pause], [Stop]", "Keys: Pause, Stop"),
    ("Films:\n\n- *Smile*\n- *laughs*", "Films:||Smile.|laughs."),
    ("*Smile*\n*Emma*\n*Laughs*", "Smile.|Emma.|Laughs"),
    ("She *laughs* at it, and *nods*.", "She laughs at it, and nods."),
    ("**Notes** (Thanks) It is **laughs**", "Notes (Thanks) It is laughs"),
    ("**nods**\n\n(opens at 9)\n\n(runs on Windows)", "nods||(opens at 9)||(runs on Windows)"),
    ("*looks great*", "looks great"), ("It is easy. (takes a minute)",) * 2,
    ("The boy (laughing) ran.", "The boy (laughing) ran."),
    ("The [music] plays, [laughs] he said.", "The [music] plays, [laughs] he said."),
    ("[Illustration: A whale]", "Illustration: A whale"),
])
def test_no_word_of_a_clause_or_a_list_vanishes(
        bark: ModuleType, text: str, spoken: str) -> None:
    assert read(bark, text) == spoken and left_out(bark, text) == []


ACTIONS = [
    "leans closer", "looks away", "nods", "smiles", "waves", "turns to the window", "takes a seat",
    "sits down", "steps back", "raises an eyebrow", "crosses his arms", "rolls her eyes",
    "shakes his head", "walks over", "glances at the door", "tilts head", "bows",
    "picks up the phone", "slowly stands up", "points at the map", "Opens the door", "Leans in.",
    "blushes", "claps", "puts down the cup", "reaches for the salt", "runs off", "kneels",
    "hugs you tightly", "grabs your hand and pulls you close", "gestures vaguely",
    "watches the rain", "cries softly",
]  # fmt: skip


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_that_stands_aside_is_left_out(bark: ModuleType, action: str) -> None:
    for text in (f"*{action}* Come in.", f"Come in. *{action}*", f"Come in.\n\n*{action}*"):
        assert read(bark, text) == "Come in." and left_out(bark, text) == [f"*{action}*"]
    if action.islower():
        assert left_out(bark, f"({action}) Come in.") == [f"({action})"]
    assert loud(bark, f"Come in. *{action}* Sit down.") == []


@pytest.mark.parametrize(("text", "left"), [
    ("(sighs) Fine.", ["(sighs)"]), ("[door] (turns to Tom) Hm.", []),
    ('He said, "*sighs* Fine."', ["*sighs*"]), ('"Hi," *nods* "come."', ["*nods*"]),
    ("ANNA: (coughing) Excuse me.", ["(coughing)"]), ("That is odd *shrugs*", ["*shrugs*"]),
    ("*nods* *smiles* Yes.", ["*nods*", "*smiles*"]), ("Go! [Applause]", ["[Applause]"]),
    ("(to himself) Why?", ["(to himself)"]), ("*in a low voice* No.", ["*in a low voice*"]),
    ("_laughs_ No.", ["_laughs_"]), ("(He sighs heavily.) No.", ["(He sighs heavily.)"]),
])
def test_directions_are_known_by_their_place_and_words(
        bark: ModuleType, text: str, left: list[str]) -> None:
    assert left_out(bark, text) == left


@pytest.mark.parametrize(("text", "words"), [
    ("I *really* mean it, _really_.", ["really", "really"]), ("*You* did it, *so* go.",
     ["You", "so"]),
    ("I read *Dune*, *Emma* and _War and Peace_.", []), ("*Emma* is long. *Dune*", []),
    ("- **Speed**: high\n- **low** cost\n- the *very* end", ["very"]),
    ("**Note:** so it is. **all of it goes**", []), ("This is **very important** to me.",
     ["very important"]),
    ("# A *big* title", ["big"]), ("*so it goes* on", []), ("*so* it goes", ["so"]),
    ("*leans closer* *looks away*", []), ("**Tom** *(laughs)*: No", []),
])
def test_capitals_are_for_emphasis_inside_a_clause(
        bark: ModuleType, text: str, words: list[str]) -> None:
    assert loud(bark, text) == words


def narrator(bark: ModuleType, folder: Path):
    return bark.Narrator(bark.ModelFacts(folder), "male")


@pytest.mark.parametrize("expressive", [True, False])
def test_reading_holds_for_every_model_and_tells_what_is_left_out(
        bark: ModuleType, toy: Path, expressive: bool) -> None:
    text = "# *Hello* there\n*nods* See [it](https://x.org/a). 🎉\n\n(waves)\n\nBye &amp; thanks!"
    manner = bark.Manner(expressive=expressive)
    for folder in (toy, BUILTIN):
        speech = narrator(bark, folder).plan(text, None, 0, manner)
        spoken = " ".join(speech.spoken).split()
        said = [word for word in spoken if word != "🎉"]
        assert said == ["Hello", "there.", "See", "it.", "Bye", "&", "thanks!"]
        told = [warning for told in speech.warnings for warning in told]
        signs = ["left out: 🎉"] * (folder == toy)
        assert sorted(told) == sorted(["left out: *nods*", "left out: (waves)", *signs])


def test_a_direction_becomes_a_cue_only_where_one_is_wanted_and_known(
        bark: ModuleType, toy: Path) -> None:
    text, plain = "*laughs* So it is. [sighs]", bark.Manner(expressive=False)
    speech = narrator(bark, toy).plan(text, None, 0)
    assert speech.spoken == ["So it is. [sighs]"]  # one cue a segment
    assert speech.warnings == [("left out: *laughs*",)]
    assert narrator(bark, toy).plan("*laughs* So.", None, 0).spoken == ["[laughs] So."]
    assert narrator(bark, toy).plan("*laughs* So.", None, 0).warnings == [()]
    assert narrator(bark, toy).plan(text, None, 0, plain).warnings == [("left out: *laughs*",)]
    told = narrator(bark, BUILTIN).plan(text, None, 0)
    assert told.spoken == ["So it is."]
    assert told.warnings == [("left out: *laughs*", "left out: [sighs]")]


@pytest.mark.parametrize("text", ["*nods*", "(waves)\n\n*laughs*", "[Applause]", "***", "<p></p>",
                                  "<!-- no -->", "🎉", "[x]: https://y.org"])
def test_a_text_with_nothing_to_speak_is_refused(bark: ModuleType, toy: Path, text: str) -> None:
    for folder in (toy, BUILTIN):
        with pytest.raises(bark.NothingToSpeak):
            narrator(bark, folder).plan(text, None, 0)
    assert narrator(bark, toy).plan("[laughs]", None, 0).spoken == ["[laughs]"]


def test_no_unknown_token_reaches_a_model(bark: ModuleType, toy: Path) -> None:
    text = ("“No” … ‘so’ — 5 ½ × 3 ﬁt 🎉🎉 字 ᚠ Привет naïve x\u2011y ①a🎉b £5 30°C " + "x" * 400
            + " \U0001f600!")
    for folder in (toy, BUILTIN):
        facts = bark.ModelFacts(folder)
        speech = bark.Narrator(facts, "male").plan(text, None, 0)
        assert facts.unknown_id not in [i for s in speech.segments for i in s.text_ids]
        assert all(len(s.text_ids) <= facts.semantic.max_input_semantic_length
                   for s in speech.segments)
        assert any("Привет" in told or "ᚠ" in told for each in speech.warnings for told in each)


@pytest.mark.parametrize(("known", "written", "left"), [
    ("abc\"'-. ", "\"a\" - 'b'... c", ""), ("abc", "abc", "“”—‘’…"),
])
def test_a_sign_is_written_in_its_plain_form_or_left_out(
        bark: ModuleType, known: str, written: str, left: str) -> None:
    def unknown(text: str) -> list[tuple[int, int]]:
        return [m.span() for m in re.finditer(r"\S+", text) if set(m[0]) - set(known)]

    spoken, gone = bark.Pen(unknown).write("“a” — ‘b’… c")
    assert ("".join(spoken.split()), set(gone)) == ("".join(written.split()), set(left))


def test_places_point_into_the_text_that_was_sent(bark: ModuleType, toy: Path) -> None:
    text = ("# One\n\n**Two** is *here*. &amp; [so](https://x.org)!\n\n<p>Three</p>\n\n"
            "- four\n- five")
    speech = narrator(bark, toy).plan(text, None, 0)
    assert [text[span.start : span.end] for span in speech.spans] == [
        "# One", "**Two** is *here*. &amp; [so](https://x.org)!", "Three", "- four\n- five"]


def test_the_document_tells_what_leaves_and_what_its_examples_become(bark: ModuleType) -> None:
    document = (ROOT / "docs/reading.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- (.+)$", document, re.M)
    assert listed == list(bark.LEAVES.values()) and set(KINDS) == set(bark.LEAVES)
    assert len(document.splitlines()) <= 60
    (stay,) = re.findall(r"ones: (`<Enter>`.*?) and round", document, re.S)
    for text in re.findall(r"`([^`]+)`", stay):
        assert bark.read(f"It is {text} here.", "en").text == f"It is {text} here."


# Of what may leave, what each kind has to look like.
KINDS = {
    "target": r"<?(?:https?://|ftps?://|mailto:).*|\]\(.*\)|\]\[.*\]|\[[^\]]+\]:.*|[:/?#].*",
    "note": r"\[\^\d+\]:?\s*", "tag": r"<.*>", "entity": r"&\S+;",
    "line": r"\s*(?:```|~~~).*\n?|\s*[-*•+]\s+\[[ xX✓]\]\s+",
    "aside": r"[*(\[_]+.*[*)\]_]+[.!…]* ?| [*(\[_]+.*",
}
SPICE = [*' \n.,;!?…"“”‘’\'()[]*_-—–♪#>|`~<&\\/:', "\n\n", "**", "__", "```\n", "# ", "- ", "> ",
         "1. ", "| a | b |\n", "|---|---|\n", "word ", "Tom ", "*a* ", "_b_ ", "[c](https://d.e/f)",
         "![g](h.png)", "https://i.j/k ", "www.l.m", "<b>", "</b>", "<br/>", "<p>", "<!-- n -->",
         "&amp;", "&eacute;", "&lt;", "`o`", "[^1]", "*nods* ", "(sighs)", "[laughs] ", "[p] ",
         "*leans closer*", "(thanks)", "~~q~~", "\\*", "[r]: https://s.t\n", "字", "é"]  # fmt: skip


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


@PROPERTY
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(SPICE), max_size=60).map("".join)),
       st.sampled_from(["en", "de", "zh"]), st.booleans())
def test_no_word_is_lost_or_added_but_by_the_kinds_of_the_list(
        bark: ModuleType, text: str, language: str, cues: bool) -> None:
    script = bark.read(text, language, cues)
    assert script.text == bark.read(text, language, cues).text
    written, done = [], 0
    for kind, start, end in sorted(script.left, key=lambda left: (left.start, left.end)):
        assert re.fullmatch(KINDS[kind], text[start:end], re.S), (kind, text[start:end])
        written.append(text[done:start])
        done = max(done, end)
    written.append(text[done:])
    signs = [sign for kind, start, end in script.left if kind == "entity"
             for sign in bark.html.unescape(text[start:end].replace("amp;", ""))]
    said = "".join(filter(str.isalnum, script.text))
    meant = "".join(filter(str.isalnum, "".join(written)))
    assert len(said) - len(meant) == len([s for s in signs if s.isalnum()])
    if not signs:
        assert said == meant


@PROPERTY
@given(st.lists(st.sampled_from(SPICE), max_size=60).map("".join))
def test_segments_stand_in_order_and_hold_their_words(bark: ModuleType, text: str) -> None:
    script = bark.read(text, "en")
    limits = bark.SegmentLimits(lambda piece: 1 + len(piece) // 4, 256, 12.0, max_chars=60)
    spans = bark.split_text(script.text, "en", limits)
    done = 0
    for span, place in zip(spans, bark.placed(script, spans), strict=True):
        assert done <= place.start < place.end <= len(text)
        inside = iter(text[place.start : place.end])
        said = [c for c in script.text[span.start : span.end] if c.isascii() and c.isalnum()]
        assert all(c in inside for c in said)
        done = place.end


UNITS = [
    "*", "_", "`", "[", "<", "&", "\\", "|", ">", "#", "~", "(", "*a ", "_a ", "`a ", "``a",
    "[a](", "[a]", "[[a]", "[a [a] ", "<a ", "<a>", "</a>", "<!--", "<script>", "&amp;",
    "&amp;amp;", "~~a ", "> ", "# a\n", "- a\n", "|a|\n", "a|b\n", "|-|\n", "```a\n",
    "~~~\n```a\n", "a\n==\n", "https://a.b/)", "http://a/" + ")" * 100, "<a@b", "[^1]",
    "[a]: /b\n", "[a]:", "**a ", "*a* ", "*nods* ", "*nods*\n", "(leans closer) ", "<td>a</td>",
    "- *a*\n", " ", "\t|", "\n", "[Pause] ", "a *b* c. ",
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_time_grows_with_the_length_and_not_with_its_square(bark: ModuleType, unit: str) -> None:
    text = (unit * 25_000)[:25_000]
    began = time.process_time()
    bark.read(text, "en")
    assert time.process_time() - began < 1.0  # 0.25 at most seen; square time would be many
