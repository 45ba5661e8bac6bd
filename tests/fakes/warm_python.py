"""Scripts that find torch and transformers imported: each is forked from a process that has them.

    process = WarmPython(environment).start(script, environment, folder)    # is much like a Popen

That import is 3 of the 4 s of processor time that a worker needs to be ready on the toy. A script
runs as __main__, to the end of the interpreter, with its environment, folder and a pipe for
stderr. It differs from an ordinary one in what it is a child of, in that it cannot have another
stdout, and in that what the libraries read of the environment when they are imported is older,
but for the hub's client, which reads it anew.
"""

from __future__ import annotations

import ast
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import TextIO

LIBRARIES = ("torch", "transformers", "transformers.models.bark.modeling_bark",
             "transformers.models.auto.tokenization_auto")
LONGEST_START = 1 << 17  # bytes of the script's path, environment and folder
KILLED = -signal.SIGKILL  # what a process ended with of which nobody knows more


class Forked:
    """A process that runs a script: what the tests use of a Popen."""

    def __init__(self, link: socket.socket, stderr: TextIO) -> None:
        self.stderr, self.returncode = stderr, None
        self._link, self._lock = link, threading.Lock()  # readable once it has ended
        self.pid = int(link.recv(16))

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._link], [], [], 0)[0]:
                self.returncode = int(self._link.recv(16) or KILLED)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; raises subprocess.TimeoutExpired."""
        if not select.select([self._link], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class WarmPython:
    """The process that scripts are forked from; it ends, and they do, with this one."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], env=environment,
                pass_fds=[theirs.fileno()], start_new_session=True)

    def start(self, script: Path, environment: dict[str, str], folder: Path) -> Forked:
        link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reading, writing = os.pipe()
        with theirs, open(writing, "wb"):
            socket.send_fds(self._link, [repr((str(script), environment, str(folder))).encode()],
                            [theirs.fileno(), writing])
        return Forked(link, open(reading, encoding="utf-8"))


def serve(link: socket.socket) -> None:
    """Forks a keeper for each start that is asked for, until nobody can ask any more.

    Returns only in a forked process whose script has ended.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # so that a collection in a fork does not copy all of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(link, LONGEST_START, 2)
        if not message:
            os.killpg(0, signal.SIGKILL)
        if os.fork() == 0:
            link.close()
            return keep(*files, *ast.literal_eval(message.decode()))
        for file in files:
            os.close(file)


def keep(link: int, stderr: int, script: str, environment: dict[str, str], folder: str) -> None:
    """Runs the script in a process of its own and tells its number, and its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    number = os.fork()
    if number == 0:
        os.close(link)
        os.dup2(stderr, 2)
        os.close(stderr)
        os.chdir(folder)
        return run(script, environment)
    os.close(stderr)
    os.write(link, str(number).encode())
    os.write(link, str(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])).encode())
    os._exit(0)


def run(script: str, environment: dict[str, str]) -> None:
    """Runs it in this process; SystemExit and the like are left to the interpreter."""
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(sys.modules["huggingface_hub.constants"])
    sys.argv, sys.orig_argv = [script], [sys.executable, script]
    sys.path[0] = str(Path(script).parent)
    sys.modules["__main__"] = main = ModuleType("__main__")
    main.__file__ = script
    exec(compile(Path(script).read_bytes(), script, "exec"), vars(main))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
