#!/usr/bin/env python3
"""A worker of a Vast.ai endpoint, which routes and scales: bark-worker.py behind Vast's PyWorker.

    python pyworker.py        # settings come from the environment; --help lists them

    Vast --- signed requests ---> PyWorker on WORKER_PORT --- requests ---> bark-worker.py,
    Vast <-- load and speed ----- in this process         <-- /health ----- a child on loopback

PyWorker, of the `vastai` package, checks Vast's signatures, forwards requests, measures how much is
spoken a second, and reports to Vast, also while the model loads. What speaks is the bark-worker.py
beside this file, which checks its own settings. Both end together: a signal is passed on, an exit
status comes back, and the kernel ends a child whose parent died. All of it needs Linux.

Each section knows only what stands above it: settings, which alone reads the environment; worker,
the child process; PyWorker, all that touches Vast's SDK; main. test_serverless.py watches it, also
that the SDK still has what is used of it beside its options.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import hashlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

VERSION = "0.1.0"
WORKER = Path(__file__).resolve().with_name("bark-worker.py")

log = logging.getLogger("pyworker")


# -----------------------------------------------------------------------------
# Settings: the only place that reads the environment. PyWorker reads most of these itself, and
# breaks over them one by one and late; so they are checked before.

class SettingsError(Exception):
    """It cannot start here as it is; for the person who has to change something."""


def is_whole(low: int, high: int) -> Callable[[str], bool]:
    return lambda value: bool(re.fullmatch("[0-9]{1,12}", value)) and low <= int(value) <= high


def is_like(pattern: str) -> Callable[[str], bool]:
    return lambda value: bool(re.fullmatch(pattern, value))


class Variable(NamedTuple):
    name: str
    is_right: Callable[[str], bool]
    allowed: str
    meaning: str


# None of them may be unset. {port} is WORKER_PORT's value.
VARIABLES = (
    Variable("WORKER_PORT", is_whole(1, 65534), "a whole number from 1 to 65534",
             "port that PyWorker listens on, on HOST; the next one is its own"),
    Variable("CONTAINER_ID", is_like("[0-9]{1,12}"), "a whole number of at most 12 digits",
             "the instance's number"),
    Variable("REPORT_ADDR", is_like(r"https?://[!-+\--~]+(,https?://[!-+\--~]+)*"),
             "http:// or https:// addresses, joined by commas",
             "where Vast takes PyWorker's reports"),
    Variable("PUBLIC_IPADDR", is_like(r"[0-9A-Za-z.:\[\]-]+"), "an address or a host's name",
             "the machine's public address"),
    Variable("VAST_TCP_PORT_{port}", is_whole(1, 65535), "a whole number from 1 to 65535",
             "the public port that leads to WORKER_PORT"),
)
# What the worker heeds elsewhere is kept from it here.
KEY, GUARDS = "BARK_API_KEY", ("BARK_IDLE_STOP", "BARK_START_LIMIT", "BARK_MAX_HOURS")


@dataclass(frozen=True)
class Settings:
    """Where PyWorker listens, what the worker is given, and two that both go by."""

    worker_port: int
    host: str
    timeout: float  # seconds, BARK_TIMEOUT
    models: Path  # HF_HOME
    worker_environment: Mapping[str, str] = field(repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Raises SettingsError naming every wrong one of VARIABLES, and UNSECURED.

        The worker's own are taken as they are: it is about to check them.
        """
        if wrong := list(wrong_variables(environ)):
            raise SettingsError("wrong configuration:\n  " + "\n  ".join(wrong))
        timeout = environ.get("BARK_TIMEOUT", "")
        kept = {name: value for name, value in environ.items() if name not in (KEY, *GUARDS)}
        return cls(int(environ["WORKER_PORT"]), environ.get("HOST") or "0.0.0.0",
                   float(timeout) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", timeout) else 600.0,
                   Path(environ.get("HF_HOME") or "~/.cache/huggingface").expanduser().absolute(),
                   kept)


def wrong_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """What is wrong of all that must be right, a line each."""
    port = environ.get("WORKER_PORT") or "<WORKER_PORT>"
    for variable in VARIABLES:
        name = variable.name.format(port=port)
        if not variable.is_right(raw := environ.get(name, "")):
            found = f"is {raw[:60]!a};" if raw else "is not set, and a worker here needs it;"
            yield f"{ascii(name[:60])[1:-1]} {found} allowed: {variable.allowed}"
    if (unsecured := environ.get("UNSECURED", "false")) != "false":
        yield (f"UNSECURED is {unsecured[:60]!a}; allowed: false or not set, since Vast's"
               " signatures alone guard the way in")


