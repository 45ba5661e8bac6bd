"""OpenAI's speech API, as its own client, httpx, curl and a browser's rules find it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from conftest import WORKER, Answer, Worker, running_worker, wait_until
from decoding import RATE, STREAM_EXCESS, WHOLE_EXCESS, decode
from openai import DefaultHttpxClient, OpenAI
from test_server import write_launcher

KEY = "sesame-9f2c"
FORMATS = {"mp3": "audio/mpeg", "opus": "audio/ogg", "aac": "audio/aac", "flac": "audio/flac",
           "wav": "audio/wav", "pcm": "audio/pcm"}
ORIGIN = "https://reader.example"  # the one that conftest's worker allows
PARAGRAPHS = "One.\n\nTwo."

# bark-worker.py, but its engine stops after so many segments as the file "plan" says and waits at
# the pipe "gate" for an order: to go on, to fail as a device does, or to spoil the next segment.
# "made" grows by a byte a segment.
PACED = """\
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("bark_worker", {worker!r})
worker = importlib.util.module_from_spec(spec)
sys.modules["bark_worker"] = worker
spec.loader.exec_module(worker)
worker.RETRY_FULL = 0.05
folder = pathlib.Path({folder!r})
step, count = worker.Engine.step, 0

def paced(engine):
    global count
    order, plan = "", folder / "plan"
    planned = plan.exists()
    if planned and count >= int(plan.read_text()):
        plan.unlink()
        planned, order = False, (folder / "gate").read_text()
    if order == "fail":
        count = 0
        raise RuntimeError("told to fail")
    done = step(engine)
    while order == "spoil" and not done:
        done = step(engine)
    count = count + len(done) if planned else 0
    with (folder / "made").open("ab") as made:
        made.write(b"x" * len(done))
    return [each._replace(samples=None, error="told to") for each in done] \\
        if order == "spoil" else done

worker.Engine.step = paced
sys.exit(worker.main())
"""


# Workers and clients of this file

@dataclass
class Paced:
    """A worker with one slot, a key and one place to wait, whose engine obeys the test."""

    worker: Worker
    folder: Path

    def hold(self, segments: int) -> None:
        """The engine is to stop once it has made so many more segments."""
        plan = self.folder / "plan.new"
        plan.write_text(str(segments))
        plan.rename(self.folder / "plan")

    def release(self, order: str = "go") -> None:
        """Waits until the engine has stopped, and gives it its order."""
        (self.folder / "gate").write_text(order)

    @property
    def made(self) -> int:
        return (self.folder / "made").stat().st_size


@pytest.fixture(scope="module")
def paced(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paced]:
    folder = tmp_path_factory.mktemp("paced")
    os.mkfifo(folder / "gate")
    script = folder / "launch.py"
    script.write_text(PACED.format(worker=str(WORKER), folder=str(folder)))
    with running_worker(script, BARK_MODEL=str(toy), BARK_API_KEY=KEY, BARK_MAX_BATCH="1",
                        BARK_MAX_QUEUE="1", BARK_CORS_ORIGINS="*",
                        BARK_VOICE="v2/en_speaker_4") as worker:  # the toy's quickest
        worker.wait_for("ready")
        yield Paced(worker, folder)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker that has no model, and all settings but that as they are by default."""
    folder = tmp_path_factory.mktemp("nothing")
    script = write_launcher(folder, FAILED_SECONDS=600.0)
    with running_worker(script, BARK_MODEL=str(folder)) as worker:
        worker.wait_for("failed")
        yield worker


@contextlib.contextmanager
def sdk(worker: Worker, retries: int = 0, key: str = KEY,
        on_answer: Callable[[httpx2.Response], None] = lambda answer: None) -> Iterator[OpenAI]:
    """OpenAI's client; `on_answer` is called once the head of an answer is there."""
    http_client = DefaultHttpxClient(event_hooks={"response": [on_answer]}, trust_env=False)
    with OpenAI(base_url=f"{worker.url}/v1", api_key=key, max_retries=retries,
                http_client=http_client) as client:
        yield client


@pytest.fixture(scope="module")
def client(worker: Worker) -> Iterator[OpenAI]:
    with sdk(worker) as client:
        yield client


