"""The worker as `speak` calls it: where it is, what it answers, how many requests it bears at once.

Standard library alone. Keys come by the environment or a pipe and go into headers: never into argv
or a message.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import shlex
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

CONNECT_SECONDS = 10.0
PROBE_SECONDS = 10.0  # for a listing; the worker answers /health within 100 ms
SPEECH_SECONDS = 660.0  # BARK_TIMEOUT's default and a minute
SILENT_SECONDS = 15  # of a peer, after which the system asks whether it is still there
RETRY_SECONDS = 5.0  # where no Retry-After says otherwise
MOST_RETRY = 60.0
PAUSE_SECONDS = 0.1
LOOKS_APART = 1.1  # seconds between two lists of instances
EX_UNHEALTHY, EX_USAGE, EX_MISSING, EX_REFUSED, EX_NO_INSTANCE, EX_LATE = range(1, 7)
ENDPOINT_LENGTH = 500  # TTS_MAX_LENGTH's default: behind PyWorker nobody can be asked for it
ENDPOINT_AT_ONCE = 8
ROUTE_LOOKS = 12
LONGEST_WORDS = 200  # of somebody else's message

# -----------------------------------------------------------------------------
# What can go wrong, by what is to be done


class Hopeless(Exception):
    """Nothing more can be spoken: the exit status, and what to tell people."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Gone(Exception):
    """The worker does not answer, or is not ready: it is to be found, or waited for."""


class WrongKey(Gone):
    """It wants another key, which a new instance may have."""


class Busy(Exception):
    """It takes no more just now; `seconds` later it may."""

    def __init__(self, message: str, seconds: float = RETRY_SECONDS):
        super().__init__(message)
        self.seconds = seconds


class Faulty(Exception):
    """It failed at this text; another try may do, with `needs_seed` if it has another seed."""

    def __init__(self, message: str, needs_seed: bool = False):
        super().__init__(message)
        self.needs_seed = needs_seed


class Refused(Exception):
    """It will never speak this text."""


class NothingToSpeak(Refused):
    """There is no word in it, which is no fault."""


# Each holds for whatever is asked, so that no other text would fare better.
FATAL_CODES = ("unknown_voice", "text_too_long", "invalid_value", "invalid_seed", "invalid_type",
               "invalid_api_key")

# -----------------------------------------------------------------------------
# HTTP


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        """The object in it; {} if there is none."""
        try:
            found = json.loads(self.body)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


def keep_alive(connection: socket.socket) -> None:
    """Has the system look after a silent peer, as an answer may take minutes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", SILENT_SECONDS), ("TCP_KEEPINTVL", SILENT_SECONDS),
                        ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 4000 * SILENT_SECONDS)):
        if hasattr(socket, name):
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS)
    connection.connect()
    keep_alive(connection.sock)
    return connection


class Line:
    """HTTP to one address, with a connection for each thread, which it keeps."""

    def __init__(self, url: str, key: str = ""):
        self.url, self._path = url, urlsplit(url).path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._own = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._cuts = 0

    def ask(self, path: str, payload: object = None, seconds: float = PROBE_SECONDS) -> Reply:
        """GET, or POST of JSON. Raises Gone if there is no whole answer."""
        kept, cuts = getattr(self._own, "connection", None), self._cuts
        try:
            if kept is not None:
                try:
                    return self._exchange(kept, path, payload, seconds)
                except (ConnectionError, http.client.BadStatusLine):
                    if self._cuts > cuts:
                        raise  # else it was closed while nobody used it
            self._own.connection = connect(self.url)
            return self._exchange(self._own.connection, path, payload, seconds)
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # a host's name
            raise Gone(f"{self.url}: {why(error)}") from None

    def _exchange(self, connection: http.client.HTTPConnection, path: str, payload: object,
                  seconds: float) -> Reply:
        body = None if payload is None else json.dumps(payload).encode()
        kind = {"Content-Type": "application/json"} if body else {}
        self._open.add(connection)
        is_whole = False
        try:
            connection.sock.settimeout(seconds)
            connection.request("POST" if body else "GET", self._path + path, body,
                               {**self._headers, **kind})
            answer = connection.getresponse()
            reply = Reply(answer.status, answer.headers, answer.read())
            is_whole = not answer.will_close
            return reply
        finally:
            self._open.discard(connection)
            if not is_whole:
                self._own.connection = None
                connection.close()

    def cut(self) -> None:
        """Ends all that is under way, so that no thread waits for an answer that cannot come."""
        self._cuts += 1
        for connection in list(self._open):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)


def why(error: Exception) -> str:
    """An error in few words, for people."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:LONGEST_WORDS]


