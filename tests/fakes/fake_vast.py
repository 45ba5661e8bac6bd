"""Vast.ai on loopback: its API as the real `vastai` CLI uses it, and containers that really run.

    with FakeVast(tmp_path, {"suno/bark-small": toy_dir}) as vast:
        vast.add_offer(gpu_name="RTX 3060", dph_base=0.06)
        subprocess.run(["manage-bark-worker.sh", "start", "--yes"],
                       env={"PATH": ..., **vast.environment(tmp_path)})

Everything that has to do with offers, instances, bids, labels and logs is there. An instance goes
through provisioning, loading and running by the clock; `fate` makes it fail on the way. A running
one does what the real container would: in an ssh launch mode only the on-start command, in args
mode the image's entrypoint, with the container's environment and nothing of ours.

There are no containers here, so /app, /workspace, /root, /tmp and their like are folders of the
instance (see Container.translate), and its console, /proc/1/fd/1, is a pipe whose end is what
`vastai logs` shows. The port that is mapped is the one that the worker really listens on: PORT and
HOST are the only variables that differ from what was asked for.

It follows the API's documents and the CLI's source; where neither settles a matter, it takes the
nastier of two plausible answers. Nothing in it was compared with the live service.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import operator
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import psutil

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "ghcr.io/darvondoom/libread-bark-tts:latest"
IMAGE_ENV = {"HF_HOME": "/workspace/models"}  # of Dockerfile.ghcr, for whatever runs in it
ONSTART = ("nohup bash -c 'while :; do python -u /app/bark-worker.py; sleep 1; done'"
           " >>/proc/1/fd/1 2>&1 &")
TICK = 0.02  # seconds between looks at what the clock has brought about
END_SECONDS = 10.0  # for killed processes to be gone
HOURS_PER_MONTH = 30 * 24
DAY = 86_400.0  # seconds
NO_HUB = "http://127.0.0.1:9"  # the discard port, on which nobody listens

DEFAULT_ROWS = 64  # of a search that names no limit
PAGE_ROWS = 25  # most instances in one page
LEAST_DISK = 8.0  # GB
LONGEST_ENV, LONGEST_VARIABLE, LONGEST_START, LONGEST_LABEL = 32_768, 256, 4096, 256  # characters
RUNTYPES = {"ssh", "ssh_proxy", "ssh_direc ssh_proxy", "jupyter_proxy ssh_proxy",
            "jupyter_direc ssh_direc ssh_proxy", "args"}
FATES = {"healthy", "exited", "offline", "unknown", "stuck", "silent", "outbid", "gpu_taken",
         "refuses_destroy", "worker_fails"}  # and "error: MESSAGE"

# Seconds that have to pass between two requests to an endpoint, and requests in 60 s.
INTERVALS = {"show instance": 2.0, "show instances": 1.0, "create": 4.5, "change": 1.0,
             "destroy": 3.0, "bid": 5.5}
SEARCHES_PER_MINUTE = 10
JITTER = 0.05  # seconds that a loaded machine may take from an interval

OFFER = {
    "gpu_name": "RTX 3060", "num_gpus": 1, "gpu_ram": 12288, "gpu_total_ram": 12288,
    "gpu_frac": 1.0, "gpu_arch": "nvidia", "gpu_display_active": False, "gpu_mem_bw": 306.7,
    "gpu_max_power": 170.0, "gpu_max_temp": 90.0, "compute_cap": 860, "bw_nvlink": 0.0,
    "cuda_max_good": 12.8, "driver_version": "570.86.15", "cpu_name": "AMD Ryzen 5 5600X",
    "cpu_arch": "amd64", "cpu_cores": 12, "cpu_cores_effective": 12.0, "cpu_ghz": 3.7,
    "cpu_ram": 32_000, "has_avx": 1, "mobo_name": "B550", "pci_gen": 4.0, "pcie_bw": 12.0,
    "disk_space": 200.0, "disk_bw": 1500.0, "disk_name": "nvme", "inet_up": 300.0,
    "inet_down": 500.0, "inet_up_cost": 0.01, "inet_down_cost": 0.01, "direct_port_count": 20,
    "static_ip": False, "datacenter": False, "vms_enabled": False, "external": False,
    "ubuntu_version": "22.04", "cluster_id": None, "geolocation": "Sweden, SE",
    "verified": True, "verification": "verified", "reliability": 0.99, "reliability2": 0.99,
    "duration": 30 * DAY, "dph_base": 0.06, "min_bid": 0.03, "storage_cost": 0.15,
    "dlperf": 12.0, "dlperf_per_dphtotal": 150.0, "total_flops": 12.7,
    "flops_per_dphtotal": 150.0, "score": 200.0, "rentable": True, "rented": False,
    "host_id": 1000, "machine_id": 0, "public_ipaddr": "127.0.0.1",
}
VOLUME = {  # what the CLI shows of one; that it has storage_cost, in $/GB/month, is a guess
    "id": 900, "label": "weights", "disk_space": 20.0, "status": "active", "start_date": 1.7e9,
    "machine_id": 50_000, "geolocation": "Sweden, SE", "storage_cost": 0.1, "instances": [],
}
SEARCHABLE = OFFER.keys() - {"public_ipaddr", "cpu_name", "disk_name"} | {"id", "dph_total"}
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq, "neq": operator.ne, "gt": operator.gt, "gte": operator.ge,
    "lt": operator.lt, "lte": operator.le, "in": lambda value, wanted: value in wanted,
    "notin": lambda value, wanted: value not in wanted,
}


class ApiError(Exception):
    """An answer that is not what was hoped for."""

    def __init__(self, status: int, error: str, message: str, **more: object) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"success": False, "error": error, "msg": message, **more}


def invalid(message: str) -> ApiError:
    return ApiError(400, "invalid_args", message)


@dataclass(frozen=True)
class Request:
    """What was asked. `time` is monotonic; `authorized` means with the account's key, and
    `container` is the id of the instance whose own key it was, if it was one."""

    time: float
    method: str
    path: str
    query: dict[str, str]
    body: Any
    authorized: bool
    container: int | None = None

    def matches(self, method: str, path_pattern: str) -> bool:
        """Whether the method is that one ("*": any) and the pattern is found in the path."""
        return method in ("*", self.method) and bool(re.search(path_pattern, self.path))


@dataclass
class Fault:
    """What goes wrong with the next matching requests, see FakeVast.fault."""

    method: str
    path_pattern: str
    times: float
    status: int | None
    body: object
    headers: dict[str, str]
    drop: str | None
    delay: float
    skip: int
    effect: bool

    @property
    def replaces_answer(self) -> bool:
        return self.status is not None or self.body is not None

    @property
    def has_effect(self) -> bool:
        return self.effect or self.drop == "after" or not (self.drop or self.replaces_answer)


@dataclass
class Callback:
    method: str
    path_pattern: str
    call: Callable[[Request], object]
    when: str
    times: float


def take(entries: Iterable[Any], request: Request) -> Any:
    """The first of the faults or callbacks that is meant by the request, used up by one."""
    for entry in entries:
        if entry.times <= 0 or not request.matches(entry.method, entry.path_pattern):
            continue
        if getattr(entry, "skip", 0) > 0:
            entry.skip -= 1
            continue
        entry.times -= 1
        return entry
    return None


# -----------------------------------------------------------------------------
# Search


def plain(name: str, value: Any) -> Any:
    """A row's value as queries compare it."""
    if name == "geolocation" and value:
        return value.rpartition(", ")[2]
    if name == "driver_version" and value:
        return int("".join(part.zfill(3) for part in value.split(".")))
    return value


