"""What the log says, and how: text for people, or a JSON object a line; never what is spoken."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import (
    ROOT,
    WORKER,
    Worker,
    clean_environment,
    running_worker,
    wait_until,
    warm_python,
)

TEXT = "Quixotic zephyrs vex. Bold jumping wolves growl."
KEY = "sesame"
# What is put before the worker's last lines: an endpoint with a bug, a thread with another,
# libraries that warn, log and draw a bar of progress.
BUGS = """
def broken(handler):
    import warnings
    warnings.warn("a library\\nwarns")
    logging.getLogger("library").error("a library's\\nerror")
    logging.getLogger("transformers.models").error("has a handler of its own")
    logging.getLogger("huggingface_hub").warning("not so grave")
    for share in (10, 100):
        print(f"\\rdownloading {share} %", end="", file=sys.stderr)
    print(file=sys.stderr)
    thread = threading.Thread(target=lambda: {}["no such key"])
    thread.start()
    thread.join()
    raise ZeroDivisionError("a bug")

RequestHandler.routes = ROUTES | {"/voices": ROUTES["/voices"]._replace(answer=broken)}
"""


def with_bugs(folder: Path, bugs: str) -> Path:
    """The worker as a file of its own, with something added before it is started."""
    head, main, tail = WORKER.read_text(encoding="utf-8").rpartition('\nif __name__ == "__main__":')
    path = folder / "bark-worker.py"
    path.write_text(head + bugs + main + tail, encoding="utf-8")
    return path


def malformed(worker: Worker) -> None:
    with socket.create_connection(("127.0.0.1", worker.port)) as connection:
        connection.sendall(b"GET / HTTP/9.9 " + TEXT.encode() + b"\r\n\r\n")
        assert connection.recv(12)


def live(worker: Worker) -> None:
    """What may happen to a worker, its end included."""
    worker.wait_for("ready")
    key = {"Authorization": f"Bearer {KEY}"}
    ask = {"text": TEXT, "seed": 7}
    assert worker.call("/synthesize", ask, headers=key).status == 200
    assert worker.call("/synthesize", ask, headers=key).status == 200
    assert worker.call("/synthesize", {**ask, "voice": TEXT}, headers=key).status == 400
    assert worker.speak(TEXT).status == 401
    assert worker.call(f"/{TEXT.split()[0]}", headers=key).status == 404
    assert worker.call("/voices").status == 500
    malformed(worker)
    assert worker.stop() == 0


@pytest.fixture(scope="module")
def log(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every line of a worker's life to its end, each of which is an object of JSON."""
    script = with_bugs(tmp_path_factory.mktemp("json"), BUGS)
    with running_worker(script, BARK_MODEL=str(toy), BARK_API_KEY=KEY,
                        BARK_LOG_FORMAT="json") as worker:
        live(worker)
        wait_until(lambda: "status=draining" in "".join(worker.log), "last line")
    return [json.loads(line) for line in worker.log]


def of_requests(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in log if "method" in line]


def test_every_line_of_a_life_is_json_with_time_level_and_message(
        log: list[dict[str, Any]]) -> None:
    now = datetime.now(UTC)
    for line in log:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert now - timedelta(minutes=5) < datetime.fromisoformat(line["time"]) <= now
        assert line["level"] in ("INFO", "WARNING", "ERROR") and line["message"]


def test_neither_what_is_spoken_nor_a_key_is_in_the_log(log: list[dict[str, Any]]) -> None:
    text = json.dumps(log).lower()
    assert KEY not in text
    assert [word for word in re.findall(r"\w+", TEXT.lower()) if word in text] == []


def test_a_requests_line_tells_its_times_apart(log: list[dict[str, Any]]) -> None:
    spoken = [line for line in of_requests(log) if line["status"] == 200]
    first, again = sorted(spoken, key=lambda line: -line["takes"])
    assert {"method": "POST", "path": "/synthesize", "status": 200, "segments": 1,
            "seed": 7}.items() <= first.items()
    assert re.fullmatch("[0-9a-f]{16}", first["id"]) and first["id"] != again["id"]
    assert first["takes"] == 1 and again["takes"] == 0  # from memory
    assert 0 <= first["wait_s"] < first["first_s"] <= first["ms"] / 1000 + 0.002
    assert 0 < first["compute_s"] <= first["first_s"] + 0.01 and first["audio_s"] > 0.5
    assert again["wait_s"] == again["compute_s"] == 0 and again["audio_s"] == first["audio_s"]


