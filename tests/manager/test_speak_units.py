"""`speak`'s Python, function by function: cuts, pauses, the whole, the pace, what answers mean."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import threading
import wave
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from binding import RATE, Loudness
from book import Book, Chapter, Paragraph
from calling import (
    Busy,
    Crew,
    Faulty,
    Gone,
    Hopeless,
    Line,
    NothingToSpeak,
    Pace,
    Refused,
    Reply,
    Task,
    WrongKey,
    judged,
    requests_for,
)
from conftest import load_words
from parts import (
    CLAUSE_PAUSE,
    PARAGRAPH_PAUSE,
    SENTENCE_PAUSE,
    Heard,
    Manner,
    Part,
    Parts,
    Piece,
    Plan,
    cut,
    marks_of,
    pieces_of,
    segment_at,
    spliced,
    timeline,
)
from progress import Progress, moment
from speak import Search, decoded, finder_for, parse_options, parse_time


@pytest.fixture(scope="module")
def words() -> ModuleType:
    return load_words()


# Cutting


def test_pauses_are_those_that_the_worker_makes(words: ModuleType) -> None:
    assert (CLAUSE_PAUSE, SENTENCE_PAUSE, PARAGRAPH_PAUSE) == (
        words.CLAUSE_PAUSE, words.SENTENCE_PAUSE, words.PARAGRAPH_PAUSE)


@pytest.mark.parametrize(("text", "limit", "pieces"), [
    ("It is short.", 20, [("It is short.", 0.0)]),
    ("One sentence ended. Another one began.", 25,
     [("One sentence ended.", SENTENCE_PAUSE), ("Another one began.", 0.0)]),
    ("He met Prof. Miller, and he left then.", 25,
     [("He met Prof. Miller,", CLAUSE_PAUSE), ("and he left then.", 0.0)]),
    ("There is not one sign in all of this", 20,
     [("There is not one", CLAUSE_PAUSE), ("sign in all of this", 0.0)]),
    ("“Are you there?” she asked. He was.", 30,
     [("“Are you there?” she asked.", SENTENCE_PAUSE), ("He was.", 0.0)]),
    ("人人生而自由。在尊严上一律平等。", 10,
     [("人人生而自由。", SENTENCE_PAUSE), ("在尊严上一律平等。", 0.0)]),
    ("सभी स्वतन्त्र हैं। सब समान हैं।", 22,
     [("सभी स्वतन्त्र हैं।", SENTENCE_PAUSE), ("सब समान हैं।", 0.0)]),
    ("abc" + "e\u0301" * 10, 10,
     [("abc" + "e\u0301" * 3, 0.0), ("e\u0301" * 5, 0.0), ("e\u0301" * 2, 0.0)]),
], ids=["short", "sentence", "abbreviation", "blank", "question in quotes", "Chinese", "Hindi",
        "letters of two characters"])
def test_what_is_too_long_is_cut_where_it_is_heard_least(
        text: str, limit: int, pieces: list[tuple[str, float]]) -> None:
    assert list(cut(text, limit)) == pieces
    assert all(len(piece) <= limit for piece, _ in pieces)


def test_after_a_heading_and_a_chapter_the_silence_is_longer() -> None:
    chapters = (Chapter("One", (Paragraph("One", 1, "heading"), Paragraph("First.", 3),
                                Paragraph("Second.", 5), Paragraph("Aside.", 9, "note", "2"))),
                Chapter("Two", (Paragraph("Third.", 7),)))
    book = Book("", "", "de", chapters)
    told = [(piece.text, piece.pause) for piece in pieces_of(book, 500, True, "de")]
    assert told == [("One", 1.0), ("First.", 0.5), ("Second.", 0.5), ("Anmerkung 2: Aside.", 2.0),
                    ("Third.", 0.0)]
    assert len(pieces_of(book, 500, notes=False)) == 4


def test_where_a_scene_breaks_the_silence_is_longer_whatever_is_left_out() -> None:
    chapter = Chapter("", (Paragraph("First.", 1, after_break=True), Paragraph("Second.", 3),
                           Paragraph("Aside.", 5, "note", "2", after_break=True),
                           Paragraph("Third.", 7), Paragraph("Fourth.", 9, after_break=True)))
    pieces = pieces_of(Book("", "", "en", (chapter,)), 500, notes=False)
    assert [(piece.text, piece.pause) for piece in pieces] == [
        ("First.", 0.5), ("Second.", 1.5), ("Third.", 1.5), ("Fourth.", 0.0)]


# Parts and the whole


def part_of(*seconds: float, peak: float = -3.0) -> Part:
    """A segment of each length, 0.25 s apart, whose samples are its number."""
    pcm, segments = b"", []
    for number, length in enumerate(seconds, 1):
        pcm += bytes(2 * RATE // 4) if pcm else b""
        start = len(pcm) / 2 / RATE
        pcm += number.to_bytes(2, "little") * round(length * RATE)
        segments.append({"text": f"s{number}", "start": start, "end": len(pcm) / 2 / RATE})
    return Part(pcm, segments, Loudness(-20.0, peak))


def test_a_part_comes_back_as_it_was_kept_or_not_at_all(tmp_path: Path) -> None:
    part = part_of(1.0, 0.5)
    with Parts(tmp_path / "o.wav") as parts:
        parts.save("a", part)
        assert parts.load("a") == part and parts.load("b") is None
        path = parts.folder / "a.part"
        whole = path.read_bytes()
        for broken in (whole[:-1], whole + b"\0", whole.replace(b"s1", b"s3"), whole[:70], b""):
            path.write_bytes(broken)
            assert parts.load("a") is None


def test_parts_that_are_no_more_needed_go_to_the_last_however_often_that_is_broken_off(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is whole is not taken for half, and spoken once more."""
    def end(self: Path, missing_ok: bool = False) -> None:
        os.unlink(self)
        raise KeyboardInterrupt
    with Parts(tmp_path / "o.wav") as parts:
        for name in "abc":
            parts.save(name, part_of(0.1))
        monkeypatch.setattr(Path, "unlink", end)
        with pytest.raises(KeyboardInterrupt):
            parts.remove()
        monkeypatch.undo()
        assert parts.are_there()
    with Parts(tmp_path / "o.wav") as parts:
        assert not parts.are_there() and os.listdir(parts.folder) == ["lock"]
    assert os.listdir(tmp_path) == []


