"""Metrics: counted exactly by a worker at work, told in every state, named as Prometheus has it."""

from __future__ import annotations

import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, WORKER, Worker, running_worker, wait_until
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from test_server import KEY, LONG, being_served, connect, exchange, queue, synthesis

PAGE = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
OPEN_METRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
AUTHORIZED = f"Authorization: Bearer {KEY}"
HAS_KEY = {"Authorization": f"Bearer {KEY}"}
MARK = "Quetzalcoatl"  # is sent wherever a client may send something
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
GIB = 1 << 30
# Of a worker on a GPU that downloads, as no worker here does.
HEALTH: dict[str, Any] = {
    "version": "1", "model_id": "suno/bark", "device": "cuda:0", "dtype": None,
    "status": "downloading", "slots": 4, "live": 3,
    "queue": {"running": 2, "waiting": 1, "capacity": 32}, "retakes": {"short": 2},
    "quality": {"segments": 9, "retakes": 2, "warnings": 4},
    "gpu_memory": {"size": 8 * GIB, "free": GIB, "reserved": 6 * GIB, "allocated": 5 * GIB},
    "progress": {"bytes_done": 5, "bytes_total": 10}}


def parsed(page: str, parse: Callable[[str], Iterator[Any]] = text_string_to_metric_families
           ) -> Series:
    """Every series, each of which is there once and has its HELP and TYPE."""
    series: Series = {}
    for family in parse(page):
        assert family.documentation and family.type != "unknown", family.name
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in series
            series[key] = sample.value
    return series


def scrape(worker: Worker) -> Series:
    answer = worker.call("/metrics", headers=HAS_KEY)
    assert answer.status == 200 and answer.headers["Cache-Control"] == "no-store"
    return parsed(answer.body.decode())


def value(series: Series, name: str, **labels: str) -> float:
    return series[name, frozenset(labels.items())]


def answers(series: Series) -> Counter[tuple[str, str, str]]:
    """How often each path was answered so: by status and outcome; without this very question."""
    found: Counter[tuple[str, str, str]] = Counter()
    for (name, labels), count in series.items():
        if name == "bark_http_requests_total":
            told = dict(labels)
            found[told["path"], told["status"], told["outcome"]] = int(count)
    return found


def rise(before: Series, after: Series, name: str, **labels: str) -> float:
    return value(after, name, **labels) - before.get((name, frozenset(labels.items())), 0)


@pytest.fixture(scope="module")
def metered(toy: Path) -> Iterator[Worker]:
    """A worker of these tests alone, with little of everything, that keeps what it has spoken."""
    with running_worker(BARK_MODEL=str(toy), BARK_API_KEY=KEY, BARK_MAX_BATCH="1",
                        BARK_MAX_QUEUE="1", TTS_MAX_LENGTH="2000",
                        BARK_EXPRESSION="off") as worker:
        worker.wait_for("ready")
        yield worker


def send(worker: Worker, request: bytes) -> int:
    return exchange(worker, request).status


