"""The page to listen on: what its file may hold, and a walk through it in a real Chromium."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import subprocess
import wave
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser as driven
import numpy as np
import pytest
from browser import Browser, chromium
from conftest import BUILTIN, ROOT, Worker, clean_environment, running_worker, wait_until
from fake_hub import FakeHub
from manager import sourcing

PAGE = ROOT / "page.html"
AXE = ROOT / ".venv" / "axe-core" / "axe.min.js"
RATE = 24_000
LIMIT = 200  # characters in a request to the worker of these tests
# Each sentence is a segment of its own: two of them are too much for one.
SHORT = ("The sea is calm tonight, and so is she. A small boat comes in from the north. "
         "Somebody on the shore waves to it.")
LONG = "\n\n".join(f"In chapter {n} the road went on for them. Nobody spoke a word of the old mill."
                   for n in ("one", "two", "three", "four", "five"))
SIZES = {"wide": (1280, 800), "narrow": (390, 844)}
in_browser = pytest.mark.skipif(driven.is_missing(), reason=f"no Chromium; {driven.APT}")


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(PAGE.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_short_and_has_one_script_and_one_style() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    tags = [tag for tag, _ in Elements().found]
    assert len(lines) <= 700 and max(map(len, lines)) <= 100
    assert (tags.count("script"), tags.count("style")) == (1, 1)


def test_the_page_has_nothing_that_its_policy_would_refuse() -> None:
    for tag, attributes in Elements().found:
        for name, value in attributes.items():
            assert name != "style" and not name.startswith("on"), (tag, name)
            assert name not in ("href", "src", "action") or value == "data:,", (tag, name, value)


def test_the_page_names_no_other_place_and_makes_no_html_of_text() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"https?:|wss?:|[\"'(]//|@import|url\(", text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(",
                          text)
    assert not re.findall(r"(?:fetch|ask|get)\([\"'`]/", text), "a prefix of a proxy is kept"


@pytest.fixture(scope="module")
def served() -> Iterator[Worker]:
    with running_worker(BARK_MODEL=str(BUILTIN), TTS_MAX_LENGTH=str(LIMIT)) as worker:
        worker.wait_for("ready")
        yield worker


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(shared_browser: Browser) -> Iterator[Browser]:
    """A browser that must not complain: of an error, or of what the page's policy forbids."""
    shared_browser.look(*SIZES["wide"])
    shared_browser.complaints()
    yield shared_browser
    complaints = shared_browser.complaints()
    shared_browser.open("about:blank")
    assert not [line for line in complaints if "the server responded with a status" not in line
                and "ERR_CONNECTION" not in line and "ERR_INCOMPLETE" not in line]


# Keeps what goes to the sound card, and when, on the card's clock.
LISTEN = """
window.heard = [];
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (at) {
  const pcm = Int16Array.from(this.buffer.getChannelData(0),  // as Chromium makes them float
                              x => Math.round(x * (x < 0 ? 32768 : 32767)));
  let bytes = '';
  for (const byte of new Uint8Array(pcm.buffer)) bytes += String.fromCharCode(byte);
  window.heard.push({at, pcm: btoa(bytes)});
  return start.call(this, at);
};
"""
CURRENT = "[...document.querySelectorAll('.seg')].findIndex(s => s.ariaCurrent)"


def visit(page: Browser, worker: Worker, text: str = "") -> None:
    page.open(worker.url)
    page.run(LISTEN)
    page.until("$('voice').length > 0")
    if text:
        page.type(text, over="#text")


def heard(page: Browser) -> list[tuple[float, np.ndarray]]:
    """When each piece begins, in seconds, and its samples, int16."""
    return [(piece["at"], np.frombuffer(base64.b64decode(piece["pcm"]), "<i2"))
            for piece in page.run("return heard")]


def listen_to_the_end(page: Browser) -> None:
    page.until("mode === 'stop' && run.complete", seconds=90)


def download(page: Browser, kind: str) -> bytes:
    file = page.downloads / f"bark.{kind}"
    file.unlink(missing_ok=True)
    page.click(f"#{kind}")
    wait_until(lambda: file.exists() and not page.run("return run.busy"), f"bark.{kind}")
    return file.read_bytes()