def warnings_of(environ: Mapping[str, str]) -> Iterator[str]:
    if environ.get(KEY):
        yield (f"{KEY} is of no use here: PyWorker hands no headers on; Vast's signatures guard the"
               " way in")
    if armed := [name for name in GUARDS if environ.get(name, "").strip("0.")]:
        yield f"{', '.join(armed)}: of no effect here: Vast itself ends the workers of an endpoint"


def check_port(settings: Settings) -> None:
    """Raises SettingsError unless PyWorker can listen, as it would only tell Vast, for ever."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.worker_port))
            probe.listen()
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"PyWorker cannot listen on HOST {settings.host[:60]!a}, WORKER_PORT"
                            f" {settings.worker_port}: {getattr(error, 'strerror', '') or error};"
                            " choose another or end what uses it") from error


# -----------------------------------------------------------------------------
# Worker: bark-worker.py as a child process on loopback

PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
DRAIN_SECONDS = 10.0  # that the worker gives itself for requests under way when it shall end
STUCK_SECONDS = 2.0   # more, and it is killed


@contextlib.contextmanager
def running_worker(environment: Mapping[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The worker and its port. It outlives neither the context nor this process, whatever ends it.

    The port is reserved: as `place` does not listen, Linux gives it to nobody but a server that
    reuses addresses, as the worker's does. A process group of its own has Ctrl-C reach the worker
    once, from here.
    """
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
        worker = subprocess.Popen([sys.executable, "-u", WORKER], stdin=subprocess.DEVNULL,
                                  env={**environment, "HOST": "127.0.0.1", "PORT": str(port)},
                                  process_group=0, preexec_fn=dying_with_parent())
        try:
            yield worker, port
        finally:
            worker.kill()
            worker.wait()


def dying_with_parent() -> Callable[[], None]:
    """For the child to run first: Linux will kill it once the thread that made it, main's, ends."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def arrange() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # too late: it is gone already
            os._exit(1)
    return arrange


# -----------------------------------------------------------------------------
# PyWorker: Vast's SDK, set up for the worker. It runs on the main thread's event loop.

# PyWorker forwards these paths, and counts the characters of that field.
TEXT_FIELDS = {"/synthesize": "text", "/v1/audio/speech": "input"}
MAX_BODY = 2 << 20  # bytes; the worker itself takes half of it
READY_LINE, FAILED_LINE = "bark-worker: the model is ready", "bark-worker: the model has failed"
# PyWorker takes who may not name a worker's requests: they are not signed. A session costs nothing
# and its end may send the worker, or any other machine, a request that nobody checked.
UNSIGNED_PATHS = ("/session/create", "/session/end", "/session/get", "/session/health")
BENCHMARK_TEXT = ("The quick brown fox jumps over the lazy dog, and the dog does not mind, for the"
                  " day is warm.")
BENCHMARK_RUNS = 2  # the better one counts; the GPU is paid for meanwhile
LAST_WORDS_SECONDS = 0.5  # for an answer on its way to a client


def import_sdk() -> Any:
    """Vast's module, which takes a second. Raises SettingsError."""
    try:
        from vastai.serverless.server import worker as sdk
    except ImportError as error:
        raise SettingsError(f"pyworker.py needs Vast's worker SDK, which does not import: {error};"
                            " pip install -r requirements.txt") from error
    logging.getLogger("vastai").handlers.clear()  # what it says goes through ours alone
    logging.getLogger("vastai").propagate = True
    return sdk


class OwnWords(logging.Filter):
    """Of others' records errors alone, since the SDK has the root logger take everybody's DEBUG.

    Those hold addresses with keys in them. And a signature is good for a request, also when it was
    refused.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == log.name:
            return True
        if "signature" in record.getMessage().lower():
            record.msg, record.args = "PyWorker refused a request: its signature is wrong", ()
        return record.levelno >= logging.ERROR


class StatusFile:
    """What PyWorker hears of the model: it looks for two lines in a file.

    It takes a line for the one that it looks for if that is only part of it. So the file is ours
    alone, made anew at each start, and neither a log nor anything of a request is written there.
    (The SDK's `lifecycle` would do without, but then calls a worker ready without Vast's key.)
    """

    def __init__(self) -> None:
        self._file, self.path = tempfile.mkstemp(prefix="bark-worker-")  # for this user only

    def follow(self, status: str) -> None:
        if line := {"ready": READY_LINE, "failed": FAILED_LINE}.get(status):
            os.write(self._file, f"{line}\n".encode())

    def remove(self) -> None:
        os.close(self._file)
        with contextlib.suppress(OSError):
            os.unlink(self.path)


def character_count(field: str) -> Callable[[Mapping[str, Any]], float]:
    """What a request is worth to Vast's scaling: the characters of its text."""
    def count(payload: Mapping[str, Any]) -> float:
        text = payload.get(field)
        return float(len(text)) if isinstance(text, str) else 0.0
    return count