def words_of(reply: Reply) -> tuple[str, str]:
    """An error's code and message, whoever gave it."""
    error = reply.json.get("error")
    if isinstance(error, dict):
        return str(error.get("code", "")), str(error.get("message", ""))
    said = error or reply.json.get("msg") or reply.body[:LONGEST_WORDS].decode("utf-8", "replace")
    return "", f"HTTP {reply.status}: {' '.join(str(said).split())}"[:LONGEST_WORDS]


def retry_after(reply: Reply) -> float:
    try:
        seconds = float(reply.headers.get("Retry-After", ""))
    except ValueError:
        seconds = RETRY_SECONDS
    return min(MOST_RETRY, max(0.1, seconds)) if math.isfinite(seconds) else RETRY_SECONDS


def judged(reply: Reply) -> dict[str, Any]:
    """What the worker made of a text; raises what stands in the way."""
    status, (code, message) = reply.status, words_of(reply)
    if status == 200:
        answer = reply.json
        if isinstance(answer.get("audio"), str) and isinstance(answer.get("segments"), list):
            return answer
        raise Faulty("the answer has no audio")
    if status in (401, 403):
        raise WrongKey(message)
    if status == 429 or code == "queue_full":
        raise Busy(message, retry_after(reply))
    if code == "generation_failed":
        raise Faulty(message, reply.headers.get("X-Should-Retry") == "false")
    if status == 503 or not code:  # which no worker says, but a proxy, or who has its address now
        raise Gone(message)
    if status == 404 or code in FATAL_CODES:
        raise Hopeless(EX_UNHEALTHY, f"the worker refuses: {message}")
    if code == "nothing_to_speak":
        raise NothingToSpeak(message)
    raise Faulty(message) if status >= 500 or status == 408 else Refused(message)


# -----------------------------------------------------------------------------
# Workers


@dataclass(frozen=True)
class Place:
    """Where a worker is, and what an hour of it costs in dollars; 0 if that is not known."""

    url: str
    key: str = field(default="", repr=False)
    price: float = 0.0


@dataclass(frozen=True)
class Facts:
    """What a worker tells of itself. `voices` has each name and what it stands for."""

    model: str
    voice: str
    max_length: int
    slots: int
    voices: Mapping[str, str] = field(default_factory=dict)
    languages: Mapping[str, str] = field(default_factory=dict)
    rate: int | None = None


