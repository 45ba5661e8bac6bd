"""manage-bark-worker.sh as people run it: the real script, pip and worker, started as processes.

TEST_BASH names another bash to run it with, such as a 3.2 like macOS's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import wave
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from conftest import BUILTIN, ROOT, START_SECONDS, clean_environment, wait_until
from manager import BASH, SCRIPT, executable, folder_of, sourcing

TOOLS = ("cmp", "cp", "mkdir", "rm", "sleep")  # all that the script calls beside Python
NVIDIA_SMI = """#!/bin/sh
[ "$1" = -L ] && echo 'GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-0)' && exit
echo '| NVIDIA-SMI 550.54.14   Driver Version: 550.54.14   CUDA Version: 12.4 |'
"""

# A worker of the standard library alone, which writes the lines that the real one does.
WORKER = """import http.server, json, os, sys
FAILS = os.environ.get("FAILS")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        status = "loading" if "NEVER_READY" in os.environ else "ready"
        health = {"status": status, **({"status": "failed", "error": FAILS} if FAILS else {})}
        self.wfile.write(json.dumps(health).encode())
    def log_message(self, *arguments): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
for line in ("WARNING no GPU: x on the CPU; BARK_MODEL chooses: another", "INFO model=x device=cpu",
             f"INFO listening on http://127.0.0.1:{server.server_port}",
             "INFO 8 segments at once in float32",
             f"WARNING a warning, BARK_LISTEN={os.environ['BARK_LISTEN']}", "INFO status=ready"):
    print("2026-11-25 10:00:00,000", line, file=sys.stderr, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def bare_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PATH with nothing but TOOLS: no Python, curl, jq or nvidia-smi."""
    return folder_of(TOOLS, tmp_path_factory.mktemp("bin"))


def clone_script(folder: Path) -> Path:
    """Puts the script into `folder`, beside a worker that no test there gets to start."""
    for name in ("manage-bark-worker.sh", "bark-worker.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "manage", folder / "manage")
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return clone_script(tmp_path)


@pytest.fixture
def quick(clone: Path) -> Path:
    """A clone's script that runs WORKER, on the .venv of this one."""
    (clone / "bark-worker.py").write_text(WORKER)
    (clone / ".venv").symlink_to(ROOT / ".venv")
    return clone / SCRIPT.name


def run(*arguments: str, path: Path, script: Path = SCRIPT, **settings: str,
        ) -> subprocess.CompletedProcess[str]:
    """The script's end, with what it said."""
    return subprocess.run([BASH, str(script), *arguments], capture_output=True, text=True,
                          timeout=START_SECONDS, env=clean_environment(PATH=str(path), **settings))


def source(code: str, *arguments: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(sourcing(code, *arguments, script=script), capture_output=True, text=True,
                          timeout=START_SECONDS)


@dataclass
class Local:
    """A running `local`, in a process group of its own as on a terminal."""

    process: subprocess.Popen[str]
    answer: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def start_reading(self) -> list[threading.Thread]:
        pairs = ((self.process.stdout, self.answer), (self.process.stderr, self.log))
        readers = [threading.Thread(target=lambda stream=stream, lines=lines: lines.extend(stream),
                                    daemon=True) for stream, lines in pairs if stream]
        for reader in readers:
            reader.start()
        return readers

    def wait_for_log(self, words: str) -> str:
        return wait_until(lambda: next((line for line in self.log if words in line), ""), words,
                          START_SECONDS)

    def wait_until_callable(self) -> str:
        """The port, once the two lines on how to call it are there."""
        wait_until(lambda: len(self.answer) >= 2, "answer", START_SECONDS)
        return self.answer[0].split("/synthesize")[0].rpartition(":")[2]

    def worker(self) -> psutil.Process:
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it may just have ended, as `sleep` does
                if "bark-worker.py" in " ".join(child.cmdline()):
                    found.append(child)
        assert len(found) == 1
        return found[0]


@contextlib.contextmanager
def running_local(path: Path, *options: str, script: Path = SCRIPT,
                  **settings: str) -> Iterator[Local]:
    environment = clean_environment(PATH=str(path), **settings)
    process = subprocess.Popen([BASH, str(script), "local", *options], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    local = Local(process)
    readers = local.start_reading()
    try:
        yield local
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
        for reader in readers:
            reader.join(10)
        print("".join(local.log))


# What must be there


def test_missing_python_is_named_with_how_to_get_it(clone: Path, bare_path: Path) -> None:
    done = run("local", path=bare_path, script=clone / SCRIPT.name)
    assert done.returncode == 3
    assert "Python 3.11 or newer is missing" in done.stderr and "apt install" in done.stderr


def test_python_without_venv_is_told_from_none(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "ensurepip.py").write_text("raise ImportError  # as Debian leaves it out\n")
    executable(tmp_path / "python3",
               f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    done = run("local", path=tmp_path, script=clone / SCRIPT.name)
    assert done.returncode == 3
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"sudo apt install python{version}-venv" in done.stderr


def test_script_without_its_worker_says_what_belongs_beside_it(tmp_path: Path) -> None:
    clone = clone_script(tmp_path)
    (clone / "bark-worker.py").unlink()
    done = run("local", path=clone, script=clone / SCRIPT.name)
    assert done.returncode == 3
    assert f"bark-worker.py and requirements.txt must lie beside this script, in {clone}" \
        in done.stderr


# The virtual environment


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A clone whose broken .venv was made anew, and what the script said to that."""
    clone = clone_script(tmp_path_factory.mktemp("clone"))
    (clone / "requirements.txt").write_text("")
    python = clone / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(clone / "a-python-that-is-gone")
    done = ensure_venv(clone)
    assert done.returncode == 0, done.stderr
    return clone, done.stderr


ENSURE_VENV = 'ensure_venv "$ROOT/requirements.txt"'


def ensure_venv(clone: Path) -> subprocess.CompletedProcess[str]:
    return source(ENSURE_VENV, script=clone / SCRIPT.name)


def can_import(clone: Path, module: str) -> bool:
    return subprocess.run([clone / ".venv/bin/python", "-c", f"import {module}"],
                          stderr=subprocess.DEVNULL).returncode == 0


def write_wheel(folder: Path, module: str, version: str = "1.0") -> Path:
    """A wheel that installs one empty module."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{module}-{version}-py3-none-any.whl"
    files = {f"{module}.py": "",
             f"{module}-{version}.dist-info/METADATA":
                 f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n",
             f"{module}-{version}.dist-info/WHEEL":
                 "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
             f"{module}-{version}.dist-info/RECORD": ""}
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def test_broken_venv_is_made_anew(mended: tuple[Path, str]) -> None:
    clone, said = mended
    assert "making .venv" in said and can_import(clone, "pip")


def test_requirements_are_installed_once_and_again_when_changed(mended: tuple[Path, str]) -> None:
    clone, _ = mended
    requirements = clone / "requirements.txt"
    line = f"{write_wheel(clone, 'tiny').as_uri()}\n"
    requirements.write_text(line)
    first = ensure_venv(clone)
    assert first.returncode == 0 and can_import(clone, "tiny")
    assert "installing requirements.txt" in first.stderr and "making" not in first.stderr
    second = ensure_venv(clone)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    requirements.write_text(f"# new\n{line}")
    assert "installing requirements.txt" in ensure_venv(clone).stderr


def test_failed_install_exits_3_and_is_tried_again(mended: tuple[Path, str]) -> None:
    clone, _ = mended
    (clone / "requirements.txt").write_text(f"{(clone / 'absent.whl').as_uri()}\n")
    for _ in range(2):
        done = ensure_venv(clone)
        assert done.returncode == 3
        assert "pip could not install requirements.txt" in done.stderr


class SlowIndex(ThreadingHTTPServer):
    """Serves one wheel; while `stalled`, keeps who asks for it waiting until they are gone."""

    daemon_threads = True

    def __init__(self, wheel: Path):
        super().__init__(("127.0.0.1", 0), SlowIndexHandler)
        self.wheel = wheel
        self.url = f"http://127.0.0.1:{self.server_port}/{wheel.name}"
        self.stalled, self.asked, self.left = True, threading.Event(), threading.Event()


class SlowIndexHandler(BaseHTTPRequestHandler):
    server: SlowIndex

    def do_GET(self) -> None:
        if self.server.stalled:
            self.server.asked.set()
            if self.connection.recv(1) == b"":
                self.server.left.set()
            return
        body = self.server.wheel.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def slow_index(tmp_path: Path) -> Iterator[SlowIndex]:
    with SlowIndex(write_wheel(tmp_path, "late")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_interrupted_install_ends_pip_and_is_done_again(
        mended: tuple[Path, str], slow_index: SlowIndex) -> None:
    clone, _ = mended
    (clone / "requirements.txt").write_text(f"{slow_index.url}\n")
    with subprocess.Popen(sourcing(ENSURE_VENV, script=clone / SCRIPT.name),
                          stderr=subprocess.PIPE) as process:
        assert slow_index.asked.wait(START_SECONDS)
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 143
    assert slow_index.left.wait(10), "pip outlived the script"
    slow_index.stalled = False
    assert ensure_venv(clone).returncode == 0 and can_import(clone, "late")


# The GPU and torch


@pytest.mark.parametrize(("built_for", "driver", "reason", "words", "index"), [
    ("13.0", "12.4", "", "update the driver to 560", "cu126"),
    ("13.0", "11.8", "", "update the driver to 560", None),
    ("13.0", "12.6", "", "this build of torch suits it", "cu126"),
    ("13.0", "12.9", "", "this build of torch suits it", "cu126"),
    ("12.6", "13.0", "no kernel image is available", "this build of torch suits it", "cu130"),
    ("13.0", "13.1", "no kernel image is available", "this build of torch suits it", "cu126"),
    ("none", "12.8", "", "this build of torch suits it", "cu126"),
    ("none", "13.2", "", "this build of torch suits it", "cu130"),
    ("13.0", "13.0", "", "look for another cause", None),
    ("13.0", "", "", "needs a driver for CUDA 12.6 (560) or newer", None),
])
def test_torch_advice_names_the_build_that_suits_the_driver(
        built_for: str, driver: str, reason: str, words: str, index: str | None) -> None:
    done = source('torch_advice "$@"', "2.13.0+cpu", built_for, driver, reason)
    assert done.returncode == 0 and words in done.stdout
    line = (".venv/bin/pip install --force-reinstall torch==2.13.0"
            f" --index-url https://download.pytorch.org/whl/{index}\n")
    assert (line in done.stdout) if index else ("pip install" not in done.stdout)


@pytest.mark.parametrize(("header", "version"), [
    ("| NVIDIA-SMI 535.183.01  Driver Version: 535.183.01  CUDA Version: 12.2     |", "12.2"),
    ("| NVIDIA-SMI 590.44  KMD Version: 590.44  CUDA UMD Version: 13.1  |", "13.1"),
    ("| NVIDIA-SMI 470.256.02  Driver Version: 470.256.02  CUDA Version: N/A |", ""),
])
def test_driver_version_is_read_from_nvidia_smi(header: str, version: str, tmp_path: Path) -> None:
    executable(tmp_path / "nvidia-smi", f"#!/bin/sh\necho '+-----+'\necho '{header}'\n")
    done = source(f'PATH="{tmp_path}:$PATH"; driver_cuda')
    assert (done.returncode, done.stdout.strip()) == (0, version)


@pytest.mark.parametrize(("stub", "settings", "reason"), [
    ("", {}, "no NVIDIA GPU here"),
    ("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 9\n", {}, "Failed to initialize NVML"),
    ("#!/bin/sh\necho 'No devices were found'\n", {}, "No devices were found"),
    (NVIDIA_SMI, {"BARK_DEVICE": "cpu"}, "BARK_DEVICE=cpu"),
    (NVIDIA_SMI, {"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES hides every GPU"),
])
def test_first_line_without_a_gpu_says_why_and_who_speaks(
        stub: str, settings: dict[str, str], reason: str, clone: Path) -> None:
    if stub:
        executable(clone / "nvidia-smi", stub)
    # a PATH without Python: it ends with its second line
    done = run("local", path=clone, script=clone / SCRIPT.name, **settings)
    first = done.stderr.splitlines()[0]
    assert reason in first and "built-in voice" in first and "--model suno/bark-small" in first


def test_driver_too_old_for_torch_ends_with_advice_and_no_fallback(
        bare_path: Path, tmp_path: Path) -> None:
    executable(tmp_path / "nvidia-smi", NVIDIA_SMI)
    path = Path(f"{tmp_path}:{bare_path}")
    done = run("local", "--model", str(BUILTIN), path=path, PIP_NO_INDEX="1",
               CUDA_VISIBLE_DEVICES="99")  # so that a real GPU stays out of it
    assert (done.returncode, done.stdout) == (3, "")
    assert "supports CUDA 12.4" in done.stderr and "BARK_DEVICE=cpu" in done.stderr
    assert "starting bark-worker.py" not in done.stderr


# local, the whole story


def is_refused(port: str) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", int(port))) != 0


def test_local_speaks_as_its_own_line_says_and_ctrl_c_leaves_nothing(
        bare_path: Path, tmp_path: Path) -> None:
    with running_local(bare_path, BARK_API_KEY="secret-key") as local:
        port = local.wait_until_callable()
        worker = local.worker()
        subprocess.run(local.answer[0], shell=True, check=True, cwd=tmp_path,
                       env={**os.environ, "BARK_API_KEY": "secret-key"})
        os.killpg(local.process.pid, signal.SIGINT)  # as the terminal does on Ctrl-C
        assert local.process.wait(30) == 130
    assert not worker.is_running() and is_refused(port)
    with wave.open(str(tmp_path / "hello.wav")) as speech:
        assert speech.getframerate() == 24000 and speech.getnframes() > 2400
    assert '-H "Authorization: Bearer $BARK_API_KEY"' in local.answer[0]
    assert "secret-key" not in "".join(local.answer + local.log)
    assert len(local.answer) == 2 and "/health" in local.answer[1]
    assert "no NVIDIA GPU here" in local.log[0]
    assert any(line.startswith("ready after ") for line in local.log)
    assert sum("GPU" in line for line in local.log) == 1  # the worker's own notice is not repeated


# Answers in turn with the lines of its argument, instead of a worker.
WORKER_SAYS = """exec 3<<<"$1"
verbose=yes
worker_health() { local line; IFS= read -r line <&3 && printf '%s\\n' "$line"; }
child_lives() { :; }
short_pause() { :; }
wait_until_ready http://127.0.0.1:9"""


def test_each_state_before_ready_is_told_once() -> None:
    """A small model is through them faster than anybody looks, so no worker is asked here."""
    states = ["loading ", "loading ", "downloading 43 % of 5.0 GB", "warming ", "ready "]
    done = source(WORKER_SAYS, "\n".join(states))
    assert (done.returncode, done.stdout) == (0, "")
    *told, last = done.stderr.splitlines()
    assert told == ["loading", "downloading 43 % of 5.0 GB", "warming"]
    assert last.startswith("ready after ")
    assert last.endswith(" s; listen in a browser: http://127.0.0.1:9/")


def test_sigterm_while_it_starts_ends_the_worker_too(quick: Path, bare_path: Path) -> None:
    with running_local(bare_path, "--verbose", script=quick, NEVER_READY="1") as local:
        local.wait_for_log("listening on")
        worker = local.worker()
        local.process.terminate()
        assert local.process.wait(30) == 143
    assert not worker.is_running() and local.answer == []
    assert not (ROOT / f".venv/run-{local.process.pid}").exists()


def test_closed_terminal_ends_the_worker_too(quick: Path, bare_path: Path) -> None:
    command = [BASH, str(quick), "local", "--verbose"]
    with subprocess.Popen(command, env=clean_environment(PATH=str(bare_path)), text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert any("listening on" in line for line in iter(process.stderr.readline, ""))
        worker = Local(process).worker()
        process.stderr.close()  # nobody reads what it says from here on
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 129
    assert not worker.is_running()


def test_a_log_of_json_is_shown_whole_and_tells_the_address_all_the_same() -> None:
    log = ('{"level": "INFO", "message": "listening on http://127.0.0.1:8081"}\n'
           '{"level": "INFO", "message": "status=ready"}\n')
    done = source('mkdir -p "$RUN_DIR"; relay_log <<<"$1"; cat "$RUN_DIR/address"\n'
                  'rm -r "$RUN_DIR"', log.rstrip())
    assert (done.stdout, done.stderr) == ("http://127.0.0.1:8081\n", log)


def test_worker_that_dies_by_itself_is_reported_with_exit_1(quick: Path, bare_path: Path) -> None:
    with running_local(bare_path, script=quick) as local:
        local.wait_until_callable()
        local.worker().kill()
        assert local.process.wait(30) == 1
    assert "the worker ended by itself with exit status 137" in local.log[-1]


@pytest.mark.parametrize(("settings", "status", "reason"), [
    pytest.param({"BARK_MODEL": "/nonexistent"}, 1, "/nonexistent", marks=pytest.mark.long),
    pytest.param({"BARK_VOICE": "nobody"}, 2, "nobody", marks=pytest.mark.long),
    ({"BARK_TIMEOUT": "soon"}, 2, "BARK_TIMEOUT"),
])
def test_worker_that_cannot_start_passes_its_reason_and_status_on(
        settings: dict[str, str], status: int, reason: str, bare_path: Path) -> None:
    done = run("local", path=bare_path, **settings)
    assert (done.returncode, done.stdout) == (status, "")
    assert any(reason in line for line in done.stderr.splitlines()
               if not line.startswith(("starting", "no NVIDIA")))


def test_worker_that_fails_on_its_way_is_told_of_with_exit_1(
        quick: Path, bare_path: Path) -> None:
    done = run("local", path=bare_path, script=quick, FAILS="no weights here")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the worker failed: no weights here" in done.stderr


@pytest.mark.long  # the manager's part of it is the same as for a wrong setting
def test_taken_port_is_reported_by_the_worker_with_exit_2(bare_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("local", path=bare_path, PORT=port)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"PORT {port}" in done.stderr and "in use" in done.stderr