def handlers(sdk: Any, timeout: float, sample: Callable[[], dict[str, Any]]) -> list[Any]:
    """PyWorker's handlers. Exactly one has to have a benchmark, of requests that `sample` gives."""
    benchmark = sdk.BenchmarkConfig(generator=sample, runs=BENCHMARK_RUNS, concurrency=1,
                                    do_warmup=False)
    return [sdk.HandlerConfig(
        route=path, allow_parallel_requests=True, max_queue_time=timeout,
        workload_calculator=character_count(field),
        benchmark_config=benchmark if path == "/synthesize" else None)
        for path, field in TEXT_FIELDS.items()]


def guarded(routes: list[Any]) -> list[Any]:
    """PyWorker's routes, with bodies of bounded size and without what needs no signature."""
    from aiohttp import web

    async def refuse(request: Any) -> Any:
        error = {"message": f"there is no {request.path[:60]!a}", "type": "invalid_request_error",
                 "param": None, "code": "not_found"}
        return web.json_response({"status": "error", "error": error}, status=404)

    def bounded(handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
        async def handle(request: Any) -> Any:
            return await handler(request.clone(client_max_size=MAX_BODY))
        return handle

    # PyWorker adds its own after these, and the first route of a path is the one that counts.
    return [*(web.post(path, refuse) for path in UNSIGNED_PATHS),
            *(web.post(route.path, bounded(route.handler)) for route in routes)]


class PyWorker:
    """Vast's PyWorker before a worker on a port of loopback.

    Beside the SDK's options it sets `routes`, the benchmark's `concurrency` and `update_pending`,
    and reads what PyWorker knows of itself.
    """

    def __init__(self, sdk: Any, settings: Settings, port: int):
        self._settings, self._health, self._told = settings, {}, ("", 0.0)
        self._status = StatusFile()
        self._worker = sdk.Worker(sdk.WorkerConfig(
            model_server_url="http://127.0.0.1", model_server_port=port,
            model_log_file=self._status.path, model_healthcheck_url="/ready",
            handlers=handlers(sdk, settings.timeout, self._sample),
            log_action_config=sdk.LogActionConfig(on_load=[READY_LINE], on_error=[FAILED_LINE])))
        self._worker.routes = guarded(self._worker.routes)

    def _sample(self) -> dict[str, Any]:
        """One of the benchmark's requests; its seed is drawn, else the rest come from a cache."""
        return {"text": BENCHMARK_TEXT[:self._health["max_text_length"]], "seed": -1}

    async def run(self) -> None:
        """Serves, and reports to Vast; does not end by itself as long as all is well."""
        await self._worker.run_async(host=self._settings.host)

    def follow(self, health: dict[str, Any]) -> None:
        """Has PyWorker hear of what becomes of the model, by the worker's /health."""
        if health["status"] == self._health.get("status"):
            return
        self._health = health
        if health["status"] == "ready":
            self._worker.backend.benchmark_handler.concurrency = health["slots"]
            os.chdir(benchmark_folder(self._settings.models, health))
        self._status.follow(health["status"])

    def report(self) -> None:
        """Has the log tell what PyWorker tells Vast alone, and Vast hear of a ready model at once.

        PyWorker itself would tell that up to 10 s later, which are paid for and waited for.
        """
        metrics = self._worker.backend.metrics
        error, speed = metrics.model_metrics.error_msg or "", metrics.model_metrics.max_throughput
        if error != self._told[0]:
            log.error("PyWorker reports an error to Vast: %s", error.partition("\n")[0])
        if speed != self._told[1]:
            metrics.update_pending = True
            log.info("PyWorker tells Vast: ready, %.1f characters a second", speed)
        self._told = error, speed

    async def wait_idle(self, seconds: float) -> None:
        """Returns when no request is left and the last answer is out, or after so many seconds."""
        deadline = time.monotonic() + seconds - LAST_WORDS_SECONDS
        working = self._worker.backend.metrics.model_metrics.requests_working
        while working and time.monotonic() < deadline:
            await asyncio.sleep(LAST_WORDS_SECONDS / 10)
        await asyncio.sleep(LAST_WORDS_SECONDS)

    def close(self) -> None:
        self._status.remove()


def benchmark_folder(models: Path, health: Mapping[str, Any]) -> Path:
    """A folder for the benchmark's result: beside the models, if that can be written.

    PyWorker keeps it in a file of the working folder, and takes it from there the next time, so
    each worker that may be faster or slower than another has a folder of its own.
    """
    facts = [health[name] for name in ("version", "slots", "model_id", "device", "dtype")]
    name = f"benchmark-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
    for parent in (models / "bark-worker", Path(tempfile.gettempdir())):
        folder = parent / name
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                break
    return folder


# -----------------------------------------------------------------------------
# Main: the wiring

LOOK_SECONDS = 0.25  # between looks at the worker and at PyWorker


def parse_arguments(arguments: list[str]) -> None:
    """Answers --help and --version and ends; there is nothing else to say."""
    width = max(len(variable.name) for variable in VARIABLES)
    rows = [f"  {v.name.format(port='N'):<{width}}  {v.meaning}" for v in VARIABLES]
    parser = argparse.ArgumentParser(
        prog="pyworker.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Serves an endpoint of Vast.ai: bark-worker.py, which takes its own settings,"
                    "\nbehind Vast's PyWorker. PORT, BARK_API_KEY and the guards are of no use.",
        epilog="environment variables that it needs; Vast sets most of them:\n" + "\n".join(rows)
               + "\n\nthe others: python bark-worker.py --help")
    parser.add_argument("--version", action="version", version=VERSION)
    parser.parse_args(arguments)


class Signals:
    """Keeps the first SIGTERM or SIGINT in `received`; a second one kills as usual."""

    def __init__(self) -> None:
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = number
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)


