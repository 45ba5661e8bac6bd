"""What the tests of `speak` share: the script beside all it needs, and a gate before the worker."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import wave
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import av
from conftest import clean_environment, wait_until
from manager import BASH, SCRIPT, Run, executable
from speak import main
from test_manage import clone_script

KEY = "sesame-4711"
RUN_SECONDS = 120.0

# What stands in an answer's stead: status, headers and error code; or the connection is cut.
Spoiled = tuple[int, dict[str, str], str] | str | None


class Gate(ThreadingHTTPServer):
    """Stands before a worker, notes what is asked of it, and spoils what it is told to."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str):
        super().__init__(("127.0.0.1", 0), GateHandler)
        self.url, self.target = f"http://127.0.0.1:{self.server_port}", target
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []  # of all requests for speech
        self.spoken: Counter[str] = Counter()  # texts that were answered with speech
        self.at_work = self.most_at_work = 0
        self.open = threading.Event()  # while it is not set, no request gets through
        self.open.set()
        self.spoil: Callable[[str, int], Spoiled] = lambda text, count: None

    @property
    def texts(self) -> list[str]:
        return [body["text"] for body in self.bodies]


class GateHandler(BaseHTTPRequestHandler):
    server: Gate
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.pass_on(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        text = json.loads(body)["text"]
        with self.server.lock:
            self.server.bodies.append(json.loads(body))
            count = len(self.server.bodies)
            self.server.at_work += 1
            self.server.most_at_work = max(self.server.most_at_work, self.server.at_work)
        try:
            self.server.open.wait(RUN_SECONDS)
            spoiled = self.server.spoil(text, count)
            if spoiled is None:
                self.pass_on(body, text)
            elif isinstance(spoiled, str):
                self.close_connection = True
            else:
                self.refuse(*spoiled)
        finally:
            with self.server.lock:
                self.server.at_work -= 1

    def refuse(self, status: int, headers: dict[str, str], code: str) -> None:
        error = {"code": code, "message": f"as the test wants it: {code}"}
        self.send(status, headers, json.dumps({"error": error}).encode())

    def pass_on(self, body: bytes | None, text: str = "") -> None:
        headers = {name: self.headers[name] for name in ("Authorization", "Content-Type")
                   if self.headers[name]}
        asked = urllib.request.Request(self.server.target + self.path, body, headers)
        try:
            with urllib.request.urlopen(asked, timeout=RUN_SECONDS) as reply:
                status, answer = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, answer = error.code, error.read()
        except OSError:
            self.close_connection = True
            return
        with contextlib.suppress(OSError):
            self.send(status, {}, answer)
            if body and status == 200:
                with self.server.lock:
                    self.server.spoken[text] += 1

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@contextlib.contextmanager
def gate_before(url: str) -> Iterator[Gate]:
    with Gate(url) as gate:
        threading.Thread(target=gate.serve_forever, args=(0.02,), daemon=True).start()
        yield gate
        gate.open.set()
        gate.shutdown()


def make_program(folder: Path) -> Path:
    """The script, beside a .venv that has all it needs and that nothing is installed into."""
    clone_script(folder)
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    executable(python, f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    shutil.copy(folder / "requirements.txt", folder / ".venv/installed-requirements.txt")
    return folder / SCRIPT.name


@dataclass
class Desk:
    """A folder where somebody speaks books, through the worker at `url`."""

    program: Path
    folder: Path
    url: str
    runs: list[Run] = field(default_factory=list)

    def end(self) -> None:
        """Leaves no run behind."""
        for run in self.runs:
            if run.process.poll() is None:
                run.process.kill()
                run.wait()

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def launch(self, *words: str, url: str | None = None, stdin: Any = subprocess.DEVNULL,
               **settings: str) -> Run:
        at = ["--url", url or self.url] if url != "" else []
        process = subprocess.Popen(
            [BASH, str(self.program), "speak", *words, *at], cwd=self.folder, text=True,
            env=clean_environment(**{"BARK_API_KEY": KEY, "BARK_POLL": "1", **settings}),
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        run = Run(process)
        run.start_reading()
        self.runs.append(run)
        return run

    def speak(self, *words: str, url: str | None = None, **settings: str) -> SimpleNamespace:
        """What comes of it in this process, which spares a start; the key is in none of it."""
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(stdout), \
                contextlib.redirect_stderr(stderr), patch.dict(os.environ, {
                    "BARK_API_KEY": KEY, "BARK_POLL": "1", **settings}):
            status = main([*words, "--url", url or self.url])
        assert KEY not in stdout.getvalue() + stderr.getvalue()
        return SimpleNamespace(status=status, stdout=stdout.getvalue(), stderr=stderr.getvalue())

    def spoken(self, *words: str, **settings: Any) -> dict[str, Any]:
        """What --json tells of a run that succeeds."""
        run = self.speak(*words, "--json", **settings)
        assert run.status == 0, run.stderr
        return json.loads(run.stdout)

    def parts(self, out: str) -> list[Path]:
        folder = self.folder / f"{out}.parts"
        return sorted(folder.glob("*.part")) if folder.exists() else []

    def wait_for_parts(self, out: str, count: int) -> None:
        wait_until(lambda: len(self.parts(out)) >= count, f"{count} parts", RUN_SECONDS)


def pcm_of(path: Path) -> bytes:
    with wave.open(str(path)) as file:
        return file.readframes(file.getnframes())


def seconds_of(data: bytes) -> float:
    with av.open(io.BytesIO(data)) as sound:
        return sum(frame.samples / frame.sample_rate for frame in sound.decode(audio=0))