def wav_samples(data: bytes) -> np.ndarray:
    with wave.open(io.BytesIO(data)) as sound:
        assert (sound.getframerate(), sound.getnchannels()) == (RATE, 1)
        return np.frombuffer(sound.readframes(sound.getnframes()), "<i2")


def assert_is_what_was_heard(data: bytes, pieces: list[np.ndarray],
                             gaps: list[float]) -> None:
    """Every piece, each after its gap in seconds, and nothing else but silence."""
    samples, at = wav_samples(data), 0
    for piece, gap in zip(pieces, gaps, strict=True):
        lead = round(gap * RATE)
        assert not samples[at:at + lead].any()
        at += lead
        found = next((n for n in (at, at - 1, at + 1)  # `start` is told in tenths of ms
                      if np.array_equal(samples[n:n + len(piece)], piece)), None)
        assert found is not None, f"at {at} of {len(samples)} the file has something else"
        at = found + len(piece)
    assert at == len(samples)


@pytest.mark.long
@in_browser
def test_what_is_typed_is_heard_without_gaps_and_lights_up_as_it_is_heard(
        page: Browser, served: Worker) -> None:
    visit(page, served, SHORT)
    page.run("""window.lit = []; new MutationObserver(() => {
        const now = document.querySelector('.seg .now');
        const piece = player.pieces.findLast(p => p.at <= context.currentTime);
        if (now && piece) lit.push([now.textContent, now.closest('.seg').seg.place,
                                    piece.seg.place]);
      }).observe($('reader'), {subtree: true, attributes: true, attributeFilter: ['class']});""")
    page.run("$('voice').value = 'female'; $('voice').onchange();")
    page.click("#go")
    listen_to_the_end(page)
    lit = page.run("return lit")
    words = [word for n, (word, *_) in enumerate(lit) if not n or lit[n - 1][0] != word]
    spoken = re.findall(r"\w+", SHORT)
    left = iter(spoken)
    assert all(word in left for word in words), "in the text's order"
    assert len(words) > 0.7 * len(spoken)  # short ones may fall between two frames
    assert np.mean([shown == sounds for _, shown, sounds in lit]) > 0.9
    pieces, segs = heard(page), page.run("return run.segs.map(s => [s.gap, s.line.start])")
    assert len(pieces) == len(segs) == 3
    for (at, _), (_, start) in zip(pieces, segs, strict=True):
        assert at - pieces[0][0] == pytest.approx(start, abs=0.002), "no gap, no overlap"
    assert re.search(r"first sound [\d.]+ s · real-time factor [\d.]+", page.run(
        "return $('figures').textContent"))
    gaps = [gap for gap, _ in segs]
    assert_is_what_was_heard(download(page, "wav"), [pcm for _, pcm in pieces], gaps)
    assert len(download(page, "mp3")) > 8000


@pytest.mark.long
@in_browser
def test_a_sentence_is_jumped_to_and_made_again_and_stays_so_in_the_download(
        page: Browser, served: Worker) -> None:
    visit(page, served, SHORT)
    page.click("#go")
    listen_to_the_end(page)
    first = [pcm for _, pcm in heard(page)]
    page.run("heard.length = 0")
    page.click(".seg:nth-of-type(5)")  # each is followed by a place for its notes
    page.until(f"{CURRENT} === 2")
    listen_to_the_end(page)
    [(_, jumped)] = heard(page)
    assert np.array_equal(jumped, first[2]), "the last sentence alone, as it was"
    page.run("heard.length = 0; select(run.segs[1])")
    page.click("#again")
    page.until("heard.length === 2 && mode === 'stop'")
    second, third = (pcm for _, pcm in heard(page))
    assert not np.array_equal(second, first[1]) and np.array_equal(third, first[2])
    gaps = page.run("return run.segs.map(s => s.gap)")
    assert_is_what_was_heard(download(page, "wav"), [first[0], second, third], gaps)


