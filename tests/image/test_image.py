"""The image, built and run: what it holds, as whom it speaks, how it ends. See tests/README.md."""

from __future__ import annotations

import base64
import io
import os
import re
import shlex
import subprocess
import time
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Worker, listening, wait_until
from containers import BUILT, Buildah, Docker, built_by_buildah, missing_for_buildah, output_of
from fake_hub import FakeHub
from manager import SCRIPT

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
BUILTIN_VOICE = "/app/builtin-voice"
Engine = Buildah | Docker


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Docker with the image that BARK_TEST_IMAGE names, else buildah with one of its own."""
    if image := os.environ.get("BARK_TEST_IMAGE"):
        yield Docker(image)
        return
    if missing := missing_for_buildah():
        pytest.skip(f"no image can be built: {missing}")
    began = time.monotonic()
    for built in built_by_buildah(tmp_path_factory.mktemp("image")):
        print(f"built in {time.monotonic() - began:.0f} s")
        yield built


@pytest.fixture
def buildah(engine: Engine) -> Buildah:
    if not isinstance(engine, Buildah):
        pytest.skip("needs an image that is built here, by buildah")
    return engine


def ask(engine: Engine, worker: Worker, user: str, command: str) -> str:
    return output_of(*engine.within(worker, user), "sh", "-c", command).strip()


def check_speech(worker: Worker) -> None:
    answer = worker.speak("Good morning.").json
    with wave.open(io.BytesIO(base64.b64decode(answer["audio"]))) as speech:
        samples = memoryview(speech.readframes(speech.getnframes())).cast("h")
    assert len(samples) > 0.5 * 24000 and max(samples) > 1000


def test_the_configuration_starts_the_worker_itself_as_no_root(engine: Engine) -> None:
    config = engine.config
    environment = dict(pair.split("=", 1) for pair in config["Env"])
    assert config["Entrypoint"] == ["python", "-u", "/app/bark-worker.py"] and not config.get("Cmd")
    assert config["User"] == "10001:10001" and list(config["ExposedPorts"]) == ["8080/tcp"]
    assert config["StopSignal"] == "SIGTERM" and config["Healthcheck"]["Test"][0] == "CMD"
    assert environment["HF_HOME"] == "/workspace/models" and not environment["BARK_MODEL"]
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"


@pytest.mark.parametrize("user", ["10001:10001", "0:0"])
def test_the_worker_speaks_without_a_gpu_and_ends_with_sigterm(engine: Engine, user: str) -> None:
    probe = engine.config["Healthcheck"]["Test"][1:]
    began = time.monotonic()
    with listening(engine.start(user, BARK_MODEL=BUILTIN_VOICE)) as worker:
        health = worker.wait_for("ready")
        print(f"ready as {user} after {time.monotonic() - began:.1f} s")
        notice = health["notice"].replace("builtin-voice", BUILTIN_VOICE)  # it tells no folders
        assert worker.log[0].endswith(f" WARNING {notice}\n")
        assert notice.startswith("no GPU") and BUILTIN_VOICE in notice
        check_speech(worker)
        for port, status in ((worker.port, 0), (1, 1)):  # nobody listens on port 1
            within = engine.within(worker, user, PORT=str(port))
            assert subprocess.run([*within, *probe], capture_output=True).returncode == status
        assert ask(engine, worker, user, "tr '\\0' ' ' </proc/1/cmdline") == \
            shlex.join(engine.config["Entrypoint"])
        assert ask(engine, worker, user, "awk '/^Uid/ {print $2}' /proc/1/status") + ":" + \
            ask(engine, worker, user, "awk '/^Gid/ {print $2}' /proc/1/status") == user
        ask(engine, worker, user, "touch $HF_HOME/mine && rm $HF_HOME/mine")
        engine.terminate(worker)
        assert worker.process.wait(20) == 0


MAKE_PRESET = """
import numpy
kinds = ("semantic", "coarse", "fine")
numpy.savez("/voices/anna.npz", **{
    f"{kind}_prompt": numpy.load(
        f"/app/builtin-voice/speaker_embeddings/v2/en_speaker_9_{kind}_prompt.npy")
    for kind in kinds})