def alike(wanted: Any, value: Any) -> Any:
    """What a query names, in the type of the row's value; raises ApiError."""
    if isinstance(wanted, list):
        return [alike(one, value) for one in wanted]
    if wanted is None or value is None:
        return wanted
    try:
        if isinstance(value, bool):
            return {"true": True, "false": False}[str(wanted).lower()]
        return float(wanted) if isinstance(value, (int, float)) else str(wanted)
    except (KeyError, TypeError, ValueError) as error:
        raise invalid(f"{wanted!r} cannot be compared with {value!r}") from error


def fits(row: dict[str, Any], conditions: dict[str, Any], known: Iterable[str]) -> bool:
    """Whether a row meets every condition {field: {operator: value}}; raises ApiError."""
    results = [True]
    for name, tests in conditions.items():
        if name not in known:
            raise invalid(f"unknown field {name}")
        if not isinstance(tests, dict) or not tests.keys() <= OPERATORS.keys():
            raise invalid(f"bad condition on {name}: {tests!r}")
        value = plain(name, row.get(name))
        for test, wanted in tests.items():
            if isinstance(wanted, list) != (test in ("in", "notin")):
                raise invalid(f"{name} {test} {wanted!r}")
            ordered = test in ("gt", "gte", "lt", "lte")
            results.append(not (value is None and ordered)
                           and OPERATORS[test](value, alike(wanted, value)))
    return all(results)


def sort_rows(rows: list[dict[str, Any]], order: list[tuple[str, str]],
              known: Iterable[str]) -> None:
    """Sorts in place by (column, "asc" or "desc") pairs; raises ApiError."""
    for column, direction in reversed(order):
        if (rows and column not in known) or direction not in ("asc", "desc"):
            raise invalid(f"cannot order by {column} {direction}")
        values = [row.get(column) for row in rows]
        keys = [(value is None, 0 if value is None else value) for value in values]
        order_now = sorted(range(len(rows)), key=keys.__getitem__, reverse=direction == "desc")
        rows[:] = [rows[i] for i in order_now]


def storage_price(storage_cost: float, disk: float) -> float:
    """$/h, of a price in $/GB/month."""
    return storage_cost * disk / HOURS_PER_MONTH


# -----------------------------------------------------------------------------
# Containers


