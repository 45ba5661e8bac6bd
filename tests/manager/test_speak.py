"""`speak`: the real script and a real worker on the toy model, most often behind a gate that counts
what is asked and spoils what a test wants spoilt.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from conftest import Worker, running_worker, wait_until
from epubs import epub
from manager import BASH, Run
from speaking import KEY, Desk, Gate, gate_before, make_program, pcm_of, seconds_of
from test_rented import CommandLines

TEXT = "\n\n".join(f"Paragraph {word} is here." for word in
                   ("one", "two", "three", "four", "five", "six", "seven", "eight"))
BOOK = ("# One\n\nThe first words.\n\n*nods*\n\nThe next words.\n\n# Two\n\nThe last words.\n\n"
        "The first words.\n")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def toy_worker(toy: Path) -> Iterator[Worker]:
    with running_worker(BARK_MODEL=str(toy), BARK_API_KEY=KEY, TTS_MAX_LENGTH="500",
                        BARK_MAX_BATCH="4", BARK_CACHE_MB="0",
                        BARK_DETERMINISTIC="on") as worker:
        worker.wait_for("ready")
        yield worker


@pytest.fixture
def gate(toy_worker: Worker) -> Iterator[Gate]:
    with gate_before(toy_worker.url) as gate:
        yield gate


@pytest.fixture
def desk(program: Path, gate: Gate, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(program, tmp_path, gate.url)
    yield desk
    desk.end()


LONG_ALONE = pytest.mark.long  # not by itself, but run.sh is full


def test_a_book_becomes_one_file_and_its_parts_go(desk: Desk, gate: Gate) -> None:
    """Each text is spoken once; what has no word in it is a pause. No list of processes has the
    key."""
    desk.write("book.md", BOOK)
    with CommandLines() as lines:
        run = desk.launch("book.md", "-o", "o.wav", "--json").wait()
    assert run.status == 0, run.stderr
    told = json.loads(run.stdout)
    assert (told["out"], told["parts"], told["spoken"], told["reused"]) == ("o.wav", 6, 6, 0)
    assert (told["failed"], told["warnings"], told["dollars"]) == ([], [], None)
    assert len(gate.texts) == 6 and len(gate.spoken) == 5
    sound = (desk.folder / "o.wav").read_bytes()
    assert seconds_of(sound) == pytest.approx(told["seconds"], abs=0.1)
    assert sorted(path.name for path in desk.folder.iterdir()) == ["book.md", "o.wav"]
    assert any(b"speak.py" in line for line in lines.seen)
    assert lines.holding(KEY) == [] and KEY not in run.stdout + run.stderr


@LONG_ALONE
def test_an_epub_becomes_an_audiobook(desk: Desk, gate: Gate) -> None:
    """With nested navigation, entities, a note, a page of images; the last page comes first."""
    book = epub({
        "a.xhtml": "<h1>Caf&eacute;</h1><p>Fish &amp; chips.<a epub:type='noteref' href='#n'>1</a>"
                   "</p><aside epub:type='footnote' id='n'><p>Eaten cold.</p></aside>",
        "image.xhtml": "<p><img src='i.jpg' alt=''/></p>",
        "b.xhtml": "<h1>Two</h1><h2 id='w'>Within</h2><p>The end.</p>"},
        nav="<ol><li><a href='a.xhtml'>Caf&#233;</a></li><li><a href='b.xhtml'>Two</a><ol>"
            "<li><a href='b.xhtml#w'>Within</a></li></ol></li></ol>")
    (desk.folder / "book.epub").write_bytes(book)
    run = desk.speak("book.epub", "-o", "o.m4b")
    assert run.status == 0 and "image.xhtml" in run.stderr
    assert {"Café", "Fish & chips.", "Two", "Within", "The end."} <= set(gate.texts)
    assert [text for text in gate.texts if text.endswith("Eaten cold.")] == ["Note 1: Eaten cold."]
    with av.open(str(desk.folder / "o.m4b")) as file:
        assert file.metadata["title"] == "T"
        assert [each["metadata"]["title"] for each in file.chapters()] == ["Café", "Two", "Within"]


def test_without_json_the_answer_is_a_line_and_standard_input_is_read(
        desk: Desk, gate: Gate) -> None:
    desk.write("t.txt", "Hello.")
    with (desk.folder / "t.txt").open() as file:
        run = desk.launch("-", "-o", "o.wav", stdin=file).wait()
    assert (run.status, run.stdout) == (0, f"o.wav: 0:00:0{run.stdout[-12:-11]} of speech\n")
    assert gate.texts == ["Hello."]


@pytest.mark.parametrize("closing", ["", pytest.param("exec <&- >&- 2>&-;", marks=LONG_ALONE)])
def test_readers_that_leave_end_nothing(desk: Desk, closing: str) -> None:
    """Nor does a name in no encoding."""
    name = os.fsdecode(b"caf\xe9")
    desk.write(f"{name}.txt", "Hello.")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [BASH, "-c", f'{closing} exec "$@"', "", desk.program, "speak", f"{name}.txt", "-o",
         f"{name}.m4b", "--url", desk.url], cwd=desk.folder, timeout=60, check=False,
        env={**os.environ, "BARK_API_KEY": KEY}, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 0 and (desk.folder / f"{name}.m4b").exists()


def killed_after(desk: Desk, gate: Gate, count: int, number: int = signal.SIGKILL) -> Run:
    """A run that is ended once it has so many parts, while others are under way."""
    gate.spoil = lambda text, asked: gate.open.clear() if asked == count else None
    run = desk.launch("t.txt", "-o", "o.wav")
    desk.wait_for_parts("o.wav", count)
    wait_until(lambda: gate.at_work, "requests that wait at the gate")
    os.kill(run.process.pid, number)
    run.wait()
    gate.spoil = lambda text, asked: None
    gate.open.set()
    wait_until(lambda: not gate.at_work, "an empty gate")
    return run


def test_what_was_spoken_before_a_kill_is_not_spoken_again(desk: Desk, gate: Gate) -> None:
    """And what comes of it is the same as without one, sample for sample."""
    desk.write("t.txt", TEXT)
    desk.spoken("t.txt", "-o", "calm.wav")
    assert killed_after(desk, gate, 3).status == -signal.SIGKILL
    kept = {path.name: path.read_bytes() for path in desk.parts("o.wav")}
    assert [path for path in (desk.folder / "o.wav.parts").iterdir()
            if KEY.encode() in path.read_bytes()] == []
    gate.bodies.clear()
    told = desk.spoken("t.txt", "-o", "o.wav")
    assert told["reused"] == len(kept) >= 3 and told["spoken"] == 8 - len(kept)
    assert len(gate.bodies) == told["spoken"]
    assert pcm_of(desk.folder / "o.wav") == pcm_of(desk.folder / "calm.wav")


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=LONG_ALONE),
    pytest.param(signal.SIGHUP, 129, marks=LONG_ALONE)])
def test_a_signal_ends_it_with_a_word_on_how_to_go_on(
        desk: Desk, gate: Gate, number: int, status: int) -> None:
    desk.write("t.txt", TEXT)
    run = killed_after(desk, gate, 1, number)
    assert (run.status, run.stdout) == (status, "")
    assert "what is spoken stays, and the same command goes on from there" in run.stderr


@LONG_ALONE
def test_a_changed_paragraph_and_a_broken_part_alone_are_spoken_anew(
        desk: Desk, gate: Gate) -> None:
    desk.write("t.txt", TEXT)
    desk.spoken("t.txt", "-o", "o.wav", "--keep")
    sound = pcm_of(desk.folder / "o.wav")
    whole, *_, last = desk.parts("o.wav")
    whole.write_bytes(whole.read_bytes()[:-100])
    last.write_bytes(last.read_bytes().replace(b'"start": 0.0', b'"start": 0.1'))
    (desk.folder / "o.wav.parts/abc.new").write_bytes(b"half")
    gate.bodies.clear()
    assert desk.spoken("t.txt", "-o", "o.wav", "--keep")["spoken"] == 2 == len(gate.bodies)
    assert pcm_of(desk.folder / "o.wav") == sound
    assert not (desk.folder / "o.wav.parts/abc.new").exists()
    gate.bodies.clear()
    desk.write("t.txt", TEXT.replace("five", "fifteen"))
    told = desk.spoken("t.txt", "-o", "o.wav", "--keep")
    assert gate.texts == ["Paragraph fifteen is here."] and told["reused"] == 7
    assert len(desk.parts("o.wav")) == 8
    assert desk.spoken("t.txt", "-o", "o.wav", "--voice", "v2/en_speaker_1")["reused"] == 0
    assert not (desk.folder / "o.wav.parts").exists()


@pytest.mark.parametrize("answer", [
    (503, {"Retry-After": "1"}, "queue_full"),
    pytest.param((429, {"Retry-After": "1"}, ""), marks=LONG_ALONE)], ids=["503", "429"])
def test_a_worker_that_is_full_is_asked_less_at_once_and_in_the_end_all_is_spoken(
        desk: Desk, gate: Gate, answer: tuple[int, dict[str, str], str]) -> None:
    """It takes two requests at a time."""
    desk.write("t.txt", TEXT)
    gate.spoil = lambda text, count: answer if gate.at_work > 2 else None
    told = desk.spoken("t.txt", "-o", "o.wav")
    assert told["spoken"] == 8 and set(gate.spoken.values()) == {1}
    assert 2 < gate.most_at_work <= 6 and len(gate.bodies) < 24


@LONG_ALONE
def test_what_cannot_be_spoken_is_told_with_its_place_and_tried_again_by_the_same_command(
        desk: Desk, gate: Gate) -> None:
    desk.write("t.txt", TEXT)
    gate.spoil = lambda text, count: (500, {}, "internal_error") if "three" in text else None
    run = desk.speak("t.txt", "-o", "o.wav", "--json")
    assert run.status == 1
    told = json.loads(run.stdout)
    (failed,) = told["failed"]
    assert (failed["line"], failed["chapter"]) == (5, "1") and told["spoken"] == 7
    assert "not spoken, a silence at " in run.stderr and "line 5: " in run.stderr
    assert sum("three" in text for text in gate.texts) == 4
    gate.bodies.clear()
    assert desk.speak("t.txt", "-o", "o.wav", "--again", "0:00").status == 1
    seeds = [body["seeds"] for body in gate.bodies if "seeds" in body]
    assert [list(each) for each in seeds] == [["0"]]  # though one is missing
    gate.spoil = lambda text, count: None
    gate.bodies.clear()
    assert desk.spoken("t.txt", "-o", "o.wav")["reused"] == 7
    assert gate.texts == ["Paragraph three is here."]


@LONG_ALONE
def test_a_text_that_fails_with_one_seed_gets_another(desk: Desk, gate: Gate) -> None:
    desk.write("t.txt", "Hello.")
    refused = (503, {"X-Should-Retry": "false"}, "generation_failed")
    gate.spoil = lambda text, count: refused if count < 3 else None
    desk.spoken("t.txt", "-o", "o.wav")
    assert [body.get("seed") for body in gate.bodies] == [None, 1, 2]


def test_a_connection_that_is_cut_is_made_anew(desk: Desk, gate: Gate) -> None:
    desk.write("t.txt", TEXT)
    gate.spoil = lambda text, count: "cut" if count % 3 == 0 else None
    assert desk.spoken("t.txt", "-o", "o.wav")["spoken"] == 8
    assert set(gate.spoken.values()) == {1}


@LONG_ALONE
def test_it_waits_for_a_worker_that_is_gone_and_goes_on_with_it(
        desk: Desk, gate: Gate, toy_worker: Worker) -> None:
    desk.write("t.txt", TEXT)
    gate.spoil = lambda text, count: setattr(gate, "target", "http://127.0.0.1:9") \
        if count == 3 else None
    run = desk.launch("t.txt", "-o", "o.wav", "--json")
    wait_until(lambda: "waiting for the worker" in run.stderr, "a word of it")
    gate.spoil = lambda text, count: None
    gate.target = toy_worker.url
    assert run.wait().status == 0 and json.loads(run.stdout)["spoken"] == 8
    assert set(gate.spoken.values()) == {1}


def test_it_gives_up_after_the_time_to_wait(desk: Desk) -> None:
    desk.write("t.txt", TEXT)
    run = desk.speak("t.txt", "-o", "o.wav", "--wait", "0", url="http://127.0.0.1:9")
    assert run.status == 6 and "no worker was ready within 0 minutes (--wait)" in run.stderr


@LONG_ALONE
def test_where_all_is_spoken_the_whole_is_made_without_a_worker(desk: Desk) -> None:
    desk.write("t.txt", TEXT)
    desk.spoken("t.txt", "-o", "o.wav", "--keep")
    sound = (desk.folder / "o.wav").read_bytes()
    (desk.folder / "o.wav").unlink()
    other = desk.speak("t.txt", "-o", "o.wav", "--voice", "v2/en_speaker_1", "--wait", "0",
                       url="http://127.0.0.1:9")
    assert other.status == 6 and "no worker was ready" in other.stderr
    assert desk.spoken("t.txt", "-o", "o.wav", url="http://127.0.0.1:9")["spoken"] == 0
    assert (desk.folder / "o.wav").read_bytes() == sound


def test_a_second_speak_on_the_same_output_says_so(desk: Desk, gate: Gate) -> None:
    desk.write("t.txt", TEXT)
    gate.open.clear()
    first = desk.launch("t.txt", "-o", "o.wav")
    wait_until(lambda: gate.at_work, "a first request")
    second = desk.speak("t.txt", "-o", "o.wav")
    assert (second.status, second.stdout) == (1, "")
    assert "another speak is at work on this output" in second.stderr
    gate.open.set()
    assert first.wait().status == 0


# Again


LONG = " ".join(f"Sentence {number} stands here, and it has some words." for number in range(8))


def kept(path: Path) -> tuple[list[dict[str, Any]], bytes]:
    """A part's segments and samples."""
    _, told, pcm = path.read_bytes().split(b"\n", 2)
    return json.loads(told)["segments"], pcm