def test_each_request_counts_once_where_it_belongs(metered: Worker) -> None:
    before = answers(scrape(metered))
    head = f"Host: test\r\n{AUTHORIZED}\r\n"
    spoken, others = synthesis({"text": "Hi.", "voice": "male"}, AUTHORIZED), [
        synthesis({"text": ""}, AUTHORIZED), synthesis({"text": MARK, "voice": MARK}, AUTHORIZED),
        synthesis({"text": "***"}, AUTHORIZED), synthesis({"text": MARK}),
        synthesis({"text": MARK}, f"Authorization: Bearer {MARK}"),
        f"GET /{MARK}/a HTTP/1.1\r\n{head}\r\n".encode(),
        f"GET /{MARK}/b?{MARK} HTTP/1.1\r\n{head}\r\n".encode(),
        f"GET /v1/models/{MARK} HTTP/1.1\r\n{head}\r\n".encode(),
        f"DELETE /synthesize HTTP/1.1\r\n{head}\r\n".encode(),
        f"{MARK} /voices HTTP/1.1\r\n{head}\r\n".encode(),
        f"GET //voices/?{MARK} HTTP/1.1\r\n{head}\r\n".encode(),
        f"POST /synthesize HTTP/1.1\r\n{head}Content-Length: 9999999\r\n\r\n".encode(),
        f"GET / {MARK}\r\n\r\n".encode()]
    assert [send(metered, spoken) for _ in range(3)] == [200] * 3
    assert [send(metered, each) for each in others] == [
        400, 400, 422, 401, 401, 404, 404, 404, 405, 405, 200, 413, 400]
    expected = Counter({
        ("/synthesize", "200", "ok"): 3, ("/synthesize", "400", "empty_text"): 1,
        ("/synthesize", "400", "unknown_voice"): 1,
        ("/synthesize", "422", "nothing_to_speak"): 1,
        ("/synthesize", "401", "invalid_api_key"): 2, ("other", "404", "not_found"): 2,
        ("/v1/models/", "404", "model_not_found"): 1,
        ("/synthesize", "405", "method_not_allowed"): 1,
        ("/voices", "405", "method_not_allowed"): 1, ("/voices", "200", "ok"): 1,
        ("/synthesize", "413", "body_too_large"): 1, ("other", "400", "malformed_request"): 1})

    def counted() -> Counter[tuple[str, str, str]]:
        now = answers(scrape(metered)) - before
        for path in ("/metrics", "/health"):  # this question's own, and that of who waits for ready
            del now[path, "200", "ok"]
        return now
    wait_until(lambda: counted() == expected, f"{expected}, but {counted()}", 10)
    assert MARK not in metered.call("/metrics", headers=HAS_KEY).body.decode()


def test_what_comes_from_memory_costs_no_take_and_no_wait(metered: Worker) -> None:
    before = scrape(metered)
    length = 0.0
    for _ in range(3):
        reply = metered.call("/synthesize", {"text": "Yes. No.", "seed": 5}, headers=HAS_KEY).json
        length = sum(each["end"] - each["start"] for each in reply["segments"])
    segments = len(reply["segments"])
    wait_until(lambda: rise(before, scrape(metered), "bark_first_segment_seconds_count") == 3,
               "three answers", 10)
    after = scrape(metered)
    for name, times in (("segments", segments), ("audio_seconds", length)):
        for source, count in (("model", 1), ("cache", 2)):
            assert rise(before, after, f"bark_{name}_total", source=source) == pytest.approx(
                count * times, abs=0.01)
    assert rise(before, after, "bark_takes_total") == segments
    assert rise(before, after, "bark_queue_wait_seconds_count") == 1
    assert rise(before, after, "bark_real_time_factor_ratio_count") == 1
    paces = rise(before, after, "bark_real_time_factor_ratio_sum")
    assert paces * length == pytest.approx(rise(before, after, "bark_busy_seconds_total"), rel=0.5)
    assert rise(before, after, "bark_http_request_duration_seconds_count",
                path="/synthesize") == 3


def test_a_full_worker_and_one_whose_clients_left_are_told(metered: Worker) -> None:
    before, key = scrape(metered), AUTHORIZED
    with being_served(metered, LONG, key), connect(metered) as waiting:
        waiting.sendall(synthesis({"text": "So it is."}, key))
        wait_until(lambda: queue(metered) == (1, 1), "waiting request")
        assert send(metered, synthesis({"text": "Hi there."}, key)) == 503
        busy = scrape(metered)  # while the device is at work
        told = [value(busy, f"bark_{name}") for name in (
            "requests_running", "requests_waiting", "queue_capacity", "segments_running", "slots")]
        assert told == [1, 1, 1, 1, 1]
    with connect(metered) as resetting:
        head, _, _ = synthesis({"text": "So it is."}, f"{key}\r\nExpect: 100-continue").partition(
            b"\r\n\r\n")
        resetting.sendall(head + b"\r\n\r\n")
        assert b" 100 " in resetting.recv(100)  # now it waits for the body
        resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    idle = wait_until(
        lambda: answers(after := scrape(metered))["/synthesize", "499", "client_closed_request"]
        == 3 and after, "three who left", 30)
    assert (answers(idle) - answers(before))["/synthesize", "503", "queue_full"] == 1
    assert [value(idle, f"bark_{name}") for name in (
        "requests_running", "requests_waiting", "segments_running")] == [0, 0, 0]


