"""manage-bark-worker.sh and manage/ as text: each file's map, who may call what, what jq checks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import clean_environment
from manager import PARTS, SCRIPT, sourcing

FILES = (SCRIPT, *PARTS)
CALLS = {
    "Call vastai": r'"\$VASTAI" "\$@"',
    "Call curl": r"(?<!\")\bcurl -",
    # A request that Vast routes may start a worker, too.
    "Change what is billed": r"\bvast(_json \w+)? (create|start|stop|destroy|delete) |/route/",
}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def functions(path: Path) -> dict[str, str]:
    """The bodies of a file's functions, without comments, by name."""
    found = re.findall(r"^(\w+)\(\) \{(?: ([^\n]*)\}$|\n(.*?)^\})", text_of(path), re.M | re.S)
    return {name: re.sub(r"^\s*# .*$", "", short or body, flags=re.M)
            for name, short, body in found}


def map_of(path: Path) -> dict[str, str]:
    """What a file's first comment tells, by the words before the colon."""
    head = re.match(r"#!.*\n((?:#.*\n)+)", text_of(path))
    assert head
    lines = re.sub(r"\n#   ", " ", head[1]).splitlines()
    return dict(re.findall(r"^# ([A-Z][\w ]*): (.*)$", "\n".join(lines), re.M))



@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_opens_with_its_sections_in_their_order(path: Path) -> None:
    titles = re.findall(r"^# -{77}\n# (.*)$", text_of(path), re.M)
    assert map_of(path)["Sections"].split("; ") == [
        title.split(":")[0].lower() for title in titles]


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_those_functions_call_vast_or_change_what_is_billed_that_the_map_names(
        path: Path, kind: str) -> None:
    told = re.sub(r"\(.*?\)", "", map_of(path)[kind]).split()
    calling = [name for name, body in functions(path).items() if re.search(CALLS[kind], body)]
    assert sorted(set(told) - {"none"}) == sorted(calling)
    code = re.sub(r"^(readonly )?\w+='.*?'$", "", text_of(path), flags=re.M | re.S)
    outside = re.sub(r"^\w+\(\) \{(?: [^\n]*\}$|\n.*?^\})|^#[^\n]*$", "", code, flags=re.M | re.S)
    assert not re.search(CALLS[kind], outside)


def test_the_script_calls_functions_of_manage_only_where_they_are_loaded() -> None:
    """So that the one file alone can do all that its own commands need."""
    theirs = {name for part in PARTS for name in functions(part)}
    own = functions(SCRIPT)
    assert theirs and not theirs & own.keys()
    for name, body in own.items():
        used = {word for word in re.findall(r"\b[a-z]\w+\b", body) if word in theirs}
        assert not used or re.search(r"\b(load|can_load|is_loaded) \w", body), (name, used)


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.name)
def test_a_part_that_calls_functions_of_another_loads_it(path: Path) -> None:
    used = set(re.findall(r"\b[a-z]\w+\b", " ".join(functions(path).values())))
    for other in set(PARTS) - {path}:
        shared = used & functions(other).keys()
        assert not shared or re.search(rf"\b(load|can_load) {other.stem}\b", text_of(path)), shared


def test_what_runs_the_worker_here_knows_no_vast() -> None:
    (local,) = [part for part in PARTS if part.stem == "local"]
    code = "\n".join(functions(local).values())
    assert not re.search(r"\b(vast\w*|look_\w+|rent_\w+|instances?|offers?)\b",
                         code.replace("requirements_of renting", ""), re.I)


def definitions() -> list[str]:
    """A call of each definition in jq, with 1 for every argument."""
    calls = []
    texts = re.findall(r"^readonly JQ_\w+='(.*?)'$", "\n".join(map(text_of, FILES)), re.M | re.S)
    for name, arguments in re.findall(r"^def (\w+)(?:\((.*?)\))?:", "\n".join(texts), re.M):
        calls.append(f"{name}({'; '.join('1' for _ in arguments.split(';'))})" if arguments
                     else name)
    return calls


def test_jq_knows_all_that_its_definitions_name() -> None:
    """It does not look at the body of one that is not called."""
    calls = definitions()
    assert len(calls) > 50
    program = ", ".join(f"(try ({call}) catch null)" for call in calls)
    code = 'feed null endpoint_facts "$JQ_SPOKEN $JQ_SOUND $JQ_ACCOUNT $JQ_SEARCH $1"'
    done = subprocess.run(sourcing(code, f"[{program}] | length"), capture_output=True, text=True,
                          timeout=60, env=clean_environment())
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    assert {name: body.count("\n") for name, body in functions(path).items()
            if body.count("\n") > 35} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_guard_says_no_twice(path: Path) -> None:
    """`[[ -z "$x" ]] || do_it` hides that something is done; `if [[ -n "$x" ]]` tells it."""
    double = re.compile(r"^\s*(\[\[ (-z|!) [^]]*\]\]|! \S.*) \|\| ", re.M)
    assert [match[0] for match in double.finditer(text_of(path))] == []
