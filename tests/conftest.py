"""What the tests share: the worker as a module, toy models, and real worker processes."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from warm_python import Forked, WarmPython

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "bark-worker.py"
PYWORKER = ROOT / "pyworker.py"
LISTENER = ROOT / "listener.py"
BUILTIN = ROOT / "builtin-voice"
START_SECONDS = 90.0  # importing torch and transformers takes most of it on a busy machine

pytest.register_assert_rewrite("engines", "manager", "renting", "fake_vast")
# Whatever a shell starts in its background ignores SIGINT, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"  # the toys are too small for a second thread but to wait


# Files of few tests that take long, which are begun first: what begins last is waited for alone.
LONGEST = ("test_rent_signals", "test_first_minutes", "test_guard", "test_serverless", "test_docs",
           "test_rent", "test_endpoint", "test_bad_luck", "test_rented", "test_takes",
           "test_download", "test_manage", "test_openai", "test_formats", "test_server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
    items.sort(key=place)  # within a file they keep their order


def load_module(path: Path) -> ModuleType:
    """A file of ours as a module. Whoever needs torch imports it by this: it takes seconds."""
    name = path.stem.replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def bark() -> ModuleType:
    return load_module(WORKER)


def load_words() -> ModuleType:
    """The worker's sections above Model, which are about words and samples and know no torch."""
    module = ModuleType("bark_words")
    module.__file__ = str(WORKER)
    sys.modules["bark_words"] = module
    source = WORKER.read_text(encoding="utf-8").partition("\n# Model: ")[0]
    exec(compile(source, WORKER, "exec"), vars(module))
    return module


@pytest.fixture(scope="session")
def pyworker() -> ModuleType:
    return load_module(PYWORKER)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model folder that samples, as Suno's does."""
    import toy_model

    folder = tmp_path_factory.mktemp("toy")
    toy_model.build(folder)
    return folder


@pytest.fixture(scope="session")
def greedy_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import toy_model

    folder = tmp_path_factory.mktemp("greedy-toy")
    toy_model.build(folder, greedy=True)
    return folder


def clean_environment(**settings: str) -> dict[str, str]:
    """The environment without settings of ours, with the hub switched off."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("BARK_", "TTS_", "HF_")) and name not in ("PORT", "HOST")}
    return {**kept, "HOST": "127.0.0.1", "PORT": "0", "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1", **settings}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Worker:
    """A real worker process on a free port; `log` grows as it writes."""

    process: subprocess.Popen[str] | Forked
    log: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, path: str, payload: object = None, *, method: str | None = None,
             headers: dict[str, str] | None = None, timeout: float = 120.0) -> Answer:
        """One request; `payload` (bytes as they are, else as JSON) makes it a POST."""
        data = payload if isinstance(payload, bytes) or payload is None \
            else json.dumps(payload).encode()
        kind = {"Content-Type": "application/json"} if data is not None else {}
        request = urllib.request.Request(
            self.url + path, data, {**kind, **(headers or {})}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return Answer(reply.status, dict(reply.headers), reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read())

    def speak(self, text: str, **fields: object) -> Answer:
        return self.call("/synthesize", {"text": text, **fields})

    def health(self) -> dict[str, Any]:
        return self.call("/health").json

    def wait_for(self, status: str, seconds: float = START_SECONDS) -> dict[str, Any]:
        return wait_until(lambda: (health := self.health())["status"] == status and health,
                          f"status {status}", seconds)

    def read_log(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line)
            if match := re.search(r"listening on http://\S+:(\d+)", line):
                self.port = int(match[1])

    def stop(self, number: int = signal.SIGTERM, seconds: float = 20.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """The first true value of `condition`; fails naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)  # between looks at another process
    raise AssertionError(f"no {what} within {seconds:.0f} s")


@functools.cache
def warm_python() -> WarmPython:
    return WarmPython(clean_environment())


@contextlib.contextmanager
def running_worker(script: Path | None = None, **settings: str) -> Iterator[Worker]:
    """A worker that listens, ready or not; ended and its log shown on failure at the end.

    It judges nothing unless told to, as the toy's babble would be made three times over. It is
    spared the import of torch, unless a setting is neither the worker's own nor the hub's client's.
    """
    script, environment = script or WORKER, clean_environment(**{"BARK_QUALITY": "off", **settings})
    if all(name.startswith(("BARK_", "TTS_", "HF_")) for name in settings):
        process = warm_python().start(script, environment, ROOT)
    else:
        process = subprocess.Popen([sys.executable, str(script)], text=True, cwd=ROOT,
                                   env=environment, stderr=subprocess.PIPE)
    with listening(process) as worker:
        yield worker


@contextlib.contextmanager
def listening(process: subprocess.Popen[str] | Forked) -> Iterator[Worker]:
    """The worker in a process, from when it listens; ended and its log shown at the end."""
    worker = Worker(process)
    reader = threading.Thread(target=worker.read_log, daemon=True)
    reader.start()
    try:
        wait_until(lambda: worker.port or process.poll() is not None, "port", START_SECONDS)
        yield worker
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        reader.join(10)
        print("".join(worker.log))


@pytest.fixture(scope="session")
def worker(toy: Path) -> Iterator[Worker]:
    """One worker on the toy for all tests that only talk to it. It repeats nothing from memory."""
    with running_worker(BARK_MODEL=str(toy), TTS_MAX_LENGTH="2000", BARK_MAX_BATCH="4",
                        BARK_CACHE_MB="0", BARK_CORS_ORIGINS="https://reader.example") as worker:
        worker.wait_for("ready")
        yield worker


@pytest.fixture(scope="session")
def builtin_worker() -> Iterator[Worker]:
    """One worker on the built-in voice, for tests that listen."""
    with running_worker(BARK_MODEL=str(BUILTIN), BARK_QUALITY="on") as worker:
        worker.wait_for("ready")
        yield worker
