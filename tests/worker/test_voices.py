"""Voices: what is listed of them, samples to hear, and presets of one's own in a folder."""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import threading
import tracemalloc
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

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


@pytest.mark.parametrize("file", [
    "anna.npz", "Anna Karenina.npz", "Zoë.NPZ", "हिन्दी.npz", "田中.npz", "v1.2_b-c.npz", "7.npz"])
def test_a_name_is_what_people_call_a_voice(voices: Any, folder: Path, file: str) -> None:
    np.savez(folder / "x.npz", **prompts())
    decomposed = unicodedata.normalize("NFD", file)  # as macOS may have it
    (folder / "x.npz").rename(folder / decomposed)
    name = file[:-4]
    assert list(voices.folder.look().voices) == [name]
    assert voices.find(decomposed[:-4].upper()) == name
    assert {"id": name, "own": True}.items() <= voices.listed()[-1].items()


# Files that are none

BAD_NAMES = ["../x", "a/b", "..", ".hidden", " blank", "blank ", "dot.", "a\tb", "a\nb", "-rf",
             "a\u200bb", "a\u202eb", "x" * 65, "a:b", "a*b", "a\\b", "a%2Fb", "\udcff"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_no_name_is_refused(bark: ModuleType, name: str) -> None:
    if "/" in name:  # no file can have it
        return
    with pytest.raises(bark.PresetError, match="no name for a voice"):
        bark.preset_name(f"{name}.npz")


@pytest.mark.parametrize("file", ["male", "MALE", "default", "Onyx", "alloy"])
def test_a_file_that_has_the_name_of_another_voice_is_refused(
        voices: Any, folder: Path, file: str) -> None:
    np.savez(folder / f"{file}.npz", **prompts())
    found = voices.folder.look()
    assert not found.voices and "name of another voice" in found.refused[f"{file}.npz"]


def test_of_two_files_that_differ_in_case_alone_one_is_refused(voices: Any, folder: Path) -> None:
    for name in ("Anna", "anna"):
        np.savez(folder / f"{name}.npz", **prompts())
    found = voices.folder.look()
    assert list(found.voices) == ["Anna"] and "another voice, Anna" in found.refused["anna.npz"]


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
    "cut short": (archive(**prompts())[:-30], "no .npz"),
    "a flipped bit": (flipped(archive(**prompts())), "no .npz"),
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
    np.savez(folder / "good.npz", **prompts())
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
            for _ in range(300):
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
    data = bytearray(archive(**prompts()))
    for sign, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(sign) + at] |= 1
    (folder / "bad.npz").write_bytes(data)
    assert "RuntimeError" in voices.folder.look().refused["bad.npz"]


def test_what_is_no_file_or_lies_elsewhere_is_refused(
        voices: Any, folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "secret.npz", **prompts())
    np.savez(folder / "real.npz", **prompts())
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
    reasons = {"out": "leads out", "up": "leads out", "zero": "leads out", "loop": "nowhere",
               "nowhere": "nowhere", "deep": "cannot be read: Is a directory",
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
    np.savez(folder / "anna.npz", **prompts())
    assert list(voices.folder.look().voices) == ["anna"]


def test_of_too_many_files_the_first_are_used(
        bark: ModuleType, voices: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bark, "MAX_PRESETS", 2)
    for name in "cab":
        np.savez(folder / f"{name}.npz", **prompts())
    found = voices.folder.look()
    assert list(found.voices) == ["a", "b"] and "holds 3 presets" in found.refused["."]


def test_many_threads_that_look_at_once_get_the_same_voice(voices: Any, folder: Path) -> None:
    np.savez(folder / "anna.npz", **prompts())
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
