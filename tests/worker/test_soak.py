"""Whether a worker that has answered 500 requests of every kind holds any more than after 100."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import Worker, running_worker, wait_until

pytestmark = pytest.mark.long

REQUESTS, WARM = 500, 100
CLIENTS = 3  # at once
# What a worker may grow by from WARM on, and in the last 2 * WARM. The engine's memory takes some
# 900 requests to its full size and then stays; a leak of 0.3 MB a request would show.
MAY_GROW_MB, MAY_GROW_LATE_MB = 120, 40
FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")
TEXTS = ("Hi.", "One.\n\nTwo.", "The boat left at noon. Nobody waved.", "Oh, no. Oh, yes.")


def request(random_source: random.Random) -> tuple[str, dict[str, object]]:
    """A path and a body: some repeated and hence cached, most not."""
    text = random_source.choice(TEXTS)
    form, stream = random_source.choice(FORMATS), random_source.random() < 0.5
    common = {"seed": random_source.randrange(150), "stream": stream,
              "speed": random_source.choice([1, 1, 0.7, 2.5])}
    if random_source.random() < 0.5:
        return "/synthesize", {"text": text, "format": form, **common}
    return "/v1/audio/speech", {"input": text, "response_format": form, **common,
                                "stream_format": random_source.choice(["audio", "audio", "sse"])}


def served(worker: Worker, random_source: random.Random) -> str:
    path, body = request(random_source)
    answer = worker.call(path, body)
    assert answer.status == 200 and answer.body, answer.body[:300]
    return "streamed" if answer.headers.get("Transfer-Encoding") else "whole"


def hung_up(worker: Worker, random_source: random.Random) -> str:
    """Leaves before, in or after the head of the answer."""
    path, body = request(random_source)
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", worker.port), timeout=60) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(data)}\r\n"
                           "\r\n".encode() + data[: random_source.choice([len(data), 5])])
        if random_source.random() < 0.3 and body["stream"]:
            with contextlib.suppress(TimeoutError):
                connection.settimeout(0.3)
                connection.recv(random_source.choice([1, 5000]))
    return "hung up"


def erroneous(worker: Worker, random_source: random.Random) -> str:
    path, body, status = random_source.choice([
        ("/v1/audio/speech", {"input": "a" * 5000}, 400), ("/v1/audio/speech", {"input": "*"}, 200),
        ("/synthesize", {"text": "Hi.", "format": "ogg"}, 400), ("/nothing", {}, 404),
        ("/synthesize", b"{", 400), ("/v1/models", {}, 405)])
    assert worker.call(path, body).status == status
    return "erroneous"


def held(process: psutil.Process) -> tuple[float, int, int]:
    """Resident megabytes, threads and open files."""
    return process.memory_info().rss / 1e6, process.num_threads(), process.num_fds()


def settled(process: psutil.Process) -> tuple[float, int, int]:
    """What it holds once connections of clients that left are closed, and their threads ended."""
    wait_until(lambda: len(process.net_connections()) == 1, "closed connections", 60)
    for thread in process.threads():
        ended = Path(f"/proc/{process.pid}/task/{thread.id}")
        with contextlib.suppress(AssertionError):  # it is one of those that stay
            wait_until(lambda ended=ended: not ended.exists(), "ended thread", 0.2)
    return held(process)


@pytest.mark.timeout(900)
def test_500_requests_of_every_kind_leave_nothing_behind(toy: Path) -> None:
    kinds: list[Callable[[Worker, random.Random], str]] = [
        served, served, served, served, hung_up, erroneous]
    counts: Counter[str] = Counter()
    with running_worker(BARK_MODEL=str(toy), TTS_MAX_LENGTH="2000", BARK_MAX_BATCH="4",
                        BARK_CACHE_MB="2",  # so small that it turns over
                        MALLOC_ARENA_MAX="1",  # else glibc keeps 100 MB more, as threads go by
                        ) as worker, ThreadPoolExecutor(CLIENTS) as pool:
        worker.wait_for("ready")
        process = psutil.Process(worker.process.pid)

        def one(number: int) -> str:
            source = random.Random(number)
            return kinds[number % len(kinds)](worker, source)

        def run(numbers: range) -> tuple[float, int, int]:
            counts.update(pool.map(one, numbers))
            wait_until(lambda: sum(worker.health()["queue"][name]
                                   for name in ("running", "waiting")) == 0, "free queue")
            return settled(process)

        start = settled(process)
        every = [run(range(at, at + WARM)) for at in range(0, REQUESTS, WARM)]
        early, late = every[0], every[-1]
        assert worker.speak("Hi.").status == 200
    print(f"\n{dict(counts)}\nMB resident, threads, open files: {start} when ready, then after each"
          f" {WARM} {every}: {late[0] - early[0]:+.1f} MB")
    assert counts.total() == REQUESTS and len(counts) == 4, counts
    assert late[0] - early[0] <= MAY_GROW_MB and late[0] - every[-3][0] <= MAY_GROW_LATE_MB
    assert late[1:] == early[1:]
    assert "Traceback" not in "".join(worker.log)