"""


def test_a_preset_below_voices_speaks_and_the_page_and_metrics_are_served(engine: Engine) -> None:
    with listening(engine.start("10001:10001", BARK_MODEL=BUILTIN_VOICE)) as worker:
        worker.wait_for("ready")
        assert b"<!DOCTYPE html>" in worker.call("/", headers={"Accept": "text/html"}).body
        ask(engine, worker, "0:0", f"mkdir -p /voices && python -c {shlex.quote(MAKE_PRESET)}")
        (anna,) = [each for each in worker.call("/voices").json["voices"] if each.get("own")]
        assert anna["id"] == "anna" and worker.speak("Good morning.", voice="anna").status == 200
        assert re.search(rb"^bark_takes_total [1-9]", worker.call("/metrics").body, re.M)
        engine.terminate(worker)
        assert worker.process.wait(20) == 0


def test_vasts_on_start_command_starts_the_worker_and_starts_it_again(buildah: Buildah) -> None:
    on_start = output_of("bash", "-c", 'source "$1"; printf %s "$ON_START"', "bash", SCRIPT)
    with listening(buildah.start("0:0", "bash", "-c", f"exec >&2\n{on_start}\nwait",
                                 BARK_MODEL=BUILTIN_VOICE)) as worker:
        worker.wait_for("ready")
        check_speech(worker)
        # The loop's own command line has these words too, further in.
        ask(buildah, worker, "0:0", "for each in /proc/[0-9]*; do"
            " ! grep -aq '^python.*/app/bark-worker' $each/cmdline || kill -9 ${each#/proc/}; done")
        wait_until(lambda: sum("listening on" in line for line in worker.log) == 2, "restart", 60)
        worker.wait_for("ready")
        assert "bark-worker ended with status 137\n" in worker.log


def test_it_holds_what_the_worker_needs_and_no_more(engine: Engine) -> None:
    wanted = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    with listening(engine.start("0:0", BARK_MODEL=BUILTIN_VOICE)) as worker:
        def answer(command: str) -> str:
            return ask(engine, worker, "0:0", command)

        assert answer("ls /app").split() == [
            "LICENSE", "bark-worker.py", "builtin-voice", "listener.py", "page.html",
            "pyworker.py"]
        assert answer("python -c 'import faster_whisper, onnxruntime,"
                      " rapidfuzz, silero_vad, text_to_num, whisper_normalizer.english'") == ""
        assert answer("python -c 'import torch; print(torch.__version__)'").startswith(wanted)
        packages = answer("pip list --format freeze | sed 's/==.*//; s/-cu[0-9]*$//'").split()
        assert len(set(packages)) == len(packages), "two builds of CUDA"
        assert isinstance(engine, Docker) or not [p for p in packages if "nvidia" in p]
        assert answer("pip check") == "No broken requirements found."
        tools = "cc gcc g++ clang make ld nvcc rustc go git curl"
        assert answer(f"for tool in {tools}; do command -v $tool; done || true") == ""
        rests = "/root/.cache /workspace/.cache /tmp /var/cache/apt /var/lib/apt/lists"
        assert answer(f"find {rests} -type f -size +0 2>/dev/null || true") == ""
        assert answer("find /app /workspace -size +30M") == "", "weights of Suno's"
        engine.terminate(worker)
        assert worker.process.wait(20) == 0


def test_a_change_of_code_ships_kilobytes(buildah: Buildah) -> None:
    before = buildah.layers(BUILT, "before")
    with (buildah.context / "bark-worker.py").open("a") as worker:
        worker.write("# changed\n")
    buildah.build("localhost/changed")
    after = buildah.layers("localhost/changed", "after")
    print("layers, MB compressed:", *(f"{size / 1e6:.3f}" for size in before.values()))
    assert list(before)[:-1] == list(after)[:-1]
    assert len(set(after) - set(before)) == 1 and list(after.values())[-1] < 200_000


def test_weights_that_were_baked_in_speak_without_a_network(
        buildah: Buildah, toy: Path) -> None:
    with FakeHub({"suno/bark": toy}, advertised={"text_2.pt": 5_350_000_000}) as hub:
        buildah.build("localhost/baked", BAKE="suno/bark", HF_ENDPOINT=hub.url)
    buildah.mount("localhost/baked")
    with listening(buildah.start("10001:10001", HF_HUB_OFFLINE="1")) as worker:
        assert worker.wait_for("ready")["model_id"] == "model"  # of /app/model: it tells no folders
        assert worker.speak("Hi.").status == 200
        assert ask(buildah, worker, "0:0", "find / -xdev -name '*.pt' -path '/app/*'") == ""
        buildah.terminate(worker)  # the kernel forgets whose child it is once its user changes
        assert worker.process.wait(20) == 0
