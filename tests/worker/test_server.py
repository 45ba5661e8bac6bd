"""The whole worker over real sockets: every endpoint, every error, every way to go away."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import signal
import socket
import threading
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import BUILTIN, WORKER, Answer, Worker, running_worker, wait_until

KEY = "sesame-9f2c"
PARAGRAPHS = "The boat left at noon. Nobody waved.\n\nA week later it came back, empty."
THREE = "One.\n\nTwo.\n\nThree."  # segments
PAGE = b"<!doctype html><style>p { margin: 0 }</style>\r\n<p>Hi.<script>\r\nlet a = 1;\r\n</script>"
FLOOD = 20_000_000  # bytes; more than the kernel keeps for a connection
SIGH = '"I give up," she sighed.'
LONG = "The old miller walked down to the river and looked at the slow brown water. " * 25

LAUNCHER = """\
import importlib.util, sys
spec = importlib.util.spec_from_file_location("bark_worker", {worker!r})
worker = importlib.util.module_from_spec(spec)
sys.modules["bark_worker"] = worker
spec.loader.exec_module(worker)
for name, value in {constants!r}.items():
    assert hasattr(worker, name), name
    setattr(worker, name, value)
sys.exit(worker.main())
"""


# Workers of this file

def write_launcher(folder: Path, **constants: float) -> Path:
    """A script that is bark-worker.py with other constants, so that nothing takes long."""
    script = folder / "launch.py"
    script.write_text(LAUNCHER.format(worker=str(WORKER), constants=constants))
    return script


@pytest.fixture(scope="module")
def narrow(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker with a key and with little of everything: slots, queue, time, connections."""
    script = write_launcher(tmp_path_factory.mktemp("narrow"), READ_SECONDS=2.0,
                            MAX_CONNECTIONS=12, LINGER_SECONDS=0.5)
    with running_worker(script, BARK_MODEL=str(toy), BARK_API_KEY=KEY, BARK_MAX_BATCH="1",
                        BARK_MAX_QUEUE="1", BARK_TIMEOUT="3", TTS_MAX_LENGTH="2000",
                        BARK_EXPRESSION="off",
                        BARK_VIOCE="misspelt") as worker:
        worker.wait_for("ready")
        yield worker


@pytest.fixture(scope="module")
def leaving(toy: Path) -> Iterator[list[Worker]]:
    """Two ready workers, started side by side, to be ended by signals."""
    settings = {"BARK_MODEL": str(toy), "BARK_MAX_BATCH": "1", "TTS_MAX_LENGTH": "2000"}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        starts = [pool.submit(stack.enter_context, running_worker(**settings)) for _ in range(2)]
        workers = [start.result() for start in starts]
        for worker in workers:
            worker.wait_for("ready")
        yield workers


@pytest.fixture(scope="module")
def hi(worker: Worker) -> dict[str, Any]:
    """The answer to the plainest request, for others to be compared with."""
    return worker.speak("Hi.").json


@dataclass
class Failure:
    """What a worker that could not load told while it lasted, and how it ended."""

    health: dict[str, Any]
    answer: Answer
    metrics: str
    status: int
    log: str


def watch_failure(script: Path, settings: dict[str, str]) -> Failure:
    with running_worker(script, **settings) as worker:
        health, answer = worker.wait_for("failed"), worker.speak("Hi.")
        metrics = worker.call("/metrics").body.decode()
        status = worker.process.wait(30)
    return Failure(health, answer, metrics, status, "".join(worker.log))


@pytest.fixture(scope="module")
def failures(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Failure]:
    """Of a worker without a model, and of one whose BARK_VOICE the model lacks; side by side."""
    folder = tmp_path_factory.mktemp("failing")
    script = write_launcher(folder, FAILED_SECONDS=2.0)
    settings = [{"BARK_MODEL": str(folder / "nothing")},
                {"BARK_MODEL": str(toy), "BARK_VOICE": "v2/en_speaker_66"}]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda each: watch_failure(script, each), settings))


# Raw HTTP