@pytest.mark.long
@in_browser
def test_pause_holds_the_sound_and_stop_ends_the_work(page: Browser, served: Worker) -> None:
    visit(page, served, LONG)
    page.click("#go")
    page.until("document.querySelector('.seg .now')")
    page.click("#go")
    page.until("context.state === 'suspended'")
    at = page.run("return context.currentTime")
    assert page.run("return $('go').textContent") == "Go on"
    page.click("#go")
    page.until("context.currentTime > args[0]", at)
    page.click("#stop")
    assert page.run("return [mode, player.pieces.length, run.complete]")[:2] == ["stop", 0]
    wait_until(lambda: served.health()["queue"]["running"] == 0, "idle worker")


@pytest.mark.long
@in_browser
def test_a_long_text_goes_a_paragraph_at_a_time_one_ahead_and_is_joined(
        page: Browser, served: Worker) -> None:
    visit(page, served, LONG)
    assert "paragraph by paragraph" in page.run("return $('about').textContent")
    page.click("#go")
    made = "run.parts.filter(part => part.segs.length).length - 1"
    page.until("run.parts[1].segs.length")
    for _ in range(100):
        ahead = page.run(f"return {made} - (run.segs[player.now]?.part.n || 0)")
        assert ahead <= 1
    assert page.run("return run.complete") is None, "or there was nothing to hold back"
    while not page.run("return run.complete"):  # as somebody who skips to the end
        page.run("if (mode === 'play' && player.now < run.segs.length - 1) "
                 "play(run.segs.length - 1)")
    page.click("#stop")
    page.run("heard.length = 0; play(0)")
    page.until("heard.length >= 4")
    parts = [pcm for _, pcm in heard(page)]
    samples = wav_samples(download(page, "wav"))
    assert len(samples) / RATE == pytest.approx(page.run("return length(run.segs)"), abs=0.01)
    assert np.array_equal(samples[:len(parts[0])], parts[0])
    mp3 = page.run("return context.decodeAudioData(await (await download(run, 'mp3'))"
                   ".arrayBuffer()).then(sound => sound.duration)")
    assert 0 <= mp3 - len(samples) / RATE < 13 * 0.08, "five parts, eight pauses, in whole frames"
    page.click("#stop")


@pytest.mark.long
@in_browser
def test_a_page_that_is_hidden_speaks_to_the_end(page: Browser, served: Worker) -> None:
    visit(page, served, LONG)
    page.run("window.requestAnimationFrame = () => 0; $('speed').value = 2")  # none while hidden
    page.click("#go")
    listen_to_the_end(page)
    assert len(heard(page)) == page.run("return run.segs.length") == 10


@pytest.mark.long
@in_browser
def test_the_key_is_asked_for_only_where_it_is_wanted_and_stays_in_the_tab(
        page: Browser) -> None:
    with running_worker(BARK_MODEL=str(BUILTIN), BARK_API_KEY="right-key") as worker:
        worker.wait_for("ready")
        visit(page, worker, "Good evening.")
        assert page.run("return $('keyform').hidden")
        page.click("#go")
        page.until("document.activeElement === $('key')")
        page.type("wrong-key")
        page.press("enter")
        page.until("/not the worker’s key/.test($('notice').textContent) && !$('keyform').hidden")
        page.type("right-key")
        page.press("enter")
        listen_to_the_end(page)
        assert heard(page) and page.run("return $('keyform').hidden")
        assert page.run("return [$('key').value, sessionStorage.getItem('bark-key')]") == [
            "", "right-key"]
        where = page.run("return location.href + document.cookie + JSON.stringify(localStorage) + "
                         "performance.getEntries().map(e => e.name).join()")
        assert "right-key" not in where and "wrong-key" not in where
        assert len(download(page, "wav")) > 8000, "with the key, too"


@pytest.fixture(scope="module")
def own_voices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker with a key and presets of one's own, which keeps its samples in a folder of ours."""
    home = tmp_path_factory.mktemp("home")
    table = json.loads((BUILTIN / "speaker_embeddings_path.json").read_text())["v2/en_speaker_9"]
    np.savez(home / "Zuleika.npz", **{name: np.load(BUILTIN / at) for name, at in table.items()})
    with running_worker(BARK_MODEL=str(BUILTIN), BARK_API_KEY="right-key", HF_HOME=str(home),
                        BARK_VOICES_DIR=str(home)) as worker:
        worker.wait_for("ready")
        yield worker


