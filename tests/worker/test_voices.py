"""Voices: what is listed of them, samples to hear, and presets of one's own in a folder."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import socket
import struct
import threading
import tracemalloc
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import BUILTIN, WORKER, Answer, Worker, running_worker, wait_until
from decoding import decode

Prompts = dict[str, np.ndarray]


def prompts(seed: int = 0, seconds: float = 4.0) -> Prompts:
    """A preset as Suno's `save_as_prompt` gets it: int64, int64 and int32."""
    rng, frames = np.random.default_rng(seed), int(75 * seconds)
    fine = rng.integers(0, 1024, (8, frames), dtype=np.int32)
    return {"semantic_prompt": rng.integers(0, 10_000, int(49.9 * seconds)),
            "coarse_prompt": fine[:2].astype(np.int64), "fine_prompt": fine}


def archive(**members: np.ndarray | bytes) -> bytes:
    """A zip of .npy files, or of whatever bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members.items():
            data = io.BytesIO()
            if isinstance(content, np.ndarray):
                np.save(data, content, allow_pickle=True)
            out.writestr(f"{name}.npy", data.getvalue() or content)
    return file.getvalue()


GOOD = archive(**prompts())


@pytest.fixture(scope="module")
def facts(bark: ModuleType, toy: Path) -> Any:
    return bark.ModelFacts(toy)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "voices").mkdir()
    return tmp_path / "voices"


@pytest.fixture
def voices(bark: ModuleType, facts: Any, folder: Path) -> Any:
    return bark.Voices(facts, "v2/en_speaker_6", str(folder))


# Presets that are good

@pytest.mark.parametrize(("name", "write"), [
    ("Suno's save_as_prompt", np.savez),
    ("compressed", np.savez_compressed),
    ("tts-generation-webui, int16 and notes beside", lambda path, **ids: np.savez(
        path, **{name: each.astype(np.int16) for name, each in ids.items()},
        metadata=list('{"text": "x"}'))),
    ("a batch of one", lambda path, **ids: np.savez(
        path, **{name: each[None] for name, each in ids.items()})),
    ("big-endian, by columns", lambda path, **ids: np.savez(
        path, **{name: np.asfortranarray(each.astype(">u2")) for name, each in ids.items()})),
])
def test_a_preset_is_read_however_the_tools_write_it(
        voices: Any, folder: Path, name: str, write: Callable[..., None]) -> None:
    expected = prompts()
    write(folder / "anna.npz", **expected)
    found = voices.folder.look()
    assert list(found.voices) == ["anna"] and not found.refused
    read = found.voices["anna"]
    for ours, theirs in zip((read.semantic, read.coarse, read.fine), expected.values(),
                            strict=True):
        assert ours.dtype == np.int64 and np.array_equal(ours, theirs)


def test_a_preset_speaks_as_the_models_own_with_the_same_ids(
        bark: ModuleType, facts: Any, folder: Path) -> None:
    own = facts.voices["v2/en_speaker_3"]
    np.savez(folder / "anna.npz", semantic_prompt=own.semantic, coarse_prompt=own.coarse,
             fine_prompt=own.fine)
    narrator = bark.Narrator(facts, "anna", voices_dir=str(folder))
    (segment,) = narrator.plan("Hi.", None, 7).segments
    (same,) = narrator.plan("Hi.", "v2/en_speaker_3", 7).segments
    assert repr(segment) == repr(same) and segment.identity != same.identity


@pytest.mark.parametrize(("name", "language"), [
    ("anna", "en"), ("de_anna", "de"), ("my_voice", "en"), ("en_speaker_3", "en"),
    ("nl_speaker_1", "nl")])
def test_the_language_is_what_the_name_tells(bark: ModuleType, name: str, language: str) -> None:
    assert bark.voice_language(name) == language


def test_a_name_is_what_people_call_a_voice(voices: Any, folder: Path) -> None:
    names = ["7", "Anna Karenina", "Zoë", "anna", "v1.2_b-c", "हिन्दी", "田中"]
    for name in names:
        file = f"{name}.npz" if name != "Zoë" else "Zoë.NPZ"
        (folder / unicodedata.normalize("NFD", file)).write_bytes(GOOD)  # as macOS may have it
    assert sorted(voices.folder.look().voices) == names
    assert [voice["id"] for voice in voices.listed() if voice.get("own")] == [
        voice["id"] for voice in voices.listed()[3:10]], "behind three aliases"
    for name in names:
        assert voices.find(unicodedata.normalize("NFD", name).upper())[0] == name


# Files that are none

@pytest.mark.parametrize("name", [
    "..", ".hidden", " blank", "blank ", "dot.", "a\tb", "a\nb", "-rf", "a\u200bb", "a\u202eb",
    "x" * 65, "a:b", "a*b", "a\\b", "a%2Fb", "\udcff"])
def test_what_is_no_name_is_refused(bark: ModuleType, name: str) -> None:
    with pytest.raises(bark.PresetError, match="no name for a voice"):
        bark.preset_name(f"{name}.npz")


def test_a_file_that_has_the_name_of_another_voice_is_refused(voices: Any, folder: Path) -> None:
    others = {"male": "male", "MALE": "male", "default": "default", "Onyx": "onyx",
              "alloy": "alloy", "anna": "Anna"}
    for name in ("Anna", *others):
        (folder / f"{name}.npz").write_bytes(GOOD)
    found = voices.folder.look()
    assert list(found.voices) == ["Anna"]
    assert found.refused == {f"{name}.npz": f"has the name of another voice, {other}: rename it"
                             for name, other in others.items()}


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def npy(head: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """A .npy file with a head of one's own."""
    text = head.encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def head(shape: str, kind: str = "<i8") -> str:
    return f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}"


