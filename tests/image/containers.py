"""Two ways to run the image's worker: in Docker, and by buildah where there is no Docker daemon.

Both start what the image's configuration says, on this machine's network, the worker as process 1.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from conftest import ROOT, Worker

DOCKERFILE = ROOT / "Dockerfile.ghcr"
BASE, BUILT = "localhost/bark-base", "localhost/bark-worker"
# vfs works everywhere, but copies gigabytes at every step: overlay takes a fifth of the time.
STORAGE = os.environ.get("STORAGE_DRIVER", "vfs")
SETTINGS = {"HOST": "127.0.0.1", "PORT": "0", "OMP_NUM_THREADS": "1"}
PIP_OPTIONS = {"index-url", "extra-index-url", "find-links", "cert", "constraint", "trusted-host",
               "proxy", "default-timeout", "no-index"}
# Process 1 of its own namespace, below a root of its own, with an environment of its own: $1 is
# the root, $2 user and group, the rest NAME=VALUE... COMMAND...
CONTAIN = """
root=$1 user=$2
shift 2
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
exec chroot --userspec="$user" "$root" env -i -C /workspace "$@"
"""


def output_of(*command: str | Path, **options: Any) -> str:
    """What a command prints. Its complaints show when a test that runs it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr[-4000:]}"
    return done.stdout


def pairs(environment: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in environment.items()]


class Docker:
    """An image that Docker has."""

    def __init__(self, image: str):
        self.image, self.name = image, f"bark-test-{os.getpid()}"

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads(output_of("docker", "image", "inspect", "--format", "{{json .Config}}",
                                    self.image))

    def start(self, user: str, **settings: str) -> subprocess.Popen[str]:
        variables = [word for pair in pairs(SETTINGS | settings) for word in ("--env", pair)]
        return subprocess.Popen(["docker", "run", "--rm", "--network", "host", "--user", user,
                                 "--name", self.name, *variables, self.image],
                                stderr=subprocess.PIPE, text=True)

    def within(self, worker: Worker, user: str, **settings: str) -> list[str]:
        """What precedes a command to run it beside the worker, as `docker exec` does."""
        variables = [word for pair in pairs(settings) for word in ("--env", pair)]
        return ["docker", "exec", "--user", user, *variables, self.name]

    def terminate(self, worker: Worker) -> None:
        worker.process.terminate()  # `docker run` hands the signal on to process 1


