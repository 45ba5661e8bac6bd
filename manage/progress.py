"""Where `speak` stands, for people: on stderr, one line that is redrawn on a terminal, else a line
every now and then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import unicodedata
from itertools import accumulate
from typing import TextIO

BAR_SECONDS, LINE_SECONDS = 0.5, 30.0  # between two states, on a terminal and elsewhere
BAR_WIDTH = 24
# What would move a terminal's cursor, from whatever a book calls itself.
CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n")}, "\ufffd")


def clock(seconds: float) -> str:
    """H:MM:SS."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def moment(seconds: float) -> str:
    """H:MM:SS.s, just after it, so that it lies within what begins then."""
    tenths = int(10 * seconds + 1e-6) + 1
    return f"{clock(tenths / 10)}.{tenths % 10}"


def fitted(text: str, columns: int) -> str:
    """As much of it as a terminal shows in so many columns."""
    widths = (0 if unicodedata.category(char) in ("Mn", "Me", "Cf") else
              1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
    return text[: sum(end <= columns for end in accumulate(widths))]


class Progress:
    """Shares are of seconds of speech, by the estimate; all else is of this run.

    Without a worker, nothing counts and nothing costs.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None):
        self._stream, self._quiet = stream or sys.stderr, quiet
        self._draws = self._stream.isatty()
        self._shown, self._is_open = time.monotonic(), False
        self._earlier, self._since = 0.0, 0.0
        self.price = 0.0  # dollars an hour
        self.total = self.before = self.estimated = 0.0  # in all, before this run, in it
        self.spoken = 0.0  # seconds of speech, as they came

    def say(self, message: str) -> None:
        self._write("\r\033[K" * self._is_open + message.translate(CONTROLS) + "\n")
        self._is_open = False

    def _write(self, text: str) -> None:
        """Never fails: a reader that has left must not stop what costs money."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()

    def begin(self, total: float, missing: float) -> None:
        self.total, self.before = total, total - missing

    def resume(self, price: float) -> None:
        self.pause()
        self.price, self._since = price, time.monotonic()

    def pause(self) -> None:
        self._earlier, self._since = self.worked, 0.0

    @property
    def worked(self) -> float:
        """Seconds with a worker."""
        return self._earlier + (time.monotonic() - self._since if self._since else 0.0)

    @property
    def dollars(self) -> float | None:
        """About what this run has cost so far; None where no price is known."""
        return self.price * self.worked / 3600 if self.price else None

    def add(self, estimate: float, seconds: float) -> None:
        self.estimated += estimate
        self.spoken += seconds

    def line(self, chapter: str, trouble: str = "") -> str:
        done = self.before + self.estimated
        share = min(1.0, done / self.total) if self.total else 1.0
        told = [f"{100 * share:.0f} %", chapter, *self._outlook(self.total - done), trouble]
        if self._draws:
            width = min(BAR_WIDTH, self._columns() // 4)
            filled = round(share * width)
            told.insert(0, "█" * filled + "░" * (width - filled))
        return "  ".join(filter(None, told))

    def _outlook(self, missing: float) -> list[str]:
        """Speed, time left and dollars, once there is something to go by."""
        if not self.estimated:
            return []
        left = max(0.0, missing) * self.worked / self.estimated
        told = [f"{self.spoken / max(self.worked, 0.001):.1f} times real time",
                f"{clock(left)} left"]
        if self.dollars is not None:
            whole = self.dollars + self.price * left / 3600
            told.append(f"about {self.dollars:.3f} $ of {whole:.3f} $")
        return told

    def show(self, chapter: str, trouble: str = "") -> None:
        now = time.monotonic()
        if self._quiet or now < self._shown + (BAR_SECONDS if self._draws else LINE_SECONDS):
            return
        self._shown = now
        if not self._draws:
            self.say(self.line(chapter, trouble))
            return
        line = self.line(chapter, trouble).translate(CONTROLS)
        self._write("\r\033[K" + fitted(line, self._columns() - 1))
        self._is_open = True

    def _columns(self) -> int:
        """Those of this stream's terminal: stdout may be none."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            return shutil.get_terminal_size().columns