def reserve_port() -> socket.socket:
    """A socket that keeps a free port from others, yet lets a server that reuses addresses in.

    As it does not listen, connections are refused until that server is there.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


class Console:
    """The pipe that stands for /proc/1/fd/1: what is written into it is appended to the log."""

    def __init__(self, pipe: Path, log: Path) -> None:
        self.pipe = pipe
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        self._reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._writer = os.open(pipe, os.O_WRONLY)  # so that it outlives its other writers
        os.set_blocking(self._reader, True)
        self._thread = threading.Thread(target=self._copy, args=(log,), daemon=True)
        self._thread.start()

    def _copy(self, log: Path) -> None:
        with log.open("ab", buffering=0) as sink:
            while text := os.read(self._reader, 1 << 16):
                sink.write(text)

    def close(self) -> None:
        """Takes what was written and ends; its writers have to be dead."""
        os.close(self._writer)
        self._thread.join(END_SECONDS)
        os.close(self._reader)
        self.pipe.unlink(missing_ok=True)


class Container:
    """A folder that stands for an instance's file system, and the processes that run in it."""

    OWN_FOLDERS = "app|data|etc|home|mnt|opt|root|run|srv|tmp|var|workspace"

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.root = folder / "root"
        self.process: subprocess.Popen[bytes] | None = None
        self.console: Console | None = None
        self.ports: dict[str, socket.socket] = {}  # "8080/tcp": reserved port outside
        for name in self.OWN_FOLDERS.split("|"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "var/log").mkdir(exist_ok=True)
        self._install_image()
        log.touch()

    def _install_image(self) -> None:
        for name in ("bark-worker.py", "listener.py", "page.html", "pyworker.py",
                     "builtin-voice"):
            (self.root / "app" / name).symlink_to(ROOT / name)
        programs = self.root / "usr/local/bin"
        programs.mkdir(parents=True)
        for name in ("python", "python3"):
            wrapper = programs / name
            wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
            wrapper.chmod(0o755)

    def translate(self, text: str) -> str:
        """The text with the container's paths as they are called on this machine."""
        def here(match: re.Match[str]) -> str:
            return str(self.folder / "console") if match[1].startswith("proc") \
                else f"{self.root}{match[0]}"
        return re.sub(rf"(?<![\w./}}-])/(proc/1/fd/[12]|{self.OWN_FOLDERS})(?![\w.-])", here, text)

    def add_model(self, cache: Path, name: str, model: Path, broken: bool) -> None:
        """Puts a model into the hub's cache, whole or with weights that are none."""
        repo = cache / "hub" / f"models--{name.replace('/', '--')}"
        revision = hashlib.sha1(name.encode()).hexdigest()
        snapshot = repo / "snapshots" / revision
        if snapshot.exists():
            return
        snapshot.mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(revision)
        for entry in model.iterdir():
            if broken and entry.name.startswith(("pytorch_model", "model.safetensors")):
                (snapshot / entry.name).write_bytes(b"these are no weights")
            else:
                (snapshot / entry.name).symlink_to(entry.resolve())

    def start(self, command: list[str], environment: dict[str, str], on_console: bool) -> None:
        """Runs the container's command, whose output is the container's or that of a file."""
        self.console = Console(self.folder / "console", self.log)
        path = self.console.pipe if on_console else self.root / "var/log/onstart.log"
        with path.open("ab", buffering=0) as output:
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.root / "root", stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def processes(self) -> list[psutil.Process]:
        """All that live in it, wherever they have put themselves: by their environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if (process.environ().get("DATA_DIRECTORY") == str(self.root / "workspace")
                        and process.status() != psutil.STATUS_ZOMBIE):
                    found.append(process)
        return found

    def kill(self) -> None:
        """Ends every process and gives the ports back; what is on the disk stays."""
        if self.process is not None:
            self._kill_processes(self.process)
            self.process = None
        if self.console is not None:
            self.console.close()
            self.console = None
        for reserved in self.ports.values():
            reserved.close()
        self.ports.clear()

    def _kill_processes(self, leader: subprocess.Popen[bytes]) -> None:
        leader.kill()
        leader.wait(END_SECONDS)
        deadline = time.monotonic() + END_SECONDS
        while living := self.processes():  # one may have started another meanwhile
            if time.monotonic() > deadline:
                raise RuntimeError(f"cannot end {living}")
            for process in living:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(living, timeout=1.0)

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)


# -----------------------------------------------------------------------------
# Instances


@dataclass(eq=False)
class Instance:
    """A rented machine. `actual` is the API's actual_status as of the last look or tick.

    `api_key` is the container's own, not the worker's, which is `key`. `touched` lists the
    requests that changed it. `destroy_refusals` is how many DELETEs it outlives, each answered
    with success.
    """

    id: int
    vast: FakeVast = field(repr=False)
    offer: dict[str, Any] = field(repr=False)
    label: str | None
    env: dict[str, str] = field(repr=False)
    onstart: str | None = field(repr=False)
    runtype: str
    image: str
    disk: float
    price: float | None = None
    args: list[str] | None = None
    user: str | None = None
    fate: str = "healthy"
    created: float = field(default_factory=time.time)
    intended: str = "running"
    actual: str | None = None
    status_msg: str | None = None
    min_bid: float = 0.0
    is_outbid: bool = False
    destroy_refusals: float = 0
    destroyed: bool = False
    touched: list[str] = field(default_factory=list)
    api_key: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    def __post_init__(self) -> None:
        if self.fate not in FATES and not self.fate.startswith("error: "):
            raise ValueError(f"unknown fate {self.fate!r}")
        if self.fate == "refuses_destroy":
            self.destroy_refusals = math.inf
        self.min_bid = self.offer["min_bid"]
        self._boot_time = self._stop_time = -math.inf  # monotonic
        self._running_since = math.inf
        self._first_boot = True
        self._exit_status: int | None = None  # in args mode, of a container that ended by itself
        self._frozen = False  # its state was set by hand; offline outlasts start and stop
        self._looks = 0
        self._log_start = 0  # bytes of the log from before this run
        log = self.vast.folder / "logs" / f"{self.id}.log"
        log.parent.mkdir(exist_ok=True)
        self.container = Container(self.vast.folder / f"instance-{self.id}", log)

    # for tests

    @property
    def key(self) -> str | None:
        """The worker's key."""
        return self.env.get("BARK_API_KEY")

    @property
    def log(self) -> str:
        """All that the container has written, which is what `vastai logs` shows."""
        return self.container.log.read_text(errors="replace")

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """What runs the on-start command or the entrypoint."""
        return self.container.process

    @property
    def port(self) -> int | None:
        """Where the worker listens, once its log says so."""
        text = self.container.log.read_bytes()[self._log_start:].decode(errors="replace")
        found = re.findall(r"listening on http://\S+:(\d+)", text)
        return int(found[-1]) if found and self.container.ports else None

    @property
    def worker_url(self) -> str:
        """The address as the API tells it, whether anyone listens there or not."""
        for name, reserved in self.container.ports.items():
            if name != "22/tcp":
                return f"http://127.0.0.1:{reserved.getsockname()[1]}"
        raise AssertionError(f"instance {self.id} has no port for a worker")

    def workers(self, program: str = "bark-worker.py") -> list[psutil.Process]:
        """The Python processes among its own that run the worker, or pyworker.py before it."""
        found = []
        for process in self.container.processes():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if line and Path(line[0]).name.startswith("python") and any(
                        word.endswith(program) for word in line):
                    found.append(process)
        return found

    def crash_worker(self) -> None:
        """Kills the worker and nothing else, as a lack of memory would."""
        workers = self.workers()
        assert workers, f"instance {self.id} runs no worker"
        for worker in workers:
            worker.kill()
        leader = self.process
        if leader and leader.pid in [worker.pid for worker in workers]:
            leader.wait(END_SECONDS)  # before psutil, which would take its exit status
        psutil.wait_procs(workers, timeout=END_SECONDS)

    def outbid(self) -> None:
        """Somebody pays more: it is stopped, and goes on by itself once its bid is raised."""
        with self.vast.lock:
            self.is_outbid = True
            self.min_bid = (self.price or self.min_bid) + 0.01
            self.advance()

    def go_offline(self) -> None:
        self.set_status("offline", "machine went offline")

    def set_status(self, actual: str | None, status_msg: str | None = None) -> None:
        """Sets what the API tells, until it is started or stopped; processes end with running."""
        with self.vast.lock:
            self._frozen = True
            self._show(actual, status_msg)

    # for the API

    def boot(self, first: bool = False, at: float | None = None) -> None:
        """Starts it, anew if it runs. Its disk stays."""
        self._end_processes()
        self._frozen = self._frozen and self.actual == "offline"
        self.intended, self._first_boot, self._exit_status = "running", first, None
        self.actual = self.actual if self._frozen or first else "loading"
        self._boot_time = time.monotonic() if at is None else at
        self.advance()

    def stop(self) -> None:
        self._frozen = self._frozen and self.actual == "offline"
        self.intended, self._stop_time = "stopped", time.monotonic()
        self._end_processes()
        self.advance()

    def destroy(self) -> bool:
        """Whether it really went."""
        if self.destroy_refusals > 0:
            self.destroy_refusals -= 1
            return False
        self.destroyed = True
        self.container.remove()
        return True

    def advance(self) -> None:
        """Brings about what the clock has in store."""
        if not (self._frozen or self.destroyed):
            self._show(*self._state(time.monotonic()))

    def _show(self, actual: str | None, message: str | None) -> None:
        before, self.actual, self.status_msg = self.actual, actual, message
        if actual == "running" and before != "running" and not self._frozen:
            self._start_processes()
        elif actual != "running":
            self._end_processes()

    def _state(self, now: float) -> tuple[str | None, str | None]:
        """The state that is due: actual_status and status_msg."""
        if self.intended == "stopped":
            stopped = now >= self._stop_time + self.vast.stopping
            return ("exited", "container stopped") if stopped else (self.actual, self.status_msg)
        if self.is_outbid:
            return "stopped", "instance was outbid"
        if self.fate == "gpu_taken" and not self._first_boot:
            return "scheduling", "waiting for the machine's resources"
        ready = self._boot_time + (self.vast.provisioning if self._first_boot else 0.0)
        if now < ready:
            return None, None
        if self.fate.startswith("error: "):
            return "loading", self.fate.removeprefix("error: ")
        if self.fate == "stuck" or now < ready + self.vast.loading:
            return "loading", f"Pulling from {self.image.rpartition(':')[0].partition('/')[2]}"
        if self.fate in ("exited", "offline", "unknown"):
            return self.fate, f"container {self.fate}"
        if self.fate == "outbid":
            self.is_outbid = True
            return "stopped", "instance was outbid"
        if self.runtype == "args" and self.process:
            status = self.process.poll()
            self._exit_status = 128 - status if status is not None and status < 0 else status
        if self._exit_status is not None:
            return "exited", f"container exited with status {self._exit_status}"
        return "running", f"success, running {self.image}/{self.runtype.split()[0]}"

    def _start_processes(self) -> None:
        container = self.container
        self._running_since = time.monotonic()
        self._log_start = container.log.stat().st_size
        self._map_ports()
        command = self._command()
        if command is None or self.fate == "silent":
            return
        home = Path(container.translate({**IMAGE_ENV, **self.env}["HF_HOME"]))
        for name, model in self.vast.models.items():
            container.add_model(home, name, model, broken=self.fate == "worker_fails")
        container.start(command, self.environment(), on_console=self.runtype == "args")

    def _end_processes(self) -> None:
        self.container.kill()
        self._running_since = math.inf

    def _command(self) -> list[str] | None:
        """What the launch mode runs: ssh and jupyter replace the entrypoint by Vast's own.

        Whether that works as the image's own user is not known: here it does not, to be sure.
        """
        translate = self.container.translate
        if self.runtype != "args":
            runs = self.onstart and self.user == "root"
            return ["bash", "-c", translate(self.onstart)] if runs else None
        entrypoint = shlex.split(self.onstart or "python -u /app/bark-worker.py")
        program, *rest = [translate(word) for word in entrypoint + (self.args or [])]
        own = self.container.root / "usr/local/bin" / program
        return [str(own) if own.exists() else program, *rest]

    def _map_ports(self) -> None:
        asked = {}
        for name in self.env:
            if match := re.fullmatch(r"-p (?:\d+:)?(\d+)(?:/(tcp|udp))?", name):
                asked[f"{match[1]}/{match[2] or 'tcp'}"] = True
        if "ssh_direc" in self.runtype:
            asked["22/tcp"] = True
        self.container.ports.update({name: reserve_port() for name in asked})

    def worker_port(self) -> int:
        """Where the worker shall listen so that it is found; 0 where nobody outside could."""
        inside = f"{self.env.get('PORT') or 8080}/tcp"
        private = self.env.get("HOST", "").startswith(("127.", "localhost", "::1"))
        if private or inside not in self.container.ports:
            return 0
        return self.container.ports[inside].getsockname()[1]

    def environment(self) -> dict[str, str]:
        """What a process of the container sees."""
        container = self.container
        root = container.root
        injected = {
            "PATH": f"{root}/usr/local/bin:/usr/bin:/bin", "HOME": f"{root}/root",
            "LANG": "C.UTF-8", "TMPDIR": f"{root}/tmp", "HOSTNAME": secrets.token_hex(6),
            "OMP_NUM_THREADS": "1", "CONTAINER_ID": str(self.id),
            "CONTAINER_API_KEY": self.api_key, "VAST_CONTAINERLABEL": f"C.{self.id}",
            "PUBLIC_IPADDR": "127.0.0.1", "GPU_COUNT": str(self.offer["num_gpus"]),
            "DATA_DIRECTORY": f"{root}/workspace", "SSH_PUBLIC_KEY": "ssh-ed25519 AAAA nobody",
            "OPEN_BUTTON_TOKEN": secrets.token_hex(16), **self.vast.container_env,
        }
        for name, reserved in container.ports.items():
            number, _, kind = name.partition("/")
            injected[f"VAST_{kind.upper()}_PORT_{number}"] = str(reserved.getsockname()[1])
        passed = {name: container.translate(value)
                  for name, value in {**IMAGE_ENV, **self.env}.items() if not name.startswith("-")}
        here = {"PORT": str(self.worker_port()), "HOST": "127.0.0.1",
                "DATA_DIRECTORY": injected["DATA_DIRECTORY"]}
        return {**injected, **passed, **here}

    # as the API tells it

    @property
    def storage_price(self) -> float:
        return storage_price(self.offer["storage_cost"], self.disk)

    @property
    def gpu_price(self) -> float:
        return self.offer["dph_base"] if self.price is None else self.price

    def row(self) -> dict[str, Any]:
        """Its row in a list; every second look finds a line feed after the address."""
        self._looks += 1
        now = time.monotonic()
        bare = (self._first_boot and now < self._boot_time + self.vast.provisioning) or (
            self.vast.null_rows and self._looks == 1)
        ended = self.intended == "stopped" or self.actual in ("stopped", "exited", None)
        taken = ("gpu_name", "num_gpus", "gpu_ram", "gpu_total_ram", "gpu_arch", "machine_id",
                 "host_id", "geolocation", "cuda_max_good", "driver_version", "cpu_ram",
                 "cpu_cores_effective", "inet_up", "inet_down", "inet_up_cost", "inet_down_cost",
                 "reliability2", "verification", "storage_cost", "static_ip")
        return {
            **{name: self.offer[name] for name in taken}, "id": self.id,
            "actual_status": None if bare else self.actual, "intended_status": self.intended,
            "cur_state": "stopped" if ended else "running", "next_state": self.intended,
            "status_msg": self.status_msg, "label": self.label, "image_uuid": self.image,
            "image_runtype": self.runtype, "image_args": self.args or [],
            "onstart": self.onstart, "start_date": None if bare else self.created,
            "extra_env": None if bare else [list(pair) for pair in self.env.items()],
            "end_date": self.created + self.offer["duration"], "duration": None,
            "uptime_mins": self._uptime(now), "dph_base": self.gpu_price,
            "dph_total": self.gpu_price + self.storage_price,
            "storage_total_cost": self.storage_price, "is_bid": self.price is not None,
            "min_bid": self.min_bid, "disk_space": self.disk, "disk_usage": 2.5,
            "disk_util": 0.05, "gpu_util": 0.0, "volume_info": [], "template_id": None,
            "template_name": None, "public_ipaddr": "127.0.0.1" + "\n" * (self._looks % 2),
            "ssh_host": "localhost", "ssh_port": 9, "ssh_idx": "0", "direct_port_start": -1,
            "direct_port_end": -1, **({} if bare else self._port_fields(now)),
        }

    def _uptime(self, now: float) -> float | None:
        return (now - self._running_since) / 60 if self.actual == "running" else None

    def _port_fields(self, now: float) -> dict[str, Any]:
        """`ports` is there on running instances only, and after a while."""
        if self.actual != "running" or now < self._running_since + self.vast.late_ports:
            return {}
        return {"ports": {
            name: [{"HostIp": "0.0.0.0", "HostPort": str(reserved.getsockname()[1])}]
            for name, reserved in self.container.ports.items()} or None}

    def daemon_log(self) -> str:
        """What the host's daemon says, the container's environment and all."""
        variables = "".join(f" -e {name}={value}" for name, value in self.environment().items())
        return (f"{self.image}: Pulling from registry\nStatus: Image is up to date\n"
                f"docker create --name C.{self.id}{variables} {self.image}\n"
                f"C.{self.id}: {self.actual}\n")