def groups(page: Browser) -> dict[str, list[str]]:
    """What can be chosen, by the groups' labels."""
    return dict(page.run("return [...$('voice').children].map(group => [group.label, "
                         "[...group.children].map(option => option.text)])"))


@pytest.mark.long
@in_browser
def test_a_voice_is_heard_before_it_is_chosen_and_ones_own_show_with_the_key(
        page: Browser, own_voices: Worker) -> None:
    visit(page, own_voices, SHORT)
    assert "Your own" not in groups(page)
    page.run("$('voice').value = 'female'; $('hear').focus()")
    page.press("enter")
    page.until("document.activeElement === $('key')")
    page.type("right-key")
    page.press("enter")
    page.until("$('hear').textContent === 'Stop'")
    assert page.run("return [document.activeElement.id, $('voice').value, mode]") == [
        "hear", "female", "edit"], "back where the person was"
    page.until("$('hear').textContent === 'Hear it'")
    [(_, sample)] = heard(page)
    assert np.abs(sample).max() > 1000 and len(sample) > RATE
    assert groups(page)["Your own"] == ["Zuleika: English"]
    page.run("$('voice').value = 'Zuleika'; $('voice').onchange(); heard.length = 0")
    page.click("#hear")
    page.until("$('hear').textContent === 'Stop'")
    page.press("escape")
    assert page.run("return $('hear').textContent") == "Hear it"
    page.click("#go")
    page.until("heard.length > 1")
    assert page.run("return run.fields.voice") == "Zuleika"
    page.click("#hear")
    page.until("$('hear').textContent === 'Stop'")
    assert page.run("return [mode, player.pieces.length]") == ["stop", 0], "one sound at a time"
    page.click("#hear")
    assert page.run("return [$('hear').textContent, $('notice').textContent]") == ["Hear it", ""]
    where = page.run("return performance.getEntries().map(e => e.name).join()")
    assert "/sample" in where and "right-key" not in where
    page.run("sessionStorage.clear()")


@pytest.mark.long
@in_browser
def test_a_sample_that_nobody_waits_for_is_given_up(page: Browser, own_voices: Worker) -> None:
    page.open(own_voices.url)
    page.run("sessionStorage.setItem('bark-key', 'right-key')")
    visit(page, own_voices, LONG)
    page.run("$('voice').value = 'v2/en_speaker_1'; $('voice').onchange()")
    page.click("#hear")
    assert page.run("return $('hear').textContent") == "Coming …"
    page.click("#hear")
    assert page.run("return $('hear').textContent") == "Hear it"
    wait_until(lambda: sum(own_voices.health()["queue"].values()) == 32, "idle worker")
    assert page.run("return heard.length") == 0
    page.run("sessionStorage.clear()")


# What Firefox leaves in a page that is loaded again, before its script runs.
OLD_FIELDS = """
new MutationObserver((changes, observer) => {
  const $ = id => document.getElementById(id);
  if (!$('say')) return;
  observer.disconnect();
  for (const id of ['stop', 'edit', 'mp3', 'wav']) $(id).disabled = false;
  $('text').value = 'What was typed.';
  $('speed').value = 1.5;
  $('take').value = 'mine';
}).observe(document, {childList: true, subtree: true});
"""


@pytest.mark.long
@in_browser
def test_a_page_that_is_loaded_again_with_its_old_fields_is_of_one_piece(
        page: Browser, served: Worker) -> None:
    planted = page.cdp("Page.addScriptToEvaluateOnNewDocument", source=OLD_FIELDS)["identifier"]
    visit(page, served)
    page.cdp("Page.removeScriptToEvaluateOnNewDocument", identifier=planted)
    assert page.run("return ['stop', 'edit', 'mp3', 'wav'].map(id => $(id).disabled)") == [True] * 4
    assert page.run("return [$('text').value, $('speedout').value, $('seedbox').hidden]") == [
        "What was typed.", "1.5×", False]


