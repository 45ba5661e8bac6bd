"""The layers of the worker and of pyworker.py, held apart by reading their source: who may name
what, and in which order."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pytest
from conftest import PYWORKER, ROOT, WORKER

PYWORKER_SECTIONS = ("Settings", "Worker", "PyWorker", "Main")
ENGINE = ("Sampling", "Decoding", "Stages", "Engine")
TENSORS = {"torch", "F", "BarkModel", "AutoTokenizer", "transformers", "cuda"}
WORLD = {
    "threads": {"threading", "Thread", "Lock", "Condition", "Future"},
    "signals": {"signal"},
    "net": {"HTTPStatus", "BaseHTTPRequestHandler", "ThreadingHTTPServer", "RequestHandler",
            "wfile", "rfile", "http", "socket", "socketserver"},
    "prometheus": {"prometheus", "prometheus_client", "openmetrics"},
}
ENGINE_ONLY = {"json", "Config"}  # what Model and the engine may name only in these functions:
EXCEPTIONS = {("read_json", "json"), ("looks_whole", "json"), ("resolve_device", "Config")}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "expandvars"}
IMPORTED_IN = {"numpy": "Audio", "torch": "Model", "transformers": "Model",
               "prometheus_client": "Metrics"}
ALLOWED_PACKAGES = sys.stdlib_module_names | {*IMPORTED_IN, "listener"}  # that for its types
MAX_FUNCTION_LINES, MAX_CLASS_LINES, MAX_COLUMNS = 60, 250, 100

Function = ast.FunctionDef | ast.AsyncFunctionDef
SOURCE, PYWORKER_SOURCE = (path.read_text(encoding="utf-8") for path in (WORKER, PYWORKER))


class Row(NamedTuple):
    """A section as the map at the head of the file has it."""

    title: str
    owns: str
    touches: set[str]
    watched_by: str


def map_rows(source: str) -> list[Row]:
    row = r"^  ([A-Z]\w+) {2,}(\S.*?) {2,}(\S.*?) {2,}(test_\w+)$"
    return [Row(title, owns, set(touches.split(", ")), test)
            for title, owns, touches, test in re.findall(row, source, re.MULTILINE)]


MAP = map_rows(SOURCE)
SECTIONS = tuple(row.title for row in MAP)


def may_touch(what: str) -> set[str]:
    return {row.title for row in MAP if row.touches & {what, "all"}}


@functools.lru_cache(maxsize=4)
def parse(source: str) -> ast.Module:
    return ast.parse(source)


def section_starts(source: str) -> dict[str, int]:
    """Title to line, of every `# Title: ...` between or below a rule of dashes."""
    found = re.finditer(r"^# -{40,}\n# (\w+):", source, re.MULTILINE)
    return {match[1]: source.count("\n", 0, match.start()) + 1 for match in found}


def definitions(source: str) -> Iterator[tuple[str, ast.stmt]]:
    """Each top-level statement below the imports with the title of its section."""
    starts = section_starts(source)
    for node in parse(source).body:
        titles = [title for title, line in starts.items() if line < node.lineno]
        if titles:
            yield titles[-1], node


def units(node: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    """A class as its methods and the rest of its body, anything else whole; each with a name."""
    if not isinstance(node, ast.ClassDef):
        yield getattr(node, "name", f"line {node.lineno}"), node
        return
    for part in (*node.bases, *node.decorator_list):
        yield node.name, part
    for part in node.body:
        yield f"{node.name}.{getattr(part, 'name', f'line {part.lineno}')}", part


def names_in(node: ast.AST) -> set[str]:
    """Every name that is read, written or imported, and every attribute."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            names.add(part.id)
        elif isinstance(part, ast.Attribute):
            names.add(part.attr)
        elif isinstance(part, ast.alias):
            names |= {*part.name.split("."), part.asname or ""}
        elif isinstance(part, ast.ImportFrom):
            names |= set((part.module or "").split("."))
    return names


def free_names(node: ast.AST) -> set[str]:
    """Names that are read in `node` and bound nowhere in it, annotations included."""
    read, bound = set(), set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            (read if isinstance(part.ctx, ast.Load) else bound).add(part.id)
        elif isinstance(part, ast.arg):
            bound.add(part.arg)
        elif isinstance(part, ast.alias):
            bound.add((part.asname or part.name).split(".")[0])
        elif isinstance(part, ast.ExceptHandler) and part.name:
            bound.add(part.name)
    return read - bound


