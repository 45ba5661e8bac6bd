"""README and docs/ against the code: what they list is there, and what is there they list."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

import av
import pytest
from conftest import ROOT, START_SECONDS, WORKER, Worker, wait_until
from manager import BASH, SCRIPT, Manager, managed, sourcing

PAGES = {path: path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]
HTTP, SETTINGS, RENTING, DOCKER = (
    PAGES[ROOT / "docs" / f"{name}.md"] for name in ("http", "settings", "renting", "docker"))


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the tables under a page's heading, without their header rows."""
    section = re.split(r"^#+ ", page.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in section.splitlines()
             if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in cells
            if not set("".join(row)) <= set("-: ")][1:]


def codes(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_the_settings_table_is_the_workers_own(bark: ModuleType) -> None:
    table = {row[0].strip("`"): (row[1].replace("`", ""), row[2])
             for row in rows(SETTINGS, "Settings")}
    assert table.pop("HF_HOME")
    assert table == {v.name: (v.default, v.meaning) for v in bark.VARIABLES}


def test_the_table_of_what_an_endpoints_worker_needs_is_its_own(pyworker: ModuleType) -> None:
    table = {row[0].strip("`"): row[1] for row in rows(RENTING, "Where one GPU is not enough")
             if len(row) == 2 and row[0] != "variable"}
    assert table == {v.name.format(port="N"): v.meaning for v in pyworker.VARIABLES}


def test_what_an_endpoint_costs_at_most_is_the_managers_own_sum() -> None:
    """And what `endpoint` takes is what its row in the table of commands says."""
    said = subprocess.run([BASH, "-c", 'source "$1"; say_cost_at_most', "test", SCRIPT],
                          capture_output=True, text=True, check=True).stderr
    assert said.startswith("at most 2 workers of at most 0.20 $/h: 0.40 $/h (9.60 $ a day)")
    assert "`--max-workers` (2) times `--max-price` (0.20 $/h): 0.40 $/h, 9.60 $ a day" in RENTING
    (row,) = [row[0] for row in rows(RENTING, "Commands") if " endpoint " in row[0]]
    usage = subprocess.run([SCRIPT, "help", "endpoint"], capture_output=True, text=True, check=True)
    assert row.split("endpoint ")[1].strip("`").replace("\\|", "|") in usage.stdout


def test_every_endpoint_is_described_and_no_other(bark: ModuleType) -> None:
    listed = {tuple(call.split()) for row in rows(HTTP, "HTTP") for call in codes(row[0])}
    assert listed == {(route.method, path) for path, route in bark.ROUTES.items()}


def error_codes() -> set[str]:
    """Every literal `code` that an error gets, by keyword or as HttpError's or wrong's second."""
    used = set()
    for call in ast.walk(ast.parse(WORKER.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call):
            named = [k.value for k in call.keywords if k.arg == "code"]
            if isinstance(call.func, ast.Name) and call.func.id in ("HttpError", "wrong"):
                named.append(call.args[1])
            used |= {value.value for value in named if isinstance(value, ast.Constant)}
    return used


def test_every_error_code_is_described_and_no_other() -> None:
    internal = {"invalid_configuration", "model_unavailable", "client_closed_request"}
    listed = set().union(*(codes(row[1]) for row in rows(HTTP, "Errors")))
    assert listed == error_codes() - internal


def test_the_example_answer_has_the_fields_of_a_real_one(worker: Worker) -> None:
    example = json.loads(re.search(r"```json\n(\{\"audio\".*?)```", HTTP, re.S)[1])
    real = worker.speak("Hi.").json
    assert example.keys() == real.keys()
    assert example["segments"][0].keys() == real["segments"][0].keys()


def test_the_openai_clients_lines_bring_speech(
        worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n([^`]*OpenAI[^`]*)```", HTTP)
    assert "http://127.0.0.1:8080" in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("http://127.0.0.1:8080", worker.url), "http.md", "exec"), {})
    with av.open(str(tmp_path / "hello.mp3")) as speech:
        assert sum(frame.samples for frame in speech.decode(audio=0)) > 0.5 * 24_000


def test_the_example_error_is_a_real_one(worker: Worker) -> None:
    example = json.loads(re.search(r"```json\n(\{\"status\": \"error\".*?)```", HTTP, re.S)[1])
    real = worker.speak("x" * 2001).json
    message = re.sub("731|500", "N", example["error"].pop("message"))
    assert message == re.sub("2001|2000", "N", real["error"].pop("message"))
    assert example == real


def test_the_commands_table_is_the_managers_own() -> None:
    usage = subprocess.run([SCRIPT, "help"], capture_output=True, text=True, check=True).stdout
    listed = {re.search(r"\.sh (\w+)", row[0])[1] for row in rows(RENTING, "Commands")}
    assert listed == set(re.findall(r"^  (\w+) ", usage, re.M))


def test_the_first_command_stands_within_fifteen_lines_and_exists() -> None:
    lines = README.splitlines()
    fence = lines.index("```bash")
    assert fence < 15
    assert (ROOT / lines[fence + 1].split()[0]).is_file()


def test_every_relative_link_leads_somewhere() -> None:
    links = [path.parent / link for path, text in PAGES.items()
             for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    assert links
    assert [link for link in links if not link.exists()] == []


def test_the_exit_statuses_are_the_managers_own() -> None:
    text = " ".join(RENTING.split("Exit status: ")[1].split(". ")[0].split())
    usage = subprocess.run([SCRIPT, "help"], capture_output=True, text=True, check=True).stdout
    told = re.split(r"\n\n", usage.split("exit status: ")[1])[0]
    assert re.findall(r"\b\d+\b", text) == re.findall(r"\b\d+\b", told)


def shell_block(page: str, *needles: str) -> str:
    """The page's one block of commands that has all of these in it."""
    (block,) = (block for block in re.findall(r"```bash\n(.*?)```", page, re.S)
                if all(needle in block for needle in needles))
    return block


def by_hand(manager: Manager, command: str) -> str:
    """What a shell with the real vastai prints for a command."""
    done = subprocess.run([BASH, "-c", command], env=manager.environment(), cwd=ROOT, text=True,
                          capture_output=True, timeout=START_SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_route_by_hand_leads_to_a_worker_that_only_its_key_opens(
        tmp_path: Path, toy: Path) -> None:
    block = shell_block(RENTING, "vastai create")
    export, search, create = re.split(r"(?=^vastai )", block, flags=re.M)
    on_start = subprocess.run(sourcing('printf "%s" "$TO_CONSOLE$LOOP"'), capture_output=True,
                              text=True, check=True).stdout
    assert f"--onstart-cmd '{on_start}'" in create  # other tests hold that it restarts the worker
    with managed(tmp_path, toy) as manager:
        offer = manager.vast.add_offer()
        assert str(offer) in by_hand(manager, export + search)
        by_hand(manager, export + create.replace("OFFER_ID", str(offer)))
        (instance,) = manager.vast.instances.values()
        wait_until(lambda: instance.port, "worker", START_SECONDS)
        assert manager.run("start").stdout == f"{instance.worker_url}\n"
        assert manager.run("test").status == 0
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{instance.worker_url}/synthesize", b"{}")


def dockerfile() -> str:
    return (ROOT / "Dockerfile.ghcr").read_text(encoding="utf-8")


def test_the_build_arguments_are_the_dockerfiles_own() -> None:
    listed = {row[0].strip("`"): row[1].strip("`") for row in rows(DOCKER, "In Docker")}
    declared = dict(re.findall(r"^ARG (\w+)(?:=(.*))?$", dockerfile(), re.M))
    assert listed.keys() == declared.keys() and listed["CUDA"] == declared["CUDA"]
    assert set(re.findall(r"--build-arg (\w+)=", DOCKER)) <= declared.keys()


def test_the_docker_commands_fit_the_image() -> None:
    run = shell_block(DOCKER, "docker run", "--gpus all")
    image = re.search(r"DEFAULT_IMAGE='?([^'\s]+)", SCRIPT.read_text(encoding="utf-8"))[1]
    assert image in run and image in shell_block(DOCKER, "docker run", "BARK_MODEL=")
    assert f"HF_HOME={re.search(r'-v [^:]+:([^ ]+) ', run)[1]}\n" in dockerfile()
    assert f"EXPOSE {re.search(r'-p 8080:([0-9]+)', run)[1]}\n" in dockerfile()
    assert f" builtin-voice {re.search(r'BARK_MODEL=(/app/[a-z-]+)', DOCKER)[1]}\n" in dockerfile()
    assert all((ROOT / name).is_file() for name in re.findall(r"docker build -f (\S+)", DOCKER))
    user = re.search(r"runs as user (\d+)", DOCKER)[1]
    assert f"USER {user}:" in dockerfile() and f"--uid {user} " in dockerfile()


def test_the_sounds_are_short_opus_files_of_what_is_written_beside_them() -> None:
    table = [row for row in rows(README, "Quick start") if row[0].endswith(".opus)")]
    assert len(table) == 3
    for link, _, text in table:
        path = ROOT / re.search(r"\((docs/\S+\.opus)\)", link)[1]
        assert path.stat().st_size < 100_000
        with av.open(str(path)) as sound:
            samples = sum(frame.samples for frame in sound.decode(audio=0))
        assert 0.04 < samples / 48_000 / len(text) < 0.12  # seconds a character
