"""README and docs/ against the code: what they list is there, and what is there they list."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

import av
import pytest
from conftest import ROOT, START_SECONDS, WORKER, Worker, wait_until
from manager import BASH, PARTS, SCRIPT, Manager, managed, sourcing
from renting import light_stage, scene
from warm_vastai import warm_vastai

PAGES = {path: path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]
HTTP, SETTINGS, RENTING, DOCKER, WORKS = (
    PAGES[ROOT / "docs" / f"{name}.md"]
    for name in ("http", "settings", "renting", "docker", "how-it-works"))
LONGEST_README = 220  # lines
LOCAL = "http://127.0.0.1:8080"  # where the examples find a worker


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the tables under a page's heading, without their header rows."""
    section = re.split(r"^#+ ", page.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in section.splitlines()
             if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in cells
            if not set("".join(row)) <= set("-: ")][1:]


def codes(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def first_codes(page: str, heading: str) -> set[str]:
    """What stands as code in the first cells of the tables under a heading."""
    return set().union(*(codes(row[0]) for row in rows(page, heading)))


def fences(page: str, language: str) -> list[str]:
    """The blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


def help_of(*words: str) -> str:
    """What the manager's `help` says, of a command if one is named."""
    return subprocess.run([SCRIPT, "help", *words], capture_output=True, text=True,
                          check=True).stdout


def constant(name: str) -> str:
    """One of the manager's."""
    return subprocess.run(sourcing(f'printf "%s" "${name}"'), capture_output=True, text=True,
                          check=True).stdout


def settings(page: str) -> dict[str, tuple[str, str]]:
    return {row[0].strip("`"): (row[1].replace("`", ""), row[2])
            for row in rows(page, "Settings")}


def test_the_settings_table_is_the_workers_own(bark: ModuleType) -> None:
    table = settings(SETTINGS)
    assert table.pop("HF_HOME")
    assert table == {v.name: (v.default, v.meaning) for v in bark.VARIABLES}


def test_the_settings_in_readme_are_said_in_the_same_words_as_among_all() -> None:
    assert settings(README) and settings(README).items() <= settings(SETTINGS).items()


def test_every_variable_of_ours_that_is_named_exists(bark: ModuleType) -> None:
    """The manager's own are those that its files name."""
    named = set(re.findall(r"\bBARK_[A-Z_]*[A-Z]", "".join(PAGES.values())))
    ours = {v.name for v in bark.VARIABLES}
    text = "".join(path.read_text(encoding="utf-8") for path in (SCRIPT, *PARTS))
    manager = set(re.findall(r"\bBARK_[A-Z_]*[A-Z]", text))
    assert named - ours - manager == set()


def test_the_table_of_what_an_endpoints_worker_needs_is_its_own(pyworker: ModuleType) -> None:
    table = {row[0].strip("`"): row[1] for row in rows(RENTING, "Where one GPU is not enough")
             if len(row) == 2 and row[0] != "variable"}
    assert table == {v.name.format(port="N"): v.meaning for v in pyworker.VARIABLES}


def test_what_an_endpoint_costs_at_most_is_the_managers_own_sum() -> None:
    """And what `endpoint` takes is what its row in the table of commands says."""
    said = subprocess.run(sourcing("say_cost_at_most"), capture_output=True, text=True,
                          check=True).stderr
    assert said.startswith("at most 2 workers of at most 0.20 $/h: 0.40 $/h (9.60 $ a day)")
    assert "`--max-workers` (2) times `--max-price` (0.20 $/h): 0.40 $/h, 9.60 $ a day" in RENTING
    (row,) = [row[0] for row in rows(RENTING, "Commands") if " endpoint " in row[0]]
    assert row.split("endpoint ")[1].strip("`").replace("\\|", "|") in help_of("endpoint")


@pytest.mark.parametrize(("page", "heading"), [(README, "Endpoints"), (HTTP, "HTTP")],
                         ids=["README", "http"])
def test_every_endpoint_is_described_and_no_other(
        bark: ModuleType, page: str, heading: str) -> None:
    listed = {tuple(call.split()) for call in first_codes(page, heading)}
    assert listed == {(route.method, path) for path, route in bark.ROUTES.items()}


def test_every_named_voice_is_described_as_it_is(bark: ModuleType) -> None:
    table = {row[0].strip("`"): row for row in rows(README, "Voices")}
    assert table.keys() == {voice for voice, _ in bark.VOICE_ALIASES.values()}
    for alias, (voice, description) in bark.VOICE_ALIASES.items():
        same = {name for name, of in bark.OPENAI_VOICES.items() if of == voice}
        assert codes(table[voice][1]) == {alias} | same
        assert table[voice][2].startswith(description)
    assert "the default" in table[settings(SETTINGS)["BARK_VOICE"][0]][2]


def test_every_voice_of_openais_is_said_to_be_what_it_is(bark: ModuleType) -> None:
    told = {name: re.search(r"`([^`]+)`", row[1])[1]
            for row in rows(HTTP, "OpenAI's API") for name in codes(row[0])}
    assert told == {name: voice or "BARK_VOICE" for name, voice in bark.OPENAI_VOICES.items()}


def test_every_field_of_a_request_is_read(worker: Worker) -> None:
    """As it is refused by its name where it is no such thing."""
    fields = first_codes(HTTP, "Speaking")
    assert {"text", "voice", "seed"} < fields
    for field in fields:
        refused = worker.call("/synthesize", {"text": "Hi.", field: {"no": "such"}}).json
        assert refused["error"]["param"] == field


def test_every_field_of_health_is_described(worker: Worker) -> None:
    (section,) = re.findall(r"^## Health\n(.*?)^## ", HTTP, re.M | re.S)
    assert worker.health().keys() - codes(section) == set()


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


def seconds_of(path: Path) -> float:
    with av.open(str(path)) as sound:
        return sum(frame.samples / frame.sample_rate for frame in sound.decode(audio=0))


def test_the_openai_clients_lines_bring_speech(
        worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in fences(README, "python") if "OpenAI" in block)
    assert LOCAL in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace(LOCAL, worker.url), "README.md", "exec"), {})
    assert seconds_of(tmp_path / "hello.mp3") > 0.5