@pytest.fixture(scope="module")
def spoken(worker: Worker) -> dict[str, dict[str, Any]]:
    """What the worker's own API says of two texts."""
    return {text: worker.speak(text, format="pcm").json for text in ("Hi.", PARAGRAPHS)}


@pytest.fixture(scope="module")
def whole(spoken: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """Their samples."""
    return {text: decode(base64.b64decode(reply["audio"]), "pcm")
            for text, reply in spoken.items()}


@pytest.fixture
def text(numbers: Iterator[int]) -> str:
    """Two segments that no other test has put into the cache."""
    return f"Number {next(numbers)}.\n\nEnd."


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return itertools.count()


def asked(text: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": "tts-1", "voice": "alloy", "input": text} | fields


def speak(client: OpenAI, text: str, **fields: Any) -> Any:
    return client.audio.speech.create(**asked(text, fields))


def speak_streamed(client: OpenAI, text: str, **fields: Any) -> Any:
    return client.audio.speech.with_streaming_response.create(**asked(text, fields))


def queue(worker: Worker) -> tuple[int, int]:
    stats = worker.health()["queue"]
    return stats["running"], stats["waiting"]


def post(worker: Worker, path: str, **fields: Any) -> Answer:
    return worker.call(path, fields, headers={"Authorization": f"Bearer {KEY}"})


def lines_of(body: bytes) -> list[dict[str, Any]]:
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


# Speech

@pytest.mark.parametrize("form", FORMATS)
def test_create_gives_the_whole_audio_in_every_format(
        client: OpenAI, whole: dict[str, np.ndarray], form: str) -> None:
    reply = speak(client, "Hi.", response_format=form)
    assert reply.response.headers["Content-Type"] == FORMATS[form]
    assert int(reply.response.headers["Content-Length"]) == len(reply.content)
    length, heard = len(whole["Hi."]), decode(reply.content, form)
    assert 0 <= len(heard) - length <= WHOLE_EXCESS.get(form, 0)
    assert form in ("mp3", "opus", "aac") or np.array_equal(heard, whole["Hi."])
    assert float(reply.response.headers["X-Bark-Duration"]) == pytest.approx(
        length / RATE, abs=1e-4)


@pytest.mark.parametrize("form", FORMATS)
def test_a_streamed_answer_decodes_to_its_full_length_in_every_format(
        client: OpenAI, whole: dict[str, np.ndarray], form: str, tmp_path: Path) -> None:
    file = tmp_path / f"speech.{form}"
    with speak_streamed(client, PARAGRAPHS, response_format=form) as reply:
        assert reply.headers["Content-Type"] == FORMATS[form]
        reply.stream_to_file(file)
    heard = decode(file.read_bytes(), form)
    assert 0 <= len(heard) - len(whole[PARAGRAPHS]) <= STREAM_EXCESS.get(form, 0)
    assert form in ("mp3", "opus", "aac") or np.array_equal(heard, whole[PARAGRAPHS])


def test_what_create_returns_can_be_iterated_and_written_to_a_file(
        client: OpenAI, tmp_path: Path) -> None:
    reply = speak(client, "Hi.", response_format="wav")
    reply.write_to_file(tmp_path / "written.wav")
    with pytest.warns(DeprecationWarning, match="stream"):  # people call it all the same
        reply.stream_to_file(tmp_path / "streamed.wav")
    pieces = list(reply.iter_bytes(1000))
    assert len(pieces) > 10 and b"".join(pieces) == reply.content
    for file in tmp_path.iterdir():
        assert file.read_bytes() == reply.content


def test_mp3_is_what_comes_when_no_format_is_named(client: OpenAI) -> None:
    reply = speak(client, "Hi.")
    assert reply.response.headers["Content-Type"] == "audio/mpeg"
    assert reply.content == speak(client, "Hi.", response_format="mp3").content


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "flac"])
def test_the_first_sound_comes_while_the_rest_is_still_to_be_made(
        paced: Paced, form: str, text: str) -> None:
    paced.hold(1)
    with sdk(paced.worker) as client:
        with speak_streamed(client, text, response_format=form) as reply:
            assert reply.headers["Transfer-Encoding"] == "chunked"
            assert "Content-Length" not in reply.headers
            pieces = reply.iter_bytes()
            first = next(pieces)
            assert queue(paced.worker) == (1, 0)
            paced.release()  # it had stopped before the second segment
            rest = list(pieces)
        whole = decode(speak(client, text, response_format="pcm").content, "pcm")
    heard = decode(first + b"".join(rest), form)
    assert rest and 0 <= len(heard) - len(whole) <= STREAM_EXCESS.get(form, 0)
    assert form in ("mp3", "opus", "aac") or np.array_equal(heard, whole)