def connect(worker: Worker, seconds: float = 20.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", worker.port), timeout=seconds)


def read_answer(connection: socket.socket, method: str = "GET") -> Answer:
    reply = http.client.HTTPResponse(connection, method=method)
    reply.begin()
    return Answer(reply.status, dict(reply.headers), reply.read())


def read_all(connection: socket.socket) -> bytes:
    """Everything until the worker closes."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def exchange(worker: Worker, data: bytes) -> Answer:
    with connect(worker) as connection:
        connection.sendall(data)
        return read_answer(connection)


def synthesis(body: object, *headers: str) -> bytes:
    """A POST /synthesize as bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = ["POST /synthesize HTTP/1.1", "Host: test", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


def expect_error(answer: Answer, status: int, code: str, param: str | None = None) -> str:
    """Checks the error object whole; its message."""
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/json"
    error = answer.json.pop("error")
    assert {**answer.json, "error": None} == {"status": "error", "error": None}
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["message"] and (status != 503 or int(answer.headers["Retry-After"]) > 0)
    return error["message"]


def speak_together(worker: Worker, *requests: dict[str, object]) -> list[dict[str, Any]]:
    """The answers to requests sent at the same time."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda each: worker.call("/synthesize", each).json, requests))


def segments_of(worker: Worker, request: dict[str, object]) -> list[dict[str, Any]]:
    """Each segment's line, with its own audio, without its place in the whole."""
    body = worker.call("/synthesize", {**request, "stream": True}).body
    return [json.loads(line) | {"start": 0, "end": 0} for line in body.splitlines()[:-1]]


def queue(worker: Worker) -> tuple[int, int]:
    stats = worker.health()["queue"]
    return stats["running"], stats["waiting"]


@contextlib.contextmanager
def being_served(worker: Worker, text: str, *headers: str) -> Iterator[socket.socket]:
    """A request that the worker is at work on; its client leaves at the end."""
    with connect(worker) as connection:
        connection.sendall(synthesis({"text": text}, *headers))
        wait_until(lambda: queue(worker)[0] == 1, "running request")
        yield connection
    wait_until(lambda: queue(worker) == (0, 0), "free slots")


# What it is for

def test_synthesize_answers_with_every_documented_field(worker: Worker) -> None:
    answer = worker.speak("Hello, world!", voice="v2/en_speaker_3", seed=7)
    assert answer.status == 200 and answer.headers["Content-Type"] == "application/json"
    reply = answer.json
    assert set(reply) == {"audio", "format", "sample_rate", "duration", "synthesis_time", "status",
                          "voice", "seed", "segments"}
    assert reply["format"] == "wav"
    assert (reply["status"], reply["sample_rate"]) == ("success", 24000)
    assert (reply["voice"], reply["seed"]) == ("v2/en_speaker_3", 7)
    assert 0 < reply["synthesis_time"] < 60
    [segment] = reply["segments"]
    assert segment == {"text": "Hello, world!", "spoken": "Hello, world!", "from": 0, "to": 13,
                       "start": 0.0, "end": reply["duration"], "seed": 7, "takes": 1,
                       "warnings": []}


def test_wav_is_16_bit_mono_with_true_sizes(hi: dict[str, Any]) -> None:
    data = base64.b64decode(hi["audio"], validate=True)
    assert data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") == len(data) - 8
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
        frames = file.getnframes()
        assert len(file.readframes(frames)) == 2 * frames == len(data) - 44
    assert hi["duration"] == pytest.approx(frames / 24000, abs=1e-4)


@pytest.mark.parametrize("accept", ["audio/wav", "audio/x-wav, application/json;q=0.5", "audio/*"])
def test_accept_header_gets_the_very_wav_that_json_carries(
        worker: Worker, hi: dict[str, Any], accept: str) -> None:
    answer = worker.call("/synthesize", {"text": "Hi."}, headers={"Accept": accept})
    assert answer.status == 200 and answer.headers["Content-Type"] == "audio/wav"
    assert answer.body == base64.b64decode(hi["audio"])
    assert int(answer.headers["X-Bark-Seed"]) == hi["seed"]
    assert float(answer.headers["X-Bark-Duration"]) == hi["duration"]


def test_errors_stay_json_when_a_wav_is_asked_for(worker: Worker) -> None:
    answer = worker.call("/synthesize", {"text": ""}, headers={"Accept": "audio/wav"})
    expect_error(answer, 400, "empty_text", "text")


@pytest.mark.parametrize("text", [PARAGRAPHS, "  \u00dcber \U0001f600 all!\n\n\u4f60\u597d\u3002 "])
def test_segments_are_slices_of_the_text_with_their_places_in_the_audio(
        worker: Worker, text: str) -> None:
    reply = worker.speak(text, voice="v2/de_speaker_2").json
    segments = reply["segments"]
    assert len(segments) >= 2
    position = moment = 0.0
    for segment in segments:
        assert segment["text"] == text[segment["from"] : segment["to"]]
        assert segment["text"].strip() and segment["from"] >= position
        assert segment["start"] >= moment and segment["end"] > segment["start"]
        position, moment = segment["to"], segment["end"]
    assert segments[0]["start"] == 0.0 and segments[-1]["end"] <= reply["duration"] + 1e-3
    assert not text[int(position):].strip()


def test_there_is_silence_between_paragraphs(worker: Worker) -> None:
    reply = worker.speak("One.\n\nTwo.").json
    first, second = reply["segments"]
    assert second["start"] - first["end"] == pytest.approx(0.5, abs=1e-3)
    with wave.open(io.BytesIO(base64.b64decode(reply["audio"]))) as file:
        file.setpos(round(first["end"] * 24000) + 5)
        assert not any(file.readframes(11_900))


def test_same_request_gives_the_same_audio_and_another_seed_another(
        worker: Worker, hi: dict[str, Any]) -> None:
    again, named, other = speak_together(
        worker, {"text": "Hi."}, {"text": "Hi.", "seed": hi["seed"], "voice": hi["voice"]},
        {"text": "Hi.", "seed": hi["seed"] ^ 1})
    assert again["audio"] == named["audio"] == hi["audio"] != other["audio"]
    assert again["seed"] == named["seed"] == hi["seed"] != other["seed"]


def test_audio_does_not_depend_on_what_runs_beside_it(worker: Worker, hi: dict[str, Any]) -> None:
    requests = [{"text": "Hi."}, {"text": "Four, five and six."}, {"text": "Oh!", "seed": 3}]
    alone = [hi, *(worker.call("/synthesize", each).json for each in requests[1:])]
    together = speak_together(worker, *requests)
    assert [reply["audio"] for reply in together] == [reply["audio"] for reply in alone]


def test_an_answer_tells_what_was_spoken_and_a_request_can_want_it_plain(worker: Worker) -> None:
    whole, plain = speak_together(worker, {"text": SIGH}, {"text": SIGH, "expressive": False})
    (segment,), (as_it_is,) = whole["segments"], plain["segments"]
    assert (segment["text"], segment["spoken"]) == (SIGH, '"I give up," [sighs] she sighed.')
    assert as_it_is["text"] == as_it_is["spoken"] == SIGH
    assert whole["seed"] == plain["seed"] and whole["audio"] != plain["audio"]
    line = json.loads(worker.speak(SIGH, stream=True).body.splitlines()[0])
    assert line["spoken"] == segment["spoken"]


def test_openais_speech_is_expressive_unless_told_otherwise(worker: Worker) -> None:
    spoken = worker.speak(SIGH).json["audio"], worker.speak(SIGH, expressive=False).json["audio"]
    for audio, fields in zip(spoken, ({}, {"expressive": False}), strict=True):
        answer = worker.call("/v1/audio/speech", {
            "input": SIGH, "response_format": "wav", "stream": False, **fields})
        assert answer.body == base64.b64decode(audio)


def test_smallest_and_largest_seed_are_honoured(worker: Worker) -> None:
    seeds = [0, 2**53 - 1]
    replies = speak_together(worker, *({"text": "Hi.", "seed": seed} for seed in seeds))
    assert [reply["seed"] for reply in replies] == seeds


def test_seed_minus_one_draws_one_that_gives_the_same_audio_again(worker: Worker) -> None:
    first, second = speak_together(worker, *[{"text": "Hi.", "seed": -1}] * 2)
    assert first["seed"] != second["seed"] and 0 <= first["seed"] < 2**53
    assert worker.speak("Hi.", seed=first["seed"]).json["audio"] == first["audio"]


def test_a_seed_of_one_segment_changes_that_one_alone_and_is_told(worker: Worker) -> None:
    asked = {"text": THREE, "seed": 7}
    wishes = {}, {"seeds": {"1": 8, "0": None}}, {"seeds": {"1": -1}}, {"seed": 8}
    as_it_was, changed, drawn, all_new = (segments_of(worker, asked | wish) for wish in wishes)
    for lines in (changed, drawn):
        kept = [line == old for line, old in zip(lines, as_it_was, strict=True)]
        assert kept == [True, False, True]
    assert changed[1]["audio"] == all_new[1]["audio"] != drawn[1]["audio"]
    assert [line["seed"] for line in changed] == [7, 8, 7]
    again = worker.speak(**asked, seeds={"1": drawn[1]["seed"]}).json
    assert again["seed"] == 7 and again["segments"][1]["seed"] == drawn[1]["seed"]
    alone = worker.speak(**asked, seeds={"1": drawn[1]["seed"]}, stream=True)
    assert json.loads(alone.body.splitlines()[1])["audio"] == drawn[1]["audio"]


def test_a_seed_of_the_only_segment_is_as_the_requests_own(
        worker: Worker, hi: dict[str, Any]) -> None:
    assert worker.speak("Hi.", seed=7, seeds={"0": hi["seed"]}).json["audio"] == hi["audio"]


def test_a_segment_that_is_not_there_is_told_with_how_many_there_are(worker: Worker) -> None:
    answer = worker.speak(THREE, seeds={"3": 1})
    assert '"3"; segments of this text: 3,' in expect_error(answer, 400, "invalid_value", "seeds")


def test_aliases_speak_as_the_voices_they_stand_for(worker: Worker, hi: dict[str, Any]) -> None:
    names = ("male", "female", "v2/en_speaker_9", "narrator")
    male, female, ninth, narrator = speak_together(
        worker, *({"text": "Hi.", "voice": name, "seed": hi["seed"]} for name in names))
    assert [male["voice"], female["voice"], narrator["voice"]] == [
        "v2/en_speaker_6", "v2/en_speaker_9", "v2/en_speaker_1"]
    assert male["audio"] == hi["audio"] and female["audio"] == ninth["audio"]


def test_unknown_fields_and_nulls_are_ignored(worker: Worker, hi: dict[str, Any]) -> None:
    reply = worker.speak("Hi.", voice=None, seed=None, speed=None, model={"deep": [1]}).json
    assert reply["audio"] == hi["audio"]


def test_health_has_every_documented_field(worker: Worker, toy: Path) -> None:
    answer = worker.call("/health")
    health = answer.json
    assert answer.status == 200 and answer.headers["Cache-Control"] == "no-store"
    assert {"ready": True, "model": "Bark", "device": "cpu", "cuda_available": False,
            "max_text_length": 2000, "status": "ready", "model_id": toy.name, "dtype": "float32",
            "sample_rate": 24000, "voice": "v2/en_speaker_6", "slots": 4,
            }.items() <= health.items()
    assert health["version"] and health["uptime"] >= 0
    assert set(health["queue"]) == {"running", "waiting", "capacity"}
    assert health["queue"]["capacity"] == 32 and "error" not in health


def test_the_first_log_line_and_health_say_that_there_is_no_gpu(narrow: Worker) -> None:
    notice, first = narrow.health()["notice"], narrow.log[0]
    assert notice.startswith("no GPU") and "BARK_MODEL chooses" in notice and "/" not in (
        notice.replace("suno/bark-small", ""))
    assert " WARNING no GPU" in first and str(BUILTIN) in first
    assert narrow.log[1].endswith("BARK_VIOCE is set, but there is no such setting; --help lists"
                                  " them\n")


def test_ready_answers_200(worker: Worker) -> None:
    answer = worker.call("/ready")
    assert (answer.status, answer.json) == (200, {"ready": True})


def test_voices_lists_the_models_table_and_the_aliases(worker: Worker) -> None:
    listing = worker.call("/voices").json
    voices = {voice["id"]: voice for voice in listing["voices"]}
    assert len(voices) == len(listing["voices"]) == 133
    assert listing["default"] == "v2/en_speaker_6"
    assert voices["v2/zh_speaker_9"]["language"] == "zh"
    assert voices["female"]["alias_of"] == "v2/en_speaker_9"
    assert voices["narrator"]["description"] == "calm male voice"
    assert all({"id", "name", "language", "gender", "description"} <= set(voice)
               for voice in voices.values())
    assert voices["v2/en_speaker_6"]["aliases"] == ["male"]
    assert voices["v2/pl_speaker_9"] == {
        "id": "v2/pl_speaker_9", "name": "v2/pl_speaker_9", "language": "pl", "gender": "female",
        "description": "Polish, female", "aliases": []}
    women = [name for name, voice in voices.items() if voice["gender"] == "female"]
    assert len(women) == 37 + 1, "and the alias"


def test_index_page_names_every_endpoint(worker: Worker, bark: ModuleType) -> None:
    answer = worker.call("/")
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain")
    assert all(path in answer.body.decode() for path in bark.ROUTES)
    assert worker.url in answer.body.decode()


@contextlib.contextmanager
def serving(bark: ModuleType, page: Path) -> Iterator[Worker]:
    """The worker's server without anything behind it, for what needs nothing; with this page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bark, "PAGE", page)
        server = bark.WorkerServer(bark.Config(host="127.0.0.1", port=0), None, None, None,
                                   bark.Metrics(), 8)
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Worker(None, port=server.server_port)
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def paged(bark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_bytes(PAGE)
    with serving(bark, path) as worker:
        yield worker


@pytest.mark.parametrize("accept", [
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8",
    "text/plain, TEXT/HTML", "application/json, text/html;q=0.1"])
def test_a_browser_gets_the_page_held_to_its_own_script_and_style(
        paged: Worker, accept: str) -> None:
    answer, head = (paged.call("/", headers={"Accept": accept}, method=method)
                    for method in ("GET", "HEAD"))
    assert answer.body == PAGE.replace(b"\r\n", b"\n") and head.body == b""
    headers = answer.headers
    assert head.headers["Content-Length"] == headers["Content-Length"] == str(len(answer.body))
    assert headers["Content-Type"] == "text/html; charset=utf-8" and "Accept" in headers["Vary"]
    script, style = (base64.b64encode(hashlib.sha256(text).digest()).decode()
                     for text in (b"\nlet a = 1;\n", b"p { margin: 0 }"))
    assert headers["Content-Security-Policy"] == (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src"
        " 'self'; media-src blob:; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("accept", [
    None, "*/*", "text/*", "", "application/json", "text/html;q=0", "text/plain, text/html;q=0.5"])
def test_whoever_does_not_ask_for_html_gets_the_text(paged: Worker, accept: str | None) -> None:
    answer = paged.call("/", headers={} if accept is None else {"Accept": accept})
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "Accept" in answer.headers["Vary"] and b"/synthesize" in answer.body


def test_a_page_that_a_browser_has_is_not_sent_again(paged: Worker) -> None:
    html = {"Accept": "text/html"}
    tag = paged.call("/", headers=html).headers["ETag"]
    again, stale = (paged.call("/", headers={**html, "If-None-Match": known})
                    for known in (f'"old", W/{tag}', '"old"'))
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", tag)
    assert again.headers["Cache-Control"] == "no-cache" and stale.status == 200


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_without_a_page_to_read_a_browser_gets_the_text_and_the_log_says_so(
        bark: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture,
        content: bytes | None) -> None:
    path = tmp_path / "page.html"
    if content:
        path.write_bytes(content)
    with caplog.at_level("INFO"), serving(bark, path) as worker:
        answer = worker.call("/", headers={"Accept": "text/html"})
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain")
    assert "page.html cannot be read" in caplog.text and str(tmp_path) not in caplog.text


# What the client must change

BAD_FIELDS: list[tuple[object, str, str | None]] = [
    ({}, "missing_text", "text"),
    ({"text": None}, "missing_text", "text"),
    ({"Text": "Hello."}, "missing_text", "text"),
    ({"text": ""}, "empty_text", "text"),
    ({"text": " \n\t\u3000"}, "empty_text", "text"),
    ({"text": 7}, "invalid_type", "text"),
    ({"text": ["Hello."]}, "invalid_type", "text"),
    ({"text": {"text": "Hello."}}, "invalid_type", "text"),
    ({"text": True}, "invalid_type", "text"),
    ({"text": "a" * 2001}, "text_too_long", "text"),
    ({"text": "a\0b"}, "invalid_text", "text"),
    ({"text": "a\ud800b"}, "invalid_text", "text"),
    ({"text": "\udc00\ud800"}, "invalid_text", "text"),
    ({"text": "Hi.", "voice": 6}, "invalid_type", "voice"),
    ({"text": "Hi.", "voice": ["male"]}, "invalid_type", "voice"),
    ({"text": "Hi.", "voice": "x"}, "unknown_voice", "voice"),
    ({"text": "Hi.", "voice": "v2/en_speaker_66"}, "unknown_voice", "voice"),
    ({"text": "Hi.", "voice": "../../etc/passwd"}, "unknown_voice", "voice"),
    ({"text": "Hi.", "voice": "speaker_embeddings/v2/en_speaker_6"}, "unknown_voice", "voice"),
    ({"text": "Hi.", "voice": "\ud800"}, "unknown_voice", "voice"),
    ({"text": "Hi.", "voice": "v" * 500_000}, "unknown_voice", "voice"),
    ({"text": "Hi.", "expressive": "no"}, "invalid_type", "expressive"),
    ({"text": "Hi.", "seed": "7"}, "invalid_type", "seed"),
    ({"text": "Hi.", "seed": True}, "invalid_type", "seed"),
    ({"text": "Hi.", "seed": 1.5}, "invalid_type", "seed"),
    ({"text": "Hi.", "seed": [1]}, "invalid_type", "seed"),
    ({"text": "Hi.", "seed": -2}, "invalid_seed", "seed"),
    ({"text": "Hi.", "seed": 2**53}, "invalid_seed", "seed"),
    ({"text": "Hi.", "seed": 10**4000}, "invalid_seed", "seed"),
    ({"text": "Hi.", "seeds": []}, "invalid_type", "seeds"),
    ({"text": "Hi.", "seeds": 7}, "invalid_type", "seeds"),
    ({"text": "Hi.", "seeds": {"0": "7"}}, "invalid_type", "seeds.0"),
    ({"text": "Hi.", "seeds": {"0": -2}}, "invalid_seed", "seeds.0"),
    ({"text": "Hi.", "seeds": {"0": 2**53}}, "invalid_seed", "seeds.0"),
    ({"text": "Hi.", "seeds": {"0": 7, "1": 7}}, "invalid_value", "seeds"),
    ({"text": "Hi.", "seeds": {"00": 7}}, "invalid_value", "seeds"),
    ({"text": "Hi.", "seeds": {"-1": 7}}, "invalid_value", "seeds"),
    ({"text": "Hi.", "seeds": {"\u0660": 7}}, "invalid_value", "seeds"),
    ({"text": "Hi.", "seeds": {"9" * 5000: 7}}, "invalid_value", "seeds"),
]
BAD_JSON = [
    b"", b"{", b'{"text": "Hi."', b"text=Hi.", b"\xff\xfe{\x00}\x00", b'{"text": "\xc3"}',
    b'"Hi."', b"[]", b"null", b"7", b'{"text": NaN}', b'{"text": "Hi.", "seed": -Infinity}',
    b"[" * 100_000, b'{"text":' * 50_000, b'{"text": "a\nb"}', b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"text": "Hi."} {"text": "Hi."}',
]


@pytest.mark.parametrize(("payload", "code", "param"), BAD_FIELDS,
                         ids=lambda value: str(value)[:40].encode("ascii", "replace").decode())
def test_wrong_field_is_400_and_says_which(
        worker: Worker, payload: object, code: str, param: str) -> None:
    message = expect_error(worker.call("/synthesize", payload), 400, code, param)
    assert message.startswith(param) and len(message) < 300


@pytest.mark.parametrize("body", BAD_JSON, ids=lambda body: ascii(body[:20]))
def test_broken_json_is_400_and_says_where(worker: Worker, body: bytes) -> None:
    message = expect_error(worker.call("/synthesize", body), 400, "invalid_json")
    assert message.startswith("the body is") and len(message) < 300


def test_text_length_is_counted_in_characters_and_named(worker: Worker) -> None:
    message = expect_error(worker.speak("\U0001f600" * 2001), 400, "text_too_long", "text")
    assert message.startswith("text has 2001 characters; at most 2000 are allowed")


def test_unknown_voice_names_near_matches(worker: Worker) -> None:
    message = expect_error(worker.speak("Hi.", voice="v2/en_speaker6"), 400, "unknown_voice",
                           "voice")
    assert "'v2/en_speaker6'" in message and "v2/en_speaker_6" in message and "/voices" in message


@pytest.mark.parametrize("text", ["***", "\U0001f600\U0001f680", "...", "\u200b", "\u2014 \u2026"])
def test_text_without_anything_to_speak_is_422(worker: Worker, text: str) -> None:
    expect_error(worker.speak(text), 422, "nothing_to_speak", "text")


@pytest.mark.parametrize(("method", "path", "allow"), [
    ("POST", "/health", "GET, HEAD, OPTIONS"), ("DELETE", "/ready", "GET, HEAD, OPTIONS"),
    ("PUT", "/voices", "GET, HEAD, OPTIONS"), ("GET", "/synthesize", "POST, OPTIONS"),
    ("HEAD", "/synthesize", "POST, OPTIONS"), ("GET", "/v1/audio/speech", "POST, OPTIONS"),
    ("POST", "/v1/models/tts-1", "GET, HEAD, OPTIONS"), ("BREW", "/", "GET, HEAD, OPTIONS")])
def test_wrong_method_is_405_and_names_the_right_one(
        worker: Worker, method: str, path: str, allow: str) -> None:
    answer = worker.call(path, method=method)
    assert answer.status == 405 and answer.headers["Allow"] == allow
    if method != "HEAD":
        assert allow in expect_error(answer, 405, "method_not_allowed")


@pytest.mark.parametrize("path", ["/nothing", "/health/x", "/synthesize/../health", "/%2e%2e",
                                  "/voices/../../etc/passwd", "/Health"])
def test_unknown_path_is_404_and_names_the_known_ones(worker: Worker, path: str) -> None:
    message = expect_error(worker.call(path), 404, "not_found")
    assert path in message and "/synthesize" in message


def test_query_is_ignored(worker: Worker) -> None:
    assert worker.call("/health?x=1").status == 200


# The body's frame

@pytest.mark.parametrize(("headers", "status", "code"), [
    (("Transfer-Encoding: chunked", "Content-Length: 5"), 400, "invalid_length"),
    (("Transfer-Encoding: gzip, chunked",), 400, "invalid_length"),
    (("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400, "invalid_length"),
    (("Transfer-Encoding: identity",), 400, "invalid_length"),
    (("Content-Length: -5",), 400, "invalid_length"),
    (("Content-Length: +5",), 400, "invalid_length"),
    (("Content-Length: 5.0",), 400, "invalid_length"),
    (("Content-Length: 0x5",), 400, "invalid_length"),
    (("Content-Length: \u00b2",), 400, "invalid_length"),
    (("Content-Length:",), 400, "invalid_length"),
    (("Content-Length: 5, 5",), 400, "invalid_length"),
    (("Content-Length: 5", "Content-Length: 6"), 400, "invalid_length"),
    (("Content-Length: 9999999999999999999999",), 413, "body_too_large"),
    (("Content-Length: " + "9" * 5000,), 400, "invalid_length"),
    (("Content-Length: 1048577",), 413, "body_too_large"),
    (("Content-Length: 5", "Content-Type: text/plain"), 415, "unsupported_media_type"),
    (("Content-Length: 5", "Content-Type: multipart/form-data; boundary=x"), 415,
     "unsupported_media_type"),
])
def test_body_that_is_not_taken_is_refused_unread(
        worker: Worker, headers: tuple[str, ...], status: int, code: str) -> None:
    head = "\r\n".join(["POST /synthesize HTTP/1.1", *headers, "", ""])
    with connect(worker) as connection:
        connection.sendall(head.encode("latin-1") + b"5\r\nhello\r\n0\r\n\r\n")
        expect_error(read_answer(connection), status, code)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""  # closed: nobody knows where the next request starts


def test_missing_content_length_is_411(worker: Worker) -> None:
    expect_error(exchange(worker, b"POST /synthesize HTTP/1.1\r\n\r\n"), 411, "length_required")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON",
                                  "application/problem+json"])
def test_json_is_taken_under_its_names(worker: Worker, kind: str) -> None:
    answer = worker.call("/synthesize", {}, headers={"Content-Type": kind})
    expect_error(answer, 400, "missing_text", "text")


def test_content_type_may_be_missing(worker: Worker) -> None:
    expect_error(exchange(worker, synthesis({})), 400, "missing_text", "text")


def test_error_arrives_although_the_client_sends_its_whole_body_first(worker: Worker) -> None:
    answer = worker.call("/synthesize", b"x" * FLOOD)
    message = expect_error(answer, 413, "body_too_large")
    assert str(FLOOD) in message and "1048576" in message


def test_body_of_exactly_one_mebibyte_is_read(worker: Worker) -> None:
    body = b'{"text": ""' + b" " * (2**20 - 12) + b"}"
    assert len(body) == 2**20
    expect_error(worker.call("/synthesize", body), 400, "empty_text", "text")


def test_body_of_a_get_is_not_taken_for_the_next_request(worker: Worker) -> None:
    inner = b"GET /voices HTTP/1.1\r\n\r\n"
    head = b"GET /ready HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(inner)
    with connect(worker) as connection:
        connection.sendall(head + inner)
        assert read_all(connection).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("headers", [
    "Content-Length: 0\r\nContent-Length: 43", "Content-Length : 43", "junk\r\nContent-Length: 43"])
def test_ambiguous_frame_is_refused_and_nothing_after_it_is_obeyed(
        worker: Worker, headers: str) -> None:
    inner = b"GET /voices HTTP/1.1\r\nConnection: close\r\n\r\n"
    with connect(worker) as connection:
        connection.sendall(f"POST /synthesize HTTP/1.1\r\n{headers}\r\n\r\n".encode() + inner)
        reply = read_all(connection)
    assert reply.startswith(b"HTTP/1.1 4") and reply.count(b"HTTP/1.1 ") == 1


def test_continue_is_sent_only_when_the_body_is_wanted(worker: Worker) -> None:
    with connect(worker) as connection:
        head, body = synthesis({}, "Expect: 100-continue").split(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        expect_error(read_answer(connection), 400, "missing_text", "text")
    huge = b"POST /synthesize HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
    with connect(worker) as connection:
        connection.sendall(huge)
        assert read_all(connection).startswith(b"HTTP/1.1 413 ")


# HTTP itself

def test_two_requests_share_a_connection_also_after_an_error(worker: Worker) -> None:
    with connect(worker) as connection:
        for _ in range(2):
            connection.sendall(b"GET /ready HTTP/1.1\r\nHost: test\r\n\r\n")
            assert read_answer(connection).status == 200
            connection.sendall(b"GET /nothing HTTP/1.1\r\nHost: test\r\n\r\n")
            expect_error(read_answer(connection), 404, "not_found")
            connection.sendall(synthesis({"text": ""}))
            expect_error(read_answer(connection), 400, "empty_text", "text")


def test_pipelined_requests_are_answered_in_order(worker: Worker) -> None:
    closing = b"GET /nothing HTTP/1.1\r\nConnection: close\r\n\r\n"
    with connect(worker) as connection:
        connection.sendall(b"GET /ready HTTP/1.1\r\n\r\n" + synthesis({"text": ""}) + closing)
        reply = read_all(connection)
    assert [part[:3] for part in reply.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400", b"404"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/voices", "/"])
def test_head_has_the_headers_of_get_and_no_body(worker: Worker, path: str) -> None:
    with connect(worker) as connection:
        connection.sendall(f"HEAD {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        head = read_all(connection).decode()
    assert head.startswith("HTTP/1.1 200 ") and head.index("\r\n\r\n") == len(head) - 4
    assert f"Content-Type: {worker.call(path).headers['Content-Type']}" in head
    assert "Content-Length: " in head and "Content-Length: 0" not in head


def test_absolute_address_is_understood(worker: Worker) -> None:
    assert exchange(worker, b"GET http://any.host:1/ready?x HTTP/1.1\r\n\r\n").status == 200


def test_malformed_address_is_400_and_the_connection_lives_on(worker: Worker) -> None:
    with connect(worker) as connection:
        for _ in range(2):
            connection.sendall(b"GET http://[::1 HTTP/1.1\r\n\r\n")
            expect_error(read_answer(connection), 400, "malformed_request")


@pytest.mark.parametrize("line", [b"GET /ready HTTP/1.0", b"GET /ready HTTP/0.9", b"GET /ready"])
def test_old_http_gets_a_status_line_and_a_closed_connection(worker: Worker, line: bytes) -> None:
    with connect(worker) as connection:
        connection.sendall(line + b"\r\n\r\n")
        reply = read_all(connection)
    assert reply.startswith(b"HTTP/1.1 200 ") and reply.endswith(b'{"ready": true}')


def test_http_1_0_is_never_told_to_continue(worker: Worker) -> None:
    data = synthesis({}, "Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0")
    with connect(worker) as connection:
        connection.sendall(data)
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_error_arrives_although_a_malformed_request_goes_on_and_on(worker: Worker) -> None:
    answer = exchange(worker, b"GET /" + b"a" * FLOOD + b" HTTP/1.1\r\n\r\n")
    assert (answer.status, answer.json["error"]["code"]) == (414, "malformed_request")


@pytest.mark.parametrize(("data", "status"), [
    (b"rubbish\r\n\r\n", 400),
    (b"GET /health HTTP/1.1 more\r\n\r\n", 400),
    (b"GET /health FTP/1.1\r\n\r\n", 400),
    (b"GET /health HTTP/1.x\r\n\r\n", 400),
    (b"POST /synthesize\r\n\r\n", 400),
    (b"GET /health HTTP/2.0\r\n\r\n", 505),
    (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", 414),
    (b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431),
    (b"GET /health HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", 431),
], ids=lambda value: ascii(value[:24]) if isinstance(value, bytes) else str(value))
def test_malformed_http_gets_a_status_line_and_a_json_error(
        worker: Worker, data: bytes, status: int) -> None:
    with connect(worker) as connection:
        connection.sendall(data)
        answer = read_answer(connection)
        error = answer.json["error"]
        assert (answer.status, error["code"]) == (status, "malformed_request")
        assert set(error) == {"message", "type", "param", "code"}
        assert connection.recv(1) == b""


# Keys

def test_key_is_wanted_everywhere_but_for_probes_listings_and_the_page(narrow: Worker) -> None:
    for path in ("/", "/health", "/ready", "/voices", "/v1/models", "/v1/audio/voices"):
        assert narrow.call(path).status == 200
    for path in ("/synthesize", "/nothing"):
        answer = narrow.call(path)
        assert "missing" in expect_error(answer, 401, "invalid_api_key")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    expect_error(narrow.speak("Hi."), 401, "invalid_api_key")


@pytest.mark.parametrize("value", ["Bearer wrong", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}",
                                   f"Basic {KEY}", KEY, "Bearer", "Bearer \u00e9\u00ff"])
def test_wrong_key_is_401_and_not_repeated(narrow: Worker, value: str) -> None:
    answer = narrow.call("/synthesize", {"text": "Hi."}, headers={"Authorization": value})
    assert "wrong" in expect_error(answer, 401, "invalid_api_key")
    assert KEY.encode() not in answer.body


def test_a_worker_can_be_set_to_speak_every_text_as_it_is(narrow: Worker) -> None:
    answer = narrow.call("/synthesize", {"text": SIGH, "expressive": True},
                         headers={"Authorization": f"Bearer {KEY}"})
    assert answer.json["segments"][0]["spoken"] == SIGH


@pytest.mark.parametrize("value", [f"Bearer {KEY}", f"bearer {KEY}", f"Bearer  {KEY} "])
def test_right_key_opens(narrow: Worker, value: str) -> None:
    assert narrow.call("/voices", headers={"Authorization": value}).status == 200


# Load

def test_health_answers_while_requests_run(worker: Worker) -> None:
    times = []
    with ThreadPoolExecutor() as pool:
        requests = [pool.submit(worker.speak, "Hello there.", seed=n) for n in range(8)]
        wait_until(lambda: queue(worker)[0] == 4, "running requests")
        while not all(request.done() for request in requests):
            began = time.monotonic()
            assert worker.call("/health").status == 200
            times.append(time.monotonic() - began)
    assert [request.result().status for request in requests] == [200] * 8
    p99 = sorted(times)[int(0.99 * len(times))]
    print(f"/health beside eight requests: {len(times)} calls, p99 {1000 * p99:.0f} ms")
    assert max(times) < 2.0


def test_client_that_hangs_up_frees_the_gpu(worker: Worker) -> None:
    with being_served(worker, LONG):
        pass
    assert worker.speak("Hi.").status == 200


def test_full_queue_answers_503_with_retry_after(narrow: Worker) -> None:
    key = f"Authorization: Bearer {KEY}"
    with being_served(narrow, LONG, key), connect(narrow) as waiting:
        waiting.sendall(synthesis({"text": "Hi."}, key))
        wait_until(lambda: queue(narrow) == (1, 1), "waiting request")
        message = expect_error(exchange(narrow, synthesis({"text": "Hi."}, key)), 503, "queue_full")
        assert "1" in message


def test_client_that_hangs_up_while_it_waits_frees_its_place(narrow: Worker) -> None:
    key = f"Authorization: Bearer {KEY}"
    with being_served(narrow, LONG, key):
        with connect(narrow) as waiting:
            waiting.sendall(synthesis({"text": "Hi."}, key))
            wait_until(lambda: queue(narrow) == (1, 1), "waiting request")
        wait_until(lambda: queue(narrow) == (1, 0), "free place")


def test_request_over_its_time_is_504(narrow: Worker) -> None:
    began = time.monotonic()
    answer = exchange(narrow, synthesis({"text": LONG}, f"Authorization: Bearer {KEY}"))
    assert "BARK_TIMEOUT" in expect_error(answer, 504, "timeout")
    assert 3.0 <= time.monotonic() - began < 8.0
    wait_until(lambda: queue(narrow) == (0, 0), "free slots")


def test_300_idle_connections_do_not_stop_health(worker: Worker) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(300):
            connection = stack.enter_context(connect(worker))
            connection.sendall(b"POST /synthesize HTTP/1.1\r\nX: y"[: number % 30])
        began = time.monotonic()
        assert worker.call("/health").status == 200
        assert time.monotonic() - began < 2.0
        assert worker.speak("Hi.").status == 200


def test_oldest_idle_connection_makes_room_and_a_busy_one_never(narrow: Worker) -> None:
    with being_served(narrow, LONG, f"Authorization: Bearer {KEY}") as busy, \
            contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(narrow)) for _ in range(11)]
        assert narrow.call("/health").status == 200
        assert idle[0].recv(1) == b""
        idle[-1].settimeout(0.0)
        with pytest.raises(BlockingIOError):
            idle[-1].recv(1)
        assert queue(narrow)[0] == 1
        assert read_answer(busy).status == 504  # its time is up before it is done


def test_connection_that_was_just_answered_is_not_the_oldest_idle_one(bark: ModuleType) -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for end in (end for pair in pairs for end in pair):
            stack.enter_context(end).settimeout(10.0)
        connections = bark.Connections(2)
        assert connections.admit(pairs[0][0]) and connections.admit(pairs[1][0])
        connections.waiting(pairs[0][0])  # for its next request, after a 404 say
        assert connections.admit(pairs[2][0])
        assert pairs[1][1].recv(1) == b""
        pairs[0][1].settimeout(0.0)
        with pytest.raises(BlockingIOError):
            pairs[0][1].recv(1)


def test_half_sent_requests_are_closed(narrow: Worker) -> None:
    post = synthesis({"text": "Hi."}, f"Authorization: Bearer {KEY}")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(narrow)) for _ in range(4)]
        for connection, start in zip(connections, (
                b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost:", post[:-1]), strict=True):
            connection.sendall(start)
        for connection in connections:
            read_all(connection)
            assert 1.0 <= time.monotonic() - began < 6.0


def test_drip_feeding_does_not_buy_time(narrow: Worker) -> None:
    head = b"POST /synthesize HTTP/1.1\r\nAuthorization: Bearer %s\r\n" % KEY.encode()
    with connect(narrow, 0.2) as connection:
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n")
        began = time.monotonic()
        answer = b""
        while not answer and time.monotonic() - began < 10.0:
            with contextlib.suppress(TimeoutError):
                connection.sendall(b" ")
                answer = connection.recv(1) + read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"incomplete_body" in answer


# Logs

def count_spoken(worker: Worker) -> int:
    return sum("POST /synthesize status=200" in line for line in worker.log)


def test_log_holds_no_key_and_nothing_that_was_to_be_said(narrow: Worker) -> None:
    mark, key = "Quetzalcoatl", f"Authorization: Bearer {KEY}"
    before = count_spoken(narrow)
    assert exchange(narrow, synthesis({"text": f"{mark}."}, key)).status == 200
    for request in (
        synthesis({"text": mark * 200}, key), synthesis({"text": f"{mark}\0"}, key),
        synthesis({"text": "Hi.", "voice": mark}, key), synthesis(mark.encode(), key),
        synthesis({"text": f"{mark}."}, f"Authorization: Bearer {mark}"),
        f"GET /voices?text={mark} HTTP/1.1\r\n{key}\r\n\r\n".encode(),
        f"GET /say/{mark} HTTP/1.1\r\n{key}\r\n\r\n".encode(),
        f"{mark} /voices HTTP/1.1\r\n{key}\r\n\r\n".encode(), f"{mark}\r\n\r\n".encode(),
        f'{{"text":"{mark}" x HTTP/1.1\r\n{key}\r\n\r\n'.encode(),
        f"GET / HTTP/{mark}\r\n\r\n".encode(), f"GET /\r\n{mark}: {mark}\r\n\r\n".encode(),
        f"GET http://{mark}:[/ HTTP/1.1\r\n\r\n".encode(),
    ):
        exchange(narrow, request)
    exchange(narrow, synthesis({"text": "Bye."}, key))
    wait_until(lambda: count_spoken(narrow) == before + 2, "last line")
    text = "".join(narrow.log)
    assert mark[:5] not in text and KEY not in text and "Traceback" not in text


# Starting and ending

@pytest.fixture
def stuck_toy(toy: Path, tmp_path: Path) -> Path:
    """A model whose loading never ends: its only shard of weights is a pipe without a writer."""
    folder, shard = tmp_path / "stuck", "pytorch_model-00001-of-00001.bin"
    folder.mkdir()
    for path in toy.iterdir():
        if path.name != "pytorch_model.bin":
            (folder / path.name).symlink_to(path)
    os.mkfifo(folder / shard)
    index = {"metadata": {}, "weight_map": {"semantic.lm_head.weight": shard}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def test_loading_worker_says_so_and_obeys_sigint(stuck_toy: Path) -> None:
    with running_worker(BARK_MODEL=str(stuck_toy)) as worker:
        health = worker.wait_for("loading")
        assert health["slots"] is None
        assert health["ready"] is False and health["model_id"] == stuck_toy.name
        for answer in (worker.call("/ready"), worker.call("/voices"),
                       worker.call("/voices/male/sample"), worker.speak("Hi.")):
            assert "loading" in expect_error(answer, 503, "not_ready")
        expect_error(worker.speak(""), 400, "empty_text", "text")
        assert worker.call("/").status == 200
        assert b'\nbark_status{status="loading"} 1.0\n' in worker.call("/metrics").body
        assert worker.stop(signal.SIGINT) == 130
        assert "Traceback" not in "".join(worker.log)


def test_missing_model_is_told_on_health_and_then_exits_1(failures: list[Failure]) -> None:
    failure = failures[0]
    assert failure.health["ready"] is False and "nothing" in failure.health["error"]
    assert "nothing" in expect_error(failure.answer, 503, "not_ready")
    assert '\nbark_status{status="failed"} 1.0\n' in failure.metrics
    assert failure.status == failure.health["exit_status"] == 1
    assert "nothing" in failure.log and "Traceback" not in failure.log
    assert "/" not in failure.health["error"].replace("suno/bark", "")


def test_unknown_default_voice_is_told_on_health_and_then_exits_2(
        failures: list[Failure]) -> None:
    failure = failures[1]
    for words in ("BARK_VOICE", "'v2/en_speaker_66'", "v2/en_speaker_6"):
        assert words in failure.health["error"] and words in failure.log
    assert failure.status == failure.health["exit_status"] == 2
    assert "Traceback" not in failure.log


@pytest.mark.parametrize("host", ["x" * 70, "203.0.113.1", "\u00fc..b"])
def test_host_that_cannot_be_used_is_told(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
        host: str) -> None:
    monkeypatch.setenv("HOST", host)
    monkeypatch.setenv("PORT", "0")
    assert bark.main([]) == 2
    assert "cannot listen on HOST" in caplog.text and host in caplog.text


def test_port_in_use_is_told(bark: ModuleType, monkeypatch: pytest.MonkeyPatch,
                             caplog: pytest.LogCaptureFixture, worker: Worker) -> None:
    monkeypatch.setenv("HOST", "127.0.0.1")
    monkeypatch.setenv("PORT", str(worker.port))
    assert bark.main([]) == 2
    assert f"PORT {worker.port}" in caplog.text and "choose another PORT" in caplog.text


def test_sigterm_lets_an_accepted_request_finish_and_exits_0(leaving: list[Worker]) -> None:
    worker = leaving[0]
    with connect(worker) as connection:
        connection.sendall(synthesis({"text": PARAGRAPHS}))
        wait_until(lambda: queue(worker)[0] == 1, "running request")
        worker.process.send_signal(signal.SIGTERM)
        answer = read_answer(connection)
    assert answer.status == 200 and answer.json["status"] == "success"
    assert worker.process.wait(15) == 0
    assert "Traceback" not in "".join(worker.log)


def test_draining_worker_refuses_new_requests_and_a_second_signal_ends_it(
        leaving: list[Worker]) -> None:
    worker = leaving[1]
    with connect(worker) as connection:
        connection.sendall(synthesis({"text": LONG}))
        wait_until(lambda: queue(worker)[0] == 1, "running request")
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait_for("draining")["ready"] is False
        expect_error(worker.speak("Hi."), 503, "draining")
        assert worker.call("/ready").status == 503
        began = time.monotonic()
        assert worker.stop(signal.SIGINT) == -signal.SIGINT
        assert time.monotonic() - began < 3.0