class Worker:
    """One worker, asked directly."""

    def __init__(self, place: Place, seconds: float = SPEECH_SECONDS):
        self.place, self._seconds = place, seconds
        self._line = Line(place.url, place.key)

    def health(self) -> dict[str, Any]:
        """Raises Gone unless it is ready."""
        found = self._line.ask("/health").json
        if "model_id" not in found or "status" not in found:
            raise Gone(f"{self.place.url}/health does not answer as a worker's")
        if found["status"] != "ready":
            raise Gone(told_state(found))
        return found

    def facts(self) -> Facts:
        health = self.health()
        listed = self._line.ask("/voices").json.get("voices")
        if not listed:
            raise Gone(f"{self.place.url}/voices lists none")
        return Facts(str(health["model_id"]), str(health["voice"]), int(health["max_text_length"]),
                     int(health.get("slots") or 1),
                     {each["id"]: each.get("alias_of") or each["id"] for each in listed},
                     {each["id"]: each.get("language", "") for each in listed},
                     health.get("sample_rate"))

    def speak(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return judged(self._line.ask("/synthesize", request, self._seconds))

    def cut(self) -> None:
        self._line.cut()


def told_state(health: Mapping[str, Any]) -> str:
    """What a worker that is not ready does, in words."""
    progress = health.get("progress") or {}
    total = progress.get("bytes_total") or 0
    share = f" {100 * progress.get('bytes_done', 0) // total} %" if total else ""
    reason = f": {health['error']}" if health.get("error") else ""
    return f"the worker is {health['status']}{share}{reason}"


class Endpoint:
    """Workers of Vast's serverless side: each request asks the way, and goes where Vast sends it.

    Nobody there tells limits or voices. `place` has the router's address and the endpoint's key.
    """

    def __init__(self, place: Place, name: str, seconds: float = SPEECH_SECONDS):
        self.place, self._name, self._seconds = place, name, seconds
        self._router = Line(place.url, place.key)
        self._lines: dict[str, Line] = {}

    def health(self) -> dict[str, Any]:
        return {}

    def facts(self) -> Facts:
        return Facts(f"endpoint {self._name}", "", ENDPOINT_LENGTH, ENDPOINT_AT_ONCE)

    def _route(self, text: str) -> dict[str, Any]:
        """A worker's address and Vast's signature for it; waits a while until there is one.

        While it waits it is one and the same request, by which Vast sees how many workers to start.
        """
        ask = {"endpoint": self._name, "api_key": self.place.key, "cost": len(text),
               "request_idx": 0, "replay_timeout": 60}
        for _ in range(ROUTE_LOOKS):
            try:
                reply = self._router.ask(f"/route/?api_key={quote(self.place.key)}", ask, 60.0)
            except Gone as error:
                raise Busy(str(error)) from None
            if 400 <= reply.status < 500 and reply.status != 429:
                raise Hopeless(EX_REFUSED, f"Vast routes no request: {words_of(reply)[1]}")
            if str(reply.json.get("url", "")).startswith("http"):
                return reply.json
            ask["request_idx"] = reply.json.get("request_idx") or ask["request_idx"]
            time.sleep(poll_seconds())
        raise Busy("no worker is ready; Vast starts one")

    def speak(self, request: Mapping[str, Any]) -> dict[str, Any]:
        way = self._route(request["text"])
        line = self._lines.setdefault(way["url"], Line(way["url"]))
        try:
            return judged(line.ask("/synthesize", {
                "auth_data": way, "session_id": None, "payload": request}, self._seconds))
        except WrongKey as error:  # of that worker; the next one may do
            raise Gone(str(error)) from None

    def cut(self) -> None:
        for line in list(self._lines.values()):
            line.cut()


# -----------------------------------------------------------------------------
# Finding


def poll_seconds() -> int:
    """Between looks, as the script has it."""
    told = os.environ.get("BARK_POLL", "")
    return max(1, int(told)) if told.isdecimal() else 5


class Fixed:
    """A worker whose address is known."""

    def __init__(self, worker: Worker | Endpoint):
        self.worker = worker

    def find(self) -> Worker | Endpoint:
        return self.worker


class Rented:
    """The worker that manage-bark-worker.sh knows; its address changes, and so may its key."""

    def __init__(self, program: str, seconds: float = SPEECH_SECONDS):
        self._program, self._seconds, self._free = program, seconds, 0.0

    def find(self) -> Worker:
        """Raises Gone if there is one that cannot be called, Hopeless if there is none."""
        lines = shlex.split(self._run("env"), comments=True)
        told = dict(line.split("=", 1) for line in lines)
        place = Place(told["BARK_URL"], told["BARK_API_KEY"])
        Worker(place).health()  # before Vast is asked once more
        return Worker(replace(place, price=self._price(place.url)), self._seconds)

    def _price(self, url: str) -> float:
        try:
            rows = json.loads(self._run("status", "--json"))["instances"]
        except (Gone, Hopeless):
            return 0.0
        return next((row["price_per_hour"] for row in rows if row["address"] == url), 0.0)

    def wake(self) -> None:
        """Has the stopped one started, which costs money. Raises Gone if it did not come up.

        Cut short, it lets `start` stop again what that has woken.
        """
        self._space_calls()
        start = subprocess.Popen([self._program, "start"], stdin=subprocess.DEVNULL,
                                 stdout=subprocess.DEVNULL)
        try:
            status = start.wait()
        except BaseException:
            start.terminate()
            start.wait()
            raise
        self._free = time.monotonic() + LOOKS_APART
        if status:
            raise Gone(f"it did not start (status {status})")

    def _space_calls(self) -> None:
        """Keeps the pause between looks that Vast asks for, which the script keeps within a run."""
        time.sleep(max(0.0, self._free - time.monotonic()))

    def _run(self, *words: str) -> str:
        self._space_calls()
        done = subprocess.run([self._program, *words], stdin=subprocess.DEVNULL, text=True,
                              capture_output=True, check=False)
        self._free = time.monotonic() + LOOKS_APART
        if done.returncode == 0 or (done.returncode == EX_UNHEALTHY and done.stdout):
            return done.stdout
        said = done.stderr.strip().partition(": ")[2] or f"{words[0]} failed"
        if done.returncode == EX_UNHEALTHY:
            raise Gone(said)
        raise Hopeless(done.returncode, said)


# -----------------------------------------------------------------------------
# Pace


class Pace:
    """How many requests may be at work at once: `most` keep the card full, fewer when it says no.

    It halves at a no, and grows by one for each round of successes. Not for several threads.
    """

    def __init__(self, most: int, clock: Any = time.monotonic):
        self._clock = clock
        self.most, self.limit, self.resumes = most, float(most), 0.0
        self._halved = -math.inf

    def allows(self, at_work: int) -> bool:
        return at_work < max(1, int(self.limit)) and self._clock() >= self.resumes

    def aim(self, most: int) -> None:
        """The card holds so many now."""
        if self.limit >= self.most:
            self.limit = float(most)
        self.most, self.limit = most, min(self.limit, float(most))

    def succeeded(self) -> None:
        self.limit = min(float(self.most), self.limit + 1 / self.limit)

    def refused(self, seconds: float, at_work: int) -> None:
        """Several that were sent at once count as one no."""
        now = self._clock()
        if now >= self.resumes and now > self._halved:
            self.limit, self._halved = max(1.0, min(self.limit, at_work) / 2), now
        self.resumes = max(self.resumes, now + seconds)


def requests_for(slots: int) -> int:
    """Enough that no slot waits for us: while some are on their way, others wait at the worker."""
    return slots + math.ceil(slots / 4) + 1


# -----------------------------------------------------------------------------
# At work

ATTEMPTS = 4  # at a text that the worker fails at
LOSSES = 12  # of workers at one text, which may be what ends them


@dataclass
class Task:
    """A text to be spoken, and what became of it."""

    text: str
    name: str  # of the part that it becomes
    tries: int = 0
    losses: int = 0
    seed: int | None = None  # instead of the usual one, which gives nothing
    failure: str = ""


Make = Callable[[Any, Task], None]  # has a worker speak a task, and keeps it; may raise all above


class Crew:
    """Threads that have tasks spoken, as many at once as Pace allows, and none without a worker."""

    def __init__(self, tasks: Iterable[Task], make: Make):
        self._todo, self._make = deque(tasks), make
        self._changed = threading.Condition()
        self._at_work = 0
        self._threads: list[threading.Thread] = []
        self.worker: Any = None
        self.pace = Pace(1)
        self.failed: list[Task] = []
        self.broken: BaseException | None = None  # what ends all of it
        self.trouble: Exception = Gone("")  # the last, for people
        self.busy_since: float | None = None  # a no that no success came after

    def join(self, worker: Any, at_once: int) -> None:
        """From now on this worker speaks."""
        with self._changed:
            self.worker = worker
            self.pace = Pace(at_once)
            self._changed.notify_all()
        self._hire(at_once)

    def aim(self, at_once: int) -> None:
        with self._changed:
            self.pace.aim(at_once)
        self._hire(at_once)

    def _hire(self, count: int) -> None:
        while len(self._threads) < min(count, len(self._todo) + self._at_work):
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()

    def lose(self, worker: Any, reason: Gone) -> None:
        """This one speaks no more; what was asked of it is asked of the next."""
        with self._changed:
            self._lose(worker, reason)
        worker.cut()

    def _lose(self, worker: Any, reason: Gone) -> None:
        if self.worker is worker:
            self.worker, self.trouble = None, reason

    def complaint(self) -> str:
        """What it waits for, if it does."""
        with self._changed:
            return "" if self.pace.allows(0) else str(self.trouble)

    @property
    def is_over(self) -> bool:
        return self.broken is not None or not (self._todo or self._at_work)

    def wait(self, seconds: float) -> None:
        """Until something is to be done by the caller, `seconds` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_over or self.worker is None, seconds)

    def end(self) -> None:
        """Takes up nothing more."""
        with self._changed:
            self._todo.clear()
            self._changed.notify_all()

    def _next(self) -> tuple[Any, Task] | None:
        with self._changed:
            while not self.is_over:
                if self._todo and self.worker and self.pace.allows(self._at_work):
                    self._at_work += 1
                    return self.worker, self._todo.popleft()
                self._changed.wait(PAUSE_SECONDS)  # pauses of the pace end without a word
            return None

    def _work(self) -> None:
        while taken := self._next():
            worker, task = taken
            error: Exception | None = None
            try:
                self._make(worker, task)
            except Exception as caught:
                error = caught
            with self._changed:
                self._settle(worker, task, error)
                self._at_work -= 1
                self._changed.notify_all()

    def _settle(self, worker: Any, task: Task, error: Exception | None) -> None:
        match error:
            case None:
                self.pace.succeeded()
                self.busy_since = None
            case Busy():
                self.trouble, self.busy_since = error, self.busy_since or time.monotonic()
                self.pace.refused(error.seconds, self._at_work)
                self._todo.appendleft(task)
            case Gone():
                self._lose(worker, error)
                task.losses += 1
                self._take_back(task, error, task.losses < LOSSES)
            case Faulty() | Refused():
                self._count(task, error)
            case _:
                self.broken = self.broken or error

    def _count(self, task: Task, error: Faulty | Refused) -> None:
        """Another try, unless that makes no difference or there were enough."""
        task.tries += 1
        again = isinstance(error, Faulty) and task.tries < ATTEMPTS
        if again:
            task.seed = task.tries if error.needs_seed else task.seed
            self.pace.refused(task.tries, self._at_work)
        self._take_back(task, error, again)

    def _take_back(self, task: Task, error: Exception, again: bool) -> None:
        if again:
            self._todo.appendleft(task)
        else:
            task.failure = str(error)
            self.failed.append(task)
