"""A cheap stage for tests of renting, and acts that are played side by side on such stages.

    with light_stage(folder) as warm, scene(folder / "one", warm) as stage:
        stage.vast.add_offer()
        assert stage.start("--yes").status == 0

Calls of `vastai` are warm ones, and workers merely say how they are. An act is a function of a
Scene. As the script mostly waits, acts_of begins all that the chosen tests name, and each test
then waits for its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fake_vast
import pytest
from conftest import ROOT
from fake_vast import FakeVast, Instance, Request
from manager import Manager, Run, managed
from warm_vastai import warm_vastai

AT_ONCE = 8  # scenes side by side; they mostly wait for the pauses that Vast asks for
SHOWN = 2  # last lines of stderr in which what is still billed has to stand, one of each kind

HURRY = "pause() { sleep $(($1 / 10)).$(($1 % 10)); now=$((now + $1 * 5)); }"

# What the image has at /app/bark-worker.py here: it listens after a tenth of a second instead of
# eight. What it says is in the file HEALTH; with ENDS it ends at once, with that status.
WORKER = """
import http.server, json, os, pathlib, sys
if status := os.environ.get("ENDS"):
    print("bad key", os.environ["BARK_API_KEY"], flush=True)
    sys.exit(int(status))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = pathlib.Path(os.environ["HEALTH"]).read_bytes()
        fails = self.path == "/ready" and not json.loads(body)["ready"]
        self.send_response(503 if fails else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words):
        pass
address = (os.environ["HOST"], int(os.environ["PORT"]))
server = http.server.ThreadingHTTPServer(address, Handler)
print(f"listening on http://{address[0]}:{server.server_port}", flush=True)
server.serve_forever()
"""


Act = Callable[["Scene"], None]


@dataclass
class Scene:
    """One account, and one machine that rents from it."""

    manager: Manager
    vast: FakeVast
    path: str  # PATH of the script
    remark: str = ""  # what a failure's message shall begin with

    def __post_init__(self) -> None:
        self.vast.container_env["HEALTH"] = str(self.manager.home / "health.json")
        self.workers_say("ready")

    def workers_say(self, status: str, **fields: object) -> None:
        """From now on, what every worker answers when asked for its health."""
        health = {"status": status, "ready": status == "ready", **fields}
        part = self.manager.home / "health.part"
        part.write_text(json.dumps(health))
        part.replace(self.vast.container_env["HEALTH"])

    def launch(self, *words: str, command: str = "start", prelude: str = "",
               stdin: int = subprocess.DEVNULL, **settings: str) -> Run:
        """Begins a run, with the warm vastai if this scene has it."""
        return self.manager.launch(command, *words, prelude=prelude, stdin=stdin,
                                   **{"PATH": self.path, **settings})

    def start(self, *words: str, **settings: str) -> Run:
        """What came of `start`."""
        return self.launch(*words, **settings).wait()

    def typed(self, text: str, *words: str, command: str = "start") -> Run:
        """What comes of a command on a terminal where somebody types the text."""
        keyboard, terminal = pty.openpty()
        try:
            os.write(keyboard, text.encode())
            return self.launch(*words, command=command, stdin=terminal).wait()
        finally:
            os.close(keyboard)
            os.close(terminal)

    def search(self, *words: str, **settings: str) -> list[int]:
        """The offers that `search` shows, in its order."""
        done = self.launch(*words, command="search", **settings).wait()
        assert done.status == 0 and done.stdout.startswith("OFFER ")
        return [int(line.split()[0]) for line in done.stdout.splitlines()[1:]]

    def billed(self) -> dict[int, str]:
        """What the account pays for beside the stranger: GPU ("running") or storage ("stopped")."""
        with self.vast.lock:
            return {one.id: one.intended for one in self.vast.instances.values()}

    def orders(self) -> list[int]:
        """The offers that were ordered, one by one."""
        return [int(one.path.split("/")[4]) for one in self.vast.calls("PUT", "/asks/")]

    def workers_keys(self) -> list[str]:
        """Those of the workers, which only `env` shows."""
        return [one.body["env"]["BARK_API_KEY"] for one in self.vast.calls("PUT", "/asks/")]

    def only(self) -> Instance:
        """The one instance that there is."""
        (instance,) = self.vast.instances.values()
        return instance

    def story(self) -> str:
        """All that was asked and said, for a failure's message."""
        lines = [self.remark, *(f"{one.method} {one.path}" for one in self.vast.requests)]
        for run in self.manager.runs:
            lines += [repr(run.process.args), f"{run.process.poll()}", run.stdout, run.stderr]
        return "\n".join(lines)

    def changes(self) -> list[tuple[str, str]]:
        """Method and path of every request that is more than a look."""
        return [(one.method, one.path) for one in self.vast.requests if is_change(one)]