def test_every_call_by_curl_brings_speech(worker: Worker, tmp_path: Path) -> None:
    """Those of a rented worker too, which know its address and key from `env`."""
    calls = [call for page in PAGES.values() for block in fences(page, "bash")
             for call in re.findall(r"^curl (?:.*\\\n)*.*$", block, re.M)]
    assert len(calls) == 3
    for call in calls:
        (name,) = re.findall(r"-o (\S+)$", call)
        (tmp_path / name).unlink(missing_ok=True)
        subprocess.run([BASH, "-c", call.replace(LOCAL, worker.url)], cwd=tmp_path, check=True,
                       env={**os.environ, "BARK_URL": worker.url, "BARK_API_KEY": "any"})
        assert seconds_of(tmp_path / name) > 0.5


def test_the_example_error_is_a_real_one(worker: Worker) -> None:
    example = json.loads(re.search(r"```json\n(\{\"status\": \"error\".*?)```", HTTP, re.S)[1])
    real = worker.speak("x" * 2001).json
    message = re.sub("731|500", "N", example["error"].pop("message"))
    assert message == re.sub("2001|2000", "N", real["error"].pop("message"))
    assert example == real


def test_the_tables_of_commands_are_the_managers_own() -> None:
    commands = set(re.findall(r"^  (\w+) ", help_of(), re.M))
    assert {re.search(r"\.sh (\w+)", call)[1]
            for call in first_codes(RENTING, "Commands")} == commands
    assert first_codes(README, "Commands") == commands


