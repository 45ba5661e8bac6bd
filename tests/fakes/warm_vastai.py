"""The real `vastai` without its second of importing: a call is forked from a process that has it.

    with warm_vastai(folder) as program:      # a path whose folder goes in front of PATH
        subprocess.run([program, "show", "instances", "--raw"])

A call runs the `vastai` beside this Python, with the caller's arguments, environment, files, folder
and ignored signals, and ends when its caller does. It differs from an ordinary one in what it is a
child of, and in that calls whose environments differ in nothing but TMPDIR share what the program
does while importing: it asks Vast for the names of GPUs, unless its folder has them.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

PROGRAM = Path(sys.executable).parent / "vastai"
MODULE = "vastai.cli.main"
LONGEST_CALL = 1 << 17  # bytes of arguments and environment
MOST_PREPARED = 24  # environments; each keeps some 20 MB
MOST_FILES = 4096  # that the server has open at once
START_SECONDS = 60.0  # to import everything on a busy machine
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
CLIENT = """#!{python} -IS
import _signal, _socket, os, sys
server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
server.connect({address!r})
ignored = [number for number in {signals} if _signal.getsignal(number) == _signal.SIG_IGN]
call = repr((sys.argv[1:], dict(os.environ), os.getcwd(), ignored))
files = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
server.sendmsg([call.encode()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, files)])
sys.exit(int(server.recv(16) or b"1"))
"""


@contextlib.contextmanager
def warm_vastai(folder: Path) -> Iterator[Path]:
    """Serves as long as the context lasts; the folder's path has to be a short one."""
    folder.mkdir(parents=True)
    address, program = folder / "calls", folder / "vastai"
    program.write_text(CLIENT.format(python=sys.executable, address=str(address),
                                     signals=[int(one) for one in SIGNALS]))
    program.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, str(address)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, env=loopback_environment(folder),
                              start_new_session=True)
    try:
        assert server.stdout and select.select([server.stdout], [], [], START_SECONDS)[0]
        assert server.stdout.readline() == b"ready\n"
        yield program
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def loopback_environment(folder: Path) -> dict[str, str]:
    """That of the first import, which asks for the names of GPUs; nobody listens there."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("XDG_", "VAST"))}
    return {**kept, "HOME": str(folder), "VAST_URL": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}


def serve(address: str) -> NoReturn:
    """Hands each call to the process that was prepared for its environment, until stdin ends."""
    modules = modules_of_a_call()
    gc.freeze()  # so that a collection in a fork does not copy all of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    prepared: dict[str, socket.socket] = {}
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(address)
    server.listen(64)
    os.write(1, b"ready\n")
    while True:
        if 0 in select.select([0, server], [], [])[0]:
            os.killpg(0, signal.SIGKILL)
        caller, _ = server.accept()
        with caller:
            message, files, _, _ = socket.recv_fds(caller, LONGEST_CALL, 3)
            if not message:
                continue
            environment = ast.literal_eval(message.decode())[1]
            key = repr(sorted(item for item in environment.items() if item[0] != "TMPDIR"))
            if key not in prepared:
                prepared[key] = prepare(environment, modules)
            prepared[key] = link = prepared.pop(key)  # the last one used comes last
            socket.send_fds(link, [message], [caller.fileno(), *files])
            if len(prepared) > MOST_PREPARED:
                prepared.pop(next(iter(prepared))).close()
            close(files)


def modules_of_a_call() -> list[str]:
    """Imports the program as far as it goes without a command; gives its own modules, in order."""
    importlib.import_module(MODULE)
    sys.argv = [str(PROGRAM), "--version"]
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), \
            contextlib.suppress(SystemExit):
        sys.modules[MODULE].main()
    return [name for name in sys.modules if is_own(name)]


def is_own(module: str) -> bool:
    return module.partition(".")[0] == "vastai"


def prepare(environment: dict[str, str], modules: list[str]) -> socket.socket:
    """A process that imports them in the environment; gives the way to send it calls."""
    link, own = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        own.close()
        return link
    os.closerange(3, own.fileno())  # of callers too, who wait for the last copy to be closed
    os.closerange(own.fileno() + 1, MOST_FILES)
    for name in filter(is_own, list(sys.modules)):
        del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(PROGRAM)]
    for name in modules:
        importlib.import_module(name)
    gc.freeze()
    while True:
        message, files, _, _ = socket.recv_fds(own, LONGEST_CALL, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            own.close()
            answer(ast.literal_eval(message.decode()), files)
        close(files)


def answer(call: tuple[list[str], dict[str, str], str, list[int]], files: list[int]) -> NoReturn:
    """Runs one call and tells its caller the exit status; kills it if the caller goes first."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    number = os.fork()
    if number == 0:
        become(call, files)
    caller = files[0]
    close(files[1:])
    if caller in select.select([os.pidfd_open(number), caller], [], [])[0]:
        os.kill(number, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    with contextlib.suppress(OSError):
        os.write(caller, str(status).encode())
    os._exit(0)


def become(call: tuple[list[str], dict[str, str], str, list[int]], files: list[int]) -> NoReturn:
    """Runs the program in this process as the caller would have."""
    arguments, environment, folder, ignored = call
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files[1:]):
        os.dup2(file, number)
    close(files)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    os.chdir(folder)
    sys.argv = [str(PROGRAM), *arguments]
    status = 1
    try:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def close(files: list[int]) -> None:
    for file in files:
        os.close(file)


if __name__ == "__main__":
    serve(sys.argv[1])