@LONG_ALONE
def test_one_sentence_is_made_anew_and_the_others_stay_sample_for_sample(
        desk: Desk, gate: Gate) -> None:
    desk.write("t.txt", LONG)
    desk.spoken("t.txt", "-o", "o.wav", "--keep")
    before = (desk.folder / "o.wav").read_bytes()
    segments, old = kept(desk.parts("o.wav")[0])
    assert len(segments) > 2
    start, end = (round(24_000 * segments[1][edge]) for edge in ("start", "end"))
    run = desk.speak("t.txt", "-o", "o.wav", "--again", str(segments[1]["start"] + 0.1))
    assert run.status == 0 and f"again: {segments[1]['text']}\n" in run.stderr
    assert gate.texts == [LONG, LONG] and list(gate.bodies[1]["seeds"]) == ["1"]
    _, new = kept(desk.parts("o.wav")[0])
    assert new[: 2 * start] == old[: 2 * start] and new.endswith(old[2 * end :])
    assert new[2 * start :] != old[2 * start :]
    after = (desk.folder / "o.wav").read_bytes()
    assert after != before
    assert desk.spoken("t.txt", "-o", "o.wav")["reused"] == 1  # as it is now
    assert (desk.folder / "o.wav").read_bytes() == after


def test_again_says_what_it_lacks(desk: Desk) -> None:
    def again(at: str) -> str:
        run = desk.speak("t.txt", "-o", "o.wav", "--again", at)
        assert run.status == 2
        return run.stderr
    desk.write("t.txt", "Hello.")
    desk.spoken("t.txt", "-o", "o.wav")
    assert "the parts of o.wav are not there" in again("0:00")
    (desk.folder / "o.wav").unlink()
    desk.spoken("t.txt", "-o", "o.wav", "--keep")
    assert "no sentence is heard at 9:00:00; o.wav has 0:00:" in again("9:00:00")
    desk.write("t.txt", "Hello. More.")
    assert "the parts of o.wav are not there" in again("0:00")