def changed(**members: Any) -> bytes:
    return archive(**{**prompts(), **members})


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


GOOD_FINE = prompts()["fine_prompt"]
BAD_FILES = {
    "empty": (b"", "no .npz"),
    "no zip": (b"RIFF....WAVE", "no .npz"),
    "cut short": (GOOD[:-30], "no .npz"),
    "a flipped bit": (flipped(GOOD), "no .npz"),
    "too big": (b"x" * 1_000_001, "more than 1000000 bytes"),
    "lacks one": (archive(**{n: a for n, a in prompts().items() if n != "coarse_prompt"}),
                  "lacks coarse_prompt"),
    "floats": (changed(semantic_prompt=np.zeros(200)), "holds '<f8'"),
    "flags": (changed(semantic_prompt=np.zeros(200, bool)), "holds '|b1'"),
    "text": (changed(semantic_prompt=np.array(["a"] * 200)), "holds '<U1'"),
    "records": (changed(semantic_prompt=np.zeros(200, [("a", "<i8")])), "not whole numbers"),
    "another shape": (changed(fine_prompt=GOOD_FINE[:2]), r"shape \(2, 300\), not \(8, length\)"),
    "transposed": (changed(fine_prompt=GOOD_FINE.T), r"shape \(300, 8\)"),
    "a batch of two": (changed(semantic_prompt=np.zeros((2, 200), int)), r"shape \(2, 200\)"),
    "no number at all": (changed(semantic_prompt=np.array(7)), "has shape"),
    "none": (changed(semantic_prompt=np.zeros(0, int)), "or none"),
    "id too high": (changed(semantic_prompt=np.full(200, 10_000)), "outside 0 to 9999"),
    "code too high": (changed(fine_prompt=np.full((8, 300), 1024)), "outside 0 to 1023"),
    "negative": (changed(coarse_prompt=np.full((2, 300), -1)), "outside 0 to 1023"),
    "huge unsigned": (changed(semantic_prompt=np.full(200, 2**64 - 1, np.uint64)), "outside"),
    "too long": (changed(semantic_prompt=np.zeros(6000, np.int16)), "120.2 s long"),
    "too short": (changed(semantic_prompt=np.zeros(5, np.int16)), "0.1 s long"),
    "a head that lies": (changed(semantic_prompt=npy(head("(10**9,)"))), ""),
    "a head of a giant": (changed(semantic_prompt=npy(head("(1000000000000,)"))), "than its head"),
    "a negative length": (changed(semantic_prompt=npy(head("(-1,)"), bytes(8))), "than its head"),
    "nested without end": (changed(semantic_prompt=npy("(" * 900)), ""),
    "no head": (changed(semantic_prompt=b"\x93NUMPY"), ""),
    "a head that is code": (changed(semantic_prompt=npy("__import__('os').abort()")), ""),
    "a head of version 3": (changed(semantic_prompt=npy(head("(1,)"), version=b"\x03\x00")),
                            "another kind"),
    "a list of one": (changed(semantic_prompt=npy(head("(1,)", "|O"), b"\x80\x04N.")), "|O"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_that_is_no_preset_is_told_with_what_is_wrong(
        voices: Any, folder: Path, what: str) -> None:
    content, reason = BAD_FILES[what]
    (folder / "bad.npz").write_bytes(content)
    (folder / "good.npz").write_bytes(GOOD)
    found = voices.folder.look()
    assert list(found.voices) == ["good"] and list(found.refused) == ["bad.npz"]
    told = found.refused["bad.npz"]
    assert re.search(reason, told) and "\n" not in told and len(told) < 200


def test_pickled_arrays_are_refused_and_run_no_code(
        voices: Any, folder: Path, tmp_path: Path) -> None:
    bomb = np.array([Bomb(tmp_path / "ran")], object)
    np.savez(folder / "bad.npz", **{**prompts(), "fine_prompt": bomb})
    np.savez(folder / "beside.npz", **prompts(), metadata=bomb)
    found = voices.folder.look()
    assert "holds '|O', not whole numbers" in found.refused["bad.npz"]
    assert list(found.voices) == ["beside"] and not (tmp_path / "ran").exists()
    with np.load(folder / "bad.npz", allow_pickle=True) as loaded:
        assert loaded["fine_prompt"].size and (tmp_path / "ran").exists(), "it would have run"


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb_takes_no_memory(voices: Any, folder: Path, method: int) -> None:
    with zipfile.ZipFile(folder / "bomb.npz", "w", method) as out:
        for name in ("semantic_prompt", "coarse_prompt"):
            with out.open(f"{name}.npy", "w") as member:
                np.save(member, prompts()[name])
        with out.open("fine_prompt.npy", "w") as member:
            member.write(npy(head("(8, 62500000)", "<i2")))
            for _ in range(24):
                member.write(bytes(1_000_000))
    assert (folder / "bomb.npz").stat().st_size < 1_000_000
    tracemalloc.start()
    found = voices.folder.look()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(found.refused) == ["bomb.npz"] and peak < 20_000_000


def test_a_folder_of_entries_without_number_takes_no_memory(voices: Any, folder: Path) -> None:
    with zipfile.ZipFile(folder / "many.npz", "w") as out:
        for number in range(8000):
            out.writestr(str(number), b"")
    tracemalloc.start()
    assert "lacks" in voices.folder.look().refused["many.npz"]
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_an_encrypted_member_is_refused(voices: Any, folder: Path) -> None:
    data = bytearray(GOOD)
    for sign, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(sign) + at] |= 1
    (folder / "bad.npz").write_bytes(data)
    assert "RuntimeError" in voices.folder.look().refused["bad.npz"]


def test_what_is_no_file_or_lies_elsewhere_is_refused(
        voices: Any, folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "secret.npz", folder / "real.npz"):
        path.write_bytes(GOOD)
    (folder / "out.npz").symlink_to(tmp_path / "secret.npz")
    (folder / "up.npz").symlink_to("../secret.npz")
    (folder / "zero.npz").symlink_to("/dev/zero")
    (folder / "loop.npz").symlink_to("loop.npz")
    (folder / "nowhere.npz").symlink_to("gone.npz")
    (folder / "within.npz").symlink_to("real.npz")  # as Kubernetes mounts files
    (folder / "deep.npz").mkdir()
    os.mkfifo(folder / "pipe.npz")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket.npz"))
    found = voices.folder.look()
    assert sorted(found.voices) == ["real", "within"]
    reasons = {"out": "leads out", "up": "leads out", "zero": "leads out",
               "loop": "Too many levels of symbolic links", "nowhere": "No such file",
               "deep": "cannot be read: Is a directory",
               "pipe": "no regular file", "socket": "cannot be read"}
    assert len(found.refused) == len(reasons)
    assert all(words in found.refused[f"{name}.npz"] for name, words in reasons.items())


def test_other_files_are_let_alone(voices: Any, folder: Path) -> None:
    for name in ("README.md", ".npz", ".hidden.npz", "anna.wav", "anna.npz.part"):
        (folder / name).write_text("x")
    assert voices.folder.look() == ({}, {})


# What changes

def test_a_folder_that_changes_is_looked_at_again_and_each_fault_told_once(
        bark: ModuleType, voices: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(folder / "anna.npz", **prompts(1))
    (folder / "bad.npz").write_bytes(b"no")
    first = voices.folder.look()
    for _ in range(3):
        again = voices.folder.look()
    assert again.voices["anna"] is first.voices["anna"], "read once"
    assert caplog.text.count("bad.npz") == 1 and "is no .npz" in caplog.text
    np.savez(folder / "anna.npz", **prompts(2))
    np.savez(folder / "bad.npz", **prompts(3))
    later = voices.folder.look()
    assert sorted(later.voices) == ["anna", "bad"] and not later.refused
    assert later.voices["anna"] is not first.voices["anna"]
    assert repr(later.voices["anna"]) != repr(first.voices["anna"])
    (folder / "anna.npz").unlink()
    with pytest.raises(bark.InvalidRequest, match="'anna' is unknown"):
        voices.find("anna")


def test_a_default_that_is_ones_own_is_as_the_folder_is_now(
        bark: ModuleType, facts: Any, folder: Path) -> None:
    np.savez(folder / "anna.npz", **prompts(1))
    narrator = bark.Narrator(facts, "anna", voices_dir=str(folder))
    began = narrator.plan("Hi.", None, 7)
    np.savez(folder / "anna.npz", **prompts(2))
    assert narrator.plan("Hi.", None, 7).segments[0].voice is not (
        began.segments[0].voice), "which a request under way keeps"
    assert narrator.voices.openais()["alloy"] == "anna"
    (folder / "anna.npz").unlink()
    with pytest.raises(bark.InvalidRequest, match="'anna' is unknown"):
        narrator.plan("Hi.", None, 7)


@pytest.mark.parametrize("where", ["missing", "a file"])
def test_a_folder_that_cannot_be_read_is_told_and_may_come_later(
        bark: ModuleType, facts: Any, tmp_path: Path, where: str,
        caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "voices"
    if where == "a file":
        folder.write_text("x")
    voices = bark.Voices(facts, "male", str(folder))
    for _ in range(2):
        assert "cannot be read" in voices.folder.look().refused["."]
    assert caplog.text.count("cannot be read") == 1
    folder.unlink(missing_ok=True)
    folder.mkdir()
    (folder / "anna.npz").write_bytes(GOOD)
    assert list(voices.folder.look().voices) == ["anna"]


def test_of_too_many_files_the_first_are_used(
        bark: ModuleType, voices: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bark, "MAX_PRESETS", 2)
    for name in "cab":
        (folder / f"{name}.npz").write_bytes(GOOD)
    found = voices.folder.look()
    assert list(found.voices) == ["a", "b"] and "holds 3 presets" in found.refused["."]


def test_many_threads_that_look_at_once_get_the_same_voice(voices: Any, folder: Path) -> None:
    (folder / "anna.npz").write_bytes(GOOD)
    (folder / "bad.npz").write_bytes(b"no")
    gate, seen = threading.Barrier(8), []

    def look() -> None:
        gate.wait(10)
        seen.append(voices.folder.look().voices["anna"])

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(seen) == 8 and len(set(map(id, seen))) == 1


# A worker that has them

KEY = "sesame-9f2c"
HAS_KEY = {"Authorization": f"Bearer {KEY}"}
OPEN = ("/voices", "/health", "/v1/audio/voices", "/v1/models/tts-1", "/v1/models", "/", "/metrics")
LAUNCHER = """\
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("bark_worker", {worker!r})
worker = importlib.util.module_from_spec(spec)
sys.modules["bark_worker"] = worker
spec.loader.exec_module(worker)
worker.own_folder = lambda: pathlib.Path({own!r})
sys.exit(worker.main())
"""


@contextlib.contextmanager
def started(own: Path, model: Path, **settings: str) -> Iterator[Worker]:
    """A ready worker that keeps what is its own in the folder `own`."""
    own.parent.mkdir(exist_ok=True)
    script = own.parent / "launch.py"
    script.write_text(LAUNCHER.format(worker=str(WORKER), own=str(own)))
    with running_worker(script, BARK_MODEL=str(model), **settings) as worker:
        worker.wait_for("ready")
        yield worker


def made(worker: Worker) -> int:
    """Segments that it has made so far."""
    metrics = get(worker, "/metrics").body.decode()
    return int(float(re.search(r'^bark_segments_total{source="model"} (\S+)', metrics, re.M)[1]))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the worker of these tests keeps its own, beside a folder of presets."""
    home = tmp_path_factory.mktemp("home")
    (home / "voices").mkdir()
    np.savez(home / "voices" / "Zuleika.npz", **prompts(1))
    np.savez(home / "voices" / "de_Quirin Süß.npz", **prompts(2))
    (home / "voices" / "Xanthippe.npz").write_bytes(b"no")
    return home


@pytest.fixture(scope="module")
def keyed(home: Path, toy: Path) -> Iterator[Worker]:
    """With a key, presets of one's own, one of them by default, and a single slot."""
    with started(home / "own", toy, BARK_API_KEY=KEY, BARK_VOICES_DIR=str(home / "voices"),
                 BARK_VOICE="zuleika", BARK_MAX_BATCH="1", BARK_CORS_ORIGINS="*",
                 BARK_METRICS="open", TTS_MAX_LENGTH="5000") as worker:
        yield worker


def get(worker: Worker, path: str, method: str = "GET", **headers: str) -> Answer:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return worker.call(path, method=method, headers={**HAS_KEY, **headers})


# Presets of one's own, for who has the key

def test_who_has_the_key_sees_ones_own_voices_and_what_is_refused(keyed: Worker) -> None:
    listing = get(keyed, "/voices").json
    own = [voice for voice in listing["voices"] if voice.get("own")]
    assert [(voice["id"], voice["language"]) for voice in own] == [
        ("Zuleika", "en"), ("de_Quirin Süß", "de")]
    assert listing["default"] == get(keyed, "/health").json["voice"] == "Zuleika"
    (refused,) = listing["refused"]
    assert refused["file"] == "Xanthippe.npz" and "is no .npz" in refused["reason"]
    openais = {voice["id"]: voice for voice in get(keyed, "/v1/audio/voices").json["voices"]}
    assert openais["alloy"]["alias_of"] == "Zuleika" and "de_Quirin Süß" in openais
    named = get(keyed, "/v1/models/tts-1").json["voices"]
    assert {"name": "de_Quirin Süß", "language": "de"} in named


@pytest.mark.parametrize("path", [*OPEN, "/voices/Zuleika/sample", "/voices/zulei/sample"])
def test_who_lacks_the_key_learns_no_name_and_no_file(
        keyed: Worker, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = keyed.call(path, headers=headers)
        assert answer.status == (401 if path.endswith("sample") else 200)
        told = answer.body.decode() + str(answer.headers)
        for secret in ("uleika", "uirin", "anthippe", "refused", "voices_dir", '"own"'):
            assert secret not in told
    if path == "/voices":
        assert answer.json["default"] == "default" and len(answer.json["voices"]) == 133
    if path == "/health":
        assert answer.json["voice"] == "default"


def test_a_voice_of_ones_own_speaks_on_every_endpoint_and_its_preset_may_change(
        keyed: Worker, home: Path) -> None:
    def spoken(**fields: object) -> bytes:
        answer = keyed.call("/synthesize", {"text": "Hi.", "seed": 5, **fields},
                            headers={**HAS_KEY, "Accept": "audio/pcm"})
        assert answer.status == 200
        return answer.body

    first = spoken(voice="Zuleika")
    assert spoken() == spoken(voice=" ZULEIKA ") == first != spoken(voice="male")
    openai = keyed.call("/v1/audio/speech", {"input": "Hi.", "voice": "alloy", "seed": 5,
                                             "response_format": "pcm"}, headers=HAS_KEY)
    assert openai.body == first
    np.savez(home / "new.npz", **prompts(3))
    (home / "new.npz").replace(home / "voices" / "Zuleika.npz")
    assert spoken(voice="Zuleika") != first, "nothing of the old one is kept"
    wrong = keyed.call("/synthesize", {"text": "Hi.", "voice": "Zuleka"}, headers=HAS_KEY)
    assert wrong.status == 400 and "did you mean Zuleika" in wrong.json["error"]["message"]


@pytest.mark.parametrize("name", ["../voices/Zuleika", "/etc/passwd", "voices/Zuleika",
                                  "Zuleika.npz", "Zuleika\0", "..", "Xanthippe"])
def test_a_name_is_never_a_path(keyed: Worker, name: str) -> None:
    answer = keyed.call("/synthesize", {"text": "Hi.", "voice": name}, headers=HAS_KEY)
    assert (answer.status, answer.json["error"]["code"]) == (400, "unknown_voice")


def test_a_default_voice_that_cannot_be_had_is_told_and_others_names_are_in_the_log_alone(
        bark: ModuleType, toy: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "Ottilie.npz").write_bytes(b"no")
    (folder / "Ottilia.npz").write_bytes(GOOD)

    def told(voice: str) -> str:
        config = bark.Config(voice=voice, voices_dir=str(folder), quality=False)
        with pytest.raises(bark.ConfigError) as caught:
            bark.load_engine(config, bark.State(), None, str(toy), bark.torch.device("cpu"))
        assert caught.value.exit_status == 2 and "Ottili" not in str(caught.value)
        return str(caught.value)

    assert "'Otto' is unknown" in (unknown := told("Otto")) and "has no 'Otto.npz'" in unknown
    assert not caplog.text
    assert "the log says why" in told("Ottilie")
    assert "Ottilie.npz" in caplog.text and "is no .npz" in caplog.text


# Samples

def test_a_sample_is_made_once_and_then_kept(keyed: Worker) -> None:
    before, path = made(keyed), "/voices/v2/de_speaker_3/sample"
    first = get(keyed, path)
    assert first.status == 200 and first.headers["Content-Type"] == "audio/mpeg"
    assert np.abs(decode(first.body, "mp3")).max() > 0
    segments = made(keyed) - before
    assert segments >= 1
    again = get(keyed, path)
    assert again.body == first.body and again.headers["ETag"] == first.headers["ETag"]
    assert first.headers["Cache-Control"] == "private, max-age=3600"
    for other in ("/voices/v2%2Fde_speaker_3/sample", "//voices/v2%2fde_speaker_3/sample/",
                  "/voices/V2/DE_Speaker_3/sample?x=1"):
        assert get(keyed, other).headers["ETag"] == first.headers["ETag"]
    assert made(keyed) == before + segments


def test_a_voice_of_ones_own_has_a_sample_that_changes_with_its_preset(
        keyed: Worker, home: Path) -> None:
    first = get(keyed, "/voices/de_Quirin%20S%C3%BC%C3%9F/sample")
    assert first.status == 200 and first.headers["Cache-Control"] == "private, no-cache"
    np.savez(home / "voices" / "de_Quirin Süß.npz", **prompts(9))
    later = get(keyed, "/voices/de_Quirin%20S%C3%BC%C3%9F/sample",
                If_None_Match=first.headers["ETag"])
    assert later.status == 200 and later.body != first.body


@pytest.mark.parametrize("name", ["anna", "", "..", "../health", "%2e%2e%2fx", "%00", "%ff",
                                  "v2/en_speaker_66"])
def test_a_sample_of_nobody_is_404(keyed: Worker, name: str) -> None:
    answer = get(keyed, f"/voices/{name}/sample")
    assert answer.status == 404
    if name == "v2/en_speaker_66":
        assert "did you mean v2/en_speaker_6" in answer.json["error"]["message"]


def test_what_is_asked_of_a_sample_otherwise_is_refused(keyed: Worker) -> None:
    assert get(keyed, "/voices/male").status == 404
    answer = get(keyed, "/voices/male/sample", "POST")
    assert answer.status == 405 and answer.headers["Allow"] == "GET, HEAD, OPTIONS"
    assert keyed.call("/voices/male/sample").status == 401
    assert keyed.call("/voices/male/sample", method="HEAD").status == 401
    asked = keyed.call("/voices/male/sample", method="OPTIONS", headers={"Origin": "https://a.b"})
    assert asked.status == 204 and asked.headers["Access-Control-Allow-Origin"] == "*"


def test_head_of_a_sample_that_is_not_made_costs_no_work_and_promises_nothing(
        keyed: Worker) -> None:
    before, path = made(keyed), "/voices/v2/fr_speaker_1/sample"
    head = get(keyed, path, "HEAD")
    assert head.status == 200 and head.headers["Content-Type"] == "audio/mpeg"
    assert not {"ETag", "Content-Length"} & set(head.headers) and made(keyed) == before
    assert head.headers["Cache-Control"] == "no-store"
    whole = get(keyed, path)
    same = ("ETag", "Content-Length", "Content-Type", "Cache-Control", "Accept-Ranges")
    later = get(keyed, path, "HEAD")
    assert [later.headers[n] for n in same] == [whole.headers[n] for n in same] and not later.body
    assert get(keyed, "/voices/nobody/sample", "HEAD").status == 404


@pytest.fixture(scope="module")
def male(keyed: Worker) -> Answer:
    return get(keyed, "/voices/male/sample")


def test_an_alias_sounds_as_what_it_stands_for(keyed: Worker, male: Answer) -> None:
    before = made(keyed)
    assert get(keyed, "/voices/v2/en_speaker_6/sample").body == male.body
    assert made(keyed) == before


@pytest.mark.parametrize("tags", ["{}", "W/{}", '"x", {}', "*", ' "x" , W/{} '])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_who_has_a_sample_is_not_sent_it_again(
        keyed: Worker, male: Answer, tags: str, method: str) -> None:
    tag = male.headers["ETag"]
    answer = get(keyed, "/voices/male/sample", method, If_None_Match=tags.format(tag),
                 Range="bytes=0-9")
    assert (answer.status, answer.body, answer.headers["ETag"]) == (304, b"", tag)
    assert answer.headers["Cache-Control"] == male.headers["Cache-Control"]


@pytest.mark.parametrize(("asked", "part"), [
    ("bytes=0-99", slice(0, 100)), ("bytes=100-", slice(100, None)), ("bytes=-7", slice(-7, None)),
    ("bytes=0-0", slice(0, 1)), ("bytes=5-99999999", slice(5, None)), ("Bytes = 1-2", slice(1, 3)),
    ("bytes=-99999999", slice(0, None))])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_part_is_sent_to_who_wants_a_part(
        keyed: Worker, male: Answer, asked: str, part: slice, method: str) -> None:
    answer = get(keyed, "/voices/male/sample", method, Range=asked,
                 **({"If_Range": male.headers["ETag"]} if "0-" in asked else {}))
    start, stop, _ = part.indices(len(male.body))
    assert answer.status == 206
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(male.body)}"
    assert answer.headers["Content-Length"] == str(stop - start)
    assert answer.body == (male.body[part] if method == "GET" else b"")


@pytest.mark.parametrize("asked", [
    *({"If_None_Match": tags} for tags in ('"x"', "x", "", 'W/"x"', "{bare}")),
    *({"Range": part} for part in ("bytes=0-1,5-6", "bytes=9-5", "bytes=-", "bytes=a-b", "0-5", "",
                                   "lines=0-5", "bytes=0x1-5", "bytes=1-2-3", "bytes=+1-5")),
    *({"Range": "bytes=0-9", "If_Range": since} for since in (
        "W/{tag}", '"x"', "Wed, 21 Oct 2026 07:28:00 GMT"))])
def test_who_has_another_one_or_wants_no_single_part_is_sent_the_whole(
        keyed: Worker, male: Answer, asked: dict[str, str]) -> None:
    tag = male.headers["ETag"]
    headers = {name: value.format(tag=tag, bare=tag.strip('"')) for name, value in asked.items()}
    answer = get(keyed, "/voices/male/sample", **headers)
    assert (answer.status, answer.body) == (200, male.body)


@pytest.mark.parametrize("asked", ["bytes={}-", "bytes=99999999-", "bytes=-0"])
def test_a_part_that_is_not_there_is_416(keyed: Worker, male: Answer, asked: str) -> None:
    answer = get(keyed, "/voices/male/sample", Range=asked.format(len(male.body)))
    assert (answer.status, answer.json["error"]["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["Content-Range"] == f"bytes */{len(male.body)}"


def test_two_who_ask_at_once_have_it_made_once_and_behind_real_requests(
        bark: ModuleType, facts: Any, keyed: Worker) -> None:
    before, ended = made(keyed), []

    def run(what: str, work: Callable[[], Answer]) -> Answer:
        answer = work()
        ended.append(what)
        return answer

    def speak(voice: str) -> Answer:
        return keyed.call("/synthesize", {"text": "One.\n\nTwo.", "voice": voice},
                          headers=HAS_KEY)

    with ThreadPoolExecutor(6) as pool:
        real = [pool.submit(run, "real", partial(speak, "v2/en_speaker_2"))]
        wait_until(lambda: keyed.health()["queue"]["running"], "running request")
        samples = [pool.submit(run, "sample", partial(get, keyed, "/voices/v2/en_speaker_7/sample"))
                   for _ in range(3)]
        wait_until(lambda: keyed.health()["queue"]["waiting"] or "sample" in ended, "its place")
        real.append(pool.submit(run, "real", partial(speak, "v2/en_speaker_4")))
        assert {each.result().status for each in real + samples} == {200}
    assert len({each.result().body for each in samples}) == 1
    assert ended[:2] == ["real", "real"]
    sample = bark.Narrator(facts, "male").plan_sample("v2/en_speaker_7")
    assert made(keyed) == before + 4 + len(sample.segments)


@pytest.mark.long  # run.sh has no room for it
def test_who_asks_for_a_sample_and_leaves_frees_its_place_and_others_get_it(
        keyed: Worker) -> None:
    path = "/voices/v2/en_speaker_5/sample"
    with ThreadPoolExecutor(2) as pool, socket.create_connection(
            ("127.0.0.1", keyed.port), 20) as leaving:
        text = "The old miller walked down to the river and looked at the brown water. " * 6
        long = pool.submit(keyed.call, "/synthesize", {"text": text}, headers=HAS_KEY)
        wait_until(lambda: keyed.health()["queue"]["running"], "running request")
        leaving.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n"
                        .encode())
        wait_until(lambda: keyed.health()["queue"]["waiting"], "waiting sample")
        staying = pool.submit(get, keyed, path)
        leaving.close()
        assert staying.result().status == long.result().status == 200
    assert keyed.health()["queue"] == {"running": 0, "waiting": 0, "capacity": 32}


@pytest.mark.long  # run.sh has no room for it
def test_a_restart_has_its_samples_at_once_and_believes_no_file(toy: Path, tmp_path: Path) -> None:
    """One start for what is kept, what was damaged and what belongs to another voice."""
    own, names = tmp_path / "own", ("male", "female", "narrator", "v2/en_speaker_0")
    with started(own, toy) as worker:
        first = {name: worker.call(f"/voices/{name}/sample") for name in names}
        assert not {answer.status for answer in first.values()} - {200}
    files = sorted((own / "samples").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    kept, damaged, foreign, odd = files
    assert damaged.read_bytes()[32:] == first["female"].body
    damaged.write_bytes(flipped(damaged.read_bytes()))
    foreign.write_bytes(kept.read_bytes())
    odd.unlink()
    os.mkfifo(odd)
    with started(own, toy) as worker:
        for name in names:
            before = made(worker)
            answer = worker.call(f"/voices/{name}/sample")
            assert answer.body == first[name].body
            assert (made(worker) == before) == (name == "male"), name
    assert damaged.read_bytes()[32:] == first["female"].body, "made good"
    with started(own, toy, BARK_QUALITY="on") as worker:
        assert worker.call("/voices/male/sample").body != first["male"].body, "made otherwise"


@pytest.mark.parametrize("why", ["a file in its place", "no place for files", "full"])
def test_a_disk_that_takes_no_sample_costs_one_warning_and_keeps_no_rest(
        bark: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture, why: str) -> None:
    own, room = tmp_path / "own", resource.getrlimit(resource.RLIMIT_FSIZE)
    if why == "a file in its place":
        own.write_text("x")
    elif why == "no place for files":
        own.symlink_to("/proc")
    files = bark.SampleFiles(own / "samples")
    try:
        if why == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, room[1]))
        for key in "ab":
            files.put(key, bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
    assert [files.get(key) for key in "ab"] == [b"", b""]
    assert caplog.text.count("cannot be kept") == 1
    assert why != "full" or list((own / "samples").iterdir()) == []


@pytest.mark.long  # run.sh has no room for it
def test_without_a_disk_a_sample_comes_from_the_segments_in_memory(
        toy: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("x")
    with started(own, toy) as worker:
        first = worker.call("/voices/male/sample")
        before = made(worker)
        again = worker.call("/voices/male/sample")
        assert again.status == 200 and again.body == first.body and made(worker) == before
    assert [line for line in worker.log if "WARNING" in line and "cannot be kept" in line]


@pytest.mark.long  # run.sh has no room for it
def test_a_sample_behind_too_much_is_504_as_speech_is(toy: Path, tmp_path: Path) -> None:
    with started(tmp_path / "own", toy, BARK_MAX_BATCH="1", BARK_TIMEOUT="1",
                 TTS_MAX_LENGTH="100000") as worker, ThreadPoolExecutor(1) as pool:
        busy = pool.submit(worker.speak, "Nobody waved, and the boat left at noon. " * 400)
        wait_until(lambda: worker.health()["queue"]["running"], "running request")
        assert worker.call("/voices/male/sample").status == 504
        assert busy.result().status == 504


def test_every_language_of_sunos_has_a_line_that_it_can_write(bark: ModuleType, facts: Any) -> None:
    narrator = bark.Narrator(facts, "male")
    assert set(bark.LANGUAGES) == {bark.voice_language(v) for v in facts.voices}
    assert " ".join(bark.LANGUAGES) == "de en es fr hi it ja ko pl pt ru tr zh"
    for code, language in bark.LANGUAGES.items():
        speech = narrator.plan_sample(f"v2/{code}_speaker_0")
        assert speech.text == language.line and not any(speech.warnings)


def test_a_model_without_the_letters_of_a_language_says_it_in_english(
        bark: ModuleType, folder: Path) -> None:
    builtin = bark.ModelFacts(BUILTIN)
    own = builtin.voices["v2/en_speaker_6"]
    np.savez(folder / "zh_mei.npz", semantic_prompt=own.semantic, coarse_prompt=own.coarse,
             fine_prompt=own.fine)
    narrator = bark.Narrator(builtin, "male", voices_dir=str(folder))
    assert narrator.plan_sample("zh_mei").text == bark.LANGUAGES["en"].line