def test_a_streamed_wav_has_one_head_with_open_sizes(paced: Paced, text: str) -> None:
    paced.hold(1)
    with sdk(paced.worker) as client, \
            speak_streamed(client, text, response_format="wav") as reply:
        paced.release()
        data = reply.read()
    assert data[:8] == b"RIFF\xff\xff\xff\xff" and data[36:44] == b"data\xff\xff\xff\xff"
    assert data.count(b"RIFF") == 1 and data.count(b"WAVEfmt ") == 1


def test_who_wants_no_stream_gets_the_sizes(paced: Paced, text: str) -> None:
    with sdk(paced.worker) as client:
        reply = speak(client, text, response_format="wav", extra_body={"stream": False})
    assert int(reply.response.headers["Content-Length"]) == len(reply.content)
    assert int.from_bytes(reply.content[40:44], "little") == len(reply.content) - 44


@pytest.mark.parametrize("form", ["mp3", "opus", "pcm"])
def test_events_are_deltas_that_join_to_the_stream_and_then_done_with_usage(
        paced: Paced, form: str, text: str) -> None:
    paced.hold(1)
    with sdk(paced.worker) as client:
        with speak_streamed(client, text, response_format=form, stream_format="sse") as reply:
            assert reply.headers["Content-Type"] == "text/event-stream"
            pieces = reply.iter_bytes()
            body = next(pieces)
            assert body.startswith(b'data: {"type": "speech.audio.delta"')
            assert queue(paced.worker) == (1, 0)
            paced.release()
            body += b"".join(pieces)
        whole = decode(speak(client, text, response_format="pcm").content, "pcm")
    *blocks, end = body.decode().split("\n\n")
    assert end == "" and all("\n" not in block for block in blocks)
    *deltas, done = [json.loads(block.removeprefix("data: ")) for block in blocks]
    assert len(deltas) >= 2
    assert all(set(delta) == {"type", "audio"} for delta in deltas)
    heard = decode(b"".join(base64.b64decode(d["audio"], validate=True) for d in deltas), form)
    assert 0 <= len(heard) - len(whole) <= STREAM_EXCESS.get(form, 0)
    assert set(done) == {"type", "usage"} and done["type"] == "speech.audio.done"
    usage = done["usage"]
    assert set(usage) == {"input_tokens", "output_tokens", "total_tokens"}
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens"] >= 2
    assert usage["output_tokens"] == pytest.approx(49.9 * len(whole) / RATE, abs=1)


def test_model_and_instructions_may_say_anything(client: OpenAI) -> None:
    plain = speak(client, "Hi.", response_format="pcm").content
    for fields in ({"model": "kokoro"}, {"model": "gpt-4o-mini-tts"}, {"instructions": "Whisper."},
                   {"extra_body": {"lang_code": "a", "volume_multiplier": 2}}):
        assert speak(client, "Hi.", response_format="pcm", **fields).content == plain


@pytest.mark.parametrize(("name", "own"), [
    ("alloy", "v2/en_speaker_6"), ("ash", "v2/en_speaker_3"), ("nova", "v2/en_speaker_9"),
    ({"id": "fable"}, "v2/en_speaker_1"), ({"id": "v2/de_speaker_2"}, "v2/de_speaker_2"),
    ("female", "v2/en_speaker_9")])
def test_openais_voices_and_the_models_own_can_be_named(
        worker: Worker, client: OpenAI, name: object, own: str) -> None:
    reply = speak(client, "Hi.", voice=name, response_format="pcm")
    assert reply.content == base64.b64decode(
        worker.speak("Hi.", voice=own, format="pcm").json["audio"])


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.5, 4.0])
def test_speed_changes_the_length_and_nothing_else_in_the_answer(
        client: OpenAI, whole: dict[str, np.ndarray], speed: float) -> None:
    reply = speak(client, "Hi.", response_format="pcm", speed=speed)
    assert len(reply.content) == 2 * round(len(whole["Hi."]) / speed)
    assert float(reply.response.headers["X-Bark-Duration"]) == pytest.approx(
        len(reply.content) / 2 / RATE, abs=1e-4)