@pytest.mark.long
@in_browser
def test_the_file_of_open_hands_the_key_over_and_leaves_it_in_no_address(
        page: Browser, tmp_path: Path) -> None:
    key, file = "right-key'\"</script>&%", tmp_path / "bark-worker.html"
    with running_worker(BARK_MODEL=str(BUILTIN), BARK_API_KEY=key) as worker:
        worker.wait_for("ready")
        row = json.dumps({"key": key})
        subprocess.run(sourcing('row="$1"; write_handover "$2" "$3"', row, f"{worker.url}/",
                                str(file)), check=True, env=clean_environment())
        page.open(file.as_uri())
        page.click("button")
        wait_until(lambda: len(page.ask("GET", "/window/handles")) == 2, "the page")
        first, second = page.ask("GET", "/window/handles")
        page.ask("POST", "/window", {"handle": second})
        page.until("sessionStorage.getItem('bark-key') === args[0]", key)
        assert page.run("return location.href") == f"{worker.url}/"
        page.until("$('voice').length > 0")
        page.type("Good evening.", over="#text")
        page.click("#go")
        listen_to_the_end(page)
        assert page.run("return $('keyform').hidden")
        page.ask("DELETE", "/window")
        page.ask("POST", "/window", {"handle": first})


@pytest.mark.long
@in_browser
def test_it_waits_for_a_worker_that_still_fetches_its_model(
        page: Browser, tmp_path: Path) -> None:
    with FakeHub({"suno/bark-like": BUILTIN}) as hub:
        go_on = hub.hold("model.safetensors", 1000)
        with running_worker(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="",
                            HF_HUB_DISABLE_TELEMETRY="1", BARK_MODEL="suno/bark-like") as worker:
            worker.wait_for("downloading")
            page.open(worker.url)
            page.run(LISTEN)
            page.until("/^Downloading the model: .* GB/.test($('state').textContent)")
            assert page.run("return [$('loaded').hidden, $('loaded').max > 1e6]") == [False, True]
            page.click("#go")
            page.until("/Then it is spoken/.test($('notice').textContent)")
            go_on.set()
            page.until("heard.length > 0", seconds=60)
            assert page.run("return $('notice').textContent") == ""


@pytest.mark.long
@in_browser
def test_a_worker_that_dies_in_the_middle_is_waited_for(page: Browser) -> None:
    settings = {"BARK_MODEL": str(BUILTIN), "TTS_MAX_LENGTH": str(LIMIT)}
    with running_worker(**settings) as worker:
        worker.wait_for("ready")
        visit(page, worker, LONG)
        page.click("#go")
        page.until("run.segs.length === 2")  # in the middle of a request
        worker.stop(signal.SIGKILL)
        page.until("/^No answer/.test($('notice').textContent)")
        port = str(worker.port)
    with running_worker(**settings, PORT=port):
        page.until("run.parts[1].done && !$('notice').textContent", seconds=90)
        page.until("player.now >= 2", seconds=60)
        shown = page.run("return $('reader').textContent")
        assert shown == LONG
        page.click("#stop")


@pytest.mark.long
@in_browser
def test_a_hostile_text_stays_text_and_nothing_else_is_asked(
        page: Browser, served: Worker) -> None:
    text = "Hello <img src=x onerror=alert(1)> you & <b>me</b>.\n<script>alert(2)</script> Bye."
    visit(page, served, text)
    page.click("#go")
    listen_to_the_end(page)
    assert page.run("return $('reader').textContent") == text
    assert page.run("return [...$('reader').querySelectorAll('*')].map(e => e.tagName)"
                    ".filter(tag => tag !== 'SPAN')") == []
    assert page.run("return document.querySelectorAll('script, img').length") == 1
    assert page.run("return performance.getEntriesByType('resource').map(e => e.name)"
                    ".filter(name => !name.startsWith(location.origin) && !/^data:/.test(name))"
                    ) == []


@pytest.mark.long
@in_browser
def test_what_is_left_out_and_what_is_put_in_stands_at_the_sentence(
        page: Browser, served: Worker) -> None:
    visit(page, served, "Hello 中文 to all of you who came. It is a fine evening for a story.")
    page.click("#go")
    page.until("run?.segs.length === 2")
    assert page.run("return document.querySelector('.note').textContent") == "left out: 中文"
    assert page.run("return document.querySelector('.note').parentNode.previousSibling.seg.place"
                    ) == 0
    cues = page.run("return args.map(([text, spoken]) => cuesIn(text, spoken))", [
        "“I give up,” she sighed.", "“I give up,” [sighs] she sighed."], [
        "It is 5 km. No!", "[laughs] It is five kilometers. NO!"], ["[laughs] No.", "[laughs] No."])
    assert cues == [[{"at": 12, "word": "[sighs]"}], [{"at": 0, "word": "[laughs]"}], []]
    page.click("#stop")


