"""What `local` fetches and says on its way to a first sentence, and how all of it goes again.

pip is the real one. The package indexes are folders on loopback with empty wheels in them, each
named as the real build of torch; PyTorch's own index has never been asked.
"""

from __future__ import annotations

import functools
import http.server
import os
import pty
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pip
import pytest
from conftest import START_SECONDS, clean_environment
from manager import BASH, SCRIPT, executable, folder_of, sourcing
from test_manage import TOOLS, WORKER, clone_script, run, running_local, source, write_wheel

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"),
                                reason="elsewhere pip's own build of torch is the only one")

VERSION = "2.13.0"
LOCAL = "manage/local.sh"
NO_GPU = "no NVIDIA GPU here"
# pip takes an empty variable for none, and this file for all of its own. PyPI is out of reach.
NO_PIP_SETTINGS = {**{name: "" for name in os.environ if name.startswith("PIP_")},
                   "PIP_CONFIG_FILE": os.devnull, "HTTPS_PROXY": "http://127.0.0.1:9",
                   "https_proxy": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1",
                   "no_proxy": "127.0.0.1"}


class Indexes(http.server.ThreadingHTTPServer):
    """Serves a folder of indexes: cpu, cu126, cu130 as PyTorch has them, pypi as pip's own."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), functools.partial(IndexHandler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"


class IndexHandler(http.server.SimpleHTTPRequestHandler):
    server: Indexes

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for build in ("cpu", "cu126", "cu130"):
        write_wheel(folder / build / "torch", "torch", f"{VERSION}+{build}")
    write_wheel(folder / "pypi/torch", "torch", VERSION)
    for name in ("other", "ears", "pages", "vastai"):
        write_wheel(folder / "pypi" / name, name)
    write_wheel(folder / "links", "torch", f"{VERSION}+cpu")
    write_wheel(folder / "links-plain", "torch", VERSION)
    write_wheel(folder / "links-without", "other")
    return folder


@pytest.fixture
def indexes(wheels: Path) -> Iterator[Indexes]:
    with Indexes(wheels) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PATH of TOOLS and those of `--clean`: no Python, no nvidia-smi."""
    return folder_of((*TOOLS, "find", "grep"), tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .venv like one of the script's, but with this Python's pip: its own takes seconds."""
    folder = tmp_path_factory.mktemp("made") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    here = Path(pip.__file__).parent
    for place in (here, *here.parent.glob("pip-*.dist-info")):
        shutil.copytree(place, packages / place.name)
    (folder / "made-by-manage-bark-worker.sh").touch()
    return folder


def pip_settings(path: Path | str, **settings: str) -> dict[str, str]:
    """The environment of somebody who never set anything of pip's."""
    return clean_environment(PATH=str(path), **{**NO_PIP_SETTINGS, **settings})


@pytest.fixture
def clone(tmp_path: Path, venv: Path, indexes: Indexes) -> Path:
    """A clone with a fresh .venv, for which PyTorch's index and PyPI are on loopback."""
    folder = clone_script(tmp_path)
    script = folder / LOCAL
    text = script.read_text(encoding="utf-8")
    for old, new in (("https://download.pytorch.org/whl", indexes.url),
                     ("REACH_SECONDS=10 ", "REACH_SECONDS=60 ")):
        assert old in text
        text = text.replace(old, new, 1)
    script.write_text(text, encoding="utf-8")
    (folder / "requirements.txt").write_text(
        f"# Three parts\n--index-url {indexes.url}/pypi\n# -- worker: this\ntorch=={VERSION}\n"
        f"other==1.0\n# -- listening: more\nears==1.0\n# -- speaking: books\n"
        f"--index-url {indexes.url}/pypi\npages==1.0\n"
        f"# -- renting: that\n--index-url {indexes.url}/pypi\nvastai==1.0\n")
    (folder / "bark-worker.py").write_text(WORKER)
    shutil.copytree(venv, folder / ".venv", symlinks=True, copy_function=os.link)
    return folder


def install(clone: Path, path: Path | str, no_gpu: str = NO_GPU, listen: str = "",
            **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        sourcing('install_worker "$@"', no_gpu, listen, script=clone / SCRIPT.name),
        env=pip_settings(path, **settings), text=True, capture_output=True, timeout=START_SECONDS)


def torch_of(clone: Path) -> str:
    found = list(clone.glob(".venv/lib/python*/site-packages/torch-*.dist-info"))
    assert len(found) <= 1
    return found[0].name.removeprefix("torch-").removesuffix(".dist-info") if found else ""


def fetched(indexes: Indexes, name: str = "torch-") -> list[str]:
    return [path for path in indexes.asked if name in path and path.endswith(".whl")]


def gpu(folder: Path, cuda: str, capability: str = "8.6") -> str:
    """A PATH on which nvidia-smi shows a GPU of this capability and a driver for this CUDA."""
    executable(folder / "nvidia-smi", f"""#!/bin/sh
case "$1" in
  -L) echo 'GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-0)' ;;
  --query-gpu=compute_cap) echo {capability} ;;
  *) echo '| NVIDIA-SMI 1.2   Driver Version: 1.2   CUDA Version: {cuda} |' ;;
esac
""")
    return f"{folder}:"


# Without a GPU


def test_without_a_gpu_the_cpu_build_comes_once_and_only_the_parts_that_are_needed(
        clone: Path, bare: Path, indexes: Indexes) -> None:
    done = install(clone, bare)
    assert done.returncode == 0, done.stderr
    assert torch_of(clone) == f"{VERSION}+cpu"
    assert fetched(indexes) == [f"/cpu/torch/torch-{VERSION}%2Bcpu-py3-none-any.whl"]
    assert len(fetched(indexes, "other-")) == 1
    assert not fetched(indexes, "ears-") and not fetched(indexes, "vastai-")
    assert f"fetched 2 packages (torch {VERSION}+cpu) into {clone}/.venv" in done.stderr
    for listen in ("", "off"):
        assert_nothing_to_do(install(clone, bare, listen=listen))
    listening = install(clone, bare, listen="me/ears")
    assert listening.returncode == 0 and "fetched 1 packages into" in listening.stderr
    assert len(fetched(indexes, "ears-")) == len(fetched(indexes)) == 1
    for listen in ("tiny", "", "base"):
        assert_nothing_to_do(install(clone, bare, listen=listen))
    requirements = clone / "requirements.txt"
    requirements.write_text(requirements.read_text().replace("ears==1.0", "ears==2.0"))
    assert_nothing_to_do(install(clone, bare))


def assert_nothing_to_do(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.long  # not by itself, but run.sh is full
@pytest.mark.parametrize(("settings", "build", "place"), [
    ({"PIP_INDEX_URL": "{url}/pypi"}, "", "/pypi/"),
    ({"PIP_INDEX_URL": "{url}/cpu", "PIP_EXTRA_INDEX_URL": "{url}/pypi"}, "+cpu", "/cpu/"),
    ({"PIP_EXTRA_INDEX_URL": "{url}/cu130 {url}/cpu"}, "+cpu", "/cpu/"),
    ({"PIP_FIND_LINKS": "{wheels}/links"}, "+cpu", ""),
    ({"PIP_FIND_LINKS": "{wheels}/links-plain"}, "", ""),
    ({"PIP_FIND_LINKS": "{wheels}/links-without"}, "+cpu", "/cpu/"),
    ({"PIP_CONFIG_FILE": "index-url = {url}/pypi"}, "", "/pypi/"),
    ({"PIP_CONFIG_FILE": "find-links = {wheels}/links\n  {wheels}/links-without"}, "+cpu", ""),
])
def test_a_persons_own_settings_go_first(
        settings: dict[str, str], build: str, place: str, clone: Path, bare: Path,
        indexes: Indexes, wheels: Path, tmp_path: Path) -> None:
    known = {name: value.format(url=indexes.url, wheels=wheels) for name, value in settings.items()}
    if "PIP_CONFIG_FILE" in known:
        (tmp_path / "pip.conf").write_text(f"[global]\n{known['PIP_CONFIG_FILE']}\n")
        known["PIP_CONFIG_FILE"] = str(tmp_path / "pip.conf")
    done = install(clone, bare, **known)
    assert done.returncode == 0, done.stderr
    assert torch_of(clone) == VERSION + build
    assert all(path.startswith(place) for path in fetched(indexes)) if place else \
        fetched(indexes) == []


def test_an_index_that_does_not_answer_is_told_of_and_pips_own_is_taken(
        clone: Path, bare: Path, indexes: Indexes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        script = clone / LOCAL
        text = script.read_text().replace("REACH_SECONDS=60 ", "REACH_SECONDS=2 ")
        script.write_text(text.replace(
            f"TORCH_WHEELS='{indexes.url}'",
            f"TORCH_WHEELS='http://127.0.0.1:{mute.getsockname()[1]}'"))
        done = install(clone, bare)
    assert done.returncode == 0, done.stderr
    assert torch_of(clone) == VERSION and len(fetched(indexes)) == 1
    assert "pip's own, as its cpu build cannot be had from http://127.0.0.1:" in done.stderr


@pytest.mark.long  # not by itself, but run.sh is full
def test_torch_that_is_there_stays(clone: Path, bare: Path, indexes: Indexes) -> None:
    """As in a .venv that an older version of the script made, with pip's build for CUDA."""
    subprocess.run([clone / ".venv/bin/python", "-m", "pip", "install", "-q", "--no-index",
                    f"{indexes.url}/pypi/torch/torch-{VERSION}-py3-none-any.whl"],
                   env=pip_settings(bare), check=True)
    indexes.asked.clear()
    done = install(clone, bare)
    assert done.returncode == 0 and torch_of(clone) == VERSION and fetched(indexes) == []


@pytest.mark.long  # not by itself, but run.sh is full
def test_a_package_that_was_cut_short_is_installed_again(
        clone: Path, bare: Path, indexes: Indexes) -> None:
    assert install(clone, bare).returncode == 0
    for record in clone.glob(".venv/lib/python*/site-packages/torch-*.dist-info/RECORD"):
        record.unlink()
    for stamp in clone.glob(".venv/installed-*"):
        stamp.unlink()
    assert install(clone, bare).returncode == 0
    assert torch_of(clone) == f"{VERSION}+cpu" and len(fetched(indexes)) == 2


# With a GPU


@pytest.mark.long  # not by itself, but run.sh is full
@pytest.mark.parametrize(("cuda", "capability", "build"), [
    ("12.4", "8.6", "+cu126"), ("13.1", "12.0", ""), ("13.0", "6.1", "+cu126"), ("N/A", "8.6", ""),
])
def test_with_a_gpu_the_build_that_fits_its_driver_comes_at_once(
        cuda: str, capability: str, build: str, clone: Path, bare: Path, indexes: Indexes,
        tmp_path: Path) -> None:
    done = install(clone, gpu(tmp_path, cuda, capability) + str(bare), "")
    assert done.returncode == 0, done.stderr
    assert torch_of(clone) == VERSION + build and len(fetched(indexes)) == 1


@pytest.mark.long  # not by itself, but run.sh is full
def test_a_cpu_build_makes_way_for_one_that_fits_the_gpu(
        clone: Path, bare: Path, tmp_path: Path) -> None:
    assert install(clone, bare).returncode == 0
    done = install(clone, gpu(tmp_path, "13.0") + str(bare), "")
    assert done.returncode == 0 and torch_of(clone) == f"{VERSION}+cu130"
    assert install(clone, bare).returncode == 0 and torch_of(clone) == f"{VERSION}+cu130"


@pytest.mark.parametrize(("cuda", "capability", "advice"), [
    ("12.4", "8.6", "Until then its CUDA 12.6 build may do"),
    ("12.8", "8.6", "this build of torch suits it"), ("11.8", "8.6", "update the driver to 560"),
    ("12.8", "12.0", "update it to 580 or newer"),
])
def test_an_old_driver_without_the_index_stops_with_the_advice_and_fetches_nothing(
        cuda: str, capability: str, advice: str, clone: Path, bare: Path, indexes: Indexes,
        wheels: Path, tmp_path: Path) -> None:
    done = install(clone, gpu(tmp_path, cuda, capability) + str(bare), "", PIP_NO_INDEX="1",
                   PIP_FIND_LINKS=str(wheels / "links"))
    assert done.returncode == 3 and advice in done.stderr and "BARK_DEVICE=cpu" in done.stderr
    assert torch_of(clone) == "" and indexes.asked == []


@pytest.mark.long  # not by itself, but run.sh is full
def test_torch_that_fails_on_the_gpu_ends_the_worker_that_began_meanwhile(
        clone: Path, bare: Path, tmp_path: Path) -> None:
    path = Path(gpu(tmp_path, "13.0") + str(bare))
    with running_local(path, script=clone / SCRIPT.name, **NO_PIP_SETTINGS) as local:
        assert local.process.wait(START_SECONDS) == 3
    assert "torch does not load" in "".join(local.log) and local.answer == []
    assert not list(clone.glob(".venv/run-*"))


# What is said


def test_a_first_start_takes_six_lines_at_most_beside_pips_bar(clone: Path, bare: Path) -> None:
    with running_local(bare, "--listen", "base.en", script=clone / SCRIPT.name, BARK_LISTEN="off",
                       **NO_PIP_SETTINGS) as local:
        local.wait_until_callable()
    shown = [line for line in local.log if "━" not in line]
    until_ready = shown[: 1 + next(i for i, line in enumerate(shown) if "ready after" in line)]
    told = [line for line in until_ready if "a warning" not in line]
    assert len(told) + len(local.answer) <= 6
    assert NO_GPU in told[0] and told[1].startswith("installing torch")
    assert told[2].startswith("fetched 3 packages") and ": http://127.0.0.1:" in told[3]
    assert "a warning, BARK_LISTEN=base.en" in "".join(shown) and "chooses" not in "".join(shown)


@pytest.mark.long  # not by itself, but run.sh is full
def test_verbose_shows_the_rest(clone: Path, bare: Path) -> None:
    with running_local(bare, "--verbose", script=clone / SCRIPT.name, **NO_PIP_SETTINGS) as local:
        local.wait_until_callable()
    said = "".join(local.log)
    for words in ("Successfully installed", "starting bark-worker.py", "INFO listening on",
                  "8 segments at once"):
        assert words in said
    assert "chooses" not in said


@pytest.mark.long  # not by itself, but run.sh is full
def test_what_pip_says_is_shown_when_it_fails(clone: Path, bare: Path) -> None:
    requirements = clone / "requirements.txt"
    requirements.write_text(requirements.read_text().replace("other==1.0", "other==9.9"))
    done = install(clone, bare)
    assert done.returncode == 3
    assert "No matching distribution found for other==9.9" in done.stderr
    assert "pip could not install the worker's packages" in done.stderr


# Away with it


def clean(clone: Path, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run("local", "--clean", *options, path=path, script=clone / SCRIPT.name)


def test_clean_asks_then_removes_what_local_made(clone: Path, bare: Path) -> None:
    asked = clean(clone, bare)
    assert asked.returncode == 2 and "say --yes" in asked.stderr and (clone / ".venv").exists()
    assert clean(clone, bare, "--yes").returncode == 0
    assert not (clone / ".venv").exists() and (clone / "requirements.txt").exists()
    nothing = clean(clone, bare, "--yes")
    assert nothing.returncode == 0 and "there is no" in nothing.stderr


def test_clean_leaves_what_is_not_of_its_making(clone: Path, bare: Path) -> None:
    (clone / f".venv/made-by-{SCRIPT.name}").unlink()
    done = clean(clone, bare, "--yes")
    assert done.returncode == 1 and "has not the mark" in done.stderr
    assert (clone / ".venv/bin/python").exists()


@pytest.mark.long  # not by itself, but run.sh is full
def test_clean_follows_no_link(clone: Path, bare: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (clone / ".venv").rename(elsewhere)
    (clone / ".venv").symlink_to(elsewhere)
    done = clean(clone, bare, "--yes")
    assert done.returncode == 1 and "is a link" in done.stderr
    assert (elsewhere / "bin/python").exists()


@pytest.mark.long  # not by itself, but run.sh is full
def test_clean_leaves_a_venv_in_use(clone: Path, bare: Path) -> None:
    (clone / f".venv/run-{os.getpid()}").mkdir()
    done = clean(clone, bare, "--yes")
    assert done.returncode == 1 and f"process {os.getpid()}" in done.stderr
    assert (clone / ".venv/bin/python").exists()


@pytest.mark.long  # not by itself, but run.sh is full
def test_clean_removes_no_model(clone: Path, bare: Path) -> None:
    model = clone / ".venv/hub/models--suno--bark/snapshots/1/model.safetensors"
    model.parent.mkdir(parents=True)
    model.touch()
    done = clean(clone, bare, "--yes")
    assert done.returncode == 1 and "models--suno--bark" in done.stderr and model.exists()


# vastai


@pytest.fixture
def renting_path(bare: Path, tmp_path: Path) -> str:
    """A PATH with curl and jq, but no vastai."""
    (tmp_path / "rent").mkdir()
    return f"{folder_of(('curl', 'jq', 'mktemp'), tmp_path / 'rent')}:{bare}"


def typed(words: str, clone: Path, path: str, *command: str) -> tuple[int, str]:
    """Status and stderr of the script with a terminal at its stdin."""
    controller, terminal = pty.openpty()
    os.write(controller, f"{words}\n".encode())
    try:
        done = subprocess.run([BASH, str(clone / SCRIPT.name), *command], stdin=terminal,
                              env=pip_settings(path, HOME=str(clone)), text=True,
                              capture_output=True, timeout=START_SECONDS)
    finally:
        os.close(terminal)
        os.close(controller)
    return done.returncode, done.stderr


def has_vastai(clone: Path) -> bool:
    return any(clone.glob(".venv/lib/python*/site-packages/vastai-*"))


@pytest.mark.parametrize("command", [["search"], ["start"], ["endpoint", "up"]])
def test_what_orders_offers_to_install_vastai_and_takes_no_for_an_answer(
        command: list[str], clone: Path, renting_path: str, indexes: Indexes) -> None:
    status, said = typed("n", clone, renting_path, *command)
    assert status == 3 and "install it into .venv" in said and "vastai:" in said
    assert not has_vastai(clone) and indexes.asked == []


@pytest.mark.long  # not by itself, but run.sh is full
def test_vastai_is_installed_for_who_says_yes(clone: Path, renting_path: str) -> None:
    _, said = typed("y", clone, renting_path, "search")
    assert has_vastai(clone) and torch_of(clone) == "" and "installing vastai" in said


@pytest.mark.parametrize("command", [
    ["stop"], ["destroy"], ["status"], ["test"], ["logs"], ["env"], ["endpoint", "status"],
    ["endpoint", "down"]])
def test_no_other_command_offers_or_installs_anything(
        command: list[str], clone: Path, renting_path: str, indexes: Indexes) -> None:
    status, said = typed("y", clone, renting_path, *command)
    assert status == 3 and "install it into" not in said and "vastai:" in said
    assert not has_vastai(clone) and indexes.asked == []


def test_speaking_installs_its_own_part_once_and_never_torch(
        clone: Path, bare: Path, indexes: Indexes) -> None:
    line = sourcing("install_part speaking 'what reads books'", script=clone / SCRIPT.name)
    done, again = (subprocess.run(line, text=True, env=pip_settings(bare), capture_output=True,
                                  timeout=START_SECONDS) for _ in range(2))
    assert done.returncode == 0 and "installing what reads books" in done.stderr, done.stderr
    assert len(fetched(indexes, "pages-")) == 1 == len(fetched(indexes, ".whl"))
    assert_nothing_to_do(again)


def test_every_package_stands_in_one_of_four_parts() -> None:
    worker, listening, speaking, renting = (
        source(f"requirements_of {part}").stdout
        for part in ("worker", "listening", "speaking", "renting"))
    whole = (SCRIPT.parent / "requirements.txt").read_text(encoding="utf-8")
    assert [line for line in whole.splitlines() if "==" in line] == \
        [line for line in f"{worker}{listening}{speaking}{renting}".splitlines() if "==" in line]
    assert "torch==" in worker and "faster-whisper==" in listening and renting.count("==") == 1
    (shared,) = (word for word in worker.split() if word.startswith("av=="))
    assert shared in speaking.split() and "torch==" not in speaking
