"""Reads a text of any length through a worker into one sound file, and goes on where it broke off.

`manage-bark-worker.sh speak` starts it, and its help tells the options. It needs no torch.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import binding
from binding import RATE
from book import Book, BookError, read_book
from calling import (
    EX_LATE,
    EX_MISSING,
    EX_NO_INSTANCE,
    EX_REFUSED,
    EX_UNHEALTHY,
    EX_USAGE,
    SPEECH_SECONDS,
    Crew,
    Endpoint,
    Facts,
    Faulty,
    Fixed,
    Gone,
    Hopeless,
    NothingToSpeak,
    Place,
    Rented,
    Task,
    Worker,
    WrongKey,
    poll_seconds,
    requests_for,
)
from parts import (
    Brief,
    Heard,
    Locked,
    Manner,
    Part,
    Parts,
    Piece,
    Plan,
    Seeds,
    length_of,
    marks_of,
    pieces_of,
    seconds_for,
    segment_at,
    spliced,
    timeline,
)
from progress import BAR_SECONDS, Progress, clock, moment

PROGRAM = "manage-bark-worker.sh"
MOST_SEED = 2**53 - 1
LOOK_SECONDS, MISSED_LOOKS = 10.0, 3  # between looks at the worker; in a row, then it is gone
WAKE_SECONDS = 60.0  # between attempts to wake what did not come up
LEFT_OUT = "left out: "  # how a worker's warning begins that is no take's

# -----------------------------------------------------------------------------
# Options


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise Hopeless(EX_USAGE, f"{message}; see: {PROGRAM} help speak")


def parse_whole(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,16}", value) or not low <= int(value) <= high:
            raise argparse.ArgumentTypeError(
                f"'{value}' must be a whole number from {low} to {high}")
        return int(value)
    return parse


def parse_time(value: str) -> float:
    """12:34, 1:02:03 or 754.5, in seconds."""
    if not re.fullmatch(r"(\d+:)?(\d+:)?\d+(\.\d+)?", value):
        raise argparse.ArgumentTypeError(f"'{value}' must be a time such as 12:34 or 1:02:03")
    seconds = 0.0
    for number in value.split(":"):
        seconds = 60 * seconds + float(number)
    return seconds


def parse_url(value: str) -> str:
    with contextlib.suppress(ValueError):  # of the port
        parts = urlsplit(value)
        if re.fullmatch(r"https?://[^/\s?#@]+(/[^\s?#]*)?", value) and value.isascii() and \
                parts.hostname and parts.port != 0:
            return value.rstrip("/")
    raise argparse.ArgumentTypeError(f"'{value}' must be an address such as http://127.0.0.1:8080")


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises Hopeless for what is wrong."""
    parser = Parser(prog=f"{PROGRAM} speak", add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("file", metavar="FILE")
    add("-o", "--out", type=Path, required=True)
    add("--url", type=parse_url)
    add("--endpoint", action="store_true")
    add("--start", action="store_true")
    add("--wait", type=parse_whole(0, 10080), default=60)
    add("--at-once", type=parse_whole(1, 256))
    add("--voice", default="")
    add("--seed", type=parse_whole(0, MOST_SEED))
    add("--plain", action="store_true")
    add("--no-notes", dest="notes", action="store_false")
    add("--keep", action="store_true")
    add("--again", type=parse_time)
    add("--json", action="store_true")
    add("-q", "--quiet", action="store_true")
    options = parser.parse_args(arguments)
    options.keep |= options.again is not None  # one may not be the last
    if options.url and (options.endpoint or options.start):
        parser.error("--url goes without --endpoint and --start")
    if options.endpoint and options.start:
        parser.error("--start goes without --endpoint, whose workers Vast starts by itself")
    return options


# -----------------------------------------------------------------------------
# Making one part


def decoded(sound: str) -> bytes:
    """The int16 PCM of FLAC in base64. Raises Faulty if it is none, Hopeless if not at RATE."""
    try:
        with av.open(io.BytesIO(base64.b64decode(sound))) as file:
            frames = list(file.decode(audio=0))
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise Faulty(f"the answer's audio cannot be read: {error}") from None
    if {frame.sample_rate for frame in frames} - {RATE}:
        raise wrong_rate("the worker", frames[0].sample_rate)
    return b"".join(bytes(frame.planes[0])[: 2 * frame.samples] for frame in frames)


def wrong_rate(who: str, rate: int) -> Hopeless:
    return Hopeless(EX_UNHEALTHY, f"{who} speaks at {rate} Hz; only models of {RATE} Hz can be"
                                  " bound")


@dataclass
class Maker:
    """Has a worker speak a text, and keeps what comes of it."""

    parts: Parts
    plan: Plan
    bound: Plan  # with the seeds that were used when the whole was bound last
    on_part: Callable[[Task, Part], None]

    def make(self, worker: Worker | Endpoint, task: Task) -> None:
        manner = self.plan.manner
        seeds = self.plan.seeds.get(manner.name_of(task.text), {})
        asked = manner.request(task.text) | ({"seeds": seeds} if seeds else {})
        if task.seed is not None:
            asked["seed"] = task.seed
        try:
            answer = worker.speak(asked)
            pcm = decoded(answer["audio"])
            part = Part(pcm, answer["segments"], binding.measure(pcm))
        except NothingToSpeak:
            part = Part(b"")
        if seeds:
            part = self._beside_the_old(task.text, part, seeds)
        self.parts.save(task.name, part)
        self.on_part(task, part)

    def _beside_the_old(self, text: str, new: Part, seeds: Seeds) -> Part:
        """Of what is made again, only the segments that were to be: the others stay as they are."""
        manner = self.plan.manner
        before = self.bound.seeds.get(manner.name_of(text), {})
        old = self.parts.load(manner.name_of(text, before))
        if old is None or len(old.segments) != len(new.segments):
            return new
        return spliced(old, new, [int(index) for index, seed in seeds.items()
                                  if before.get(index) != seed])


# -----------------------------------------------------------------------------
# Looking for the worker


@dataclass
class Search:
    """Finds the worker, and waits for it where it is not to be called."""

    finder: Fixed | Rented
    progress: Progress
    minutes: int  # to wait
    may_start: bool
    woken: float = -WAKE_SECONDS
    found: float = 0.0

    def once(self) -> tuple[Worker | Endpoint, Facts]:
        worker = self.finder.find()
        return worker, worker.facts()

    def wait(self, reason: Exception, lost: Worker | Endpoint | None = None,
             ) -> tuple[Worker | Endpoint, Facts]:
        """Raises Hopeless once it took too long, or if no waiting helps."""
        until, said = time.monotonic() + 60 * self.minutes, ""
        time.sleep(max(0.0, self.found + poll_seconds() - time.monotonic()))  # lost at once again
        while True:
            if str(reason) != said:
                said = str(reason)
                self.progress.say(f"waiting for the worker: {said}")
            try:
                self._wake()
                worker, facts = self.once()
                if isinstance(reason, WrongKey) and lost and worker.place == lost.place:
                    raise Hopeless(EX_MISSING, f"{reason} (BARK_API_KEY)")
                self.found = time.monotonic()
                return worker, facts
            except Gone as gone:
                reason = gone
            except Hopeless as hopeless:
                if hopeless.status not in (EX_REFUSED, EX_NO_INSTANCE):
                    raise
                reason = hopeless
            if time.monotonic() >= until:
                raise Hopeless(EX_LATE, f"no worker was ready within {self.minutes} minutes"
                                        f" (--wait): {reason}")
            time.sleep(poll_seconds())

    def check(self, crew: Crew) -> None:
        """Raises Hopeless where every worker has been too busy for longer than one may be away."""
        seconds = max(SPEECH_SECONDS, 60.0 * self.minutes)  # what is under way may take the former
        if crew.busy_since and time.monotonic() > crew.busy_since + seconds:
            raise Hopeless(EX_LATE, f"nothing was spoken for {seconds / 60:.0f} minutes (--wait):"
                                    f" {crew.trouble}")

    def _wake(self) -> None:
        if self.may_start and time.monotonic() >= self.woken + WAKE_SECONDS:
            self.woken = time.monotonic()
            self.finder.wake()


# -----------------------------------------------------------------------------
# The job: from a book to its parts


@dataclass
class Job:
    """Has all of a book spoken that there are no parts of."""

    options: argparse.Namespace
    book: Book
    parts: Parts
    search: Search
    progress: Progress
    plan: Plan = field(init=False)
    maker: Maker = field(init=False)
    briefs: dict[str, Brief] = field(init=False)
    failures: dict[str, str] = field(default_factory=dict)  # by name
    made: int = 0

    def run(self) -> None:
        """Raises Hopeless or OSError for what ends it."""
        found = self._find_worker()
        tasks = self._missing()
        if tasks and found:
            self._speak(tasks, *found)

    def _find_worker(self) -> tuple[Worker | Endpoint, Facts] | None:
        """And makes the plan. Where all is spoken already, what was noted of the worker will do."""
        noted = self.parts.noted("worker") or {}
        is_same = noted.pop("asked", None) == self.options.voice
        try:
            found = self.search.once()
        except (Gone, Hopeless) as error:
            if is_same and self.options.again is None:
                self._make_plan(**noted)
                if not self._missing():
                    return None
            if isinstance(error, Hopeless):
                raise
            found = self.search.wait(error)
        told = self._told(found[1])
        # what was cut for another worker stays so, where this one takes as much
        told["limit"] = min(told["limit"], noted.get("limit", told["limit"]))
        self._make_plan(**told)
        self.parts.note("worker", {**told, "asked": self.options.voice})
        if self.book.language and told["language"] not in ("", self.book.language):
            self.progress.say(f"the book is in '{self.book.language}', and {told['voice']} speaks"
                              f" '{told['language']}'; --voice takes another")
        return found

    def _told(self, facts: Facts) -> dict[str, Any]:
        """What the plan needs to know. Raises Hopeless for a voice that the worker has not."""
        if facts.rate not in (None, RATE):
            raise wrong_rate(facts.model, facts.rate)
        known = {name.lower(): name for name in facts.voices}
        voice = (self.options.voice or facts.voice).strip()
        if known and voice.lower() not in known:
            raise Hopeless(EX_USAGE, f"--voice is '{voice}'; {facts.model} has"
                                     f" {', '.join(list(facts.voices)[:8])} ... (GET /voices)")
        voice = known.get(voice.lower(), voice)
        return {"model": facts.model, "voice": facts.voices.get(voice, voice),
                "limit": facts.max_length, "language": facts.languages.get(voice, "")}

    def _make_plan(self, model: str, voice: str, limit: int, language: str) -> None:
        options = self.options
        spoken = language or self.book.language or "en"
        pieces = pieces_of(self.book, limit, options.notes, spoken)
        if not pieces:
            raise Hopeless(EX_USAGE, f"there is nothing to speak in {options.file}")
        manner = Manner(model, voice, options.seed, not options.plain)
        index = self.parts.noted("index") or {}
        bound = Plan(pieces, manner, index.get("seeds", {}))
        seeds = self.parts.noted("seeds") or {}
        if options.again is not None:
            seeds = self._drawn_again(bound, index)
        self.plan = Plan(pieces, manner, seeds)
        self.maker = Maker(self.parts, self.plan, bound, self._keep)
        self.briefs = self.parts.briefs(self.plan.firsts)

    def _drawn_again(self, bound: Plan, index: Mapping[str, Any]) -> dict[str, Seeds]:
        """The seeds with another one for the sentence that is heard at --again."""
        options, briefs = self.options, self.parts.briefs(bound.firsts)
        if index.get("plan") != bound.plain_names or \
                not bound.firsts.keys() <= {*briefs, *index.get("failed", ())}:
            raise Hopeless(EX_USAGE, f"the parts of {options.out} are not there, or {options.file}"
                           " or an option is another than when they were bound; speak it once more"
                           " without --again, but with --keep, so that they stay")
        heard = timeline(bound, briefs)
        found = segment_at(heard, options.again)
        if found is None:
            raise Hopeless(EX_USAGE, f"no sentence is heard at {clock(options.again)};"
                                     f" {options.out} has {clock(length_of(heard))}")
        one, index = found
        self.progress.say(f"again: {one.brief.segments[index]['text']}")
        plain = bound.manner.name_of(one.piece.text)
        seeds = {**bound.seeds, plain: {**bound.seeds.get(plain, {}),
                                        str(index): secrets.randbelow(MOST_SEED)}}
        self.parts.note("seeds", seeds)
        return seeds

    def _missing(self) -> list[Task]:
        """A task for each text that there is no part of, in order."""
        return [Task(self.plan.pieces[place].text, name)
                for name, place in self.plan.firsts.items() if name not in self.briefs]

    def _speak(self, tasks: list[Task], worker: Worker | Endpoint, facts: Facts) -> None:
        every = [self.plan.pieces[place].text for place in self.plan.firsts.values()]
        missing = sum(seconds_for(task.text) for task in tasks)
        self._check_room(missing)
        self.progress.begin(sum(map(seconds_for, every)), missing)
        crew = Crew(tasks, self.maker.make)
        try:
            self._employ(crew, worker, facts)
            self._attend(crew, worker)
        finally:
            crew.end()
            self.progress.pause()
        if crew.broken:
            raise crew.broken
        self.failures = {task.name: task.failure for task in crew.failed}

    def _check_room(self, seconds: float) -> None:
        needed, free = int(seconds * 2 * RATE), self.parts.room()
        if needed > free:
            raise Hopeless(EX_UNHEALTHY, f"the parts need about {needed // 10**6} MB, and"
                           f" {free // 10**6} MB are free for {self.parts.folder}")

    def _keep(self, task: Task, part: Part) -> None:
        """Called by the crew's threads."""
        self.briefs[task.name] = part.in_brief()
        self.made += 1
        self.progress.add(seconds_for(task.text), part.seconds)

    def _employ(self, crew: Crew, worker: Worker | Endpoint, facts: Facts) -> None:
        if facts.model != self.plan.manner.model:
            raise Hopeless(EX_UNHEALTHY, f"the worker has {facts.model} now, and this was begun"
                           f" with {self.plan.manner.model}; the same command speaks all of it"
                           " anew, or goes on with a worker that has that again")
        self.progress.resume(worker.place.price)
        crew.join(worker, self.options.at_once or requests_for(facts.slots))

    def _attend(self, crew: Crew, worker: Worker | Endpoint) -> None:
        """Until all is spoken or given up."""
        looked, missed = time.monotonic(), 0
        while not crew.is_over:
            if crew.worker is None:
                self.progress.pause()
                worker, facts = self.search.wait(crew.trouble, worker)
                self._employ(crew, worker, facts)
                missed = 0
            crew.wait(BAR_SECONDS)
            self.search.check(crew)
            self.progress.show(self._chapter(), crew.complaint())
            if crew.worker and time.monotonic() > looked + LOOK_SECONDS:
                looked, missed = time.monotonic(), self._look(crew, worker, missed)

    def _look(self, crew: Crew, worker: Worker | Endpoint, missed: int) -> int:
        """How many looks in a row the worker has not answered; it is lost after some."""
        try:
            health = worker.health()
        except Gone as gone:
            if missed + 1 >= MISSED_LOOKS:
                crew.lose(worker, gone)
            return missed + 1
        if health.get("slots") and not self.options.at_once:
            crew.aim(requests_for(health["slots"]))
        return 0

    def _chapter(self) -> str:
        """The first that is not done, for people."""
        count = len(self.book.chapters)
        place = next((place for name, place in self.plan.firsts.items()
                      if name not in self.briefs), len(self.plan.pieces) - 1)
        number = self.plan.pieces[place].chapter
        title = self.book.chapters[number].title[:30]
        told = f"chapter {number + 1} of {count}"
        return "" if count == 1 else f"{told}: {title}" if title else told


# -----------------------------------------------------------------------------
# The whole


@dataclass
class Result:
    """What came of it, for people and programs."""

    out: str
    seconds: float
    parts: int  # texts, each once
    spoken: int  # of them by this run
    reused: int
    failed: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    dollars: float | None  # of this run, estimated


def bind_whole(job: Job) -> Result:
    """Raises BindingError, OSError, and Hopeless if there is no sound."""
    heard = timeline(job.plan, job.briefs)
    if not any(one.seconds for one in heard):
        reasons = sorted(set(job.failures.values()))[:3] or ["there is no word in it"]
        raise Hopeless(EX_UNHEALTHY, f"nothing could be spoken: {'; '.join(reasons)}")
    out, book = job.options.out, job.book
    whole = length_of(heard)
    binding.check_output(out, whole)
    binding.bind(
        out, sounds_of(job.parts, heard), marks_of(book.chapters, heard), title=book.title,
        author=book.author, language=book.language, cover=book.cover,
        on_progress=lambda at: job.progress.show(f"writing {out.name}: {100 * at / whole:.0f} %"))
    dollars = job.progress.dollars
    count = len(job.plan.firsts)
    return Result(str(out), round(whole, 3), count, job.made,
                  count - job.made - len(job.failures),
                  [{**told_place(book, one.piece), "at": clock(one.start),
                    "reason": job.failures.get(one.name, "")} for one in heard if not one.brief],
                  list(warnings_of(book, heard)),
                  None if dollars is None else round(dollars, 6))


def sounds_of(parts: Parts, heard: Sequence[Heard]) -> Iterator[bytes]:
    for one in heard:
        if one.seconds:
            part = parts.load(one.name)
            if part is None:
                raise Hopeless(EX_UNHEALTHY, f"a part in {parts.folder} broke meanwhile; the same"
                                             " command makes it again")
            yield binding.level(part.pcm, binding.gain_for(part.loudness))
        yield binding.silence(one.piece.pause)


def told_place(book: Book, piece: Piece) -> dict[str, Any]:
    chapter = book.chapters[piece.chapter]
    return {"chapter": chapter.title or str(piece.chapter + 1), "source": chapter.source,
            "line": piece.line}


def warnings_of(book: Book, heard: Sequence[Heard]) -> Iterator[dict[str, Any]]:
    for one in heard:
        for segment in one.brief.segments if one.brief else ():
            if segment.get("warnings"):
                yield {**told_place(book, one.piece), "at": moment(one.start + segment["start"]),
                       "text": segment["text"], "warnings": segment["warnings"]}


def put_away(job: Job, result: Result) -> None:
    """The parts go, unless somebody may want one made again."""
    bad_takes = [said for each in result.warnings for said in each["warnings"]
                 if not said.startswith(LEFT_OUT)]
    job.parts.forget_others(job.plan.names)
    if not (job.options.keep or result.failed or bad_takes):
        job.parts.remove()
        return
    job.parts.note("index", {"plan": job.plan.plain_names, "seeds": job.plan.seeds,
                             "failed": [*job.failures]})
    what = "the same command tries what failed once more" if result.failed else \
        "--again TIME makes a sentence anew"
    job.progress.say(f"the parts stay in {job.parts.folder} ({job.parts.size() / 1e6:.0f} MB):"
                     f" {what}; remove it when all is well")


# -----------------------------------------------------------------------------
# Main


class Ended(BaseException):
    """A signal came."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def listen_for_signals() -> None:
    def end(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)  # one is enough
        raise Ended(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's
            signal.signal(number, end)


def finder_for(options: argparse.Namespace, environ: Mapping[str, str]) -> Fixed | Rented:
    """Who knows where the worker is. What only the script knows stands in the environment."""
    timeout = environ.get("BARK_TIMEOUT", "")
    seconds = max(SPEECH_SECONDS, float(timeout) + 60 if timeout.isdigit() else 0.0)
    if options.url:
        key = environ.get("BARK_API_KEY", "")
        if not re.fullmatch("[!-~]*", key):
            raise Hopeless(EX_USAGE, "BARK_API_KEY must be printable ASCII without blanks (its"
                                     " value is not shown)")
        return Fixed(Worker(Place(options.url, key), seconds))
    if options.endpoint:
        place = Place(environ["SPEAK_ROUTER"], environ["SPEAK_ENDPOINT_KEY"])
        return Fixed(Endpoint(place, environ["SPEAK_ENDPOINT"], seconds))
    return Rented(environ["SPEAK_PROGRAM"], seconds)


def read_file(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise Hopeless(EX_USAGE, f"{name} cannot be read: {error.strerror}") from None


def report(result: Result, progress: Progress, as_json: bool) -> None:
    for each in result.warnings:
        progress.say(f"warning at {each['at']}: {'; '.join(each['warnings'])}"
                     f" ({each['chapter']}, line {each['line']})")
    for each in result.failed:
        progress.say(f"not spoken, a silence at {each['at']}: {each['chapter']},"
                     f" line {each['line']}: {each['reason']}")
    with contextlib.suppress(BrokenPipeError):  # who reads no answer has what he wanted
        print(json.dumps(vars(result)) if as_json else
              f"{result.out}: {clock(result.seconds)} of speech", flush=True)


def run(options: argparse.Namespace, progress: Progress) -> int:
    """The exit status. Raises what `main` tells."""
    # a name may be in no encoding, and becomes a title
    book = read_book(read_file(options.file), os.fsencode(options.file).decode(errors="replace"))
    for remark in book.remarks:
        progress.say(remark)
    texts = [paragraph.text for chapter in book.chapters for paragraph in chapter.paragraphs]
    binding.check_output(options.out, sum(map(seconds_for, texts)))
    search = Search(finder_for(options, os.environ), progress, options.wait, options.start)
    with Parts(options.out) as parts:
        if options.out.exists() and not parts.are_there() and options.again is None:
            raise Hopeless(EX_USAGE, f"{options.out} is there already; remove it, or name another"
                                     " file")
        job = Job(options, book, parts, search, progress)
        try:
            job.run()
            result = bind_whole(job)
            put_away(job, result)
        finally:
            if progress.price:
                progress.say(f"the worker goes on costing {progress.price:.4f} $/h; to end that:"
                             f" {os.environ['SPEAK_AGAIN']} stop")
    report(result, progress, options.json)
    return EX_UNHEALTHY if result.failed else 0


def main(arguments: Sequence[str]) -> int:
    progress = Progress("-q" in arguments or "--quiet" in arguments)
    goes_on = "what is spoken stays, and the same command goes on from there"
    try:
        return run(parse_options(arguments), progress)
    except Ended as ended:
        progress.say(f"broken off: {goes_on}")
        return ended.status
    except Hopeless as hopeless:
        progress.say(f"{PROGRAM}: {hopeless}")
        return hopeless.status
    except Locked:
        progress.say(f"{PROGRAM}: another speak is at work on this output")
    except (BookError, binding.UnusableName) as error:
        progress.say(f"{PROGRAM}: {error}")
        return EX_USAGE
    except binding.BindingError as error:
        progress.say(f"{PROGRAM}: {error}")
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        progress.say(f"{PROGRAM}: {named}{error.strerror or error}; {goes_on}")
    return EX_UNHEALTHY


if __name__ == "__main__":
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")
    listen_for_signals()
    status = main(sys.argv[1:])
    os._exit(status)  # threads may still wait for an answer
