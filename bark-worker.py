#!/usr/bin/env python3
"""Bark over HTTP: Suno's text-to-speech model behind the standard library's web server.

    python bark-worker.py            # settings come from the environment; --help lists them

    curl -s http://127.0.0.1:8080/synthesize -H 'Content-Type: application/json' \\
         -H 'Accept: audio/wav' -d '{"text": "Good evening, and welcome."}' -o hello.wav

    python bark-worker.py --serverless    # becomes pyworker.py, for an endpoint of Vast.ai

The map: sections in order. Each uses what stands above it, and of the world what it may touch.

  section        what it owns                               may touch             watched by
  Errors         what can go wrong, for whoever has to act  -                     test_scheduler
  Logs           what a line of the log looks like          threads               test_logs
  Configuration  settings and --help, before all else       environment, signals  test_config
  Signs          letters, blanks, how long they last        -                     test_text
  Layout         paragraphs, lines, hyphens at their ends   -                     test_text
  Stops          where a sentence ends                      -                     test_text
  Text           where a text is cut                        -                     test_text
  Reading        what signs stand for, for every model      -                     test_reading
  Lexicon        words that tell how a line sounds          -                     test_expression
  Asides         directions, left out, and emphasis         -                     test_reading
  Grammar        patterns of them: who makes which sound    -                     test_expression
  Placement      cues and emphasis put in, the words kept   -                     test_expression
  Audio          samples to bytes, in six formats           -                     test_audio
  Takes          what came of a generation, judged          -                     test_takes
  Timing         when each word of a text is heard          -                     test_timing
  Model          folders, downloads, weights, presets       tensors               test_weights
  Sampling       which token comes next                     tensors               test_engine
  Decoding       one token a step in slots of a KV cache    tensors               test_batching
  Stages         semantic, coarse and fine, and the codec   tensors               test_engine
  Engine         the stages' order; segments in, PCM out    tensors               test_batching
  Voices         which there are; presets of one's own      threads               test_voices
  Narrator       a request's text as segments               -                     test_openai
  Metrics        what Prometheus is told                    prometheus            test_metrics
  Hearing        takes heard and judged, beside the device  tensors, threads      test_hearing
  Scheduler      whose turn it is; the engine's one thread  threads               test_scheduler
  Samples        a line in each voice, made once and kept   threads               test_voices
  Guard          an idle instance of Vast's stops itself    threads, net          test_guard
  HTTP           connections, limits, framing, errors       threads, net          test_server
  Endpoints      what clients may ask for, how it is sent   threads, net          test_openai
  Main           the wiring                                 all                   test_server

    HTTP threads --- request ---> scheduler thread --- segments ---> engine --- tensors ---> Bark
    HTTP threads <-- audio ------ scheduler thread <-- finished ---- engine <-- tokens ----- Bark

A *request* is a text to speak, a *segment* a piece of it that fits one Bark generation, a *take*
one generation of a segment.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import difflib
import email.errors
import errno
import gc
import hashlib
import hmac
import html
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import secrets
import select
import shutil
import signal
import socket
import socketserver
import stat
import struct
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import zipfile
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from fractions import Fraction
from functools import cached_property, lru_cache, partial, reduce
from html.entities import html5
from http import HTTPStatus
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from listener import Heard, Listener, Word

VERSION = "0.1.0"

log = logging.getLogger("bark-worker")


# -----------------------------------------------------------------------------
# Errors: what can go wrong, in words for the person who has to act on it
#
# All that can go wrong on purpose is one of these. Their words are for the person who has to act:
# what is wrong, which value, what is allowed, what to do next. The request's text is never in them.


class WorkerError(Exception):
    """Something a person is told about. `code` is for programs, `param` names the field at fault.

    The HTTP section maps each subclass to a status; nothing else does.
    """

    kind = "server_error"
    permanent = False  # the same request would fail again
    exit_status = 1  # of a worker that cannot go on

    def __init__(self, message: str, *, code: str, param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


class ConfigError(WorkerError):
    """A setting is wrong; the worker does not start, here or anywhere."""

    exit_status = 2

    def __init__(self, message: str):
        super().__init__(message, code="invalid_configuration")


class ModelError(WorkerError):
    """The model cannot be had, read or used as it is."""

    def __init__(self, message: str):
        super().__init__(message, code="model_unavailable")


class InvalidRequest(WorkerError):
    """The client has to change something."""

    kind = "invalid_request_error"
    permanent = True


class NothingToSpeak(InvalidRequest):
    """The text is well-formed, but no word, digit or cue is in it."""


class Unavailable(WorkerError):
    """Not now: loading, draining or full. Try again after `retry_after` seconds."""

    def __init__(self, message: str, *, code: str, retry_after: int):
        super().__init__(message, code=code)
        self.retry_after = retry_after


class RequestTimeout(WorkerError):
    """The request's time is up; its work was dropped."""


class GenerationFailed(WorkerError):
    """Bark gave no usable audio, also when asked again."""


class Abandoned(WorkerError):
    """The client went away; nobody reads this."""


def shown(value: object, limit: int = 60) -> str:
    """`value` as a short printable literal, for messages about input of any size."""
    text = ascii(value if not isinstance(value, str) else value[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


def without_folders(message: str) -> str:
    """The message with names of files alone, as where they lie on the machine concerns nobody."""
    return re.sub(r"(?<![\w:/.~-])~?(?:/[^\s/:;,'\"()]+)+/(?=[^\s/:;,'\"()])", "", message)


# -----------------------------------------------------------------------------
# Logs: what a line looks like, for people or for programs
#
# Text is for people. As JSON every line is one object, also what Python and the libraries say by
# themselves; only what native code writes past Python stays as it is. A record's `fields` are for
# programs, who get them apart.


class JsonLine(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, message, its fields, a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        line = {"time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                "level": record.levelname, "message": record.getMessage(),
                **getattr(record, "fields", {})}
        if record.name != log.name:
            line["logger"] = record.name
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class LoggedWriting(io.TextIOBase):
    """Has what is written to it logged, each line as it would stand on a terminal in the end."""

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, rest = (self._rest + text).split("\n")
        self._rest = rest[max(0, rest.rfind("\r")):]  # a bar of progress draws over itself
        for line in lines:
            if last := line.strip().rpartition("\r")[2]:
                logging.getLogger("stderr").warning("%s", last)
        return len(text)

    def fileno(self) -> int:
        """For a process that is to inherit it."""
        return sys.__stderr__.fileno()


def open_log(form: str) -> None:
    """The log goes to stderr from here on, as "text" or "json"; once is enough."""
    if logging.root.handlers:
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if form == "json":
        logging.root.handlers[0].setFormatter(JsonLine())
        logging.captureWarnings(True)
        logging.raiseExceptions = False  # a line that cannot be written would be about itself
        sys.excepthook = lambda *error: log.error("the worker broke", exc_info=error)
        threading.excepthook = lambda broken: log.error("a thread broke", exc_info=broken.exc_value)
        sys.stderr = LoggedWriting()


# -----------------------------------------------------------------------------
# Configuration: the only place that reads the environment
#
# One table lists every setting with its default, what may be said and what it means; --help and the
# checks are made of it, and docs/settings.md is held to it. All wrong values are named at once.

MANAGER_VARIABLES = frozenset({"BARK_LABEL", "BARK_IMAGE", "BARK_POLL", "BARK_TRACE"})  # manager's
PYWORKER = Path(__file__).resolve().with_name("pyworker.py")
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
# Whisper in CTranslate2's layout, as faster-whisper's authors keep it on the hub.
LISTENERS = {size: f"Systran/faster-whisper-{size}" for size in (
    "tiny", "base", "small", "medium", "large-v3", "tiny.en", "base.en", "small.en", "medium.en")}


def parse_integer(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(value)
    return parse


def parse_seconds(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", value) or float(value) == 0:
        raise ValueError("seconds, more than 0 and less than 1000000")
    return float(value)


def parse_span(unit: str, high: int) -> Callable[[str], float]:
    def parse(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]*)?|\.[0-9]+", value) or float(value) > high:
            raise ValueError(f"{unit} from 0 to {high}, decimals too; 0 is off")
        return float(value)
    return parse


def parse_choice(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(" or ".join(allowed))
        return value
    return parse


def parse_device(value: str) -> str:
    if not re.fullmatch(r"cpu|cuda|cuda:[0-9]{1,2}", value):
        raise ValueError("cpu, cuda or cuda:N")
    return "cuda:0" if value == "cuda" else value


def parse_switch(value: str) -> bool:
    return parse_choice("on", "off")(value) == "on"


def parse_text(value: str) -> str:
    if not value.isprintable():
        raise ValueError("printable characters")
    return value


def parse_like(pattern: str, allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(allowed)
        return value
    return parse


def parse_origins(value: str) -> tuple[str, ...]:
    origins = tuple(origin.strip().lower() for origin in value.split(","))
    if not all(re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[!-)+\-.0-~]+", o) for o in origins):
        raise ValueError("origins such as https://reader.example, each in full and without a path,"
                         " joined by commas; or * alone")
    return origins


def parse_listener(value: str) -> str | None:
    if value == "off":
        return None
    if not (value in LISTENERS or re.fullmatch(HUB_ID, value) or Path(value).expanduser().is_dir()):
        raise ValueError(f"off, {', '.join(LISTENERS)}, a hub id such as {LISTENERS['tiny']}, or a"
                         " folder")
    return value


def parse_share(value: str) -> float:
    if not re.fullmatch(r"[0-9](\.[0-9]{0,4})?|\.[0-9]{1,4}", value):
        raise ValueError("a number from 0 to 9.9999")
    return float(value)


class Variable(NamedTuple):
    """One environment variable: its `Config` field, its default as shown, and what it means."""

    name: str
    field: str
    default: str
    parse: Callable[[str], Any]
    meaning: str


def setting(name: str, default: Any, parse: Callable[[str], Any], meaning: str,
            told: str | None = None) -> Any:
    """A field of Config that the variable `name` sets; `told` is its default in words."""
    told = str(default) if told is None else told
    return field(default=default, repr=name != "BARK_API_KEY",
                 metadata={"variable": (name, told, parse, meaning)})


VAST_URL = "https://console.vast.ai"


@dataclass(frozen=True)
class Container:
    """A container of Vast's: its instance's number, the key that may stop just that, and where."""

    instance: str
    key: str = field(repr=False)
    url: str = VAST_URL

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Container | None:
        """What Vast gives each; None elsewhere. VAST_URL is the variable of Vast's own CLI."""
        instance, key = environ.get("CONTAINER_ID", ""), environ.get("CONTAINER_API_KEY", "")
        if re.fullmatch(r"[0-9]{1,12}", instance) and re.fullmatch(r"[!-~]+", key):
            return cls(instance, key, (environ.get("VAST_URL") or VAST_URL).rstrip("/"))
        return None


@dataclass(frozen=True)
class Config:
    """The settings, checked, each with its variable.

    None means: decided when device and free memory are known. `container` is None elsewhere than
    on Vast. Minutes and hours are as they were said; 0 is off.
    """

    voice: str = setting("BARK_VOICE", "v2/en_speaker_6", parse_text,
                         "voice when a request names none")
    voices_dir: str | None = setting("BARK_VOICES_DIR", None, parse_text,
                                     "folder of presets of one's own, .npz files", "none")
    max_text_length: int = setting("TTS_MAX_LENGTH", 500, parse_integer(1, 1_000_000),
                                   "most characters in one /synthesize text")
    port: int = setting("PORT", 8080, parse_integer(0, 65535),
                        "port to listen on; 0 takes a free one and logs it")
    host: str = setting("HOST", "0.0.0.0", parse_text, "address to listen on")
    model: str | None = setting(
        "BARK_MODEL", None, parse_text, "hub id or local folder of the model",
        "suno/bark on a GPU, suno/bark-small on a CPU")
    device: str | None = setting("BARK_DEVICE", None, parse_device, "cpu, cuda or cuda:N",
                                 "cuda:0 if there is one, else cpu")
    dtype: str | None = setting(
        "BARK_DTYPE", None, parse_choice("float16", "bfloat16", "float32"),
        "precision of the weights",
        "float16 on a GPU; on a CPU that multiplies bfloat16 that, else float32")
    api_key: str | None = setting(
        "BARK_API_KEY", None,
        parse_like(r"[!-~]+", "printable ASCII without blanks (its value is not shown)"),
        "when set, requests need 'Authorization: Bearer KEY'", "none")
    max_batch: int | None = setting("BARK_MAX_BATCH", None, parse_integer(1, 256),
                                    "segments generated at once", "from free memory")
    max_queue: int = setting("BARK_MAX_QUEUE", 32, parse_integer(1, 100_000),
                             "requests that may wait; more get 503")
    timeout: float = setting("BARK_TIMEOUT", 600.0, parse_seconds,
                             "seconds one request may take in all; then 504", "600")
    deterministic: bool = setting(
        "BARK_DETERMINISTIC", False, parse_switch,
        "on: one fixed batch shape, so that audio never depends on the neighbours", "off")
    expression: bool = setting(
        "BARK_EXPRESSION", True, parse_switch,
        "off: no text gets cues or capitals, as with \"expressive\": false", "on")
    quality: bool = setting(
        "BARK_QUALITY", True, parse_switch,
        "on: judge, trim and level each segment; off: the model's raw output", "on")
    retries: int = setting("BARK_RETRIES", 2, parse_integer(0, 10),
                           "times that a bad segment is made again")
    listen: str | None = setting(
        "BARK_LISTEN", None, parse_listener,
        "a recogniser that hears each segment's words: tiny, base, ..., a hub id or a folder",
        "off")
    word_errors: float = setting(
        "BARK_WORD_ERRORS", 0.35, parse_share,
        "share of wrong words from which a segment that is listened to counts as bad")
    cache_mb: int = setting(
        "BARK_CACHE_MB", 256, parse_integer(0, 1_000_000),
        "megabytes of finished segments to keep in memory, for repeats; 0 keeps none")
    cors_origins: tuple[str, ...] = setting(
        "BARK_CORS_ORIGINS", (), parse_origins,
        "web pages that may call it from a browser: origins joined by commas, or *", "none")
    metrics: str = setting("BARK_METRICS", "key", parse_choice("key", "open"),
                           "open: /metrics is for everybody, with BARK_API_KEY too")
    log_format: str = setting("BARK_LOG_FORMAT", "text", parse_choice("text", "json"),
                              "json: each line of the log is a JSON object")
    idle_stop: float = setting(
        "BARK_IDLE_STOP", 0.0, parse_span("minutes", 10_080),
        "on Vast: minutes without speech after which the instance stops itself; 0 is never", "0")
    start_limit: float = setting(
        "BARK_START_LIMIT", 0.0, parse_span("minutes", 10_080),
        "on Vast, by the on-start command: minutes in which the worker has to be ready", "0")
    max_hours: float = setting(
        "BARK_MAX_HOURS", 0.0, parse_span("hours", 8_760),
        "on Vast, by the on-start command: hours after which the instance stops itself", "0")
    container: Container | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Reads VARIABLES; an empty one is unset. Raises ConfigError naming every wrong one."""
        values, wrong = {}, []
        for variable in VARIABLES:
            if not (raw := environ.get(variable.name)):
                continue
            try:
                values[variable.field] = variable.parse(raw)
            except ValueError as allowed:
                found = "is wrong" if variable.field == "api_key" else f"is {shown(raw)}"
                wrong.append(f"{variable.name} {found}; allowed: {allowed}")
        if wrong:
            raise ConfigError("wrong configuration:\n  " + "\n  ".join(wrong))
        return cls(container=Container.from_env(environ), **values)


VARIABLES = tuple(Variable(name, each.name, *rest) for each in fields(Config) if each.metadata
                  for name, *rest in [each.metadata["variable"]])


def warnings_about(config: Config, environ: Mapping[str, str]) -> list[str]:
    """Names in `environ` that look like ours and are not, so that a typing error is noticed, and
    what is set to no effect."""
    known = {variable.name for variable in VARIABLES} | MANAGER_VARIABLES
    warnings = [f"{name} is set, but there is no such setting; --help lists them"
                for name in sorted(environ) if name.startswith("BARK_") and name not in known]
    if config.listen and not config.quality:
        warnings.append("BARK_LISTEN is set, but with BARK_QUALITY=off nothing is judged or heard")
    return warnings


def read_settings(arguments: list[str]) -> Config:
    """What the environment says. Ends the process as argparse does: with 0 for --help and
    --version, and with 2 and every mistake for what is wrong."""
    parser = argument_parser()
    if parser.parse_args(arguments).serverless:
        parser.exit(become_pyworker())
    try:
        return Config.from_env(os.environ)
    except ConfigError as error:
        if os.environ.get("BARK_LOG_FORMAT") != "json":
            parser.exit(error.exit_status, f"{error}\n")
        open_log("json")
        log.error("%s", error)
        parser.exit(error.exit_status)


def argument_parser() -> argparse.ArgumentParser:
    width = max(len(variable.name) for variable in VARIABLES)
    rows = [f"  {v.name:<{width}}  {v.meaning} (default: {v.default})" for v in VARIABLES]
    rows.append(f"  {'HF_HOME':<{width}}  where models are kept (default: as Hugging Face's)")
    parser = argparse.ArgumentParser(
        prog="bark-worker.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Serves the Bark text-to-speech model over HTTP.",
        epilog="environment variables:\n" + "\n".join(rows))
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument("--serverless", action="store_true",
                        help="become pyworker.py, for an endpoint of Vast.ai")
    return parser


def become_pyworker() -> int:
    """Replaces this process by pyworker.py; the exit status if there is none.

    Templates that were made when --serverless was the worker's own still start it so.
    """
    if not PYWORKER.is_file():
        print(f"--serverless starts {PYWORKER}, which is missing; put it there, of the release that"
              f" this is, {VERSION}, or take an image that has it", file=sys.stderr)
        return 2
    options = sys.orig_argv[1:-len(sys.argv)]  # the interpreter's, such as -u
    os.execv(sys.executable, [sys.executable, *options, str(PYWORKER)])


if __name__ == "__main__":  # before all else, torch's import above all: it takes seconds
    for ending in (signal.SIGTERM, signal.SIGINT):  # process 1 of a container would not hear them
        signal.signal(ending, lambda number, _: os._exit(
            0 if number == signal.SIGTERM else 128 + number))
    open_log(read_settings(sys.argv[1:]).log_format)


# -----------------------------------------------------------------------------
# Signs: letters, blanks, and how long they take to say
#
# What a text is made of: what makes a sound, what separates words, what is neither seen nor heard.
# How long a text takes to say follows from its letters' scripts alone.

# Without width and without sound: soft hyphen, joiners, direction marks, byte order mark, lone
# surrogates. BERT's tokenizer, which Bark uses, drops them too.
SILENT = r"\xad\u061c\u180e\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
BLANK = r"\s\x00-\x1f\x7f-\x9f\u200b"  # control characters and the zero-width space separate words
SILENT_RE = re.compile(f"[{SILENT}]+")
BLANK_RE = re.compile(f"[{BLANK}]+")
GAP_RE, GAPS_RE = re.compile(f"[{BLANK}{SILENT}]"), re.compile(f"[{BLANK}{SILENT}]*")
SPEAKABLE_RE = re.compile(r"[^\W_]|[♩-♬]")  # Bark sings what stands between ♪
# Characters a second. 150 words a minute of English with its blanks are 15; blanks are free here,
# so that an estimate is a plain sum, and the rest pays for them. Others follow the syllable rates
# of Pellegrino et al., "A cross-language perspective on speech information rate" (2011), Mandarin
# 5.2/s and Japanese 7.8/s, less the pauses; an Indic syllable is written with about two signs.
LETTER_RATE, DIGIT_RATE, SYMBOL_RATE = 12.5, 2.5, 2.5  # "7" is a word, and so are "%" and "€"
INDIC = "DEVANAGARI BENGALI GURMUKHI GUJARATI ORIYA TAMIL TELUGU KANNADA MALAYALAM SINHALA THAI"
SCRIPT_RATE = {"CJK": 4.5, "HIRAGANA": 7.0, "KATAKANA": 7.0, "HANGUL": 5.0, "ETHIOPIC": 6.0}
SCRIPT_RATE |= dict.fromkeys(INDIC.split(), 11.0)


def normalize_text(text: str) -> str:
    """What the tokenizer gets: NFC, single blanks, nothing invisible."""
    visible = SILENT_RE.sub("", text)
    return unicodedata.normalize("NFC", BLANK_RE.sub(" ", visible)).strip()


def is_speakable(text: str) -> bool:
    """True where the text has a letter, a digit or a note; False for `***`, emoji, dots."""
    return SPEAKABLE_RE.search(text) is not None


@lru_cache(maxsize=4096)
def speech_millis(char: str) -> int:
    category, name = unicodedata.category(char), unicodedata.name(char, "")
    script = name.removeprefix("HALFWIDTH ").partition(" ")[0]
    if category[0] in "ZC" or script in ("COMBINING", "VARIATION"):
        return 0
    if category[0] == "N":
        rate = DIGIT_RATE
    elif category == "Sc" or char in "%&@":
        rate = SYMBOL_RATE
    else:
        rate = SCRIPT_RATE.get(script.partition("-")[0], LETTER_RATE)
    return round(1000 / rate)


def estimate_seconds(text: str) -> float:
    """Seconds of speech at an ordinary pace, from the scripts the text is written in."""
    return sum(map(speech_millis, text)) / 1000


def trim_blanks(text: str, start: int, end: int) -> tuple[int, int]:
    start = GAPS_RE.match(text, start, end).end()
    while start < end and GAP_RE.match(text, end - 1):
        end -= 1
    return start, end


# -----------------------------------------------------------------------------
# Layout: paragraphs and lines, as a page shows them
#
# A blank line parts paragraphs. The lines of one may be prose that was wrapped to a width, and then
# their ends are blanks; or the lines of a list or a verse, and then each is heard to end. Which of
# them it is, the lines' lengths and first letters tell.

STOPS, CLOSING_QUOTES, NO_LETTERS = ".!?…", "\"'”’»›“‘«‹)]}", " \t\r\n—–-\"'“”«»‹›()[]„‚‘’¿¡*_"
# Layout. In columns: prose is not wrapped closer, and few lines of verse are wider.
MIN_WRAP, SURE_WRAP = 36, 60
WIDE = "\u2e80"  # from here on
ITEM_RE = re.compile(r"(?:[-*+•◦▪‣·–—]|\(?(?:\d{1,3}|[A-Za-z])[.)]|#{1,6})\s")
HYPHEN_RE = re.compile(r"(?<=[^\W\d_])[-\u2010]$")
COMPOUND_RE = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
RUNNING_ON_RE = re.compile(r"[,;—–、，；]$")
CONJUNCTIONS = {  # a comma is often missing before them
    "en": " and or but because while which that when where if so then than who with ",
    "de": " und oder aber weil dass denn sondern wenn als ob ",
    "es": " y e o u pero porque que cuando si donde con ",
    "fr": " et ou mais parce que qui car quand si où donc avec ",
    "it": " e o ma perché che quando se dove con ",
    "pt": " e ou mas porque que quando se onde com ",
    "pl": " i a ale oraz lub bo że który która które gdy ",
    "ru": " и а но или что потому когда если который которая которые чтобы ",
    "tr": " ve veya ama fakat çünkü ki ile ",
    "hi": " और लेकिन या कि क्योंकि जो जब तो ",
    "ko": " 그리고 그러나 하지만 그래서 ",
}


def paragraphs(text: str) -> Iterator[tuple[int, int]]:
    start, pos = -1, 0
    for line in [*text.splitlines(keepends=True), ""]:
        if is_speakable(line):
            start = pos if start < 0 else start
        elif start >= 0:
            yield trim_blanks(text, start, pos)
            start = -1
        pos += len(line)


class LineEnd(NamedTuple):
    """Where a line ends within a paragraph: `text[start:end]`, its hyphen and blanks, and what is
    spoken there: " " where prose goes on, "-" or "" within a word, else a mark if it has none.
    """

    start: int
    end: int
    spoken: str


class Block:
    """Lines that belong together: an item of a list, or all that stand between items."""

    def __init__(self, text: str, spans: list[tuple[int, int]]):
        self.text, self.spans = text, spans
        self.lines = [text[low:high] for low, high in spans]
        self.pairs = list(itertools.pairwise(self.lines))
        self.width = max(map(width_of, self.lines))
        self.is_item = ITEM_RE.match(self.lines[0]) is not None

    def is_wrapped(self, measure: int = 0) -> bool:
        """Whether this is prose: its lines, but for the last, are as full as their words allow, by
        its own width or by `measure`, the width of the text's other paragraphs.
        """
        if any(HYPHEN_RE.search(line) and after[0].islower() for line, after in self.pairs):
            return True
        if self.width < MIN_WRAP or not self.pairs:
            return False
        if self.width <= measure and self._is_full(measure):
            return True
        flowing = sum(after[0].isalpha() and not after[0].isupper() for _, after in self.pairs)
        if len(self.pairs) == 1:
            sure = not flowing or self.lines[0][0].islower()
            return self.width >= (SURE_WRAP if sure else MIN_WRAP) and self._is_full(self.width)
        if self._is_full(self.width) and (flowing or self.width >= SURE_WRAP):
            return True
        return 4 * flowing >= len(self.pairs) and self._is_full(0.85 * self.width)

    def _is_full(self, width: float) -> bool:
        """Whether most lines reach that far, but for a heading and the ends of paragraphs."""
        reaches = [reach(line, after) for index, (line, after) in enumerate(self.pairs)
                   if (index and line[-1] not in STOPS) or reach(line, after) > 0.7 * width]
        return sum(each > width for each in reaches) >= max(1, 0.8 * len(reaches))

    def ends(self, measure: int, following: int | None) -> Iterator[LineEnd]:
        """The ends of its lines; of the last one too if the paragraph goes on at `following`."""
        prose = self.is_wrapped(measure)
        verse = self._is_verse()
        for (line, after), (_, end), (start, _) in zip(
                self.pairs, self.spans, self.spans[1:], strict=False):
            if after[0].isalpha() and HYPHEN_RE.search(line):
                yield LineEnd(end - 1, start, "-")
            elif "\xad" in self.text[end:start]:
                yield LineEnd(end, start, "")
            elif self._goes_on(line, after, prose):
                yield LineEnd(end, start, " ")
            else:
                yield LineEnd(end, start, closing_mark(line, verse))
        if following is not None:
            yield LineEnd(self.spans[-1][1], following, closing_mark(self.lines[-1], False))

    def _is_verse(self) -> bool:
        """Whether commas fit its lines' ends: some have one, or all are phrases of like length."""
        if self.is_item or any(map(RUNNING_ON_RE.search, self.lines[:-1])):
            return not self.is_item
        phrases = sum(len(line.split()) for line in self.lines) >= 3 * len(self.lines)
        return phrases and min(map(width_of, self.lines)) >= 0.6 * self.width

    def _goes_on(self, line: str, after: str, prose: bool) -> bool:
        """Whether the next line's words belong to this one's."""
        if prose:  # but for a heading, or the last line of a speech
            return not after[0].isupper() or reach(line, after) > 0.7 * self.width
        if not after[0].islower():
            return False
        if self.is_item:
            return True
        return not self.lines[0][0].islower() and len(line.split()) > 3


def width_of(line: str) -> int:
    """In columns: Chinese characters take two."""
    return len(line) + (0 if line.isascii() else sum(char >= WIDE for char in line))


def reach(line: str, after: str) -> int:
    """Where the first word of the next line would have ended in this one."""
    word = after[0] if after[0] >= WIDE else after[:40].split(maxsplit=1)[0]
    return width_of(line) + 1 + width_of(word)


def closing_mark(line: str, verse: bool) -> str:
    """What makes a line's end heard: nothing but a blank if it ends with a sign of its own."""
    last = line.rstrip("\"'”’»›“‘)*_`")[-1:]
    if not last.isalnum():
        return " "
    if last >= WIDE and not "가" <= last <= "힣":
        return "，" if verse else "。"
    return ", " if verse else ". "


def blocks_of(text: str, start: int, end: int) -> list[Block]:
    """The paragraph `text[start:end]` as blocks: each item of a list starts one."""
    blocks: list[list[tuple[int, int]]] = []
    pos, lines = start, text[start:end].splitlines(keepends=True)
    for line in lines if len(lines) > 1 else ():
        low, high = trim_blanks(text, pos, pos + len(line))
        pos += len(line)
        if not blocks or ITEM_RE.match(text, low):
            blocks.append([])
        blocks[-1].append((low, high))
    return [Block(text, spans) for spans in blocks if len(blocks) > 1 or len(spans) > 1]


@lru_cache(maxsize=4)  # reading asks for it, and cutting again
def laid_out(text: str) -> list[tuple[int, int, list[LineEnd]]]:
    """Each paragraph's start and end, and the ends of its lines but the last."""
    laid = [(start, end, blocks_of(text, start, end)) for start, end in paragraphs(text)]
    measure = max((block.width for _, _, blocks in laid for block in blocks
                   if len(block.pairs) > 1 and block.is_wrapped()), default=0)
    found = []
    for start, end, blocks in laid:
        following = [block.spans[0][0] for block in blocks[1:]]
        found.append((start, end, [line for block, pos in itertools.zip_longest(blocks, following)
                                   for line in block.ends(measure, pos)]))
    return found


class Hyphens:
    """Tells whether a word that is hyphenated over a line's end is one word."""

    def __init__(self, text: str, language: str):
        self.written = set(COMPOUND_RE.findall(text.lower()))
        self.others = CONJUNCTIONS.get(language, "").split()
        self.dictionary = dictionary(language)

    def between(self, left: str, right: str) -> str:
        """What stands between the parts: nothing; a hyphen, as between two words where the whole is
        none; a blank too, as in `Ein- und Ausgang`.
        """
        left, right = left.lower(), right.lower()
        if right in self.others:
            return "- "
        if "-" in left or f"{left}-{right}" in self.written:
            return "-"
        if left + right in self.written or left + right in self.dictionary:
            return ""
        return "-" if left in self.dictionary and right in self.dictionary else ""


@lru_cache
def dictionary(language: str) -> frozenset[str]:
    """A language's words in small letters; none where pyspellchecker has no list."""
    from spellchecker import SpellChecker

    if language not in SpellChecker.languages():
        return frozenset()
    return frozenset(SpellChecker(language=language).word_frequency.words())


def spoken_line_ends(text: str, language: str) -> Iterator[LineEnd]:
    """The ends of lines that are no more than that, as they are to stand in what is cut and spoken.

    Prose goes on after a blank; what is heard to end gets its mark, and keeps its line.
    """
    hyphens = None
    for end in (end for _, _, ends in laid_out(text) for end in ends):
        if end.spoken == "-" and text[end.end].islower():
            hyphens = hyphens or Hyphens(text, language)
            left = COMPOUND_RE.findall(text, max(0, end.start - 40), end.start)
            right = COMPOUND_RE.match(text, end.end)
            mark = hyphens.between(left[-1] if left else "", right[0] if right else "")
            yield end._replace(spoken=mark)
        elif end.spoken != " ":
            yield end._replace(spoken=end.spoken.replace(" ", "\n"))
        elif text[end.start - 1].isalnum():
            yield end


# -----------------------------------------------------------------------------
# Stops: where a sentence ends, and where a full stop is an abbreviation's
#
# sentencex proposes ends in all of Bark's languages; what it misses is decided here: abbreviations,
# units, ordinals and initials by lists and rules, small letters, missing blanks, quotations.

CUE_RE = re.compile(r"\[[^\[\]]{1,60}\]")
# Full stops, by language. Abbreviations are abbr2words', and such as these give beside them:
#   de Duden, "Abkürzungen"; en Chicago Manual of Style, ch. 10; es RAE, Ortografía, app. 1;
#   fr Imprimerie nationale, Lexique; hi Central Hindi Directorate, Manak Hindi Vartani;
#   it Treccani, "Abbreviazioni"; pl PWN, Wielki słownik ortograficzny; pt ABL, "Reduções";
#   ru GOST R 7.0.12-2011; tr TDK, "Kısaltmalar Dizini". "" has titles that all of them meet.
# What has no vowel (św., pkt.) needs no entry, nor has a single letter.
ABBREVIATIONS = {
    "": "adm capt co col corp gen gov hon inc maj mlle mlles mme mmes prof rev sen",
    "de": "abzgl allg amtl anh anl anm aufl ausg ausschl bayer bearb beil bes betr bez bezgl"
          " bibl ders dipl ebd ehem eigtl einf einl einschl engl entspr etw europ evang forts"
          " franz fähnr gebr gegr ges gest gez griech hebr hist ing inh insp inst ital jahrh"
          " jap jew jährl kath korp kto lat leutn mag milit mind mitgl nachf nachm niederl"
          " näml nördl oblt orig phil poln port preuß priv.-doz proc prot präs red reg rumän"
          " russ röm schwed schweiz sekr sog span stellv stud städt suppl sächs südl techn"
          " tschech tägl türk ugs ungar urspr verf vergl verh verl verm vermutl verz vorm vors"
          " wachtm weibl westl wiss ziff zirka zit zus österr östl übers",
    "en": "abbr acad acct addl adj admin advt ala alas alt amer anon appt ariz ark asst"
          " astron atty aux avg bibl biog biol bur cal calif cert chem circ cit colo comdr"
          " comm commr comp conf cong conj conn cont contd conv corr cu del dia diam dict dir"
          " dist distr div doz ed edn educ elev encl encyc eng enl equiv esp etym exc excl"
          " fasc fem fla fol freq geog geol ger harb heb hist hwy illus ind inst instr intl"
          " intro inv jour kans lat lieut mass mech mich minn mont natl naut neb nev obs occas"
          " okla ont opp ore org orig penn pharm philos phys poss pred pres presb prob proc"
          " pron prov pseud publ qty que quot rec recd reg repr req resp rte sask ser subj"
          " suppl supt surg tenn terr tex theol trans treas univ usu vocab vols wash wis wyo",
    "es": "admón almte alte arts bibl brig cit cmdte cnel comis comte conc coord cor cód dep"
          " depto dicc dipt dpto dña edif edit eds excl excma fasc figs fol gdor gob hab ibíd"
          " ilma ilmo ilustr impr inst izq loc ltda lám mons mtra nro ntra oblig op orig pbro"
          " pdta pdte pje pral prov pról pta párr rdo ref resp rvdo sdad secr sgto sig sigs"
          " soc sres supl tab teléf tfno trad tte tít univ vid vols",
    "fr": "adj admin adv alin all amb ambass anc angl append approx arr augm auj bibl bull"
          " bât c.-à-d cap cie cit coll commiss compl dir doct dép dépt esp fasc fém gouv"
          " gramm gén géogr géol hist illustr impr insp introd ital lat lieut litt loc maréch"
          " masc me moy numér op paragr plur pref proc pron prov préf prép prés resp réf réfs"
          " résid rééd secr sect serg sous-lieut ste stes sté subst sup suppl syn sén tabl"
          " trad univ égl",
    "hi": "कु पं प्रो श्री श्रीमती सं सुश्री",
    "it": "amb amm arciv ass bibl brig capp card circ cit com comand comm cons dep dip dir"
          " fratt fraz ist loc mons num op parr pref proc prov rett scal segr serg sez sind"
          " tab tav ten trad uff univ vesc voll",
    "pl": "abp adw afr akad amer ang arch art artyst asp aspir astr asyst austr bibl biol"
          " biskup bryg bryt centr chem chir chiń cyt czes dekl demokr diec doc dosł dot dow"
          " duszp dypl dyr dyw egz ekol ekon elektr ew fab farm fiz fot franc gastr geogr geol"
          " gimn gosp gram grec gub górn głęb hab hist hiszp im insp inst jedn kanc kard katol"
          " kier klas kol koresp kryt książ kult kwart lekt lic maks marsz mec med mies min"
          " nadinsp nadkom najśw niem nieof obec obyw odc oddz ok oprac org orygin os osob"
          " pers plut podkom pol poprz por pow poz poł prał prez prezyd proc prok przen przew"
          " przeł przym przyp psych publ red rejon reż rodz roln ros rozdz ryc rys sekr sierż"
          " społ spółdz stac stow sygn szer szwajc tab tabl techn tel temp tow tyg tys tłum ub"
          " uczn ukr uniw ur urodz ust wen woj współcz wyd wyst właśc zach zag zagr zakł zam"
          " zarz zast zaw zazw zał zewn ćwicz łac środk żarg",
    "pt": "alm ampl and apto aum brig cel com coord dep dept depto des edit eds emb esc esq"
          " estr exa exma fasc gráf hab ibid ilma ilmo ilustr impr introd loc mons máx méd mín"
          " núm op org parág pe pref pres proc prom ref rod sec sta supl séc sécs tab telef"
          " ten trad tte univ vols",
    "ru": "авг адм адмир англ апр арх архиеп архит асс библиогр биогр биол букв бульв вост"
          " вып ген геогр геол гор греч губерн дек дер диак дир докт доп европ еп журн зав заг"
          " зам засл знач игум изд инд инж исп испр итал каб кав канд кап капит каф колич комн"
          " корп корр лаб лат лейт литер макс маш мес митр моск муз наб назв наим науч нач нем"
          " ноя нояб обр общ оз окр окт опубл орг осн отв отд офиц пед перев перераб перс"
          " подполк полк полков польск пос поч предисл през преп прибл прил прим проток псевд"
          " публ разг ред редкол реж респ рус свящ сев секр сен сент серж совр сокр соотв сост"
          " соч спец студ техн тов туп укр унив упр уч фак фам февр физ филос франц хим худ"
          " церк чел экз эл энц юр яз янв",
    "tr": "alm amir ank apt ar arş asb asis asist astsb av ağu başb başk böl coğ doç ecz ed"
          " eki ekon ens erm eyl eğt fak far fel fiz gnkur gör hem huk isp İkt İlç İng İsp İst"
          " İt jap jeol karş kas korg kur lab lat mad mah mat mim muh müd müf müh müt nis oca"
          " onb opr ord org orgen paz red rum rus sad sağ tekn tel tem tic tuğg tümg uzm vek"
          " yard yayl yb yrd yun yzb yük örn öğr öğrt üni üniv ütğm şek şti şub",
    "ja": "", "ko": "", "zh": "",
}
# Abbreviations before a number alone, as they are words too.
EVERYDAY = {
    "de": "Art an art di do ist mag mi mo nov red sa so um zu übers",
    "en": "No alas am app ark art cal chap con del ex fig figs gal ill in is mar mass max may"
          " me min miss no ore par para pen pro que ref sat sec sect so sun temp us wash",
    "es": "art con da dan des en era mar no san se si sur ten",
    "fr": "art cap dim ex jeu mar me mer par pas prés sam sec sept vol",
    "it": "da di dir in lui ma mar no re si ven via",
    "pl": "in maj on sen tam ten to",
    "pt": "and com dez ex faz mar out set sex ter",
    "ru": "газ и к о пир род след у ум час",
    "tr": "ar av bul böl dan eki ens far gör hem kas kim kur mat mim ok op org rum rus sağ"
          " tar tel yun yük",
}
# Titles, and what points at a name: no sentence ends before it, even if it is "La" or "Der".
LEADING = (
    " Mr Mrs Ms Mx Dr Drs Prof M MM Mme Mmes Mlle Mgr Me Sr Sra Srta Sres Sras D Dña Dra Sto Sta"
    " Sig sig Sigg Dott dott Hr Hrn Frl e.g i.e cf cfr viz vgl z.B d.h np tj tzn tzw zob por"
    " см ср напр т.е т.к c.-à-d p.ej ej p.ex v.g es p.es bkz Bkz krş örn Örn ул пл им ul al pl "
)
# What often closes a sentence, and does before a capital; so do units after a number.
TRAILING = {
    "de": "etc usw u.s.w usf ff v.Chr n.Chr Chr",
    "en": "etc al a.m p.m A.M P.M B.C A.D B.C.E C.E Ph.D M.D M.A B.A",
    "es": "etc a.C d.C a.m p.m",
    "fr": "etc J.-C",
    "it": "ecc etc a.C d.C",
    "pl": "itd itp n.e p.n.e",
    "pt": "etc a.C d.C",
    "ru": "т.д т.п др н.э",
    "tr": "vb vs",
}
UNITS = (
    " km kg g cm mm m l ml h s min sec sek seg hr hrs lb lbs oz ft in yd yds mi gal qt pt tsp tbsp"
    " yr yrs mo wk pp hab std zł gr руб коп кг км м см мин сек ч dk sa sn "
)
# Words that open a sentence and are no names.
OPENING = {
    "de": "der die das den dem des ein eine einen einem einer es er sie wir ihr ich du man"
          " mein sein unser dieser diese dieses dann da dort hier nun jetzt und aber oder doch"
          " denn wenn als weil dass ob wie was wer wo warum nach vor bei mit in im am an auf"
          " aus für von zu zum nicht kein keine niemand alle alles viele auch noch so später"
          " heute morgen bitte etwas ja nein",
    "en": "the a an this that these those it he she they we you i his her its their our my"
          " your there here then when while where what who why how if but and or so yet nor as"
          " at in on for from to with by after before once now not no all some many most each"
          " every both one two however later today meanwhile perhaps maybe please let do does"
          " did is are was were can could will would should have has had nobody everyone"
          " nothing everything someone him me us them too yes",
    "es": "el la los las lo un una unos unas él ella ellos ellas yo tú usted nosotros este"
          " esta esto ese esa eso aquel su sus mi mis tu y o pero porque que cuando si donde"
          " como con sin en de del a al por para desde entonces luego después antes ahora hoy"
          " ayer no ni nadie nada todo todos también ya quizás hay es era fue sí",
    "fr": "le la les l un une des du de d il elle on nous vous ils elles je j tu ce c cela"
          " cette ces cet son sa ses mon ma mes leur leurs notre votre et ou mais car donc or"
          " ni que qu qui quand lorsque si comme où avec sans dans en à au aux par pour sur"
          " sous depuis puis alors ensuite après avant maintenant ici là personne rien tout"
          " tous ne aussi oui non",
    "it": "il lo la i gli le l un uno una lui lei loro io tu noi voi egli essa questo questa"
          " questi queste quello quella ciò suo sua mio mia e ed o ma perché che quando se"
          " dove come con senza in nel nella di del della da dal a al alla per su poi allora"
          " dopo prima ora oggi ieri non né nessuno niente tutto tutti anche già forse è era"
          " fu mi ti si ci vi sì no",
    "pl": "i a ale oraz lub albo bo że który która które gdy kiedy jeśli jak on ona ono oni"
          " one ja ty my wy to ten ta te tam tu teraz potem wtedy jego jej ich mój moja nasz"
          " nie nikt nic wszyscy wszystko każdy też już może czy co kto gdzie dlaczego w we z"
          " ze na do po przed przy od dla o u był była było jest są zaraz tak",
    "pt": "o a os as um uma ele ela eles elas eu tu você nós isto isso este esta esse essa"
          " aquele seu sua meu minha e ou mas porque que quando se onde como com sem em no na"
          " nos nas de do da dos das por para desde então depois antes agora hoje ontem não"
          " nem ninguém nada tudo todos também já talvez é era foi há sim",
    "ru": "и а но или что потому когда если как он оно она они я ты мы вы это этот эта эти"
          " тот та те там тут здесь теперь потом тогда затем его её их мой моя наш не ни никто"
          " ничего все всё каждый тоже уже может где кто почему в во с со на до по перед при"
          " от для об о за из к был была было есть нет у да",
    "tr": "ve veya ama fakat çünkü ki o bu şu ben sen biz siz onlar bunlar bir her hiç ne"
          " nasıl neden niçin nerede kim sonra önce şimdi bugün dün yarın daha çok en da de"
          " ile için gibi kadar ise eğer onun bunun benim senin bizim sizin onu bunu beni seni"
          " bana sana ona var yok hepsi herkes kimse hayır evet",
}
ORDINALS = ("de", "tr")  # "3." is the third, and nouns or names follow it
CONSONANTS = set("bcdfghjklmnpqrstvwxzłßбвгджзклмнпрстфхцчшщ")
LETTER_RE = re.compile(r"[^\W\d_]")
LAST_WORD_RE = re.compile(
    r"(?<![^\s\"'“”«»‹›()\[\]„‚‘¿¡/—–])(?P<whole>(?:[^\W\d_]{1,5}\.-?\s?)*"
    r"(?P<last>[^\W\d_][^\s\d\"“”«»()\[\]¿¡/—–.,;:!?…]*))\.$")
NEXT_WORD_RE = re.compile(rf"[{re.escape(NO_LETTERS)}]*\w[^\W_]*")
EXAMPLE_RE = re.compile(r"\b(?:par |por |per |p\. ?)e[jsx]\.$")
ELISION_RE = re.compile(r"^\w{1,6}['’](?=\w)")  # l'art., dell'avv.
NUMBER_RE = re.compile(r"(?:\d|\b[IVXLC]+)\s?$")
ORDINAL_RE = re.compile(r"(?<![\w.,:])\d{1,2}\.$")
LABEL_RE = re.compile(r"(?:\A|\n)[^\S\n]*(?:\d{1,3}|[^\W\d_]|[ivxIVX]{1,5})\.$")  # of a list's item
CAMEL_RE = re.compile(r"[a-z]{1,2}[A-Z]")  # iPhone, eBay
PLAIN_STOP_RE = re.compile(r"[^\W\d_](?:\.|[!?]+)$")
UNFINISHED_RE = re.compile(r"(?:\.\.|…|[\"'”’»“‹‘«])$")  # by a small letter
CONTINUED_RE = re.compile(rf"\b(?:\w{{1,3}}|\d+)\.$|{UNFINISHED_RE.pattern}")
STOP_RE = re.compile(rf"[.!?…][{re.escape(CLOSING_QUOTES)}]*[{BLANK}{SILENT}]+")
CLOSING_QUOTES_RE = re.compile(rf"[{re.escape(CLOSING_QUOTES)}]+[{BLANK}{SILENT}]+")
OPENING_QUOTES_RE = re.compile(rf"[{BLANK}{SILENT}](?P<marks>[\"'“„‚‘«»‹›]+)\Z")
GLUED_RE = re.compile(
    r"(?<=[^\W\d_])(?P<stop>[.!?…]+)[\"”’»]?(?P<after>[^\W\d_]+)(?![\w(/@\\=]|\.\w)")
# One of a pair, so that an unclosed mark costs no second look.
QUOTED_RE = re.compile("|".join((
    r'"[^"]*"', "“[^“”]*”", "„[^„“”]*[“”]", "«[^«»]*»", "»[^«»]*«", "‹[^‹›]*›", "›[^‹›]*‹",
    "「[^「」]*」", r"\([^()]*\)", r"\[[^\[\]]*\]")))
CLOSING_RE = re.compile(rf"[!?;:,.%)\]}}»›\"']+(?:[{BLANK}]|$)|[」』）】》〉。、，！？；：…”’]")
FULL_STOPS = "。！？…।॥"  # end a sentence without a blank after them


@lru_cache(maxsize=4096)
def base_letters(word: str) -> str:
    """The word without its accents and hyphens."""
    return "".join(unicodedata.normalize("NFD", char)[0] for char in word if char != "-")


class Stops:
    """Tells in one language whether a full stop is an abbreviation's or a sentence's."""

    def __init__(self, language: str):
        from abbr2words import get_expander, supported_languages

        language = language if language in ABBREVIATIONS else "en"
        self.has_ordinals = language in ORDINALS
        self.everyday, self.opening, self.trailing = (
            set(words.get(language, "").split()) for words in (EVERYDAY, OPENING, TRAILING))
        known = f"{ABBREVIATIONS['']} {ABBREVIATIONS[language]}".split()
        if language in supported_languages():
            entries = get_expander(language).get_abbreviations_list()
            known += [entry[:-1] for entry in entries
                      if entry.endswith(".") and not re.fullmatch("[A-Z]{2,}.", entry)]  # NE.
        self.known = {"".join(entry.lower().split()) for entry in [*known, *self.trailing]}

    def go_on(self, before: str, after: str) -> bool:
        """Whether a sentence goes on from `before`, which ends with a stop, to `after`."""
        if LABEL_RE.search(before):
            return True
        following = next_word(after)
        if self.has_ordinals and ORDINAL_RE.search(before):
            return following[:1].isalpha() and not self.opens(following)
        word = LAST_WORD_RE.search(before)
        if not word or not following:
            return False
        whole, last = "".join(word["whole"].split()), ELISION_RE.sub("", word["last"])
        known = self._is_known(whole, last) or (len(last) == 1 and after[1:2] == ".")  # a. m.
        if EXAMPLE_RE.search(before):
            return True
        if following[0].isdigit() and whole not in self.trailing:
            return known or last.lower() in self.everyday or self._is_short(last)
        if following[0].islower() and not CAMEL_RE.match(following):
            return known
        if self._may_close(whole, last, before[: word.start()]):
            return False
        leads = f" {whole} " in LEADING or f" {last} " in LEADING
        return known and (leads or not self.opens(following))

    def opens(self, word: str) -> bool:
        """Whether a sentence rather than a name starts with the word. "A" may be either."""
        return len(word) > 1 and word.lower() in self.opening

    def closes(self, before: str) -> bool:
        """Whether a sentence may well end with the one word before the stop: etc., 10 min."""
        word = LAST_WORD_RE.search(before)
        return word is not None and "." not in word["whole"] and self._may_close(
            word["last"], word["last"], before[: word.start()])

    def may_shorten(self, before: str) -> bool:
        """Whether the word before the stop is everyday's, but an abbreviation as well."""
        word = LAST_WORD_RE.search(before)
        return word is not None and word["last"].lower() in self.everyday

    def _may_close(self, whole: str, last: str, before: str) -> bool:
        if f" {last.lower()} " in UNITS and NUMBER_RE.search(before):
            return True
        return whole in self.trailing or last in self.trailing

    def _is_known(self, whole: str, last: str) -> bool:
        if len(last) == 1 and "." not in whole:
            return last.isupper() or last in CONSONANTS
        if not last.isupper() and all(char in CONSONANTS for char in base_letters(last.lower())):
            return True
        if "." in whole and all(len(part) == 1 for part in re.split(r"\.-?", whole)):  # a.k.a.
            return True
        return any(word.lower() in self.known and word not in self.everyday
                   for word in (whole, last))

    def _is_short(self, word: str) -> bool:
        return len(word) <= 3 and not word.isupper() and word.lower() not in self.opening


@lru_cache
def stops_of(language: str) -> Stops:
    return Stops(language)


def next_word(after: str) -> str:
    match = NEXT_WORD_RE.match(after)
    return match[0].lstrip(NO_LETTERS) if match else ""


class Sentences:
    """Where the sentences of `text[start:end]` start, but the first: `ends`.

    sentencex proposes them; beside it stands every stop before a blank, or before a capital where
    a blank is missing. `inner` are those within a quotation or brackets.
    """

    def __init__(self, text: str, start: int, end: int, language: str):
        self.text, self.start, self.end, self.language = text, start, end, language
        self.stops = stops_of(language)
        proposed = {self._beside_quotes(pos) for pos in self._proposed()}
        glued = set(self._glued())
        places = proposed | glued | {match.end() for match in STOP_RE.finditer(text, start, end)}
        places = sorted(pos for pos in places if start < pos < end)
        self.around = {pos: self._around(pos) for pos in places}
        self.gone_on = {pos for pos in places if self.stops.go_on(*self.around[pos])}
        self.small = self._is_small(places)
        found = [pos for pos in places if pos in glued or self._is_end(pos)]
        self.inner = self._enclosed(found) - proposed
        self.ends = [pos for pos in found if pos in proposed or pos in glued
                     or (pos not in self.inner and self._is_plain(pos))]

    def _proposed(self) -> list[int]:
        from sentencex import get_sentence_boundaries

        # sentencex takes square time in some input (unclosed quotes), so it sees 2000 characters
        # at a time, each time from the last end that it found.
        ends, block, step = [], self.start, 2000
        while block < self.end:
            masked = GAP_RE.sub(" ", self.text[block : min(block + step, self.end)])
            masked = CUE_RE.sub(lambda cue: f"[{'x' * (len(cue[0]) - 2)}]", masked)
            found = get_sentence_boundaries(self.language, masked)[1:]
            ends += [block + sentence["start_index"] for sentence in found]
            far = found and ends[-1] > block + step // 4 and block + step < self.end
            block = ends[-1] if far else block + step
        return ends

    def _beside_quotes(self, pos: int) -> int:
        """Where sentencex took a closing mark for an opening one, `›No.‹ He`, or the reverse."""
        marks = CLOSING_QUOTES_RE.match(self.text, pos, self.end)
        if marks and self.text[pos - 1] in STOPS:
            return marks.end()
        opened = OPENING_QUOTES_RE.search(self.text, max(self.start, pos - 4), pos)
        return opened.start("marks") if opened else pos

    def _glued(self) -> Iterator[int]:
        """Where a blank is missing: in `years ago!Come in`, not in Node.js, U.S.A., a link."""
        for match in GLUED_RE.finditer(self.text, self.start, self.end):
            before = self.text[max(self.start, match.start() - 40) : match.start()].split()[-1]
            before, after = before.lstrip(NO_LETTERS), match["after"]
            if not (before.isalpha() and len(before) > 1 and before[-1].islower()):
                continue
            named = before[0].isupper() and match["stop"] == "."  # Array.Sort, perhaps
            if after.istitle() and (self.stops.opens(after) or not named):
                yield match.start("after")

    def _enclosed(self, places: list[int]) -> set[int]:
        spans = [match.span() for match in QUOTED_RE.finditer(self.text, self.start, self.end)]
        return {pos for low, high in spans
                for pos in places[bisect_right(places, low) : bisect_left(places, high)]}

    def _is_small(self, places: Iterable[int]) -> bool:
        """Whether the paragraph's sentences start with small letters."""
        first = LETTER_RE.search(self.text, self.start, self.end)
        votes = 1 if first and first[0].islower() else -1
        for pos in places:
            before, after = self.around[pos]
            if after[0].islower() and PLAIN_STOP_RE.search(before) and not CAMEL_RE.match(after):
                votes += pos not in self.gone_on
            elif after[0].isupper():
                votes -= 1
        return votes > 0

    def _around(self, right: int) -> tuple[str, str]:
        left = trim_blanks(self.text, self.start, right)[1]
        return self.text[max(self.start, left - 32) : left], self.text[right : right + 32]

    def _is_end(self, right: int) -> bool:
        """What sentencex misses: abbreviations, small letters after "3." or "»", closing marks."""
        before, after = self.around[right]
        if not before or CLOSING_RE.match(after):
            return False
        if (after[0].isalnum() or after[0] == "-") and not GAP_RE.match(self.text, right - 1):
            return before[-1] in FULL_STOPS  # not in 3.5, J.-C., but in 「…。」と
        if right in self.gone_on:
            return False
        follows = after.lstrip("—–- ")
        if not follows[:1].islower() or CAMEL_RE.match(follows):
            return True
        if after[0] in "—–-":
            return False
        if self.small:
            return not UNFINISHED_RE.search(before)
        return not (CONTINUED_RE.search(before) or self.stops.may_shorten(before))

    def _is_plain(self, right: int) -> bool:
        """Whether a sentence ends even where sentencex sees an abbreviation or a quotation."""
        before, after = self.around[right]
        word = next_word(after)
        if not word[:1].isupper():
            return self.small and word[:1].islower()
        stop = before.rstrip(CLOSING_QUOTES)
        if stop != before and after[0] not in "([" and not stop.endswith(("..", "…")):
            return not self.stops.go_on(stop, after)
        return self.stops.opens(word) or self.stops.closes(before)


# -----------------------------------------------------------------------------
# Text: where a text is cut, so that each piece fits one generation
#
# A segment ends with a sentence where that is possible, else at the best clause boundary in reach;
# each place to cut has a cost, and the cheapest sum of cost and unevenness wins. Paragraphs stay
# apart. What is spoken and what of it is left out is not decided here, but in the sections on
# reading.

SENTENCE_PAUSE, PARAGRAPH_PAUSE, CLAUSE_PAUSE = 0.25, 0.5, 0.1  # seconds
WITHIN_WORD, VERSE_MARKS, LINE_STOPS = ("-", ""), (", ", "，"), (". ", "。")
DASH_RE = re.compile(rf"(?:[—–]|-{{1,3}})[{BLANK}]+")
CLOSERS, OPENERS = "\"'”’»›“)]}」』）】》〉", "«‹([{¿¡„"
HAN = r"\u3005-\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
NO_LINE_START = "」』）】》〉”’。、，！？；：…—ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮー"
CUT_RE = re.compile(
    rf"{CUE_RE.pattern}"  # swallowed whole, as is "3 000", so that no cut falls inside
    r"|(?<!\d)\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3}){1,4}(?!\d)"
    rf"|(?P<gap>[{BLANK}{SILENT}]+)"
    rf"|(?![{NO_LINE_START}{BLANK}])(?:"
    r"(?P<strong>(?<=[。！？；：…])|(?<=[。！？…][」』”’])|(?<=\w—)|(?<=\w--)(?=\w))"
    rf"|(?P<comma>(?<=[、，」』）】》〉])|(?<=[”’])(?=[{HAN}ぁ-ヿ]))"
    rf"|(?P<phrase>(?<=[ぁ-ゟ])(?=[{HAN}ァ-ヺ])|(?<=[{HAN}ぁ-ヿ])(?=[「『（【《〈“]))"
    rf"|(?P<pair>(?<=[{HAN}])(?=[{HAN}ァ-ヺ])|(?<=[ァ-ヿ])(?=[{HAN}])|(?<=[ぁ-ゟ])(?=[ぁ-ゟ]))"
    r"|(?P<inside>(?<=[^\w\s])(?=[^\W_])))"
)
# How bad a cut is. A piece of no length costs up to 2 more, and so does a tiny rest (_choose_cut),
# so that no balance is worth the last two: they are for what is longer than a whole segment.
COST_INNER, COST_CLAUSE, COST_COMMA, COST_CONJUNCTION = 0.5, 1.0, 1.3, 1.8
COST_WORD, COST_PAIR = 2.5, 3.5
# A long text's first piece, in characters: speech starts in half the time. What is no longer than
# OPENING_WHOLE is not long. A model of shorter texts than that starts as soon by itself.
OPENING_CHARS, OPENING_WHOLE = (40, 90), 110
COST_GLUED, COST_INSIDE = 100.0, 200.0
UNSPACED = {"strong": COST_CLAUSE, "comma": COST_COMMA, "phrase": COST_WORD, "pair": COST_PAIR,
            "inside": COST_INSIDE}


@dataclass(frozen=True)
class SegmentLimits:
    """What one Bark generation can hold. `max_tokens` and `max_seconds` are the model's own."""

    count_tokens: Callable[[str], int]
    max_tokens: int
    max_seconds: float
    min_chars: int = 110  # what Bark speaks best at once (bark-infinity, bark-gui)
    max_chars: int = 175
    soon: bool = False  # a long text's first piece is short


@dataclass(frozen=True)
class Span:
    """One segment, `text[start:end]` in code points, and the seconds of silence after it."""

    start: int
    end: int
    pause: float


Cut = tuple[int, int, float]  # end of the left piece, start of the right one, cost (above)


def split_text(text: str, language: str, limits: SegmentLimits) -> list[Span]:
    """Cut a text into segments that each fit one generation, in order, without overlap.

    Pieces of a paragraph are merged up to `limits`, cut between sentences where that does not
    leave a tiny one, else at the best clause boundary; paragraphs stay apart. With `limits.soon`
    the first piece of a long text is a short one, so that speech starts soon.

    `language` is a voice's two letters; an unknown one is read as English. Whatever is speakable
    is in exactly one span. A line with nothing speakable ends a paragraph, as a blank one does.
    Only a single character of more than `limits.max_tokens` tokens can break a limit.
    """
    elapsed = list(itertools.accumulate(map(speech_millis, text), initial=0))
    is_long = limits.soon and len(text.strip()) > OPENING_WHOLE
    pieces: list[tuple[int, int, float]] = []
    for start, end, lines in laid_out(text):
        paragraph = Paragraph(text, start, end, language.lower(), limits, elapsed,
                              {line.end: line.spoken for line in lines})
        pieces += paragraph.pieces(opens=is_long and not pieces)
    after = [*(pause_before for _, _, pause_before in pieces[1:]), 0.0]
    return [Span(start, end, pause) for (start, end, _), pause in zip(pieces, after, strict=False)]


@dataclass(frozen=True)
class Paragraph:
    text: str
    start: int
    end: int
    language: str
    limits: SegmentLimits
    elapsed: list[int]  # elapsed[i]: milliseconds of speech in text[:i]
    lines: dict[int, str]  # where a line starts: what is spoken before it

    def pieces(self, opens: bool = False) -> Iterator[tuple[int, int, float]]:
        """Start, end and the pause before each segment, filled up to the best cut in reach.

        Where it `opens` a long text, the first one is short.
        """
        start, pause = self.start, PARAGRAPH_PAUSE
        opening = self._opening() if opens else None
        while start < self.end:
            end, resume, cost = opening or self._choose_cut(start, self._farthest(start))
            opening = None
            while (excess := self._token_excess(start, end)) > 1 and end - start > 1:
                room = max(1, int((end - start) / max(excess, 1.1)))
                end, resume, cost = self._choose_cut(start, start + room)
            left, right = trim_blanks(self.text, start, end)
            if is_speakable(self.text[left:right]):
                yield left, right, pause
                pause = 0.0
            pause = max(pause, SENTENCE_PAUSE if cost < COST_CLAUSE else CLAUSE_PAUSE)
            start = resume

    def _opening(self) -> Cut | None:
        """Where a short first piece ends: with a sentence, else at the best clause boundary."""
        farthest = self._farthest(self.start)
        reach = farthest - self.start
        share = 1.0 if reach > OPENING_WHOLE else reach / self.limits.max_chars  # less in Chinese
        low, high = (self.start + round(share * chars) for chars in OPENING_CHARS)
        first = bisect_left(self._cuts, (low,))
        last = bisect_right(self._cuts, (min(high, farthest), math.inf))
        cuts = [cut for cut in self._cuts[first:last] if self.text[cut[1]] not in CLOSERS]
        cut = min(cuts, key=lambda cut: cut[2], default=(0, 0, math.inf))
        return cut if cut[2] <= COST_CONJUNCTION else None

    def _token_excess(self, start: int, end: int) -> float:
        spoken = self.text[start:end]
        if not is_speakable(spoken):
            return 0.0
        return self.limits.count_tokens(normalize_text(spoken)) / self.limits.max_tokens

    def _farthest(self, start: int) -> int:
        """The last position a segment from `start` may reach by its characters and seconds."""
        until = self.elapsed[start] + int(self.limits.max_seconds * 1000)
        by_seconds = bisect_right(self.elapsed, until, start, self.end + 1) - 1
        return max(start + 1, min(by_seconds, start + self.limits.max_chars))

    def _choose_cut(self, start: int, limit: int) -> Cut:
        """The cheapest cut in (start, limit]: a good place, nothing short, like halves."""
        if self.end <= limit:
            return self.end, self.end, 0.0
        enough = min(self.limits.min_chars, 0.63 * (limit - start))  # 110 of 175

        def too_short(length: int) -> float:
            return 2 * (max(0.0, enough - length) / enough) ** 2

        first, last = (bisect_right(self._cuts, (pos, math.inf)) for pos in (start, limit))
        nearest = bisect_right(self._sentence_ends, limit)
        sentence_end = [*self._sentence_ends[nearest : nearest + 1], self.end][0]
        best, lowest = None, math.inf
        for left, right, cost in reversed(self._cuts[first:last]):
            if cost >= lowest:
                continue
            length = left - start
            if cost == 0:
                sentence_end, total = left, too_short(length) + too_short(self.end - right)
            else:
                run = sentence_end - start
                even = run / math.ceil(run / (limit - start))
                total = cost + too_short(length) + too_short(sentence_end - right)
                total += 0.5 * (length / even - 1) ** 2
            if total < lowest:
                best, lowest = (left, right, cost), total
        return best or self._hard_cut(start, limit)

    def _hard_cut(self, start: int, limit: int) -> Cut:
        """For what is longer than a segment: at a blank, or at least between whole letters."""
        text = self.text
        blank = text.rfind(" ", start + 1, limit)
        if blank > 0:
            return blank, blank + 1, math.inf
        for pos in range(limit, start, -1):
            joined = "\u200d" in text[pos - 1 : pos + 1] or "🏻" <= text[pos] <= "🏿"  # skin tones
            joined |= unicodedata.combining(text[pos - 1]) == 9  # a virama, as in क्ष
            if not joined and not unicodedata.category(text[pos]).startswith("M"):
                return pos, pos, math.inf
        return limit, limit, math.inf

    @cached_property
    def _cuts(self) -> list[Cut]:
        """Every place to cut, in order: the ends of sentences cost nothing, others by kind."""
        ends = set(self._sentence_ends)
        cuts: list[Cut] = []
        for match in CUT_RE.finditer(self.text, self.start, self.end):
            (left, right), kind = match.span(), match.lastgroup
            if right in ends:
                ends.discard(right)
                cuts.append((left, right, 0.0))
            elif kind == "gap":
                if BLANK_RE.search(match[0]):  # a soft hyphen alone is no place to cut
                    cuts.append((left, right, self._blank_cost(left, right)))
            elif kind and unicodedata.category(self.text[left - 1])[0] not in "MC":
                cuts.append((left, right, UNSPACED[kind]))
        return sorted([*cuts, *((pos, pos, 0.0) for pos in ends)])

    @cached_property
    def _sentences(self) -> Sentences:
        return Sentences(self.text, self.start, self.end, self.language)

    @cached_property
    def _sentence_ends(self) -> list[int]:
        """Where the paragraph's second, third, ... sentences start, and a list's lines."""
        ended = {pos for pos, spoken in self.lines.items() if spoken in LINE_STOPS}
        return sorted(ended.union(self._sentences.ends))

    def _blank_cost(self, left: int, right: int) -> float:
        """The cost of a cut at the blank text[left:right] inside a sentence."""
        text, before = self.text, self.text[max(self.start, left - 12) : left]
        bare = before.rstrip(CLOSERS)
        line = self.lines.get(right)
        if right in self._sentences.inner:
            return COST_INNER
        if line in WITHIN_WORD:
            return COST_GLUED
        if line in VERSE_MARKS:
            return COST_CLAUSE
        if CLOSING_RE.match(text, right) or DASH_RE.match(text, right) or before[-1] in OPENERS:
            return COST_GLUED
        if before[-1] == "." and not before.endswith(".."):  # an abbreviation, not an end
            return COST_GLUED
        if bare.endswith(("—", "–", " -", "--")):  # a dash, unless it opens somebody's reply
            reply = bare.rstrip("—–- ").endswith((".", "!", "?", "…", *CLOSERS))
            return COST_GLUED if reply else COST_CLAUSE
        if bare.endswith((".", "!", "?", "…", ";", ":")):
            return COST_CLAUSE
        if bare != before.rstrip("'’") or bare.endswith((",", "،", "、", "，")):
            return COST_COMMA
        word = text[right : right + 12].split(maxsplit=1)[0]
        return COST_CONJUNCTION if f" {word} " in CONJUNCTIONS.get(self.language, "") else COST_WORD


# -----------------------------------------------------------------------------
# Reading: which words and pauses a text's signs stand for, whoever speaks it
#
# What a person who reads aloud makes of signs that are no words. It holds for every model, also
# with expression off; how a word is said is not decided here but in the sections below. A `Script`
# is a text as it is read, and knows of each of its characters where in the request's text it comes
# from. One kind of sign after the other is looked for and taken out of it, by edits that do not
# overlap; what is code, or was written so that it is no sign, is kept from the later ones. No word
# is lost or added but by the kinds of LEAVES. Every pass takes linear time in whatever text.
# `read` (in the section on asides) is the whole of it. What a model's tokenizer has no token for
# is a `Pen`'s to say: it writes what Bark gets, when all else is done.

CUES = ("[laughs]", "[laughter]", "[sighs]", "[gasps]", "[clears throat]", "[music]")  # Suno's
# takes: "so [sighs]"  not: "[Sighs]"
TYPED_CUE_RE = re.compile("|".join(map(re.escape, CUES)))

# What is not spoken, of all that has a letter or a digit; anything else stays.
LEAVES = {
    "target": "where a link leads, of an address all but its host, and what defines a link",
    "note": "the mark of a footnote",
    "tag": "tags of HTML, XML and SSML, comments, scripts and style sheets",
    "line": "the fences around code, with the language named there, and the boxes of tasks",
    "entity": "an entity, for which its sign is spoken",
    "aside": "a direction, which is not for speaking; its cue may be",
}

ENDING_SIGNS = ".!?…:;,。！？：；，、।॥؟"  # a line with one at its end needs no other
FULL_STOP = {"zh": "。", "ja": "。", "hi": "।"}  # by language; any other has a dot
SIGNS_AT_END = "*_`~)]}\"'”’»›“|# \t\r\n"  # may stand behind a stop


class Edit(NamedTuple):
    """`text[start:end]` is spoken as `spoken`; a cue gets blanks around it as needed."""

    start: int
    end: int
    spoken: str


class Left(NamedTuple):
    """Words of the request's text[start:end] that are not spoken; a kind of LEAVES."""

    kind: str
    start: int
    end: int


class Direction(NamedTuple):
    """Where in a script a direction stood, its cue ("" where Bark has none), and its words."""

    at: int
    cue: str
    words: str


Stretch = tuple[int, int]  # text[start:end]


def is_within(stretches: list[Stretch], pos: int) -> bool:
    """Whether a position lies in one of some stretches, which are in order."""
    near = bisect_right(stretches, (pos, sys.maxsize)) - 1
    return near >= 0 and pos < stretches[near][1]


class Script:
    """A text as it is read. All places but those of `left` are places in `text`."""

    def __init__(self, source: str):
        self.source = self.text = source
        self._from, self._to = list(range(len(source))), list(range(1, len(source) + 1))
        self.kept: list[Stretch] = []      # signs there are no markup
        self.listed: list[Stretch] = []    # items, cells and headings: nothing stands aside there
        self.emphases: list[Stretch] = []  # in their clauses
        self.directions: list[Direction] = []
        self.left: list[Left] = []

    def change(self, edits: Iterable[Edit], kind: str = "", kept: Iterable[Stretch] = ()) -> None:
        """Applies those edits that touch nothing kept, which then has the stretches `kept` too."""
        bounds = [end for _, end in self.kept]
        done: list[Edit] = []
        for edit in sorted(edits):
            near = bisect_right(bounds, edit.start)
            free = near == len(bounds) or self.kept[near][0] >= edit.end
            if free and (not done or done[-1].end <= edit.start):
                done.append(edit)
        self.kept = sorted([*self.kept, *kept])
        if done:
            self._leave(done, kind)
            self._apply(done)

    def _leave(self, edits: list[Edit], kind: str) -> None:
        for start, end, spoken in edits:
            if is_speakable(self.text[start:end]) and self.text[start:end] != spoken:
                self.left.append(Left(kind, self._from[start], self._to[end - 1]))

    def _apply(self, edits: list[Edit]) -> None:
        parts: list[str] = []
        starts: list[int] = []
        ends: list[int] = []
        done = 0
        for edit in edits:
            low = self._from[edit.start] if edit.start < edit.end else self._before(edit.start)
            high = self._to[edit.end - 1] if edit.start < edit.end else low
            parts += self.text[done : edit.start], edit.spoken
            starts += self._from[done : edit.start] + [low] * len(edit.spoken)
            ends += self._to[done : edit.start] + [high] * len(edit.spoken)
            done = edit.end
        self.text = "".join([*parts, self.text[done:]])
        self._from, self._to = starts + self._from[done:], ends + self._to[done:]
        self._move(edits)

    def _move(self, edits: list[Edit]) -> None:
        ends = [edit.end for edit in edits]
        shifts = [0, *itertools.accumulate(len(e.spoken) - (e.end - e.start) for e in edits)]

        def moved(pos: int) -> int:
            return pos + shifts[bisect_right(ends, pos)]

        for stretches in (self.kept, self.listed, self.emphases):
            stretches[:] = [(moved(start), moved(end)) for start, end in stretches]
        self.directions = [each._replace(at=moved(each.at)) for each in self.directions]

    def _before(self, pos: int) -> int:
        return self._to[pos - 1] if pos else 0

    def keeps(self, pos: int) -> bool:
        return is_within(self.kept, pos)

    def lists(self, pos: int) -> bool:
        return is_within(self.listed, pos)

    def direct(self, start: int, end: int, at: int, cue: str) -> None:
        """Notes that text[start:end] is a direction; it is taken out at `at`."""
        words = self.source[self._from[start] : self._to[end - 1]]
        self.directions.append(Direction(at, cue, words))

    def place(self, start: int, end: int) -> Stretch:
        """Where text[start:end] stands in the source, with the signs that went with it."""
        until = self._from[end] if end < len(self.text) else len(self.source)
        return trim_blanks(self.source, self._before(start), max(until, self._to[end - 1]))


# Lines. What stands at their starts, as Markdown has it.

# takes: "```py"  not: "```x``` is code"
FENCE_RE = re.compile(r"[ \t]*(`{3,}|~{3,})[^`\r\n]*(?=[\r\n]|\Z)")
# takes: "> > Hi"  not: ">_<"
QUOTE_RE = re.compile(r"(?:[ \t]{0,3}>(?:[ \t]|(?=[^\W\d_]|[>\"“*\[(])|(?=\s*$)))+")
# takes: "## Title"  not: "#1 of 5"
HEADING_RE = re.compile(r"[ \t]{0,3}#{1,6}[ \t]+(?=\S)")
# takes: "* [ ] one"  not: "*one"
BULLET_RE = re.compile(
    r"[ \t]*(?:[-*•‣◦▪●∙■]|\+(?=[ \t]+[^\W\d]))[ \t]+(?:\[[ xX✓]\][ \t]+)?(?=\S)")
# takes: "12. Wash"  not: "3.5 kg"
NUMBERED_RE = re.compile(r"[ \t]*\(?\d{1,3}[.)][ \t]+(?=\S)")
# takes: "[guide]: https://x.org/a 'A'"  not: "[Tom]: Hello."
DEFINITION_RE = re.compile(
    r"(?m)^[ \t]{0,3}\[(?!\^)([^\[\]\n]{1,100})\]:[ \t]{1,9}<?(?:[a-z]{2,9}:|[/#.])\S*[^\n]*$")
# takes: "a | b"  not: "a \\| b"
BAR_RE = re.compile(r"(?<!\\)\|")
# takes: "so[^2]."  not: "[^a-z]"
NOTE_RE = re.compile(r"\[\^\d{1,3}\](?::[ \t]*)?")


class Lines:
    """What the lines of a text are, and the edits that read them so."""

    def __init__(self, text: str, stop: str):
        self.text, self.stop = text, stop
        self.edits: list[Edit] = []
        self.fences: list[Edit] = []
        self.kept: list[Stretch] = []
        self.listed: list[Stretch] = []
        self._unclosed = {"`": math.inf, "~": math.inf}  # fences of that length or more
        self.lines: list[Stretch] = []
        start = 0
        for line in text.splitlines(keepends=True):
            quote = QUOTE_RE.match(line)
            if quote:
                self.edits.append(Edit(start, start + quote.end(), ""))
            self.lines.append((start + (quote.end() if quote else 0), start + len(line)))
            start += len(line)
        at = 0
        while at < len(self.lines):
            at = self._read(at)

    def _line(self, at: int) -> str:
        return self.text[slice(*self.lines[at])] if 0 <= at < len(self.lines) else ""

    def _read(self, at: int) -> int:
        """Reads what starts with a line; the number of the next line."""
        line, (start, end) = self._line(at), self.lines[at]
        if fence := FENCE_RE.match(line):
            return self._read_fence(at, fence[1])
        if not is_speakable(line):
            return at + 1
        if "|" in line and (until := self._table_end(at)) > at:
            return self._read_table(at, until)
        if heading := HEADING_RE.match(line):
            self._read_heading(start, heading.end(), line)
        elif self._is_item(at):
            return self._read_item(at)
        elif self._is_underline(at + 1) and not self._line(at - 1).strip():
            self._end(start, end)
        return at + 1

    def _end(self, start: int, end: int, more: str = "") -> None:
        """A line that ends without a stop is heard to end."""
        line = self.text[start:end].rstrip()
        bare = line.rstrip(SIGNS_AT_END)[-1:]
        stop = self.stop if bare and bare not in ENDING_SIGNS else ""
        if stop or more:
            self.edits.append(Edit(start + len(line), start + len(line), stop + more))

    def _read_fence(self, at: int, sign: str) -> int:
        self.fences.append(Edit(*self.lines[at], "\n"))
        if len(sign) >= self._unclosed[sign[0]]:
            return at + 1
        for until in range(at + 1, len(self.lines)):
            line = self._line(until).strip()
            if line.startswith(sign) and not line.strip(sign[0]):
                self.fences.append(Edit(*self.lines[until], "\n"))
                if until > at + 1:
                    self.kept.append((self.lines[at + 1][0], self.lines[until - 1][1]))
                return until + 1
        self._unclosed[sign[0]] = len(sign)
        return at + 1

    def _read_heading(self, start: int, skipped: int, line: str) -> None:
        bare = line.rstrip()
        title = bare.rstrip("#").rstrip() if bare.rstrip("#")[-1:].isspace() else bare
        self.edits += [Edit(start, start + skipped, "\n" if start else ""),
                       Edit(start + len(title), start + len(bare), "")]
        self._end(start, start + len(title), "\n")
        self.listed.append((start, start + len(line)))

    def _is_underline(self, at: int) -> bool:
        line = self._line(at).strip()
        return len(line) > 1 and set(line) in ({"="}, {"-"})

    def _is_item(self, at: int) -> bool:
        """Whether a line is a list's item; one that goes on with a sentence is none."""
        def looks_like(at: int) -> bool:
            line = self._line(at)
            return bool(BULLET_RE.match(line) or NUMBERED_RE.match(line))

        before = self._line(at - 1).rstrip()
        free = not is_speakable(before) or before.rstrip(SIGNS_AT_END)[-1:] in ENDING_SIGNS
        return looks_like(at) and (free or looks_like(at + 1) or self._in_list(at))

    def _in_list(self, at: int) -> bool:
        return bool(self.listed) and self.listed[-1][1] == (self.lines[at - 1][1] if at else -1)

    def _read_item(self, at: int) -> int:
        line, start = self._line(at), self.lines[at][0]
        if bullet := BULLET_RE.match(line):
            self.edits.append(Edit(start, start + bullet.end(), ""))
        at += 1
        while is_speakable(line := self._line(at)) and not (
                BULLET_RE.match(line) or NUMBERED_RE.match(line) or HEADING_RE.match(line)
                or FENCE_RE.match(line)):
            at += 1
        end = self.lines[at - 1][1]
        self._end(start, end)
        self.listed.append((start, end))
        return at

    def _is_ruled(self, at: int) -> bool:
        line = self._line(at).strip()
        return "|" in line and "-" in line and set(line) <= set("|-: \t")

    def _is_framed(self, at: int) -> bool:
        line = self._line(at).strip()
        return len(line) > 2 and line[0] == line[-1] == "|"

    def _table_end(self, at: int) -> int:
        """The line after a table that starts here; the same where none does."""
        until = at
        if self._is_ruled(at + 1):
            while "|" in self._line(until):
                until += 1
        elif self._is_framed(at) and self._is_framed(at + 1):
            while self._is_framed(until):
                until += 1
        return until

    def _read_table(self, at: int, until: int) -> int:
        for row in range(at, until):
            start, end = self.lines[row]
            if is_speakable(self.text[start:end]):
                self._read_row(start, start + len(self._line(row).rstrip()))
                self.listed.append((start, end))
            else:
                self.edits.append(Edit(start, end, ""))
        return until

    def _read_row(self, start: int, end: int) -> None:
        """Cells with pauses between them."""
        bars = [match.start() for match in BAR_RE.finditer(self.text, start, end)]
        edges = zip([start, *(bar + 1 for bar in bars)], [*bars, end], strict=True)
        cells = [cell for cell in itertools.starmap(self._trimmed, edges) if cell[0] < cell[1]]
        done, pause = start, ""
        for low, high in cells:
            self.edits.append(Edit(done, low, pause))
            last = self.text[low:high].rstrip(SIGNS_AT_END)[-1:]
            done, pause = high, " " if last and last in ENDING_SIGNS else ", "
        self.edits.append(Edit(done, end, self.stop if pause == ", " else ""))

    def _trimmed(self, start: int, end: int) -> Stretch:
        cell = self.text[start:end]
        return start + len(cell) - len(cell.lstrip()), start + len(cell.rstrip())


def read_marked_lines(script: Script, stop: str) -> set[str]:
    """Headings, items, tables, quotes, fences; the names of links that are defined."""
    named = {match[1].casefold() for match in DEFINITION_RE.finditer(script.text)}
    script.change((Edit(*match.span(), "") for match in DEFINITION_RE.finditer(script.text)),
                  "target")
    lines = Lines(script.text, stop)
    script.listed = lines.listed
    script.change([*lines.edits, *lines.fences], "line", lines.kept)
    return named


# Within lines. The first kinds of sign that are looked for keep what they hold from the later ones.

# takes: "`_x_`"  not: "'`a' and `b'"
CODE_RE = re.compile(r"(?<![`\\\w])(`{1,3})(?!`)(?=\S)([^`\n]{1,300}+)(?<!\s)\1(?!`)")
# Where a link leads: in round brackets, of one word, with a sign that words have not.
# takes: "(https://x.org/a_(b) 'A')"  not: "(now)"
TARGET = (r"\((?=[^\s()]{0,2000}[/.#:@]|\))\s?"
          r"(?:<[^<>\n]{0,2000}>|(?:[^\s()<>]|\([^\s()]{0,500}\)){0,2000}+)"
          r"(?:\s{1,9}(?:\"[^\"\n]{0,300}\"|'[^'\n]{0,300}'))?\s?\)")
# takes: "the [guide](https://x.org/a_b)"  not: "[Press](now)"
LINK_RE = re.compile(
    r"(?<!\\)!?\[(?P<label>(?:[^\[\]\n]|\n(?=\S)|\[[^\[\]\n]{0,100}\](?!\()){0,500}+)\]"
    rf"(?:(?P<target>{TARGET})|\[(?P<name>[^\[\]\n]{{0,100}})\])")
# takes: "see www.x.org/a."  not: "x.org"
ADDRESS_RE = re.compile(
    r"<?(?<![\w@])(?P<scheme>(?:https?|ftps?)://(?:[\w.%:-]{1,100}@)?|(?=www\.[a-z0-9]))"
    r"(?P<host>(?:[a-z0-9-]{1,63}\.){0,9}[a-z0-9-]{1,63})"
    r"(?P<rest>(?:[:/?#][a-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]{0,2000})?)>?", re.I)
# takes: "<tom@x.org>"  not: "<b>"
MAIL_RE = re.compile(r"(?P<open><(?:mailto:)?|(?<![\w:])mailto:)"
                     r"(?P<mail>[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,9})(?P<close>>?)",
                     re.I)
# takes: "a<br/>b"  not: "a < b"
ELEMENT_RE = re.compile(
    r"<(?P<apart>!--|script\b|style\b)|<[!?][a-z\[][^<>]{0,2000}>"
    r"|<(?P<close>/?)(?P<name>[a-z][\w:.-]{0,40})(?P<rest>(?:\s[^<>]{0,5000}|/)?)>", re.I)
# takes: "</b >"  not: "<b>"
CLOSED_RE = re.compile(r"</([a-z][\w:.-]{0,40})\s{0,9}>", re.I)
# takes: "<img alt='a cat' src=x>"  not: "<img src=x>"
ALT_RE = re.compile(r"\salt\s?=\s?(\"[^\"]{0,500}\"|'[^']{0,500}')", re.I)
# takes: "&amp;nbsp;"  not: "AT&T"
ENTITY_RE = re.compile(r"&(?:amp;)*(#\d{1,7};|#x[0-9a-f]{1,6};|[a-z][a-z0-9]{1,31};)", re.I)
# takes: "\\*"  not: "\\n"
ESCAPE_RE = re.compile(r"\\(?=[\\`*_{}\[\]()#+.!|<>~\n-])")
# takes: "~~so~~"  not: "~~ so"
STRUCK_RE = re.compile(r"(?<![~\w])~~(?=[^\s~])([^~\n]{1,300}+)(?<!\s)~~(?!~)")

# takes: "\n</tr>"  not: "</td>"
ROW_END_RE = re.compile(r"\s{0,99}</?t(?:r|body|head|able)\b", re.I)

LONE_TAGS = "p br hr img li td th tr input wbr"  # need no other that closes them
INLINE_TAGS = """
    a abbr acronym b bdi bdo big cite code del dfn em emphasis font i ins kbd mark phoneme prosody q
    s samp small span strike strong sub sup tt u var voice wbr"""  # in them may stand half a word
BLOCK_TAGS = """
    address article aside blockquote body center details div dl fieldset figure footer form h1 h2 h3
    h4 h5 h6 head header hr html li main nav ol p pre section table tbody thead tr ul"""
# What ends there ends like a sentence.
STOPPED_TAGS = "caption dd dt figcaption h1 h2 h3 h4 h5 h6 li option title tr"
CELL_TAGS = "td th"


def read_code(script: Script) -> None:
    """Code is its text, whatever signs are in it."""
    found = list(CODE_RE.finditer(script.text))
    script.change((Edit(low, high, "") for match in found
                   for low, high in ((match.start(), match.start(2)), (match.end(2), match.end()))),
                  kept=[match.span(2) for match in found])


def read_links(script: Script, named: set[str]) -> None:
    """A link is its words, an image what it shows."""
    for _ in range(2):  # an image may be a link's words
        edits = []
        for match in LINK_RE.finditer(script.text):
            label = match.span("label")
            known = (match["name"] or match["label"]).casefold() in named
            if match["target"] or known:
                edits += [Edit(match.start(), label[0], ""), Edit(label[1], match.end(), "")]
        script.change(edits, "target")
    script.change((Edit(*match.span(), "") for match in NOTE_RE.finditer(script.text)), "note")


def address_end(rest: str) -> str:
    """What follows an address's host, without the marks that are its sentence's."""
    rest = rest.rstrip("*_.,;:!?'\"")
    while rest and (opening := {")": "(", "]": "["}.get(rest[-1])):
        if rest.count(opening) >= rest.count(rest[-1]):
            break
        rest = rest[:-1].rstrip("*_.,;:!?'\"")
    return rest


def read_addresses(script: Script) -> None:
    """An address is its host, a mail's address itself."""
    edits, kept = [], []
    for match in ADDRESS_RE.finditer(script.text):
        rest = address_end(match["rest"])
        low, high = match.span("host")
        closed = match[0][0] == "<" and match[0][-1] == ">"
        end = match.end() if closed else high + len(rest)
        edits += [Edit(match.start() + (match[0][0] == "<" and not closed), low, ""),
                  Edit(high, end, "")]
        kept.append((low, high))
    for match in MAIL_RE.finditer(script.text):
        edits += [Edit(*match.span("open"), ""), Edit(*match.span("close"), "")]
        kept.append(match.span("mail"))
    script.change(edits, "target", kept)


class Tags:
    """Edits that leave out tags, and the breaks that some stand for."""

    def __init__(self, text: str, stop: str):
        self.text, self.stop = text, stop
        self.closed = {match[1].casefold() for match in CLOSED_RE.finditer(text)}
        self.edits: list[Edit] = []
        self._last, self._done = "", 0  # the last sign spoken so far, and up to where
        self._gone: set[str] = set()    # ends that stand nowhere in what is left
        pos = 0
        while match := ELEMENT_RE.search(text, pos):
            pos = self._read(match)

    def _read(self, match: re.Match[str]) -> int:
        start, end, name = match.start(), match.end(), (match["name"] or "").casefold()
        if apart := match["apart"]:
            end = self._end_of(apart.casefold(), end)
            if not end:
                return match.end()
        elif name and not self._is_tag(match, name):
            return start + 1
        spoken = self._spoken(match, name, start, end)
        self.edits.append(Edit(start, end, spoken))
        self._done = end
        return end

    def _end_of(self, apart: str, pos: int) -> int:
        closing = "-->" if apart == "!--" else f"</{apart}>"
        if closing in self._gone:
            return 0
        match = re.compile(re.escape(closing), re.I).search(self.text, pos)
        if match is None:
            self._gone.add(closing)
        return match.end() if match else 0

    def _is_tag(self, match: re.Match[str], name: str) -> bool:
        rest = match["rest"]
        return bool(match["close"] or name in self.closed or name in LONE_TAGS.split()
                    or rest.endswith("/") or ("=" in rest and ("'" in rest or '"' in rest)))

    def _spoken(self, match: re.Match[str], name: str, start: int, end: int) -> str:
        before = self.text[self._done : start].rstrip(SIGNS_AT_END)
        self._last = before[-1:] or self._last
        stop = self.stop if self._last and self._last not in ENDING_SIGNS else ""
        if name == "img":
            alt = ALT_RE.search(match["rest"])
            return f" {alt[1][1:-1]} " if alt else ""
        if name == "br":
            return "\n"
        if match["close"] and name in CELL_TAGS.split():
            if ROW_END_RE.match(self.text, end):
                return ""
            self._last = ","
            return ", " if stop else " "
        if match["close"] and name in STOPPED_TAGS.split():
            self._last = self.stop
            return f"{stop}\n" if name in ("li", "tr", "option") else f"{stop}\n\n"
        if name in BLOCK_TAGS.split():
            return "\n" if name in ("li", "tr") else "\n\n"
        glued = name in INLINE_TAGS.split() or not (
            self.text[start - 1 : start].isalnum() and self.text[end : end + 1].isalnum())
        return "" if glued else " "


def read_tags(script: Script, stop: str) -> None:
    """Tags are not spoken; some end a line, a sentence or a paragraph."""
    script.change(Tags(script.text, stop).edits, "tag")


def read_entities(script: Script) -> None:
    """Entities and escaped signs are the signs they stand for, and no markup."""
    edits, kept = [], []
    for match in ENTITY_RE.finditer(script.text):
        if match[1][0] == "#" or match[1] in html5:  # not the start of it, as in &notanentity;
            edits.append(Edit(*match.span(), html.unescape(f"&{match[1]}")))
            kept.append(match.span())
    for match in ESCAPE_RE.finditer(script.text):
        edits.append(Edit(*match.span(), ""))
        kept.append((match.end(), match.end() + 1))
    script.change(edits, "entity", kept)
    script.change(Edit(low, low + 2, "") for match in STRUCK_RE.finditer(script.text)
                  for low in (match.start(), match.end() - 2))


# Signs that a tokenizer may not have, and how they are written with those that each has.
PLAIN = str.maketrans({
    **dict.fromkeys("‘’‚‛′ʼ`´", "'"), **dict.fromkeys("“”„‟″«»‹›", '"'), "…": "...",
    **dict.fromkeys("‐‑‒–−⁃", "-"), "—": "-", "―": "-", "、": ",", "،": ",", "。": ".", "۔": ".",
    "؟": "?", "؛": ";", "।": ".", "॥": ".", "×": "x", "•": ",", "·": ",", "／": "/"})
MAX_WORD = 50  # characters; WordPiece knows no word of more than 100, and takes square time in it


class Pen:
    """Writes a text with the signs that a tokenizer has tokens for.

    `unknown` gives the stretches of a text that it has none for, in order. Any thread may use it.
    """

    def __init__(self, unknown: Callable[[str], list[Stretch]]):
        self.unknown = unknown
        self._signs: dict[str, str] = {}

    def write(self, text: str) -> tuple[str, str]:
        """The text in known signs, and the signs that are left out, each once."""
        spoken, left, done = "", "", 0
        for start, end in self.unknown(text):
            word = self._word(text[start:end])
            left += "".join(c for c in text[start:end] if not self._sign(c) and c not in left)
            spoken += text[done:start]
            done = end
            if not word and (spoken[-1:].isspace() or not spoken):
                spoken = spoken.rstrip()
                done += len(text[end:]) - len(text[end:].lstrip()) if not spoken else 0
            spoken += word
        return spoken + text[done:], left

    def _word(self, word: str) -> str:
        """A word that is unknown as a whole, in its plain form or with blanks in it."""
        known = " ".join("".join(map(self._sign_in_word, word)).split())
        if not known:
            return ""
        apart = re.sub(r"(?<=\w)(?=[^\w\s])|(?<=[^\w\s])(?=\w)", " ", known)
        forms = (word.translate(PLAIN), unicodedata.normalize("NFKC", word), known, apart)
        if len(word) > MAX_WORD:
            forms = (re.sub(rf"(\w{{{MAX_WORD}}}|\W{{{MAX_WORD}}})(?=.)", r"\1 ", known),)
        return next((form for form in dict.fromkeys(forms)
                     if form != word and not self.unknown(form)), " ".join(known))

    def _sign_in_word(self, char: str) -> str:
        """The same, and a blank where a sign between two words is left out."""
        return self._sign(char) or (" " if unicodedata.category(char)[0] in "SP" else "")

    def _sign(self, char: str) -> str:
        """A character in the first form of it that is known; nothing where none is."""
        if char not in self._signs:
            bare = unicodedata.normalize("NFKD", char)
            forms = (char, char.translate(PLAIN), unicodedata.normalize("NFKC", char),
                     "".join(c for c in bare if not unicodedata.combining(c)))
            self._signs[char] = next((form for form in forms if not self.unknown(form)), "")
        return self._signs[char]


# -----------------------------------------------------------------------------
# Lexicon: the words that asides and expression go by, as data
#
# A list is one string: blanks part its entries, "_" is a blank inside of one ("let_out"), and an
# entry may be a pattern where that is shorter than its words ("an?", "neighbou?r"). The comment
# above a list says what a word does in it. All of it is English: narration is understood in no
# other language, and stage directions are English words wherever they stand.


def one_of(words: str) -> str:
    """A pattern for any of the words of a list."""
    return f"(?:{'|'.join(words.split())})".replace("_", r"\s+")


def either_case(words: str) -> str:
    """The words, each with a small letter or a capital first."""
    return " ".join(f"[{word[0].upper()}{word[0]}]{word[1:]}" for word in words.split())


def inflected(stems: str, ending: str) -> str:
    """Regular verbs with -ed, -s or -ing, from their stems; with "" what all of them have."""
    if ending == "s":
        ies = [re.sub(r"(?<=[^aeiou])y$", "ie", stem) for stem in stems.split()]
        return " ".join(re.sub(r"(?<=ch|sh)$|(?<=[sxzo])$", "e", stem) + "s" for stem in ies)
    bare = [stem.removesuffix("e") for stem in stems.split()]
    if ending:
        bare = [re.sub(r"^([^aeiou]*[aeiou])([bdgkmnpt])$", r"\1\2\2", stem) for stem in bare]
    return " ".join(stem + ending for stem in bare)


# Each is [laughs], as a verb or a noun: Bark makes one sound of them all.
LAUGHS = "laugh chuckle giggle snicker snigger cackle guffaw titter chortle"
# A direction that says this is not spoken, and Bark has no sound for it.
LEFT_OUT = """
    whisper shout smile grin nod shrug pause wink frown sob sniff sniffle smirk mutter murmur blush
    whimper yawn scream wince blink scoff tremble hesitate"""


class Acts(NamedTuple):
    """Words of stage directions: verbs and others, which with a capital may be a title as well."""

    cue: str  # "" for none: the direction is left out
    verbs: str
    others: str


ACTS = (
    Acts("[laughs]", f"{inflected(LAUGHS, 's')} chuckle giggle",
         f"{inflected(LAUGHS, 'ing')} {LAUGHS}"),
    Acts("[laughter]", r"laughter_from_the_\w+ (?:audience|crowd|group|all)_laughs?", "laughter"),
    Acts("[sighs]", "sighs sigh exhales groans", "sighing exhaling groaning groan"),
    Acts("[gasps]", "gasps gasp inhales_sharply", "gasping"),
    Acts("[clears throat]", r"clears_(?:\w+_)?throat coughs",
         r"clearing_(?:\w+_)?throat clear_throat throat_clear(?:s|ing)? coughing cough ahem"),
    Acts("[music]", "music_(?:plays|playing|starts|swells)", "(?:soft_|loud_)?music"),
    Acts("", inflected(LEFT_OUT, "s") + r" cries weeps clapping applause rolls_(?:\w+_)?eyes"
         r" shakes_(?:\w+_)?head takes_a_(?:deep_)?breath",
         f"{inflected(LEFT_OUT, 'ing')} crying weeping pause beat whisper smile softly quietly"
         " angrily sarcastically sadly happily nervously aside to_(?:him|her|my)self to_themselves"
         r" in_an?_\w+_(?:voice|tone|whisper)"),
)
# What people do in directions, in the third person. Bark has no sound for most of it.
BODILY = f"""
    {LAUGHS} cough beckon blink bow cock crouch curtsy cringe fidget flinch frown gasp gaze gesture
    gesticulate glance glare grimace grin gulp hug kneel lean nod nuzzle pant peek peer pout recoil
    salute saunter scowl shiver shrug shudder shuffle sidle slouch slump smirk sneer snort snuggle
    squint squirm stammer stare stumble stutter swagger tiptoe tremble twirl wince wink"""
# The same, and so do things: "opens at nine", "comes with batteries".
DOES = """
    adjust approach arch back beam bend bite blow bounce breathe brush bump caress carry catch chew
    circle clap clasp clean clench climb cling close clutch collapse come continue cover crack crawl
    creep cross cuddle curl dance dash draw drift drink drop drum duck eat embrace enter exhale exit
    extend face fall fan fiddle flail flick flip float flop flutter fold follow freeze fumble get
    give glide go grab grasp grip grit growl grumble grunt halt hand hang hesitate hiss hold hop
    hover huff hum hurry inhale interrupt jerk jump keep kick kiss knock laugh lay lead leap leave
    let lick lie lift light limp listen lock look lower lunge march mumble moan motion mouth move
    narrow nestle nibble nudge offer open pace pat pause perk pet pick pinch place play point poke
    pounce pour prance press pretend pull purr purse push put race raise reach read relax rest
    return rise roll rub ruffle run rush scan scoot scratch scream search settle shake shift show
    shut sigh sink sip sit skip slam slap slide slip smack smile snap snatch sneeze sniff speak spin
    spit sprint squat squeeze squeak stagger stand start steal step stick stifle stomp stop storm
    straighten stretch stride stroke stroll strut study swallow sway swing take tap tease tense
    think throw thrust tickle tie tighten tilt tip toss touch tousle trail trip trot trudge tuck tug
    turn twist twitch type unlock wag wait wake walk wander watch wave whistle widen wiggle wipe
    withdraw wrap wrinkle write yank yelp zip"""
# After a verb that things do too they make it somebody's: "turns to the window", "lifts her hand".
SOMEWHERE = """
    away closer back backwards? forwards? around over up down off aside in out his her their my your
    him them himself herself myself themselves you me to_(?:the|him|her|them|me|you|his|my|your)
    towards? into at_(?:the|him|her|them|me|you|his|my|your) from_(?:the|his|her)"""
# May follow the verb of a direction: "laughs out loud", "sighs with relief".
MANNERS = r"""
    \w+ly again aloud out_loud a_(?:little|bit) hard to_(?:him|her|my)self
    (?:in|with)_(?:disbelief|relief|surprise|shock|delight|amusement|frustration|exasperation)
    (?:in|with)_(?:horror|joy|pain) at_(?:him|her|them|this|that)"""
# Before a word in stars they make it the clause's own: "he *laughs*", "a *laugh*".
BEFORE_VERB = "he she it they who that which i we you to never always the an? and not only"
# After stars or brackets they go on with the clause: "*laughing* is good for you".
AFTER_VERB = """
    is was are were of at about with and or as like has had can will to for on from that than
    because when if"""
# After a verb they judge a thing: "looks great".
JUDGES = "good great like nice bad fine fun amazing right wrong better well promising"
# In -s, and no verbs though something follows: "heads up", "details below".
NO_VERBS = "hands heads thumbs eyes this its his yes prices details always thanks perhaps"
# Before a word in stars or brackets they want it for the clause's own.
WANTS_MORE = f"""
    {BEFORE_VERB} of in on at for from with by into about as than or but if so my your his its our
    their this these those is are was were be been am do does did has have had will would can could
    may might must shall should say says said press click tap type word called named titled very too
    more most no some any all both every each another other"""


class Sound(NamedTuple):
    """How narration tells that somebody makes the sound of a cue."""

    cue: str
    told: str   # "sighed", "sighs"
    base: str   # "sigh": after I, we, they, you
    going: str  # "sighing"
    noun: str


SOUNDS = (
    Sound("[laughs]", f"{inflected(LAUGHS, 'ed')} {inflected(LAUGHS, 's')}", LAUGHS,
          inflected(LAUGHS, "ing"), LAUGHS),
    Sound("[sighs]", "sighed sighs", "sigh", "sighing", "sigh"),
    Sound("[gasps]", "gasped gasps", "gasp", "gasping", "gasp"),
    Sound("[clears throat]", "clear(?:ed|s)_(?:his|her|their|my|its|our)_throats?",
          "clear_(?:his|her|my|our|their|your)_throats?",
          "clearing_(?:his|her|their|my)_throats?", "(?:cough|clearing)_of_the_throat"),
    Sound("[music]", r"(?:sang|sings|crooned|croons)(?!_(?:out|the_praises)\b)", "sing",
          "singing", "song"),
)
# Before the sound as their object: "gave a short laugh".
GIVES = """
    gave gives give let_out lets_out heaved heaves uttered utters released releases loosed breathed
    breathes forced managed emitted drew fetched barked"""
# The same beside another verb: "he said, heaving a sigh".
GIVING = "giving letting_out heaving uttering releasing breathing forcing emitting drawing"
# Before "out" or "into" the sound: "burst out laughing", "dissolved into giggles".
BURSTS = "burst bursts broke breaks fell dissolved collapsed erupted exploded"
# Before "with laughter".
ROARED = "roared howled shook shrieked screamed"

# May stand beside the verb, as most words in -ly: "she still laughed", "slowly he sighed".
ADVERBS = "just then still even again both all also soon now too at_last"
# Before -ly: they say that there was no sound, or that nobody heard it.
NOT_REALLY = "near hard bare scarce inward silent mental practical virtual on"
# Whose: "a sigh in her voice", "gave his short laugh".
OWNERS = "his her their my"
# Before somebody or something: "the old man", "our uncle".
DETERMINERS = f"the an? {OWNERS} our"
# No adjectives between a determiner and its person: "the house of her brother" is nobody.
BREAKS = "of where who which that and when in with on at for to from by"
# Who may speak, and so make a sound. Most trades and many others end as the last entry says.
PERSON = r"""
    \w*(?:man|woman|men|women|boys?|girls?|child|children|mother|father|sister|brother) lady
    gentleman gentlemen king queen prince nurse judge thief cook clerk monk nun priest guard guide
    aunt uncle cousin niece nephew friends? wife husband son lad lass twins? bride groom host guest
    butler maid servant pupil student parent dad mum mom nan gran grandpa grandma giant dwarf elf
    witch wizard knight squire monarch chief colonel general corporal major lieutenant cop pilot
    coach boss crowd audience class others couple pair stranger patient assistant merchant sergeant
    duke count baron widow orphan kids? people villain hero rogue fool clown duchess youth elder
    captain abbot bishop neighbou?r \w{2,}(?:er|or|ist|ess|ian|eer|ee)s?"""
# Sigh and sing without speaking; many end as a trade does.
THINGS = """
    river water weather thunder tower boiler heater motor radiator tractor computer shutters? letter
    paper winter summer fever corner timber leather power elevator generator mower speaker
    loudspeaker printer cooker burner steamer doors? floor mirror trees? coffee air winds? leaves
    waves pines rain engine brakes pipes kettle silence theatre theater brook stream night darkness
    grass curtains? chair sofa bed mattress house thing something it nothing train bus car ship
    world sea ocean birds?"""
# Before a dot that ends no sentence, and a name.
SHORT_TITLES = "Mr Mrs Ms Dr St"
# Before a name.
TITLES_OF_NAMES = f"{SHORT_TITLES} Prof Capt Sgt Lt Col Rev"
# Have a capital at a sentence's start, and are no names.
NOT_NAMES = r"""
    The An? And But Or So Then When While As If Because After Before Until Unless Though That
    Although This These Those There Here Nobody No None Neither Nothing Something Nor Not Never
    Everything It Its What Who Why How Where Had Did Was Were Would Could Has Have Is Are Do Does
    With Without In On At By For From To Of All Some Few Many Most Both Each Her His My Our Their
    Your Yes Well Oh Only Even Almost Nearly Hardly Perhaps Maybe Once Now Still Again Suddenly
    Finally Somewhere Outside Every Someone Somebody Anyone Anybody People Laughter One Another
    Others \w+ing \w+ly"""
# At a subject's end: it is many people, whose laugh is [laughter].
MANY = "crowd audience class others children men women boys girls people friends twins"
# Tell that somebody speaks: who says the line makes its sound.
SAID = """
    said says say asked asks cried cries answered replied told whispered muttered added called
    shouted began continued went_on declared exclaimed repeated murmured returned agreed admitted
    explained remarked observed demanded announced"""
# In a clause, before its verb: the sound was not made, or not now, or not by whom it tells of.
DENIES = """
    not never nobody none neither nor no without hardly barely scarcely almost nearly had would
    could might should must did if unless whether that how who whom whose which what where why when
    whenever until till before after once because though although like than heard saw watched
    remembered remembers imagined thought knew wished hoped supposed claimed swore felt noticed
    wanted tried refused pretended expected feared dreamed made makes let time perhaps maybe
    supposedly"""
# Anywhere in a sentence: it tells of another place than the line's.
ELSEWHERE = """
    somewhere elsewhere outside upstairs downstairs next_door in_the_distance
    on_the_(?:radio|television|screen|record|tape)"""
# Right after the sound: nobody heard it, or no person made it.
UNHEARD = r"""
    inwardly silently mentally internally in_(?:his|her|my)_(?:head|sleep|mind|dreams?) off\b
    of_(?:the|its|air|gas|steam|wind|water|escaping|hot|cold)\b"""
# Right after "laughing", as after a comma or nothing; else it may be no participle: "laughing gas".
AFTER_PARTICIPLE = r"""
    \w+ly and at again with as so too in into to through for hard out till until despite aloud but
    from about now"""


# -----------------------------------------------------------------------------
# Asides: what stands between stars, lines and brackets: said loudly, plainly or not at all
#
# A direction is not for speaking. It is one only if it stands aside (alone on its line, at the
# start or the end of a message, before or after a whole sentence) *and* reads like one; inside a
# clause or in a list its words are the author's, and so is whatever stands in two stars. Emphasis
# is for a few words inside a clause; names, titles and what stands first are spoken plainly. In
# doubt, so is everything. What was meant for emphasis or as a cue is noted in the script; Placement
# makes of it what Bark knows. Patterns have examples above them as in the section on grammar.

EMPHATIC_WORDS = 3  # most words in capitals at once: more would be shouted, and Bark loses them
SPEAKER_SIGNS = ("MAN", "WOMAN")  # in brackets they bias Bark's voice


def held(sign: str) -> str:
    """What stands between two signs: from a word to no blank, within a paragraph."""
    return rf"(?=[\"“‘'(\[]?[^\W_])(?:[^{sign}\n]|\n(?=[^\n])){{1,300}}(?<!\s)"


# Letters that stand side by side in one word, as Chinese and Japanese signs do not.
# takes: "é"  not: "字"
JOINED = rf"[^\W{HAN}ぁ-ヿ]"
ASIDES = {
    # takes: "[sighs]"  not: "a[i], [1]"
    "bracket": r"(?<!\w)\[(?=[^\[\]\n]{0,60}[^\W\d_])[^\[\]\n]{2,120}\]",
    # takes: "(sighs)"  not: "boy(s), f(xy)"
    "round": r"(?<!\w)\([^()\n]{2,120}\)",
    # takes: "**very** well"  not: "a ** b, 2**3**4, *one*"
    "bold": rf"(?<![*/\\`])(?<!{JOINED})(?P<mark>\*{{2,3}}){held('*')}(?P=mark)(?![\d*])"
            r"|(?<![\w/\\`.(])__(?!(?:init|main|name|file|doc|all|dict|class|str|repr|call|new|len"
            rf"|iter|next|enter|exit|version)__){held('_')}__(?![\w(/])",
    # takes: "*very* well"  not: "2*3*4, * one, *.txt and *args"
    "stars": rf"(?<![*/\\`])(?<!{JOINED})\*{held('*')}\*(?!\*)(?!{JOINED})",
    # takes: "_very_ well"  not: "snake_case_name, __init__, f(_x_), `_y_`"
    "under": rf"(?<![\w/\\`.])(?<!\w\()_{held('_')}_(?![\w(/])",
}
# takes: "*a*"  not: "a"
ASIDE_RE = re.compile("|".join(f"(?P<{kind}>{signs})" for kind, signs in ASIDES.items()))
# takes: " sadly"  not: " sad"
MANNER = rf"\s+{one_of(MANNERS)}"
# takes: "slowly "  not: "slow "
ADVERB_FIRST = r"(?:\w+ly\s+)?"
# takes: "He sighs with relief."  not: "sighs of relief"
DIRECTION_RE = re.compile(r"(?:(?:he|she|they|i|we)\s+)?" + ADVERB_FIRST + "(?:" + "|".join(
    f"(?P<verb_{n}>{one_of(acts.verbs)})|(?P<other_{n}>{one_of(acts.others)})"
    for n, acts in enumerate(ACTS)) + rf")(?:{MANNER}){{0,2}}[.!]?", re.I)
# takes: "laughs and nods"  not: "leans over and laughs"
FIRST_VERB_RE = re.compile(ADVERB_FIRST + "(?:" + "|".join(
    f"(?P<verb_{n}>{one_of(acts.verbs)})" for n, acts in enumerate(ACTS)) + r")\b", re.I)
# takes: "slowly leans closer"  not: "leaning"
BODILY_RE = re.compile(rf"{ADVERB_FIRST}{one_of(inflected(BODILY, 's'))}(?:\W.*)?", re.I | re.S)
# takes: "turns to the window"  not: "runs on Windows"
MOVES_RE = re.compile(rf"{ADVERB_FIRST}{one_of(inflected(DOES, 's'))}\s+(?:\w+\s+)?"
                      rf"{one_of(SOMEWHERE)}\b.*", re.I | re.S)
# takes: "takes a seat"  not: "looks great"
DOES_RE = re.compile(rf"{ADVERB_FIRST}{one_of(inflected(DOES, 's'))}\b"
                     rf"(?!\s+{one_of(JUDGES)}\b).*", re.I | re.S)
# takes: "comes with batteries"  not: "comes in"
OF_THINGS_RE = re.compile(r"^\w+ (?:with|as|by|of|from|until|between)\b")
# takes: "sashays over"  not: "heads up"
UNKNOWN_RE = re.compile(rf"(?!{one_of(NO_VERBS)}\b)[a-z]{{3,20}}s\s+"
                        r"(?:away|closer|back|over|around|his|her|their|my|your)\b.*", re.S)
# takes: "leaning closer"  not: "leans closer"
GOING_RE = re.compile(rf"{ADVERB_FIRST}{one_of(inflected(f'{BODILY} {DOES}', 'ing'))}\b.*",
                      re.I | re.S)
# Whether a sentence or a line has come to its end.
# takes: "Oh!”"  not: "Oh,"
ENDED_RE = re.compile(r"(?:[.!?…。！？♪][\"”’'»)\]*_]*|[,—–-][\"”’»]|[^\w\s!-~–—“‘«„’,])$")
# takes: "ANNA:"  not: "she said:"
SPEAKER_LABEL_RE = re.compile(r"^[\s\"“]{0,9}[A-Z][\w .'’-]{0,30}:$")
# takes: "he said, “"  not: "“No”"
OPENED_RE = re.compile(r"(?:\A|[\s(])[\"“„«‘']$")
# takes: "Then she"  not: "Then Tom"
WANTS_MORE_RE = re.compile(rf"\b{one_of(WANTS_MORE)}$", re.I)
# takes: "Then she"  not: "Then Tom"
SUBJECT_BEFORE_RE = re.compile(rf"\b{one_of(BEFORE_VERB)}$", re.I)
# takes: "Never"  not: "Dune"
NOT_NAME_RE = re.compile(one_of(f"{NOT_NAMES} {either_case(BEFORE_VERB)}"))
# takes: "The old man"  not: "Well"
NAME_BEFORE_RE = re.compile(rf"\b(?:{one_of(either_case(DETERMINERS))}(?: \w+){{1,2}}"
                            rf"|(?!{one_of(NOT_NAMES)}$)[A-Z][a-z]+)$")
# takes: " at it"  not: ", at it"
GOES_ON_RE = re.compile(rf"\s+{one_of(AFTER_VERB)}\b")
# takes: ", so"  not: " So"
CONTINUES_RE = re.compile(r",?\s+(?=[^\W\d_])(?-i:[^A-ZÀ-ÖØ-ÞΑ-ΩА-Я])")


class Aside:
    """What stands between two signs of a text, and what stands around it."""

    def __init__(self, text: str, match: re.Match[str], follows: bool):
        """`follows`: nothing but blanks lies between it and a direction."""
        self.text, self.kind, self.follows = text, str(match.lastgroup), follows
        self.start, self.end = match.span()
        self.width = 1 if self.kind != "bold" else len(match["mark"] or "__")
        self.inner = match[0][self.width : -self.width]
        self.words = self.inner.strip(" *_()[]\n")
        self.marked = self.kind in ("stars", "under")

    @cached_property
    def _line(self) -> tuple[str, bool]:
        """What stands before it, and whether it starts its line: then that is the line above."""
        head, broken, tail = self.text[max(0, self.start - 40) : self.start].rpartition("\n")
        if tail.strip():
            return tail, False
        return (head.rpartition("\n")[2] if broken else ""), True

    @cached_property
    def before(self) -> str:
        return self._line[0].rstrip()

    @cached_property
    def rest(self) -> str:
        """What follows it in its line."""
        return self.text[self.end : self.end + 60].partition("\n")[0].rstrip()

    @cached_property
    def is_first(self) -> bool:
        """Whether a message, a speech or a sentence starts with it."""
        return bool(self.follows or not self.before or ENDED_RE.search(self.before[-8:])
                    or OPENED_RE.search(self._line[0][-2:]))

    @cached_property
    def goes_on(self) -> bool:
        """Whether its clause goes on after it."""
        return bool(GOES_ON_RE.match(self.rest) or self.rest.lstrip()[:1] in tuple(",;:-)]&/"))

    def cue(self) -> str | None:
        """The cue for a direction, "" for one that Bark has none for, None for no direction."""
        cue = self._asked
        return cue if cue is not None and self._stands_aside() and not self._in_column() else None

    @cached_property
    def _asked(self) -> str | None:
        """The same by its words alone."""
        if self.kind == "bold" or not self.words or not self.words[0].isalpha():
            return None
        if match := DIRECTION_RE.fullmatch(self.words):
            kind, _, index = str(match.lastgroup).partition("_")
            title = self.marked and self.words[0].isupper() and " " not in self.words
            return None if title and kind == "other" else ACTS[int(index)].cue
        if not self._is_action():
            return None
        sound = FIRST_VERB_RE.match(self.words)
        return ACTS[int(str(sound.lastgroup).partition("_")[2])].cue if sound else ""

    def _is_action(self) -> bool:
        """Whether it has a verb in the third person and no subject; in stars also in -ing."""
        words = self.words.split()
        capital = self.words[0].isupper()
        if capital and (len(words) == 1 or any(word[0].isupper() for word in words[1:])):
            return False
        if any(char.isdigit() or char in "\"“”" for char in self.words):
            return False
        patterns = [BODILY_RE, MOVES_RE, *((DOES_RE, UNKNOWN_RE, GOING_RE) if self.marked else ())]
        plain = self.words == self.words.lower() and not OF_THINGS_RE.search(self.words)
        if plain and self._line[1]:  # in brackets after a sentence it may tell of a thing
            patterns.append(DOES_RE)
        return any(pattern.fullmatch(self.words) for pattern in patterns)

    def _stands_aside(self) -> bool:
        if self._line[1] and not self.rest.strip(" .!…"):
            return True  # alone on its line
        if self.is_first:
            return not self.goes_on and (not self.rest or self.rest[0] not in "\"”’»'")
        if self.before.endswith(":") and SPEAKER_LABEL_RE.match(self.before):
            return self.rest[:1] == " " and self.rest.lstrip()[:1] not in "[(*"
        if self.before[-1] in "—–" and self.rest.lstrip()[:1].isupper():
            return True
        return self._is_last() and not self._is_wanted()

    def _is_last(self) -> bool:
        """Whether a message or a speech ends with it, and not its sentence alone."""
        if self.rest:
            return self.rest[0] in "\"”" and self.text[self.start - 1] == " "
        after = self.text[self.end : self.end + 80].lstrip(" \t\r")
        return after[:1] == "" or not after[1:].partition("\n")[0].strip()

    def _is_wanted(self) -> bool:
        """Whether what stands before it wants it for the clause, as its subject does."""
        return bool(self.before[-1] in ",;:-(" or WANTS_MORE_RE.search(self.before[-12:])
                    or NAME_BEFORE_RE.search(self.before))

    def _in_column(self) -> bool:
        """Whether the line above or below is such an aside and no direction: a list of names."""
        if not self._line[1] or self.rest:
            return False
        above = self.text[max(0, self.start - 80) : self.start].rstrip(" \t")
        below = self.text[self.end : self.end + 80].lstrip(" \t\r")
        lines = (above[:-1].rpartition("\n")[2], below[1:].partition("\n")[0])
        sign, other = self.text[self.start], self.text[self.end - 1]
        inner = [line.strip()[1:-1] for line in lines
                 if len(line.strip()) > 2 and line.strip()[0] == sign and line.strip()[-1] == other]
        acts = (DIRECTION_RE, BODILY_RE, DOES_RE, GOING_RE)
        return any(not any(act.fullmatch(words) for act in acts) for words in inner)

    def is_emphatic(self, listed: bool) -> bool:
        """Whether capitals say what the signs do: for a few words inside a clause, and no name."""
        words = self.words.split()
        if len(words) > EMPHATIC_WORDS or self.words.endswith(":") or self.inner[0] in "([":
            return False
        if any(word[0].isupper() and word != "I" for word in words):
            common = len(words) == 1 and (
                NOT_NAME_RE.fullmatch(self.words) or self._asked is not None)
            return bool(common and self.is_first and self._continues())
        if self.is_first:
            return len(words) == 1 and self._continues() and not listed
        subject = SUBJECT_BEFORE_RE.search(self.before[-12:]) or NAME_BEFORE_RE.search(self.before)
        return bool(subject or self.goes_on or self._asked is None)

    def _continues(self) -> bool:
        """Whether its sentence has more words after it."""
        return CONTINUES_RE.match(self.rest) is not None


def look_for_asides(script: Script) -> list[Edit]:
    """Edits that leave out directions, and take the signs off emphasis and words in brackets."""
    text, edits, pos, gone = script.text, [], 0, -1
    while match := ASIDE_RE.search(text, pos):
        (start, end), pos = match.span(), match.start() + 1  # the next may stand inside
        if match[0] in CUES or script.keeps(start) or script.keeps(end - 1):
            continue
        aside = Aside(text, match, gone >= 0 and not text[gone:start].strip())
        listed = script.lists(start)
        cue = None if listed else aside.cue()
        if cue is not None:
            edits.append(without(text, start, end, edits))
            script.direct(start, end, edits[-1].start, cue)
            pos = gone = max(end, edits[-1].end)
        elif aside.kind != "round" and aside.words not in SPEAKER_SIGNS:
            edits += Edit(start, start + aside.width, ""), Edit(end - aside.width, end, "")
            if aside.kind != "bracket" and aside.is_emphatic(listed):
                script.emphases.append((start + aside.width, end - aside.width))
    return edits


def without(text: str, start: int, end: int, edits: list[Edit]) -> Edit:
    """Takes out text[start:end] and a blank beside it that is not gone yet."""
    if start == 0 or text[start - 1] in " \n":
        while text[end : end + 1] in (".", "!", "…") and text[start - 2 : start - 1] != ",":
            end += 1
    if text[end : end + 1] == " " and not text[max(0, start - 1) : start].isalnum():
        end += 1
    elif text[max(0, start - 1) : start] == " " and (not edits or edits[-1].end < start):
        start -= 1
    return Edit(start, end, "")


def read_asides(script: Script, cues: bool) -> None:
    """Emphasis and directions; for a model that has no `cues`, those that are typed are these."""
    for _ in range(3):  # one may stand in another
        if not (edits := look_for_asides(script)):
            break
        script.change(edits, "aside")
    edits = []
    for match in TYPED_CUE_RE.finditer("" if cues else script.text):
        edits.append(without(script.text, *match.span(), edits))
        script.direct(*match.span(), edits[-1].start, "")
    script.change(edits, "aside")


def read(text: str, language: str, cues: bool = True) -> Script:
    """A request's text as a person reads it aloud, for a voice's language (two letters).

    `cues` says whether the model has a sound for Bark's.
    """
    script, stop = Script(text), FULL_STOP.get(language.lower(), ".")
    named = read_marked_lines(script, stop)
    read_code(script)
    read_links(script, named)
    read_addresses(script)
    read_tags(script, stop)
    read_entities(script)
    read_asides(script, cues)
    script.change(Edit(*end) for end in spoken_line_ends(script.text, language.lower()))
    return script


# -----------------------------------------------------------------------------
# Grammar: how an author's signs and narration ask for a sound, as patterns of the lexicon's words
#
# Above each pattern stand a text that it takes and one that it must not, and the tests try both:
# with a name in _RE as the worker asks it (at the text's start where that is by `match`, the whole
# of it where by `fullmatch`, else anywhere), and a part of patterns as a whole. First come the
# signs, read in every language, then narration, which says beside a quotation how it is spoken.
# The functions put patterns together; `narrated_cue` is what is asked of a sentence. A cue too few
# is missed by nobody, a wrong one is heard: in doubt the answer is no.

# Signs. Markup is of the first kind that fits.

# takes: "é"  not: "7"
LETTER = r"[^\W\d_]"


MARKUP = {
    # From note to note within a paragraph; an unclosed one lasts to the end of its line.
    # takes: "♪ La la"  not: "La la"
    "lyric": r"[♩-♬]+(?:[^♩-♬\n]|\n(?=[^\S\n]*\S))+[♩-♬]+|[♩-♬]+[^♩-♬\n]*",
    # takes: "was--well"  not: "--help, 1990--1995, x - y, 10–12, well-known"
    "dash": rf"(?<={LETTER})--{{1,2}}(?={LETTER}|[\"”’')\s]|$)"
            rf"|(?<=[,.!?\"”’])--{{1,2}}(?={LETTER}|[\"”’\s]|$)"
            r"|(?<=[\w,.!?\"”’)*][ \n])--{1,2}(?=[ \n\"“])"
            rf"|(?<=[\"“])--{{1,2}}(?={LETTER})"
            rf"|(?<={LETTER}{{2}} )-(?= (?:{LETTER}{{2}}|[IAa]\b))"
            rf"|(?<={LETTER}[ ,])–(?=\s)|(?<=[^\W_])–(?=[\"”’\s]|$)",
    # takes: "No . . . yes"  not: "No... yes"
    "dots": r"…+|(?<!\.)\.(?:[ \u00a0]\.){2,3}(?![ \u00a0]?\.)",
}
# takes: "..…"  not: "a"
MARKUP_RE = re.compile("|".join(f"(?P<{kind}>{signs})" for kind, signs in MARKUP.items()))
# takes: "é"  not: "_"
WORD_RE = re.compile(r"[^\W_]+")
# Where a cue needs a blank before or after it.
# takes: "o,"  not: ' "'
CUE_LEFT_RE = re.compile(r"(?<!\A)(?<!\s)[\"']\Z|[^\s\"'“‘«(—]\Z")
# takes: '"Oh'  not: '" he'
CUE_RIGHT_RE = re.compile(r"[\w“‘«(]|[\"'](?=\w)")
# takes: "“"  not: "it’s"
QUOTE_MARK_RE = re.compile(r"[\"“”]")
# takes: "'No"  not: "it's"
APOSTROPHE_RE = re.compile(r"(?<!\w)['‘](?=\w)|(?<=[,.!?…—-])['’](?!\w)")
# takes: "No. He"  not: "Mr. Finch"
SENTENCE_END_RE = re.compile(
    "".join(rf"(?<!\b{title})" for title in SHORT_TITLES.split()) + r"(?<!\b[A-Z])[.!?…]+(?=\s|$)")
# takes: "he said, and sat"  not: "he said, sand"
NEXT_CLAUSE_RE = re.compile(r",?\s+and\b")
# takes: "Well, no"  not: "1,000"
CLAUSE_END_RE = re.compile(r"[,;:.!?…—–][\"”’')\]]*\s+|\s(?=[\"“‘«(])")

# Narration: whose sound. A finite verb needs its subject beside it, an adjunct one in its sentence.

# takes: "all of them"  not: "all of it"
EVERYBODY = one_of(either_case("everyone everybody they_all we_all all_of_(?:them|us)"))
# takes: "the old nurse"  not: "the old tower"
SOMEBODY = (rf"{one_of(either_case(f'{DETERMINERS} your'))}"
            rf"(?:\s+(?!{one_of(BREAKS)}\b)[\w'’-]+){{0,2}}"
            rf"\s+(?!{one_of(THINGS)}\b){one_of(PERSON)}")
# takes: "O’Neil"  not: "Tom’s"
CAPITALIZED = r"[A-ZÀ-ÖØ-Þ](?:[\w-]|['’](?!s\b))*"
# takes: "Mrs. Ana Finch"  not: "Suddenly"
NAME = (rf"(?:{one_of(TITLES_OF_NAMES)}\.\s+)?(?!(?:{one_of(NOT_NAMES)}|(?i:{one_of(THINGS)}))\b)"
        rf"{CAPITALIZED}(?:\s+{CAPITALIZED}){{0,2}}")
# takes: "our uncle"  not: "nobody"
SUBJECT = f"(?:{EVERYBODY}|{one_of(either_case('he she they we you'))}|I|{SOMEBODY}|{NAME})"
# takes: "slowly"  not: "hardly"
ADVERB = rf"(?:(?!{one_of(NOT_REALLY)}ly\b)\w+ly|{one_of(ADVERBS)})"
# takes: "said the man"  not: "Tom’s dog and the man’s"
SUBJECT_RE = re.compile(rf"\b{SUBJECT}(?!['’]s?\b)\b")
# takes: "Then the man slowly "  not: "Then the tower slowly "
SUBJECT_LAST_RE = re.compile(rf"(?:^|(?<=[\s,;:—]))({SUBJECT}),?\s+(?:(?:{ADVERB}),?\s+){{0,2}}$")
# takes: " the nurse"  not: " the kettle"
SUBJECT_NEXT_RE = re.compile(rf"\s+{SUBJECT}\b")
# takes: "and Tom left"  not: "and left Tom"
ANOTHER_RE = re.compile(rf"\b(?:and|but|as|while|when)\s+({SUBJECT})\s+\w")
# takes: "all the boys"  not: "all the time"
GROUP_RE = re.compile(rf"{EVERYBODY}|[Tt]hey|[Ww]e|.*\b{one_of(MANY)}$", re.S)
# takes: "he went on"  not: "he sat"
SAID_RE = re.compile(rf"\b{one_of(SAID)}\b")
# takes: "Then Tom said"  not: "Then Tom sat down"
LEADS_IN_RE = re.compile(rf"(?:[,:.!?…—]|\b{one_of(SAID)})$")
# takes: "Tom softly said"  not: "said Tom"
SPEAKER_RE = re.compile(rf"\b({SUBJECT})\s+(?:{ADVERB}\s+)?{one_of(SAID)}\b")
# takes: " boomed the giant"  not: " went the giant"
TAG_RE = re.compile(rf"\s*[a-z]+ed\s+{one_of(DETERMINERS)}\s+[a-z]")

# Narration: which sound, and whether it was made.

# takes: " long, weary "  not: " of weary "
ADJECTIVES = r"(?:\s+(?!(?:of|like|that|who)\b)[\w'’-]+,?){0,3}\s+"
# takes: "his short "  not: "the short "
SUCH_A = rf"{one_of(f'an? another one {OWNERS}')}{ADJECTIVES}"


def finite(sound: Sound) -> str:
    """A verb that has the sound in it, or for its object or complement."""
    told, base, going, noun = map(one_of, sound[1:])
    return (rf"{told}|(?<=\b[Ii]\s){base}|(?<=\b[Ww]e\s){base}|(?<=\b[Tt]hey\s){base}"
            rf"|{one_of(GIVES)}\s+{SUCH_A}{noun}|{one_of(ROARED)}\s+with\s+{noun}ter"
            rf"|{one_of(BURSTS)}\s+(?:out|into)\s+(?:{going}|{SUCH_A}{noun}s?|laughter|giggles)"
            rf"|(?:began|begins|started|starts)\s+(?:to\s+{base}|{going})|(?:kept|keeps)\s+{going}"
            rf"|(?:could\s+not|couldn['’]t|can['’]t)\s+help\s+(?:{going}|but\s+{base})"
            rf"|had\s+to\s+{base}|(?:was|were|is|are|am)(?:\s+{ADVERB})?\s+{going}")


def adjunct(sound: Sound) -> str:
    """What stands beside the verb that tells: "laughing", "with a sigh", "laughter in my voice"."""
    _, _, going, noun = map(one_of, sound[1:])
    voice = rf"in\s+{one_of(OWNERS)}\s+voice"
    return (rf"{going}|{one_of(GIVING)}\s+{SUCH_A}{noun}"
            rf"|(?:with|on|in)\s+{SUCH_A}(?:(?:sort|kind)\s+of\s+)?{noun}"
            rf"|(?:between|through)\s+(?:\w+\s+)?{noun}(?:s|ter)"
            rf"|(?:a|the){ADJECTIVES}{noun}\s+{voice}|(?:with\s+)?{noun}ter\s+{voice}")


# takes: "She burst out laughing."  not: "A laughing-stock smiled."
SOUND_RE = re.compile(r"\b(?:" + "|".join(
    rf"(?P<finite_{n}>{finite(sound)})|(?P<adjunct_{n}>(?i:{adjunct(sound)}))"
    for n, sound in enumerate(SOUNDS)) + r")(?![\w-])")
# Whether a paragraph is worth reading for sounds.
# takes: "chortling."  not: "She smiled."
TOLD_RE = re.compile(one_of(f"{inflected(LAUGHS, '')} sigh gasp throat sang sing croon"), re.I)
# takes: "A short laugh escaped her."  not: "A prisoner escaped her."
ESCAPED_RE = re.compile(rf"\s*(?:A|An|Another){ADJECTIVES}(?P<noun>{one_of(LAUGHS)}|sigh|gasp)"
                        r"\s+(?:escaped|slipped\s+from|broke\s+from|came\s+from)\s+"
                        r"(?:(?:his|her|my)\s+(?:lips|throat|mouth)|him|her|me|[A-Z]\w+)\b")
# takes: "he rose, then slowly "  not: "he rose "
AND_LAST_RE = re.compile(rf"(?:\b(?:and|then|but)|,)\s+(?:{ADVERB}\s+){{0,2}}$")
# takes: "he said, still "  not: "he was "
COMMA_LAST_RE = re.compile(
    rf"(?:^|[,;—]|\b(?i:while|still|already|half|and))\s*(?:{ADVERB}\s+)?$")
# takes: "laughing"  not: "with a laugh"
PARTICIPLE_RE = re.compile(r"\w+ing\b")
# takes: " at him"  not: " gas"
PARTICIPLE_GOES_ON_RE = re.compile(rf"\s*(?:[,.;:!—…]|$)|\s+{one_of(AFTER_PARTICIPLE)}\b")
# Will and May, with a capital, may be who speaks.
# takes: "she didn’t"  not: "Will sighed"
DENIED_RE = re.compile(rf"n['’]t\b|\b(?:will|may)\b|\b(?i:{one_of(DENIES)})\b")
# takes: "Upstairs, Tom sighed."  not: "Tom sighed on the stairs."
ELSEWHERE_RE = re.compile(rf"\b(?i:{one_of(ELSEWHERE)})\b")
# takes: " in his sleep"  not: " in his chair"
UNHEARD_RE = re.compile(rf"\s+{one_of(UNHEARD)}")


def narrated_cue(narration: str, trailing: bool) -> str | None:
    """The cue for the line that the narration before it, or with `trailing` after it, tells of."""
    if narration.rstrip().endswith("?") or ELSEWHERE_RE.search(narration):
        return None
    if match := ESCAPED_RE.match(narration):
        return next(s.cue for s in SOUNDS if re.fullmatch(one_of(s.noun), match["noun"]))
    for match in SOUND_RE.finditer(narration):
        kind, _, index = str(match.lastgroup).partition("_")
        left, right = narration[: match.start()], narration[match.end() :]
        if UNHEARD_RE.match(right):
            continue
        if kind == "adjunct":
            subject = adjunct_subject(left, match[0], right, trailing)
        else:
            subject = finite_subject(left, right, trailing)
        if subject:
            cue = SOUNDS[int(index)].cue
            return "[laughter]" if cue == "[laughs]" and GROUP_RE.fullmatch(subject) else cue
    return None


def finite_subject(left: str, right: str, trailing: bool) -> str | None:
    """Who did what the verb between `left` and `right` says, if it is the line's speaker."""
    if not re.search(r"\w", left):  # "...," sighed Tom
        match = SUBJECT_NEXT_RE.match(right) if trailing else None
        return match[0].strip() if match else None
    if match := SUBJECT_LAST_RE.search(left, max(0, len(left) - 80)):
        before = left[: match.start(1)]
        told = before if trailing else right
        besides = not GROUP_RE.fullmatch(match[1]) and speaks_besides(match[1], told, trailing)
        return None if besides or DENIED_RE.search(before.rpartition(",")[2]) else match[1]
    subject = SUBJECT_RE.search(left) if AND_LAST_RE.search(left) else None
    return subject[0] if subject and not DENIED_RE.search(left) else None


def speaks_besides(subject: str, told: str, inverted: bool) -> bool:
    """Whether somebody else speaks there; `inverted` also finds it as "said Tom"."""
    if match := SPEAKER_RE.search(told):
        return match[1].lower() != subject.lower()
    return inverted and SAID_RE.search(told) is not None


def adjunct_subject(left: str, phrase: str, right: str, trailing: bool) -> str | None:
    """Whom "laughing" or "with a sigh" tells of, if it is the line's speaker."""
    if PARTICIPLE_RE.match(phrase) and not (
            COMMA_LAST_RE.search(left) and PARTICIPLE_GOES_ON_RE.match(right)):
        return None
    other = ANOTHER_RE.search(left)
    if DENIED_RE.search(left) or (
            other and speaks_besides(other[1], left[: other.start()], inverted=True)):
        return None
    near = left if trailing else left + right  # whatever speaks there is somebody
    subject = SUBJECT_RE.search(near) or SAID_RE.search(near) or TAG_RE.match(near)
    return subject[0] if subject else None


# -----------------------------------------------------------------------------
# Placement: cues, capitals and dashes in a text whose words stay the author's
#
# `Markup` and `Narration` read a text and find edits (what is spoken for `text[start:end]`) and
# wishes (a cue, and where it may stand). `Expression` hands these to the segments, as far as they
# have room, and each `SpokenSegment` applies its own, last and together. Then it compares words:
# where they are not the author's in their order, the plain text is spoken, so that a mistake in
# the grammar costs an expression and never a word. Positions are those of the script.

CUES_A_SEGMENT, CUES_A_PARAGRAPH = 1, 2
MAX_NARRATION = 300  # characters of a sentence that is asked how a line is spoken
HESITATION = {"dash": "—", "dots": "..."}  # as Suno writes it
UNSPACED_DOTS = ("zh", "ja")  # have …… and —— as marks of their own


class Wish(NamedTuple):
    """A cue for the segment of the character `anchor`, best at `at`, else from `low` to `high`."""

    anchor: int
    at: int
    low: int
    high: int
    cue: str


class Markup:
    """What an author's signs ask for: edits that do not overlap, in order, and wishes for cues."""

    def __init__(self, script: Script, language: str):
        self.script, self.language = script, language
        self.edits: list[Edit] = []
        self.lyrics: list[Stretch] = []
        # Where the author's own cues stand.
        self.typed = [match.start() for match in TYPED_CUE_RE.finditer(script.text)]
        self.wishes = [Wish(at, at, at, at, cue) for at, cue, _ in script.directions if cue]
        for match in MARKUP_RE.finditer(script.text):
            self._read(*match.span(), str(match.lastgroup))
        self.edits += [Edit(start, end, capitals(script.text[start:end], language))
                       for start, end in script.emphases if not self.sings(start)]

    def _read(self, start: int, end: int, kind: str) -> None:
        if kind == "lyric":
            self.lyrics.append((start, end))
        elif self.language not in UNSPACED_DOTS and not self.script.keeps(start):
            self.edits.append(Edit(start, end, HESITATION[kind]))

    def sings(self, pos: int) -> bool:
        return is_within(self.lyrics, pos)


def capitals(text: str, language: str) -> str:
    return (text.replace("i", "İ") if language == "tr" else text).upper()


class Quotation(NamedTuple):
    start: int
    end: int


def quotations(text: str, start: int, end: int) -> list[Quotation]:
    """What stands in double quotation marks in a paragraph; in single ones where none are double.

    An unclosed one lasts to the paragraph's end, as a speech of several paragraphs is written; an
    unclosed single one is an apostrophe.
    """
    double = QUOTE_MARK_RE.search(text, start, end)
    marks = (QUOTE_MARK_RE if double else APOSTROPHE_RE).finditer(text, start, end)
    found, opened = [], -1
    for match in marks:
        opens = text[match.end() : match.end() + 1].isalnum() if not double else match[0] == "“"
        if opened < 0 or opens:
            opened = match.start() if match[0] != "”" and (double or opens) else -1
        else:
            found.append(Quotation(opened, match.end()))
            opened = -1
    if double and opened >= 0:
        found.append(Quotation(opened, end))
    return found


class Narration:
    """Wishes for cues, from what one paragraph's narration says of its quotations. In English."""

    def __init__(self, text: str, start: int, end: int):
        self.text, self.start, self.end = text, start, end
        self.quotes = quotations(text, start, end)

    def wishes(self) -> Iterator[Wish]:
        done = self.start
        for index, quote in enumerate(self.quotes):
            past = self._past(quote)
            if cue := self._cue_before(quote, done):
                yield Wish(quote.start, quote.start, quote.start, past, cue)
            done = quote.end
            following = self.quotes[index + 1].start if index + 1 < len(self.quotes) else self.end
            told = self._told_after(quote, following)
            if cue := narrated_cue(told, True):
                yield Wish(quote.end - 1, past, quote.start, past, cue)
                done += len(told)

    def _past(self, quote: Quotation) -> int:
        end = quote.end
        while end < self.end and self.text[end].isspace():
            end += 1
        return end

    def _cue_before(self, quote: Quotation, start: int) -> str | None:
        """What the last sentence before a quotation says of it."""
        told = self.text[max(start, quote.start - MAX_NARRATION) : quote.start].rstrip()
        ends = [match.end() for match in SENTENCE_END_RE.finditer(told) if match.end() < len(told)]
        sentence = told[ends[-1] if ends else 0 :]
        return narrated_cue(sentence, False) if LEADS_IN_RE.search(sentence) else None

    def _told_after(self, quote: Quotation, following: int) -> str:
        """What tells of a quotation in the sentence after it; nothing if that tells of the next."""
        text, last = self.text, self.text[quote.end - 2]
        end = min(following, quote.end + MAX_NARRATION)
        match = SENTENCE_END_RE.search(text, quote.end, end)
        if last not in ",.!?…—–-;" or (match is None and end < following):
            return ""
        told = text[quote.end : match.end() if match else end]
        if following == self.end or text[quote.end + len(told) : following].strip():
            return told
        if last != "," and told.lstrip()[:1].isupper():
            return ""
        return NEXT_CLAUSE_RE.split(told, maxsplit=1)[0]


def folded_words(text: str) -> list[str]:
    """A text's words without Bark's cues, capitals and small letters alike, Turkish ones too."""
    folded = unicodedata.normalize("NFKD", TYPED_CUE_RE.sub(" ", text).casefold())
    return WORD_RE.findall(folded.replace("\u0307", "").replace("ı", "i"))


def keeps_words(written: str, spoken: str) -> bool:
    """Whether the author's words, and no others, are spoken in their order."""
    return folded_words(written) == folded_words(spoken)


class SpokenSegment:
    """One span on its way to Bark: the author's slice, and what is changed in it."""

    def __init__(self, text: str, span: Span):
        self.text, self.span = text, span
        self.edits: list[Edit] = []
        self.cues = 0

    def add(self, edit: Edit) -> None:
        """Takes an edit that lies in the span but for blanks."""
        start, end = max(edit.start, self.span.start), min(edit.end, self.span.end)
        if not (self.text[edit.start : start] + self.text[end : edit.end]).strip():
            self.edits.append(Edit(start, end, edit.spoken))

    def place(self, wish: Wish) -> None:
        """The cue goes to the inner clause boundary nearest to its place, else to an edge."""
        inside = CLAUSE_END_RE.finditer(self.text, self.span.start, self.span.end)
        places = [wish.at, *(match.end() for match in inside)]
        inner = [pos for pos in places if self._is_inner(pos)]
        near = [pos for pos in inner if wish.low <= pos <= wish.high] or inner
        edge = self.span.end if wish.low < wish.high else (
            min(max(wish.at, self.span.start), self.span.end))
        pos = min(near, key=lambda pos: abs(pos - wish.at), default=edge)
        self.edits.append(Edit(pos, pos, wish.cue))
        self.cues += 1

    def _is_inner(self, pos: int) -> bool:
        """Whether words are spoken on both sides, and no edit stands across `pos`."""
        start, end = self.span.start, self.span.end
        return (start < pos < end and not any(edit.start < pos < edit.end for edit in self.edits)
                and is_speakable(self._apply(self.edits, start, pos))
                and is_speakable(self._apply(self.edits, pos, end)))

    def _apply(self, edits: Iterable[Edit], start: int, end: int) -> str:
        """`text[start:end]` with those edits that lie in it."""
        spoken, done = "", start
        for edit in sorted(edits):
            if done <= edit.start and edit.end <= end:
                spoken = joined(joined(spoken, self.text[done : edit.start]), edit.spoken)
                done = edit.end
        return joined(spoken, self.text[done:end])

    def spoken(self) -> str:
        """What Bark gets: the plain text where anything else would not have the author's words."""
        start, end = self.span.start, self.span.end
        plain = self.text[start:end]
        if not self.edits:
            return plain
        spoken = self._apply(self.edits, start, end).strip()
        return spoken if is_speakable(spoken) and keeps_words(plain, spoken) else plain


def joined(left: str, right: str) -> str:
    """Both, with a blank where a cue would touch a word or a quotation mark."""
    touches = (right in CUES and CUE_LEFT_RE.search(left[-2:])) or (
        left.endswith(CUES) and CUE_RIGHT_RE.match(right))
    return f"{left} {right}" if touches else left + right


class Expression:
    """The segments of a text with all that their author's words and signs ask for."""

    def __init__(self, script: Script, spans: list[Span], language: str):
        self.text, self.spans = script.text, spans
        self.segments = [SpokenSegment(self.text, span) for span in spans]
        self.starts = [span.start for span in spans]
        self.markup = Markup(script, language)
        self.paragraphs = list(paragraphs(self.text))
        for edit in self.markup.edits:
            self._segment(edit.end - 1).add(edit)
        for start, end in self.markup.lyrics:
            self._sing(start, end)
        self._place([*self.markup.wishes, *(self._told() if language == "en" else ())])

    def _segment(self, pos: int) -> SpokenSegment:
        return self.segments[segment_at(self.spans, pos)]

    def _told(self) -> Iterator[Wish]:
        for start, end in self.paragraphs:
            if TOLD_RE.search(self.text, start, end):
                yield from Narration(self.text, start, end).wishes()

    def _sing(self, start: int, end: int) -> None:
        """A lyric that is cut has a note at each end of each piece."""
        words = list(WORD_RE.finditer(self.text, start, end))
        first = max(0, bisect_right(self.starts, start) - 1)
        for segment in self.segments[first : bisect_left(self.starts, end)] if words else ():
            low, high = segment.span.start, segment.span.end
            if words[0].start() < low:
                segment.edits.append(Edit(low, low, "♪ "))
            if high < words[-1].end():
                segment.edits.append(Edit(high, high, " ♪"))

    def _place(self, wishes: list[Wish]) -> None:
        """Grants wishes in order, as far as segments and paragraphs have room for cues."""
        starts = [start for start, _ in self.paragraphs]
        cues = Counter(bisect_right(starts, pos) for pos in self.markup.typed)
        for pos in self.markup.typed:
            self._segment(pos).cues += 1
        for wish in sorted(wishes):
            segment, paragraph = self._segment(wish.anchor), bisect_right(starts, wish.anchor)
            if (segment.cues < CUES_A_SEGMENT and cues[paragraph] < CUES_A_PARAGRAPH
                    and not self.markup.sings(wish.anchor)):
                segment.place(wish)
                cues[paragraph] += 1


def segment_at(spans: list[Span], pos: int) -> int:
    """The segment of what stands or stood at a position; between two it is the second's."""
    index = max(0, bisect_right(spans, pos, key=lambda span: span.start) - 1)
    return index + (pos > spans[index].end and index + 1 < len(spans))


def express(script: Script, spans: list[Span], language: str) -> list[str]:
    """What Bark gets for each span of a script: its words, and with them cues, capitals, dashes.

    `language` is a voice's two letters; narration is understood in English only, markup in any.
    """
    if not spans:
        return []
    return [segment.spoken() for segment in Expression(script, spans, language.lower()).segments]


# -----------------------------------------------------------------------------
# Audio: float samples to bytes
#
# The engine's samples are float32 in [-1, 1]; what is sent is int16, mono, at the model's rate. All
# formats go through FFmpeg's libraries (PyAV), which is imported at the first use.

import numpy as np


def to_pcm16(samples: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] to int16; louder samples are clipped."""
    return np.round(np.clip(samples, -1.0, 1.0) * 32767.0).astype(np.int16)


class AudioFormat(NamedTuple):
    """A way to send audio, in FFmpeg's names; `bit_rate` in bits a second."""

    mime: str
    container: str
    codec: str
    bit_rate: int | None = None
    options: Mapping[str, str] = MappingProxyType({})  # of the container


# Mono speech at 24 kHz. Ogg pages of 0.2 s instead of 1 s, so that a stream starts soon.
FORMATS = {
    "mp3": AudioFormat("audio/mpeg", "mp3", "libmp3lame", 96_000, {"id3v2_version": "0"}),
    "opus": AudioFormat("audio/ogg", "ogg", "libopus", 48_000, {"page_duration": "200000"}),
    "aac": AudioFormat("audio/aac", "adts", "aac", 64_000),
    "flac": AudioFormat("audio/flac", "flac", "flac"),
    "wav": AudioFormat("audio/wav", "wav", "pcm_s16le"),
    "pcm": AudioFormat("audio/pcm", "s16le", "pcm_s16le"),
}


class Outlet:
    """What a muxer writes into when it cannot go back: bytes wait here to be taken."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def write(self, data: Any) -> int:
        self._bytes += data
        return len(data)

    def take(self) -> bytes:
        taken, self._bytes = bytes(self._bytes), bytearray()
        return taken


class Encoder:
    """int16 mono samples in, one stream of a format out, in one piece however they come.

    For a `file` that can be sought, sizes and durations are written into its head at the end. A
    stream's head leaves them open, as FFmpeg does: a WAV's say 0xFFFFFFFF.
    """

    def __init__(self, form: str, rate: int, file: io.BytesIO | None = None):
        import av

        kind = FORMATS[form]
        self._av, self._rate, self._outlet, self._fed = av, rate, Outlet(), 0
        # bitexact, of container and codec: no version of the library in the head
        options = {**kind.options, "fflags": "+bitexact", "flush_packets": "1"}
        self._container = av.open(file or self._outlet, "w", format=kind.container, options=options)
        self._stream = self._container.add_stream(kind.codec, rate=rate, layout="mono")
        self._stream.codec_context.flags |= av.codec.context.Flags.bitexact
        if kind.bit_rate:
            self._stream.bit_rate = kind.bit_rate
        self._container.start_encoding()

    def feed(self, samples: np.ndarray) -> bytes:
        """What can be sent by now."""
        if len(samples):
            frame = self._av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples, np.int16)[None], format="s16", layout="mono")
            frame.sample_rate, frame.time_base = self._rate, Fraction(1, self._rate)
            frame.pts = self._fed  # else an Ogg starts late by its encoder's delay
            self._fed += len(samples)
            self._container.mux(self._stream.encode(frame))
        return self._outlet.take()

    def finish(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self.close()
        return self._outlet.take()

    def close(self) -> None:
        """Frees what it holds, half a megabyte for FLAC, without waiting for the collector."""
        self._container.close()


def encode(samples: np.ndarray, rate: int, form: str) -> bytes:
    """int16 samples as a whole file with true sizes and duration in its head."""
    file = io.BytesIO()
    encoder = Encoder(form, rate, file)
    encoder.feed(samples)
    encoder.finish()
    return file.getvalue()


def stretch(samples: np.ndarray, rate: int, speed: float) -> np.ndarray:
    """int16 samples `speed` times as fast, 0.25 to 4, at the same pitch.

    By FFmpeg's atempo filter, which overlaps and adds pieces that fit each other (WSOLA).
    """
    if speed == 1 or not len(samples):
        return samples
    import av
    from av.filter import Graph

    graph = Graph()
    nodes = [graph.add_abuffer(sample_rate=rate, format="s16", layout="mono",
                               time_base=Fraction(1, rate))]
    for factor in [0.5, speed / 0.5] if speed < 0.5 else [speed]:  # 0.5 is its least
        nodes.append(graph.add("atempo", str(factor)))
    graph.link_nodes(*nodes, graph.add("abuffersink")).configure()
    # it swallows what is in its window when the end comes, so let that be silence
    padded = np.concatenate([samples, np.zeros(rate // 2, np.int16)])
    frame = av.AudioFrame.from_ndarray(padded[None], format="s16", layout="mono")
    frame.sample_rate = rate
    graph.push(frame)
    graph.push(None)
    parts = []
    with contextlib.suppress(av.error.EOFError, av.error.BlockingIOError):
        while True:
            parts.append(graph.pull().to_ndarray()[0])
    return np.concatenate(parts)[: round(len(samples) / speed)]


def resample(samples: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Float32 samples at another rate, in Hz, by FFmpeg's libswresample."""
    import av

    if not len(samples):
        return samples
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32)[None],
                                       format="flt", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=to)
    frames = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([samples[:0], *(each.to_ndarray()[0] for each in frames)])


# -----------------------------------------------------------------------------
# Takes: what came of a generation, judged, trimmed and brought to one loudness
#
# Bark invents: now and then it goes on after the text's end, falls silent, hums or stops half way.
# So each take is looked at before it is sent, and a bad one is made again with another seed. What
# counts is in the numbers below; where a take speaks, and what, is told by those who hear
# (Hearing), or guessed from its level. The judgement depends on the take and its text alone.

FRAME_SECONDS = 0.02
SPEECH_RANGE = 35.0    # dB below the loud parts that speech still has
FLOOR = -55.0          # dBFS; what is below is silence whatever else there is
SILENT_LEVEL = -45.0   # dBFS of a take's loud parts; speech is at -35 to -10
CLIPPED_SHARE = 0.002  # of samples at full scale
DEAD_SECONDS = 2.0     # without speech, between speech
# Seconds of speech for a text that should take one: of 2,615 studio recordings in five languages
# 1.3 % lie outside, of 200 cut in half 95 %, of 200 said twice 94 % (docs/how-it-works.md).
SHORT_SHARE, SHORT_SLACK = 0.75, 0.4
LONG_SHARE, LONG_SLACK, LONG_LEAST = 1.2, 0.9, 1.75  # "Oh!" may be drawn out
FREE_SECONDS = 3.0     # more for a laugh or a song, which have no length of their own
LEAST_SPEECH = 0.3     # seconds in a take that should have at least SURE_SECONDS
SURE_SECONDS = 1.0     # in a shorter text, a letter's name say, the detector may miss speech
OTHER_SECONDS = 1.0    # of sound that is no speech; what is shorter is cut off, and that is that
FRICATIVE_SECONDS = 0.3  # a final s may be no speech to the detector, but not for longer
LEAD_SECONDS, TAIL_SECONDS = 0.03, 0.12  # kept around the speech
FADE_SECONDS = 0.008   # at both ends, against clicks
LOUDNESS, MAX_GAIN = -20.0, 6.0  # dBFS of the speech in RMS, dB of change at most


class Wanted(NamedTuple):
    """What a take should say, and in about how many seconds. Two letters are its language."""

    seconds: float
    text: str = ""
    language: str = "en"

    @property
    def is_free(self) -> bool:
        """Whether it is to laugh or sing as well, which no detector takes for speech."""
        return "♪" in self.text or TYPED_CUE_RE.search(self.text) is not None


class Hearing(NamedTuple):
    """What is heard in a take, in seconds of it; None where nobody listened.

    `speech` is where speech is, from and to, `heard` the words (of listener.py). `unheard` is why
    there are none though they are wanted.
    """

    speech: tuple[tuple[float, float], ...] | None = None
    heard: Heard | None = None
    unheard: str = ""

    def after(self, seconds: float) -> Hearing:
        """The same of a take that begins so much later."""
        return self._replace(
            speech=self.speech and tuple((a - seconds, b - seconds) for a, b in self.speech),
            heard=self.heard and self.heard._replace(words=tuple(
                word._replace(start=word.start - seconds, end=word.end - seconds)
                for word in self.heard.words)))


NOBODY_HEARD = Hearing()


class Take(NamedTuple):
    """A segment's audio as it is sent: int16 samples, how many takes were made, what is wrong."""

    samples: np.ndarray
    takes: int = 1
    warnings: tuple[str, ...] = ()
    hearing: Hearing = NOBODY_HEARD


class Fault(NamedTuple):
    """What is wrong with a take. Of two bad ones a listener keeps that of less `weight`."""

    kind: str
    weight: float
    message: str


class Verdict(NamedTuple):
    """What is wrong with a take, how far its length is off, and where in it the speech stands."""

    faults: tuple[Fault, ...]
    excess: float  # |log| of its length by the length expected
    speech: slice = slice(0, 0)  # samples; empty where there is none
    level: float = LOUDNESS      # dBFS of the speech
    hearing: Hearing = NOBODY_HEARD

    @property
    def badness(self) -> tuple[float, float]:
        return sum(fault.weight for fault in self.faults), self.excess

    @property
    def gravest(self) -> str:
        """The kind of what is most wrong."""
        return max(self.faults, key=lambda fault: fault.weight).kind

    @property
    def warnings(self) -> tuple[str, ...]:
        unheard = self.hearing.unheard and f"not heard: {self.hearing.unheard}"
        return (*(fault.message for fault in self.faults), *filter(None, [unheard]))

    def kept_from(self, rate: int) -> int:
        """The sample with which the take is to begin."""
        return max(0, self.speech.start - round(LEAD_SECONDS * rate))


def hopeless(kind: str, message: str, hearing: Hearing) -> Verdict:
    """On a take of which nothing can be used."""
    return Verdict((Fault(kind, 100.0, message),), math.inf, hearing=hearing)


def frame_levels(frames: np.ndarray) -> np.ndarray:
    """dBFS (n,) of frames (n, samples), by their RMS."""
    power = np.einsum("ij,ij->i", frames, frames) / frames.shape[1]
    return 10 * np.log10(np.maximum(power, 1e-12))


def judge(samples: np.ndarray, rate: int, wanted: Wanted,
          hearing: Hearing = NOBODY_HEARD, word_errors: float = math.inf) -> Verdict:
    """A take, float32 in [-1, 1], beside what it should be and what was heard in it.

    `word_errors` is the share of wrong words that it may have.
    """
    if not np.isfinite(samples).all():
        return hopeless("not_finite", "not finite", hearing)
    size = round(FRAME_SECONDS * rate)
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    levels = frame_levels(frames)
    loud = float(np.percentile(levels, 95)) if len(levels) else -120.0
    if loud < SILENT_LEVEL:
        return hopeless("silent", "silent", hearing)
    sound = levels > max(loud - SPEECH_RANGE, FLOOR)
    voiced = sound & speech_frames(hearing, wanted, len(sound))
    if voiced.sum() * FRAME_SECONDS < LEAST_SPEECH:
        if sound.sum() * FRAME_SECONDS > OTHER_SECONDS:
            return hopeless("no_speech", "noise or music instead of speech", hearing)
        if wanted.seconds >= SURE_SECONDS:
            return hopeless("no_speech", "no speech", hearing)
        voiced = sound
    first, last = speech_ends(sound, voiced)
    spoken = np.flatnonzero(voiced[first : last + 1]) + first
    level = 10 * math.log10(np.mean(10 ** (levels[spoken] / 10)))
    seconds = (last - first + 1) * FRAME_SECONDS
    faults = (*length_faults(seconds, wanted), *sound_faults(sound, voiced, first, last),
              *clipping(samples), *word_faults(hearing, word_errors))
    excess = abs(math.log(seconds / max(wanted.seconds, FRAME_SECONDS)))
    return Verdict(faults, excess, slice(first * size, (last + 1) * size), level, hearing)


def speech_frames(hearing: Hearing, wanted: Wanted, count: int) -> np.ndarray:
    """Which of `count` frames may be speech: all where nobody listened, or laughs are wanted."""
    if hearing.speech is None or wanted.is_free:
        return np.ones(count, bool)
    frames = np.zeros(count, bool)
    for start, end in hearing.speech:
        frames[math.floor(start / FRAME_SECONDS) : math.ceil(end / FRAME_SECONDS)] = True
    return frames


def speech_ends(sound: np.ndarray, voiced: np.ndarray) -> tuple[int, int]:
    """The first and the last frame of speech, with a fricative that is no speech by itself."""
    reach = round(FRICATIVE_SECONDS / FRAME_SECONDS)
    first, last = np.flatnonzero(voiced)[[0, -1]]
    before, after = np.flatnonzero(sound[:first]), np.flatnonzero(sound[last + 1 :]) + last + 1
    if 0 < len(before) <= reach:
        first = max(before[0], first - reach)
    if 0 < len(after) <= reach:
        last = min(after[-1], last + reach)
    return int(first), int(last)


def length_faults(seconds: float, wanted: Wanted) -> Iterator[Fault]:
    """A text cut short has lost words, one drawn out has some too many, and that is less bad."""
    message = f"{seconds:.1f} s for a text of about {wanted.seconds:.1f} s"
    if seconds < SHORT_SHARE * wanted.seconds - SHORT_SLACK:
        yield Fault("short", 8.0, message)
    longest = max(LONG_SHARE * wanted.seconds + LONG_SLACK, LONG_LEAST)
    if seconds > longest + (wanted.seconds + FREE_SECONDS if wanted.is_free else 0.0):
        yield Fault("long", 4.0, message)


def sound_faults(sound: np.ndarray, voiced: np.ndarray, first: int, last: int) -> Iterator[Fault]:
    """Silence inside the speech, sound that is no speech; `first` and `last` are frames of it."""
    gaps = np.diff(np.flatnonzero(sound[first : last + 1])) - 1
    dead = int(gaps.max(initial=0)) * FRAME_SECONDS
    if dead > DEAD_SECONDS:
        yield Fault("silence", 3.0, f"{dead:.1f} s of silence inside")
    other = sound & ~voiced
    inside = int(other[first : last + 1].sum()) * FRAME_SECONDS
    around = int(other.sum()) * FRAME_SECONDS - inside
    if inside > OTHER_SECONDS:
        yield Fault("noise", 3.0, f"{inside:.1f} s of noise or music inside")
    elif inside + around > OTHER_SECONDS:
        yield Fault("noise", 1.0, f"{around:.1f} s of noise or music around the speech, cut off")


def clipping(samples: np.ndarray) -> Iterator[Fault]:
    clipped = np.mean(np.abs(samples) >= 0.99)
    if clipped > CLIPPED_SHARE:
        yield Fault("clipped", 2.0, f"clipped in {100 * clipped:.1f} % of its samples")


def word_faults(hearing: Hearing, word_errors: float) -> Iterator[Fault]:
    """The more words are wrong, the worse: at its worst as bad as a text cut short and more."""
    heard = hearing.heard
    if heard and heard.differs(word_errors):
        yield Fault("words", 4.0 + 8.0 * min(heard.word_errors, 1.0),
                    f"{heard.wrong} words wrong of {heard.of}")


def polish(samples: np.ndarray, rate: int, found: Verdict) -> np.ndarray:
    """The take without what surrounds its speech, faded at the edges, at LOUDNESS."""
    if found.speech.stop == 0:
        return np.nan_to_num(samples, posinf=0.0, neginf=0.0)
    kept = samples[found.kept_from(rate) : found.speech.stop + round(TAIL_SECONDS * rate)]
    gain = min(max(LOUDNESS - found.level, -MAX_GAIN), MAX_GAIN)
    gain = 10 ** (gain / 20)
    if (peak := float(np.abs(kept).max())) * gain > 1:
        gain = max(1 / peak, 10 ** (-MAX_GAIN / 20))
    kept = kept * np.float32(gain)
    ramp = np.linspace(0, 1, min(round(FADE_SECONDS * rate), len(kept) // 2), dtype=np.float32)
    kept[: len(ramp)] *= ramp
    kept[len(kept) - len(ramp) :] *= ramp[::-1]
    return kept


# -----------------------------------------------------------------------------
# Timing: when each word of a text is heard
#
# For readers that highlight what is spoken. Each word of the author's text gets a stretch of the
# take, in order and without overlap. Where a listener heard the words, these are its times, mapped
# onto the author's words; what it missed lies between its neighbours. Else the words share the
# speech by their estimated lengths, held to the pauses that the detector found.

DASHES = "—–…/"  # that part words without a blank
SURE_PAUSE = 0.6  # seconds that a pause may lie off the word boundary it is taken for
PUNCTUATION_BONUS = 0.3  # seconds by which a boundary with a comma or a stop counts as nearer
MARGIN = 0.08  # seconds that the detector leaves around speech and a pause
TIMED_RE = re.compile(rf"(?P<cue>{TYPED_CUE_RE.pattern})|[^\s{DASHES}\[]+")  # or a word's signs


class WordTime(NamedTuple):
    """A word, text[start:end] in code points, and its seconds in the take."""

    start: int
    end: int
    begins: float
    ends: float


def is_spoken(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] in "LNM" or category == "Sc" or char in "%&@#+=°"


def stands_alone(char: str) -> bool:
    """Whether it is a word as it is: a letter of Chinese or Japanese, where there are no blanks."""
    return (char >= WIDE and unicodedata.category(char) == "Lo"
            and not unicodedata.name(char, "").startswith("HANGUL"))


def words_in(text: str) -> list[Stretch]:
    """From and to of each word without the punctuation around it."""
    words: list[list[int]] = []
    for match in TIMED_RE.finditer(text):
        if match["cue"]:
            continue
        first = len(words)
        for at in filter(lambda at: is_spoken(text[at]), range(*match.span())):
            if len(words) == first or stands_alone(text[at]):
                words.append([at, at + 1])
            words[-1][1] = at + 1
    return [(start, end) for start, end in words]


def word_times(text: str, spoken: str, hearing: Hearing,
               seconds: float) -> tuple[list[WordTime], str]:
    """When each word of a take's text is heard, and whether that is "heard" or "estimated".

    `spoken` is what the author's text was read as, `seconds` the take's length.
    """
    words = words_in(text)
    speech = speech_stretches(hearing, seconds)
    times = estimated_times(text, words, word_lengths(text, words, spoken), speech)
    told = "estimated"
    if hearing.heard and hearing.heard.words:
        times, told = heard_times(text, words, times, hearing.heard.words, speech), "heard"
    return [WordTime(*word, *time) for word, time in zip(words, in_order(times, seconds),
                                                         strict=True)], told


def speech_stretches(hearing: Hearing, seconds: float) -> list[tuple[float, float]]:
    """Where in a take of so many seconds there is speech; all of it where nobody listened."""
    inside = [(max(0.0, start + MARGIN), min(end - MARGIN, seconds))
              for start, end in hearing.speech or ()]
    return [(a, b) for a, b in inside if b > a] or [(0.0, seconds)]


def folded(word: str) -> str:
    return "".join(filter(str.isalnum, word.casefold()))


def matching(ours: list[str], theirs: list[str]) -> list[tuple[str, int, int, int, int]]:
    """difflib's opcodes between two lists of words."""
    return difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes()


def word_lengths(text: str, words: list[Stretch], spoken: str) -> list[float]:
    """Each word's share of the speech, by what it was read as: nothing for what was left out."""
    told = [spoken[a:b] for a, b in words_in(spoken)]
    ours = [text[a:b] for a, b in words]
    lengths = [0.0] * len(ours)
    for _, a, b, c, d in matching([*map(folded, ours)], [*map(folded, told)]):
        own = [estimate_seconds(word) for word in ours[a:b]]
        total = sum(map(estimate_seconds, told[c:d]))
        share = total / (sum(own) or 1.0)
        lengths[a:b] = [share * each for each in own]
    return lengths if any(lengths) else [estimate_seconds(word) for word in ours]


def estimated_times(text: str, words: list[Stretch], lengths: list[float],
                    speech: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The words laid into the stretches of speech, each pause where a word ends near it."""
    pace = sum(end - start for start, end in speech) / (sum(lengths) or 1.0)
    ends = [pace * length for length in itertools.accumulate(lengths)]
    times: list[tuple[float, float]] = []
    begins, elapsed = speech[0][0], 0.0
    for index, (start, end) in enumerate(speech):
        elapsed += end - start
        last = index == len(speech) - 1
        upto = len(words) if last else pause_after(text, words, ends, elapsed, len(times))
        if upto:
            times += laid(lengths[len(times) : upto], begins, end)
            begins = speech[index + 1][0] if not last else end
    return times


def pause_after(text: str, words: list[Stretch], ends: list[float], elapsed: float,
                first: int) -> int:
    """How many words are over at the pause that comes after so much speech; 0 if none ends near."""
    def distance(index: int) -> float:
        between = text[words[index][1] : words[index + 1][0]]
        bonus = PUNCTUATION_BONUS if between.strip() else 0.0
        return abs(ends[index] - elapsed) - bonus

    near = [index for index in range(first, len(words) - 1)
            if abs(ends[index] - elapsed) < SURE_PAUSE]
    return min(near, key=distance) + 1 if near else 0


def laid(lengths: list[float], begins: float, ends: float) -> list[tuple[float, float]]:
    """From and to of words that share a stretch by their lengths."""
    pace = (ends - begins) / (sum(lengths) or 1.0)
    edges = [begins + pace * length for length in itertools.accumulate(lengths, initial=0.0)]
    return list(itertools.pairwise(edges))


def heard_times(text: str, words: list[Stretch], estimated: list[tuple[float, float]],
                heard: tuple[Word, ...], speech: list[tuple[float, float]]
                ) -> list[tuple[float, float]]:
    """The listener's times, mapped onto the words; those between share what lies between."""
    ours = [folded(text[a:b]) for a, b in words]
    known: dict[int, tuple[float, float]] = {}
    for kind, a, b, c, d in matching(ours, [folded(word.text) for word in heard]):
        if kind == "equal" or (kind == "replace" and b - a == d - c):
            known |= {a + n: voiced_part(heard[c + n].start, heard[c + n].end, speech)
                      for n in range(b - a)}
    times, index = [], 0
    while index < len(words):
        if index in known:
            times.append(known[index])
            index += 1
            continue
        until = next((n for n in range(index, len(words)) if n in known), len(words))
        begins = times[-1][1] if times else min(speech[0][0], known.get(until, speech[0])[0])
        ends = known[until][0] if until in known else max(speech[-1][1], begins)
        times += laid([b - a for a, b in estimated[index:until]], begins, max(begins, ends))
        index = until
    return times


def voiced_part(start: float, end: float, speech: list[tuple[float, float]]) -> tuple[float, float]:
    """A word's time without the silence that the recogniser counts to its ends."""
    inside = [(max(a, start), min(b, end)) for a, b in speech if min(b, end) > max(a, start)]
    return (inside[0][0], inside[-1][1]) if inside else (start, end)


def in_order(times: Iterable[tuple[float, float]], seconds: float) -> Iterator[tuple[float, float]]:
    """The same, each after the one before and none outside of the take."""
    latest = 0.0
    for start, end in times:
        start = min(max(start, latest), seconds)
        latest = min(max(end, start), seconds)
        yield start, latest


# -----------------------------------------------------------------------------
# Model: a folder in the hub's layout, found or downloaded, read and checked
#
# What is known of a model comes from its folder: windows and sampling from its configuration files,
# voices from its table, never from constants here. A folder is used where it lies; a hub's model is
# downloaded, and broken downloads go on where they stopped. The weights stay Hugging Face's
# classes.

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoTokenizer, BarkModel
from transformers.models.bark.generation_configuration_bark import (
    BarkCoarseGenerationConfig,
    BarkFineGenerationConfig,
    BarkSemanticGenerationConfig,
)
from transformers.utils.logging import disable_progress_bar

TABLE_FILE = "speaker_embeddings_path.json"
NEEDED_FILES = ("config.json", "generation_config.json", TABLE_FILE)
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")  # either will do
EXTRA_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
WEIGHT_PATTERNS = ("model*.safetensors*", "pytorch_model*.bin*")  # in this order; with shards
LISTENER_FILES = ("config.json", "model.bin", "tokenizer.json")
FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_HEADER = 100_000_000  # bytes, of a safetensors file (its own limit)
HUB_SECONDS = 20.0  # for the hub to answer a question about a model
PROMPTS = ("semantic_prompt", "coarse_prompt", "fine_prompt")
MAX_SPEECH_SECONDS = 12.0  # beyond 13 to 14 s Bark drifts off its text (Suno's README)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Channels. Matrices narrower than this gain nothing from half precision on a CPU, nor from a second
# thread; and when another process takes its core, two threads wait for each other at every one of
# thousands of tiny steps: 20 times slower, measured.
SMALL_HIDDEN_SIZE = 512


def resolve_device(config: Config) -> torch.device:
    """The device to use. Raises ConfigError if the one asked for is not there."""
    has_gpu = torch.cuda.is_available()
    device = torch.device(config.device or ("cuda:0" if has_gpu else "cpu"))
    if device.type == "cuda" and not (has_gpu and device.index < torch.cuda.device_count()):
        raise ConfigError(
            f"BARK_DEVICE is {device}, but torch {torch.__version__} sees"
            f" {torch.cuda.device_count()} GPUs; install a driver that fits this torch build,"
            " or set BARK_DEVICE=cpu"
        )
    return device


def best_dtype(device: torch.device, hidden_size: int) -> str:
    """The name of what is fastest without harm for networks of so many channels.

    bfloat16 only where the processor multiplies it: elsewhere it is emulated, and slower. Narrow
    networks gain nothing from it.
    """
    if device.type == "cuda":
        return "float16"
    able = torch.cpu.get_capabilities()
    multiplies = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if multiplies and hidden_size >= SMALL_HIDDEN_SIZE else "float32"


def default_model(device: torch.device) -> str:
    return "suno/bark" if device.type == "cuda" else "suno/bark-small"


def match_root(names: Iterable[str], pattern: str) -> list[str]:
    """The names at a repository's root that match `pattern`, in which * stands for anything."""
    expression = re.escape(pattern).replace(r"\*", "[^/]*")
    return sorted(name for name in names if re.fullmatch(expression, name))


def weight_files(names: Iterable[str]) -> list[str]:
    """Safetensors if there are any, else the pickled weights; [] if neither."""
    names = list(names)
    return next(filter(None, (match_root(names, pattern) for pattern in WEIGHT_PATTERNS)), [])


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value


def voice_paths(folder: Path) -> dict[str, dict[str, str]]:
    """The voice table: name to the three prompt files, relative to `folder`."""
    table = read_json(folder / TABLE_FILE)
    table.pop("repo_or_path", None)
    for name, paths in table.items():
        if not isinstance(paths, dict) or not all(isinstance(paths.get(p), str) for p in PROMPTS):
            raise ModelError(f"voice {shown(name)} in {folder / TABLE_FILE} lacks one of {PROMPTS}")
    return table


def missing_files(folder: Path) -> list[str]:
    """What a usable model folder would have and this one has not."""
    missing = [name for name in NEEDED_FILES if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        missing.append(" or ".join(TOKENIZER_FILES))
    weights = weight_files(path.name for path in folder.iterdir() if path.exists())
    if not weights:
        missing.append("model.safetensors or pytorch_model.bin")
    for index in (name for name in weights if name.endswith(".index.json")):
        shards = set(read_json(folder / index).get("weight_map", {}).values())
        missing += sorted(name for name in shards if not (folder / name).exists())
    return missing


def prompt_files(folder: Path) -> set[str]:
    """Every prompt file that the folder's voice table names."""
    return {paths[prompt] for paths in voice_paths(folder).values() for prompt in PROMPTS}


def find_model(name: str, check_voices: Callable[[Iterable[str]], None],
               on_download: Callable[[int, Path], None]) -> Path:
    """The folder of model `name`: local, from the cache, or downloaded into it, in that order.

    A complete cache is used without asking the hub, so a warm start needs no network.
    `check_voices` sees the voice names before the weights are fetched; `on_download` gets the
    bytes needed in all and the cache folder in which they grow. Raises ModelError.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if missing := missing_files(folder):
            raise ModelError(f"model folder {folder} lacks {', '.join(missing[:5])}")
        return folder
    if not re.fullmatch(HUB_ID, name):
        raise ModelError(f"BARK_MODEL is {shown(name)}: neither an existing folder nor a hub id"
                         " such as suno/bark")
    try:
        return cached_model(name) or download_model(name, check_voices, on_download)
    except OSError as error:
        raise download_error(name, error) from error


def cached_model(name: str, all_voices: bool = True) -> Path | None:
    """The cache's folder of hub model `name` if it is whole, else None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=NEEDED_FILES))
        if missing_files(folder):
            return None
        whole = all((folder / path).is_file() for path in prompt_files(folder))
        return folder if whole or not all_voices else None
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None


def download_model(name: str, check_voices: Callable[[Iterable[str]], None],
                   on_download: Callable[[int, Path], None]) -> Path:
    """Fetches what is needed of hub model `name`, going on where a broken download stopped.

    If the hub fails and the cache lacks no more than voices, it serves. Raises ModelError.
    """
    try:
        return fetch_snapshot(name, check_voices, on_download)
    except WorkerError:
        raise
    except Exception as error:  # which HTTP library is underneath changes with the hub's client
        if isinstance(error, OSError) and (told := disk_error(error)):
            raise told from error
        if folder := cached_model(name, all_voices=False):
            log.warning("%s: some voices are missing; %s", name, download_error(name, error))
            return folder
        raise download_error(name, error) from error


def download_error(name: str, error: Exception, variable: str = "BARK_MODEL") -> ModelError:
    """What went wrong at the hub or on the disk, and what to do next."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OSError) and (told := disk_error(error)):
        return told
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return ModelError(f"{name} is not in the cache and the hub is off; unset HF_HUB_OFFLINE or"
                          f" set {variable} to a local folder")
    if isinstance(error, HfHubHTTPError):
        broken = error.response is not None and error.response.status_code >= 500
        advice = "try again later" if broken else (
            f"check {variable}, and HF_TOKEN if the model is private")
        return ModelError(f"the hub refuses {name}: {first_line(error)}; {advice}")
    return ModelError(f"downloading {name} broke off: {type(error).__name__}:"
                      f" {first_line(error)}; a restart goes on from there")


def disk_error(error: OSError) -> ModelError | None:
    """What keeps files out of the cache, and what to do; None for an error of another kind."""
    from huggingface_hub import constants

    home, place = constants.HF_HOME, error.filename or constants.HF_HOME
    if error.errno in FULL:
        return ModelError(f"the disk of {home} is full ({free_bytes(Path(home)) / 1e9:.2f} GB are"
                          " free); make room, or set HF_HOME to a folder on another disk")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        user = user_name()
        return ModelError(f"user {user} may not write {place}; as root: chown -R {user} {home},"
                          " or set HF_HOME to a folder of this user's")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return ModelError(f"{place} is a file where a folder is needed (HF_HOME is {home}); remove"
                          " it, or set HF_HOME to a folder")
    return None


def user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # as in a container that runs as a number
        return str(os.geteuid())


def free_bytes(folder: Path) -> int:
    """On the disk where `folder` is, or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def check_room(name: str, needed: int, folder: Path) -> None:
    """Raises ModelError unless so many bytes more fit."""
    if needed > (free := free_bytes(folder)):
        raise ModelError(f"{name} needs {needed / 1e9:.2f} GB more on the disk of {folder}, where"
                         f" {free / 1e9:.2f} GB are free; make room, or set HF_HOME to a folder on"
                         " another disk")


def folder_bytes(folder: Path) -> int:
    """Bytes in the files of a cache's blobs folder, those still arriving included."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # renamed when complete
                total += entry.stat().st_size
    return total


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def hub_files(name: str) -> tuple[str | None, dict[str, int]]:
    """A hub model's revision, and the bytes of each of its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # /health and our own log lines tell the progress
    info = HfApi().model_info(name, files_metadata=True, timeout=HUB_SECONDS)
    return info.sha, {file.rfilename: file.size or 0 for file in info.siblings or []}


def fetch_snapshot(name: str, check_voices: Callable[[Iterable[str]], None],
                   on_download: Callable[[int, Path], None]) -> Path:
    from huggingface_hub import snapshot_download

    revision, sizes = hub_files(name)
    absent = [path for path in NEEDED_FILES if path not in sizes]
    if absent or not (weights := weight_files(sizes)):
        raise ModelError(f"{name} on the hub is no Bark model: it lacks"
                         f" {', '.join(absent) or 'weights'}")
    small = [path for path in (*NEEDED_FILES, *TOKENIZER_FILES, *EXTRA_FILES) if path in sizes]
    folder = Path(snapshot_download(name, allow_patterns=small))
    check_voices(voice_paths(folder))
    small += prompt_files(folder) & sizes.keys()
    wanted = {path: sizes[path] for path in (*small, *weights)}
    return fetch_files(name, revision, wanted, weights, on_download)


def fetch_files(name: str, revision: str | None, sizes: Mapping[str, int], large: Iterable[str],
                on_download: Callable[[int, Path], None]) -> Path:
    """The folder in which all of `sizes` are, the `large` ones taken up where they broke off."""
    from huggingface_hub import constants, snapshot_download

    blobs = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"
    total = sum(sizes.values())
    check_room(name, total - folder_bytes(blobs), blobs)
    on_download(total, blobs)
    for path in large:
        fetch_blob(name, path, revision, sizes[path], blobs)
    return Path(snapshot_download(name, allow_patterns=list(sizes)))


def find_listener(name: str, on_download: Callable[[int, Path], None]) -> Path:
    """The folder of a recogniser, found or fetched as a model is. Raises ModelError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if lacking := lacking_files(folder):
            raise ModelError(f"BARK_LISTEN: {folder} lacks {', '.join(lacking)}")
        return folder
    hub_id = LISTENERS.get(name, name)
    try:
        return cached_listener(hub_id) or fetch_listener(hub_id, on_download)
    except WorkerError:
        raise
    except Exception as error:  # which HTTP library is underneath changes with the hub's client
        raise download_error(hub_id, error, "BARK_LISTEN") from error


def lacking_files(folder: Path) -> list[str]:
    return [name for name in LISTENER_FILES if not (folder / name).is_file()]


def cached_listener(hub_id: str) -> Path | None:
    """The cache's folder of it if it is whole, else None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True,
                                        allow_patterns=LISTENER_FILES))
    except LocalEntryNotFoundError:
        return None
    return None if lacking_files(folder) else folder


def fetch_listener(hub_id: str, on_download: Callable[[int, Path], None]) -> Path:
    revision, sizes = hub_files(hub_id)
    if lacking := [name for name in LISTENER_FILES if name not in sizes]:
        raise ModelError(f"{hub_id} on the hub is no Whisper of CTranslate2's: it lacks"
                         f" {', '.join(lacking)}")
    wanted = {path: size for path, size in sizes.items()
              if "/" not in path and path.endswith((".json", ".txt", ".bin"))}
    return fetch_files(hub_id, revision, wanted, ["model.bin"], on_download)


def fetch_blob(name: str, path: str, revision: str | None, size: int, blobs: Path) -> None:
    """Puts a large file where the hub's client looks for it before it downloads anything.

    The client itself (2.4) starts a file over when its process ended before it was whole; here
    the part that arrived stays and the rest is asked for. Raises ModelError for a wrong hash.
    """
    import fcntl

    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url, headers = hf_hub_url(name, path, revision=revision), build_hf_headers()
    etag = get_hf_file_metadata(url, timeout=HUB_SECONDS).etag or ""
    blob, part = blobs / etag, blobs / f"{etag}.part"
    if not re.fullmatch(r"[0-9a-f]{64}", etag) or blob.exists():
        return  # no SHA-256 to check by: left to the client
    blobs.mkdir(parents=True, exist_ok=True)
    with part.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # one worker at a time, on a shared cache
        if blob.exists():  # another one has fetched it meanwhile
            return
        if file.tell() > size:
            file.seek(file.truncate(0))
        http_get(url, file, resume_size=file.tell(), expected_size=size, headers=headers)
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != etag:
            part.unlink()
            raise ModelError(f"{path} of {name} arrived damaged and was removed; start again")
        os.replace(part, blob)


@dataclass(frozen=True)
class Sampling:
    """How a stage picks its next token. Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0

    def scaled(self, factor: float) -> Sampling:
        return replace(self, temperature=self.temperature * factor)


# what `generate` takes for what a generation config leaves open (GenerationConfig in transformers)
DEFAULT_TEMPERATURE, DEFAULT_TOP_K, DEFAULT_TOP_P = 1.0, 50, 1.0
UNSUPPORTED = {  # with the values that mean nothing
    "num_beams": 1, "repetition_penalty": 1.0, "typical_p": 1.0, "min_p": 0,
    "no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


def read_sampling(section: Mapping[str, Any]) -> Sampling:
    """The sampling of a causal stage's section of generation_config.json."""
    def value(key: str, default: Any) -> Any:
        return default if section.get(key) is None else section[key]

    for key, neutral in UNSUPPORTED.items():
        if value(key, neutral) != neutral:
            log.warning("generation_config.json: %s=%s is not supported and ignored",
                        key, section[key])
    if not value("do_sample", False):
        return Sampling(temperature=0.0)
    return Sampling(float(value("temperature", DEFAULT_TEMPERATURE)),
                    int(value("top_k", DEFAULT_TOP_K)), float(value("top_p", DEFAULT_TOP_P)))


def read_fine_sampling(section: Mapping[str, Any], coarse: Sampling) -> Sampling:
    """The fine stage knows only a temperature, and there 1.0 or none means greedy (BarkFineModel).

    `do_sample` counts only in a folder whose coarse stage is greedy too: every saved
    BarkFineGenerationConfig holds the base class's `do_sample: false`, whatever it means.
    """
    temperature = section.get("temperature")
    greedy = temperature in (None, 1.0) or (
        section.get("do_sample") is False and coarse.temperature == 0)
    return Sampling(0.0 if greedy else float(temperature))


@dataclass(frozen=True, eq=False, repr=False)
class Voice:
    """A voice preset: what the model is told it said before. Token ids, 49.9 and 75 a second."""

    semantic: np.ndarray  # (n,) int64
    coarse: np.ndarray    # (2, m) int64
    fine: np.ndarray      # (8, m) int64

    def __repr__(self) -> str:
        """By its content, so that a segment's tells all that decides how it sounds."""
        parts = (self.semantic, self.coarse, self.fine)
        return f"Voice({hashlib.sha256(b'|'.join(ids.tobytes() for ids in parts)).hexdigest()})"


class PresetError(ValueError):
    """What is wrong with a file that should be a preset, in words that stand behind its name."""


class ModelFacts:
    """Everything a model folder says but its weights: windows, sampling, tokenizer, voices.

    `semantic`, `coarse`, `fine` are transformers' own generation configs, so that a number that
    the folder leaves out has the default that `BarkModel.generate` gives it.
    """

    def __init__(self, folder: Path):
        generation = read_json(folder / "generation_config.json")
        sections = {name: generation.get(name) or {} for name in
                    ("semantic_config", "coarse_acoustics_config", "fine_acoustics_config")}
        self.semantic = BarkSemanticGenerationConfig(**sections["semantic_config"])
        self.coarse = BarkCoarseGenerationConfig(**sections["coarse_acoustics_config"])
        self.fine = BarkFineGenerationConfig(**sections["fine_acoustics_config"])
        self.sample_rate = int(generation.get("sample_rate", 24_000))
        self.codebook_size = int(generation.get("codebook_size", 1024))
        networks = read_json(folder / "config.json")
        self.hidden_size = int(networks.get("semantic_config", {}).get("hidden_size", 768))
        self.semantic_sampling = read_sampling(sections["semantic_config"])
        self.coarse_sampling = read_sampling(sections["coarse_acoustics_config"])
        self.fine_sampling = read_fine_sampling(
            sections["fine_acoustics_config"], self.coarse_sampling)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.unknown_id = self.tokenizer.unk_token_id
        # A model cannot have learnt cues that its tokenizer has no way to write.
        self.knows_cues = not self.unknown(" ".join(CUES))
        self.voices = self._read_voices(folder)
        weights = weight_files(path.name for path in folder.iterdir() if path.exists())
        self.origin = origin_of(folder / name for name in (*weights, *NEEDED_FILES))

    @property
    def semantic_to_coarse(self) -> float:
        """Coarse tokens for each semantic one: 3.006 for Bark (75 Hz x 2 codebooks / 49.9 Hz)."""
        return (self.coarse.coarse_rate_hz / self.semantic.semantic_rate_hz
                * self.coarse.n_coarse_codebooks)

    @property
    def max_seconds(self) -> float:
        """Most seconds of speech to plan for: what the token limit holds, less a fifth."""
        limit = self.semantic.max_new_tokens / self.semantic.semantic_rate_hz
        return min(MAX_SPEECH_SECONDS, 0.8 * limit)

    def tokenize(self, text: str) -> list[int]:
        """WordPiece ids without special tokens, as Bark was trained (BarkProcessor)."""
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def unknown(self, text: str) -> list[Stretch]:
        """The stretches of a text that the tokenizer has no token for."""
        tokens = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        ids, unknown = tokens.ids, self.unknown_id
        if unknown not in ids:
            return []
        return [place for token, place in zip(ids, tokens.offsets, strict=True)
                if token == unknown]

    def _read_voices(self, folder: Path) -> dict[str, Voice]:
        voices, broken = {}, {}
        for name, paths in voice_paths(folder).items():
            try:
                voices[name] = self._read_voice(folder, paths)
            except (OSError, ValueError, EOFError) as error:
                broken[name] = error
        if broken:
            name, error = next(iter(broken.items()))
            log.warning("%d of %d voices left out; %s: %s", len(broken),
                        len(broken) + len(voices), name, error)
        return voices

    def _read_voice(self, folder: Path, paths: Mapping[str, str]) -> Voice:
        """Raises OSError or ValueError for a file that is no preset of this model."""
        arrays = []
        for prompt in PROMPTS:
            if ".." in Path(paths[prompt]).parts or Path(paths[prompt]).is_absolute():
                raise ValueError(f"{paths[prompt]} leads out of the model folder")
            arrays.append(np.load(folder / paths[prompt], allow_pickle=False))
        return self.voice_of(arrays)

    def voice_of(self, arrays: Iterable[np.ndarray]) -> Voice:
        """A preset from its three arrays, of whatever integers. Raises PresetError."""
        numbers = {  # axes before time, ids
            "semantic_prompt": ((), self.semantic.semantic_vocab_size),
            "coarse_prompt": ((self.coarse.n_coarse_codebooks,), self.codebook_size),
            "fine_prompt": ((self.fine.n_fine_codebooks,), self.codebook_size)}
        prompts = []
        for (prompt, (axes, limit)), ids in zip(numbers.items(), arrays, strict=True):
            while ids.ndim > len(axes) + 1 and ids.shape[0] == 1:  # a batch of one
                ids = ids[0]
            if ids.dtype.kind not in "iu":
                raise PresetError(f"{prompt} holds {ids.dtype}, not whole numbers")
            if ids.shape[:-1] != axes or ids.ndim != len(axes) + 1:
                wanted = ", ".join([*map(str, axes), "length"])
                raise PresetError(f"{prompt} has shape {ids.shape}, not ({wanted})")
            if ids.size == 0 or ids.min() < 0 or ids.max() >= limit:
                raise PresetError(f"{prompt} has ids outside 0 to {limit - 1}, or none")
            prompts.append(ids.astype(np.int64))  # `announcer` is uint16
        return Voice(*prompts)


def load_weights(folder: Path, device: torch.device, dtype: torch.dtype,
                 cache: Path | None = None) -> BarkModel:
    """The four networks on `device` in `dtype`. Raises ModelError, also for weights left out.

    With a `cache` folder, pickled weights are kept there in half precision once they are read.
    """
    disable_progress_bar()
    copy = copy_of_weights(folder, dtype, cache) if cache else None
    model = read_copy(copy, dtype) if copy else None
    if model is None:
        model = read_weights(folder, dtype)
        if copy:
            keep_copy(model, copy)
    model.codec_model.float()  # its output is the PCM: in bfloat16 39 dB above the noise, measured
    return model.eval().to(device)


def read_weights(folder: Path, dtype: torch.dtype) -> BarkModel:
    try:
        model, info = BarkModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except Exception as error:  # transformers, safetensors and pickle each raise their own
        why = damaged_weights(folder) or f"{first_line(error)}; they may have come damaged"
        raise ModelError(f"cannot load the weights in {folder}: {why}") from error
    if absent := sorted(info["missing_keys"]):
        raise ModelError(f"the weights in {folder} lack {len(absent)} tensors: {absent[0]} ...")
    return model


def damaged_weights(folder: Path) -> str:
    """Which weights file is cut short or damaged, and what to do; empty where none looks so."""
    for name in weight_files(path.name for path in folder.iterdir()):
        path = folder / name
        if not name.endswith(".index.json") and not looks_whole(path):
            files = f"{path} {path.resolve()}" if path.is_symlink() else str(path)
            return (f"{name} is damaged or cut short, with {path.stat().st_size} bytes; remove it"
                    f" (rm {files}) and start again, or copy it anew")
    return ""


def looks_whole(path: Path) -> bool:
    """Whether the file of weights has its beginning and its end."""
    if path.suffix != ".safetensors":
        return zipfile.is_zipfile(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            tensors = json.loads(file.read(min(size, MAX_HEADER)))
            ends = [entry["data_offsets"][1] for name, entry in tensors.items()
                    if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
    return 8 + size + max(ends, default=0) == path.stat().st_size


def origin_of(paths: Iterable[Path]) -> str:
    """What is known of a model's files without reading them; other files, another origin."""
    origin = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
              for path in paths]
    return hashlib.sha256(repr((transformers.__version__, origin)).encode()).hexdigest()[:32]


def own_folder() -> Path:
    """The folder of ours beside the models."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME).absolute() / "bark-worker"


def copy_of_weights(folder: Path, dtype: torch.dtype, cache: Path) -> Path | None:
    """Where `cache` keeps these weights in half precision; None where a copy gains nothing.

    Unpickling suno/bark reads 4.5 GB into memory; the copy is 2.2 GB, and mapped. Float32 never
    has one. The name holds all that its content depends on.
    """
    files = [folder / name for name in weight_files(path.name for path in folder.iterdir())]
    if dtype == torch.float32 or any(path.suffix == ".safetensors" for path in files):
        return None
    origin = origin_of([*files, folder / "config.json"])
    return cache / f"{origin}-{str(dtype).removeprefix('torch.')}"


def read_copy(copy: Path, dtype: torch.dtype) -> BarkModel | None:
    """The model from a copy of its weights; None if there is none or it is damaged."""
    if not copy.is_dir():
        return None
    try:
        return read_weights(copy, dtype)
    except ModelError as error:
        log.warning("%s; making this copy anew", error)
        shutil.rmtree(copy, ignore_errors=True)
        return None


def keep_copy(model: BarkModel, copy: Path) -> None:
    """Writes a copy of the weights beside its place and renames it: it is whole or not there.

    A failure, for lack of room say, costs the next start's time and nothing else.
    """
    import fcntl

    part = copy.with_suffix(".part")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one worker at a time, on a shared cache
            if copy.exists():  # another one has made it meanwhile
                return
            shutil.rmtree(part, ignore_errors=True)  # of a start that broke off
            model.save_pretrained(part)
            for path in part.iterdir():  # a power cut must not leave names without content
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            part.rename(copy)
    except Exception as error:  # the system's, or safetensors' own
        log.warning("no half-precision copy of the weights in %s: %s; later starts read them"
                    " whole again", copy.parent, first_line(error))
        shutil.rmtree(part, ignore_errors=True)
    else:
        log.info("kept a half-precision copy of the weights in %s", copy)


# -----------------------------------------------------------------------------
# Sampling: which token comes next
#
# Noise comes from counters instead of a generator's state: a draw depends on the segment's own
# stream and its place there alone, so a segment's audio is the same beside any neighbours, and
# nothing has to be kept between steps. All of it is tensors on the device; nothing waits for it.

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: what SplitMix64 counts in


def as_int64(value: int) -> int:
    """The low 64 bits of `value`, read as a signed number as torch.int64 wants it."""
    return ((value & MASK64) ^ (1 << 63)) - (1 << 63)


def mix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64 (Steele, Lea, Flood 2014) of int64 states, wrapping: a hash an element.

    Its last step is left out, as that changes the low 33 bits only: use the others.
    """
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * as_int64(0xBF58476D1CE4E5B9)
    return (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * as_int64(0x94D049BB133111EB)


def stream_states(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Where each random stream (N,) stands after so many draws of up to 2^20 columns each."""
    return torch.add(keys, counters, alpha=as_int64(GOLDEN << 20))


def gumbel_noise(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Gumbel(0, 1) noise (N, n) for columns (n,) or (N, n) of a draw from states (N,).

    Counter-based: the same state gives a column the same noise beside any neighbours, and nothing
    has to be kept between steps.
    """
    bits = mix64(torch.add(states[:, None], columns, alpha=as_int64(GOLDEN)))
    uniform = (((bits >> 41) & 0x7FFFFF) + 0.5) * 2.0 ** -23  # 23 bits: exact in float32
    return -torch.log(-torch.log(uniform))


class Reach(NamedTuple):
    """How far any row of a batch looks when it samples: known beforehand, so that shapes are."""

    width: int = 1         # columns, the best ones; 1 if all rows are greedy
    ordered: bool = False  # whether top_k or top_p take part
    ragged: bool = False   # whether some row looks at fewer
    nucleus: bool = False  # whether top_p takes part


def reach_of(samplings: Iterable[Sampling], columns: int) -> Reach:
    """What rows with these samplings need of scores (N, columns)."""
    drawn = [s for s in samplings if s.temperature]
    if not drawn:
        return Reach()
    widths = [s.top_k if 0 < s.top_k < columns else columns for s in drawn]
    least, most = min(widths), max(widths)
    nucleus = any(s.top_p < 1 for s in drawn)
    return Reach(most, nucleus or least < columns, least < most, nucleus)


# How a row samples, as the device knows it: rows of a table (.., N), the first of Batch.floats
SCALE, NOISE, TOP_P = range(3)


def sampling_floats(sampling: Sampling) -> list[float]:
    """SCALE, NOISE and TOP_P: a greedy row has no noise."""
    if sampling.temperature == 0:
        return [1.0, 0.0, 1.0]
    return [1 / sampling.temperature, 1.0, sampling.top_p]


def sample(scores: torch.Tensor, states: torch.Tensor, reach: Reach, floats: torch.Tensor,
           top_k: torch.Tensor | None = None) -> torch.Tensor:
    """One column for each row of scores (N, V), float32; -1 where the model gave NaN or infinity.

    Temperature, then top_k (N,), 0 being off, then top_p, in `generate`'s order. Adding Gumbel
    noise and taking the best is a draw from the softmax. Nothing here waits for the device, and
    each operation is a kernel to launch: there are as few as can be.
    """
    finite = scores.amax(-1).abs() < math.inf
    if reach.width == 1:
        return torch.where(finite, scores.argmax(-1), -1)
    columns = torch.arange(scores.shape[-1], device=scores.device)
    if reach.ordered:
        scores, columns = scores.topk(reach.width, dim=-1)  # the best first
    scores = scores * floats[SCALE][:, None]
    if reach.ragged and top_k is not None:
        barred = (torch.arange(reach.width, device=scores.device) >= top_k[:, None])
        scores = scores.masked_fill(barred & (top_k[:, None] > 0), -math.inf)
    if reach.nucleus:
        scores = keep_nucleus(scores, floats[TOP_P])
    noise = gumbel_noise(states, columns)
    best = torch.addcmul(scores, noise, floats[NOISE][:, None]).argmax(-1, keepdim=True)
    return torch.where(finite, columns.expand_as(scores).gather(-1, best)[:, 0], -1)


def keep_nucleus(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Bars from scores (N, n), best first, all but the smallest set of best ones that holds
    top_p (N,) of the probability."""
    chance = scores.softmax(-1)
    barred = chance.cumsum(-1) - chance >= top_p[:, None]  # the probability of all before
    barred[:, 0] = False
    return scores.masked_fill(barred, -math.inf)


# -----------------------------------------------------------------------------
# Decoding: many sequences, one token a step, each in a slot of a KV cache
#
# Two of Bark's networks are GPTs that make token after token (CausalGPT). The cache has a fixed
# number of slots, so that a step has one of a few shapes and can be recorded as a CUDA graph; a
# segment on its way (Sequence) holds one, and those that hold one (Batch) are decoded together, as
# a step costs a GPU nearly the same for one and for many. What a step needs to know of its slots
# lies on the device and is moved on there: steps follow each other, and the host looks at a burst
# of tokens at once, which is the one time that it waits.

SPAN = 64  # columns: attention looks at a multiple of so many, for fewer and aligned shapes
STEP_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # by rounding alone


@dataclass(frozen=True, eq=False)
class Segment:
    """One generation to make. The same segment gives the same audio, whatever runs beside it."""

    text_ids: list[int]
    voice: Voice
    seed: int                     # 64 bits
    semantic_sampling: Sampling
    coarse_sampling: Sampling
    fine_sampling: Sampling
    min_eos_p: float | None = None
    max_new_tokens: int | None = None  # semantic; None is the model's own limit

    @property
    def identity(self) -> Hashable:
        """What decides the audio of one model: equal here, equal there."""
        return (tuple(self.text_ids), self.voice, self.seed, self.semantic_sampling,
                self.coarse_sampling, self.fine_sampling, self.min_eos_p, self.max_new_tokens)


class Finished(NamedTuple):
    """A segment's samples, float32 in [-1, 1] at the model's rate, or None and why not."""

    segment: Segment
    samples: np.ndarray | None
    error: str = ""


def add_linear(x: torch.Tensor, layer: Any, y: torch.Tensor) -> None:
    """x += layer(y) for x (N, C), in place and inside the product's own kernel."""
    if layer.bias is not None:
        x += layer.bias
    x.addmm_(y, layer.weight.t())


def run_blocks(model: Any, x: torch.Tensor,
               attend: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The transformer's blocks and last norm over x (N, C), one row a position; x is used up.

    The same arithmetic as BarkBlock.forward, but attention, `attend(layer, qkv (N, 3C))` -> (N, C),
    is left to the caller: the stages differ in nothing else.
    """
    for layer, block in enumerate(model.layers):
        y = attend(layer, block.attn.att_proj(block.layernorm_1(x)))
        add_linear(x, block.attn.out_proj, y)
        add_linear(x, block.mlp.out_proj,
                   block.mlp.gelu(block.mlp.in_proj(block.layernorm_2(x))))
    return model.layernorm_final(x)


def attend_all(qkv: torch.Tensor, rows: int, heads: int,
               causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each position to those of its row, for qkv (rows x T, 3C).

    Returns the result (rows x T, C), and keys and values (2, rows, heads, T, C / heads).
    """
    qkv = qkv.view(rows, -1, 3, heads, qkv.shape[-1] // (3 * heads)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(*qkv, is_causal=causal)
    return y.transpose(1, 2).flatten(0, 1).flatten(1), qkv[1:]


class CausalGPT:
    """The semantic or coarse network over a static KV cache, one row of it a slot.

    `head` is the slice of output ids that the stage may ever choose from; the others' logits
    are not computed.
    """

    def __init__(self, model: Any, slots: int, head: slice):
        config = model.config
        self.model, self.slots, self.heads = model, slots, config.num_heads
        self.head = model.lm_head.weight[head]
        shape = (config.num_layers, 2, slots, config.num_heads, config.block_size,
                 config.hidden_size // config.num_heads)
        self.device = model.device  # a property that walks the parameters: 26 us each time
        self.kv = torch.zeros(shape, dtype=model.dtype, device=self.device)  # keys, then values
        self.columns = torch.arange(max(config.block_size, slots), device=self.device)
        self.length = config.block_size
        ahead = torch.full((self.length, self.length), -math.inf, device=self.device)
        self.masks = ahead.triu(1).to(model.dtype)  # row i lets position i look at 0 to i

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.input_embeds_layer(ids)

    def prefill(self, slots: torch.Tensor, x: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Fills slots (B,) with token embeddings x (B, T, C); the logits (B, V) after column last.

        Rows may be padded at the end: nothing looks ahead there.
        """
        rows, length, _ = x.shape
        x = (x + self.model.position_embeds_layer(self.columns[:length])).flatten(0, 1)

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            y, kv = attend_all(qkv, rows, self.heads, causal=True)
            self.kv[layer][:, slots, :, :length] = kv
            return y

        hidden = run_blocks(self.model, x, attend).view(rows, length, -1)
        return F.linear(hidden[self.columns[:rows], last], self.head).float()

    def decode(self, ids: torch.Tensor, at: torch.Tensor, span: int) -> torch.Tensor:
        """One step of slots [0, n): ids (n,) at positions (n,), below span; the logits (n, V)."""
        rows, heads = len(ids), self.heads
        row = self.columns[:rows]
        mask = self.masks[:, :span][at][:, None, None]

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            q, kv = qkv.view(rows, 3, heads, -1).tensor_split([1], dim=1)
            cache = self.kv[layer]
            cache[:, row, :, at] = kv
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), cache[0, :rows, :, :span], cache[1, :rows, :, :span], mask)
            return y.reshape(rows, -1)

        x = self.embed(ids) + self.model.position_embeds_layer(at)
        return F.linear(run_blocks(self.model, x, attend), self.head).float()

    def move(self, source: int, target: int) -> None:
        self.kv[:, :, target] = self.kv[:, :, source]

    def clear(self, slots: int | slice) -> None:
        """Forgets what was not finite there: it would spread even from under a mask, as NaN x 0."""
        self.kv[:, :, slots] = 0


class Sequence:
    """A segment on its way through the stages; made anew for each take."""

    def __init__(self, segment: Segment, urgent: bool, take: int = 0, min_new_tokens: int = 0):
        self.segment, self.urgent = segment, urgent
        self.take, self.min_new_tokens = take, min_new_tokens
        digest = hashlib.sha256(f"{segment.seed}/{take}".encode()).digest()
        keys = struct.unpack_from("<3q", digest)
        self.keys = dict(zip(("semantic", "coarse", "fine"), keys, strict=True))  # random streams
        self.waits = True        # for a heavy pass: a prefill or a fine window
        self.since = 0           # when that began, in Turns.ticks
        self.position = 0        # in the KV cache, of the next token
        self.unread = 0          # tokens that the device has made and nobody has read
        self.is_spoilt = False   # by NaN or infinity: it has to start over
        self.semantic: list[int] = []
        self.coarse: list[int] = []
        self.coarse_length = 0   # coarse tokens to make
        self.window_left = 0     # of them before the next window; 0: it waits for a prefill
        self.history = (np.empty(0, int), np.empty(0, int))  # the voice's, for coarse windows
        self.codes: torch.Tensor | None = None  # (frames, codebooks), history first
        self.fine_window = 0
        self.samples: np.ndarray | None = None  # float32

    def again(self, take: int, min_new_tokens: int) -> Sequence:
        return Sequence(self.segment, self.urgent, take, min_new_tokens)


# What a decode step knows of each slot: rows of Batch.ints, and after those above of Batch.floats
POSITION, MADE, ACTIVE, KEY, TOP_K, MIN_NEW = range(6)
STOP_P = 3


class Shape(NamedTuple):
    """How an engine works: segments at once, tokens made between two looks at them, and whether
    every decode step has the one same shape."""

    slots: int
    burst: int
    is_fixed: bool


Choose = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Reach], torch.Tensor]
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]


class CudaCapture:
    """Records device work as CUDA graphs that share one memory pool: largest first, please.

    One side stream for all of it, as cuBLAS keeps memory for every stream that it has seen.
    """

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), None

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """What replays `run`, and the tensor that holds its result after each replay."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            run()  # capture forbids what a first call does: loading, planning
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = run()
        self.pool = graph.pool()
        return graph.replay, result


class Batch:
    """The sequences that hold a slot of one CausalGPT, in slot order.

    The recent tokens, position, random stream and sampling of each slot are on the device, and a
    decode step moves them on there: steps can follow each other without waiting for the host.
    `stage` is "semantic" or "coarse", `choose` draws tokens from logits (B, V), `usual` is the
    model folder's sampling, and `columns` are what it chooses from.
    """

    def __init__(self, stage: str, gpt: CausalGPT, choose: Choose, usual: Sampling, columns: int,
                 shape: Shape):
        self.stage, self.gpt, self.choose, self.fixed_shape = stage, gpt, choose, shape.is_fixed
        self.usual, self.columns = usual, columns
        self.own = self.reach = reach_of([usual], columns)
        self.live: list[Sequence] = []
        self.ints = torch.zeros(6, gpt.slots, dtype=torch.int64, device=gpt.device)
        self.floats = torch.zeros(4, gpt.slots, device=gpt.device)
        self.recent = torch.zeros(gpt.slots, shape.burst + 1, dtype=torch.int64, device=gpt.device)
        self.active: list[int] = []  # what ints[ACTIVE] says of the live ones
        self.graphs: dict[tuple[int, int], Callable[[], None]] = {}

    def room(self) -> int:
        return self.gpt.slots - len(self.live)

    def prefill(self, sequences: list[Sequence], x: torch.Tensor, lengths: list[int]) -> None:
        """Starts them, in their slots, from x (B, T, C): the first token of each is made."""
        slots = torch.tensor([self.live.index(s) for s in sequences], device=self.gpt.device)
        self._describe(slots, sequences, lengths)
        last = torch.tensor(lengths, device=self.gpt.device) - 1
        self._advance(slots, self.gpt.prefill(slots, x, last))
        for sequence, length in zip(sequences, lengths, strict=True):
            sequence.position, sequence.waits = length, False
            sequence.unread += 1

    def _describe(self, slots: torch.Tensor, sequences: list[Sequence],
                  lengths: list[int]) -> None:
        ints, floats = [], []
        for sequence, length in zip(sequences, lengths, strict=True):
            how = getattr(sequence.segment, f"{self.stage}_sampling")
            ints.append([length - 1, len(getattr(sequence, self.stage)), 1,
                         sequence.keys[self.stage], how.top_k, sequence.min_new_tokens])
            floats.append([*sampling_floats(how), sequence.segment.min_eos_p or math.inf])
        self.ints[:, slots] = torch.tensor(ints, device=self.gpt.device).T
        self.floats[:, slots] = torch.tensor(floats, device=self.gpt.device).T
        self.active = []

    def decode(self, steps: int) -> None:
        """Makes `steps` more tokens for each live sequence that does not wait for a prefill."""
        self._tell_active()
        rows, span = self._shape(steps)
        replay = self.graphs.get((rows, span)) if self.reach == self.own else None
        for _ in range(steps):
            if replay:
                replay()
            else:
                self.decode_step(rows, span)
        for sequence, active in zip(self.live, self.active, strict=True):
            sequence.position += steps * active
            sequence.unread += steps * active

    def _tell_active(self) -> None:
        active = [int(not s.waits) for s in self.live]
        if active != self.active:
            self.active = active
            spare = [0] * self.room()
            self.ints[ACTIVE] = torch.tensor(active + spare, device=self.gpt.device)

    def _shape(self, steps: int) -> tuple[int, int]:
        """Rows and columns of the cache that the next steps use: few different ones."""
        if self.fixed_shape:
            return self.gpt.slots, self.gpt.length
        rows, span = len(self.live), max(s.position for s in self.live) + steps
        if not self.graphs:
            return rows, min(self.gpt.length, SPAN * math.ceil(span / SPAN))
        return min((shape for shape in self.graphs if shape[0] >= rows and shape[1] >= span),
                   default=(rows, self.gpt.length))

    def decode_step(self, rows: int, span: int) -> torch.Tensor:
        """One decode step of slots [0, rows), on the device alone; its logits (rows, V)."""
        at = self.ints[POSITION, :rows].clamp(max=span - 1)  # a slot that ended may run on
        logits = self.gpt.decode(self.recent[:rows, -1].clamp(min=0), at, span)
        self._advance(slice(0, rows), logits)
        return logits

    def _advance(self, slots: slice | torch.Tensor, logits: torch.Tensor) -> None:
        """Draws the next token of each of these slots and moves the active ones on.

        What an inactive slot draws is overwritten by its prefill before anyone reads it.
        """
        ints = self.ints[:, slots]
        tokens = self.choose(logits, ints, self.floats[:, slots], self.reach)
        self.recent[slots] = torch.cat([self.recent[slots, 1:], tokens[:, None]], dim=1)
        self.ints[POSITION : MADE + 1, slots] = ints[POSITION : MADE + 1] + ints[ACTIVE]

    def read(self) -> list[tuple[Sequence, list[int]]]:
        """Waits for the device; each live sequence with the tokens made since the last reading."""
        rows = self.recent[: len(self.live)].tolist()
        read = [(s, row[len(row) - s.unread :])
                for s, row in zip(self.live, rows, strict=True) if s.unread]
        for sequence, _ in read:
            sequence.unread = 0
        return read

    def join(self, sequences: list[Sequence]) -> None:
        self.live += sequences
        self._widen()

    def leave(self, sequence: Sequence) -> None:
        """Frees the slot; the last slot's content moves there, so that the rest stays one block."""
        slot, last = self.live.index(sequence), len(self.live) - 1
        if slot != last:
            self.gpt.move(last, slot)
            for table in (self.ints, self.floats):
                table[:, slot] = table[:, last]
            self.recent[slot] = self.recent[last]
        self.live[slot] = self.live[last]
        self.live.pop()
        self.active = []
        self._widen()

    def _widen(self) -> None:
        """Sees that `reach` is enough for every live sequence's sampling."""
        samplings = [getattr(s.segment, f"{self.stage}_sampling") for s in self.live]
        self.reach = reach_of([self.usual, *samplings], self.columns)

    def capture(self, capture: Capture, spans: Iterable[int]) -> None:
        """Records the step for a few shapes, the largest first."""
        for rows in (self.gpt.slots,) if self.fixed_shape else buckets(self.gpt.slots):
            for span in sorted(spans, reverse=True):
                try:
                    self.graphs[rows, span] = self._record(capture, rows, span)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    log.warning("no CUDA graph for %d %s slots: %s; that step is slower",
                                rows, self.stage, first_line(error))
        self.forget()

    def _record(self, capture: Capture, rows: int, span: int) -> Callable[[], None]:
        replay, logits = capture(lambda: self.decode_step(rows, span))
        self._check(replay, logits, rows, span)
        return replay

    def _check(self, replay: Callable[[], None], captured: torch.Tensor, rows: int,
               span: int) -> None:
        """Raises RuntimeError unless the replay does what the step does, on random input."""
        self._randomize(span)
        ints, recent = self.ints.clone(), self.recent.clone()
        expected = self.decode_step(rows, span).clone(), self.ints.clone()
        self.ints.copy_(ints)
        self.recent.copy_(recent)
        replay()
        error = (captured - expected[0]).abs().max() / expected[0].abs().max()
        if not error < STEP_ERROR[self.gpt.kv.dtype]:
            raise RuntimeError(f"its logits differ by {error:.1e} of the largest")
        if not torch.equal(self.ints, expected[1]):
            raise RuntimeError("it does not move its slots on")

    def _randomize(self, span: int) -> None:
        """A cache, and slots anywhere in it, as no request would leave them."""
        self.gpt.kv.normal_()
        for table in (self.ints, self.recent):  # position, ..., and tokens of each slot
            table.random_(0, span)
        self.ints[ACTIVE], self.ints[MIN_NEW] = 1, 0
        self.floats.uniform_(0.5, 1.0)

    def forget(self) -> None:
        """Makes all slots as new."""
        self.gpt.clear(slice(None))
        self.ints.zero_()
        self.recent.zero_()
        self.live.clear()
        self.active = []
        self.reach = self.own


def buckets(slots: int) -> list[int]:
    """Numbers of slots to have a step for, descending: few, and little waste between them."""
    steps = [n for n in (1, 2, 4, *range(8, slots, 8)) if n < slots]
    return [slots, *reversed(steps)]


# -----------------------------------------------------------------------------
# Stages: Bark's own three models, and EnCodec
#
# Text becomes semantic tokens, these coarse codes, these fine codes, and these samples; each stage
# is a class that can be read beside the one of transformers that it names. All have the same verbs:
# `add` a sequence, `step` until it comes out, `remove` and `clear` what nobody wants, iterate over
# what is in it. Windows, offsets and limits come from the model's folder (`facts`), so that other
# Barks than Suno's fit too; a stage knows no other, and what comes next is the engine's.

PATIENCE = 30  # tokens; see Turns
CODEC_LEAST = 16   # frames; twice the reach of EnCodec's first convolution
CODEC_MOST = 2048  # frames decoded at once: 27 s of audio, some 300 MB on their way
SHORTEST_SECONDS = 0.2  # a shorter sampled take is no speech; a greedy one only if it is empty
SHORTEST_PER_TOKEN = 0.1  # seconds; a text token of running speech lasts about 0.3


class Turns:
    """Whose turn it is for a heavy pass, a prefill or a fine window, of which a step does few.

    `everyone` yields all sequences in the works. While urgent ones are among them, all others
    together get one pass in PATIENCE tokens: so speech starts early, and nobody stands still.
    """

    def __init__(self, group: int, everyone: Callable[[], Iterable[Sequence]]):
        self.group, self.everyone = group, everyone  # passes that are done as one
        self.ticks = 0    # tokens of time, by which waiting is measured
        self.granted = 0  # when one that is not urgent last got a pass beside urgent ones

    def wait(self, sequence: Sequence) -> None:
        sequence.waits, sequence.since = True, self.ticks

    def pick(self, due: Iterable[Sequence]) -> list[Sequence]:
        """Those of `due` that get a pass now, as many as go together; who waited longest first."""
        due = sorted(due, key=lambda s: (not s.urgent, s.since))
        if any(s.urgent for s in self.everyone()):
            chosen = [s for s in due if s.urgent]
            if len(chosen) < len(due) and self.ticks - self.granted >= PATIENCE:
                self.granted = self.ticks
                chosen = [*chosen[: self.group - 1], due[len(chosen)]]
            due = chosen
        return due[: self.group]


class CausalStage:
    """A stage that makes token after token: sequences wait for a slot of its batch, then hold one.

    Its verbs are every stage's: `add` a sequence, `step` until it comes out, `remove` and `clear`
    what nobody wants, iterate over all that are in it. The two kinds of it tell what goes into a
    prefill (`prompts`), how a token is chosen (`choose`) and when a sequence has enough (`take`).
    """

    def __init__(self, batch: Batch, turns: Turns):
        self.batch, self.turns = batch, turns
        self.queue: deque[Sequence] = deque()

    def __iter__(self) -> Iterator[Sequence]:
        return itertools.chain(self.queue, self.batch.live)

    def add(self, sequence: Sequence) -> None:
        self.queue.append(sequence)

    def step(self, steps: int) -> list[Sequence]:
        """Slots for those that wait, and `steps` tokens more; returns who is through or spoilt."""
        joining = [self.queue.popleft() for _ in range(min(len(self.queue), self.batch.room()))]
        for sequence in joining:
            self.turns.wait(sequence)
        self.batch.join(joining)
        if due := self.turns.pick(s for s in self.batch.live if s.waits):
            self.batch.prefill(due, *self.prompts(due))
        if running := [s for s in self.batch.live if not s.waits]:
            self.batch.decode(self.burst(steps, running))
        ended = [s for s, tokens in self.batch.read() if self.take(s, tokens)]
        for sequence in ended:
            self.batch.leave(sequence)
            if sequence.is_spoilt:
                self.batch.gpt.clear(len(self.batch.live))  # the slot that is free now
        return ended

    def burst(self, most: int, running: list[Sequence]) -> int:
        """How many tokens to make at once."""
        return most

    def prompts(self, due: list[Sequence]) -> tuple[torch.Tensor, list[int]]:
        """Embeddings (B, T, C) of their prefills, padded at the end, and their lengths."""
        raise NotImplementedError

    def take(self, sequence: Sequence, tokens: list[int]) -> bool:
        """Keeps the tokens; whether the sequence leaves with them. -1 is one that was not finite.
        """
        raise NotImplementedError

    def remove(self, segment: Segment) -> None:
        for sequence in [s for s in self.batch.live if s.segment is segment]:
            self.batch.leave(sequence)
        for sequence in [s for s in self.queue if s.segment is segment]:
            self.queue.remove(sequence)

    def clear(self) -> None:
        self.queue.clear()
        self.batch.forget()


class Semantic(CausalStage):
    """Text to semantic tokens, 49.9 a second: what is said and how (BarkSemanticModel).

    A prefill of 257 positions: text ids and the voice's last semantic tokens *summed* position by
    position, then the infer token; after it one token a step until EOS.
    """

    def __init__(self, model: Any, facts: ModelFacts, shape: Shape, turns: Turns):
        self.numbers, self.eos = facts.semantic, facts.semantic.semantic_vocab_size
        gpt = CausalGPT(model, shape.slots, slice(0, self.eos + 1))
        super().__init__(Batch("semantic", gpt, self.choose, facts.semantic_sampling,
                               self.eos + 1, shape), turns)

    def capture(self, capture: Capture) -> None:
        """Records steps that look at half, three quarters or all columns of the cache."""
        length = self.batch.gpt.length
        few = () if self.batch.fixed_shape else (2 * (length // 4), 3 * (length // 4))
        self.batch.capture(capture, [*few, length])

    def step(self, steps: int) -> list[Sequence]:
        ended = super().step(steps)
        early = [s for s in ended if self._is_empty(s)]
        self.queue.extend(s.again(s.take, self._plausible_length(s)) for s in early)
        return [s for s in ended if s not in early]

    def prompts(self, due: list[Sequence]) -> tuple[torch.Tensor, list[int]]:
        length = self.numbers.max_input_semantic_length
        ids = np.stack([self._prompt(s.segment) for s in due])
        x = self.batch.gpt.embed(torch.from_numpy(ids).to(self.batch.gpt.device))
        return (torch.cat([x[:, :length] + x[:, length:-1], x[:, -1:]], dim=1),
                [length + 1] * len(due))

    def _prompt(self, segment: Segment) -> np.ndarray:
        """Token ids (513,): text, voice history, infer."""
        numbers, length = self.numbers, self.numbers.max_input_semantic_length
        text = np.full(length, numbers.text_pad_token)
        text[: len(segment.text_ids)] = np.array(segment.text_ids) + numbers.text_encoding_offset
        history = np.full(length, numbers.semantic_pad_token)
        recent = segment.voice.semantic[-length:]
        history[: len(recent)] = recent
        return np.concatenate([text, history, [numbers.semantic_infer_token]])

    def choose(self, scores: torch.Tensor, ints: torch.Tensor, floats: torch.Tensor,
               reach: Reach) -> torch.Tensor:
        """Draws tokens (B,) from scores (B, vocabulary + EOS); the last column ends the segment."""
        eos = scores.shape[-1] - 1
        scores[:, eos].masked_fill_(ints[MADE] < ints[MIN_NEW], -math.inf)
        early = scores.softmax(-1)[:, eos] > floats[STOP_P]  # never where a score is not finite
        states = stream_states(ints[KEY], ints[MADE])
        return sample(scores, states, reach, floats, ints[TOP_K]).masked_fill(early, eos)

    def take(self, sequence: Sequence, tokens: list[int]) -> bool:
        limit = sequence.segment.max_new_tokens or self._most_tokens()
        for token in tokens:
            sequence.is_spoilt = token < 0
            if 0 <= token < self.eos:
                sequence.semantic.append(token)
            if token < 0 or token == self.eos or len(sequence.semantic) >= limit:
                return True
        return False

    def _most_tokens(self) -> int:
        """The folder's limit, and no more than the position table has room for."""
        room = self.batch.gpt.length - self.numbers.max_input_semantic_length
        return min(self.numbers.max_new_tokens, room)

    def _is_empty(self, sequence: Sequence) -> bool:
        """Whether EOS came at once, though it was not barred yet."""
        sampled = sequence.segment.semantic_sampling.temperature > 0
        shortest = SHORTEST_SECONDS * self.numbers.semantic_rate_hz if sampled else 1
        return not (sequence.is_spoilt or sequence.min_new_tokens
                    or len(sequence.semantic) >= shortest)

    def _plausible_length(self, sequence: Sequence) -> int:
        """Tokens that its text takes at the least."""
        seconds = max(SHORTEST_SECONDS, SHORTEST_PER_TOKEN * len(sequence.segment.text_ids))
        return min(math.ceil(seconds * self.numbers.semantic_rate_hz), self._most_tokens())


class Coarse(CausalStage):
    """Semantic tokens to EnCodec's codebooks 0 and 1, in turn, 150 tokens a second: the rough
    sound (BarkCoarseModel).

    A window of 60 tokens (0.4 s) at a time, each with a prefill of its own: 256 semantic tokens
    around the place, the infer token, and up to 630 coarse tokens so far, the voice's first.
    """

    def __init__(self, model: Any, facts: ModelFacts, shape: Shape, turns: Turns):
        self.numbers, self.facts = facts.coarse, facts
        self.books, self.book = facts.coarse.n_coarse_codebooks, facts.codebook_size
        self.first_id = facts.semantic.semantic_vocab_size
        ids = slice(self.first_id, self.first_id + self.books * self.book)
        super().__init__(Batch("coarse", CausalGPT(model, shape.slots, ids), self.choose,
                               facts.coarse_sampling, self.book, shape), turns)

    def capture(self, capture: Capture) -> None:
        self.batch.capture(capture, [self.batch.gpt.length])

    def add(self, sequence: Sequence) -> None:
        # in float32, as BarkCoarseModel.generate counts; whole frames, so that codebooks pair
        frames = np.float32(len(sequence.semantic)) * self.facts.semantic_to_coarse / self.books
        sequence.coarse_length = int(frames) * self.books
        sequence.history = self._voice_history(sequence.segment.voice)
        super().add(sequence)

    def _voice_history(self, voice: Voice) -> tuple[np.ndarray, np.ndarray]:
        """The voice's last semantic (n,) and coarse (m,) tokens that still belong together.

        Coarse tokens are interleaved by frame; the last two are dropped, which "sounds better"
        (Suno's generation.py).
        """
        ratio = self.facts.semantic_to_coarse
        books = np.arange(self.books)[:, None] * self.book
        coarse = (voice.coarse + books + self.first_id).T.reshape(-1)
        semantic = voice.semantic
        kept = min(int(self.numbers.max_coarse_history // ratio),
                   len(semantic) - len(semantic) % 2, int(len(coarse) // ratio))
        return semantic[-kept:], coarse[-round(kept * ratio):][:-2]

    def burst(self, most: int, running: list[Sequence]) -> int:
        return min(most, *(s.window_left for s in running))

    def prompts(self, due: list[Sequence]) -> tuple[torch.Tensor, list[int]]:
        prompts = [self._window(s) for s in due]
        lengths = list(map(len, prompts))
        numbers = self.numbers
        longest = (numbers.max_coarse_input_length + 1 + numbers.max_coarse_history
                   if self.batch.fixed_shape else max(lengths))
        ids = np.stack([np.pad(p, (0, longest - len(p))) for p in prompts])
        for sequence in due:
            sequence.window_left = numbers.sliding_window_len
        return self.batch.gpt.embed(torch.from_numpy(ids).to(self.batch.gpt.device)), lengths

    def _window(self, sequence: Sequence) -> np.ndarray:
        """Token ids of the next window's prefill."""
        numbers, ratio = self.numbers, self.facts.semantic_to_coarse
        old_semantic, old_coarse = sequence.history
        semantic = np.concatenate([old_semantic, sequence.semantic]).astype(np.int64)
        at = len(old_semantic) + round(len(sequence.coarse) / ratio)
        first = max(0, at - int(numbers.max_coarse_history // ratio))
        heard = semantic[first : first + numbers.max_coarse_input_length]
        padding = numbers.max_coarse_input_length - len(heard)
        coarse = np.concatenate([old_coarse, sequence.coarse]).astype(np.int64)
        return np.concatenate([
            np.pad(heard, (0, padding), constant_values=numbers.coarse_semantic_pad_token),
            [numbers.coarse_infer_token], coarse[-numbers.max_coarse_history:]])

    def choose(self, logits: torch.Tensor, ints: torch.Tensor, floats: torch.Tensor,
               reach: Reach) -> torch.Tensor:
        """Draws token ids (B,) among each one's own codebook, as Suno does, unlike `generate`."""
        codebook = ints[MADE] % self.books
        own = codebook[:, None, None].expand(-1, 1, self.book)
        scores = logits.view(-1, self.books, self.book).gather(1, own)[:, 0]
        tokens = sample(scores, stream_states(ints[KEY], ints[MADE]), reach, floats, ints[TOP_K])
        ids = torch.add(tokens, codebook, alpha=self.book) + self.first_id
        return torch.where(tokens >= 0, ids, -1)

    def take(self, sequence: Sequence, tokens: list[int]) -> bool:
        sequence.window_left -= len(tokens)
        for token in tokens:
            if token < 0:
                sequence.is_spoilt = True
                return True
            sequence.coarse.append(token)
            if len(sequence.coarse) >= sequence.coarse_length:
                return True
        if sequence.window_left == 0:
            self.turns.wait(sequence)
        return False


class Codec:
    """EnCodec's decoder: codes (frames, 8) at 75 frames a second to samples."""

    def __init__(self, model: Any):
        self.model, config = model, model.config
        self.looks_back = config.use_causal_conv and config.trim_right_ratio == 1.0

    def decode(self, codes: list[torch.Tensor]) -> Iterator[np.ndarray]:
        """Samples of each clip's codes, float32, several clips at once where that is safe.

        It looks back only, in its convolutions and its LSTM, so that padding at the end touches
        nobody; clips shorter than its reflected padding at the start are made alone.
        """
        safe = self.looks_back and min(map(len, codes)) >= CODEC_LEAST
        many = max(1, CODEC_MOST // max(map(len, codes))) if safe else 1
        for first in range(0, len(codes), many):
            yield from self._waves(codes[first : first + many])

    def _waves(self, codes: list[torch.Tensor]) -> list[np.ndarray]:
        """Samples of each, padded to the longest on their way."""
        longest = max(map(len, codes))
        padded = torch.stack([F.pad(c.clamp(min=0), (0, 0, 0, longest - len(c))) for c in codes])
        waves = self.model.decoder(self.model.quantizer.decode(padded.permute(2, 0, 1)))[:, 0]
        hop = waves.shape[1] // longest  # samples a frame
        return [wave[: len(c) * hop]
                for c, wave in zip(codes, waves.float().cpu().numpy(), strict=True)]


class Fine:
    """Codebooks 0 and 1 to all eight (BarkFineModel), and with EnCodec to samples.

    Windows of 1024 frames, 512 of them new; one pass over a window predicts one codebook of it
    from that and all lower ones, so a window takes six passes.
    """

    def __init__(self, model: Any, codec: Codec, facts: ModelFacts, turns: Turns):
        self.model, self.codec, self.turns = model, codec, turns
        self.numbers, self.book = facts.fine, facts.codebook_size
        self.given = facts.coarse.n_coarse_codebooks
        self.first_id = facts.semantic.semantic_vocab_size  # of the coarse ones
        self.device = model.device
        self.frames = torch.arange(facts.fine.max_fine_input_length, device=self.device)
        self.queue: list[Sequence] = []

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.queue)

    def add(self, sequence: Sequence) -> None:
        self.turns.wait(sequence)
        self.queue.append(sequence)

    def _lay_out(self, sequence: Sequence) -> torch.Tensor:
        """Codes (frames, 8): voice history, coarse codes, padding up to one window."""
        numbers = self.numbers
        coarse = (np.array(sequence.coarse).reshape(-1, self.given) - self.first_id) % self.book
        history = sequence.segment.voice.fine[:, -numbers.max_fine_history_length:].T
        frames = max(len(history) + len(coarse), numbers.max_fine_input_length)
        codes = np.full((frames, numbers.n_fine_codebooks), self.book)
        codes[: len(history)] = history
        codes[len(history) : len(history) + len(coarse), : self.given] = coarse
        return torch.from_numpy(codes).to(self.device)

    def step(self, steps: int) -> list[Sequence]:
        """A window of those whose turn it is, however many `steps`; returns who is done."""
        chosen = self.turns.pick(self.queue)
        if not chosen:
            return []
        for sequence in chosen:
            if sequence.codes is None:
                sequence.codes = self._lay_out(sequence)
        self._fill_windows(chosen)
        for sequence in chosen:
            sequence.fine_window += 1
            self.turns.wait(sequence)
        done = [s for s in chosen if s.fine_window == self._windows(s)]
        if done:
            self._decode(done)
        for sequence in done:  # not before: if memory runs out, who is in the queue starts over
            self.queue.remove(sequence)
        return done

    def remove(self, segment: Segment) -> None:
        self.queue = [s for s in self.queue if s.segment is not segment]

    def clear(self) -> None:
        self.queue.clear()

    def _spans(self, sequence: Sequence) -> tuple[int, int, int]:
        """Frames of its codes: the voice's, its own, and those the next window begins at."""
        numbers = self.numbers
        history = min(sequence.segment.voice.fine.shape[1], numbers.max_fine_history_length)
        start = min(sequence.fine_window * numbers.max_fine_history_length,
                    len(sequence.codes) - numbers.max_fine_input_length)
        return history, len(sequence.coarse) // self.given, start

    def _windows(self, sequence: Sequence) -> int:
        """How many windows its codes take, in BarkFineModel's count."""
        history, frames, _ = self._spans(sequence)
        more = frames - (self.numbers.max_fine_input_length - history)
        return 1 + max(0, math.ceil(more / self.numbers.max_fine_history_length))

    def _fill_windows(self, chosen: list[Sequence]) -> None:
        """Predicts the fine codebooks of each one's next window, from its first new frame on."""
        length, hop = self.numbers.max_fine_input_length, self.numbers.max_fine_history_length
        starts, fills = [], []
        for sequence in chosen:
            history, _, start = self._spans(sequence)
            starts.append(start)
            fills.append(min(history + sequence.fine_window * hop, len(sequence.codes) - hop))
        codes = torch.stack([s.codes[start : start + length]
                             for s, start in zip(chosen, starts, strict=True)])
        frames = torch.tensor(starts, device=self.device)[:, None] + self.frames  # (B, T)
        new = frames >= torch.tensor(fills, device=self.device)[:, None]
        first = min(fill - start for fill, start in zip(fills, starts, strict=True))
        self._predict_codebooks(chosen, codes, frames, new, first)
        for sequence, start, filled in zip(chosen, starts, codes, strict=True):
            sequence.codes[start : start + length] = filled

    def _predict_codebooks(self, chosen: list[Sequence], codes: torch.Tensor,
                           frames: torch.Tensor, new: torch.Tensor, first: int) -> None:
        """Fills codes (B, T, 8) where `new` (B, T), which is false before column `first`.

        A codebook is predicted from its own and all lower ones: the sum of their embeddings.
        """
        model, book, books = self.model, self.book, codes.shape[-1]
        samplings = [s.segment.fine_sampling for s in chosen]
        reach = reach_of(samplings, book)
        frames = frames[:, first:]
        floats, keys = (  # of each frame: (B x T, 3) and (B x T,)
            torch.tensor(values, device=self.device).repeat_interleave(frames.shape[1], dim=0)
            for values in ([sampling_floats(s) for s in samplings],
                           [s.keys["fine"] for s in chosen]))

        def embed(codebook: int) -> torch.Tensor:
            ids = codes[..., codebook].clamp(min=0)  # -1 marks frames that were not finite
            return model.input_embeds_layers[codebook](ids)

        lower = sum(map(embed, range(self.given))) + model.position_embeds_layer(self.frames)
        for codebook in range(self.given, books):
            hidden = self._hidden(lower + embed(codebook))[:, first:]
            scores = model.lm_heads[codebook - model.config.n_codes_given](hidden)[..., :book]
            states = stream_states(keys, (frames * books + codebook).flatten())
            tokens = sample(scores.flatten(0, 1).float(), states, reach, floats.T)
            codes[:, first:, codebook] = torch.where(
                new[:, first:], tokens.view(len(codes), -1), codes[:, first:, codebook])
            lower = lower + embed(codebook)

    def _hidden(self, x: torch.Tensor) -> torch.Tensor:
        """The network over x (B, T, C): every position looks at all of its window."""
        rows, heads = len(x), self.model.config.num_heads
        hidden = run_blocks(self.model, x.flatten(0, 1), lambda layer, qkv: attend_all(
            qkv, rows, heads, causal=False)[0])
        return hidden.view_as(x)

    def _decode(self, done: list[Sequence]) -> None:
        codes = [self._own_codes(s) for s in done]
        for sequence, own, samples in zip(done, codes, self.codec.decode(codes), strict=True):
            sequence.samples = samples
            sequence.is_spoilt = bool((own < 0).any()) or not np.isfinite(samples).all()

    def _own_codes(self, sequence: Sequence) -> torch.Tensor:
        history, frames, _ = self._spans(sequence)
        return sequence.codes[history : history + frames]


# -----------------------------------------------------------------------------
# Engine: segments in, PCM out, any number at once
#
# The order of the stages, and what becomes of a sequence between them. A step does a little of
# each: the GPU is kept full by many segments, and the first sound of one does not wait for the end
# of others. Where memory runs out, slots become fewer and what was in them starts over; where a
# network gives NaN, the sequence does. No text, no threads, no HTTP.

BURST = 12  # tokens that a GPU makes before the host looks at them; a fifth of a coarse window, so
# that windows which restart at different times restart at one of five, and then together
GROUP = 8  # prefills or fine windows that a GPU does as one; more hardly fill it better
MAX_SLOTS = 64
WORKING_BYTES = 1 << 30  # of a GPU's memory for all that is not weights or KV cache
TAKES = 3  # generations tried for a segment before it counts as failed


def check_windows(model: BarkModel, facts: ModelFacts) -> None:
    """Raises ModelError if the two configuration files of the folder contradict each other."""
    semantic, coarse, fine = facts.semantic, facts.coarse, facts.fine
    lengths = {
        "semantic": (model.semantic, semantic.max_input_semantic_length + 1),
        "coarse_acoustics": (model.coarse_acoustics, coarse.max_coarse_input_length + 1
                             + coarse.max_coarse_history + coarse.sliding_window_len - 1),
        "fine_acoustics": (model.fine_acoustics, fine.max_fine_input_length),
    }
    for name, (stage, needed) in lengths.items():
        if needed > stage.config.block_size:
            raise ModelError(f"config.json: {name} has {stage.config.block_size} positions, but"
                             f" generation_config.json asks for {needed}")
    ids = {  # one id too many would be read past a table's end, on a GPU with no way back
        "semantic_config.input_vocab_size": (
            model.semantic, len(facts.tokenizer) + semantic.text_encoding_offset),
        "coarse_acoustics_config.input_vocab_size": (
            model.coarse_acoustics, semantic.semantic_vocab_size
            + coarse.n_coarse_codebooks * facts.codebook_size)}
    for name, (stage, needed) in ids.items():
        if needed > stage.config.input_vocab_size:
            raise ModelError(f"config.json: {name} is {stage.config.input_vocab_size}, but"
                             f" tokenizer and generation_config.json need {needed}")
    if semantic.eos_token_id != semantic.semantic_vocab_size:
        raise ModelError(f"generation_config.json: eos_token_id is {semantic.eos_token_id}, not"
                         f" semantic_vocab_size, {semantic.semantic_vocab_size}")


class Engine:
    """Bark for any number of segments at once, `slots` of them in the works.

    `add` segments, call `step` again and again; each call does a little of all stages and returns
    the segments that it finished. `abort` forgets one. One thread only. With `capture`, decode
    steps are recorded once and replayed; on a GPU that is the default. `burst` is the number of
    tokens made between two looks at them.
    """

    def __init__(self, model: BarkModel, facts: ModelFacts, slots: int, fixed_shape: bool = False,
                 capture: Callable[[], Capture] | None = None, burst: int | None = None):
        check_windows(model, facts)
        self.model, self.facts, self.device = model, facts, model.device
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)  # for this thread: streams are made on it
        self._capture = capture or (CudaCapture if on_gpu else None)
        self._shape = Shape(slots, burst or (BURST if on_gpu else 1), fixed_shape)
        self.turns = Turns(GROUP if on_gpu and not fixed_shape else 1, self._sequences)
        self.finished: list[Finished] = []
        self._allocate()

    @property
    def slots(self) -> int:
        return self._shape.slots

    @property
    def free_slots(self) -> int:
        return self.slots - sum(1 for _ in self._sequences())

    def _sequences(self) -> Iterator[Sequence]:
        return itertools.chain.from_iterable(self.stages)

    def _allocate(self) -> None:
        """Makes the slots and records their steps; fewer of them if memory is short."""
        while True:
            try:
                self._make_stages()
                return
            except torch.OutOfMemoryError:
                if self.slots == 1:
                    raise
            self._halve()

    @torch.inference_mode()
    def _make_stages(self) -> None:
        model, facts, turns = self.model, self.facts, self.turns
        self.semantic = Semantic(model.semantic, facts, self._shape, turns)
        self.coarse = Coarse(model.coarse_acoustics, facts, self._shape, turns)
        self.fine = Fine(model.fine_acoustics, Codec(model.codec_model), facts, turns)
        self.stages = (self.semantic, self.coarse, self.fine)
        if self._capture:
            capture = self._capture()
            self.semantic.capture(capture)
            self.coarse.capture(capture)

    def _halve(self) -> None:
        self._shape = self._shape._replace(slots=self.slots // 2)
        log.warning("out of memory: going on with %d segments at once", self.slots)
        self.semantic = self.coarse = self.fine = self.stages = None  # type: ignore[assignment]
        gc.collect()  # a captured graph and its batch know each other
        self._empty_cache()

    def _empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def add(self, segment: Segment, urgent: bool = False) -> None:
        """Takes a segment in; an `urgent` one goes before others wherever work has to wait."""
        assert self.free_slots > 0, f"all {self.slots} slots are taken"
        assert 0 < len(segment.text_ids) <= self.facts.semantic.max_input_semantic_length
        self.semantic.add(Sequence(segment, urgent))

    def memory(self) -> dict[str, int]:
        """Bytes of the GPU's memory: all, what is free, what torch has here and what of that is in
        use. Waits for nothing that the GPU is doing. Empty on a CPU.
        """
        if self.device.type != "cuda":
            return {}
        free, size = torch.cuda.mem_get_info(self.device)
        return {"size": size, "free": free, "reserved": torch.cuda.memory_reserved(self.device),
                "allocated": torch.cuda.memory_allocated(self.device)}

    @torch.inference_mode()
    def abort(self, segment: Segment) -> None:
        """Forgets `segment` and frees its slot; nothing happens if it is not here."""
        for stage in self.stages:
            stage.remove(segment)

    @torch.inference_mode()
    def reset(self) -> None:
        """Forgets everything, after an exception left a step half done."""
        self.finished.clear()
        for stage in self.stages:
            stage.clear()
        self._empty_cache()

    def step(self) -> list[Finished]:
        """A few tokens for every live sequence, some prefills and fine windows.

        If memory runs out, there are fewer slots from then on and what was in them starts over.
        """
        try:
            self._step()
        except torch.OutOfMemoryError:
            if self.slots == 1:
                raise
        else:
            finished, self.finished = self.finished, []
            return finished
        self._shrink()  # here, where the exception no longer holds on to tensors
        return []

    @torch.inference_mode()
    def _step(self) -> None:
        """Each stage in order; what comes out of one goes into the next."""
        self.turns.ticks += self._shape.burst
        for stage, following in zip(self.stages, (self.coarse, self.fine, None), strict=True):
            for sequence in stage.step(self._shape.burst):
                if sequence.is_spoilt:
                    self._retake(sequence)
                elif following:
                    following.add(sequence)
                else:
                    self.finished.append(Finished(sequence.segment, sequence.samples))

    def _retake(self, sequence: Sequence) -> None:
        """Starts over with another random stream after NaN or infinity, or gives up."""
        if sequence.take + 1 < TAKES:
            self.semantic.add(sequence.again(sequence.take + 1, 0))
        else:
            self.finished.append(Finished(sequence.segment, None, f"{TAKES} takes were not finite"))

    def _shrink(self) -> None:
        again = [s.again(s.take, s.min_new_tokens) for s in self._sequences()]
        self._halve()
        self._allocate()
        self.semantic.queue.extend(again)


def slots_for(model: BarkModel) -> int:
    """Segments that fit into the memory the weights left free; at most 64, 8 on a CPU."""
    rows = [(m.config.num_layers * m.config.hidden_size * m.config.block_size)
            for m in (model.semantic, model.coarse_acoustics)]
    per_slot = 2 * sum(rows) * model.dtype.itemsize  # keys and values
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0] - WORKING_BYTES
        return max(1, min(MAX_SLOTS, free // per_slot))
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not counted on this system
        free = 2 << 30
    return max(1, min(8, free // 2 // per_slot))


# -----------------------------------------------------------------------------
# Voices: which there are and what they are called; presets of one's own, from a folder
#
# Nothing in that folder is believed: what is no preset is refused, with the reason, and nothing in
# it is ever run.

MAX_PRESETS, MAX_PRESET = 1000, 1_000_000  # files; bytes of a file, and of an array in it
PRESET_SECONDS = (0.5, 120.0)  # of which Bark looks at the last ten
MAX_NAME = 64  # characters
VOICE_ALIASES = {
    "male": ("v2/en_speaker_6", "natural male narrator"),
    "female": ("v2/en_speaker_9", "natural female narrator"),
    "narrator": ("v2/en_speaker_1", "calm male voice"),
}

# OpenAI's voices, by what its guide calls them: men's, a narrator's (fable), women's, of which
# Bark's English presets have one. alloy, which clients send where nobody has chosen, is BARK_VOICE.
OPENAI_VOICES = {
    "alloy": "", "ash": "v2/en_speaker_3", "ballad": "v2/en_speaker_2", "cedar": "v2/en_speaker_8",
    "echo": "v2/en_speaker_0", "fable": "v2/en_speaker_1", "onyx": "v2/en_speaker_6",
    "verse": "v2/en_speaker_4",
    **dict.fromkeys(("coral", "marin", "nova", "sage", "shimmer"), "v2/en_speaker_9"),
}


class Language(NamedTuple):
    """What Suno's presets speak: its name, a line to hear a voice by, and which of the ten are
    women, by rsxdalv's list (tts-generation-webui, BARK_VOICE_TO_TRAIT).
    """

    name: str
    line: str
    women: str


LANGUAGES = {
    "de": Language("German", "Guten Tag! So klingt meine Stimme, wenn ich eine Geschichte vorlese.",
                   "38"),
    "en": Language("English", "Hello! This is my voice when I read you a story.", "9"),
    "es": Language("Spanish", "¡Hola! Así suena mi voz cuando te leo una historia.", "89"),
    "fr": Language("French", "Bonjour ! Voici ma voix quand je vous lis une histoire.", "125"),
    "hi": Language("Hindi", "नमस्ते! कहानी पढ़ते समय मेरी आवाज़ ऐसी लगती है।", "01349"),
    "it": Language("Italian", "Buongiorno! Questa è la mia voce quando leggo una storia.", "279"),
    "ja": Language("Japanese", "こんにちは。物語を読む私の声は、こんな感じです。", "01345789"),
    "ko": Language("Korean", "안녕하세요! 이야기를 읽어 드릴 때 제 목소리는 이렇습니다.", "0"),
    "pl": Language("Polish", "Dzień dobry! Tak brzmi mój głos, kiedy czytam opowiadanie.", "469"),
    "pt": Language("Portuguese", "Olá! Esta é a minha voz quando leio uma história.", ""),
    "ru": Language("Russian", "Здравствуйте! Так звучит мой голос, когда я читаю рассказ.", "569"),
    "tr": Language("Turkish", "Merhaba! Size bir hikâye okurken sesim böyle çıkıyor.", "45"),
    "zh": Language("Chinese", "你好！我给你读故事的时候，声音就是这样的。", "4679"),
}


def read_regular(path: Path, most: int) -> bytes:
    """A file's content, of at most so many bytes. Raises OSError, and PresetError for what is no
    file: it follows no link and waits for no pipe.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(
            name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise PresetError("is no regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise PresetError(f"has more than {most} bytes")
    return content


def read_array(archive: zipfile.ZipFile, prompt: str) -> np.ndarray:
    """An array of an .npz, unpacked no further than one may be long, and never by pickle."""
    try:
        member = archive.getinfo(f"{prompt}.npy")
    except KeyError:
        raise PresetError(f"lacks {prompt}") from None
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise PresetError(f"{prompt} is packed in a way that NumPy does not use")  # unbounded
    with archive.open(member) as file:
        data = file.read(MAX_PRESET + 1)
    if len(data) > MAX_PRESET:
        raise PresetError(f"{prompt} unpacks to more than {MAX_PRESET} bytes")
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):  # later ones are for heads of other types
        raise PresetError(f"{prompt} has a head of another kind than whole numbers have")
    shape, is_fortran, kind = np.lib.format.read_array_header_1_0(file, max_header_size=1000)
    if kind.kind not in "iu":
        raise PresetError(f"{prompt} holds {shown(kind.str)}, not whole numbers")
    if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != len(data) - file.tell():
        raise PresetError(f"{prompt} has another length than its head says")
    ids = np.frombuffer(data, kind, offset=file.tell())
    return ids.reshape(shape, order="F" if is_fortran else "C")


def read_preset(path: Path, facts: ModelFacts) -> Voice:
    """A preset as Suno's `save_as_prompt` and voice cloning tools write it: an .npz that holds
    PROMPTS, whatever else beside. Raises PresetError with what is wrong, whatever that is.
    """
    try:
        real = Path(os.path.realpath(path, strict=True))
        if not real.is_relative_to(path.parent.resolve()):
            raise PresetError("is a link that leads out of the folder")
        with zipfile.ZipFile(io.BytesIO(read_regular(real, MAX_PRESET))) as archive:
            voice = facts.voice_of([read_array(archive, prompt) for prompt in PROMPTS])
    except OSError as error:
        raise PresetError(f"cannot be read: {error.strerror or first_line(error)}") from error
    except PresetError:
        raise
    except Exception as error:  # for a hostile file zipfile and NumPy raise all kinds
        raise PresetError(f"is no .npz of NumPy's, or damaged ({type(error).__name__}:"
                          f" {shown(first_line(error))})") from error
    low, high = PRESET_SECONDS
    rate, codes = facts.semantic.semantic_rate_hz, facts.coarse.coarse_rate_hz
    lengths = (len(voice.semantic) / rate, voice.coarse.shape[1] / codes,
               voice.fine.shape[1] / codes)
    for prompt, length in zip(PROMPTS, lengths, strict=True):
        if not low <= length <= high:
            raise PresetError(f"{prompt} is {length:.1f} s long; allowed are {low:g} to {high:g} s")
    return voice


def preset_name(file: str) -> str:
    """The voice's name from its file's. Raises PresetError for one that is no name."""
    name = unicodedata.normalize("NFC", Path(file).stem)
    signs = all(char in " ._-" or unicodedata.category(char)[0] in "LMN" for char in name)
    if not signs or len(name) > MAX_NAME or not name[:1].isalnum() or name.endswith((" ", ".")):
        raise PresetError(f"is no name for a voice: at most {MAX_NAME} letters, digits, blanks and"
                          " . _ -, of which it begins with a letter or digit")
    return name


class Presets(NamedTuple):
    """What a folder of one's own presets holds: voices by name; by file what is wrong with it."""

    voices: dict[str, Voice]
    refused: dict[str, str]


class PresetFolder:
    """A folder of one's own presets, as it is now. Any thread may look.

    A file is read once, and again when it has changed: then it is another voice, and who still
    speaks with the old one keeps that. `taken` are names that no file can have.
    """

    def __init__(self, folder: str | None, facts: ModelFacts, taken: Iterable[str]):
        self.folder = Path(folder).expanduser() if folder else None
        self.facts, self.taken = facts, {name.lower(): name for name in taken}
        self._lock = threading.Lock()
        self._read: dict[tuple[str, Hashable], tuple[str, Voice | str]] = {}
        self._told: dict[str, str] = {}

    def look(self) -> Presets:
        found, used = Presets({}, {}), dict(self.taken)
        if not self.folder:
            return found
        with self._lock:
            self._read = {file: self._read.get(file) or self._read_file(self.folder / file[0])
                          for file in self._files(self.folder, found.refused)}
            for (file, _), (name, voice) in self._read.items():
                if other := used.get(name.lower()):
                    voice = f"has the name of another voice, {other}: rename it"
                if isinstance(voice, str):
                    found.refused[os.fsencode(file).decode(errors="replace")] = voice
                else:
                    found.voices[name] = voice
                    used[name.lower()] = name
            for file, reason in found.refused.items():
                if self._told.get(file) != reason:
                    log.warning("%s %s", shown(str(self.folder / file), 200), reason)
            self._told = found.refused
        return found

    def _files(self, folder: Path, refused: dict[str, str]) -> list[tuple[str, Hashable]]:
        """Presets and what they are like; what is wrong with the folder itself is of file "."."""
        try:
            with os.scandir(folder) as entries:
                files = sorted((entry.name, mark_of(entry)) for entry in entries if re.fullmatch(
                    r"[^.].*\.npz", entry.name, re.IGNORECASE | re.DOTALL))
        except OSError as error:
            refused["."] = f"cannot be read: {error.strerror}"
            return []
        if len(files) > MAX_PRESETS:
            refused["."] = f"holds {len(files)} presets, of which the first {MAX_PRESETS} are used"
        return files[:MAX_PRESETS]

    def _read_file(self, path: Path) -> tuple[str, Voice | str]:
        """Its name, and the voice; or none, and what is wrong."""
        try:
            return preset_name(path.name), read_preset(path, self.facts)
        except PresetError as error:
            return "", str(error)


def mark_of(entry: os.DirEntry[str]) -> tuple[int, ...]:
    """Another one when a file may have changed."""
    try:
        status = entry.stat()
    except OSError as error:
        return (error.errno or 0,)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Voices:
    """Which voices there are, by which names, and what is told of each. Any thread may ask.

    The model's own are known to all; those in a folder of one's own, whose names may be people's,
    to whom `own` says so.
    """

    def __init__(self, facts: ModelFacts, default: str, folder: str | None = None):
        self.presets = facts.voices
        self.aliases = {alias: target for alias, (target, _) in VOICE_ALIASES.items()
                        if target in self.presets and alias not in self.presets}
        self.folder = PresetFolder(
            folder, facts, [*self.presets, *VOICE_ALIASES, *OPENAI_VOICES, "default"])
        self.default = "default"
        self.default, _ = self.find(default)

    def find(self, name: str, also: Mapping[str, str] = MappingProxyType({}),
             listing: str = "/voices") -> tuple[str, Voice]:
        """The voice's own name for `name`, as it stands, else trimmed and in any case; and its
        preset as it is now.

        `also` are further names and what they stand for; "default" is the default voice. Raises
        InvalidRequest with the nearest names and the listing that has all.
        """
        known = {**{voice: voice for voice in self.presets}, **self.aliases, **also}
        found = look_up(name, {"default": self.default, **known})
        if found in self.presets:
            return found, self.presets[found]
        own = self.folder.look().voices
        found = found or look_up(name, {voice: voice for voice in own})
        if found in own:
            return found, own[found]
        raise unknown_voice(found or name, [*known, *own], listing)

    def told(self, name: str, own: bool) -> str:
        """The name, or for who may not know it another that means the same."""
        return name if own or name in self.presets else "default"

    def listed(self, own: bool = True) -> list[dict[str, Any]]:
        """Every voice a request may name, with what is known of it; aliases first."""
        aliases = [told_voice(alias, target, description=VOICE_ALIASES[alias][1], alias_of=target)
                   for alias, target in self.aliases.items()]
        voices = [
            told_voice(name, name, aliases=[a for a, of in self.aliases.items() if of == name])
            for name in sorted(self.presets)]
        return aliases + [told_voice(name, name, own=True, aliases=[]) for name in (
            self.folder.look().voices if own else ())] + voices

    def listed_for_openai(self, own: bool = True) -> list[dict[str, Any]]:
        """OpenAI's names first, alloy at their head, then all others."""
        return [told_voice(name, target, alias_of=self.told(target, own))
                for name, target in self.openais().items()] + self.listed(own)

    def openais(self) -> dict[str, str]:
        """OpenAI's names and what stands for them: the default voice where there is no other, or
        where it speaks another language than these do.
        """
        foreign = voice_language(self.default) != "en"
        return {name: target if target in self.presets and not foreign else self.default
                for name, target in OPENAI_VOICES.items() if name not in self.presets}


def look_up(name: str, known: Mapping[str, str]) -> str | None:
    """What a name stands for, as it is or with blanks around it and in other letters."""
    if name in known:
        return known[name]
    folded = {other.lower(): target for other, target in known.items()}
    return folded.get(unicodedata.normalize("NFC", name).strip().lower())


def voice_language(name: str) -> str:
    """Two letters from a name such as v2/de_speaker_3 or de_anna; English where it tells none."""
    match = re.search(r"(?:^|/)([a-z]{2})_(speaker_)?", name)
    return match[1] if match and (match[2] or match[1] in LANGUAGES) else "en"


def told_voice(name: str, voice: str, **more: Any) -> dict[str, Any]:
    """What a listing has of `voice` under a name, which is its id; the gender where it is known."""
    code = voice_language(voice)
    language = LANGUAGES.get(code)
    told = {"id": name, "name": name, "language": code,
            "description": language.name if language else code}
    if language and (match := re.fullmatch(r"v2/.._speaker_([0-9])", voice)):
        told["gender"] = "female" if match[1] in language.women else "male"
        told["description"] += f", {told['gender']}"
    return told | more


def unknown_voice(name: str, known: list[str], listing: str = "/voices") -> InvalidRequest:
    near = [voice for voice in known if voice.endswith(f"/{name}")] or difflib.get_close_matches(
        name[:100], known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return InvalidRequest(f"voice {shown(name)} is unknown; {hint}GET {listing} lists all"
                          f" {len(known)}", param="voice", code="unknown_voice")


# -----------------------------------------------------------------------------
# Narrator: what a request asks for, as segments
#
# A request's text becomes segments: cut, with cues and emphasis put in, tokenized, each with its
# voice, seed and sampling. All of that is decided here and now, before anything waits, so that the
# same request is the same segments and gives the same audio.

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact
RANDOM_SEED = -1

# Against audio invented after the text's end: Suno's long-form notebook takes 0.6 and, by its own
# rule, 0.05; of transformers' rule 0.1 was best in jbrick2070's comparison (ComfyUI-OldTimeRadio).
SEMANTIC_TEMPERATURE, MIN_EOS_P = 0.6, 0.1


class Manner(NamedTuple):
    """How a request wants its text spoken; None is as the narrator has it."""

    expressive: bool = True
    temperature: float | None = None
    min_eos_p: float | None = None


AS_USUAL = Manner()


@dataclass(frozen=True)
class Speech:
    """A request, planned: for each segment, in order, its span of the text and what Bark gets."""

    text: str
    voice: str
    seed: int
    spans: list[Span]
    segments: list[Segment]
    spoken: list[str]
    rate: int = 24_000
    wanted: list[Wanted] = field(default_factory=list)  # none: takes are not judged
    warnings: list[tuple[str, ...]] = field(default_factory=list)  # of what is left out
    seeds: Mapping[int, int] = field(default_factory=dict)  # of single segments, before `seed`


class Piece(NamedTuple):
    """A segment before it has a voice: its span of the script, and what is told of it."""

    span: Span
    spoken: str
    ids: list[int]
    warnings: tuple[str, ...]


def derived_seed(*parts: object) -> int:
    """A seed in 0 to MAX_SEED that depends on `parts` alone."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") & MAX_SEED


def settled_seed(seed: int) -> int:
    return secrets.randbelow(MAX_SEED + 1) if seed == RANDOM_SEED else seed


class Narrator:
    """Turns text, voice and seed into segments for one model. Any thread may call it."""

    def __init__(self, facts: ModelFacts, default_voice: str, quality: bool = False,
                 voices_dir: str | None = None):
        self.facts, self.quality = facts, quality
        self.sampling, self.min_eos_p = facts.semantic_sampling, facts.semantic.min_eos_p
        if quality:
            cooler = min(self.sampling.temperature, SEMANTIC_TEMPERATURE)
            self.sampling = replace(self.sampling, temperature=cooler)
            self.min_eos_p = min(self.min_eos_p or MIN_EOS_P, MIN_EOS_P)
        self.voices = Voices(facts, default_voice, voices_dir)
        # A short text window means that the model learnt short texts: the built-in voice, with 48
        # tokens, none above 64 characters.
        window = facts.semantic.max_input_semantic_length
        self.pen = Pen(facts.unknown)
        self._written = lru_cache(maxsize=4096)(self._write)  # asked when cutting, and after it
        self.limits = SegmentLimits(
            count_tokens=lambda text: len(self._written(text)[2]),
            max_tokens=window, max_seconds=facts.max_seconds,
            min_chars=min(SegmentLimits.min_chars, window // 2),
            max_chars=min(SegmentLimits.max_chars, window), soon=True)

    def plan(self, text: str, voice: str | None, seed: int | None, manner: Manner = AS_USUAL,
             seeds: Mapping[int, int] = MappingProxyType({})) -> Speech:
        """`seeds` are of single segments, which are then what they are where all have that seed.

        Raises NothingToSpeak, and InvalidRequest for a voice or a segment that is not there.
        """
        voice, preset = self.voices.find(self.voices.default if voice is None else voice)
        seed = derived_seed(voice, text) if seed is None else settled_seed(seed)
        script, pieces = self._pieces(text, voice_language(voice), manner.expressive)
        if not pieces:
            raise nothing_to_speak()
        if seeds and max(seeds) >= len(pieces):
            raise unknown_segment(max(seeds), len(pieces))
        seeds = {index: settled_seed(own) for index, own in seeds.items()}
        options = self._options(manner)
        segments = [
            self._segment(piece.ids, preset, derived_seed(seeds.get(index, seed), index), options)
            for index, piece in enumerate(pieces)]
        spoken = [piece.spoken for piece in pieces]
        wanted = [Wanted(estimate_seconds(piece), piece, voice_language(voice))
                  for piece in spoken] if self.quality else []
        return Speech(text, voice, seed, placed(script, [piece.span for piece in pieces]), segments,
                      spoken, self.facts.sample_rate, wanted, [p.warnings for p in pieces], seeds)

    def plan_sample(self, voice: str) -> Speech:
        """A line to hear the voice by: in its own language, if the model can write that."""
        voice, _ = self.voices.find(voice)
        line = LANGUAGES.get(voice_language(voice), LANGUAGES["en"]).line
        if self.facts.unknown(line):
            line = LANGUAGES["en"].line
        return self.plan(line, voice, None, Manner(expressive=False))

    def _pieces(self, text: str, language: str, expressive: bool) -> tuple[Script, list[Piece]]:
        script = read(text, language, self.facts.knows_cues)
        spans = split_text(script.text, language, self.limits)
        spoken = [script.text[span.start : span.end] for span in spans]
        if expressive and self.facts.knows_cues:
            told = express(script, spans, language)
            spoken = [new if self._fits(new) else plain
                      for plain, new in zip(spoken, told, strict=True)]
        left: list[list[str]] = [[] for _ in spans]
        for at, cue, words in script.directions if spans else ():
            index = segment_at(spans, at)
            if not cue or cue not in spoken[index]:
                left[index].append(words)
        pieces = map(self._piece, spans, spoken, left)
        return script, with_something_to_speak(pieces)

    def _piece(self, span: Span, spoken: str, left: list[str]) -> Piece:
        plain = normalize_text(spoken)
        written, signs, ids = self._written(plain)
        left = [*left, signs] if signs else left
        return Piece(span, spoken if written == plain else written, ids,
                     tuple(f"left out: {' '.join(words.split())[:80]}" for words in left))

    def _write(self, text: str) -> tuple[str, str, list[int]]:
        """A text with the signs that the model has tokens for, the others, and the tokens."""
        ids, left = self.facts.tokenize(text), ""
        if self.facts.unknown_id in ids:
            text, left = self.pen.write(text)
            ids = self.facts.tokenize(text) if text else []
        return text, left, ids

    def _fits(self, spoken: str) -> bool:
        return 0 < self.limits.count_tokens(normalize_text(spoken)) <= self.limits.max_tokens

    def _options(self, manner: Manner) -> dict[str, Any]:
        """A temperature holds for semantic and coarse tokens; the fine stage is nearly greedy."""
        semantic, coarse = self.sampling, self.facts.coarse_sampling
        if manner.temperature is not None:
            semantic, coarse = (replace(each, temperature=manner.temperature)
                                for each in (semantic, coarse))
        return {"semantic_sampling": semantic, "coarse_sampling": coarse,
                "min_eos_p": self.min_eos_p if manner.min_eos_p is None else manner.min_eos_p}

    def _segment(self, ids: list[int], voice: Voice, seed: int,
                 options: Mapping[str, Any]) -> Segment:
        return Segment(ids, voice, seed, fine_sampling=self.facts.fine_sampling, **options)


def with_something_to_speak(pieces: Iterable[Piece]) -> list[Piece]:
    """Those pieces of which a token is left; what is told of others is told of a neighbour."""
    kept: list[Piece] = []
    waiting: tuple[str, ...] = ()
    for piece in pieces:
        if piece.ids:
            kept.append(piece._replace(warnings=waiting + piece.warnings))
            waiting = ()
        elif kept:
            last = kept[-1]
            pause = max(last.span.pause, piece.span.pause)
            kept[-1] = last._replace(span=replace(last.span, pause=pause),
                                     warnings=last.warnings + piece.warnings)
        else:
            waiting += piece.warnings
    if kept:
        kept[-1] = kept[-1]._replace(span=replace(kept[-1].span, pause=0.0))
    return kept


def placed(script: Script, spans: list[Span]) -> list[Span]:
    """The spans of a script as spans of the request's text, without overlap."""
    places = [script.place(span.start, span.end) for span in spans]
    starts = [*(start for start, _ in places[1:]), len(script.source)]
    return [Span(start, min(end, following), span.pause)
            for (start, end), following, span in zip(places, starts, spans, strict=False)]


def nothing_to_speak() -> NothingToSpeak:
    return NothingToSpeak("the text has no word, digit or cue that could be spoken", param="text",
                          code="nothing_to_speak")


def unknown_segment(index: int, count: int) -> InvalidRequest:
    return InvalidRequest(f'seeds has "{index}"; segments of this text: {count}, counted from "0"',
                          param="seeds", code="invalid_value")


# -----------------------------------------------------------------------------
# Metrics: what Prometheus is told
#
# The scheduler and HTTP report what happens by plain methods, each of which takes microseconds;
# what /health counts or tells anyway is read from there when somebody asks. This section alone
# knows Prometheus. Labels are of small fixed sets: no text, no voice, nothing that a client chose.

import prometheus_client as prometheus
from prometheus_client import core
from prometheus_client.openmetrics import exposition as openmetrics

prometheus.disable_created_metrics()  # a series more for each, of which nobody asks anything

SECONDS = (0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 12, 20, 30, 60, 120, 300, 600)  # a histogram's bounds
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 4, 8, 16)
STATUSES = ("loading", "downloading", "warming", "ready", "draining", "failed")
FAULTS = ("short", "long", "words", "no_speech", "noise", "silence", "silent", "clipped",
          "not_finite")  # every kind of them
GAUGES = (  # what it is, and where /health has it; there is none while that is missing
    ("bark_requests_running", "Requests being spoken.", "queue", "running"),
    ("bark_requests_waiting", "Requests that wait for their first slot.", "queue", "waiting"),
    ("bark_queue_capacity", "Requests that may wait at most.", "queue", "capacity"),
    ("bark_segments_running", "Segments being generated.", "live"),
    ("bark_slots", "Segments that can be generated at once.", "slots"),
    ("bark_gpu_memory_size_bytes", "Memory of the GPU.", "gpu_memory", "size"),
    ("bark_gpu_memory_free_bytes", "Of it, what nobody has.", "gpu_memory", "free"),
    ("bark_gpu_memory_reserved_bytes", "Of it, what the worker's torch has.", "gpu_memory",
     "reserved"),
    ("bark_gpu_memory_allocated_bytes", "Of that, what is in use.", "gpu_memory", "allocated"),
    ("bark_download_done_bytes", "Downloaded so far.", "progress", "bytes_done"),
    ("bark_download_size_bytes", "To be downloaded in all.", "progress", "bytes_total"),
)


class Metrics:
    """Counts what happens, and tells it in Prometheus's format. Any thread may call it."""

    def __init__(self) -> None:
        self._registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        counter = partial(prometheus.Counter, registry=registry)
        seconds = partial(prometheus.Histogram, registry=registry, buckets=SECONDS)
        self._answers = counter(
            "bark_http_requests_total", "Requests by path and by what came of them: ok, or the"
            " error's code.", ["path", "status", "outcome"])
        self._durations = seconds(
            "bark_http_request_duration_seconds", "From a request's head to the end of its answer,"
            " of those that went well.", ["path"])
        self.started = seconds(
            "bark_queue_wait_seconds", "Until a request got its first slot.").observe
        self.sounded = seconds(
            "bark_first_segment_seconds", "From a request's head until its first segment could be"
            " sent.").observe
        self._paces = prometheus.Histogram(
            "bark_real_time_factor_ratio", "Seconds from a request's first slot to its last take,"
            " by its seconds of speech that were generated.", registry=registry, buckets=RATIOS)
        self._segments = counter(
            "bark_segments_total", "Segments spoken: by the model, or from the cache in memory.",
            ["source"])
        self._audio = counter("bark_audio_seconds_total", "Seconds of speech in them.", ["source"])
        self.take = counter("bark_takes_total", "Takes generated.").inc
        self.worked = counter(
            "bark_busy_seconds_total", "Seconds in which the device was at work.").inc
        for source in ("model", "cache"):  # there from the start, so that the first one is a rise
            for each in (self._segments, self._audio):
                each.labels(source)

    def answered(self, path: str, status: int, outcome: str, seconds: float) -> None:
        """A request to one of our paths, or to "?", and how long that took."""
        path = "other" if path == "?" else path
        self._answers.labels(path, status, outcome).inc()
        if outcome == "ok":
            self._durations.labels(path).observe(seconds)

    def spoke(self, compute: float, audio: float) -> None:
        """A request was spoken to its end."""
        self._paces.observe(compute / audio)

    def segment(self, source: str, audio: float) -> None:
        self._segments.labels(source).inc()
        self._audio.labels(source).inc(audio)

    def page(self, accept: str, health: Mapping[str, Any]) -> tuple[bytes, str]:
        """All of it, as OpenMetrics if an Accept header names that; and its media type."""
        found = SimpleNamespace(collect=lambda: itertools.chain(
            self._registry.collect(), told_by_health(health)))
        if "application/openmetrics-text" in accept:
            return openmetrics.generate_latest(found), openmetrics.CONTENT_TYPE_LATEST
        return prometheus.generate_latest(found), prometheus.CONTENT_TYPE_PLAIN_0_0_4


def told_by_health(health: Mapping[str, Any]) -> Iterator[Any]:
    """Prometheus's families of what /health tells."""
    facts = ("version", "model_id", "device", "dtype")
    yield core.InfoMetricFamily("bark_worker", "Which worker it is.", {
        name: str(health[name] or "") for name in facts})
    status = core.GaugeMetricFamily("bark_status", "1 for what it is doing.", labels=["status"])
    for name in STATUSES:
        status.add_metric([name], health["status"] == name)
    yield status
    for name, meaning, *where in GAUGES:
        value = reduce(lambda inside, key: (inside or {}).get(key), where, health)
        if value is not None:
            yield core.GaugeMetricFamily(name, meaning, value)
    yield core.CounterMetricFamily(
        "bark_flawed_segments", "Segments sent though their best take had a fault, or nobody heard"
        " it.", health.get("quality", {}).get("warnings", 0))
    retakes = core.CounterMetricFamily(
        "bark_retakes", "Takes made again, by the gravest fault of the one before.",
        labels=["fault"])
    for fault in FAULTS:
        retakes.add_metric([fault], health.get("retakes", {}).get(fault, 0))
    yield retakes


# -----------------------------------------------------------------------------
# Hearing: takes are heard and judged beside the device, on threads of their own
#
# Whether a sound is speech is for a detector that others keep well, Silero's. It runs on the CPU;
# the scheduler's thread only hands a take over and the device goes on. Where the detector is
# missing or breaks, takes are judged by their levels and lengths, and /health says so.

JUDGE_THREADS = 4  # without the listener's words a take costs one of them some 30 ms
EAR_RATE = 16_000   # Hz, of what listens to speech
SPEECH_PAD = 100    # ms that the detector leaves around speech
LISTENER = Path(__file__).resolve().with_name("listener.py")


class Detector:
    """Silero's voice activity detector over a whole take at once. Any thread may call it."""

    def __init__(self) -> None:
        """Raises ImportError where a package is missing, and whatever onnxruntime does."""
        threads = torch.get_num_threads()
        try:
            from silero_vad import get_speech_timestamps_sequence, load_silero_vad
        finally:
            torch.set_num_threads(threads)  # the package (6.2) sets it to 1 for the whole process
        self._find, self._model = get_speech_timestamps_sequence, load_silero_vad(sequence=True)

    def speech(self, samples: np.ndarray) -> tuple[tuple[float, float], ...]:
        """Seconds from and to of speech in float32 samples at EAR_RATE."""
        found = self._find(samples, self._model, speech_pad_ms=SPEECH_PAD)
        return tuple((each["start"] / EAR_RATE, each["end"] / EAR_RATE) for each in found)


class Judge:
    """Hears takes and judges them, several at once, for whoever waits for the verdict.

    `word_errors` is the share of wrong words that a take may have.
    """

    def __init__(self, word_errors: float = math.inf) -> None:
        self.word_errors = word_errors
        self._detector: Detector | None = None
        self._listener: Listener | None = None
        self.detector = self._listener_trouble = "off"
        self._waking: Future[None] | None = None
        self._told = ""  # why a take was not heard
        self._pool = ThreadPoolExecutor(JUDGE_THREADS, "judge")

    @property
    def listener(self) -> str:
        """What it is doing, for /health."""
        return self._listener.status if self._listener else self._listener_trouble

    def prepare(self) -> None:
        """Loads the detector."""
        try:
            self._detector = Detector()
        except Exception as error:  # a package is missing, or does not fit this machine
            self._do_without(error)
        else:
            self.detector = "listening"

    def listen(self, folder: Path) -> None:
        """Has the words heard too, by the recogniser in `folder`. Raises ModelError."""
        companion = load_companion()
        self._listener = companion.Listener.for_cores(str(folder), os.cpu_count() or 1)
        self._waking = self._pool.submit(self._listener.check)

    def wait_awake(self) -> None:
        """Returns when the listener hears or rests, so that the first take is heard like any."""
        if self._waking and (error := self._waking.exception()):
            log.warning("words are not heard: %s", error)

    def do_without_words(self, reason: object) -> None:
        self._listener_trouble = f"missing: {reason}"
        log.warning("words are not heard: %s", reason)

    def submit(self, samples: np.ndarray, rate: int, wanted: Wanted) -> Future[Verdict]:
        return self._pool.submit(self._judge, samples, rate, wanted, time.monotonic())

    def _judge(self, samples: np.ndarray, rate: int, wanted: Wanted, since: float) -> Verdict:
        hearing = NOBODY_HEARD
        if (self._detector or self._listener) and np.isfinite(samples).all():
            audible = resample(samples, rate, EAR_RATE)
            heard, why = self._words(audible, wanted, since)
            hearing = Hearing(self._speech(audible), heard, why)
        return judge(samples, rate, wanted, hearing, self.word_errors)

    def _speech(self, samples: np.ndarray) -> tuple[tuple[float, float], ...] | None:
        try:
            return self._detector.speech(samples) if self._detector else None
        except Exception as error:  # onnxruntime's own, for lack of memory say
            self._do_without(error)
            return None

    def _words(self, samples: np.ndarray, wanted: Wanted, since: float) -> tuple[Heard | None, str]:
        if not self._listener:
            return None, ""
        try:
            return self._listener.hear(samples, wanted.language, wanted.text, since), ""
        except Exception as error:  # Unheard, or the system's where no process can be started
            if (why := first_line(error)) != self._told:  # not for each take
                self._told = why
                log.warning("a take was not heard: %s", why)
            return None, why

    def _do_without(self, error: Exception) -> None:
        self._detector = None
        self.detector = f"missing: {type(error).__name__}: {first_line(error)}"
        log.warning("speech is not told from noise and music, as the detector is %s; pip install"
                    " silero-vad onnxruntime, as in requirements.txt", self.detector)


def load_companion() -> ModuleType:
    """listener.py from beside this file. Raises ModelError."""
    if not LISTENER.is_file():
        raise ModelError(f"{LISTENER} is missing; put it there, of the release that this is,"
                         f" {VERSION}, or take an image that has it")
    spec = importlib.util.spec_from_file_location("listener", LISTENER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -----------------------------------------------------------------------------
# Scheduler: one thread owns the engine; requests wait, take turns and come back as audio
#
# Threads of HTTP hand in a request and wait for its takes, segment by segment. The scheduler's
# thread alone touches the engine: it frees what nobody waits for, fills free slots in turns, takes
# a step, and hands on what came out of it. Nothing here knows of tensors or of sockets.

DRAIN_SECONDS = 10.0
RETRY_FULL, RETRY_LOADING, RETRY_DRAINING = 5, 10, 30  # seconds, for Retry-After
HUNG_SECONDS = 30.0  # past a request's time without a word from the scheduler
COOLING = 0.8  # of the temperatures, with each take
MAX_STEP_FAILURES = 3  # in a row; then the device is taken for lost
MEMORY_SECONDS = 1.0  # between two looks at the GPU's memory, which take a part of a millisecond
REST_SECONDS = 0.1  # between two looks at clients whose takes are being judged


class State:
    """What /health tells. The scheduler's thread writes it, and main's to drain; any may read.

    `on_change` is called with each new status, in the thread that brings it about.
    """

    def __init__(self, **details: Any):
        self.status = "loading"
        self.on_change: Callable[[str], None] = lambda status: None
        self.error: WorkerError | None = None
        self.details = details
        self.progress: Callable[[], dict[str, int]] | None = None
        self.narrator: Narrator | None = None

    def enter(self, status: str, **details: Any) -> None:
        self.details = {**self.details, **details}  # never changed in place: others read it
        if status != "downloading":
            self.progress = None
        if self.status in ("draining", status):
            return
        self.status = status
        log.info("status=%s", status)
        self.on_change(status)

    @property
    def reason(self) -> str:
        """Why it failed, for anybody to read."""
        return without_folders(str(self.error))

    def fail(self, error: WorkerError) -> None:
        self.error, self.status, self.progress = error, "failed", None
        log.error("failed: %s", error)
        self.on_change("failed")


class Trial:
    """A segment's takes: more of them until one is good or no more may be made; the best counts."""

    def __init__(self, segment: Segment, wanted: Wanted | None, rate: int):
        self.segment, self.wanted, self.rate = segment, wanted, rate
        self.count = 0
        self._best: tuple[Verdict, np.ndarray] | None = None

    def next_segment(self) -> Segment:
        """The segment, or what may come out better: another seed, derived from its, and cooler."""
        if not self.count:
            return self.segment
        cooler = COOLING ** self.count
        return replace(self.segment, seed=derived_seed(self.segment.seed, "take", self.count),
                       semantic_sampling=self.segment.semantic_sampling.scaled(cooler),
                       coarse_sampling=self.segment.coarse_sampling.scaled(cooler))

    def add(self, samples: np.ndarray, found: Verdict, retries: int) -> Take | None:
        """Weighs a take, float32; the one that counts, or None if another should be made."""
        self.count += 1
        if not self._best or found.badness < self._best[0].badness:
            self._best = found, samples
        greedy = not self.segment.semantic_sampling.temperature  # it would come out the same
        if self._best[0].faults and self.count <= retries and not greedy:
            return None
        return self.settle()

    def settle(self) -> Take | None:
        """The best take so far, if there is one; the others' samples are let go."""
        if not self._best:
            return None
        (found, samples), self._best = self._best, None
        return Take(to_pcm16(polish(samples, self.rate, found)), self.count, found.warnings,
                    found.hearing.after(found.kept_from(self.rate) / self.rate))


class SegmentCache:
    """Segments' takes under all that decides them; the least recently used goes first.

    It lives as long as one engine, hence with one revision of one model. Not for several threads
    at once.
    """

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0  # bytes
        self._takes: OrderedDict[Hashable, Take] = OrderedDict()

    def get(self, segment: Segment) -> Take | None:
        if (take := self._takes.get(segment.identity)) is not None:
            self._takes.move_to_end(segment.identity)
        return take

    def put(self, segment: Segment, take: Take) -> None:
        if segment.identity in self._takes or take.samples.nbytes > self.limit:
            return
        self._takes[segment.identity] = take
        self.size += take.samples.nbytes
        while self.size > self.limit:
            _, oldest = self._takes.popitem(last=False)
            self.size -= oldest.samples.nbytes


class Request:
    """A speech on its way. Each of `parts` gets its segment's take, or the error.

    One that is `patient` stands behind all that are not, whenever they come.
    """

    def __init__(self, speech: Speech, deadline: float, is_abandoned: Callable[[], bool],
                 patient: bool = False):
        self.patient = patient
        self.began, self.deadline, self.is_abandoned = time.monotonic(), deadline, is_abandoned
        self.parts: list[Future[Take]] = [Future() for _ in speech.segments]
        wanted = speech.wanted or [None] * len(speech.segments)
        self.trials = [Trial(segment, each, speech.rate)
                       for segment, each in zip(speech.segments, wanted, strict=True)]
        self.todo = deque(range(len(speech.segments)))  # indices that wait for a slot
        self.started = self.ended = 0.0  # when it got its first slot, when it was done; 0 before
        self.audio = 0.0  # seconds of speech that were generated
        self.takes = self.turn = 0

    def recall(self, cache: SegmentCache) -> list[float]:
        """Takes what the cache has: the seconds of speech of each segment."""
        recalled = []
        for index, trial in enumerate(self.trials):
            if (take := cache.get(trial.segment)) is not None:
                self.parts[index].set_result(take)
                self.todo.remove(index)
                recalled.append(len(take.samples) / trial.rate)
        return recalled

    def results(self) -> Iterator[Take]:
        """The segments' takes in order, each once it is there. Raises what went wrong."""
        for part in self.parts:
            try:
                take = part.result(self.deadline + HUNG_SECONDS - time.monotonic())
            except TimeoutError:  # the scheduler ends late requests itself, unless it hangs
                raise RequestTimeout("the device does not answer", code="timeout") from None
            yield take

    def is_done(self) -> bool:
        return all(part.done() for part in self.parts)

    @property
    def wait(self) -> float:
        """Seconds until it got its first slot; 0 if it needs none."""
        return (self.started or self._end) - self.began if self.todo or self.started else 0.0

    @property
    def compute(self) -> float:
        """Seconds since then, in which it shared the device with others."""
        return self._end - self.started if self.started else 0.0

    @property
    def _end(self) -> float:
        return self.ended or time.monotonic()

    def abandon(self) -> None:
        """Nobody wants the rest: at the next step its slots are free."""
        self.is_abandoned = lambda: True


@dataclass
class Tally:
    """What came of judging since the start."""

    segments: int = 0
    warnings: int = 0  # segments whose best take had a fault
    faults: Counter[str] = field(default_factory=Counter)  # of takes, by kind
    retakes: Counter[str] = field(default_factory=Counter)  # by the gravest of the take before

    def told(self) -> dict[str, Any]:
        """As /health has it."""
        return {"quality": {"segments": self.segments, "retakes": self.retakes.total(),
                            "warnings": self.warnings},
                "faults": dict(self.faults), "retakes": dict(self.retakes)}


class Scheduler:
    """Feeds segments to the engine in turns: one of every request a round, in order of arrival;
    patient ones when no other waits.

    So a long text waits for nobody's whole length, and nobody for its. `load` runs in the
    scheduler's own thread, the only one that touches the engine.
    """

    def __init__(self, load: Callable[[State], Any], state: State, max_queue: int,
                 cache: SegmentCache, retries: int = 0, judge: Judge | None = None,
                 metrics: Metrics | None = None):
        self._load, self.state, self.max_queue = load, state, max_queue
        self._cache, self.retries, self.judge = cache, retries, judge or Judge()
        self.metrics, self.tally = metrics or Metrics(), Tally()
        self.memory: dict[str, int] = {}  # bytes of the GPU's, as the engine tells it
        self._looked = -math.inf  # when that was
        self._engine: Any = None
        self._changed = threading.Condition()
        self._requests: list[Request] = []  # in order of arrival
        self._owner: dict[Segment, tuple[Request, int]] = {}  # of segments in the engine
        self._dropped: list[Segment] = []  # to be aborted by the scheduler's thread
        self._turn = 0  # of the segment that was admitted last
        self._stopping = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def slots(self) -> int | None:
        """Segments at once; None while that is not known."""
        return self._engine.slots if self._engine else None

    @property
    def live(self) -> int:
        """Segments being generated."""
        return len(self._owner)

    def submit(self, request: Request) -> None:
        """Answers `request` from the cache as far as that goes, and queues the rest.

        Raises Unavailable while loading, draining or full.
        """
        with self._changed:
            if self._stopping:
                raise draining()
            if self._engine is None or self.state.status != "ready":
                raise not_ready(self.state)
            recalled = request.recall(self._cache)
            if not request.is_done():
                self._queue(request)
            for seconds in recalled:
                self.metrics.segment("cache", seconds)

    def _queue(self, request: Request) -> None:
        waiting, room = self._ahead_of(request)
        if waiting >= room:
            raise Unavailable(f"{waiting} requests are waiting already and at most"
                              f" {self.max_queue} may; try again soon",
                              code="queue_full", retry_after=RETRY_FULL)
        request.turn = self._turn + 1
        self._requests.append(request)
        self._changed.notify_all()

    def _ahead_of(self, request: Request) -> tuple[int, int]:
        """How many requests wait before this one does, and how many may, free slots included."""
        ahead = [r for r in self._requests if request.patient or not r.patient]
        busy = sum(1 for owner, _ in self._owner.values() if request.patient or not owner.patient)
        return sum(not r.started for r in ahead), self.max_queue + self._engine.slots - busy

    def stats(self) -> dict[str, int]:
        """Requests running and waiting, and how many may wait."""
        requests = list(self._requests)  # a snapshot; no lock, so that it never waits for one
        waiting = sum(not request.started for request in requests)
        return {"running": len(requests) - waiting, "waiting": waiting,
                "capacity": self.max_queue}

    def drain(self, seconds: float) -> None:
        """Takes nothing new, waits for what was accepted, gives the rest up after `seconds`."""
        with self._changed:
            self._stopping = True
            if self.state.status != "failed":
                self.state.enter("draining")
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._requests, timeout=seconds)
            for request in list(self._requests):
                self._end(request, draining())

    def _run(self) -> None:
        try:
            self._engine = self._load(self.state)
            self._look_at_memory()
            self.state.enter("ready")
            while not self._stopping or self._requests:
                self._work()
        except WorkerError as error:
            self._give_up(error)
        except Exception as error:
            log.exception("the scheduler broke")
            self._give_up(ModelError(f"{type(error).__name__}: {first_line(error)}"))

    def _give_up(self, error: WorkerError) -> None:
        self.state.fail(error)
        with self._changed:
            for request in list(self._requests):
                self._end(request, not_ready(self.state))

    def _work(self) -> None:
        with self._changed:
            self._drop_dead()
            while self._dropped:
                self._engine.abort(self._dropped.pop())
            self._admit()
            if not self._owner:
                self._rest()
                return
        began = time.monotonic()
        try:
            finished = self._engine.step()
        except Exception as error:
            self._recover(error)
            return
        self._failures = 0
        self.metrics.worked(time.monotonic() - began)
        self._look_at_memory()
        with self._changed:
            for done in finished:
                self._collect(done)

    def _look_at_memory(self) -> None:
        if time.monotonic() > self._looked + MEMORY_SECONDS:
            self._looked, self.memory = time.monotonic(), self._engine.memory()

    def _rest(self) -> None:
        """Waits for a request, or for a judge, looking now and then whether a client has left."""
        if self._requests:
            self._changed.wait(REST_SECONDS)
        else:
            self._changed.wait_for(lambda: self._requests or self._stopping)

    def _drop_dead(self) -> None:
        """Frees the slots of requests whose client left or whose time is up."""
        now = time.monotonic()
        for request in list(self._requests):
            if request.is_abandoned():
                self._end(request, Abandoned("the client left", code="client_closed_request"))
            elif now >= request.deadline:
                self._end(request, too_late(now - request.began))

    def _make_way(self) -> None:
        """Takes patient work out of the engine again where other work waits for its slot."""
        waiting = sum(len(r.todo) for r in self._requests if not r.patient)
        for segment, (request, index) in list(self._owner.items()):
            if request.patient and waiting > self._engine.free_slots:
                del self._owner[segment]
                self._engine.abort(segment)
                request.todo.appendleft(index)
                request.started = 0.0

    def _admit(self) -> None:
        """Fills free slots. Turns make it fair; within a turn, who came first goes first."""
        self._make_way()
        while self._engine.free_slots > 0 and (unserved := [r for r in self._requests if r.todo]):
            request = min(unserved, key=lambda r: (r.patient, r.turn))
            index = request.todo.popleft()
            segment = request.trials[index].next_segment()
            self._owner[segment] = (request, index)
            self._turn = max(self._turn, request.turn)
            request.turn += 1
            again = request.trials[index].count > 0  # its place in the audio is waited for
            self._engine.add(segment, urgent=not request.patient and (again or not request.started))
            if not request.started:
                request.started = time.monotonic()
                if not request.patient:  # which waits by intent, and may start more than once
                    self.metrics.started(request.wait)

    def _collect(self, done: Finished) -> None:
        if done.segment not in self._owner:
            return
        request, index = self._owner.pop(done.segment)
        request.takes += 1
        self.metrics.take()
        trial = request.trials[index]
        if done.samples is None:
            self._settle(request, index, done.error)
        elif trial.wanted is None:
            self._accept(request, index, Take(to_pcm16(done.samples)))
        else:  # elsewhere, so that the device is not kept waiting
            verdict = self.judge.submit(done.samples, trial.rate, trial.wanted)
            verdict.add_done_callback(partial(self._weigh, request, index, done.samples))

    def _settle(self, request: Request, index: int, error: str) -> None:
        """Takes the best of what was made before, as no more comes."""
        if take := request.trials[index].settle():
            self._accept(request, index, take)
            return
        self._end(request, unusable(index, error))

    def _weigh(self, request: Request, index: int, samples: np.ndarray,
               verdict: Future[Verdict]) -> None:
        """Called by a judge's thread."""
        with self._changed:
            if request not in self._requests:  # it ended meanwhile
                return
            found = verdict.result()
            self.tally.faults.update(fault.kind for fault in found.faults)
            if take := request.trials[index].add(samples, found, self.retries):
                self._accept(request, index, take)
            else:
                self.tally.retakes[found.gravest] += 1
                request.todo.appendleft(index)
            self._changed.notify_all()

    def _accept(self, request: Request, index: int, take: Take) -> None:
        self.tally.segments += 1
        self.tally.warnings += bool(take.warnings)
        trial, seconds = request.trials[index], len(take.samples) / request.trials[index].rate
        self._cache.put(trial.segment, take)
        self.metrics.segment("model", seconds)
        request.audio += seconds
        request.parts[index].set_result(take)
        if request.is_done():
            self._end(request)

    def _end(self, request: Request, error: WorkerError | None = None) -> None:
        self._requests.remove(request)
        request.ended = time.monotonic()
        if request.audio and not (error or request.patient):
            self.metrics.spoke(request.compute, request.audio)
        for segment in [s for s, (owner, _) in self._owner.items() if owner is request]:
            del self._owner[segment]
            self._dropped.append(segment)
        for part in request.parts:
            if not part.done():
                part.set_exception(error)
        self._changed.notify_all()

    def _recover(self, error: Exception) -> None:
        """A step broke, for lack of memory say: what was in it is lost, the next may do."""
        log.error("engine step failed", exc_info=error)
        self._failures += 1
        with self._changed:
            for request in {id(r): r for r, _ in self._owner.values()}.values():
                self._end(request, device_failed(error))
            self._engine.reset()
        if self._failures >= MAX_STEP_FAILURES:
            raise ModelError(f"{self._failures} steps failed in a row: {first_line(error)}")


def too_late(seconds: float) -> RequestTimeout:
    return RequestTimeout(f"not done after {seconds:.1f} s, all that BARK_TIMEOUT allows; send a"
                          " shorter text", code="timeout")


def device_failed(error: Exception) -> GenerationFailed:
    return GenerationFailed(f"the device failed: {type(error).__name__}; try again",
                            code="generation_failed")


def unusable(index: int, error: str) -> GenerationFailed:
    failure = GenerationFailed(f"segment {index} gave no usable audio: {error}; another seed may",
                               code="generation_failed")
    failure.permanent = True  # the same seed gives the same takes
    return failure


def draining() -> Unavailable:
    return Unavailable("the worker is shutting down", code="draining", retry_after=RETRY_DRAINING)


def not_ready(state: State) -> Unavailable:
    if state.status == "draining":
        return draining()
    what = f"has failed: {state.reason}" if state.error else f"is not ready yet: {state.status}"
    error = Unavailable(f"the model {what}", code="not_ready", retry_after=RETRY_LOADING)
    error.permanent = bool(state.error)
    return error


# -----------------------------------------------------------------------------
# Samples: a line in each voice, made at the first asking and kept
#
# A sample is spoken as any text is, but behind all others, and once for all who ask meanwhile. It
# is kept on disk under everything that decides how it sounds, so that a restart has it at once. No
# file of that folder is believed: each begins with a seal over its name and content.

SAMPLE_FORMAT = "mp3"  # which every browser plays
MAX_SAMPLE = 1_000_000  # bytes; a line takes some 50,000


class SampleFiles:
    """Samples by key, each a file, whole or not there. Any thread may ask, and any worker."""

    def __init__(self, folder: Path):
        self.folder, self._is_told = folder, False

    def get(self, key: str) -> bytes:
        """The audio; empty if there is none."""
        try:
            content = read_regular(self.folder / key, MAX_SAMPLE)
        except (OSError, PresetError):
            return b""
        seal, audio = content[:32], content[32:]
        return audio if seal == self._seal(key, audio) else b""

    def put(self, key: str, audio: bytes) -> None:
        """Keeps it if the disk takes it."""
        path = self.folder / key
        part = path.with_suffix(f".{secrets.token_hex(4)}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(self._seal(key, audio) + audio)
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            if not self._is_told:
                self._is_told = True
                log.warning("samples of voices cannot be kept in %s (%s): they are made at each"
                            " asking", self.folder, error.strerror)

    def _seal(self, key: str, audio: bytes) -> bytes:
        return hashlib.sha256(key.encode() + audio).digest()


class Making(NamedTuple):
    """A sample on its way, and for each who asked whether they have left."""

    request: Request
    askers: list[Callable[[], bool]]


class Samples:
    """Every voice's sample: planned, found or made. Any thread may ask.

    `manner` is what else decides how takes come out: how they are judged, say.
    """

    def __init__(self, scheduler: Scheduler, folder: Path, manner: object):
        self.scheduler, self.files, self.manner = scheduler, SampleFiles(folder), manner
        self._lock = threading.Lock()
        self._making: dict[str, Making] = {}

    def plan(self, narrator: Narrator, voice: str) -> tuple[str, Speech]:
        """A line in the voice, and the name of all that decides its sound, under which `files` has
        it. Raises InvalidRequest for an unknown voice.
        """
        speech, details = narrator.plan_sample(voice), self.scheduler.state.details
        decides = (VERSION, SAMPLE_FORMAT, self.manner, details.get("device"), details.get("dtype"),
                   narrator.facts.origin, speech.rate, speech.spans, speech.wanted, speech.segments)
        return hashlib.sha256(repr(decides).encode()).hexdigest(), speech

    def make(self, key: str, speech: Speech, deadline: float,
             has_left: Callable[[], bool]) -> bytes:
        """The sample, once for all who ask meanwhile. Raises what a request's end may be."""
        while True:
            with self._lock:
                if audio := self.files.get(key):  # made since it was looked for
                    return audio
                if making := self._making.get(key):
                    making.askers.append(has_left)
                else:
                    making = self._making[key] = self._ask(speech, deadline, has_left)
            try:
                audio = joined_takes(speech, list(making.request.results()))
                return audio
            except (Abandoned, RequestTimeout):  # of who asked first: others ask anew
                if has_left() or time.monotonic() >= deadline:
                    raise
            finally:
                self._end(key, making, audio)

    def _ask(self, speech: Speech, deadline: float, has_left: Callable[[], bool]) -> Making:
        askers = [has_left]
        request = Request(speech, deadline, lambda: all(left() for left in askers), patient=True)
        self.scheduler.submit(request)
        return Making(request, askers)

    def _end(self, key: str, making: Making, audio: bytes) -> None:
        with self._lock:
            if self._making.get(key) is making:
                del self._making[key]
                if audio:
                    self.files.put(key, audio)


def joined_takes(speech: Speech, takes: list[Take]) -> bytes:
    """A speech's audio as a file."""
    sound = [samples for span, take in zip(speech.spans, takes, strict=True) for samples in (
        take.samples, np.zeros(round(span.pause * speech.rate), np.int16))]
    return encode(np.concatenate(sound), speech.rate, SAMPLE_FORMAT)


# -----------------------------------------------------------------------------
# Guard: an instance of Vast's whose speech nobody wants stops itself
#
# Nothing else may be left to end what it costs. It knows neither who speaks nor how requests
# arrive. What has to hold while no worker lives, BARK_START_LIMIT and BARK_MAX_HOURS, is the
# on-start command's (see the manager script), which leaves a note here.

GUARDS = {"BARK_IDLE_STOP": "idle_stop", "BARK_START_LIMIT": "start_limit",
          "BARK_MAX_HOURS": "max_hours"}
LOOK_SECONDS = 0.5
SAVE_SECONDS = 5.0  # that a crash may take from the time since the last speech
WARNING_SECONDS = 60.0
ORDER_SECONDS = 30.0  # for Vast's whole answer
MAX_ANSWER = 1 << 16  # bytes of it
UNCLEAR_SECONDS = 20.0  # in which an order without a clear answer would take effect
STOP_SECONDS = 120.0  # in which Vast stops an instance
RETRY_STOPPED = 60  # seconds, for Retry-After
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0  # between attempts; each is twice the last
NOTE_SECONDS = 120.0  # the on-start command renews its note every 10 s
BY_HAND = "end the rent by hand: manage-bark-worker.sh stop, or https://cloud.vast.ai/instances/"
REFUSED = {401: "it does not take the container's key", 403: "the container's key may not",
           404: "it knows no such instance", 429: "too many requests"}


class Answer(NamedTuple):
    """Why an order did not do, and for how many seconds it may take effect all the same."""

    problem: str
    seconds: float = 0.0


def order_stop(container: Container) -> Answer:
    """Tells Vast once to stop the instance. Raises nothing."""
    url = f"{container.url}/api/v0/instances/{container.instance}/"
    headers = {"Authorization": f"Bearer {container.key}", "Content-Type": "application/json",
               "User-Agent": f"bark-worker/{VERSION}"}
    try:
        request = urllib.request.Request(url, b'{"state": "stopped"}', headers, method="PUT")
        with urllib.request.urlopen(request, timeout=ORDER_SECONDS) as reply:
            return judge_answer(reply.status, reply.read(MAX_ANSWER))
    except urllib.error.HTTPError as error:  # a redirection too, which no PUT follows
        error.close()
        return judge_answer(error.code, b"")
    except (OSError, ValueError, HTTPException) as error:
        return Answer(f"no answer from {container.url}: {first_line(error)}", UNCLEAR_SECONDS)


def judge_answer(status: int, body: bytes) -> Answer:
    said = f"Vast answers HTTP {status}"
    if status != 200:
        is_clear = 300 <= status < 500 and status != 408
        hint = f" ({REFUSED[status]})" if status in REFUSED else ""
        return Answer(said + hint, 0.0 if is_clear else UNCLEAR_SECONDS)
    try:
        success = json.loads(body)["success"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return Answer(f"{said} with what is no answer to it", UNCLEAR_SECONDS)
    if success is True:
        return Answer("Vast took the order, but the instance still runs", STOP_SECONDS)
    return Answer(f"{said}, but no success")


def within(seconds: float, order: Callable[[], Answer]) -> Answer:
    """The order's answer, or that there is none: a trickle of bytes outlasts every timeout."""
    answer: Future[Answer] = Future()
    threading.Thread(target=lambda: answer.set_result(order()), daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        return Answer(f"no answer from Vast within {seconds:.0f} s", UNCLEAR_SECONDS)


def container_run(container: Container | None) -> str:
    """What all workers of one run of a container share, however often they are started: its key
    (as a digest), the machine's boot, process 1, and the session that the on-start command began.
    """
    key = container.key if container else ""
    parts = [hashlib.sha256(key.encode()).hexdigest()[:12], str(os.getsid(0))]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19])
    return " ".join(parts)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; empty if there is none."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(4096))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_time(value: object, high: float = math.inf) -> bool:
    return type(value) in (int, float) and 0 <= value <= high and value != math.inf


class TimeFile:
    """When speech was last wanted, by the machine's monotonic clock, which setting leaves alone.

    It outlasts workers, but no run of the container. Of several workers the latest counts.
    """

    def __init__(self, folders: Iterable[Path], run: str):
        self.paths, self.run = [folder / "bark-idle.json" for folder in folders], run
        self._is_told = False

    def load(self) -> float | None:
        found = [read_object(path) for path in self.paths]
        now = time.monotonic()
        return max((one["since"] for one in found if one.get("run") == self.run
                    and is_time(one.get("since"), now)), default=None)

    def save(self, since: float) -> None:
        text, problem = json.dumps({"run": self.run, "since": since}), ""
        for path in self.paths:
            part = path.with_suffix(f".{os.getpid()}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                part.write_text(text)
                part.replace(path)
                return
            except OSError as error:
                problem = f"{path}: {error.strerror}"
        if not self._is_told:
            self._is_told = True
            log.warning("the time of the last speech cannot be kept (%s): a worker that is started"
                        " again counts anew", problem)

    def forget(self) -> None:
        for path in self.paths:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


class Guard:
    """Stops the instance after so many seconds without speech (0: never), and says what is armed.

    While an order to stop is on its way, no work is let in, so that none is cut; if it does not
    do, work goes on. `limits` are what the on-start command counts, in seconds by name, and
    `notes` where it may leave its note.
    """

    def __init__(self, idle: float, order: Callable[[], Answer], times: TimeFile,
                 limits: Mapping[str, float], notes: Iterable[Path]):
        self.idle, self._order, self._times = idle, order, times
        self.limits, self._notes = limits, list(notes)
        self._lock, self._wake, self._closed = threading.Lock(), threading.Event(), False
        self._working, self._stopping, self._is_warned = 0, False, False
        self._since: float | None = None  # monotonic; None until the container was first ready
        self._saved = -math.inf
        self._attempts, self._next, self._problem = 0, -math.inf, ""
        self._note: dict[str, Any] = {}
        self._began, self._is_noted = time.monotonic(), False

    def start(self) -> None:
        if self.idle or self.limits:
            self._wake.set()  # a worker that crashes soon has to look before
            threading.Thread(target=self._run, name="guard", daemon=True).start()

    def close(self) -> None:
        """The worker ends: from now on nothing is ordered."""
        self._closed = True
        self._wake.set()

    def ready(self) -> None:
        """From the first time on that this holds, time without speech counts."""
        with self._lock:
            if self._since is None:
                self._since = time.monotonic()
        self._wake.set()

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Meanwhile speech is made. Raises Unavailable if the instance is just being stopped."""
        with self._lock:
            if self._stopping:
                raise Unavailable("the instance is being stopped, as nobody wanted speech for"
                                  f" {self.idle / 60:g} min (BARK_IDLE_STOP); to wake it:"
                                  " manage-bark-worker.sh start", code="draining",
                                  retry_after=RETRY_STOPPED)
            self._working += 1
        self._wake.set()
        wanted = True
        try:
            yield
        except Unavailable:  # it was not let in
            wanted = False
            raise
        finally:
            with self._lock:
                self._working -= 1
                if wanted:
                    self._since = time.monotonic()

    def left(self) -> float | None:
        """Seconds until the instance stops itself; None while that does not count."""
        now = time.monotonic()
        since = now if self._working else self._since
        return None if since is None else max(0.0, since + self.idle - now)

    def facts(self) -> dict[str, Any]:
        """What is armed, with seconds left, and what went wrong, if something did."""
        told: dict[str, Any] = {}
        if self.idle:
            told["idle_stop"] = limit_fact(self.idle, self.left())
        note, now = self._note, time.monotonic()
        for name, limit in self.limits.items():
            ends = note.get(name)
            told[name] = limit_fact(limit, ends - now if is_time(ends) else None)
        problem = self._problem or note.get("problem")
        if problem:
            attempts = self._attempts if self._problem else note.get("attempts")
            told.update(attempts=attempts, error=f"{problem}; {BY_HAND}")
        return told

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()
            try:
                self._read_note()
                if self.idle:
                    self._look()
            except Exception as error:
                log.error("the guard stumbled", exc_info=error)
                time.sleep(FIRST_PAUSE)

    def _read_note(self) -> None:
        now = time.monotonic()
        fresh = [note for note in map(read_object, self._notes if self.limits else ())
                 if is_time(note.get("at"), now) and now - note["at"] < NOTE_SECONDS]
        self._note = max(fresh, key=lambda note: note["at"], default={})
        if self.limits and not fresh and not self._is_noted and now > self._began + NOTE_SECONDS:
            log.warning("%s: nothing here counts that, as the on-start command of"
                        " manage-bark-worker.sh does not run", told_names(self.limits))
        self._is_noted |= now > self._began + NOTE_SECONDS

    def _look(self) -> None:
        self._keep_time()
        left = self.left()
        if left is None or left > WARNING_SECONDS:
            self._is_warned = False
        elif not self._is_warned:
            self._is_warned = True
            log.warning("the instance stops itself in %.0f s, as nobody wanted speech for long"
                        " (BARK_IDLE_STOP=%g)", left, self.idle / 60)
        if left == 0 and time.monotonic() >= self._next and not self._closed:
            self._stop()

    def _keep_time(self) -> None:
        """Takes over what another worker, or the one before, saw; writes down what this one did."""
        kept = self._times.load()
        with self._lock:
            if kept is not None:
                self._since = kept if self._since is None else max(self._since, kept)
            since = time.monotonic() if self._working else self._since
        late = min(SAVE_SECONDS, self.idle / 20)
        if since is not None and (kept is None or since > kept + late) and (
                since > self._saved + late):
            self._times.save(since)
            self._saved = since

    def _stop(self) -> None:
        with self._lock:
            if self._working or self.left() != 0:
                return
            self._stopping = True
        self._times.forget()  # whoever wakes the instance begins anew
        self._saved = -math.inf
        log.warning("stopping the instance: nobody wanted speech for %g min", self.idle / 60)
        answer = within(ORDER_SECONDS, self._order)
        self._attempts += 1
        self._problem = answer.problem if answer.seconds < STOP_SECONDS else ""
        deadline = time.monotonic() + answer.seconds
        while time.monotonic() < deadline and not self._closed:
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()
        if self._closed:
            return
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._attempts - 1, 20))
        self._problem, self._next = answer.problem, time.monotonic() + pause
        with self._lock:
            self._stopping = False
        log.error("the instance did not stop itself (attempt %d): %s; again in %.0f s; %s",
                  self._attempts, answer.problem, pause, BY_HAND)


def limit_fact(limit: float, left: float | None) -> dict[str, float | None]:
    """Both in seconds; `left` is None while the limit does not count."""
    return {"limit": limit, "left": None if left is None else round(max(0.0, left), 1)}


def told_names(fields: Iterable[str]) -> str:
    return ", ".join(name for name, field in GUARDS.items() if field in fields)


def build_guard(config: Config, folders: Iterable[Path]) -> Guard:
    """As armed as it can be here: not elsewhere than on Vast."""
    spans = {"idle_stop": 60 * config.idle_stop, "start_limit": 60 * config.start_limit,
             "max_hours": 3600 * config.max_hours}
    armed = {name: seconds for name, seconds in spans.items() if seconds}
    container, folders = config.container, list(folders)
    if armed and container is None:
        log.warning("%s: of no effect here: this is no container of Vast's, which has CONTAINER_ID"
                    " and CONTAINER_API_KEY set", told_names(armed))
        armed = {}
    elif armed:
        log.info("guard of instance %s: %s", container.instance, ", ".join(
            f"{name}={getattr(config, field):g}" for name, field in GUARDS.items()
            if field in armed))
    return Guard(armed.pop("idle_stop", 0.0), lambda: order_stop(container),
                 TimeFile(folders, container_run(container)), armed,
                 [folder / "bark-guard.json" for folder in folders])


# -----------------------------------------------------------------------------
# HTTP: the mechanics of connections, requests and answers, whatever they are about
#
# A thread for each connection, from the standard library. This section reads requests within limits
# of size and time, finds who answers them, and writes the answers, errors among them, in one form.
# What the answers are, it does not know: they come from a table of routes.

MAX_BODY = 1 << 20          # bytes
MAX_SIZE_LINE, MAX_TRAILERS = 1 << 10, 1 << 13  # bytes, of a chunked body
MAX_CONNECTIONS = 1024
READ_SECONDS = 30.0         # for a whole request to arrive, or the next one on an idle connection
STALL_SECONDS = 30.0        # without a byte from a client, or 64 KiB to it
TLS_HELLO = b"\x16"         # the first byte of who speaks TLS, which no request begins with
TLS_TOLD_SECONDS = 60.0     # between two log lines about it
LINGER_SECONDS = 1.0        # for a client to read an error before its unread body is thrown away
HEADER_DEFECTS = (
    email.errors.MissingHeaderBodySeparatorDefect, email.errors.FirstHeaderLineIsContinuationDefect,
    email.errors.MisplacedEnvelopeHeaderDefect, email.errors.InvalidHeaderDefect)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
EXPOSED = (  # to pages of other origins
    "X-Request-Id, X-Bark-Seed, X-Bark-Duration, Retry-After, ETag, Content-Range")


class HttpError(InvalidRequest):
    """A request that fails before its content counts; `headers` go with the answer."""

    def __init__(self, status: HTTPStatus, code: str, message: str,
                 headers: Mapping[str, str] | None = None):
        super().__init__(message, code=code)
        self.status, self.headers = status, dict(headers or {})
        self.permanent = status != HTTPStatus.REQUEST_TIMEOUT


STATUS_FOR_ERROR: tuple[tuple[type[WorkerError], HTTPStatus], ...] = (  # the first that fits
    (NothingToSpeak, HTTPStatus.UNPROCESSABLE_ENTITY),
    (InvalidRequest, HTTPStatus.BAD_REQUEST),
    (Unavailable, HTTPStatus.SERVICE_UNAVAILABLE),
    (RequestTimeout, HTTPStatus.GATEWAY_TIMEOUT),
    (GenerationFailed, HTTPStatus.SERVICE_UNAVAILABLE),
    (WorkerError, HTTPStatus.INTERNAL_SERVER_ERROR),
)


def status_and_headers(error: WorkerError) -> tuple[HTTPStatus, dict[str, str]]:
    headers = {"X-Should-Retry": "false"} if error.permanent else {}  # OpenAI's clients obey it
    if isinstance(error, HttpError):
        return error.status, headers | error.headers
    status = next(status for kind, status in STATUS_FOR_ERROR if isinstance(error, kind))
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(getattr(error, "retry_after", RETRY_FULL))
    return status, headers


def error_body(error: WorkerError) -> dict[str, Any]:
    return {"status": "error", "error": {"message": str(error), "type": error.kind,
                                         "param": error.param, "code": error.code}}


def names_tag(tags: str, tag: str) -> bool:
    """Whether an If-None-Match names this ETag, or any."""
    return tags.strip() == "*" or tag in re.findall('"[^"]*"', tags)


def wanted_part(asked: str, length: int) -> range | None:
    """The bytes of so many that a Range header asks for. None is all: where it asks for several
    parts, or is none that RFC 9110 knows. Raises HttpError: 416.
    """
    match = re.fullmatch(r"\s*bytes\s*=\s*([0-9]{0,18})-([0-9]{0,18})\s*", asked, re.IGNORECASE)
    first, last = match.groups() if match else ("", "")
    if not (first or last) or (first and last and int(first) > int(last)):
        return None
    part = range(length)[int(first) : int(last or length) + 1] if first else (
        range(length)[max(0, length - int(last)) :])  # the last so many
    if not part:
        raise HttpError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "range_not_satisfiable",
                        f"Range is {shown(asked)}, but there are {length} bytes",
                        {"Content-Range": f"bytes */{length}", "Accept-Ranges": "bytes"})
    return part


def has_left(connection: socket.socket) -> bool:
    """Whether the client has closed its side, be it for sending only: who left cannot be told
    from who is merely done. Never blocks, takes nothing from the stream.
    """
    hung_up = getattr(select, "POLLRDHUP", 0)  # Linux: seen even behind unread bytes
    try:
        poll = select.poll()
        poll.register(connection, select.POLLIN | hung_up)
        events = dict(poll.poll(0)).get(connection.fileno(), 0)
        if events & (hung_up | select.POLLHUP | select.POLLERR | select.POLLNVAL):
            return True
        return bool(events & select.POLLIN) and connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True


def blocks(body: bytes) -> Iterator[bytes]:
    """Pieces for one write each, whose timeout is for all of its bytes."""
    for at in range(0, len(body), 1 << 16):
        yield body[at : at + (1 << 16)]


def told_facts(facts: Mapping[str, Any]) -> str:
    """For the log; of what is True just that it is."""
    return " ".join(name if value is True else f"{name}={value}" for name, value in facts.items())


class ChunkedBody:
    """A body that comes in chunks (RFC 9112, section 7.1), of at most `limit` bytes in all.

    Extensions and trailers are read and dropped. Raises HttpError: 400 for broken framing, 408 if
    the rest does not come, 413.
    """

    def __init__(self, file: Any, limit: int):
        self._file, self._limit = file, limit

    def read(self) -> bytes:
        body = bytearray()
        while size := self._size():
            if len(body) + size > self._limit:
                raise body_too_large("more than that", self._limit)
            body += self._exactly(size)
            if self._exactly(2) != b"\r\n":
                raise self._broken("a chunk is longer than its size says")
        left = MAX_TRAILERS
        while (line := self._line(left, "the trailers")) != b"\r\n":
            left -= len(line)
        return bytes(body)

    def _size(self) -> int:
        size = self._line(MAX_SIZE_LINE, "a chunk's size").partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,16}", size):
            raise self._broken("a chunk's size is no hexadecimal number")
        return int(size, 16)

    def _line(self, limit: int, what: str) -> bytes:
        line = self._file.readline(limit + 1)
        if len(line) > limit:
            raise self._broken(f"{what} take more than {limit} bytes")
        if not line.endswith(b"\n"):
            raise incomplete_body("its last chunk")
        if not line.endswith(b"\r\n"):
            raise self._broken(f"{what} do not end with CR LF")
        return line

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise incomplete_body("its last chunk")
        return data

    def _broken(self, what: str) -> HttpError:
        return HttpError(HTTPStatus.BAD_REQUEST, "invalid_chunk", f"the chunked body is broken:"
                         f" {what}")


def incomplete_body(expected: str) -> HttpError:
    return HttpError(HTTPStatus.REQUEST_TIMEOUT, "incomplete_body",
                     f"the body did not arrive in time up to {expected}")


def body_too_large(found: str, limit: int) -> HttpError:
    return HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large",
                     f"the body has {found}; at most {limit} bytes are allowed")


class Connections:
    """The open connections; those that the worker is waiting on, the longest waiting first."""

    def __init__(self, limit: int):
        self.limit = limit
        self._lock = threading.Lock()
        self._waiting: OrderedDict[socket.socket, float] = OrderedDict()  # since when
        self._busy: set[socket.socket] = set()

    def admit(self, connection: socket.socket) -> bool:
        """Makes room by cutting the longest waiting one; False if all are at work."""
        with self._lock:
            if len(self._waiting) + len(self._busy) >= self.limit:
                if not self._waiting:
                    return False
                oldest, _ = self._waiting.popitem(last=False)
                cut(oldest, socket.SHUT_RDWR)
            self._waiting[connection] = time.monotonic()
            return True

    def busy(self, connection: socket.socket) -> None:
        with self._lock:
            self._waiting.pop(connection, None)
            self._busy.add(connection)

    def waiting(self, connection: socket.socket) -> None:
        with self._lock:
            self._busy.discard(connection)
            self._waiting[connection] = time.monotonic()
            self._waiting.move_to_end(connection)

    def forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._waiting.pop(connection, None)
            self._busy.discard(connection)

    def cut_slow(self) -> None:
        """Stops reading from clients that have taken READ_SECONDS; they may still be answered."""
        with self._lock:
            limit = time.monotonic() - READ_SECONDS
            slow = [c for c, since in self._waiting.items() if since < limit]
            for connection in slow:
                cut(connection, socket.SHUT_RD)

    def wait_idle(self, seconds: float) -> None:
        """Returns when nobody is being answered, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while self._busy and time.monotonic() < deadline:
            time.sleep(0.02)


def cut(connection: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # it may be closed already
        connection.shutdown(how)


class HttpServer(ThreadingHTTPServer):
    """A thread for each of so many connections; past that the oldest idle one makes room.

    Raises OSError where it cannot listen, and TypeError for a HOST that is no host's name.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, config: Config, handler: type[HttpHandler], connections: int,
                 metrics: Metrics):
        self.config, self.connections = config, Connections(connections)
        self.metrics = metrics
        self._tls_told = -math.inf
        if ":" in config.host:
            self.address_family = socket.AF_INET6
        super().__init__((config.host, config.port), handler)

    @property
    def url(self) -> str:
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.server_address[1]}"

    def server_bind(self) -> None:
        # HTTPServer's own looks the host's name up, which may take seconds
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.connections.admit(request):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        self.connections.forget(request)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        self.connections.cut_slow()

    def tell_tls(self) -> None:
        if time.monotonic() > self._tls_told + TLS_TOLD_SECONDS:
            self._tls_told = time.monotonic()
            log.warning("a client speaks TLS (https://), which this port does not: use http://, or"
                        " put a proxy in front that ends TLS")

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # an OSError is a client that went away
            log.error("connection failed", exc_info=error)


class Route(NamedTuple):
    """A path's method, and who answers it. An open one needs no key, of a probe no line is logged.
    """

    method: str
    answer: Callable[[Any], None]
    is_open: bool = False
    is_probe: bool = False


class HttpAnswers(BaseHTTPRequestHandler):
    """How answers are written: heads, bodies whole or in chunks, errors, and for other origins.

    Of the request at hand: what its answer's status is (`sent_status`, 0 before it has begun), its
    `request_id`, whether bytes of its body may still arrive (`body_pending`), `notes` for the log.
    """

    server: HttpServer
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # so that even a garbled request line gets a status line

    def begin(self, body_pending: bool) -> None:
        self.began, self.sent_status = time.monotonic(), 0
        self.notes: dict[str, Any] = {}
        self.outcome = "ok"  # or the code of what went wrong
        self.request_id, self.body_pending = secrets.token_hex(8), body_pending
        self.known_path, self.below = "?", ""  # of whatever the client sent

    def version_string(self) -> str:
        return f"bark-worker/{VERSION}"

    def send_head(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.sent_status = int(status)
        if self.request_version == "HTTP/0.9":  # to which http.server sends no status line
            self.request_version = "HTTP/1.0"
        self.send_response(status)
        for name, value in {"Cache-Control": "no-store", "X-Request-Id": self.request_id,
                            **self.cors_headers(), **headers}.items():
            self.send_header(name, value)
        if self.close_connection or self.body_pending:
            self.send_header("Connection", "close")
        self.end_headers()

    def cors_headers(self) -> dict[str, str]:
        """What lets a page read the answer, if its origin may."""
        allowed = self.server.config.cors_origins
        headers = vars(self).get("headers")  # none of a request line that is garbled
        origin = headers.get("Origin", "") if headers else ""
        if not allowed or not origin:
            return {}
        if origin not in allowed and "*" not in allowed:
            return {"Vary": "Origin"}
        return {"Access-Control-Allow-Origin": "*" if "*" in allowed else origin,
                "Access-Control-Expose-Headers": EXPOSED, "Vary": "Origin"}

    def send_options(self, allow: str) -> None:
        headers = {"Allow": allow}
        if "Access-Control-Allow-Origin" in self.cors_headers():  # a * does not mean Authorization
            headers |= {"Access-Control-Allow-Methods": allow, "Access-Control-Max-Age": "600",
                        "Access-Control-Allow-Headers": "Authorization, *"}
        self.send_head(HTTPStatus.NO_CONTENT, headers)

    def send_body(self, status: HTTPStatus, kind: str, body: bytes,
                  headers: Mapping[str, str] | None = None) -> None:
        self.send_head(status, {"Content-Type": kind, "Content-Length": str(len(body)),
                                **(headers or {})})
        if self.command != "HEAD":
            for piece in blocks(body):
                self.wfile.write(piece)

    def send_kept(self, kind: str, body: bytes, headers: Mapping[str, str]) -> None:
        """A body that has an ETag: not to who has it already, and in part to who wants a part.

        HEAD tells of a part what GET would, as Apache and nginx do.
        """
        tag = headers["ETag"]
        headers = {"Accept-Ranges": "bytes", **headers}
        if names_tag(self.headers.get("If-None-Match", ""), tag):
            self.send_head(HTTPStatus.NOT_MODIFIED, headers)
            return
        part = None
        if self.headers.get("If-Range", tag).strip() == tag:
            part = wanted_part(self.headers.get("Range", ""), len(body))
        if part is None:
            self.send_body(HTTPStatus.OK, kind, body, headers)
        else:
            self.send_body(HTTPStatus.PARTIAL_CONTENT, kind, body[part.start : part.stop], {
                **headers, "Content-Range": f"bytes {part.start}-{part.stop - 1}/{len(body)}"})

    def send_chunks(self, kind: str, chunks: Iterator[bytes], headers: Mapping[str, str]) -> None:
        """Sends chunks as they come. Nothing goes out before the first, so that an error up to
        then is an answer; a later one cuts the connection, so that nobody takes a part for all.
        """
        if not self.has_chunks():
            self.send_body(HTTPStatus.OK, kind, b"".join(chunks), headers)
            return
        first = next(filter(None, chunks))
        self.send_head(HTTPStatus.OK, {"Content-Type": kind, "Transfer-Encoding": "chunked",
                                       "X-Accel-Buffering": "no", **headers})  # nginx: hand it on
        for chunk in itertools.chain([first], chunks):
            for piece in blocks(chunk):  # none for an empty one, which would mean the end
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def has_chunks(self) -> bool:
        """HTTP/1.0 has none: there, an end and a cut look the same."""
        return self.request_version >= "HTTP/1.1"

    def send_json(self, payload: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK,
                  headers: Mapping[str, str] | None = None) -> None:
        self.send_body(status, "application/json", json.dumps(payload).encode(), headers)

    def send_failure(self, error: WorkerError) -> None:
        status, headers = status_and_headers(error)
        self.notes["code"] = self.outcome = error.code
        if self.sent_status:  # an answer has begun, and must not look complete
            self.close_connection = True
            return
        try:
            self.send_json(error_body(error), status, headers)
        except OSError:
            self.close_connection = True


class HttpHandler(HttpAnswers):
    """Answers one connection's requests, one after the other: all of that but the answers.

    `routes` says who gives them, by path; one that ends with a slash has all paths below it. They
    read with `read_body`, and write with `send_json`, `send_body` or `send_chunks`, or raise.
    """

    routes: Mapping[str, Route] = MappingProxyType({})
    timeout = STALL_SECONDS
    disable_nagle_algorithm = True

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):  # BaseHTTPRequestHandler asks for do_GET, do_POST, ...
            return self.dispatch
        raise AttributeError(name)

    def handle_one_request(self) -> None:
        try:
            is_tls = self.rfile.peek(1)[:1] == TLS_HELLO
        except OSError:  # nothing came in time, or the client is gone
            self.close_connection = True
            return
        if is_tls:
            self.close_connection = True
            self.server.tell_tls()
        else:
            super().handle_one_request()

    def parse_request(self) -> bool:
        parsed = super().parse_request()
        if not self.raw_requestline.strip():  # http.server says nothing to a blank line
            self.send_error(HTTPStatus.BAD_REQUEST)
        return parsed

    def dispatch(self) -> None:
        """One request: find who answers it, and turn whatever goes wrong into an error's JSON."""
        self.begin(self.declares_body())
        try:
            answer = self.find_answer()
            if not self.body_pending:
                self.server.connections.busy(self.connection)
            answer(self)
        except Abandoned as left:
            self.close_connection, self.sent_status, self.outcome = True, 499, left.code
        except WorkerError as error:
            self.send_failure(error)
        except OSError:
            self.close_connection = True
            self.notes["broken_off"], self.outcome = True, "client_closed_request"
            self.sent_status = self.sent_status or 499
        except Exception as error:
            log.error("request failed", exc_info=error)
            self.send_failure(WorkerError("internal error; the worker's log has more",
                                          code="internal_error"))
        self.log_answer()
        self.finish_body()
        self.server.connections.waiting(self.connection)

    def log_answer(self) -> None:
        route = self.routes.get(self.known_path)
        level = logging.DEBUG if route and route.is_probe else logging.INFO  # they come often
        method = self.command if self.command in METHODS else "?"
        seconds = time.monotonic() - self.began
        self.server.metrics.answered(self.known_path, self.sent_status, self.outcome, seconds)
        facts = {"status": self.sent_status, "ms": int(1000 * seconds),
                 "id": self.request_id, **self.notes}
        log.log(level, "%s %s %s", method, self.known_path, told_facts(facts),
                extra={"fields": {"method": method, "path": self.known_path, **facts}})

    def declares_body(self) -> bool:
        """Whether bytes that are no request may follow; unless read, the connection ends."""
        lengths = self.headers.get_all("Content-Length", [])
        return (self.command == "POST" or "Transfer-Encoding" in self.headers
                or any(length.strip() != "0" for length in lengths) or self.has_broken_header())

    def has_broken_header(self) -> bool:
        """Whether a line among the headers is none: the parser takes all after it for the body."""
        return any(isinstance(defect, HEADER_DEFECTS) for defect in self.headers.defects)

    def find_route(self, path: str) -> Route | None:
        """The path's route: exactly, else with slashes too many or /v1 missing."""
        tidy = re.sub("/{2,}", "/", path).rstrip("/") or "/"
        for asked in (tidy, f"/v1{tidy}"):
            above = (p for p in self.routes if p[1:].endswith("/") and asked.startswith(p))
            known = asked if asked in self.routes else next(above, None)
            if known:
                self.known_path, self.below = known, asked.removeprefix(known)
                return self.routes[known]
        return None

    def find_answer(self) -> Callable[[Any], None]:
        if self.has_broken_header():
            raise HttpError(HTTPStatus.BAD_REQUEST, "malformed_request",
                            "a header line is not of the form 'Name: value'")
        try:
            path = urlsplit(self.path).path
        except ValueError:
            raise HttpError(HTTPStatus.BAD_REQUEST, "malformed_request",
                            "the request's address is malformed") from None
        route = self.find_route(path)
        if not (route and route.is_open) and self.command != "OPTIONS":
            self.check_key()
        if not route:
            raise self.unknown_path(path)
        allow = "GET, HEAD, OPTIONS" if route.method == "GET" else f"{route.method}, OPTIONS"
        if self.command == "OPTIONS":
            return lambda handler: handler.send_options(allow)
        if self.command not in allow.split(", "):
            raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, "method_not_allowed",
                            f"{self.known_path} takes {allow}, not {shown(self.command, 16)}",
                            {"Allow": allow})
        return route.answer

    def unknown_path(self, path: str) -> HttpError:
        return HttpError(HTTPStatus.NOT_FOUND, "not_found", f"there is no {shown(path)};"
                         f" there are {', '.join(self.routes)}")

    def has_key(self) -> bool:
        """Whether the key is there, or none is wanted."""
        key = self.server.config.api_key
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        sent = token.strip().encode("utf-8", "surrogateescape")
        return not key or (hmac.compare_digest(sent, key.encode()) and scheme.lower() == "bearer")

    def check_key(self) -> None:
        if not self.has_key():
            what = "is wrong" if self.headers.get("Authorization") else "is missing"
            raise HttpError(HTTPStatus.UNAUTHORIZED, "invalid_api_key", f"the API key {what}; send"
                            " the header 'Authorization: Bearer KEY'",
                            {"WWW-Authenticate": "Bearer"})

    def handle_expect_100(self) -> bool:
        return True  # answered in read_body, when it is clear that the body is wanted

    def read_body(self) -> bytes:
        """The JSON body. Raises HttpError: 400, 408, 411, 413 or 415."""
        length = self.body_length()
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else ""
        if kind and kind != "application/json" and not kind.endswith("+json"):
            raise HttpError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type",
                            f"the body is {shown(kind)}; send JSON with"
                            " 'Content-Type: application/json'")
        if (self.headers.get("Expect", "").lower() == "100-continue"
                and self.request_version >= "HTTP/1.1"):
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
        body = self.receive(length)
        self.body_pending = False
        self.server.connections.busy(self.connection)
        return body

    def receive(self, length: int | None) -> bytes:
        body = b""
        try:
            if length is None:
                return ChunkedBody(self.rfile, MAX_BODY).read()
            body = self.rfile.read(length)
        except TimeoutError:
            raise incomplete_body("its end") from None
        if len(body) < length:
            raise incomplete_body(f"the {length} bytes that Content-Length announces")
        return body

    def body_length(self) -> int | None:
        """Bytes; None for a body in chunks, whose length shows at its end."""
        codings = self.headers.get_all("Transfer-Encoding", [])
        lengths = set(self.headers.get_all("Content-Length", []))
        if codings:
            self.check_coding(codings, bool(lengths))
            return None
        if not lengths:
            raise HttpError(HTTPStatus.LENGTH_REQUIRED, "length_required", "the body's length is"
                            " missing; send Content-Length, or 'Transfer-Encoding: chunked'")
        value = lengths.pop().strip()
        if lengths or not re.fullmatch(r"[0-9]{1,30}", value):
            raise HttpError(HTTPStatus.BAD_REQUEST, "invalid_length", f"Content-Length is"
                            f" {shown(value)}; it must be one whole number, 0 or more")
        if int(value) > MAX_BODY:
            raise body_too_large(f"{value} bytes", MAX_BODY)
        return int(value)

    def check_coding(self, codings: list[str], has_length: bool) -> None:
        """What is not plainly a chunked body might be read as another request by a proxy."""
        coding = ", ".join(codings).strip()
        wrong = ("HTTP/1.0 has no Transfer-Encoding" if self.request_version < "HTTP/1.1" else
                 "Content-Length and Transfer-Encoding exclude each other" if has_length else
                 f"Transfer-Encoding is {shown(coding)}; allowed is chunked"
                 if coding.lower() != "chunked" else "")
        if wrong:
            raise HttpError(HTTPStatus.BAD_REQUEST, "invalid_length", wrong)

    def finish_body(self) -> None:
        """Closes after an unread body, but only once the client had time to read the answer.

        Closing at once would make its system throw the answer away (RFC 9112, section 9.6).
        """
        if not self.body_pending:
            return
        self.close_connection = True
        deadline = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_SECONDS)
            while time.monotonic() < deadline and self.connection.recv(1 << 16):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself finds wrong. Its message quotes the client: dropped."""
        self.begin(body_pending=True)
        self.close_connection = True
        status = HTTPStatus(code)
        self.send_failure(HttpError(status, "malformed_request",
                                    f"malformed HTTP request: {status.phrase}"))
        self.server.metrics.answered(self.known_path, code, self.outcome, 0.0)
        log.info("malformed request status=%d", code, extra={"fields": {"status": code}})
        self.finish_body()

    def log_message(self, format: str, *args: Any) -> None:
        pass  # `dispatch` writes one line a request, without what the client sent


# -----------------------------------------------------------------------------
# Endpoints: JSON in, audio out
#
# What a client may send is checked field by field, with an error that names the field, the value
# and what is allowed. Then the text is planned and handed to the scheduler, and sent as it comes:
# whole, as a stream, as lines of JSON or as server-sent events. A new endpoint is a method and a
# row in ROUTES.

MAX_INPUT = 4096            # characters of OpenAI's `input`
SILENCE_SECONDS = 0.25      # that OpenAI's endpoint gives for a text without a word
WHOLE_FORMATS = ("flac",)   # as a stream it has no length in its head, which libsndfile refuses
MODEL_NAMES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")  # that clients ask for; all are the one here
MODELS_PATH, SAMPLES_PATH = "/v1/models/", "/voices/"
PAGE = Path(__file__).resolve().with_name("page.html")
MEDIA_TYPES = {form.mime: name for name, form in FORMATS.items()} | {
    "audio/x-wav": "wav", "audio/wave": "wav", "audio/vnd.wave": "wav", "audio/mp3": "mp3",
    "audio/opus": "opus", "audio/x-flac": "flac"}

INDEX = """\
bark-worker {version}: text to speech with Bark

  curl -s {url}/synthesize -H 'Content-Type: application/json' \\
       -H 'Accept: audio/wav' -d '{{"text": "Good evening, and welcome."}}' -o hello.wav

GET  /health      what the worker is doing
GET  /ready       200 when it can speak, else 503
GET  /metrics     numbers for Prometheus
GET  /voices      the voices a request may name; /voices/ID/sample is one to hear
POST /synthesize  {{"text": ..., "voice": ..., "seed": ...}}; only text is required

and OpenAI's, for a client whose base URL is {url}/v1

POST /v1/audio/speech  GET /v1/audio/voices  GET /v1/audio/models  GET /v1/models/NAME
"""


def parse_json(body: bytes) -> dict[str, Any]:
    """The request's JSON object. Raises InvalidRequest, which tells where, never what is there."""
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        payload = json.loads(body.decode("utf-8-sig"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} is 0x"
                             f"{body[error.start]:02x}", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg} at line {error.lineno} column"
                             f" {error.colno}", code="invalid_json") from None
    except ValueError as error:  # NaN, Infinity, or a number of thousands of digits
        raise InvalidRequest(f"the body is not JSON: {first_line(error)[:80]}",
                             code="invalid_json") from None
    if not isinstance(payload, dict):
        raise InvalidRequest(f"the body is {json_type(payload)}; it must be an object such"
                             ' as {"text": "Hello"}', code="invalid_json")
    return payload


def json_type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false",
             type(None): "null"}
    return names.get(type(value), "a number")


def check_text(payload: Mapping[str, Any], field: str, limit: int, limited_by: str) -> str:
    """The text to speak. Raises InvalidRequest with what is wrong, where, and what is allowed."""
    def wrong(message: str, code: str) -> InvalidRequest:
        return InvalidRequest(message, param=field, code=code)

    if payload.get(field) is None:
        raise wrong(f'{field} is missing; send {{"{field}": "Hello, world!"}}', "missing_text")
    text = payload[field]
    if not isinstance(text, str):
        raise wrong(f"{field} is {json_type(text)}; it must be a string", "invalid_type")
    if not text.strip():
        raise wrong(f"{field} is empty; at least one word is needed", "empty_text")
    if len(text) > limit:
        raise wrong(f"{field} has {len(text)} characters; at most {limit} are allowed"
                    f" ({limited_by})", "text_too_long")
    if match := re.search("[\0\ud800-\udfff]", text):
        name = "a NUL character" if match[0] == "\0" else "half of a surrogate pair"
        raise wrong(f"{field} has {name} at position {match.start()}; remove it", "invalid_text")
    return text


def given(payload: Mapping[str, Any], field: str) -> Any:
    """The field's value; None also for an empty string, which many clients send for nothing."""
    value = payload.get(field)
    return None if isinstance(value, str) and not value.strip() else value


def wrong_type(field: str, value: object, wanted: str) -> InvalidRequest:
    return InvalidRequest(f"{field} is {json_type(value)}; it must be {wanted}", param=field,
                          code="invalid_type")


def check_voice(payload: Mapping[str, Any]) -> str | None:
    """The voice's name; OpenAI's {"id": name} is one too."""
    voice = given(payload, "voice")
    if isinstance(voice, dict):
        voice = voice.get("id")
    elif voice is None:
        return None
    if not isinstance(voice, str):
        raise wrong_type("voice", payload["voice"], "a string")
    return voice


def check_choice(payload: Mapping[str, Any], field: str, allowed: Iterable[str]) -> str | None:
    """One of the allowed names, also with blanks around it and in other letters."""
    value = given(payload, field)
    name = value.strip().lower() if isinstance(value, str) else value
    if name is None or (isinstance(name, str) and name in allowed):
        return name
    raise InvalidRequest(f"{field} is {shown(value)}; allowed are {', '.join(allowed)}",
                         param=field, code="invalid_value")


def check_flag(payload: Mapping[str, Any], field: str, default: bool) -> bool:
    value = given(payload, field)
    if value is not None and not isinstance(value, bool):
        raise wrong_type(field, value, "true or false")
    return default if value is None else value


def check_number(payload: Mapping[str, Any], field: str, low: float,
                 high: float) -> float | None:
    value = given(payload, field)
    if value is None:
        return None
    if json_type(value) != "a number":
        raise wrong_type(field, value, "a number")
    if not low <= value <= high:
        raise InvalidRequest(f"{field} is {shown(value)}; allowed are {low:g} to {high:g}",
                             param=field, code="invalid_value")
    return float(value)


def check_seed(payload: Mapping[str, Any], field: str = "seed", name: str = "seed") -> int | None:
    """The seed in a field, which errors call `name`."""
    seed = given(payload, field)
    if seed is None:
        return None
    if type(seed) is not int:
        raise wrong_type(name, seed, "a whole number")
    if not RANDOM_SEED <= seed <= MAX_SEED:
        raise InvalidRequest(f"{name} is {shown(seed)}; allowed are 0 to {MAX_SEED}, and"
                             f" {RANDOM_SEED} to draw one", param=name, code="invalid_seed")
    return seed


def check_seeds(payload: Mapping[str, Any]) -> dict[int, int]:
    """Seeds of single segments, by index; whether those exist shows when the text is planned."""
    seeds, example = given(payload, "seeds"), 'such as {"3": 4711}'
    if seeds is None:
        return {}
    if not isinstance(seeds, dict):
        raise wrong_type("seeds", seeds, f"an object {example}")
    for index in seeds:
        if not re.fullmatch("0|[1-9][0-9]{0,8}", index):
            raise InvalidRequest(f"seeds has {shown(index)}; allowed are indices of segments,"
                                 f" {example}", param="seeds", code="invalid_value")
    found = {int(index): check_seed(seeds, index, f"seeds.{index}") for index in seeds}
    return {index: seed for index, seed in found.items() if seed is not None}


def accepted(accept: str) -> Iterator[tuple[str, float]]:
    """The kinds that an Accept header names, each with its weight, 0 to 1."""
    for part in accept.lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        yield kind, float(quality) if re.fullmatch(r"[01](\.[0-9]{0,3})?", quality) else 1.0


def accepted_format(accept: str, form: str | None) -> str | None:
    """The format that an Accept header wants sent as it is, unless it likes JSON better.

    `form` is the one that the request itself names, which then any kind of audio asks for.
    """
    found, best, json_best = None, 0.0, 0.0
    for kind, weight in accepted(accept):
        if kind in MEDIA_TYPES or kind == "audio/*":
            if weight > best:
                found, best = form or MEDIA_TYPES.get(kind, "wav"), weight
        elif kind in ("application/json", "application/*", "*/*"):
            json_best = max(json_best, weight)
    return found if best >= json_best else None


class Page(NamedTuple):
    """The page for browsers, and the headers that hold it to what stands in it."""

    body: bytes
    headers: dict[str, str]


def read_page(path: Path) -> Page | None:
    """None, and a line in the log, where there is none that can be read."""
    try:
        text = path.read_text(encoding="utf-8")  # line ends as a browser counts them for a hash
    except (OSError, UnicodeDecodeError) as error:
        log.info("%s cannot be read (%s): GET / gives a browser the short text, too", path.name,
                 getattr(error, "strerror", None) or "it is not UTF-8")
        return None
    allowed = {"default-src": "'none'", "script-src": hashes(text, "script"),
               "style-src": hashes(text, "style"), "connect-src": "'self'", "media-src": "blob:",
               "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
               "frame-ancestors": "'none'"}
    body = text.encode()
    return Page(body, {
        "Content-Security-Policy": "; ".join(f"{what} {who}" for what, who in allowed.items()),
        "Cache-Control": "no-cache", "ETag": tag_of(body),
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"})


def tag_of(body: bytes) -> str:
    """A strong ETag."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def hashes(page: str, element: str) -> str:
    """What stands in these elements of a page, as sources of a Content-Security-Policy."""
    found = re.findall(rf"<{element}>(.*?)</{element}>", page, re.S)
    digests = [base64_text(hashlib.sha256(each.encode()).digest()) for each in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


def wants_page(accept: str) -> bool:
    """Whether a client asks for HTML by name, as browsers do, and likes plain text no better."""
    weights = dict(accepted(accept))
    return 0 < weights.get("text/html", 0) >= weights.get("text/plain", 0)


class Part(NamedTuple):
    """A segment as it is sent: int16 samples, the silence after them, and what is told of it."""

    samples: np.ndarray
    silence: np.ndarray
    place: dict[str, Any]

    @property
    def audio(self) -> np.ndarray:
        return np.concatenate([self.samples, self.silence])


def lay_out(speech: Speech, takes: Iterable[Take], rate: int, speed: float,
            words: bool = False) -> Iterator[Part]:
    """Each segment's audio as it comes, and where it stands in the text and in the whole.

    With `words`, where each word stands too.
    """
    position = 0
    left = speech.warnings or [()] * len(speech.spans)
    for index, (span, spoken, told, take) in enumerate(
            zip(speech.spans, speech.spoken, left, takes, strict=True)):
        samples = stretch(take.samples, rate, speed)
        silence = np.zeros(round(span.pause / speed * rate), np.int16)
        start, end = position / rate, (position + len(samples)) / rate
        text = speech.text[span.start : span.end]
        timed = told_times(text, spoken, take, speech.rate, span, start, end) if words else {}
        yield Part(samples, silence, {
            "text": text, "spoken": spoken,
            "from": span.start, "to": span.end, "start": round(start, 4), "end": round(end, 4),
            "seed": speech.seeds.get(index, speech.seed), "takes": take.takes,
            "warnings": [*told, *take.warnings], **told_words(take), **timed})
        position += len(samples) + len(silence)


def told_words(take: Take) -> dict[str, Any]:
    """What a listener heard, where there is one."""
    heard = take.hearing.heard
    return {"heard": heard.text, "word_errors": round(heard.word_errors, 3)} if heard else {}


def told_times(text: str, spoken: str, take: Take, rate: int, span: Span, start: float,
               end: float) -> dict[str, Any]:
    """When each word is heard in the whole, in which the take, of `rate`, is from start to end."""
    seconds = len(take.samples) / rate
    times, timing = word_times(text, spoken, take.hearing, seconds)
    pace = (end - start) / max(seconds, 1 / rate)  # less than 1 where speed is more
    return {"timing": timing, "words": [
        {"from": span.start + word.start, "to": span.start + word.end,
         "start": round(start + pace * word.begins, 4), "end": round(start + pace * word.ends, 4)}
        for word in times]}


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@dataclass
class Delivery:
    """A speech on its way to a client, and the form in which that wants it."""

    speech: Speech
    request: Request
    form: str
    rate: int
    speed: float
    silence: float = 0.0  # seconds, in place of speech
    words: bool = False   # tell when each is heard
    length: int = 0  # samples so far
    first: float = 0.0  # when the first segment was there; 0 before

    def parts(self) -> Iterator[Part]:
        if self.silence:
            self.length = round(self.silence * self.rate)
            yield Part(np.zeros(self.length, np.int16), np.empty(0, np.int16), {})
        for part in lay_out(self.speech, self.request.results(), self.rate, self.speed, self.words):
            self.first = self.first or time.monotonic()
            self.length += len(part.samples) + len(part.silence)
            yield part

    @property
    def duration(self) -> float:
        return round(self.length / self.rate, 4)

    def facts(self, asked: float) -> dict[str, Any]:
        """What the log tells of it: counts, and seconds since it was asked for."""
        first = {"first_s": round(self.first - asked, 3)} if self.first else {}
        return {"segments": len(self.speech.segments), "takes": self.request.takes,
                "audio_s": round(self.duration, 2), "wait_s": round(self.request.wait, 3), **first,
                "compute_s": round(self.request.compute, 3), "seed": self.speech.seed}

    def whole(self) -> tuple[bytes, list[dict[str, Any]]]:
        """All of the audio, and the segments' places in it."""
        parts = list(self.parts())
        audio = np.concatenate([part.audio for part in parts])
        return encode(audio, self.rate, self.form), [part.place for part in parts]

    def stream(self) -> Iterator[bytes]:
        """The audio as one stream, piece by piece if the format can grow."""
        if self.form in WHOLE_FORMATS:
            yield self.whole()[0]
            return
        with contextlib.closing(Encoder(self.form, self.rate)) as encoder:  # clients may leave
            for part in self.parts():
                yield encoder.feed(part.audio)
            yield encoder.finish()

    def lines(self) -> Iterator[bytes]:
        """A line of JSON for each segment, its audio a file of its own; the error, if one comes."""
        try:
            for index, part in enumerate(self.parts()):
                yield json_line({"index": index, **part.place, "audio": base64_text(
                    encode(part.samples, self.rate, self.form))})
        except WorkerError as error:
            if self.length:  # else it can still be the answer
                yield json_line(error_body(error))
            raise

    def events(self, tokens_per_second: float) -> Iterator[bytes]:
        """OpenAI's server-sent events."""
        for data in self.stream():
            if data:
                yield event({"type": "speech.audio.delta", "audio": base64_text(data)})
        heard = sum(len(segment.text_ids) for segment in self.speech.segments)
        spoken = round(self.duration * tokens_per_second)
        yield event({"type": "speech.audio.done", "usage": {
            "input_tokens": heard, "output_tokens": spoken, "total_tokens": heard + spoken}})


def json_line(payload: Mapping[str, Any]) -> bytes:
    return json.dumps(payload).encode() + b"\n"


def event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + json_line(payload) + b"\n"


class WorkerServer(HttpServer):
    """What the endpoints speak for."""

    def __init__(self, config: Config, state: State, scheduler: Scheduler, guard: Guard,
                 metrics: Metrics, connections: int):
        self.state, self.scheduler, self.guard = state, scheduler, guard
        self.started, self.created = time.monotonic(), int(time.time())
        self.page = read_page(PAGE)
        self.samples = Samples(scheduler, own_folder() / "samples", (
            config.deterministic,
            config.quality and (config.retries, config.listen, config.word_errors)))
        super().__init__(config, RequestHandler, connections, metrics)


class RequestHandler(HttpHandler):
    """The endpoints: a method for each, and its row in ROUTES."""

    server: WorkerServer

    def get_index(self) -> None:
        page, vary = self.server.page, {"Vary": "Accept, Origin"}
        if not page or not wants_page(self.headers.get("Accept", "")):
            url = self.server.url.replace("0.0.0.0", "127.0.0.1")
            text = INDEX.format(version=VERSION, url=url)
            self.send_body(HTTPStatus.OK, "text/plain; charset=utf-8", text.encode(), vary)
        else:
            self.send_kept("text/html; charset=utf-8", page.body, page.headers | vary)

    def get_health(self) -> None:
        self.send_json(self.health())

    def get_metrics(self) -> None:
        if self.server.config.metrics != "open":
            self.check_key()
        page, kind = self.server.metrics.page(self.headers.get("Accept", ""), self.health())
        self.send_body(HTTPStatus.OK, kind, page)

    def health(self) -> dict[str, Any]:
        state, config, scheduler = self.server.state, self.server.config, self.server.scheduler
        body = {"status": state.status, "ready": state.status == "ready", "model": "Bark",
                **state.details, "max_text_length": config.max_text_length, "version": VERSION,
                "uptime": round(time.monotonic() - self.server.started, 1),
                "slots": scheduler.slots, "live": scheduler.live, "queue": scheduler.stats(),
                "guard": self.server.guard.facts()}
        if config.quality:
            body |= scheduler.tally.told()
            for ear in ("detector", "listener"):
                body[ear] = without_folders(getattr(scheduler.judge, ear))
        if memory := scheduler.memory:
            body["gpu_memory"] = memory
        if config.voices_dir and not self.has_key():
            body["voice"] = (state.narrator.voices.told(body["voice"], own=False)
                             if state.narrator else "default")
        if progress := state.progress:
            body["progress"] = progress()
        if state.error:
            body.update(error=state.reason, exit_status=state.error.exit_status)
        return body

    def get_ready(self) -> None:
        state = self.server.state
        if state.status != "ready":
            raise not_ready(state)
        self.send_json({"ready": True})

    def get_voices(self) -> None:
        voices, own = self.narrator().voices, self.has_key()
        body = {"voices": voices.listed(own), "default": voices.told(voices.default, own)}
        if own and self.server.config.voices_dir:
            body["refused"] = [{"file": file, "reason": reason}
                               for file, reason in voices.folder.look().refused.items()]
        self.send_json(body)

    def get_sample(self) -> None:
        """A voice's own line. HEAD never has it made: of one that is not, it tells the kind alone.
        """
        name, _, what = self.below.rpartition("/")
        if what != "sample":
            raise self.unknown_path(SAMPLES_PATH + self.below)
        narrator, samples = self.narrator(), self.server.samples
        try:
            key, speech = samples.plan(narrator, unquote(name))
        except InvalidRequest as error:
            raise HttpError(HTTPStatus.NOT_FOUND, error.code, str(error)) from None
        audio, kind = samples.files.get(key), FORMATS[SAMPLE_FORMAT].mime
        if not audio and self.command == "HEAD":
            self.send_head(HTTPStatus.OK, {"Content-Type": kind, "Accept-Ranges": "bytes"})
            return
        if not audio:
            with self.server.guard.work():
                audio = samples.make(key, speech, self.began + self.server.config.timeout,
                                     lambda: has_left(self.connection))
        is_own = speech.voice not in narrator.facts.voices
        self.send_kept(kind, audio, {"ETag": tag_of(audio), "Cache-Control": (
            "private, no-cache" if is_own else "private, max-age=3600")})  # own ones may change

    def narrator(self) -> Narrator:
        if self.server.state.narrator is None:
            raise not_ready(self.server.state)
        return self.server.state.narrator

    def get_models(self) -> None:
        models = [self.model(name) for name in self.models()]
        listed = "models" if self.known_path.startswith("/v1/audio/") else "data"
        self.send_json({"object": "list", listed: models})

    def get_model(self) -> None:
        name = unquote(self.below)
        if name not in self.models():
            raise HttpError(HTTPStatus.NOT_FOUND, "model_not_found", f"there is no model"
                            f" {shown(name)}; there are {', '.join(self.models())}, which are one")
        voices = [{"name": voice["name"], "language": voice["language"]}
                  for voice in self.narrator().voices.listed_for_openai(self.has_key())]
        self.send_json({**self.model(name), "voices": voices})

    def models(self) -> list[str]:
        return [self.server.state.details["model_id"], *MODEL_NAMES]

    def model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.server.created,
                "owned_by": "bark-worker"}

    def get_audio_voices(self) -> None:
        own = self.has_key()
        self.send_json({"voices": self.narrator().voices.listed_for_openai(own)})

    def post_synthesize(self) -> None:
        payload = parse_json(self.read_body())
        limit = self.server.config.max_text_length
        text = check_text(payload, "text", limit, "TTS_MAX_LENGTH")
        form = check_choice(payload, "format", FORMATS)
        wanted = accepted_format(self.headers.get("Accept", ""), form)
        stream, words = (check_flag(payload, name, False) for name in ("stream", "words"))
        voice = check_voice(payload)
        with self.delivery(payload, "text", text, voice, wanted or form or "wav",
                           seeds=check_seeds(payload)) as delivery:
            delivery.words = words
            if wanted:
                self.send_audio(delivery, stream)
            elif stream:
                self.send_lines(delivery)
            else:
                self.send_speech(delivery)

    def post_speech(self) -> None:
        """OpenAI's POST /v1/audio/speech, whatever its `model` and `instructions`."""
        payload = parse_json(self.read_body())
        text = check_text(payload, "input", MAX_INPUT, "as OpenAI has it")
        form = check_choice(payload, "response_format", FORMATS) or "mp3"
        events = check_choice(payload, "stream_format", ("audio", "sse")) == "sse"
        stream = check_flag(payload, "stream", True)
        voice, narrator = check_voice(payload), self.narrator()
        if voice is not None:
            voices = narrator.voices
            voice, _ = voices.find(voice, voices.openais(), "/v1/audio/voices")
        with self.delivery(payload, "input", text, voice, form, SILENCE_SECONDS) as delivery:
            if events:
                rate = narrator.facts.semantic.semantic_rate_hz
                self.send_chunks("text/event-stream", delivery.events(rate), {})
            else:
                self.send_audio(delivery, stream)

    @contextlib.contextmanager
    def delivery(self, payload: Mapping[str, Any], field: str, text: str, voice: str | None,
                 form: str, silence: float = 0.0,
                 seeds: Mapping[int, int] = MappingProxyType({})) -> Iterator[Delivery]:
        """Has the text spoken while the answer is sent; what is then left of it is dropped.

        Where nothing is to be spoken, that is so many seconds of `silence`, or an error.
        """
        speed, seed = check_number(payload, "speed", 0.25, 4), check_seed(payload)
        manner = Manner(check_flag(payload, "expressive", True) and self.server.config.expression,
                        check_number(payload, "temperature", 0, 2),
                        check_number(payload, "min_eos_p", 0.001, 1))
        narrator = self.narrator()
        try:
            speech = narrator.plan(text, voice, seed, manner, seeds)
        except NothingToSpeak as error:
            error.param = field
            if not silence:
                raise
            yield self.silent_delivery(text, voice, seed, form, silence)
            return
        deadline = self.began + self.server.config.timeout
        request = Request(speech, deadline, lambda: has_left(self.connection))
        with self.server.guard.work():
            self.server.scheduler.submit(request)
            delivery = Delivery(speech, request, form, speech.rate, speed or 1.0)
            try:
                yield delivery
            finally:
                request.abandon()
                self.notes |= delivery.facts(self.began)
                if delivery.first:
                    self.server.metrics.sounded(delivery.first - self.began)

    def silent_delivery(self, text: str, voice: str | None, seed: int | None, form: str,
                        silence: float) -> Delivery:
        narrator = self.narrator()
        speech = Speech(text, voice or narrator.voices.default, max(0, seed or 0), [], [], [],
                        narrator.facts.sample_rate)
        request = Request(speech, math.inf, lambda: False)
        return Delivery(speech, request, form, speech.rate, 1.0, silence)

    def send_audio(self, delivery: Delivery, stream: bool) -> None:
        """The audio as it is, in chunks if that brings it earlier and the format bears it."""
        kind, seed = FORMATS[delivery.form].mime, {"X-Bark-Seed": str(delivery.speech.seed)}
        next(delivery.request.results(), None)  # raises, or there is something to send
        can_grow = delivery.form not in WHOLE_FORMATS and self.has_chunks()
        if stream and can_grow and not delivery.request.is_done():
            self.send_chunks(kind, delivery.stream(), seed)
            return
        body, _ = delivery.whole()
        self.send_body(HTTPStatus.OK, kind, body,
                       seed | {"X-Bark-Duration": str(delivery.duration)})

    def send_speech(self, delivery: Delivery) -> None:
        body, segments = delivery.whole()
        self.send_json({"audio": base64_text(body), **self.totals(delivery), "segments": segments})

    def send_lines(self, delivery: Delivery) -> None:
        def lines() -> Iterator[bytes]:
            yield from delivery.lines()
            count = len(delivery.speech.segments)
            yield json_line({**self.totals(delivery), "segments": count})
        self.send_chunks("application/x-ndjson", lines(), {})

    def totals(self, delivery: Delivery) -> dict[str, Any]:
        return {"format": delivery.form, "sample_rate": delivery.rate,
                "duration": delivery.duration,
                "synthesis_time": round(time.monotonic() - self.began, 3), "status": "success",
                "voice": delivery.speech.voice, "seed": delivery.speech.seed}


ROUTES = {
    "/": Route("GET", RequestHandler.get_index, is_open=True, is_probe=True),
    "/health": Route("GET", RequestHandler.get_health, is_open=True, is_probe=True),
    "/ready": Route("GET", RequestHandler.get_ready, is_open=True, is_probe=True),
    "/metrics": Route("GET", RequestHandler.get_metrics, is_open=True, is_probe=True),
    "/voices": Route("GET", RequestHandler.get_voices, is_open=True),
    SAMPLES_PATH: Route("GET", RequestHandler.get_sample),  # and all below it
    "/synthesize": Route("POST", RequestHandler.post_synthesize),
    "/v1/audio/speech": Route("POST", RequestHandler.post_speech),
    "/v1/audio/voices": Route("GET", RequestHandler.get_audio_voices, is_open=True),
    "/v1/audio/models": Route("GET", RequestHandler.get_models, is_open=True),
    "/v1/models": Route("GET", RequestHandler.get_models, is_open=True),
    MODELS_PATH: Route("GET", RequestHandler.get_model, is_open=True),  # and all below it
}
RequestHandler.routes = ROUTES


# -----------------------------------------------------------------------------
# Main: the wiring
#
# Everything is made here and handed to those who need it; nobody fetches anything by himself. The
# model loads in the scheduler's thread while HTTP already answers, so that /health tells how far it
# is.

FAILED_SECONDS = 60.0  # that a failed worker stays up, so that a person can still ask why
PROGRESS_SECONDS = 5.0  # between two log lines about a download
POLL_SECONDS = 0.1
FIXED_SLOTS = 4  # with BARK_DETERMINISTIC: the same whatever memory happens to be free
SPARE_FILES = 128  # open files that are no connections: weights, libraries, logs
BUILTIN_VOICE = Path(__file__).resolve().parent / "builtin-voice"


def cpu_notice(config: Config, device: torch.device, model_id: str, builtin: str) -> str:
    """What to know where no GPU speaks, and how to choose on purpose; empty on a GPU.

    `builtin` is what the built-in voice is called.
    """
    if device.type == "cuda":
        return ""
    cause = f"BARK_DEVICE is {config.device}" if config.device else "no GPU"
    if torch.version.cuda and not config.device:
        cause += (f" that torch {torch.__version__} can use (if there is one, its driver is too old"
                  f" for CUDA {torch.version.cuda}, or the container lacks --gpus all)")
    tiny = f", {builtin} (tiny, real time)" if BUILTIN_VOICE.is_dir() else ""
    return (f"{cause}: {model_id} on the CPU; BARK_MODEL chooses: suno/bark-small (several times"
            f" slower than speech){tiny} or another")


def public_name(model_id: str) -> str:
    """A hub id as it is; of a folder its name alone, as paths of the machine concern nobody."""
    path = Path(model_id).expanduser()
    is_hub_id = re.fullmatch(HUB_ID, model_id) and not path.is_dir()
    return model_id if is_hub_id else path.resolve().name or "local"


def load_engine(config: Config, state: State, judge: Judge, model_id: str,
                device: torch.device) -> Engine:
    """Finds, reads and warms up the model, telling `state` how far it is. Raises WorkerError."""
    def check_voices(names: Iterable[str]) -> None:
        voice, _ = VOICE_ALIASES.get(config.voice, (config.voice, ""))
        if voice not in (known := list(names)) and not has_preset(config.voices_dir, voice):
            few = f"; this model has {', '.join(known)}" if len(known) < 10 else ""
            own = (f"; BARK_VOICES_DIR has no {shown(f'{voice}.npz')}"
                   if config.voices_dir and "/" not in voice else "")
            raise ConfigError(f"BARK_VOICE: {unknown_voice(voice, known)}{few}{own}")

    def on_download(total: int, blobs: Path) -> None:
        state.progress = lambda: {"bytes_done": min(total, folder_bytes(blobs)),
                                  "bytes_total": total}
        state.enter("downloading")

    folder = find_model(model_id, check_voices, on_download)
    if config.quality and config.listen:
        prepare_listener(judge, config.listen, on_download)
    state.enter("loading")
    facts = ModelFacts(folder)
    check_voices(facts.voices)
    try:
        narrator = Narrator(facts, config.voice, config.quality, config.voices_dir)
    except InvalidRequest:  # /health tells this to all, and so no names
        raise ConfigError("BARK_VOICE is a preset of BARK_VOICES_DIR that is refused; the log says"
                          " why") from None
    narrator.voices.folder.look()  # for the log's sake
    dtype = config.dtype or best_dtype(device, facts.hidden_size)
    state.enter("loading", dtype=dtype)
    try:
        model = load_weights(folder, device, DTYPES[dtype], own_folder())
        engine = build_engine(config, facts, model)
        log.info("%d segments at once in %s", engine.slots, dtype)
        state.enter("warming", sample_rate=facts.sample_rate, voice=narrator.voices.default)
        warm_up(engine, narrator)
        if config.quality:
            judge.prepare()
            judge.wait_awake()
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{device} has too little memory for {model_id}: {first_line(error)};"
                         " lower BARK_MAX_BATCH or use suno/bark-small") from error
    gc.collect()
    gc.freeze()  # libraries and model stay: else a long text's planning is half looking at them
    state.narrator = narrator
    return engine


def has_preset(folder: str | None, voice: str) -> bool:
    """Whether there is a file of that name, good or not, as that shows when the model is known."""
    try:
        files = os.listdir(Path(folder).expanduser()) if folder else []
    except OSError:
        return False
    known = {unicodedata.normalize("NFC", file): file for file in files}
    return look_up(f"{voice.strip()}.npz", known) is not None


def prepare_listener(judge: Judge, name: str, on_download: Callable[[int, Path], None]) -> None:
    """What is missing for it costs the words, never the speech."""
    try:
        judge.listen(find_listener(name, on_download))
    except WorkerError as error:
        judge.do_without_words(error)


def build_engine(config: Config, facts: ModelFacts, model: BarkModel) -> Engine:
    if model.device.type == "cuda":
        torch.backends.cudnn.deterministic = config.deterministic
    elif facts.hidden_size < SMALL_HIDDEN_SIZE:
        torch.set_num_threads(1)
    slots = config.max_batch or slots_for(model)
    if config.deterministic and not config.max_batch:
        slots = min(slots, FIXED_SLOTS)
    return Engine(model, facts, slots, fixed_shape=config.deterministic)


def warm_up(engine: Engine, narrator: Narrator) -> None:
    """Speaks a third of a second, so that the first request finds every kernel loaded."""
    segment = narrator.plan("Hello.", None, 0).segments[0]
    engine.add(replace(segment, max_new_tokens=16))
    finished: list[Finished] = []
    while not finished:
        finished = engine.step()
    if finished[0].samples is None:
        raise ModelError(f"the model gives no usable audio: {finished[0].error}; try another"
                         " BARK_DTYPE")


def allowed_connections() -> int:
    """MAX_CONNECTIONS, or fewer where the system's limit of open files is too low for them."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_CONNECTIONS + SPARE_FILES if hard == resource.RLIM_INFINITY else min(
        MAX_CONNECTIONS + SPARE_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(1, limit - SPARE_FILES)


class Signals:
    """Keeps the first SIGTERM or SIGINT in `received`; a second one kills as usual.

    The handler takes no lock: the main thread, which it interrupts, might hold it.
    """

    def __init__(self) -> None:
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = number
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)


def serve(config: Config, warnings: list[str]) -> int:
    """Runs until a signal or a failure; the exit status. `warnings` are logged early."""
    try:
        device = resolve_device(config)
    except ConfigError as error:
        log.error("%s", error)
        return error.exit_status
    model_id = config.model or default_model(device)
    notice = cpu_notice(config, device, model_id, str(BUILTIN_VOICE))
    if notice:  # before all else, as a person who paid for a GPU must not miss it
        log.warning("%s", notice)
    for warning in warnings:
        log.warning("%s", warning)
    state = State(model_id=public_name(model_id), device=str(device), dtype=config.dtype,
                  cuda_available=torch.cuda.is_available(), voice=config.voice, sample_rate=None,
                  **({"notice": cpu_notice(config, device, public_name(model_id),
                                           BUILTIN_VOICE.name)} if notice else {}))
    judge = Judge(config.word_errors)
    scheduler = Scheduler(lambda state: load_engine(config, state, judge, model_id, device), state,
                          config.max_queue, SegmentCache(config.cache_mb * 1_000_000),
                          config.retries, judge, Metrics())
    log.info("model=%s device=%s", model_id, device)
    guard = build_guard(config, lasting_folders())
    try:
        server = open_server(config, state, scheduler, guard)
    except ConfigError as error:
        log.error("%s", error)
        return error.exit_status
    signals = Signals()
    state.on_change = lambda status: guard.ready() if status == "ready" else None
    guard.start()
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    log.info("listening on %s", server.url)
    scheduler.start()
    wait_for_end(state, signals)
    return shut_down(server, scheduler, state, signals)


def open_server(config: Config, state: State, scheduler: Scheduler,
                guard: Guard) -> WorkerServer:
    """Listens where `config` says. Raises ConfigError."""
    try:
        return WorkerServer(config, state, scheduler, guard, scheduler.metrics,
                            allowed_connections())
    except (OSError, TypeError) as error:  # TypeError: HOST is no host name
        busy = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        advice = ("choose another PORT or end what uses it" if busy else
                  "HOST must be an address of this machine, PORT one that this user may take")
        raise ConfigError(f"cannot listen on HOST {config.host}, PORT {config.port}:"
                          f" {getattr(error, 'strerror', None) or error}; {advice}") from error


def lasting_folders() -> list[Path]:
    """What outlasts a restart: the folder beside the models, and one for whom that is closed to."""
    temporary = "/tmp"
    with contextlib.suppress(OSError):  # of a disk that is full
        temporary = tempfile.gettempdir()
    return [own_folder(), Path(temporary)]


def wait_for_end(state: State, signals: Signals) -> None:
    """Returns after a signal, or FAILED_SECONDS after a failure."""
    told, failed_at = 0.0, math.inf
    while not signals.received and time.monotonic() < failed_at + FAILED_SECONDS:
        if state.error and failed_at == math.inf:
            failed_at = time.monotonic()
            log.info("staying up for %d s to tell why on /health", FAILED_SECONDS)
        if (progress := state.progress) and time.monotonic() > told + PROGRESS_SECONDS:
            told = time.monotonic()
            log.info("downloading %.1f of %.1f MB", *(n / 1e6 for n in progress().values()))
        time.sleep(POLL_SECONDS)


def shut_down(server: WorkerServer, scheduler: Scheduler, state: State,
              signals: Signals) -> int:
    deadline = time.monotonic() + DRAIN_SECONDS
    server.guard.close()
    scheduler.drain(DRAIN_SECONDS - 1.5)  # the rest is for the last answers on their way out
    server.connections.wait_idle(deadline - 0.5 - time.monotonic())
    server.shutdown()
    server.server_close()
    if state.error:
        return state.error.exit_status
    return 0 if signals.received == signal.SIGTERM else 128 + signals.received


def main(arguments: list[str] | None = None) -> int:
    config = read_settings(sys.argv[1:] if arguments is None else arguments)
    open_log(config.log_format)
    for noisy in map(logging.getLogger, ("httpx", "httpx2", "huggingface_hub", "transformers")):
        noisy.setLevel(logging.ERROR)
        noisy.handlers.clear()  # what they say goes through ours alone
        noisy.propagate = True
    return serve(config, warnings_about(config, os.environ))


if __name__ == "__main__":
    exit_status = main()
    logging.shutdown()
    os._exit(exit_status)  # an interpreter's orderly end may crash under a thread inside torch