def functions(source: str) -> list[Function]:
    return [node for node in ast.walk(parse(source)) if isinstance(node, Function)]


def wrong_sections(source: str, expected: tuple[str, ...] = SECTIONS) -> list[str]:
    found = tuple(section_starts(source))
    return [] if found == expected else [f"sections are {found}"]


def wrong_sections_of_pyworker(source: str) -> list[str]:
    return wrong_sections(source, PYWORKER_SECTIONS)


def environment_readers(source: str) -> list[str]:
    """Whoever reads the process's environment but `main` and `read_settings`, for Config."""
    wrong = []
    for node in parse(source).body:
        if getattr(node, "name", "") in ("main", "read_settings"):
            continue
        for part in ast.walk(node):
            name = getattr(part, "attr", "") or (isinstance(part, ast.alias) and part.name)
            if name in ENVIRONMENT:
                wrong.append(f"line {part.lineno} uses {name}")
    return wrong


def tensors_out_of_place(source: str) -> list[str]:
    return [f"{title}: {name} uses {used}" for title, node in definitions(source)
            if title not in may_touch("tensors") for name, part in units(node)
            if (used := names_in(part) & TENSORS)]


def world_out_of_place(source: str) -> list[str]:
    """Threads, signals, the net, Prometheus, JSON and settings where the map has none."""
    wrong = []
    for title, node in definitions(source):
        barred = {name for what, names in WORLD.items() if title not in may_touch(what)
                  for name in names}
        for name, part in units(node):
            names = names_in(part)
            used = names & barred
            if title in ("Model", *ENGINE):
                used |= {n for n in names & ENGINE_ONLY if (name, n) not in EXCEPTIONS}
            if used:
                wrong.append(f"{title}: {name} uses {used}")
    return wrong


def defined_names(node: ast.stmt) -> set[str]:
    if isinstance(node, Function | ast.ClassDef):
        return {node.name}
    return {part.id for part in ast.walk(node)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


def names_from_below(source: str) -> list[str]:
    """Uses of a name that a later section defines."""
    order = list(section_starts(source))
    home = {name: order.index(title) for title, node in reversed(list(definitions(source)))
            for name in defined_names(node)}
    return [f"{title}: {name} uses {used} of {order[home[used]]}"
            for title, node in definitions(source) for name, part in units(node)
            for used in sorted(free_names(part) & home.keys()) if home[used] > order.index(title)]


def scheduler_in_the_guard(source: str) -> list[str]:
    """Uses of what the scheduler defines: the guard hears of work, and not of who does it."""
    scheduling = {name for title, node in definitions(source) if title == "Scheduler"
                  for name in defined_names(node)}
    return [f"Guard: {name} uses {used}" for title, node in definitions(source)
            if title == "Guard" for name, part in units(node)
            for used in sorted(free_names(part) & scheduling)]


def packages(nodes: Iterable[ast.AST]) -> list[str]:
    """What these statements import, without what is below the package."""
    modules = []
    for node in nodes:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
    return [name.split(".")[0] for name in modules]


def early_imports(source: str) -> list[str]:
    """Packages that are imported above the section that may first name them."""
    lines = section_starts(source)
    return [f"line {node.lineno} imports {name} above {home}"
            for node in parse(source).body for name in packages([node])
            if (home := IMPORTED_IN.get(name)) and node.lineno < lines[home]]


def foreign_imports(source: str) -> list[str]:
    """Packages at the top level that are not there wherever torch and transformers are."""
    return [name for name in packages(parse(source).body) if name not in ALLOWED_PACKAGES]


def packages_at_the_top(source: str) -> list[str]:
    """Packages of pyworker.py at the top level, as a wrong setting answers at once."""
    return [name for name in packages(parse(source).body) if name not in sys.stdlib_module_names]


def sdk_out_of_place(source: str) -> list[str]:
    """Whatever imports Vast's SDK outside of its section, or anything beside it and its aiohttp."""
    allowed = {"PyWorker": {"vastai", "aiohttp"}, "Main": {"aiohttp"}}
    return [f"{title}: {name}" for title, node in definitions(source)
            for name in packages(ast.walk(node))
            if name not in allowed.get(title, set()) | sys.stdlib_module_names]


def long_functions(source: str) -> list[str]:
    return [f"{node.name} has {lines} lines" for node in functions(source)
            if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES]


def long_classes(source: str) -> list[str]:
    return [f"{node.name} has {lines} lines" for node in ast.walk(parse(source))
            if isinstance(node, ast.ClassDef)
            and (lines := node.end_lineno - node.lineno + 1) > MAX_CLASS_LINES]


def bare_sections(source: str) -> list[str]:
    """Sections that do not open with what to know before their first line."""
    return [title for title in section_starts(source)
            if not re.search(rf"^# {title}: [^\n]+\n#\n# [^\n]+\n", source, re.MULTILINE)]


def long_lines(source: str) -> list[str]:
    return [f"line {number} has {len(line)} columns"
            for number, line in enumerate(source.splitlines(), 1) if len(line) > MAX_COLUMNS]


def bound_twice(source: str) -> list[str]:
    """Names at the top level that a later section takes from an earlier one."""
    seen: Counter[str] = Counter()
    for node in parse(source).body:
        if isinstance(node, ast.Assign):
            seen.update(name.id for target in node.targets for name in ast.walk(target)
                        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store))
        elif isinstance(node, (*Function.__args__, ast.ClassDef)):
            seen[node.name] += 1
    return [name for name, count in seen.items() if count > 1]