async def ask_health(session: Any) -> dict[str, Any] | None:
    """What the worker says of itself; None while it says nothing."""
    from aiohttp import ClientError

    try:
        async with session.get("/health") as answer:
            return await answer.json()
    except (ClientError, TimeoutError):
        return None


async def serve(pyworker: PyWorker, worker: subprocess.Popen[bytes], port: int,
                signals: Signals) -> int:
    """Runs until a signal, or one of the two ends; the exit status."""
    from aiohttp import ClientSession, ClientTimeout

    serving = asyncio.create_task(pyworker.run())
    async with ClientSession(f"http://127.0.0.1:{port}", timeout=ClientTimeout(1.0)) as session:
        while worker.poll() is None and not signals.received and not serving.done():
            if health := await ask_health(session):
                pyworker.follow(health)
            pyworker.report()
            await asyncio.sleep(LOOK_SECONDS)
    if serving.done():
        log.error("PyWorker ended: %r", serving.exception() or "it returned")
        return 1
    return await end(pyworker, worker, signals.received)


async def end(pyworker: PyWorker, worker: subprocess.Popen[bytes], received: int) -> int:
    """Passes a signal on, if there was one, and lets the answers under way out."""
    began = time.monotonic()
    if received:
        worker.send_signal(received)
    while worker.poll() is None and time.monotonic() < began + DRAIN_SECONDS + STUCK_SECONDS:
        await asyncio.sleep(LAST_WORDS_SECONDS / 10)
    await pyworker.wait_idle(began + DRAIN_SECONDS - time.monotonic())
    if worker.poll() is None:
        log.error("bark-worker.py does not end by itself: killed")
        worker.kill()
    status = worker.wait()
    if status == -signal.SIGTERM == -received:
        return 0  # as it says itself once it has more than begun
    status = status if status >= 0 else 128 - status  # as a shell has it
    if not received:
        log.error("bark-worker.py ended by itself, with status %d", status)
    return status


def main(arguments: list[str] | None = None) -> int:
    parse_arguments(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr,
                        format="%(asctime)s %(levelname)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(OwnWords())
    try:
        settings = Settings.from_env(os.environ)
        check_port(settings)
        sdk = import_sdk()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    for warning in warnings_of(os.environ):
        log.warning("%s", warning)
    signals = Signals()
    with running_worker(settings.worker_environment) as (worker, port):
        pyworker = PyWorker(sdk, settings, port)
        log.info("PyWorker takes Vast's requests on port %d", settings.worker_port)
        try:
            return asyncio.run(serve(pyworker, worker, port, signals))
        finally:
            pyworker.close()


if __name__ == "__main__":
    sys.exit(main())