# -----------------------------------------------------------------------------
# The API

ROUTES: list[tuple[str, re.Pattern[str], str]] = []
OPEN_PATHS = ("/api/v0/gpu_names/unique/", "/results/")  # need no key


def route(method: str, pattern: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a method of FakeVast for a path, whose last slash is optional."""
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((method, re.compile(pattern.rstrip("/") + "/?"), function.__name__))
        return function
    return register


class Api:
    """What the API answers: each path of it, on the account that FakeVast keeps."""

    url: str
    offers: dict[int, dict[str, Any]]
    instances: dict[int, Instance]
    destroyed: list[int]
    secrets: list[str]
    page_rows: int
    user: dict[str, Any]
    volumes: list[dict[str, Any]]
    _next_id: dict[str, int]
    _results: dict[str, tuple[str, list[float]]]

    def _all(self) -> list[Instance]:
        raise NotImplementedError

    def _draw_id(self, kind: str) -> int:
        self._next_id[kind] += 1
        return self._next_id[kind]

    def _find(self, number: str | int) -> Instance:
        for instance in self._all():
            if instance.id == int(number):
                return instance
        raise ApiError(404, "no_such_instance", f"Instance {number} not found")

    # account

    @route("GET", "/api/v0/gpu_names/unique/")
    def _gpu_names(self, request: Request) -> object:
        names = {offer["gpu_name"] for offer in self.offers.values()}
        return {"success": True, "gpu_names": sorted(names | {"RTX 3060", "RTX 4090"})}

    @route("GET", "/api/v0/users/current/")
    def _user(self, request: Request) -> object:
        return self.user

    @route("GET", "/api/v0/volumes/")
    def _volumes(self, request: Request) -> object:
        return {"volumes": self.volumes}

    # offers

    @route("POST", "/api/v0/bundles/")
    def _search(self, request: Request) -> object:
        return {"offers": self._select_offers(request.body)}

    @route("PUT", "/api/v0/search/asks/")
    def _search_new(self, request: Request) -> object:
        if not isinstance(request.body, dict) or not isinstance(request.body.get("q"), dict):
            raise invalid("q is missing")
        return {"offers": self._select_offers(request.body["q"])}

    def _select_offers(self, query: Any) -> list[dict[str, Any]]:
        if not isinstance(query, dict):
            raise invalid("the query is no object")
        conditions = dict(query)
        kind = conditions.pop("type", "on-demand")
        if kind not in ("on-demand", "ondemand", "reserved", "bid"):
            raise invalid(f"unknown type {kind!r}")
        storage = conditions.pop("allocated_storage", 5.0)
        limit = conditions.pop("limit", DEFAULT_ROWS)
        if not isinstance(storage, (int, float)) or not isinstance(limit, int):
            raise invalid("allocated_storage and limit are numbers")
        order = [tuple(pair) for pair in conditions.pop("order", [["score", "desc"]])]
        fits({}, conditions, SEARCHABLE)  # so that a wrong query fails without offers, too
        rows = [offer_row(offer, kind == "bid", storage) for offer in self.offers.values()]
        rows = [row for row in rows if fits(row, conditions, SEARCHABLE)]
        sort_rows(rows, order, SEARCHABLE)
        return rows[:limit]

    @route("PUT", r"/api/v0/asks/(\d+)/")
    def _create(self, request: Request, number: str) -> object:
        body = request.body if isinstance(request.body, dict) else {}
        offer = self.offers.get(int(number))
        check_create(body)
        if offer is None or not offer["rentable"]:
            gone = bool(body.get("cancel_unavail"))
            state = "no longer available" if gone else "not available"
            raise ApiError(410 if gone else 404, "no_such_ask",
                           f"Instance type by id {number} is {state}.", ask_id=int(number))
        if body["disk"] > offer["disk_space"]:
            raise invalid(f"disk {body['disk']} is more than the machine has")
        offer.update(rentable=False, rented=True)
        instance = Instance(
            self._draw_id("instance"), self, dict(offer), body.get("label"),
            {name: str(value) for name, value in (body.get("env") or {}).items()},
            body.get("onstart"), body.get("runtype") or "ssh", body["image"], float(body["disk"]),
            body.get("price"), body.get("args"), body.get("user"), fate=offer["fate"])
        instance.is_outbid = instance.price is not None and instance.price < offer["min_bid"]
        self.instances[instance.id] = instance
        self.secrets.append(instance.api_key)
        instance.boot(first=True)
        return {"success": True, "new_contract": instance.id,
                "instance_api_key": instance.api_key}

    # instances

    @route("GET", r"/api/v0/instances/(\d+)/")
    def _show(self, request: Request, number: str) -> object:
        found = [one for one in self._all() if one.id == int(number)]
        return {"instances": found[0].row() if found else None}

    @route("GET", "/api/v0/instances/filters/")
    def _filters(self, request: Request) -> object:
        return {"filters": [{"actual_status": one.actual, "gpu_name": one.offer["gpu_name"],
                             "verification": one.offer["verification"]} for one in self._all()]}

    @route("GET", "/api/v1/instances/")
    def _list(self, request: Request) -> object:
        query = request.query
        filters, order, columns = (parse_json(query.get(name), default) for name, default in (
            ("select_filters", {}), ("order_by", []), ("select_cols", ["*"])))
        everything = [one.row() for one in self._all()]
        known = set().union(*everything) | {"ports"}
        rows = [row for row in everything if fits(row, filters, known)]
        sort_rows(rows, [(entry["col"], entry["dir"]) for entry in order], known)
        start = decode_token(query.get("after_token"))
        end = start + min(parse_limit(query.get("limit")), self.page_rows)
        page = [row if "*" in columns else {name: row.get(name) for name in columns}
                for row in rows[start:end]]
        return {"success": True, "instances": page, "instances_found": len(page),
                "next_token": encode_token(end) if end < len(rows) else None,
                "total_instances": len(rows),
                "label_counts": Counter(row["label"] or "" for row in everything)}

    @route("PUT", r"/api/v0/instances/(\d+)/")
    def _change(self, request: Request, number: str) -> object:
        instance, body = self._find(number), request.body or {}
        if "label" in body:
            check_label(body["label"])
            instance.touched.append("label")
            instance.label = body["label"]
        if "state" in body:
            self._set_state(instance, body["state"])
        if not body.keys() & {"label", "state"}:
            raise invalid("neither state nor label")
        return {"success": True}

    @route("PUT", "/api/v0/instances/")
    def _change_many(self, request: Request) -> object:
        body = request.body or {}
        for instance in [self._find(number) for number in body.get("ids", [])]:
            self._set_state(instance, body.get("state"))
        return {"success": True}

    def _set_state(self, instance: Instance, state: object) -> None:
        if state not in ("running", "stopped"):
            raise invalid(f"state {state!r}")
        instance.touched.append(str(state))
        if state == "stopped" and instance.intended != "stopped":
            instance.stop()
        elif state == "running" and (instance.intended, instance.actual) != ("running", "running"):
            instance.boot()

    @route("DELETE", r"/api/v0/instances/(\d+)/")
    def _destroy(self, request: Request, number: str) -> object:
        self._destroy_one(self._find(number))
        return {"success": True}

    @route("DELETE", "/api/v0/instances/")
    def _destroy_many(self, request: Request) -> object:
        for instance in [self._find(one) for one in (request.body or {}).get("instance_ids", [])]:
            self._destroy_one(instance)
        return {"success": True}

    def _destroy_one(self, instance: Instance) -> None:
        instance.touched.append("destroy")
        if instance.destroy():
            self.instances.pop(instance.id, None)
            self.destroyed.append(instance.id)

    @route("PUT", r"/api/v0/instances/(?:reboot|recycle)/(\d+)/")
    def _reboot(self, request: Request, number: str) -> object:
        instance = self._find(number)
        instance.touched.append("reboot")
        instance.boot()
        return {"success": True}

    @route("PUT", r"/api/v0/instances/bid_price/(\d+)/")
    def _change_bid(self, request: Request, number: str) -> object:
        """A null price is the winning bid. An outbid instance goes on once its bid suffices."""
        instance, price = self._find(number), (request.body or {}).get("price")
        if instance.price is None:
            raise invalid(f"instance {number} is not interruptible")
        check_price(price)
        instance.touched.append("bid")
        instance.price = instance.min_bid if price is None else price
        if instance.is_outbid and instance.price >= instance.min_bid:
            instance.is_outbid = False
            instance.fate = "healthy" if instance.fate == "outbid" else instance.fate
            if instance.intended == "running":
                instance.boot()
        return {"success": True}

    # logs

    @route("PUT", r"/api/v0/instances/request_logs/(\d+)/")
    def _request_logs(self, request: Request, number: str) -> object:
        instance, body = self._find(number), request.body or {}
        tail = body.get("tail", "1000")
        if not isinstance(tail, str) or not tail.isdigit():
            raise invalid(f"tail {tail!r}")
        text = instance.daemon_log() if body.get("daemon_logs") == "true" else instance.log
        wanted = body.get("filter", "")
        lines = [line for line in text.splitlines(keepends=True) if wanted in line]
        token = secrets.token_hex(16)
        self._results[token] = ("".join(lines[max(0, len(lines) - int(tail)):]), [])
        return {"success": True, "result_url": f"{self.url}/results/{token}"}

    @route("GET", r"/results/(\w+)")
    def _result(self, request: Request, token: str) -> object:
        """Not there at the first look."""
        text, looks = self._results.get(token, ("", []))
        looks.append(request.time)
        if len(looks) < 2:
            raise ApiError(404, "NoSuchKey", "The specified key does not exist.")
        return text


class FakeVast(Api):
    """Serves on a free port of loopback while used as a context manager, see the module.

    `models` maps hub ids to folders that new containers find in the cache at HF_HOME. What is
    public may be read and, for the knobs, set at any time:

    - provisioning, loading, stopping: seconds that these states take; late_ports: seconds after
      running until `ports` shows; null_rows: start_date and extra_env are null at the first look;
    - page_rows: most instances in one page;
    - container_env: what every container's environment has in addition; VAST_URL in it leads here,
      where a container's own key may start, stop or destroy that instance and nothing else;
    - offers, instances (without the strangers), strangers, destroyed, requests;
    - user: what the account is told of itself; volumes: those that it has, see VOLUME;
    - secrets: the account's key and every container's, none of which anybody shall ever see.

    Faults of this file itself answer 500 and are raised at the end.
    """

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        self.folder, self.models = folder / "vast", models
        self.folder.mkdir(parents=True)
        self.account_key = f"account-{secrets.token_hex(24)}"
        self.provisioning = self.loading = self.stopping = self.late_ports = 0.0
        self.null_rows = False
        self.user = {"id": 1, "host_agreement_accepted": False, "username": "tester",
                     "email": "tester@example.com", "credit": 12.34, "balance": 0.0,
                     "ssh_key": "ssh-ed25519 AAAA tester"}
        self.volumes: list[dict[str, Any]] = []
        self.page_rows = PAGE_ROWS
        self.container_env = {"HF_ENDPOINT": NO_HUB}
        self.offers: dict[int, dict[str, Any]] = {}
        self.instances: dict[int, Instance] = {}
        self.destroyed: list[int] = []
        self.requests: list[Request] = []
        self.secrets = [self.account_key]
        self.errors: list[Exception] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._called = threading.Condition(self.lock)
        self._faults: list[Fault] = []
        self._callbacks: list[Callback] = []
        self._results: dict[str, tuple[str, list[float]]] = {}  # log texts and looks at them
        self._next_id = {"offer": 4_100_000, "instance": 20_300_000}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.vast = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.container_env["VAST_URL"] = self.url
        self.strangers: list[Instance] = []
        self._add_stranger()

    def __enter__(self) -> FakeVast:
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(TICK,), daemon=True).start()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        """Ends every process of every container."""
        self.closing.set()
        self._ticker.join(END_SECONDS)
        self._server.shutdown()
        self._server.server_close()
        with self.lock:
            for instance in self._all():
                instance.destroyed = True
                instance.container.kill()
        if self.errors and kind is None:
            raise self.errors[0]

    def _tick(self) -> None:
        try:
            while not self.closing.wait(TICK):
                with self.lock:
                    for instance in self._all():
                        instance.advance()
        except Exception as error:
            self.errors.append(error)

    def _all(self) -> list[Instance]:
        living = [one for one in self.strangers if not one.destroyed]
        return living + list(self.instances.values())

    def _add_stranger(self) -> None:
        stranger = self.add_instance(label="bark-worker-2", fate="silent",
                                     env={"BARK_API_KEY": secrets.token_hex(16)})
        del self.instances[stranger.id]
        self.strangers.append(stranger)

    # for tests

    def environment(self, home: Path) -> dict[str, str]:
        """What a run of the script needs beside PATH so that it reaches nobody but this."""
        home.mkdir(parents=True, exist_ok=True)
        folders = {f"XDG_{name}_HOME": str(home / name.lower())
                   for name in ("CONFIG", "CACHE", "STATE", "DATA")}
        return {"VAST_URL": self.url, "VASTAI_API_KEY": self.account_key, "HOME": str(home),
                **folders, "VASTAI_NO_UPDATE_CHECK": "1", "NO_PROXY": "127.0.0.1,localhost",
                "no_proxy": "127.0.0.1,localhost"}

    def add_offer(self, *, fate: str = "healthy", **fields: Any) -> int:
        """An offer like OFFER but for `fields`; `fate` is that of the instance made of it."""
        if strange := fields.keys() - OFFER.keys() - {"id"}:
            raise TypeError(f"no fields of an offer: {', '.join(sorted(strange))}")
        with self.lock:
            number = fields.pop("id", None) or self._draw_id("offer")
            offer = {**OFFER, "machine_id": 50_000 + number % 10_000, **fields,
                     "id": number, "fate": fate}
            if "gpu_total_ram" not in fields:
                offer["gpu_total_ram"] = offer["gpu_ram"] * offer["num_gpus"]
            if "reliability" in fields and "reliability2" not in fields:
                offer["reliability2"] = fields["reliability"]
            if "verified" in fields and "verification" not in fields:
                offer["verification"] = "verified" if fields["verified"] else "unverified"
            self.offers[number] = offer
            return number

    def add_instance(self, *, label: str | None = "bark-worker", state: str = "running",
                     fate: str = "healthy", env: dict[str, str] | None = None,
                     onstart: str | None = ONSTART, runtype: str = "ssh_direc ssh_proxy",
                     image: str = IMAGE, disk: float = 50.0, price: float | None = None,
                     created: float | None = None, **fields: Any) -> Instance:
        """One that was rented an hour ago, running or stopped; `fields` are its machine's.

        `env` is added to what a worker needs to be reached and to find its model.
        """
        env = {"BARK_API_KEY": secrets.token_hex(16)} if env is None else env
        with self.lock:
            number = self.add_offer(**fields)
            instance = Instance(
                self._draw_id("instance"), self, self.offers.pop(number), label,
                {"HF_HOME": "/workspace/models", "-p 8080:8080": "1", **env}, onstart, runtype,
                image, disk, price, user="root", fate=fate,
                created=created or time.time() - 3600)
            self.instances[instance.id] = instance
            self.secrets.append(instance.api_key)
            if state == "stopped":
                instance.intended, instance._first_boot = "stopped", False
                instance.advance()
            elif state == "running":
                instance.boot(first=True, at=time.monotonic() - 3600)
            else:
                raise ValueError(f"state is {state!r}; allowed: running, stopped")
            return instance

    def processes(self) -> list[psutil.Process]:
        """Every process of every container."""
        return [one for instance in self._all() for one in instance.container.processes()]

    def calls(self, method: str, path_pattern: str) -> list[Request]:
        """The requests so far in whose path the pattern is found; method "*" is any."""
        with self.lock:
            return [one for one in self.requests if one.matches(method, path_pattern)]

    def wait_for_call(self, method: str, path_pattern: str, count: int = 1,
                      seconds: float = 30.0) -> Request:
        """The `count`th such request; fails if it has not come after `seconds`."""
        with self._called:
            came = self._called.wait_for(
                lambda: len(self.calls(method, path_pattern)) >= count, seconds)
            assert came, f"no {method} {path_pattern} ({count}) within {seconds:.0f} s"
            return self.calls(method, path_pattern)[count - 1]

    def fault(self, method: str, path_pattern: str, *, times: float = 1,
              status: int | None = None, body: object = None,
              headers: dict[str, str] | None = None, drop: str | None = None,
              delay: float = 0.0, skip: int = 0, effect: bool = False) -> None:
        """Makes the next `times` matching requests fail, after `skip` that pass.

        They are answered with `status`, `body` (an object is sent as JSON, a string as it is) and
        `headers`, without an effect unless `effect`; or their connection is closed, `drop`
        "before" or "after" the effect. `delay` seconds pass first, and may be all.
        """
        if drop not in (None, "before", "after"):
            raise ValueError(f"drop is {drop!r}; allowed: before, after")
        with self.lock:
            self._faults.append(Fault(method, path_pattern, times, status, body, headers or {},
                                      drop, delay, skip, effect))

    def on(self, method: str, path_pattern: str, callback: Callable[[Request], object], *,
           when: str = "before", times: float = 1) -> None:
        """Calls back before the effect of matching requests, or after it before the reply."""
        if when not in ("before", "after"):
            raise ValueError(f"when is {when!r}; allowed: before, after")
        with self.lock:
            self._callbacks.append(Callback(method, path_pattern, callback, when, times))

    def rate_violations(self) -> list[str]:
        """Requests that came too early for the documented limits, in words; the account's own."""
        found, last = [], {}
        with self.lock:
            timed = [(one, kind) for one in self.requests
                     if one.container is None and (kind := endpoint(one))]
        for request, kind in timed:
            gap = request.time - last.get(kind, -math.inf)
            if gap < INTERVALS.get(kind, 0.0) - JITTER:
                found.append(f"{kind}: {gap:.2f} s after the last, at least {INTERVALS[kind]} s")
            last[kind] = request.time
        searches = [one.time for one, kind in timed if kind == "search"]
        for first, eleventh in zip(searches, searches[SEARCHES_PER_MINUTE:], strict=False):
            if eleventh - first < 60.0 - JITTER:
                found.append(f"search: {SEARCHES_PER_MINUTE + 1} in {eleventh - first:.1f} s")
        return found

    # for the server

    def record(self, request: Request) -> None:
        with self._called:
            self.requests.append(request)
            self._called.notify_all()

    def take_fault(self, request: Request) -> Fault | None:
        with self.lock:
            return take(self._faults, request)

    def call_back(self, request: Request, when: str) -> None:
        with self.lock:
            found = take((one for one in self._callbacks if one.when == when), request)
        if found:
            found.call(request)

    def answer(self, request: Request) -> tuple[int, object]:
        """Status and body; a string is sent as text."""
        try:
            with self.lock:
                if self.closing.is_set():
                    raise ApiError(503, "closing", "the test is over")
                for instance in self._all():
                    instance.advance()
                return 200, self._dispatch(request)
        except ApiError as error:
            return error.status, error.body
        except Exception as error:
            self.errors.append(error)
            return 500, {"success": False, "error": "fake_vast", "msg": repr(error)}

    def _dispatch(self, request: Request) -> object:
        if not request.authorized and not request.path.startswith(OPEN_PATHS):
            check_container(request)
        for method, pattern, name in ROUTES:
            if method == request.method and hasattr(self, name) and (
                    match := pattern.fullmatch(request.path)):
                return getattr(self, name)(request, *match.groups())
        raise ApiError(404, "not_found", f"no such path: {request.method} {request.path}")

    def container_of(self, authorization: str | None) -> int | None:
        """The instance whose own key that is."""
        with self.lock:
            return next((one.id for one in self._all()
                         if authorization == f"Bearer {one.api_key}"), None)



def check_container(request: Request) -> None:
    """Lets a container's key do what Vast documents of it, and nothing else; raises ApiError."""
    if request.container is None:
        raise ApiError(401, "auth_error", "Invalid user key")
    own = re.fullmatch(rf"/api/v0/instances/{request.container}/?", request.path)
    change = request.method == "PUT" and isinstance(request.body, dict) and (
        request.body.keys() == {"state"})
    if not own or not (change or request.method == "DELETE"):
        raise ApiError(403, "auth_error", "This key may start, stop or destroy its own instance")


def endpoint(request: Request) -> str | None:
    """The name under which the limits know the endpoint; None for what has no limit."""
    if re.search(r"/bundles/|/search/asks/", request.path):
        return "search"
    if request.path.startswith("/api/v1/instances"):
        return None if "after_token" in request.query else "show instances"
    patterns = {"create": "PUT /api/v0/asks/.*", "show instance": r"GET /api/v0/instances/\d+/?",
                "change": r"PUT /api/v0/instances/(\d+/?)?", "bid": "PUT .*/bid_price/.*",
                "destroy": r"DELETE /api/v0/instances/(\d+/?)?"}
    line = f"{request.method} {request.path}"
    return next((name for name, one in patterns.items() if re.fullmatch(one, line)), None)


def offer_row(offer: dict[str, Any], bid: bool, storage: float) -> dict[str, Any]:
    """As a search shows it: prices for so many GB, of a bid with the least one."""
    base = offer["min_bid"] if bid else offer["dph_base"]
    extra = storage_price(offer["storage_cost"], storage)
    row = {**offer, "ask_contract_id": offer["id"], "is_bid": bid, "dph_base": base,
           "dph_total": base + extra, "storage_total_cost": extra}
    del row["fate"]
    return row


def check_create(body: dict[str, Any]) -> None:
    """Refuses what the real API refuses; raises ApiError."""
    env, disk = body.get("env") or {}, body.get("disk")
    if not isinstance(body.get("image"), str) or not body["image"]:
        raise invalid("image is missing")
    if not isinstance(disk, (int, float)) or disk < LEAST_DISK:
        raise invalid(f"disk {disk!r} is less than {LEAST_DISK} GB")
    if not isinstance(env, dict):
        raise invalid("env is no object")
    sizes = [len(name) + len(str(value)) for name, value in env.items()]
    if sum(sizes) > LONGEST_ENV or max(sizes, default=0) > LONGEST_VARIABLE:
        raise invalid("env is too large")
    if len(body.get("onstart") or "") + len(" ".join(body.get("args") or [])) > LONGEST_START:
        raise invalid(f"onstart and args are longer than {LONGEST_START} characters")
    if body.get("runtype", "ssh") not in RUNTYPES:
        raise invalid(f"runtype {body['runtype']!r}")
    check_label(body.get("label"))
    check_price(body.get("price"))


def check_label(label: object) -> None:
    if label is not None and (not isinstance(label, str) or len(label) > LONGEST_LABEL):
        raise invalid("bad label")


def check_price(price: object) -> None:
    """None is no bid."""
    if price is not None and not (isinstance(price, (int, float)) and 0.001 <= price <= 128):
        raise ApiError(400, "invalid_price", f"price {price!r} is not within 0.001 to 128")


def parse_json(text: str | None, default: Any) -> Any:
    """A parameter in the type of its default; the CLI sends some twice encoded."""
    value = default
    with contextlib.suppress(ValueError):
        value = json.loads(text) if text else default
        value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, type(default)):
        raise invalid(f"bad parameter {text!r}")
    return value