def make_worker_real(stage: Scene) -> None:
    """The next instance gets the real worker, before it runs, and finds a toy model."""
    toy = stage.manager.home / "toy"
    import toy_model

    toy_model.build(toy)
    stage.vast.models["suno/bark-small"] = toy
    stage.vast.provisioning = 1.0

    def install(request: Request) -> None:
        app = stage.only().container.root / "app"
        for name in ("bark-worker.py", "builtin-voice"):
            (app / name).unlink()
            (app / name).symlink_to(ROOT / name)
    stage.vast.on("PUT", "/asks/", install, when="after")


def is_change(request: Request) -> bool:
    return request.method in ("PUT", "DELETE") and "request_logs" not in request.path


@contextlib.contextmanager
def scene(folder: Path, warm: Path | None = None,
          fake: type[FakeVast] = FakeVast) -> Iterator[Scene]:
    """`warm` is the program of light_stage; without it the calls are the ordinary ones."""
    model = folder / "model"
    model.mkdir(parents=True)
    with managed(folder, model, fake) as managing:
        path = managing.environment()["PATH"]
        path = os.pathsep.join((str(warm.parent), path)) if warm else path
        stage = Scene(managing, managing.vast, path)
        yield stage
        assert [key for key in stage.workers_keys() if key in managing.said()] == []


class Acts:
    """Plays acts side by side, each on a stage of its own, and keeps what came of them."""

    def __init__(self, folder: Path, warm: Path | None, acts: list[Act],
                 fake: type[FakeVast] = FakeVast) -> None:
        self._folder, self._warm, self._fake = folder, warm, fake
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._ends = {act: self._pool.submit(self._play, act) for act in acts}

    def _play(self, act: Act) -> None:
        stage = None
        try:
            with scene(self._folder / act.__name__, self._warm, self._fake) as stage:
                act(stage)
        except Exception as error:
            if stage:
                error.add_note(stage.story())
            raise

    def end_of(self, act: Act) -> None:
        """Waits for it; raises what it raised."""
        self._ends[act].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def acts_of(request: pytest.FixtureRequest, folder: Path, worker: str = WORKER,
            fake: type[FakeVast] = FakeVast) -> Iterator[Acts]:
    """All acts of the module that are parameters of a chosen test, the drawn-out ones first."""
    specs = [item.callspec.params for item in request.session.items
             if item.path == request.path and hasattr(item, "callspec")]
    acts = sorted((params["act"] for params in specs if "act" in params),
                  key=lambda act: not getattr(act, "is_drawn_out", False))
    with light_stage(folder, worker) as warm:
        playing = Acts(folder, warm, acts, fake)
        try:
            yield playing
        finally:
            playing.close()


def ids_named(run: Run) -> set[int]:
    """The instances that the last lines of stderr name together with what ends them."""
    lines = run.stderr.rstrip("\n").splitlines()[-SHOWN:]
    return {int(one) for line in lines for one in re.findall(
        r"vastai (?:destroy|stop) instance (\d+)", line)}


def in_a_hurry(stage: Scene, *words: str, command: str = "start", **settings: str) -> Run:
    """Begins a run that sleeps a tenth and counts five times as much; of Vast's pauses, too."""
    stage.vast.rate_violations = list  # type: ignore[method-assign]
    return stage.launch(*words, command=command, prelude=HURRY, **settings)


@contextlib.contextmanager
def light_stage(folder: Path, worker: str = WORKER) -> Iterator[Path]:
    """Meanwhile every instance has `worker` in /app; gives the program that makes a scene warm."""
    image = folder / "image"
    (image / "builtin-voice").mkdir(parents=True)
    for name in ("bark-worker.py", "pyworker.py"):
        (image / name).write_text(worker)
    with pytest.MonkeyPatch.context() as patch, warm_vastai(folder / "warm") as program:
        patch.setattr(fake_vast, "ROOT", image)
        yield program


def drawn_out(act: Act) -> Act:
    """Marks one that mostly waits, so that it is begun before others."""
    act.is_drawn_out = True  # type: ignore[attr-defined]
    return act


def plays(*acts: Act) -> pytest.MarkDecorator:
    """Makes a test of each act."""
    return pytest.mark.parametrize("act", acts, ids=lambda act: act.__name__)