@pytest.mark.long
@in_browser
def test_errors_are_told_in_words_with_what_to_do(page: Browser, served: Worker) -> None:
    visit(page, served, "***")
    page.click("#go")
    page.until("/Write a word or a number/.test($('notice').textContent)")
    assert page.run("return [mode, $('edit').disabled]") == ["stop", False]
    page.click("#edit")
    page.type("Better.", over="#text")
    page.click("#go")
    listen_to_the_end(page)
    assert page.run("return $('notice').textContent") == ""


@pytest.mark.long
@in_browser
def test_seed_speed_and_expression_are_what_is_asked_for(page: Browser, served: Worker) -> None:
    visit(page, served, "Good evening.")
    page.run("""$('take').value = 'new'; $('speed').value = 1.5; $('expressive').checked = false;
                for (const id of ['take', 'speed', 'expressive']) $(id).onchange();""")
    page.click("#go")
    listen_to_the_end(page)
    fields = page.run("return run.fields")
    assert (fields["speed"], fields["expressive"]) == (1.5, False)
    answer = served.speak("Good evening.", **fields).json
    again = wav_samples(base64.b64decode(answer["audio"]))
    assert np.array_equal(again, heard(page)[0][1])
    page.run("$('take').value = 'mine'; $('take').onchange();")
    assert page.run("return [$('seedbox').hidden, Number($('seed').value), run.stale]") == [
        False, fields["seed"], True], "the one that was drawn can be kept"


@pytest.mark.long
@in_browser
def test_the_keyboard_alone_will_do(page: Browser, served: Worker) -> None:
    visit(page, served)
    page.press("tab")
    assert page.run("return document.activeElement.id") == "text"
    page.press("a", held="control")
    page.type(SHORT)
    page.press("enter", held="control")
    page.until("document.querySelectorAll('.seg').length === 3 && run.complete")
    page.press("escape")
    page.until("mode === 'stop'")
    page.run("document.activeElement.blur(); document.body.focus()")
    for _ in range(4):
        page.press("tab")
        if page.run("return document.activeElement.className") == "seg":
            break
    page.press("right", "right", "left")
    assert page.run("return document.activeElement.seg.place") == 1
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("enter")
    page.until(f"{CURRENT} === 1")
    page.press("r")
    page.until("Object.keys(run.parts[0].seeds).join() === '1' && !run.busy")
    page.press("escape")
    page.press("tab")
    assert page.run("return document.activeElement.id") == "again"
    page.press("tab")
    assert page.run("return document.activeElement.id") == "go"


def violations(page: Browser) -> list[Any]:
    page.cdp("Runtime.evaluate", expression=AXE.read_text(encoding="utf-8"))
    return page.run("const {violations} = await axe.run({resultTypes: ['violations']}); return "
                    "violations.map(v => [v.id, v.nodes.map(n => n.html + n.failureSummary)])")


@pytest.mark.long
@in_browser
@pytest.mark.skipif(not AXE.exists(), reason="no axe-core; tests/long.sh fetches it with npm")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_that_shuts_anybody_out(
        page: Browser, served: Worker, size: str, dark: bool) -> None:
    page.look(*SIZES[size], dark=dark)
    visit(page, served, "Hello 中文 you. This is a little longer, so that there is time to look.")
    assert violations(page) == []
    page.click("#go")
    page.until("document.querySelector('.note') && document.querySelector('.seg .now')")
    page.click("#go")  # it holds still
    page.run("$('keyform').hidden = false; tell('Words.', 'bad')")
    assert violations(page) == []
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    small = page.run("return [...document.querySelectorAll('button, select, .tick')]"
                     ".filter(e => e.offsetParent && e.offsetHeight < 44).map(e => e.outerHTML)")
    assert small == [], "a finger finds them"
    page.click("#stop")