def parse_limit(text: str | None) -> int:
    if text is not None and (not text.isdigit() or not 1 <= int(text) <= PAGE_ROWS):
        raise invalid(f"limit {text!r} is not within 1 to {PAGE_ROWS}")
    return int(text or PAGE_ROWS)


def encode_token(start: int) -> str:
    return base64.urlsafe_b64encode(f"rows:{start}".encode()).decode()


def decode_token(token: str | None) -> int:
    try:
        return int(base64.urlsafe_b64decode(token or encode_token(0)).removeprefix(b"rows:"))
    except ValueError as error:
        raise invalid(f"bad token {token!r}") from error


# -----------------------------------------------------------------------------
# HTTP


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    vast: FakeVast

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up, or is killed, is no error here."""
        if isinstance(error := sys.exception(), Exception) and not isinstance(error, OSError):
            self.vast.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60.0  # seconds for which a silent connection is kept
    server: _Server

    def do_GET(self) -> None:
        vast = self.server.vast
        request = self._read_request()
        vast.record(request)
        vast.call_back(request, "before")
        fault = vast.take_fault(request)
        if fault and fault.delay:
            vast.closing.wait(fault.delay)
        status, body, headers = 200, {}, {}
        if fault is None or fault.has_effect:
            status, body = vast.answer(request)
        vast.call_back(request, "after")
        if fault and fault.drop:
            self._hang_up()
            return
        if fault and fault.replaces_answer:
            status, body, headers = fault.status or 200, fault.body, fault.headers
            body = {"success": False, "error": "fault", "msg": "fault"} if body is None else body
        self._send(status, body, headers)

    do_POST = do_PUT = do_DELETE = do_GET

    def _read_request(self) -> Request:
        url = urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(data) if data else None
        except ValueError:
            body = data.decode(errors="replace")
        given, vast = self.headers.get("Authorization"), self.server.vast
        return Request(time.monotonic(), self.command, unquote(url.path),
                       dict(parse_qsl(url.query, keep_blank_values=True)), body,
                       given == f"Bearer {vast.account_key}", vast.container_of(given))

    def _send(self, status: int, body: object, headers: dict[str, str]) -> None:
        text = isinstance(body, str)
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        kind = {"Content-Type": "text/plain" if text else "application/json"}
        for name, value in {**kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: object) -> None:
        """Tests look at FakeVast.requests."""