def test_a_stream_sounds_before_it_ends(metered: Worker) -> None:
    before = scrape(metered)
    body = {"text": "One.\n\nTwo.\n\nThree.\n\nFour.", "stream": True}
    key = {**HAS_KEY, "Accept": "audio/wav"}
    assert metered.call("/synthesize", body, headers=key).status == 200
    wait_until(lambda: rise(before, scrape(metered), "bark_first_segment_seconds_count") == 1,
               "end of the stream", 10)
    after = scrape(metered)
    first = rise(before, after, "bark_first_segment_seconds_sum")
    whole = rise(before, after, "bark_http_request_duration_seconds_sum", path="/synthesize")
    assert 0 < first < 0.7 * whole


@pytest.mark.long  # run.sh has no room for it
def test_what_took_too_long_counts_as_that(toy: Path) -> None:
    with running_worker(BARK_MODEL=str(toy), BARK_TIMEOUT="0.001") as worker:
        worker.wait_for("ready")
        assert worker.speak("Hi.").status == 504
        after = scrape(worker)
    assert answers(after)["/synthesize", "504", "timeout"] == 1
    assert value(after, "bark_real_time_factor_ratio_count") == 0


# States and access

def status_of(series: Series) -> str:
    """The one that it is in."""
    (status,) = [dict(labels)["status"] for (name, labels), count in series.items()
                 if name == "bark_status" and count]
    return status


def test_it_wants_the_key(metered: Worker) -> None:
    """Unless it is open: test_voices."""
    assert metered.call("/metrics").status == 401
    assert metered.call("/metrics", headers={"Authorization": "Bearer no"}).status == 401
    assert metered.call("/metrics", headers=HAS_KEY).status == 200


