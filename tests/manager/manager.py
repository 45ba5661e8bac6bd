"""Runs manage-bark-worker.sh with the real `vastai` on the fake API, and watches its manners."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ROOT, clean_environment, wait_until
from fake_vast import INTERVALS, FakeVast

SCRIPT = ROOT / "manage-bark-worker.sh"
PARTS = sorted(ROOT.glob("manage/*.sh"))  # what it sources for commands that are not renting
BASH = shutil.which(os.environ.get("TEST_BASH", "bash")) or "bash"
RUN_SECONDS = 120.0  # one run of the script; each call of vastai takes about one


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def folder_of(tools: tuple[str, ...], folder: Path) -> Path:
    """The folder, for a PATH, with links to these tools."""
    for tool in tools:
        folder.joinpath(tool).symlink_to(shutil.which(tool) or tool)
    return folder


def sourcing(code: str, *arguments: str, script: Path = SCRIPT) -> list[str]:
    """The command of a shell that sources all of the script, then runs `code` on the arguments."""
    load = "".join(f"load {part.stem}; " for part in PARTS if part.stem != "trace")
    return [BASH, "-c", f'source "$1"; shift; {load}{code}', "test", str(script), *arguments]


@dataclass
class Run:
    """A run of the script in a session of its own, as on a terminal; output grows as it speaks."""

    process: subprocess.Popen[str]
    stdout: str = ""
    stderr: str = ""
    readers: list[threading.Thread] = field(default_factory=list)

    def read(self, name: str) -> None:
        for line in getattr(self.process, name):
            setattr(self, name, getattr(self, name) + line)

    def start_reading(self) -> None:
        for name in ("stdout", "stderr"):
            self.readers.append(threading.Thread(target=self.read, args=(name,), daemon=True))
            self.readers[-1].start()

    def wait(self, seconds: float = RUN_SECONDS) -> Run:
        self.process.wait(seconds)
        for reader in self.readers:
            reader.join(10)
        return self

    @property
    def status(self) -> int:
        return self.process.returncode


@dataclass
class Manager:
    """The script on a machine of its own (HOME, key), beside one Vast account."""

    vast: FakeVast
    home: Path
    runs: list[Run] = field(default_factory=list)

    def environment(self, **settings: str) -> dict[str, str]:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        base = clean_environment(PATH=path, BARK_POLL="1", **self.vast.environment(self.home))
        return {name: value for name, value in {**base, **settings}.items()
                if name not in ("PORT", "HOST", "HF_HUB_OFFLINE") or name in settings}

    def launch(self, *arguments: str, cwd: Path | None = None, prelude: str = "",
               stdin: int = subprocess.DEVNULL, **settings: str) -> Run:
        """Starts the script; `settings` go into its environment, `prelude` is bash to run first."""
        self.keep_vasts_pause()
        line = [str(SCRIPT), *arguments]
        if prelude:
            line = ["-c", f'source "$1"; shift; {prelude}; main "$@"', arguments[0], *line]
        process = subprocess.Popen([BASH, *line], text=True, env=self.environment(**settings),
                                   cwd=cwd or self.home, stdin=stdin, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, start_new_session=True)
        run = Run(process)
        run.start_reading()
        self.runs.append(run)
        return run

    def run(self, *arguments: str, cwd: Path | None = None, **settings: str) -> Run:
        """The script's end, with what it said."""
        return self.launch(*arguments, cwd=cwd, **settings).wait()

    def keep_vasts_pause(self) -> None:
        """A run keeps the pauses between its own requests; that to the last run's is for us."""
        looks = self.vast.calls("GET", "/api/v1/instances/")
        free = looks[-1].time + INTERVALS["show instances"] if looks else 0.0
        wait_until(lambda: time.monotonic() > free, "pause")

    def said(self) -> str:
        return "".join(run.stdout + run.stderr for run in self.runs)

    def end(self) -> None:
        """Ends what still runs, shows what was said, and checks what holds for every run."""
        for run in self.runs:
            if run.process.poll() is None:
                run.process.terminate()
            run.wait()
            print(run.process.args, run.status, run.stdout, run.stderr, sep="\n")
        assert [secret for secret in self.vast.secrets if secret in self.said()] == []
        assert self.vast.rate_violations() == []
        assert [stranger.touched for stranger in self.vast.strangers] == [[]]


@contextlib.contextmanager
def managed(folder: Path, model: Path, fake: type[FakeVast] = FakeVast) -> Iterator[Manager]:
    """A Manager and its Vast, checked at the end. `env` prints the worker's key on purpose, so
    tests that run it compare and take it out of the run's stdout."""
    home = folder / "home"
    home.mkdir()
    with fake(folder / "vast", {"suno/bark-small": model}) as vast:
        manager = Manager(vast, home)
        try:
            yield manager
        finally:
            manager.end()