def said_of_the_manager(page: str) -> list[str]:
    """Each call of it in a page, in a block or in a line, as the words after its name."""
    told = [*(line.split("#")[0] for block in fences(page, "bash") for line in block.splitlines()),
            *codes(re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S))]
    named = [re.search(r"manage-bark-worker\.sh +(\w.*)", text) for text in told]
    bare = [re.fullmatch(r"(?:start|search|stop|destroy|endpoint) .*", text) for text in told]
    return [*(match[1] for match in named if match), *(match[0] for match in bare if match)]


def test_every_option_of_the_manager_that_is_named_exists() -> None:
    calls = [call for page in PAGES.values() for call in said_of_the_manager(page)]
    assert len(calls) > 25
    every = "".join(help_of(name) for name in first_codes(README, "Commands"))
    for call in calls:
        options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", call))
        usage = help_of(call.split()[0].strip("\"')"))
        assert options - set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", usage)) == set(), call
    for page in (README, RENTING):
        named = {text for text in codes(page) if re.fullmatch(r"--[a-z-]+", text)}
        assert named - {"--args", "--onstart-cmd"} <= set(re.findall(r"--[a-z-]+", every))


def test_every_block_of_commands_is_one() -> None:
    for page in PAGES.values():
        for block in fences(page, "bash"):
            subprocess.run([BASH, "-n"], input=block, text=True, check=True)


def test_readme_is_short_and_its_first_command_stands_within_fifteen_lines() -> None:
    lines = README.splitlines()
    assert len(lines) <= LONGEST_README
    fence = lines.index("```bash")
    assert fence < 15
    assert (ROOT / lines[fence + 1].split()[0]).is_file()


def anchors(path: Path) -> set[str]:
    """What `#` may lead to in a page, as GitHub makes it of the headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, re.M)}


def test_every_link_between_files_leads_somewhere() -> None:
    pages = [*PAGES, ROOT / "builtin-voice/README.md", *(ROOT / "tests").rglob("*.md")]
    links = [(page, *link) for page in pages for link in re.findall(
        r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))]
    assert len(links) > 30
    for page, name, anchor in links:
        target = page.parent / name if name else page
        assert target.exists(), (page, name)
        assert not anchor or anchor in anchors(target), (page, name, anchor)


def test_every_page_is_reached_from_readme() -> None:
    assert {str(path.relative_to(ROOT)) for path in PAGES} - {"README.md"} <= set(
        re.findall(r"\]\(([^)#]+)\)", README))


def test_the_exit_statuses_are_the_managers_own() -> None:
    text = " ".join(RENTING.split("Exit status: ")[1].split(". ")[0].split())
    told = re.split(r"\n\n", help_of().split("exit status: ")[1])[0]
    assert re.findall(r"\b\d+\b", text) == re.findall(r"\b\d+\b", told)


def highest_price() -> float:
    """What `start` pays at most where nobody says otherwise, in $/h."""
    return float(re.search(r"--max-price .*\(([0-9.]+)\)", help_of("start"))[1])


def test_the_gpus_are_those_that_start_takes_at_prices_that_it_pays() -> None:
    table = {name: row[2] for row in rows(README, "GPUs") for name in row[0].split(", ")}
    assert table.keys() == set(constant("DEFAULT_GPUS").split(","))
    for price in re.findall(r"[0-9.]+", " ".join(table.values())):
        assert float(price) < highest_price()


def test_what_prices_come_to_is_reckoned_rightly() -> None:
    table = [[float(re.match(r"[0-9.]+", cell)[0]) for cell in row]
             for row in rows(RENTING, "Your money") if re.match(r"[0-9.]+", row[0])]
    assert len(table) == 3 and table[-1][0] == highest_price()
    for hour, day, month, some in table:
        assert [day, month, some] == pytest.approx(
            [hour * 24, hour * 720, hour * 60 + 0.01 * 660], abs=0.005)


def test_start_asks_what_is_printed_here(tmp_path: Path) -> None:
    (asked,) = fences(README, "text")
    with light_stage(tmp_path / "image") as warm, scene(tmp_path / "one", warm) as stage:
        stage.vast.add_offer()
        run = stage.typed("n\n")
    told = re.sub(r"^offer \d+", "offer 4100001", run.stderr)
    assert told.startswith(asked.rstrip("\n") + " ")
    assert (run.status, stage.changes()) == (1, [])


def shell_block(page: str, *needles: str) -> str:
    """The page's one block of commands that has all of these in it."""
    (block,) = (block for block in fences(page, "bash")
                if all(needle in block for needle in needles))
    return block


