"""The listener: words compared, ears that hang, die, talk nonsense or are slow, and what then
becomes of the speech. Stand-ins answer here; test_recordings has the recogniser itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import BUILTIN, LISTENER, load_module, running_worker, wait_until
from listening import model_folder
from test_takes import RATE, SECONDS, judged, speech

SAMPLES = np.zeros(16_000, np.float32)
GOOD = '{"heard": "a word", "wrong": 0, "of": 2, "words": [["a", 0.1, 0.2], ["word", 0.2, 0.5]]}'
EAR = """\
import json, os, sys, time
def tell(line): print(line, flush=True)
def ask():
    question = json.loads(sys.stdin.buffer.readline() or sys.exit())
    sys.stdin.buffer.read(4 * question["samples"])
    return question
tell('{"ready": true}')
"""
ANSWERS = EAR + f"while ask(): tell('{GOOD}')"


@pytest.fixture(scope="module")
def listener() -> ModuleType:
    return load_module(LISTENER)


@pytest.fixture
def ears(listener: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes listeners of stand-ins for the process, given as programs."""
    made: list[Any] = []
    monkeypatch.setattr(listener, "LEAST_SECONDS", 1.0)
    monkeypatch.setattr(listener, "SECONDS_EACH", 0.0)

    def make(program: str, ears: int = 1) -> Any:
        made.append(listener.Listener("", ears, 1, [sys.executable, "-c", program]))
        return made[-1]

    yield make
    for each in made:
        each.close()


def hear(each: Any, since: float | None = None) -> Any:
    return each.hear(SAMPLES, "en", "A word.", time.monotonic() if since is None else since)


# Words

@pytest.mark.parametrize(("language", "text", "heard"), [
    ("en", "Colour-blind, isn't he? [laughs]", "color blind isn't he"),
    ("en", "It’s twenty-one degrees.", "It's 21 degrees."),
    ("en", "THE END", "The end."), ("en", "every day", "Everyday."),
    ("de", "Er hat einundzwanzig Katzen.", "Er hat 21 Katzen."),
    ("fr", "J'ai vingt et un ans.", "J’ai 21 ans"), ("es", "Tengo treinta y dos.", "Tengo 32"),
    ("it", "Ho trentadue anni", "Ho 32 anni!"), ("pt", "Tenho trinta e dois", "Tenho 32."),
    ("ru", "Ещё раз.", "еще раз"), ("pl", "Łódź, tak.", "łódź tak"),
    ("zh", "三十二个人。", "32个人"), ("ja", "こんにちは、世界。", "こんにちは 世界"),
    ("ko", "안녕하세요 여러분", "안녕 하세요 여러분"), ("hi", "नमस्ते!", "नमस्ते")])
def test_words_are_compared_as_they_are_heard(listener: ModuleType, language: str, text: str,
                                              heard: str) -> None:
    wanted = listener.units(text, language)
    assert wanted and listener.differences(wanted, listener.units(heard, language)) == 0


@pytest.mark.parametrize(("heard", "wrong"), [
    ("the boat is here", 0), ("the boat", 2), ("the boat is here the boat is here", 4),
    ("a boat is near", 2), ("", 4)])
def test_words_left_out_put_in_and_changed_are_counted(listener: ModuleType, heard: str,
                                                       wrong: int) -> None:
    assert listener.differences(["the", "boat", "is", "here"], heard.split()) == wrong


@pytest.mark.parametrize(("wrong", "of", "differs"), [
    (1, 1, False), (2, 2, False), (3, 2, True), (3, 1, True), (1, 3, False), (2, 3, True),
    (3, 10, False), (4, 10, True)])
def test_one_or_two_words_are_judged_leniently(listener: ModuleType, wrong: int, of: int,
                                               differs: bool) -> None:
    assert listener.Heard("", wrong, of).differs(0.35) is differs


# Ears

def test_an_ear_answers_and_is_used_again(ears: Callable[..., Any], listener: ModuleType) -> None:
    each = ears(ANSWERS)
    assert hear(each) == hear(each) == listener.Heard(
        "a word", 0, 2, (listener.Word("a", 0.1, 0.2), listener.Word("word", 0.2, 0.5)))
    assert each.status == "listening"