class Buildah:
    """An image that buildah builds here, from a copy of what the Dockerfile needs."""

    def __init__(self, folder: Path):
        self.folder, self.context = folder, folder / "context"
        self.context.mkdir()
        for name in (".dockerignore", "requirements.txt", "LICENSE", "bark-worker.py",
                     "listener.py", "page.html", "pyworker.py"):
            shutil.copy2(ROOT / name, self.context)
        shutil.copytree(ROOT / "builtin-voice", self.context / "builtin-voice")
        self.root, self.config = Path(), {}

    def run(self, *arguments: str | Path) -> str:
        return output_of("buildah", "--storage-driver", STORAGE, "--root", self.folder / "store",
                         "--runroot", self.folder / "run", *arguments).strip()

    @cached_property
    def base(self) -> str:
        """The Dockerfile's own base, else the same Debian with its own Python of that version."""
        pinned = re.search(r"^FROM (\S+@sha256:\S+) AS python$", DOCKERFILE.read_text(), re.M)[1]
        try:
            self.run("pull", "--quiet", pinned)
            return pinned
        except AssertionError as refusal:
            print(f"a base by debootstrap, as {pinned} cannot be pulled: {refusal}")
        tree = self.folder / "base"
        output_of("debootstrap", "--variant=minbase", "--include=ca-certificates,python3-pip",
                  "bookworm", tree)
        for mark in tree.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            mark.unlink()  # else Debian's pip refuses; python:slim's has no such mark
        (tree / "usr/bin/python").symlink_to("python3")
        for rest in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(tree / rest)
        container = self.run("from", "scratch")
        self.run("add", container, tree, "/")
        self.run("config", "--env", "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:"
                 "/sbin:/bin", container)
        self.run("commit", "--quiet", "--rm", container, BASE)
        shutil.rmtree(tree)
        return BASE

    def build(self, tag: str = BUILT, **arguments: str) -> None:
        index = os.environ.get("TORCH_INDEX") or own_torch_index()
        arguments = {"BASE": self.base, "CUDA": "cpu", **arguments,
                     **({"TORCH_INDEX": index} if index else {})}
        self.run("build", "--isolation", "chroot", "--layers", "--format", "docker",
                 "--file", DOCKERFILE, "--tag", tag, *self.pip_volumes(),
                 *(word for pair in pairs(arguments) for word in ("--build-arg", pair)),
                 self.context)

    def pip_volumes(self) -> list[str]:
        """This machine's settings of pip for the build: mounted, so that the image has none."""
        settings = pip_settings()
        config = self.folder / "pip.conf"
        config.write_text("[global]\n" + "".join(
            f"{name} = {' '.join(value.split())}\n" for name, value in settings.items()))
        words = [word for value in settings.values() for word in value.split()]
        local = {Path(word) for word in words if word.startswith("/")} | {
            Path(word.removeprefix("file://")).parent  # an index of files points beside itself
            for word in words if word.startswith("file:///")}
        volumes = [f"{path}:{path}:ro" for path in sorted(local) if path.exists()]
        return [word for volume in [f"{config}:/etc/pip.conf:ro", *volumes]
                for word in ("--volume", volume)]

    def mount(self, image: str = BUILT) -> None:
        """Lays the image out as the root that `start` uses, with the image's configuration."""
        self.root = Path(self.run("mount", self.run("from", image)))
        inspected = json.loads(self.run("inspect", "--type", "image", image))
        self.config = inspected["Docker"]["config"]

    def environment(self, **settings: str) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.config["Env"]) | SETTINGS | settings

    def start(self, user: str, *command: str, **settings: str) -> subprocess.Popen[str]:
        """Process 1 by `command`, else by the entrypoint; it ends with the process returned."""
        return subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", CONTAIN, "sh",
             self.root, user, *pairs(self.environment(**settings)),
             *(command or self.config["Entrypoint"])], stderr=subprocess.PIPE, text=True)

    def process_1(self, worker: Worker) -> str:
        """Its number out here: the only child of `unshare`."""
        number = worker.process.pid
        return Path(f"/proc/{number}/task/{number}/children").read_text().strip()

    def within(self, worker: Worker, user: str, **settings: str) -> list[str]:
        uid, gid = user.split(":")
        return ["nsenter", "--target", self.process_1(worker), "--mount", "--pid", "--root",
                "--wd", "--setuid", uid, "--setgid", gid, "env", "-i",
                *pairs(self.environment(**settings))]

    def terminate(self, worker: Worker) -> None:
        os.kill(int(self.process_1(worker)), 15)

    def layers(self, image: str, name: str) -> dict[str, int]:
        """Digest to compressed size, as a registry would get them."""
        folder = self.folder / "pushed"
        self.run("push", "--quiet", image, f"oci:{folder}:{name}")
        for entry in read_json(folder / "index.json")["manifests"]:
            if entry["annotations"]["org.opencontainers.image.ref.name"] == name:
                manifest = read_json(folder / "blobs" / entry["digest"].replace(":", "/"))
                return {layer["digest"]: layer["size"] for layer in manifest["layers"]}
        raise AssertionError(f"{name} was not pushed")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def pip_settings() -> dict[str, str]:
    """What pip's configuration and environment say here about where packages come from."""
    listed = output_of(sys.executable, "-m", "pip", "config", "list")
    found = re.findall(r"^[^.\n]+\.([\w-]+)=(.*)$", listed, re.M)
    return {name: ast.literal_eval(value) for name, value in found if name in PIP_OPTIONS}


def own_torch_index() -> str:
    """pip's own index where wheels lie on this machine, torch's supposedly among them, else ''."""
    from pip._internal.models.index import PyPI

    settings = pip_settings()
    return settings.get("index-url", PyPI.simple_url) if "find-links" in settings else ""


def missing_for_buildah() -> str:
    """Why no image can be built here, and what to do about it; '' if it can."""
    if not sys.platform.startswith("linux"):
        return "buildah needs Linux"
    if os.geteuid() != 0:
        return "building and mounting a root needs root: sudo -E tests/long.sh"
    absent = [tool for tool in ("buildah", "debootstrap") if not shutil.which(tool)]
    return f"{absent} missing: apt install {' '.join(absent)}" if absent else ""


def built_by_buildah(folder: Path) -> Iterator[Buildah]:
    """The image, built and mounted; its gigabytes removed afterwards."""
    engine = Buildah(folder)
    try:
        engine.build()
        engine.mount()
        yield engine
    finally:
        engine.run("umount", "--all")
        # buildah mounts an overlay's folder on itself, and leaves it so
        subprocess.run(["umount", folder / "store" / STORAGE], capture_output=True, check=False)
        shutil.rmtree(folder)