def test_what_failed_says_why_in_its_line(log: list[dict[str, Any]]) -> None:
    failed = {(line["path"], line["status"], line["code"]) for line in of_requests(log)
              if "code" in line}
    assert failed == {
        ("/synthesize", 400, "unknown_voice"), ("/synthesize", 401, "invalid_api_key"),
        ("?", 404, "not_found"), ("/voices", 500, "internal_error")}
    assert [line["status"] for line in log if line["message"].startswith("malformed")] == [400]


def test_an_exception_is_one_line_with_its_traceback(log: list[dict[str, Any]]) -> None:
    told = {line["message"]: line["exception"] for line in log if "exception" in line}
    assert told.keys() == {"request failed", "a thread broke"}
    assert told["request failed"].startswith("Traceback")
    assert told["request failed"].endswith("ZeroDivisionError: a bug")
    assert told["a thread broke"].endswith("KeyError: 'no such key'")


def test_what_libraries_say_is_a_line_as_well(log: list[dict[str, Any]]) -> None:
    told = {line["logger"]: line for line in log if "logger" in line}
    assert told["library"]["message"] == "a library's\nerror"
    assert "UserWarning: a library\nwarns" in told["py.warnings"]["message"]
    assert told["stderr"]["message"] == "downloading 100 %"
    assert told["transformers.models"]["message"] == "has a handler of its own"
    assert told.keys() == {"library", "transformers.models", "py.warnings", "stderr"}


def test_whatever_a_record_holds_is_one_line(bark: ModuleType) -> None:
    record = logging.LogRecord("other", logging.ERROR, "", 0, "%s\n\u2028\x85\ud800", ("a",), None)
    line = bark.JsonLine().format(record)
    assert line.isascii() and len(line.splitlines()) == 1
    assert json.loads(line)["message"] == "a\n\u2028\x85\ud800"


def test_as_text_a_request_is_one_line_with_the_same_facts(worker: Worker) -> None:
    answer = worker.call("/synthesize", {"text": TEXT, "seed": 7})
    name = answer.headers["X-Request-Id"]
    line = wait_until(lambda: next((line for line in worker.log if name in line), ""), "its line")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO POST /synthesize status=200 ms=\d+"
        rf" id={name} segments=1 takes=1 audio_s=[\d.]+ wait_s=[\d.]+ first_s=[\d.]+"
        r" compute_s=[\d.]+ seed=7\n", line)
    assert "Quixotic" not in "".join(worker.log)


def ended(script: Path, **settings: str) -> tuple[int, list[str]]:
    """Exit status and log of a worker that does not get to listen."""
    environment = clean_environment(BARK_LOG_FORMAT="json", **settings)
    process = warm_python().start(script, environment, ROOT)
    lines = list(process.stderr)
    return process.wait(), lines


@pytest.mark.parametrize(("setting", "value"), [("PORT", "x"), ("BARK_DEVICE", "cuda:77")])
def test_a_setting_that_is_refused_is_told_in_a_line_of_json(setting: str, value: str) -> None:
    """Also one that shows to be wrong only when torch is there."""
    status, lines = ended(WORKER, **{setting: value})
    (line,) = map(json.loads, lines)
    assert status == 2 and line["level"] == "ERROR"
    assert f"{setting} is" in line["message"] and value in line["message"]


def test_a_wrong_format_is_told_as_text() -> None:
    done = subprocess.run([sys.executable, WORKER], capture_output=True, text=True,
                          env=clean_environment(BARK_LOG_FORMAT="xml"))
    assert done.returncode == 2
    assert done.stderr == ("wrong configuration:\n"
                           "  BARK_LOG_FORMAT is 'xml'; allowed: text or json\n")


def test_what_breaks_the_worker_itself_is_a_line_of_json(tmp_path: Path) -> None:
    status, lines = ended(with_bugs(tmp_path, "\n1 / 0\n"))
    (line,) = map(json.loads, lines)
    assert status == 1 and line["exception"].endswith("ZeroDivisionError: division by zero")
