"""The half-precision copy of pickled weights that a first start keeps and later starts read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import BUILTIN, running_worker

CPU = torch.device("cpu")


@pytest.fixture
def load(bark: ModuleType, toy: Path, tmp_path: Path) -> Callable[..., Any]:
    """Reads the toy's weights with a cache in `tmp_path`."""
    def load(dtype: torch.dtype = torch.bfloat16, folder: Path = toy) -> Any:
        return bark.load_weights(folder, CPU, dtype, tmp_path / "cache")
    return load


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and whoever unpickles weights from then on fails."""
    return lambda: monkeypatch.setattr(
        torch, "load", lambda *_, **__: pytest.fail("weights were unpickled"))


def copies(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").glob("*") if path.is_dir())


def assert_same_weights(one: Any, other: Any) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_second_start_reads_the_copy_and_has_the_same_weights(
        load: Callable[..., Any], no_pickle: Callable[[], None], tmp_path: Path,
        toy: Path, dtype: torch.dtype) -> None:
    first = load(dtype)
    (copy,) = copies(tmp_path)
    no_pickle()
    assert_same_weights(load(dtype), first)
    half = (copy / "model.safetensors").stat().st_size
    assert half < 0.6 * (toy / "pytorch_model.bin").stat().st_size  # causal masks stay bytes


def test_float32_neither_makes_nor_reads_a_copy(
        bark: ModuleType, load: Callable[..., Any], tmp_path: Path, toy: Path) -> None:
    load(torch.bfloat16)
    kept = copies(tmp_path)
    assert_same_weights(load(torch.float32), bark.read_weights(toy, torch.float32).float())
    assert copies(tmp_path) == kept


def test_each_dtype_has_a_copy_of_its_own(load: Callable[..., Any], tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert load(dtype).semantic.dtype == dtype
    assert sorted(copy.name.rpartition("-")[2] for copy in copies(tmp_path)) == [
        "bfloat16", "float16"]


def test_weights_that_are_mapped_already_are_not_copied(
        bark: ModuleType, tmp_path: Path) -> None:
    bark.load_weights(BUILTIN, CPU, torch.bfloat16, tmp_path / "cache")
    assert copies(tmp_path) == []


def test_other_weights_in_the_same_folder_get_another_copy(
        load: Callable[..., Any], tmp_path: Path, toy: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy, folder)
    load(folder=folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["semantic.lm_head.weight"] += 1
    torch.save(state, folder / "pytorch_model.bin")
    changed = load(folder=folder).semantic.lm_head.weight
    assert torch.equal(changed, state["semantic.lm_head.weight"].bfloat16())


def test_a_start_that_breaks_off_while_it_copies_leaves_nothing_that_is_read(
        load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def power_cut(file: int) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", power_cut)
        with pytest.raises(SystemExit):
            load()
    assert [path.suffix for path in copies(tmp_path)] == [".part"]
    next(copies(tmp_path)[0].glob("*.safetensors")).write_bytes(b"half a file")
    load()
    (copy,) = copies(tmp_path)
    assert copy.suffix == ""


@pytest.mark.parametrize("damage", [b"", b"x" * 1000])
def test_a_damaged_copy_is_told_and_made_anew(
        load: Callable[..., Any], no_pickle: Callable[[], None], tmp_path: Path, damage: bytes,
        caplog: pytest.LogCaptureFixture) -> None:
    first = load()
    (copy,) = copies(tmp_path)
    (copy / "model.safetensors").write_bytes(damage)
    assert_same_weights(load(), first)
    assert "making this copy anew" in caplog.text
    no_pickle()
    assert_same_weights(load(), first)


def test_a_cache_that_cannot_be_written_costs_a_warning_only(
        load: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert load().semantic.dtype == torch.bfloat16
    assert "no half-precision copy of the weights" in caplog.text


def test_a_disk_that_is_full_leaves_no_rest(
        bark: ModuleType, load: Callable[..., Any], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(model: Any, part: Path) -> None:
        part.mkdir()
        (part / "model.safetensors").write_bytes(b"as much as fits")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bark.BarkModel, "save_pretrained", full)
    assert load().semantic.dtype == torch.bfloat16
    assert copies(tmp_path) == [] and "No space left on device" in caplog.text


def test_a_worker_keeps_the_copy_where_models_are_kept_and_starts_from_it(
        toy: Path, tmp_path: Path) -> None:
    def answer() -> str:
        with running_worker(BARK_MODEL=str(toy), BARK_DTYPE="bfloat16", BARK_MAX_BATCH="1",
                            HF_HOME=str(tmp_path)) as worker:
            assert worker.wait_for("ready")["dtype"] == "bfloat16"
            log.append("".join(worker.log))
            return worker.speak("Hi.").json["audio"]

    log: list[str] = []
    assert answer() == answer()
    assert ["kept a half-precision copy" in text for text in log] == [True, False]
    assert len(list((tmp_path / "bark-worker").glob("*-bfloat16/model.safetensors"))) == 1


# Weights that came damaged


@pytest.mark.parametrize("cut", [0, 5, 9, 1000, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_cut_short_are_named_with_what_to_do(
        bark: ModuleType, toy: Path, tmp_path: Path, name: str, cut: int) -> None:
    source = BUILTIN if name == "model.safetensors" else toy
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    content = (folder / name).read_bytes()[:cut]
    (folder / name).write_bytes(content)
    with pytest.raises(bark.ModelError) as error:
        bark.read_weights(folder, torch.float32)
    assert str(error.value) == (
        f"cannot load the weights in {folder}: {name} is damaged or cut short, with {len(content)}"
        f" bytes; remove it (rm {folder / name}) and start again, or copy it anew")


def test_weights_whose_file_is_whole_are_not_called_damaged(bark: ModuleType, toy: Path) -> None:
    assert bark.damaged_weights(BUILTIN) == bark.damaged_weights(toy) == ""


def test_a_link_to_weights_that_were_removed_is_a_file_that_lacks(
        bark: ModuleType, toy: Path, tmp_path: Path) -> None:
    """As after removing a damaged one from the hub's cache: the next start fetches it anew."""
    folder = tmp_path / "model"
    shutil.copytree(toy, folder)
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin").symlink_to(tmp_path / "gone")
    assert bark.missing_files(folder) == ["model.safetensors or pytorch_model.bin"]