def test_all_that_decides_how_it_sounds_makes_another_name() -> None:
    manners = [Manner("m", "v"), Manner("n", "v"), Manner("m", "w"), Manner("m", "v", 7),
               Manner("m", "v", None, False)]
    names = {manner.name_of(text) for manner in manners for text in ("a", "b")}
    assert len(names | {manners[0].name_of("a", {"0": 1})}) == 11
    assert Manner("m", "v").name_of("a") == Manner("m", "v").name_of("a")


def test_a_segment_made_anew_leaves_the_others_as_they_are() -> None:
    old, new = part_of(1.0, 1.0, 1.0), part_of(1.5, 2.0, 1.5, peak=-1.0)
    mixed = spliced(old, new, [1])
    quarter, second = 2 * RATE // 4, 2 * RATE
    assert mixed.pcm == old.pcm[: second + quarter] + b"\2\0" * (2 * RATE) + old.pcm[
        2 * second + quarter :]
    assert [(one["start"], one["end"]) for one in mixed.segments] == [
        (0.0, 1.0), (1.25, 3.25), (3.5, 4.5)]
    assert mixed.loudness == Loudness(-20.0, -1.0)


def whole(*parts: Part | None) -> tuple[Plan, list[Heard]]:
    pieces = [Piece(str(number), number // 2, number, 0.5) for number in range(len(parts))]
    plan = Plan(pieces, Manner("m", "v"))
    briefs = {name: part.in_brief() for name, part in zip(plan.names, parts, strict=True) if part}
    return plan, timeline(plan, briefs)


def test_each_time_belongs_to_the_sentence_that_is_heard_then() -> None:
    _, heard = whole(part_of(1.0, 1.0), None, part_of(1.0))
    assert [one.start for one in heard] == [0.0, 2.75, 3.25]
    found = [segment_at(heard, at) for at in (0.0, 0.99, 1.1, 1.3, 3.0, 3.3, 4.5, 5.0)]
    assert [one and (one[0].piece.line, one[1]) for one in found] == [
        (0, 0), (0, 0), (0, 0), (0, 1), (0, 1), (2, 0), (2, 0), None]


@pytest.mark.parametrize("start", [0.0, 1.2, 59.96, 754.8, 3599.999, 36_000.04])
def test_the_time_that_is_told_of_a_sentence_finds_it(start: float) -> None:
    _, heard = whole(part_of(0.3, 0.3, 0.3))
    heard = [one._replace(start=start) for one in heard]
    for index, segment in enumerate(heard[0].brief.segments):
        assert segment_at(heard, parse_time(moment(start + segment["start"]))) == (heard[0], index)


def test_chapters_begin_where_their_first_words_are_heard() -> None:
    _, heard = whole(part_of(1.0), part_of(1.0), part_of(2.0))
    marks = marks_of((Chapter("One" * 99, ()), Chapter("", ())), heard)
    assert [tuple(mark) for mark in marks] == [(("One" * 99)[:200], 0.0, 3.0), ("2", 3.0, 5.5)]


def test_a_plan_names_each_text_once() -> None:
    pieces = [Piece(text, 0, 1, 0.5) for text in ("a", "b", "a")]
    plan = Plan(pieces, Manner("m", "v"))
    assert list(plan.firsts.values()) == [0, 1] and plan.names[0] == plan.names[2]
    again = Plan(pieces, Manner("m", "v"), {plan.names[1]: {"0": 7}})
    assert again.names[0] == plan.names[0] and again.names[1] != plan.names[1]


# Answers


@pytest.mark.parametrize(("status", "headers", "code", "kind"), [
    (400, {}, "invalid_text", Refused), (400, {}, "unknown_voice", Hopeless),
    (401, {}, "invalid_api_key", WrongKey), (404, {}, "not_found", Hopeless),
    (413, {}, "body_too_large", Refused), (422, {}, "nothing_to_speak", NothingToSpeak),
    (429, {"Retry-After": "7"}, "", Busy), (503, {}, "queue_full", Busy),
    (503, {}, "not_ready", Gone), (503, {}, "draining", Gone),
    (503, {"X-Should-Retry": "false"}, "generation_failed", Faulty),
    (500, {}, "internal_error", Faulty), (502, {}, "", Gone), (504, {}, "timeout", Faulty),
    (404, {}, "", Gone), (200, {}, "", Faulty)])
def test_what_an_answer_means(
        status: int, headers: dict[str, str], code: str, kind: type[Exception]) -> None:
    body = json.dumps({"error": {"code": code, "message": "m"}}).encode()
    with pytest.raises(kind) as raised:
        judged(Reply(status, headers, body))
    assert raised.type is kind
    if status == 429:
        assert raised.value.seconds == 7
    if code == "generation_failed":
        assert raised.value.needs_seed


def test_sound_at_another_rate_is_no_texts_fault() -> None:
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(320))
    with pytest.raises(Hopeless, match="speaks at 16000 Hz; only models of 24000 Hz can be bound"):
        decoded(base64.b64encode(sound.getvalue()).decode())
    with pytest.raises(Faulty, match="the answer's audio cannot be read"):
        decoded("AAAA")


def test_a_page_of_a_proxy_tells_that_the_worker_is_not_there() -> None:
    with pytest.raises(Gone, match="HTTP 502: <html> Bad"):
        judged(Reply(502, {}, b"<html>\nBad"))


def test_who_waits_for_an_answer_that_cannot_come_is_cut_off_and_asks_no_more() -> None:
    """On a connection that served before, as one that is closed meanwhile would be made anew."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = Line(f"http://127.0.0.1:{server.getsockname()[1]}")
        said: list[object] = []

        def ask() -> None:
            said.append(line.ask("/health").json)
            with pytest.raises(Gone) as gone:
                line.ask("/synthesize", {"text": "x"}, 60.0)
            said.append(gone.value)
        thread = threading.Thread(target=ask)
        thread.start()
        with server.accept()[0] as connection:
            assert connection.recv(9999).startswith(b"GET /health HTTP/1.1")
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            assert connection.recv(9999).startswith(b"POST /synthesize HTTP/1.1")
            line.cut()
            thread.join(10)
        assert len(said) == 2


# Pace and crew


def test_the_pace_halves_at_a_no_once_for_all_that_were_sent_and_grows_again() -> None:
    time = [0.0]
    pace = Pace(8, lambda: time[0])
    assert pace.allows(7) and not pace.allows(8)
    for _ in range(8):
        pace.refused(5.0, 8)
    assert pace.limit == 4 and not pace.allows(0)
    time[0] = 5.0
    assert pace.allows(3) and not pace.allows(4)
    for _ in range(40):
        pace.succeeded()
    assert pace.limit == 8
    for _ in range(9):
        time[0] += 10
        pace.refused(1.0, 8)
    time[0] += 10
    assert pace.limit == 1 and pace.allows(0)


def test_there_is_always_a_request_that_waits_for_a_slot() -> None:
    assert [requests_for(slots) for slots in (1, 4, 8, 64)] == [3, 6, 11, 81]


class Silent:
    """A worker that is never cut."""

    def cut(self) -> None:
        pass


def crew_of(make: Callable[[object, Task], None], count: int = 6) -> Crew:
    crew = Crew([Task(str(number), str(number)) for number in range(count)], make)
    crew.join(Silent(), 3)
    return crew


def finish(crew: Crew) -> None:
    for _ in range(100):
        crew.wait(0.1)
        if crew.is_over:
            return
        if crew.worker is None:
            crew.join(Silent(), 3)
    raise AssertionError("no end")


def test_each_task_is_done_once_whatever_fails_on_the_way() -> None:
    failures = iter([Gone("a"), Busy("b", 0.0), Faulty("c"), Gone("d")])
    made: list[str] = []
    lock = threading.Lock()

    def make(worker: object, task: Task) -> None:
        with lock:
            if error := next(failures, None):
                raise error
            made.append(task.name)
    crew = crew_of(make)
    finish(crew)
    assert sorted(made) == list("012345")
    assert (crew.failed, crew.broken, crew.busy_since) == ([], None, None)


def test_it_gives_up_where_nobody_takes_anything_for_as_long_as_it_may_wait() -> None:
    crew = Crew([Task("a", "a"), Task("b", "b")], lambda worker, task: None)
    crew._settle(None, Task("a", "a"), Busy("all are full", 0.0))
    search = Search(None, Progress(True), minutes=30, may_start=False)  # type: ignore[arg-type]
    search.check(crew)
    crew.busy_since -= 1801
    with pytest.raises(Hopeless, match=r"30 minutes \(--wait\): all are full") as raised:
        search.check(crew)
    assert raised.value.status == 6
    crew._settle(None, Task("b", "b"), None)
    search.check(crew)


def test_what_is_refused_is_not_tried_again_and_what_fails_four_times() -> None:
    asked: list[str] = []

    def make(worker: object, task: Task) -> None:
        asked.append(task.name)
        if task.name == "1":
            raise Refused("no")
        if task.name == "2":
            raise Faulty("broken")
    crew = crew_of(make)
    crew.pace.refused = lambda *words: None  # type: ignore[method-assign]    # no pauses here
    finish(crew)
    assert (asked.count("1"), asked.count("2")) == (1, 4)
    assert {task.name: task.failure for task in crew.failed} == {"1": "no", "2": "broken"}


def test_a_text_that_ends_every_worker_is_given_up() -> None:
    asked: list[str] = []

    def make(worker: object, task: Task) -> None:
        asked.append(task.name)
        if task.name == "2":
            raise Gone("it fell over")
    crew = crew_of(make)
    finish(crew)
    assert asked.count("2") == 12 and len(asked) == 17
    assert [task.failure for task in crew.failed] == ["it fell over"]


@pytest.mark.parametrize("error", [OSError(28, "full"), Hopeless(1, "no")])
def test_what_no_other_task_would_survive_ends_all(error: Exception) -> None:
    def make(worker: object, task: Task) -> None:
        raise error
    crew = crew_of(make)
    finish(crew)
    assert crew.broken is error


# What people read and write


@pytest.mark.parametrize(("text", "seconds"), [
    ("12:34", 754.0), ("1:02:03", 3723.0), ("754.5", 754.5), ("0:00", 0.0)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(("words", "said"), [
    ("--seed -1", "--seed: '-1' must be a whole number from 0 to 9007199254740991"),
    ("--wait long", "--wait: 'long' must be a whole number"),
    ("--again noon", "'noon' must be a time such as 12:34"),
    ("--url http://h --start", "--url goes without --endpoint and --start"),
    ("--endpoint --start", "--start goes without --endpoint"),
    *((f"--url {url}", f"'{url}' must be an address such as http://127.0.0.1:8080") for url in (
        "h:80", "http://", "http://:80", "http://h:0", "http://h:99999", "http://h:a",
        "http://[::1", "http://me:secret@h", "http://h?x"))])
def test_values_that_are_none_are_refused(words: str, said: str) -> None:
    with pytest.raises(Hopeless, match=re.escape(said)) as raised:
        parse_options(["t.txt", "-o", "o.wav", *words.split()])
    assert raised.value.status == 2


@pytest.mark.parametrize("key", ["sesame\n", "se same", "sésame"])
def test_a_key_that_is_none_is_refused_and_not_shown(key: str) -> None:
    options = parse_options(["t.txt", "-o", "o.wav", "--url", "http://h"])
    with pytest.raises(Hopeless, match="BARK_API_KEY must be printable ASCII") as raised:
        finder_for(options, {"BARK_API_KEY": key})
    assert "same" not in str(raised.value)


def test_progress_tells_share_chapter_speed_time_left_and_dollars() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.begin(total=400.0, missing=200.0)
    progress.resume(0.36)
    progress._since -= 10.0  # it has worked for ten seconds
    progress.add(100.0, 120.0)
    assert re.fullmatch(r"75 %  chapter 3 of 4  1[12]\.\d times real time  0:00:10 left"
                        r"  about 0\.001 \$ of 0\.002 \$", progress.line("chapter 3 of 4"))
    progress.pause()
    before = progress.worked
    assert progress.worked == before
    progress.say("a word\x1b[2J")
    assert stream.getvalue() == "a word\ufffd[2J\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_is_redrawn_and_makes_way_for_words(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    terminal = Terminal()
    progress = Progress(stream=terminal)
    progress.begin(total=100.0, missing=75.0)
    progress._shown -= 1.0
    progress.show("chapter 1 of 2", "the worker is full of others' words")
    bar = "█" * 4 + "░" * 11 + "  25 %  chapter 1 of 2  the worker is full o"
    assert terminal.getvalue() == "\r\033[K" + bar and len(bar) == 59
    progress._shown -= 1.0
    progress.show("第一章 " * 9)
    assert terminal.getvalue().endswith("25 %  " + "第一章 " * 5)
    progress.say("a word")
    assert terminal.getvalue().endswith("\r\033[Ka word\n")
    quiet = Progress(True, Terminal())
    quiet._shown -= 60.0
    quiet.show("chapter 1 of 2")
    assert quiet._stream.getvalue() == ""
