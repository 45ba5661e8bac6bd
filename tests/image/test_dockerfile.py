"""What can be said of Dockerfile.ghcr without building it; test_image.py builds it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, Worker, running_worker

TEXT = (ROOT / "Dockerfile.ghcr").read_text(encoding="utf-8")
# Instructions, with continued lines joined and comments gone.
LINES = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", TEXT, flags=re.M)).splitlines()


def instructions(name: str) -> list[str]:
    return [line.split(None, 1)[1] for line in LINES if line.startswith(f"{name} ")]


def copied() -> set[str]:
    """The names that go into the image."""
    return {word for line in instructions("COPY") for word in line.split()[:-1]
            if not word.startswith("--")}


def probe(port: int) -> int:
    """The exit status of the HEALTHCHECK's command for a worker on a port."""
    _, command = instructions("HEALTHCHECK")[0].split(" CMD ")
    program, *arguments = json.loads(command)
    assert program == "python"
    return subprocess.run([sys.executable, *arguments], env={"PORT": str(port)}, timeout=30,
                          capture_output=True, check=False).returncode


def test_the_healthcheck_is_content_with_a_ready_worker(worker: Worker) -> None:
    assert probe(worker.port) == 0


def test_the_healthcheck_complains_of_a_worker_that_is_not_ready() -> None:
    with running_worker(BARK_MODEL="/nothing") as worker:
        worker.wait_for("failed")
        assert probe(worker.port) == 1


def test_the_context_is_what_the_dockerfile_copies() -> None:
    ignored, *allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines()
                         if not line.startswith("#")]
    assert ignored == "*" and {line.removeprefix("!") for line in allowed} == copied()
    assert all((ROOT / name).exists() for name in copied())


def test_a_change_of_what_goes_into_the_image_builds_it() -> None:
    workflow = (ROOT / ".github/workflows/build-bark-tts.yml").read_text(encoding="utf-8")
    push = yaml.load(workflow, yaml.BaseLoader)["on"]["push"]  # else `on` is read as true
    built = {name.removesuffix("/**") for name in push["paths"]}
    assert {word for word in copied() if word != "LICENSE"} <= built
    assert all((ROOT / name).exists() for name in built)


def test_the_worker_comes_last_of_what_fills_layers() -> None:
    filling = [line for line in LINES if line.startswith(("RUN ", "COPY ", "ADD "))]
    assert filling[-1].endswith("bark-worker.py /app/")


def test_the_folder_of_presets_that_docs_mount_is_there_and_is_looked_into() -> None:
    """Empty, so that nobody who mounts none is warned; its user reads it and writes nothing."""
    docs = (ROOT / "docs/docker.md").read_text(encoding="utf-8")
    (mounted,) = re.findall(r"`-v \./voices:(\S+)`", docs)
    assert f"BARK_VOICES_DIR={mounted}" in instructions("ENV")[0].split()
    (made,) = [line for line in instructions("RUN") if "useradd" in line]
    assert made.endswith(f"&& mkdir {mounted}")


def test_no_version_of_a_package_stands_in_the_dockerfile_too() -> None:
    names = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    assert "torch" in names and not re.findall(r"\d==|==\d|[<>]=", TEXT)


def test_the_base_is_pinned_by_tag_and_digest() -> None:
    first, *others = instructions("FROM")
    assert re.fullmatch(r"docker\.io/library/python:[\w.-]+-slim\S*@sha256:[0-9a-f]{64} AS python",
                        first)
    assert instructions("ARG")[0] == "BASE=python" and all("${BASE}" in line for line in others)


@pytest.mark.parametrize("name", ["build-bark-tts", "ci"])
def test_every_action_is_pinned_by_a_commit_and_says_its_version(name: str) -> None:
    workflow = (ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8")
    uses = re.findall(r"uses: (.*)", workflow)
    assert uses and all(re.fullmatch(r"\S+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)
                        for use in uses if not use.startswith("$/"))


def test_torch_stays_below_2_15_as_long_as_there_is_an_image_for_cuda_12_6() -> None:
    """2.14 is the last torch with a build for that."""
    workflow = (ROOT / ".github/workflows/build-bark-tts.yml").read_text(encoding="utf-8")
    assert "cuda: cu126" in workflow, "no such image any more: let torch go on, and this test go"
    pinned = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert (int(pinned[1]), int(pinned[2])) < (2, 15)
    assert {"dependency-name": "torch", "versions": [">=2.15"]} in held_back()


def held_back() -> list[dict[str, object]]:
    """Versions of pip's packages that dependabot leaves alone."""
    updates = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())["updates"]
    (ignored,) = [one["ignore"] for one in updates if one["package-ecosystem"] == "pip"]
    return ignored


def test_onnxruntime_stays_below_1_29_which_reports_to_its_makers() -> None:
    """See its Privacy.md: from then on its wheels for Linux send telemetry unless told not to."""
    pinned = re.search(r"^onnxruntime==1\.(\d+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert int(pinned[1]) < 29
    assert {"dependency-name": "onnxruntime", "versions": [">=1.29"]} in held_back()


def test_both_variants_that_are_published_are_the_managers_own() -> None:
    workflow = (ROOT / ".github/workflows/build-bark-tts.yml").read_text(encoding="utf-8")
    manager = (ROOT / "manage/local.sh").read_text(encoding="utf-8")
    published = set(re.findall(r"cuda: (cu\d+)", workflow))
    assert len(published) == 2 and published == set(re.findall(r"printf '(cu\d+)\\n'", manager))