# Lists

def test_models_can_be_listed_and_each_of_them_retrieved(client: OpenAI, toy: Path) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [toy.name, "tts-1", "tts-1-hd", "gpt-4o-mini-tts"]
    for model in models:
        assert (model.object, model.owned_by) == ("model", "bark-worker") and model.created > 1e9
        found = client.models.retrieve(model.id).to_dict()
        assert found.pop("voices") and found == model.to_dict()


def test_voices_are_listed_as_readers_expect_them(worker: Worker, client: OpenAI) -> None:
    answer = httpx2.get(f"{worker.url}/v1/audio/voices", trust_env=False)
    voices = {voice["id"]: voice for voice in answer.json()["voices"]}
    assert len(voices) == len(answer.json()["voices"]) == 13 + 133
    assert all(isinstance(voice["name"], str) for voice in voices.values())
    assert {"alloy", "cedar", "marin", "verse", "female", "v2/zh_speaker_9"} <= set(voices)
    assert voices["ash"]["alias_of"] == "v2/en_speaker_3"


# Errors

@pytest.mark.parametrize(("fields", "kind", "code", "param"), [
    ({"input": "a" * 4097}, openai.BadRequestError, "text_too_long", "input"),
    ({"input": " "}, openai.BadRequestError, "empty_text", "input"),
    ({"voice": "nobody"}, openai.BadRequestError, "unknown_voice", "voice"),
    ({"voice": {"name": "onyx"}}, openai.BadRequestError, "invalid_type", "voice"),
    ({"response_format": "ogg"}, openai.BadRequestError, "invalid_value", "response_format"),
    ({"stream_format": "json"}, openai.BadRequestError, "invalid_value", "stream_format"),
    ({"speed": 4.01}, openai.BadRequestError, "invalid_value", "speed"),
    ({"speed": "fast"}, openai.BadRequestError, "invalid_type", "speed"),
    ({"extra_body": {"stream": 1}}, openai.BadRequestError, "invalid_type", "stream"),
], ids=lambda value: value if isinstance(value, str) else None)
def test_the_client_is_told_what_is_wrong_and_does_not_ask_again(
        worker: Worker, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str,
        param: str) -> None:
    answers: list[httpx2.Response] = []
    with sdk(worker, retries=2, on_answer=answers.append) as client, \
            pytest.raises(kind) as caught:
        speak(client, "Hi.", **fields)
    check_error(caught.value, "invalid_request_error", code, param)
    [answer] = answers
    assert answer.headers["X-Should-Retry"] == "false"
    assert caught.value.request_id == answer.headers["X-Request-Id"]


def check_error(error: Any, kind: str, code: str, param: str | None = None) -> None:
    assert (error.type, error.code, error.param) == (kind, code, param)
    assert set(error.body) == {"message", "type", "param", "code"}
    assert error.body["message"] in error.message and error.body["message"]
    assert error.request_id


def test_a_text_of_4096_characters_is_taken_whatever_synthesize_allows(worker: Worker) -> None:
    with sdk(worker) as client, speak_streamed(client, ("word " * 820)[:4096]) as reply:
        assert reply.status_code == 200