def missing_annotations(source: str) -> list[str]:
    """Functions with an argument or a result of unknown type; __init__ has no result."""
    wrong = []
    for node in functions(source):
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs,
                 *filter(None, (node.args.vararg, node.args.kwarg))]
        bare = [arg.arg for arg in every if not arg.annotation and arg.arg not in ("self", "cls")]
        if bare or not (node.returns or node.name == "__init__"):
            wrong.append(f"{node.name}: {', '.join(bare) or 'result'}")
    return wrong


Rule = Callable[[str], list[str]]
COMMON_RULES = (environment_readers, names_from_below, bound_twice, long_functions, long_classes,
                long_lines, missing_annotations)
RULES = (*COMMON_RULES, wrong_sections, tensors_out_of_place, world_out_of_place,
         scheduler_in_the_guard, early_imports, foreign_imports, bare_sections)
PYWORKER_OWN_RULES = (wrong_sections_of_pyworker, packages_at_the_top, sdk_out_of_place)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_worker_keeps_to_its_layers(rule: Rule) -> None:
    assert rule(SOURCE) == []


@pytest.mark.parametrize("row", MAP, ids=lambda row: row.title)
def test_the_test_that_the_map_names_knows_the_section(row: Row) -> None:
    (path,) = (ROOT / "tests").rglob(f"{row.watched_by}.py")
    defined = {name for title, node in definitions(SOURCE) if title == row.title
               for name in defined_names(node)}
    assert defined & set(re.findall(r"\w+", path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("rule", [*COMMON_RULES, *PYWORKER_OWN_RULES],
                         ids=lambda rule: rule.__name__)
def test_pyworker_keeps_to_its_own(rule: Rule) -> None:
    assert rule(PYWORKER_SOURCE) == []


def with_added(source: str, section: str, code: str) -> str:
    """`source` with `code` as the first definition of a section."""
    lines = source.split("\n")
    title = next(n for n, line in enumerate(lines) if line.startswith(f"# {section}:"))
    first = next(n for n in range(title + 1, len(lines)) if lines[n][:1] not in ("#", ""))
    return "\n".join([*lines[:first], code, "", "", *lines[first:]])


BREACHES = [
    (environment_readers, "Engine", "HOME = os.environ['HOME']"),
    (environment_readers, "HTTP", "def bad() -> str | None:\n    return os.getenv('HOME')"),
    (environment_readers, "Configuration", "HOME = os.getenv('HOME')"),
    (environment_readers, "Configuration", "HOME = os.environ.get('HOME')"),
    (environment_readers, "Main", "def bad() -> None:\n    from os import environ as e"),
    (bound_twice, "Main", "CUE_RE = None"), (bound_twice, "HTTP", "def judge() -> None:\n    pass"),
    (tensors_out_of_place, "Text", "def bad(x: torch.Tensor) -> None:\n    pass"),
    (tensors_out_of_place, "Audio", "def bad(x: Any) -> Any:\n    return F.relu(x)"),
    (tensors_out_of_place, "Narrator", "def bad() -> None:\n    import torch as t\n    t.ones(1)"),
    (tensors_out_of_place, "Scheduler", "class Bad:\n    model: BarkModel"),
    (tensors_out_of_place, "HTTP", "def bad() -> None:\n    torch.cuda.synchronize()"),
    (world_out_of_place, "Engine", "def bad() -> str:\n    return json.dumps({})"),
    (world_out_of_place, "Engine", "LOCK = threading.Lock()"),
    (world_out_of_place, "Engine", "def bad(config: Config) -> None:\n    pass"),
    (world_out_of_place, "Engine", "def bad(x: Any) -> None:\n    x.wfile.write(b'')"),
    (world_out_of_place, "Model", "NOT_FOUND = HTTPStatus.NOT_FOUND"),
    (world_out_of_place, "Scheduler", "def bad() -> None:\n    socket.socket()"),
    (world_out_of_place, "HTTP", "signal.alarm(1)"),
    (world_out_of_place, "Text", "def bad(x: RequestHandler) -> None:\n    pass"),
    (world_out_of_place, "Scheduler", "TAKES_MADE = prometheus.Counter('a', 'b')"),
    (world_out_of_place, "HTTP", "def bad() -> None:\n    import prometheus_client"),
    (names_from_below, "Metrics", "def bad(state: State) -> None:\n    pass"),
    (names_from_below, "Engine", "def bad() -> Any:\n    return Scheduler"),
    (names_from_below, "Scheduler", "class Bad:\n    def bad(self, x: WorkerServer) -> None: ..."),
    (names_from_below, "Text", "def bad(x: Any) -> Any:\n    return to_pcm16(x)"),
    (names_from_below, "Audio", "class Bad(Engine):\n    pass"),
    (scheduler_in_the_guard, "Guard", "class Bad:\n    scheduler: Scheduler"),
    (scheduler_in_the_guard, "Guard", "def bad(state: State) -> None:\n    state.enter('ready')"),
    (names_from_below, "Guard", "def bad(x: Any) -> None:\n    raise HttpError(x, x, x)"),
    (early_imports, "Configuration", "import numpy as np"),
    (early_imports, "Text", "from torch.nn import functional"),
    (early_imports, "Narrator", "from prometheus_client import Counter as Number"),
    (foreign_imports, "Text", "import requests"),
    (foreign_imports, "Model", "from huggingface_hub import snapshot_download"),
    (long_functions, "Audio", "def bad() -> None:\n" + "    x = 1\n" * 60),
    (long_classes, "Audio", "class Bad:\n" + "    x = 1\n" * 250),
    (bare_sections, "Audio", f"# {'-' * 77}\n# More: of it"),
    (long_lines, "Audio", f"BAD = '{'x' * 93}'"),
    (missing_annotations, "Audio", "def bad(x) -> None:\n    pass"),
    (missing_annotations, "Audio", "def bad(x: int):\n    pass"),
    (missing_annotations, "Audio", "def bad(*x, **y) -> None:\n    pass"),
    (wrong_sections, "Audio", f"# {'-' * 77}\n# More: of it"),
]
PYWORKER_BREACHES = [
    (wrong_sections_of_pyworker, "Worker", f"# {'-' * 77}\n# More: of it"),
    (packages_at_the_top, "Settings", "import aiohttp"),
    (packages_at_the_top, "Main", "from vastai import Worker"),
    (sdk_out_of_place, "Settings", "def bad() -> None:\n    import torch.nn"),
    (sdk_out_of_place, "Worker", "def bad() -> None:\n    from aiohttp import web"),
    (sdk_out_of_place, "PyWorker", "def bad() -> None:\n    import numpy"),
    (sdk_out_of_place, "Main", "def bad() -> None:\n    from vastai import Worker"),
]


@pytest.mark.parametrize("rule", [*RULES, *PYWORKER_OWN_RULES], ids=lambda rule: rule.__name__)
def test_each_rule_notices_every_breach(rule: Rule) -> None:
    source, known = (SOURCE, BREACHES) if rule in RULES else (PYWORKER_SOURCE, PYWORKER_BREACHES)
    breaches = [(section, code) for broken, section, code in known if broken is rule]
    altered = source
    for section, code in breaches:
        altered = with_added(altered, section, code)
    assert len(rule(altered)) == len(rule(source)) + len(breaches) > 0


def test_what_just_fits_is_allowed() -> None:
    sixty = with_added(SOURCE, "Audio", "def good() -> None:\n" + "    x = 1\n" * 59)
    assert len(long_functions(sixty)) == len(long_functions(SOURCE))
    hundred = with_added(SOURCE, "Audio", f"GOOD = '{'x' * 91}'")
    assert max(map(len, set(hundred.splitlines()) - set(SOURCE.splitlines()))) == 100
    assert len(long_lines(hundred)) == len(long_lines(SOURCE))