def by_hand(manager: Manager, path: str, command: str) -> str:
    """What a shell with the real vastai prints for a command."""
    done = subprocess.run([BASH, "-c", command], env=manager.environment(PATH=path), cwd=ROOT,
                          text=True, capture_output=True, timeout=START_SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_on_start_command_by_hand_is_the_one_of_start() -> None:
    """Other tests hold that it restarts the worker."""
    on_start = constant("TO_CONSOLE") + constant("LOOP")
    assert f"--onstart-cmd '{on_start}'" in shell_block(RENTING, "vastai create")


@pytest.mark.parametrize(("page", "mode"), [
    pytest.param(README, "args", id="readme"),
    pytest.param(RENTING, "ssh_direc ssh_proxy", id="renting", marks=pytest.mark.long)])
def test_a_route_by_hand_leads_to_a_worker_that_only_its_key_opens(
        tmp_path: Path, toy: Path, page: str, mode: str) -> None:
    install, export, search, _ = re.split(
        r"^(?=export|vastai )", shell_block(README, "vastai create"), flags=re.M)
    assert f"vastai=={constant('VASTAI_VERSION')}\n" in install
    create = shell_block(page, "vastai create").partition("vastai create")
    with warm_vastai(tmp_path / "warm") as vastai, managed(tmp_path, toy) as manager:
        path = os.pathsep.join((str(vastai.parent), manager.environment()["PATH"]))
        offer = manager.vast.add_offer()
        assert str(offer) in by_hand(manager, path, export + search)
        by_hand(manager, path, export + "".join(create[1:]).replace("OFFER_ID", str(offer)))
        (instance,) = manager.vast.instances.values()
        assert instance.runtype == mode
        wait_until(lambda: instance.port, "worker", START_SECONDS)
        assert manager.run("start", PATH=path).stdout == f"{instance.worker_url}\n"
        assert manager.run("test", PATH=path).status == 0
        with urllib.request.urlopen(f"{instance.worker_url}/health") as health:
            assert json.load(health)["guard"]["idle_stop"]["limit"] == 30 * 60
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
    run, bare = shell_block(README, "docker run"), shell_block(DOCKER, "docker run")
    image = constant("DEFAULT_IMAGE")
    assert image in run and image in bare
    assert f"HF_HOME={re.search(r'-v [^:]+:([^ ]+) ', run)[1]}\n" in dockerfile()
    for block in (run, bare):
        assert f"EXPOSE {re.search(r'-p 127.0.0.1:8080:([0-9]+)', block)[1]}\n" in dockerfile()
    assert f" builtin-voice {re.search(r'BARK_MODEL=(/app/[a-z-]+)', bare)[1]}\n" in dockerfile()
    assert all((ROOT / name).is_file() for name in re.findall(r"docker build -f (\S+)", DOCKER))
    user = re.search(r"runs as user (\d+)", DOCKER)[1]
    assert f"USER {user}:" in dockerfile() and f"--uid {user} " in dockerfile()


def test_the_sounds_are_short_opus_files_of_what_is_written_beside_them() -> None:
    table = rows(WORKS, "How the built-in voice sounds")
    assert len(table) == 3
    for link, _, text in table:
        path = ROOT / "docs" / re.search(r"\((\S+\.opus)\)", link)[1]
        assert path.stat().st_size < 100_000
        assert 0.04 < seconds_of(path) / len(text) < 0.12