# Wrong use, and secrets


@pytest.mark.parametrize(("words", "said"), [
    ("t.txt", "speak needs a file to make: -o OUT"), ("-o o.wav", "speak takes one FILE"),
    ("t.txt u.txt -o o.wav", "speak takes one FILE"),
    ("t.txt -o o.wav --speed 2", "speak knows no '--speed'")])
def test_words_that_speak_does_not_know_are_refused(desk: Desk, words: str, said: str) -> None:
    run = desk.launch(*words.split()).wait()
    assert (run.status, run.stdout) == (2, "") and said in run.stderr


@pytest.mark.parametrize(("words", "said"), [
    ("no.txt -o o.wav", "no.txt cannot be read: No such file"), ("t.txt -o o.ogg", ".m4b"),
    ("stars.txt -o o.wav", "stars.txt has no text to speak"), ("t.txt -o no/o.wav", "no"),
    ("t.txt -o there.wav", "there.wav is there already"),
    ("t.txt -o o.wav --voice nobody", "--voice is 'nobody'; ")])
def test_what_is_wrong_is_said_before_anything_is_asked(
        desk: Desk, gate: Gate, words: str, said: str) -> None:
    desk.write("t.txt", "Hello.")
    desk.write("stars.txt", "***\n\n...")
    desk.write("there.wav", "")
    run = desk.speak(*words.split())
    assert (run.status, run.stdout) == (2, "") and said in run.stderr
    assert gate.bodies == [] and not (desk.folder / "o.wav").exists()
    assert not list(desk.folder.glob("*.parts"))


def test_a_wrong_key_is_said_at_once(desk: Desk) -> None:
    desk.write("t.txt", "Hello.")
    run = desk.speak("t.txt", "-o", "o.wav", BARK_API_KEY="wrong")
    assert run.status == 3 and "(BARK_API_KEY)" in run.stderr
    assert not (desk.folder / "o.wav.parts").exists()
