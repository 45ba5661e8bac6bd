"""Whatever a client sends: an answer or a closed connection, and the worker is as it was before."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Worker, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SECONDS = 20.0  # for one exchange, on a busy machine
STATUSES = {200, 204, 400, 401, 404, 405, 408, 411, 413, 414, 415, 422, 431, 501, 503, 505}
VALID = (b"POST /synthesize HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
         b'Content-Length: 27\r\n\r\n{"text": "***", "seed": 12}')

few_or_many = pytest.mark.parametrize(
    "examples", [120, pytest.param(3000, marks=pytest.mark.long)])


def attack(examples: int, **strategies: st.SearchStrategy[Any]) -> Callable[..., None]:
    """Runs the decorated function at once, with the same examples every time."""
    def run(function: Callable[..., None]) -> None:
        config = settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                          suppress_health_check=list(HealthCheck))
        config(given(**strategies)(function))()
    return run


# The worker, before and after

def process_counts(worker: Worker) -> tuple[int, int]:
    """Threads and open files."""
    process = Path("/proc") / str(worker.process.pid)
    return len(os.listdir(process / "task")), len(os.listdir(process / "fd"))


def lowest_counts(worker: Worker) -> tuple[int, int]:
    """The same without the last connection, which may be just closing."""
    counts = [process_counts(worker) for _ in range(200)]
    return min(threads for threads, _ in counts), min(files for _, files in counts)


@contextlib.contextmanager
def unharmed(worker: Worker) -> Iterator[None]:
    """Looks that what happens inside leaves the worker as it was: nothing held, nothing broken."""
    threads, files = lowest_counts(worker)
    lines = len(worker.log)
    yield
    wait_until(lambda: worker.health()["queue"]["running"] == 0, "idle engine")
    assert worker.health()["queue"]["waiting"] == 0
    wait_until(lambda: process_counts(worker)[0] <= threads, f"return to {threads} threads")
    wait_until(lambda: process_counts(worker)[1] <= files, f"return to {files} open files")
    assert worker.health()["status"] == "ready" and worker.speak("Hi.").status == 200
    text = "".join(worker.log[lines:])
    assert "Traceback" not in text and " ERROR " not in text and "status=500" not in text


# Exchanges

def send(worker: Worker, data: bytes, *, half_close: bool) -> bytes:
    """All that the worker answers to `data`; `half_close` tells it that no more will come."""
    with socket.create_connection(("127.0.0.1", worker.port), timeout=SECONDS) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return b""


def break_off(worker: Worker, data: bytes) -> None:
    """Sends `data` and resets the connection without reading."""
    with socket.create_connection(("127.0.0.1", worker.port), timeout=SECONDS) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(data)


def check_answers(reply: bytes) -> list[int]:
    """The statuses in `reply`: well-formed answers one after the other, errors with their JSON."""
    statuses = []
    while reply:
        head, _, rest = reply.partition(b"\r\n\r\n")
        match = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
        assert match, reply[:200]
        statuses.append(int(match[1]))
        assert statuses[-1] in STATUSES or statuses[-1] == 100, reply[:500]
        length = re.search(rb"\r\nContent-Length: (\d+)", head)
        bodiless = length is None or rest.startswith(b"HTTP/1.1 ")  # to HEAD, say
        size = 0 if bodiless else int(length[1])
        body, reply = rest[:size], rest[size:]
        if statuses[-1] >= 400 and body:
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code"} and len(body) < 1500
    return statuses


def post(worker: Worker, body: bytes, *headers: bytes, path: str = "/synthesize") -> int:
    """The status for `body`."""
    head = [f"POST {path} HTTP/1.1".encode(), b"Connection: close",
            b"Content-Length: %d" % len(body), *headers]
    reply = send(worker, b"\r\n".join([*head, b"", body]), half_close=False)
    [status] = check_answers(reply)
    return status


# What is sent

line_bytes = st.binary(max_size=60).map(lambda data: data.replace(b"\n", b""))
token = st.text("abcXYZ-_:;,=\"'/\\%\0\x7f\x85 \t", max_size=20).map(lambda t: t.encode("latin-1"))
header_names = st.sampled_from([
    b"Content-Length", b"Transfer-Encoding", b"Expect", b"Connection", b"Content-Type", b"Accept",
    b"Authorization", b"Host", b"Upgrade", b"Content-Encoding", b"Range", b"Origin"]) | token
header_values = token | line_bytes | st.sampled_from([
    b"0", b"-1", b"chunked", b"100-continue", b"keep-alive", b"close", b"*/*;q=2", b"audio/wav;q=x",
    b"application/json;;;", b"multipart/form-data", b"Bearer \xff", b"9" * 40, b"gzip"])
header_lines = st.tuples(header_names, st.sampled_from([b": ", b":", b" : ", b"\t:", b""]),
                         header_values).map(b"".join) | line_bytes
targets = st.sampled_from([b"/", b"/health", b"/ready", b"/voices", b"/synthesize", b"*", b"//",
                           b"/v1/audio/speech", b"/v1/models", b"/v1/models/%ff%2f\x80", b"/v1/",
                           b"http://x/health", b"http://[", b"/%00", b"?", b"#"]) | token
methods = st.sampled_from([b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"TRACE", b"get"]) | token
versions = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/9.9", b"HTTP/1.1 x", b""])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=4), max_leaves=12)
almost_json = st.text("[]{}\":,0eE-.\\u", max_size=60).map(str.encode)
unspeakable = st.text("*.,!? \u2014\u200b\U0001f600\0\ud800\n", max_size=30)
texts = unspeakable | json_values.filter(lambda value: not isinstance(value, str))
formats = json_values | st.sampled_from(["mp3", "wav", "sse", "audio", "MP3", "ogg"])
fields = st.fixed_dictionaries({}, optional={
    "text": texts, "input": texts, "format": formats, "response_format": formats,
    "stream_format": formats, "stream": json_values, "model": json_values,
    "speed": json_values | st.integers(-(2**80), 2**80) | st.floats(0.2, 4.1),
    "voice": json_values | st.text(max_size=40) | st.sampled_from(["male", "../x", "v2/"]),
    "seed": json_values | st.integers(-(2**80), 2**80), "": json_values, "extra": json_values})


# Attacks

@few_or_many
def test_arbitrary_bytes_do_no_harm(worker: Worker, examples: int) -> None:
    with unharmed(worker):
        @attack(examples, data=st.binary(max_size=400) | st.lists(
            line_bytes | st.just(VALID), max_size=6).map(b"\r\n".join))
        def _(data: bytes) -> None:
            check_answers(send(worker, data, half_close=True))


@few_or_many
def test_arbitrary_request_lines_and_headers_do_no_harm(worker: Worker, examples: int) -> None:
    with unharmed(worker):
        @attack(examples, first=st.tuples(methods, targets, versions).map(b" ".join),
                lines=st.lists(header_lines, max_size=8), body=st.binary(max_size=40),
                end=st.sampled_from([b"\r\n", b"\n", b"\r"]))
        def _(first: bytes, lines: list[bytes], body: bytes, end: bytes) -> None:
            data = end.join([first, *lines, b"", body])
            check_answers(send(worker, data, half_close=True))


@few_or_many
def test_arbitrary_headers_beside_a_good_request_get_one_answer(
        worker: Worker, examples: int) -> None:
    frame = re.compile(rb"\s*(content-length|transfer-encoding|expect)", re.IGNORECASE)
    with unharmed(worker):
        @attack(examples, lines=st.lists(header_lines.map(
            lambda line: line.replace(b"\r", b"")).filter(
                lambda line: line and not frame.match(line)), max_size=6))
        def _(lines: list[bytes]) -> None:
            assert post(worker, b'{"text": "***"}', *lines) in {400, 415, 422}


@few_or_many
def test_arbitrary_bodies_are_the_clients_fault(worker: Worker, examples: int) -> None:
    with unharmed(worker):
        @attack(examples, body=st.binary(max_size=300) | almost_json
                | json_values.map(lambda value: json.dumps(value).encode()))
        def _(body: bytes) -> None:
            assert post(worker, body) == 400


@few_or_many
def test_json_of_any_shape_is_the_clients_fault(worker: Worker, examples: int) -> None:
    with unharmed(worker):
        @attack(examples, payload=fields, path=st.sampled_from(["/synthesize", "/v1/audio/speech"]))
        def _(payload: dict[str, object], path: str) -> None:
            nothing = {200} if path.startswith("/v1/") else {422}
            status = post(worker, json.dumps(payload).encode(), path=path)
            assert status in {400} | nothing


@few_or_many
def test_truncated_requests_leave_nothing_behind(worker: Worker, examples: int) -> None:
    with unharmed(worker):
        @attack(examples, size=st.integers(0, len(VALID) - 1),
                how=st.sampled_from(["half close", "reset", "close"]))
        def _(size: int, how: str) -> None:
            if how == "half close":
                check_answers(send(worker, VALID[:size], half_close=True))
            elif how == "reset":
                break_off(worker, VALID[:size])
            else:
                with socket.create_connection(("127.0.0.1", worker.port)) as connection:
                    connection.sendall(VALID[:size])


@pytest.mark.parametrize("examples", [25, pytest.param(500, marks=pytest.mark.long)])
def test_any_text_is_planned_or_refused_though_its_client_leaves(
        worker: Worker, examples: int) -> None:
    with unharmed(worker):
        @attack(examples, text=st.text(max_size=300))
        def _(text: str) -> None:
            body = json.dumps({"text": text}).encode()
            head = b"POST /synthesize HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
            check_answers(send(worker, head + body, half_close=True))


@pytest.mark.parametrize("examples", [4, pytest.param(200, marks=pytest.mark.long)])
def test_any_short_text_is_spoken_or_refused(worker: Worker, examples: int) -> None:
    letters = st.characters(categories=["L", "N", "M", "So", "Co", "Cn", "Cf"])
    with unharmed(worker):
        @attack(examples, text=st.text(letters, min_size=1, max_size=6))
        def _(text: str) -> None:
            assert post(worker, json.dumps({"text": text}).encode()) in {200, 422}