@pytest.mark.parametrize(("program", "trouble"), [
    (EAR + "ask(); time.sleep(60)", "gave no answer in 1 s"),
    (EAR + "time.sleep(60)", "gave no answer in 1 s"),  # nor reads the question
    (EAR + "ask(); os._exit(1)", "died"), (EAR + "ask(); tell('[1]')", "nonsense"),
    (EAR + "ask(); tell('{')", "nonsense"), (EAR + "ask(); tell('{}')", "nonsense"),
    (EAR + "ask(); tell(\"\"\"" + GOOD.replace("0.1", '"x"') + "\"\"\")", "nonsense"),
    ("print('{\"error\": \"no model\"}')", "does not start: no model"),
    ("print('{}', flush=True); import time; time.sleep(60)", "does not start: it talks nonsense"),
    ("import sys; sys.exit(1)", "died")])
def test_an_ear_that_hangs_dies_or_talks_nonsense_is_ended_and_all_rest(
        ears: Callable[..., Any], listener: ModuleType, program: str, trouble: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    each, before = ears(program), psutil.Process().children()
    with pytest.raises(listener.Unheard, match=trouble):
        hear(each)
    assert set(psutil.Process().children()) <= set(before)
    assert each.status.startswith("resting: ") and trouble in each.status
    monkeypatch.setattr(each, "_start", lambda: pytest.fail("it rests"))
    with pytest.raises(listener.Unheard, match=trouble):
        hear(each)


def test_after_its_rest_it_hears_again(ears: Callable[..., Any], listener: ModuleType,
                                       monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(listener, "REST_SECONDS", 0.0)
    once = f"once = {str(tmp_path / 'once')!r}\n"
    each = ears(once + EAR + "if not os.path.exists(once): open(once, 'w'); os._exit(1)\n"
                + f"while ask(): tell('{GOOD}')")
    with pytest.raises(listener.Unheard):
        hear(each)
    assert hear(each).text == "a word" and each.status == "listening"


def test_what_it_cannot_hear_is_told_and_no_failure(ears: Callable[..., Any],
                                                    listener: ModuleType) -> None:
    each = ears(EAR + "while ask(): tell('{\"error\": \"it knows English alone\"}')")
    for _ in range(2):
        with pytest.raises(listener.Unheard, match="English alone"):
            hear(each)
        assert each.status == "listening"


def test_a_take_that_waits_too_long_is_passed_unheard(ears: Callable[..., Any],
                                                      listener: ModuleType) -> None:
    each = ears(EAR + "ask(); time.sleep(60)")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(hear, each)
        wait_until(each._ears.empty, "an ear at work")
        with pytest.raises(listener.Unheard, match="no time for it"):
            hear(each, time.monotonic() - listener.PATIENCE)
        assert isinstance(first.exception(), listener.Unheard)


def test_two_ears_hear_side_by_side(ears: Callable[..., Any], tmp_path: Path) -> None:
    """Each answers only when the other has been asked too."""
    meet = (f"place = {str(tmp_path)!r}\n" + EAR + "ask(); open(f'{place}/{os.getpid()}', 'w')\n"
            "while len(os.listdir(place)) < 2: time.sleep(0.01)\n" + f"tell('{GOOD}')")
    each = ears(meet, ears=2)
    with ThreadPoolExecutor(2) as pool:
        assert [one.text for one in pool.map(hear, [each, each])] == ["a word"] * 2


def test_ears_end_with_their_listener(ears: Callable[..., Any]) -> None:
    each = ears(ANSWERS)
    hear(each)
    process = each._ears.queue[0]
    each.close()
    assert process.returncode is not None


def test_half_of_the_cores_listen_and_four_ears_at_most(listener: ModuleType) -> None:
    def made(cores: int) -> tuple[int, str]:
        each = listener.Listener.for_cores("model", cores)
        return each._ears.qsize(), each._command[-1]

    assert [made(cores) for cores in (1, 2, 4, 8, 32)] == [
        (1, "1"), (1, "1"), (2, "1"), (4, "1"), (4, "4")]


# What becomes of a take

def heard(listener: ModuleType, wrong: int, of: int) -> Any:
    return listener.Heard("words", wrong, of)


def verdict(bark: ModuleType, hearing: Any) -> Any:
    return bark.judge(speech(), RATE, bark.Wanted(SECONDS, "Words."), hearing, 0.35)


def test_a_take_with_many_words_wrong_is_bad_and_the_more_the_worse(
        bark: ModuleType, listener: ModuleType) -> None:
    few, some, many = (verdict(bark, bark.Hearing(heard=heard(listener, wrong, 10)))
                       for wrong in (3, 5, 9))
    assert few.faults == () and [fault.message for fault in some.faults] == ["5 words wrong of 10"]
    assert few.badness < some.badness < many.badness
    assert judged(bark, speech(1.2)).badness < many.badness < judged(bark, speech(0.0)).badness


def test_a_take_that_could_not_be_heard_passes_with_a_warning(bark: ModuleType) -> None:
    found = verdict(bark, bark.Hearing(unheard="the listener died"))
    assert found.faults == () and found.warnings == ("not heard: the listener died",)
    trial = bark.Trial(None, bark.Wanted(SECONDS), RATE)
    trial.segment = bark.Segment([1], object(), 7, *[bark.Sampling(0.7)] * 3)
    assert trial.add(speech(), found, 2).takes == 1


def test_a_judge_waits_until_its_listener_is_awake_or_rests(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch, ears: Callable[..., Any],
        caplog: pytest.LogCaptureFixture) -> None:
    for program, status in ((ANSWERS, "listening"), ("", "resting: the listener died")):
        judge, each = bark.Judge(0.35), ears(program)
        companion = SimpleNamespace(Listener=SimpleNamespace(for_cores=lambda *_, each=each: each))
        monkeypatch.setattr(bark, "load_companion", lambda companion=companion: companion)
        judge.listen(Path("model"))
        judge.wait_awake()
        assert judge.listener.startswith(status)
        assert (each._ears.queue[0] is not None) is (status == "listening")
    assert caplog.text.count("words are not heard: the listener died") == 1


def test_a_judge_whose_listener_breaks_judges_on(
        bark: ModuleType, ears: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    judge = bark.Judge(0.35)
    judge._listener = ears(EAR + "ask(); os._exit(1)")
    for samples, faults in ((speech(), ()), (0 * speech(), ("silent",))):
        found = judge.submit(samples, RATE, bark.Wanted(SECONDS)).result()
        assert found.warnings == (*faults, "not heard: the listener died or answered nonsense")
    assert judge.listener.startswith("resting: ")
    assert caplog.text.count("a take was not heard: the listener died") == 1


def test_the_program_without_a_model_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, LISTENER, tmp_path, "1"], stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=60, check=False)
    assert done.returncode == 1 and json.loads(done.stdout).keys() == {"error"}


# The whole worker, with the recogniser itself

@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_worker_that_listens_tells_what_it_heard_and_leaves_no_ear_behind() -> None:
    text = "The old boat is in the harbor. They had no light, and the river was cold."
    with running_worker(BARK_MODEL=str(BUILTIN), BARK_LISTEN=str(model_folder()),
                        BARK_QUALITY="on") as worker:
        worker.wait_for("ready")
        reply = worker.speak(text, words=True).json
        assert worker.health()["listener"] == "listening"
        ears = psutil.Process(worker.process.pid).children()
        assert len(ears) >= 1
        worker.stop()
    psutil.wait_procs(ears, timeout=30)
    assert not any(ear.is_running() for ear in ears)
    for segment in reply["segments"]:
        assert segment["heard"] and 0 <= segment["word_errors"] <= 0.35
        assert segment["timing"] == "heard" and segment["warnings"] == []
    told = [word for segment in reply["segments"] for word in segment["words"]]
    assert [text[word["from"] : word["to"]] for word in told] == re.findall(r"\w+", text)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_speech_goes_on_when_every_ear_is_killed() -> None:
    with running_worker(BARK_MODEL=str(BUILTIN), BARK_LISTEN=str(model_folder()), BARK_QUALITY="on",
                        BARK_CACHE_MB="0") as worker:
        worker.wait_for("ready")
        assert worker.speak("The old boat is in the harbor.").json["segments"][0]["heard"]
        for ear in psutil.Process(worker.process.pid).children():
            ear.suspend()  # hangs: it is ended after 10 s and two for each second of the take
        (segment,) = worker.call("/synthesize", {"text": "They had no light."}, timeout=60
                                 ).json["segments"]
        assert segment["warnings"] == ["not heard: the listener gave no answer in"
                                       f" {segment['warnings'][0].split()[-2]} s"]
        assert worker.health()["listener"].startswith("resting: ")
        (segment,) = worker.speak("They had no light at all.").json["segments"]
        assert segment["warnings"][0].startswith("not heard") and "heard" not in segment
