"""What real clients do that curl does not: chunked bodies, sloppy names, no word at all, TLS."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import Answer, Worker, running_worker, wait_until
from decoding import decode
from test_server import connect, expect_error, read_all, read_answer, synthesis

KEY = "sesame-9f2c"
HEAD = b"POST /synthesize HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BODY = b'{"text": "Hi."}'


def send(worker: Worker, data: bytes) -> Answer:
    with connect(worker) as connection:
        connection.sendall(data)
        return read_answer(connection)


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


# Chunked bodies


@pytest.mark.parametrize("body", [
    chunks(BODY), chunks(*(bytes([byte]) for byte in BODY)),
    b"0000000F;name=\"a;b\";x\r\n" + BODY + b"\r\n0;last\r\nDigest: x\r\nMore: y\r\n\r\n"])
def test_a_body_in_chunks_is_read_however_it_is_cut(worker: Worker, body: bytes) -> None:
    with connect(worker) as connection:
        for _ in range(2):  # the second one shows that the first was read to its very end
            connection.sendall(CHUNKED + body)
            assert read_answer(connection).status == 200


@pytest.mark.parametrize("body", [
    b"xyz\r\n", b"-1\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"\r\n", b"5\nhello\r\n0\r\n\r\n",
    b"5\r\nhelloXX0\r\n\r\n", b"5" * 17 + b"\r\n", b"5;" + b"x" * 1100 + b"\r\nhello\r\n0\r\n\r\n",
    b"0\r\n" + b"A: b\r\n" * 2000 + b"\r\n"])
def test_broken_chunks_are_refused_and_the_connection_closed(worker: Worker, body: bytes) -> None:
    with connect(worker) as connection:
        connection.sendall(CHUNKED + body)
        expect_error(read_answer(connection), 400, "invalid_chunk")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


@pytest.mark.parametrize("body", [
    b"100001\r\n", b"%x\r\n" % (1 << 40), chunks(*[b" " * 65536] * 17)])
def test_more_than_a_mebibyte_in_chunks_is_too_much(worker: Worker, body: bytes) -> None:
    expect_error(send(worker, CHUNKED + body), 413, "body_too_large")


def test_http_1_0_has_no_chunks(worker: Worker) -> None:
    data = CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + chunks(BODY)
    expect_error(send(worker, data), 400, "invalid_length")


@pytest.mark.parametrize("sent", [b"f\r\n{", b"f\r\n" + BODY, b"f", b"0\r\nA: b\r\n"])
def test_chunks_that_break_off_are_incomplete(worker: Worker, sent: bytes) -> None:
    with connect(worker) as connection:
        connection.sendall(CHUNKED + sent)
        connection.shutdown(socket.SHUT_WR)
        expect_error(read_answer(connection), 408, "incomplete_body")


def test_a_client_that_offers_http_2_first_gets_its_answer_in_http_1(worker: Worker) -> None:
    """As JDK 17's HttpClient does with every first request."""
    offer = (b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
             b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n")
    answer = send(worker, HEAD + offer + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(BODY))
    assert answer.status == 200


def test_pythons_own_client_and_curl_send_chunks(worker: Worker) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", worker.port)
    connection.request("POST", "/synthesize", body=iter([BODY[:4], BODY[4:]]), encode_chunked=True,
                       headers={"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()
    done = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", "Transfer-Encoding: chunked",
         "-H", "Content-Type: application/json", "-d", "@-", worker.url + "/synthesize"],
        input=BODY, capture_output=True)
    assert done.stdout == b"200"


# Nothing to speak


@pytest.mark.parametrize("text", [".", "...", "\U0001f600", "***", "  —  "])
def test_what_has_no_word_is_a_quarter_of_a_second_of_silence_for_openais_clients(
        worker: Worker, text: str) -> None:
    answer = worker.call("/v1/audio/speech", {"input": text, "response_format": "wav"})
    samples, rate = soundfile.read(io.BytesIO(answer.body), dtype="int16")
    assert answer.status == 200 and len(samples) == rate / 4 and not samples.any()
    expect_error(worker.speak(text), 422, "nothing_to_speak", "text")


@pytest.mark.parametrize("form", ["mp3", "opus", "aac", "flac", "wav", "pcm"])
@pytest.mark.parametrize("manner", [{}, {"stream": False}, {"stream_format": "sse"}])
def test_silence_comes_in_every_format_and_manner(
        worker: Worker, form: str, manner: dict[str, Any]) -> None:
    answer = worker.call("/v1/audio/speech", {"input": ".", "response_format": form, **manner})
    body = answer.body
    if "stream_format" in manner:
        events = [json.loads(line[6:]) for line in body.split(b"\n\n") if line]
        assert events[-1]["type"] == "speech.audio.done"
        body = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    samples = decode(body, form)
    assert answer.status == 200 and len(samples) >= 5000 and np.abs(samples).max() < 0.01


@pytest.mark.parametrize("field", ["text", "input"])
@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_text_stays_an_error(worker: Worker, field: str, text: str) -> None:
    path = {"text": "/synthesize", "input": "/v1/audio/speech"}[field]
    expect_error(worker.call(path, {field: text}), 400, "empty_text", field)


def test_a_voice_that_is_none_is_an_error_for_silence_too(worker: Worker) -> None:
    answer = worker.call("/v1/audio/speech", {"input": ".", "voice": "nobody"})
    assert "GET /v1/audio/voices lists all" in expect_error(answer, 400, "unknown_voice", "voice")
    assert "GET /voices lists all" in worker.speak("Hi.", voice="nobody").json["error"]["message"]


# Listings


@pytest.fixture(scope="module")
def locked(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker with a key, on a model whose folder's path nobody needs to know."""
    folder = tmp_path_factory.mktemp("secret place") / "my-bark"
    shutil.copytree(toy, folder)
    with running_worker(BARK_MODEL=str(folder), BARK_API_KEY=KEY) as worker:
        worker.wait_for("ready")
        yield worker


LISTINGS = ("/voices", "/v1/models", "/v1/models/tts-1", "/v1/audio/models", "/v1/audio/voices")


def test_listings_need_no_key_and_tell_no_path(locked: Worker) -> None:
    for path in (*LISTINGS, "/health", "/"):
        answer = locked.call(path)
        assert answer.status == 200 and b"secret place" not in answer.body
    assert locked.health()["model_id"] == "my-bark"
    assert locked.call("/v1/models").json["data"][0]["id"] == "my-bark"
    assert locked.call("/v1/models/my-bark").json["id"] == "my-bark"
    for path in ("/synthesize", "/v1/audio/speech", "/nothing"):
        assert locked.call(path, {"text": "Hi.", "input": "Hi."}).status == 401


def test_no_path_stands_in_the_reason_of_a_failure(tmp_path: Path, bark: ModuleType) -> None:
    assert bark.without_folders(f"model folder {tmp_path}/x lacks 'a/b', see https://a.b/c/d;"
                                   " suno/bark, GET /voices, ~/m/n") == (
        "model folder x lacks 'a/b', see https://a.b/c/d; suno/bark, GET /voices, n")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/models", "/models/"])
def test_models_are_listed_as_openai_does(worker: Worker, path: str) -> None:
    listing = worker.call(path).json
    assert listing["object"] == "list" and "tts-1" in [model["id"] for model in listing["data"]]


def test_the_listings_that_open_webui_asks_for(worker: Worker) -> None:
    models = worker.call("/v1/audio/models").json["models"]
    assert [model["id"] for model in models][1:] == ["tts-1", "tts-1-hd", "gpt-4o-mini-tts"]
    voices = worker.call("/v1/audio/voices").json["voices"]
    assert voices[0]["id"] == "alloy"


def test_a_model_tells_its_voices_as_wyoming_openai_reads_them(worker: Worker) -> None:
    voices = worker.call("/v1/models/tts-1").json["voices"]
    assert voices[0] == {"name": "alloy", "language": "en"}
    assert {"name": "v2/de_speaker_3", "language": "de"} in voices


def test_every_name_that_is_listed_can_be_sent(bark: ModuleType, toy: Path) -> None:
    narrator = bark.Narrator(bark.ModelFacts(toy), "v2/en_speaker_6")
    voices = narrator.voices
    for listed, also in ((voices.listed(), {}), (voices.listed_for_openai(), voices.openais())):
        for voice in listed:
            assert voice["name"] == voice["id"]
            target, _ = voices.find(voice["id"], also)
            assert narrator.plan("Hi.", target, 1).voice == voice.get("alias_of", voice["id"])


def test_a_few_of_the_listed_names_speak(worker: Worker) -> None:
    for voice in worker.call("/v1/audio/voices").json["voices"][:16]:
        answer = worker.call("/v1/audio/speech", {"input": "Hi.", "voice": voice["name"],
                                                  "response_format": "pcm"})
        assert answer.status == 200 and len(answer.body) > 1000


# Sloppy values


@pytest.mark.parametrize("voice", [" Onyx ", "ONYX", "Male", "V2/EN_Speaker_6", "default", "", None,
                                   {"id": "Onyx"}, " Default"])
def test_a_voice_is_known_with_blanks_around_it_and_in_any_case(
        worker: Worker, voice: object) -> None:
    answer = worker.call("/v1/audio/speech", {"input": "Hi.", "voice": voice, "seed": 3,
                                              "response_format": "pcm"})
    exact = worker.call("/v1/audio/speech", {"input": "Hi.", "voice": "v2/en_speaker_6", "seed": 3,
                                             "response_format": "pcm"})
    assert answer.status == 200 and answer.body == exact.body


def test_an_exact_name_comes_before_one_in_other_letters(bark: ModuleType, toy: Path) -> None:
    facts = bark.ModelFacts(toy)
    facts.voices["MALE"] = facts.voices["v2/en_speaker_2"]
    voices = bark.Narrator(facts, "v2/en_speaker_6").voices
    assert voices.find("MALE")[0] == "MALE"
    assert voices.find("male")[0] == "v2/en_speaker_6"


@pytest.mark.parametrize("form", ["FLAC", " flac\n", "Flac"])
def test_a_format_is_known_with_blanks_around_it_and_in_any_case(worker: Worker, form: str) -> None:
    assert worker.speak("Hi.", format=form).json["format"] == "flac"


def test_an_empty_string_counts_as_absent(worker: Worker) -> None:
    empty = dict.fromkeys(("voice", "format", "seed", "speed", "temperature", "min_eos_p", "stream",
                           "expressive"), "")
    answer = worker.speak("Hi.", **empty)
    assert answer.status == 200 and answer.json["audio"] == worker.speak("Hi.").json["audio"]


@pytest.mark.parametrize("path", ["/v1/audio/speech/", "/audio/speech", "/audio/speech/",
                                  "/v1//audio/speech", "//v1/audio/speech"])
def test_a_slash_too_many_and_a_missing_v1_are_forgiven(worker: Worker, path: str) -> None:
    assert worker.call(path, {"input": "Hi.", "response_format": "pcm"}).status == 200


@pytest.mark.parametrize("path", ["/v1/synthesise", "/audio", "/v1", "/v1/", "/v1/v1/models",
                                  "/audio/speech/x"])
def test_other_paths_are_not_guessed_at(worker: Worker, path: str) -> None:
    expect_error(worker.call(path), 404, "not_found")


# Formats and connections


@pytest.mark.parametrize("manner", [{}, {"stream": True}, {"stream_format": "sse"}])
def test_flac_is_sent_whole_so_that_soundfile_reads_it(
        worker: Worker, manner: dict[str, Any]) -> None:
    answer = worker.call("/v1/audio/speech", {"input": "One.\n\nTwo.\n\nThree.", **manner,
                                              "response_format": "flac"})
    body = answer.body
    if "stream_format" in manner:
        (audio, _) = [json.loads(line[6:]) for line in body.split(b"\n\n") if line]
        body = base64.b64decode(audio["audio"])
    samples, rate = soundfile.read(io.BytesIO(body))
    assert rate == 24_000 and len(samples) > rate


def test_who_speaks_tls_is_closed_at_once_and_named_once_in_the_log(worker: Worker) -> None:
    for _ in range(3):
        with connect(worker) as connection, pytest.raises(
                ssl.SSLError):
            ssl.create_default_context().wrap_socket(connection, server_hostname="localhost")
    wait_until(lambda: any("speaks TLS" in line for line in worker.log), "line in the log")
    assert sum("speaks TLS" in line for line in worker.log) == 1
    with connect(worker) as connection:  # the others are served as ever
        connection.sendall(synthesis({"text": "Hi."}, "Connection: close"))
        assert read_all(connection).startswith(b"HTTP/1.1 200")