def test_head_is_get_without_a_body_and_nothing_else_is_taken(metered: Worker) -> None:
    head = metered.call("/metrics", method="HEAD", headers=HAS_KEY)
    assert (head.status, head.body) == (200, b"") and int(head.headers["Content-Length"]) > 1000
    refused = metered.call("/metrics", {}, headers=HAS_KEY)
    assert (refused.status, refused.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")


# Form

def test_prometheus_gets_the_form_that_it_asks_for(metered: Worker) -> None:
    plain = metered.call("/metrics", headers=HAS_KEY)
    assert plain.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    asked = metered.call("/metrics", headers={**HAS_KEY, "Accept": OPEN_METRICS})
    assert asked.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    series = parsed(asked.body.decode(), openmetrics.text_string_to_metric_families)
    assert {name for name, _ in series} == {name for name, _ in scrape(metered)}


def whole_page(bark: ModuleType) -> str:
    """With each series that there may be, of all kinds one."""
    metrics = bark.Metrics()
    metrics.answered("?", 404, "not_found", 0.1)
    metrics.answered("/", 200, "ok", 0.1)
    return metrics.page("", HEALTH)[0].decode()


def families(bark: ModuleType) -> dict[str, str]:
    """The name of each to its type, with _total where that belongs to the name."""
    suffix = {"counter": "_total"}
    return {family.name + suffix.get(family.type, ""): family.type
            for family in text_string_to_metric_families(whole_page(bark))}


def test_what_health_tells_is_told(bark: ModuleType) -> None:
    series = parsed(whole_page(bark))
    assert status_of(series) == "downloading"
    assert value(series, "bark_worker_info", version="1", model_id="suno/bark", device="cuda:0",
                 dtype="") == 1
    expected = {"requests_running": 2, "requests_waiting": 1, "queue_capacity": 32,
                "segments_running": 3, "gpu_memory_size_bytes": 8 * GIB,
                "gpu_memory_free_bytes": GIB, "gpu_memory_reserved_bytes": 6 * GIB,
                "gpu_memory_allocated_bytes": 5 * GIB, "download_done_bytes": 5,
                "download_size_bytes": 10, "flawed_segments_total": 4}
    assert {name: value(series, f"bark_{name}") for name in expected} == expected
    assert value(series, "bark_retakes_total", fault="short") == 2
    assert value(series, "bark_retakes_total", fault="long") == 0


def test_every_metric_is_described_and_no_other(bark: ModuleType) -> None:
    rows = re.findall(r"^\| (`(?:bark|process)_[^|]+) \| ([a-z]+) \|", PAGE, re.M)
    assert {name: kind for names, kind in rows
            for name in re.findall(r"`(\w+)`", names)} == families(bark)


def test_every_query_asks_for_what_there_is(bark: ModuleType) -> None:
    queries = [query.replace(r"\|", "|") for query in re.findall(
        r"`([^`]+)`", PAGE.split("## What to ask")[1])]
    assert len(queries) > 15
    labels: dict[str, set[str]] = {}
    for name, pairs in parsed(whole_page(bark)):
        labels.setdefault(name, set()).update(label for label, _ in pairs)
    for query in queries:
        for name, selected in re.findall(r"\b((?:bark|process)_\w+)(?:\{([^}]*)\})?", query):
            assert set(re.findall(r"(\w+)[=!]", selected)) <= labels[name], query


def test_our_faults_are_all_that_answers_of_500_and_more_may_say() -> None:
    errors = (ROOT / "docs/http.md").read_text(encoding="utf-8").split("## Errors")[1]
    ours = " ".join(re.findall(r"^\| 50\d \| ([^|]+) \|", errors, re.M))
    (asked,) = re.findall(r'outcome=~"([^"]+)"', PAGE)
    assert set(asked.split(r"\|")) == set(re.findall(r"`(\w+)`", ours))


def test_names_and_units_are_as_prometheus_has_them(bark: ModuleType) -> None:
    for name, kind in families(bark).items():
        assert re.fullmatch("[a-z]+(_[a-z]+)+", name)
        assert name.startswith(("bark_", "process_"))
        assert name.endswith("_total") == (kind == "counter")
        assert not re.search("_(ms|milliseconds|minutes|megabytes|percent|count|sum|bucket)$", name)


def test_every_fault_and_status_that_there_is_has_its_series(bark: ModuleType) -> None:
    named = re.findall(r'\b(Fault|hopeless|enter)\(\s*"(\w+)"', WORKER.read_text(encoding="utf-8"))
    assert {kind for name, kind in named if name != "enter"} == set(bark.FAULTS)
    assert {kind for name, kind in named if name == "enter"} | {"failed"} == set(bark.STATUSES)


# The GPU's memory

def test_the_engine_reads_the_gpus_memory_without_waiting_for_the_gpu(
        bark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("waited for the GPU")

    cuda, read = bark.torch.cuda, bark.Engine.memory
    monkeypatch.setattr(cuda, "synchronize", never)
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (1, 8))
    monkeypatch.setattr(cuda, "memory_reserved", lambda device: 6)
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: 5)
    on_gpu, on_cpu = (SimpleNamespace(device=bark.torch.device(name)) for name in ("cuda:0", "cpu"))
    assert read(on_gpu) == {"size": 8, "free": 1, "reserved": 6, "allocated": 5}
    assert read(on_cpu) == {}