def test_a_wrong_key_and_none_are_told_as_such(paced: Paced) -> None:
    with sdk(paced.worker, retries=2, key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            speak(client, "Hi.")
        check_error(caught.value, "invalid_request_error", "invalid_api_key")
        assert client.models.list().data  # it tells no secret
    answer = httpx2.post(f"{paced.worker.url}/v1/audio/speech", trust_env=False)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


def test_a_model_that_is_not_there_and_a_path_that_is_not_there_are_404(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("whisper-1")
    check_error(caught.value, "invalid_request_error", "model_not_found")
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="tts-1", input="Hi.", encoding_format="float")
    check_error(caught.value, "invalid_request_error", "not_found")


def test_a_worker_without_a_model_is_not_asked_again(failed: Worker) -> None:
    answers: list[httpx2.Response] = []
    with sdk(failed, retries=2, on_answer=answers.append) as client, \
            pytest.raises(openai.InternalServerError) as caught:
        speak(client, "Hi.")
    check_error(caught.value, "server_error", "not_ready")
    assert [answer.status_code for answer in answers] == [503]


# Trying again

@contextlib.contextmanager
def full(paced: Paced, text: str) -> Iterator[list[Any]]:
    """One request at work and one that waits, until the test releases them; their answers."""
    replies: list[Any] = []
    paced.hold(0)
    with ThreadPoolExecutor() as pool:
        for number, expected in enumerate([(1, 0), (1, 1)]):
            replies.append(pool.submit(
                post, paced.worker, "/v1/audio/speech", input=f"{number} {text.splitlines()[0]}"))
            wait_until(lambda expected=expected: queue(paced.worker) == expected, "full queue")
        yield replies
    assert [reply.result().status for reply in replies] == [200, 200]


def test_a_full_queue_is_asked_again_until_there_is_room(paced: Paced, text: str) -> None:
    statuses = []

    def make_room(answer: httpx2.Response) -> None:
        statuses.append(answer.status_code)
        if statuses == [503]:
            assert answer.headers["Retry-After"] and "X-Should-Retry" not in answer.headers
            paced.release()
            wait_until(lambda: queue(paced.worker) == (0, 0), "free queue")

    with full(paced, text), sdk(paced.worker, retries=2, on_answer=make_room) as client:
        assert speak(client, text).content
    assert statuses == [503, 200]


def test_a_full_queue_is_told_to_who_does_not_try_again(paced: Paced, text: str) -> None:
    with full(paced, text), sdk(paced.worker) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            speak(client, text)
        paced.release()
    check_error(caught.value, "server_error", "queue_full")
    assert caught.value.status_code == 503


def test_a_repeated_request_is_answered_from_memory_although_the_queue_is_full(
        paced: Paced, text: str) -> None:
    with sdk(paced.worker) as client:
        first = speak(client, text, response_format="pcm").content
        with full(paced, text):
            made = paced.made
            assert speak(client, text, response_format="pcm").content == first
            flac = speak(client, text, response_format="flac", speed=2).content
            assert len(decode(flac, "flac")) == pytest.approx(len(first) / 4, abs=4)
            assert (queue(paced.worker), paced.made) == ((1, 1), made)
            paced.release()


def test_another_take_of_one_segment_leaves_the_others_to_memory(
        paced: Paced, text: str) -> None:
    post(paced.worker, "/synthesize", text=text)
    for seeds, takes in (({"1": 1}, 1), ({"1": 1}, 0), ({}, 0), ({"1": 2}, 1)):
        made = paced.made
        answer = post(paced.worker, "/synthesize", text=text, seeds=seeds)
        assert answer.status == 200 and paced.made - made == takes, seeds


def ordered(paced: Paced, text: str, order: str) -> tuple[Future[Any], list[int]]:
    """What a client that tries again gets if its first segment meets that order; all statuses."""
    statuses: list[int] = []
    paced.hold(0)
    with ThreadPoolExecutor() as pool, sdk(
            paced.worker, retries=2, on_answer=lambda a: statuses.append(a.status_code)) as client:
        reply = pool.submit(speak, client, text)
        paced.release(order)
        reply.exception()  # waits for it
    return reply, statuses


def test_audio_that_is_spoilt_for_good_is_not_asked_for_again(paced: Paced, text: str) -> None:
    reply, statuses = ordered(paced, text, "spoil")
    with pytest.raises(openai.InternalServerError) as caught:
        reply.result()
    check_error(caught.value, "server_error", "generation_failed")
    assert statuses == [503]


def test_a_device_that_failed_once_is_asked_again(paced: Paced, text: str) -> None:
    reply, statuses = ordered(paced, text, "fail")
    assert reply.result().content and statuses == [503, 200]


# What fails after the head of the answer has gone out

@pytest.mark.parametrize("order", ["fail", "spoil"])
@pytest.mark.parametrize("fields", [{}, {"response_format": "wav"}, {"stream_format": "sse"}],
                         ids=["mp3", "wav", "sse"])
def test_the_sdk_does_not_take_a_part_for_the_whole(
        paced: Paced, text: str, fields: dict[str, Any], order: str) -> None:
    paced.hold(1)
    with sdk(paced.worker, on_answer=lambda _: paced.release(order)) as client, \
            pytest.raises(openai.APIConnectionError):
        speak(client, text, **fields)
    assert queue(paced.worker) == (0, 0)


def test_the_sdk_does_not_take_a_part_for_the_whole_while_it_streams_either(
        paced: Paced, text: str, tmp_path: Path) -> None:
    paced.hold(1)
    with sdk(paced.worker) as client, speak_streamed(client, text) as reply:
        pieces = reply.iter_bytes()
        assert next(pieces)
        paced.release("fail")
        with pytest.raises(httpx2.RemoteProtocolError):
            list(pieces)


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/synthesize"])
def test_httpx_does_not_take_a_part_for_the_whole(paced: Paced, text: str, path: str) -> None:
    paced.hold(1)
    body = {"input": text, "text": text, "stream": True}
    with httpx2.stream("POST", paced.worker.url + path, json=body, trust_env=False,
                       headers={"Authorization": f"Bearer {KEY}"}) as reply:
        assert reply.status_code == 200
        paced.release("fail")
        with pytest.raises(httpx2.RemoteProtocolError):
            reply.read()


@pytest.mark.parametrize("version", ["--http1.1", "--http1.0"])
def test_curl_does_not_take_a_part_for_the_whole(
        paced: Paced, text: str, version: str, tmp_path: Path) -> None:
    """HTTP/1.0 has nothing to tell a cut from an end: there, nothing comes but the error."""
    paced.hold(1)
    with subprocess.Popen(
            ["curl", "-sS", "-N", "-i", version, "--noproxy", "*", "-d",
             json.dumps({"input": text}), "-H", "Content-Type: application/json", "-H",
             f"Authorization: Bearer {KEY}", f"{paced.worker.url}/v1/audio/speech"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE) as curl:
        assert curl.stdout
        head = curl.stdout.read(12) if version == "--http1.1" else b""
        paced.release("fail")
        rest, _ = curl.communicate(timeout=30)
    if version == "--http1.1":
        assert head == b"HTTP/1.1 200" and curl.returncode in (18, 56)
    else:
        assert rest.startswith(b"HTTP/1.1 503 ") and b"generation_failed" in rest


def test_a_cut_stream_is_asked_for_again_and_goes_on_from_memory(paced: Paced, text: str) -> None:
    counts, made = [], paced.made

    def cut_the_first(answer: httpx2.Response) -> None:
        counts.append(answer.request.headers["x-stainless-retry-count"])
        if counts == ["0"]:
            paced.release("fail")

    paced.hold(1)
    with sdk(paced.worker, retries=2, on_answer=cut_the_first) as client:
        reply = speak(client, text, response_format="pcm")
    assert counts == ["0", "1"] and paced.made - made == 2  # the first was not made again
    spoken = post(paced.worker, "/synthesize", text=text, format="pcm").json["audio"]
    assert reply.content == base64.b64decode(spoken)


@pytest.mark.long  # for a worker of its own
def test_a_stream_over_its_time_is_cut(toy: Path) -> None:
    long = "The old miller walked down to the river and looked at the slow brown water. " * 50
    with running_worker(BARK_MODEL=str(toy), BARK_MAX_BATCH="1", BARK_TIMEOUT="4") as worker:
        worker.wait_for("ready")
        with sdk(worker) as client, speak_streamed(client, long) as reply:
            assert reply.status_code == 200
            with pytest.raises(httpx2.RemoteProtocolError):
                reply.read()


# /synthesize

@pytest.mark.parametrize("form", FORMATS)
def test_lines_are_the_segments_in_order_and_then_the_totals(
        worker: Worker, spoken: dict[str, dict[str, Any]], whole: dict[str, np.ndarray],
        form: str) -> None:
    answer = worker.speak(PARAGRAPHS, stream=True, format=form)
    assert answer.status == 200 and answer.headers["Content-Type"] == "application/x-ndjson"
    *lines, closing = lines_of(answer.body)
    heard = np.zeros(len(whole[PARAGRAPHS]), np.int16)
    for index, line in enumerate(lines):
        sound = decode(base64.b64decode(line.pop("audio"), validate=True), form)
        start, end = (round(line[name] * RATE) for name in ("start", "end"))
        assert 0 <= len(sound) - (end - start) <= WHOLE_EXCESS.get(form, 0) + 1  # of rounding
        heard[start:end] = sound[: end - start]
        assert line.pop("index") == index
    assert lines == spoken[PARAGRAPHS]["segments"] and len(lines) == 2
    assert form in ("mp3", "opus", "aac") or np.array_equal(heard, whole[PARAGRAPHS])
    assert 0 < closing.pop("synthesis_time") < 60
    assert closing == {"status": "success", "segments": 2, "format": form} | {
        name: spoken[PARAGRAPHS][name] for name in ("sample_rate", "duration", "voice", "seed")}


def test_places_and_totals_are_those_of_the_stretched_audio(worker: Worker) -> None:
    *lines, closing = lines_of(worker.speak(PARAGRAPHS, stream=True, format="pcm", speed=2).body)
    spoken = worker.speak(PARAGRAPHS, format="pcm", speed=2).json
    audio = base64.b64decode(spoken["audio"])
    for line in lines:
        start, end = (2 * round(line[name] * RATE) for name in ("start", "end"))
        assert base64.b64decode(line["audio"]) == audio[start:end]
    assert closing["duration"] == spoken["duration"] == pytest.approx(
        len(audio) / 2 / RATE, abs=1e-4)
    assert lines[1]["start"] - lines[0]["end"] == pytest.approx(0.25, abs=1e-3)  # half a pause


@contextlib.contextmanager
def lines_after_the_first(paced: Paced, text: str) -> Iterator[Iterator[str]]:
    with httpx2.stream("POST", f"{paced.worker.url}/synthesize", trust_env=False,
                       json={"text": text, "stream": True},
                       headers={"Authorization": f"Bearer {KEY}"}) as reply:
        lines = reply.iter_lines()
        assert json.loads(next(lines))["index"] == 0
        yield lines


def test_a_line_comes_while_the_rest_is_still_to_be_made(paced: Paced, text: str) -> None:
    paced.hold(1)
    with lines_after_the_first(paced, text) as lines:
        assert queue(paced.worker) == (1, 0)
        paced.release()
        assert len(list(lines)) == 2


def test_a_failure_behind_the_first_line_is_the_last_line(paced: Paced, text: str) -> None:
    paced.hold(1)
    with lines_after_the_first(paced, text) as lines:
        paced.release("spoil")
        failure = json.loads(next(lines))
        with pytest.raises(httpx2.RemoteProtocolError):
            next(lines)
    assert failure["status"] == "error" and failure["error"]["code"] == "generation_failed"
    assert set(failure["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/synthesize"])
def test_hanging_up_in_the_middle_frees_the_engine(paced: Paced, text: str, path: str) -> None:
    made = paced.made
    paced.hold(1)
    with httpx2.stream("POST", paced.worker.url + path, trust_env=False,
                       json={"text": text, "input": text, "stream": True},
                       headers={"Authorization": f"Bearer {KEY}"}) as reply:
        assert reply.status_code == 200 and queue(paced.worker) == (1, 0)
    paced.release()
    wait_until(lambda: queue(paced.worker) == (0, 0), "free engine")
    assert paced.made - made == 1


@pytest.mark.parametrize(("accept", "form"), [
    ("audio/mpeg", "mp3"), ("audio/ogg", "opus"), ("audio/flac;q=0.9, */*;q=0.1", "flac")])
def test_accept_asks_synthesize_for_what_openais_path_gives(
        worker: Worker, client: OpenAI, accept: str, form: str) -> None:
    answer = worker.call("/synthesize", {"text": "Hi.", "voice": "v2/en_speaker_6"},
                         headers={"Accept": accept})
    assert answer.headers["Content-Type"] == FORMATS[form]
    assert answer.body == speak(client, "Hi.", response_format=form).content


# HTTP/1.0, which has no chunks

@pytest.mark.parametrize("fields", [
    {"input": PARAGRAPHS, "response_format": "wav"},
    {"input": PARAGRAPHS, "stream_format": "sse"}, {"text": PARAGRAPHS, "stream": True}],
    ids=["audio", "sse", "lines"])
def test_http_1_0_gets_a_length_and_no_chunks(
        worker: Worker, whole: dict[str, np.ndarray], fields: dict[str, Any]) -> None:
    data = json.dumps(fields).encode()
    path = "/synthesize" if "text" in fields else "/v1/audio/speech"
    with socket.create_connection(("127.0.0.1", worker.port), timeout=30) as connection:
        connection.sendall(f"POST {path} HTTP/1.0\r\nContent-Type: application/json\r\n"
                           f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        reply = http.client.HTTPResponse(connection, method="POST")
        reply.begin()
        body = reply.read()
        assert connection.recv(1) == b""
    assert reply.status == 200 and reply.getheader("Transfer-Encoding") is None
    assert int(reply.getheader("Content-Length", "0")) == len(body) > 0
    if "response_format" in fields:
        assert np.array_equal(decode(body, "wav"), whole[PARAGRAPHS])
        assert int.from_bytes(body[40:44], "little") == len(body) - 44  # its head is true, too
    else:
        assert body.rstrip().endswith(b"}") and b"\r\n" not in body


# Pages of other origins

PREFLIGHT = {"Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization, content-type"}


def allowed(answer: Answer) -> str | None:
    return answer.headers.get("Access-Control-Allow-Origin")


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/synthesize", "/v1/models", "/voices"])
def test_a_preflight_needs_no_key(paced: Paced, path: str) -> None:
    answer = paced.worker.call(path, method="OPTIONS", headers={"Origin": ORIGIN, **PREFLIGHT})
    assert answer.status == 204 and answer.body == b"" and allowed(answer) == "*"
    method = "POST" if path in ("/v1/audio/speech", "/synthesize") else "GET"
    assert method in answer.headers["Access-Control-Allow-Methods"]
    assert answer.headers["Access-Control-Allow-Headers"].startswith("Authorization")


def test_the_request_behind_a_preflight_does_need_the_key_and_its_error_can_be_read(
        paced: Paced) -> None:
    answer = paced.worker.call("/v1/audio/speech", {"input": "Hi."}, headers={"Origin": ORIGIN})
    assert answer.status == 401 and allowed(answer) == "*"


def test_an_allowed_origin_reads_audio_errors_and_headers(worker: Worker) -> None:
    for fields, status in (({"input": "Hi."}, 200), ({"input": ""}, 400), ({"input": "*"}, 200)):
        answer = worker.call("/v1/audio/speech", fields, headers={"Origin": ORIGIN})
        assert answer.status == status and allowed(answer) == ORIGIN
        exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
        assert {"X-Request-Id", "X-Bark-Seed", "X-Bark-Duration"} <= set(exposed)
        assert answer.headers["Vary"] == "Origin"
    answer = worker.call("/nothing", headers={"Origin": ORIGIN})
    assert answer.status == 404 and allowed(answer) == ORIGIN
    answer = worker.call("/v1/models", method="OPTIONS", headers={"Origin": ORIGIN, **PREFLIGHT})
    assert answer.status == 204 and allowed(answer) == ORIGIN


@pytest.mark.parametrize("origin", [
    "https://reader.example.evil.example", "http://reader.example", "https://READER.example",
    "https://reader.example:8443", "null", "*"])
def test_another_origin_is_given_nothing(worker: Worker, origin: str) -> None:
    for answer in (
            worker.call("/v1/models", headers={"Origin": origin}),
            worker.call("/v1/audio/speech", method="OPTIONS",
                        headers={"Origin": origin, **PREFLIGHT})):
        assert not [name for name in answer.headers if name.startswith("Access-Control")]
        assert answer.headers["Vary"] == "Origin"


def test_no_origin_is_allowed_by_default(failed: Worker) -> None:
    for answer in (
            failed.call("/v1/models", headers={"Origin": ORIGIN}),
            failed.call("/v1/audio/speech", {"input": "Hi."}, headers={"Origin": ORIGIN}),
            failed.call("/v1/audio/speech", method="OPTIONS",
                        headers={"Origin": ORIGIN, **PREFLIGHT})):
        assert not [name for name in answer.headers if name.startswith("Access-Control")]
