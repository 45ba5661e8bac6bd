"""compose.yaml against the image, README's `docker run` and the worker's settings."""

from __future__ import annotations

import re
import shlex
from types import ModuleType
from typing import Any

import yaml
from conftest import ROOT
from test_dockerfile import instructions

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def docker_run() -> tuple[dict[str, str], str]:
    """The options of README's command for a GPU, and its image."""
    command = re.search(r"^docker run -d (?:.*\\\n)*.*$", README, re.M)[0].replace("\\\n", "")
    words = shlex.split(command)[3:-1]
    return dict(zip(words[::2], words[1::2], strict=True)), shlex.split(command)[-1]


def test_both_services_are_what_readme_runs() -> None:
    options, image = docker_run()
    volume, folder = options["-v"].split(":")
    for service in SERVICES.values():
        assert service["image"] == f"${{BARK_IMAGE:-{image}}}"
        assert service["restart"] == options["--restart"]
        assert service["ports"] == [options["-p"]]
        assert service["volumes"] == [f"models:{folder}"]
    assert COMPOSE["volumes"] == {"models": {"name": volume}}


def test_only_what_is_asked_for_by_name_runs_without_a_gpu() -> None:
    assert [name for name, service in SERVICES.items() if "profiles" not in service] == ["bark"]
    (device,) = SERVICES["bark"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    cpu = SERVICES["cpu"]
    assert cpu["profiles"] == ["cpu"] and "deploy" not in cpu
    assert cpu["environment"]["BARK_DEVICE"] == "cpu"
    copied = {words[-1] for words in map(str.split, instructions("COPY"))}
    assert cpu["environment"]["BARK_MODEL"] in copied


def test_what_the_image_settles_is_left_to_it() -> None:
    """Its health check, user and folders; a variable without a value here is one without there."""
    (port,) = instructions("EXPOSE")
    settled = {name for line in instructions("ENV") for name in re.findall(r"(\w+)=", line)}
    assert instructions("HEALTHCHECK") and instructions("USER")
    for service in SERVICES.values():
        assert service["ports"][0].endswith(f":{port}")
        assert not service.keys() & {"healthcheck", "user", "command", "entrypoint", "env_file"}
        passed = {name for name, value in service["environment"].items() if value is None}
        assert passed & settled == set()
    assert f"HF_HOME={SERVICES['bark']['volumes'][0].split(':')[1]}" in instructions("ENV")[0]


def test_every_setting_can_be_made_and_no_key_stands_in_the_file(bark: ModuleType) -> None:
    """Others are the image's, or for an instance of Vast's."""
    others = {"PORT", "HOST", "BARK_VOICES_DIR", "BARK_DEVICE", "BARK_IDLE_STOP",
              "BARK_START_LIMIT", "BARK_MAX_HOURS"}
    names = {variable.name for variable in bark.VARIABLES}
    environment = SERVICES["bark"]["environment"]
    assert environment.keys() == names - others
    given = {name: value for name, value in environment.items() if value is not None}
    assert given == {"BARK_MODEL": "${BARK_MODEL:-suno/bark}"}
