"""Files on a disk that is full, in a folder that takes no new file, or left by a killed process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graft.runs.folder import RunFolder
from graft.storage.disk import create_exclusively, overwrite, readable, write_atomically
from graft.sweeps.sweep import make_folder
from graft.training.checkpoint import is_whole, write_checkpoint

FULL = Path("/dev/full")  # takes no byte


def full(path: Path) -> None:
    """Make the next file that is written for `path` one on a full disk."""
    if not FULL.exists():
        pytest.skip("needs /dev/full")
    end = "unfinished" if path.suffix == ".ckpt" else f"graft-{os.getpid()}"
    path.with_name(f".{path.name}.{end}").symlink_to(FULL)


@pytest.mark.parametrize(("name", "needed"), [
    ("metrics.csv", "3 bytes"), ("last.ckpt", "4.0 MB"),
])  # fmt: skip
def test_a_full_disk_is_named_with_what_is_needed(tmp_path: Path, name: str, needed: str) -> None:
    path = tmp_path / name
    write: Callable[[], None] = lambda: write_atomically(path, "a,b")  # noqa: E731
    if path.suffix == ".ckpt":
        write = lambda: write_checkpoint({"state_dict": {"w": torch.zeros(1000, 1000)}}, path)  # noqa: E731
    write()
    before = path.read_bytes()
    full(path)
    with pytest.raises(
        OSError, match=rf"cannot write {path}: the disk is full \({needed} needed, "
    ):
        write()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_end_of_a_run_is_recorded_on_a_full_disk(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run", {"a": {"b": [1, 2, 3] * 50}}, [])
    run.start()
    full(run.path / "run.json")
    run.finish("failed", error="the loss is not finite")
    record = json.loads((run.path / "run.json").read_text())
    assert (record["status"], record["error"]) == ("failed", "the loss is not finite")
    assert RunFolder.open(run.path).record == run.record
    with pytest.raises(OSError, match="No space left"):
        overwrite(run.path / "run.json", "x" * 100_000)
    assert json.loads((run.path / "run.json").read_text()) == record


def test_the_first_end_of_a_run_is_its_end(tmp_path: Path) -> None:
    """The main thread and the watch may both come to it."""
    run = RunFolder.create(tmp_path, "run", {}, [])
    run.start()
    run.finish("preempted", error="stopped by SIGTERM")
    run.finish("failed", error="lost the connection")
    assert (run.record["status"], run.record["error"]) == ("preempted", "stopped by SIGTERM")


def test_a_run_that_cannot_be_written_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: str) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("graft.runs.folder.write_atomically", refuse)
    with pytest.raises(OSError, match="the disk is full"):
        RunFolder.create(tmp_path, "run", {}, [])
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_was_writing_is_deleted_by_the_next(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run", {}, [])
    stage = run.path / "checkpoints" / "finetune"
    stage.mkdir(parents=True)
    left = [
        run.path / ".run.json.graft-4711",
        run.path / ".metrics.csv.graft-12",
        stage / ".last.ckpt.unfinished",
    ]
    kept = [run.path / name for name in (".notes.txt", "run.1", ".env.2", ".coverage.host.123.456")]
    kept.append(stage / "last.ckpt")
    (run.path / ".cache.graft-1").mkdir()
    for path in (*left, *kept):
        path.write_text("half")
    with run.locked():
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept)


def test_sweeps_that_start_in_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    sweep = tmp_path / "sweeps" / "2026-11-26_12-00-00"
    names = [make_folder(sweep, exclusively=True).name for _ in range(4)]
    assert names == [sweep.name + end for end in ("", "-2", "-3", "-4")]
    assert make_folder(sweep, exclusively=False) == sweep  # one that goes on
    assert create_exclusively(tmp_path, "run").name == "run"


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 bytes"), (999, "999 bytes"), (4200, "4.2 kB"), (3.1e6, "3.1 MB"), (2.5e9, "2.5 GB"),
    (999_999, "1.0 MB"), (7e13, "70000.0 GB"),
])  # fmt: skip
def test_sizes_have_a_unit_in_which_they_can_be_read(count: float, text: str) -> None:
    assert readable(count) == text


def test_a_bit_that_is_flipped_anywhere_in_a_checkpoint_is_found(tmp_path: Path) -> None:
    """In the archive's directory too, which its own checksums leave out."""
    whole, damaged = tmp_path / "whole.ckpt", tmp_path / "damaged.ckpt"
    state = {"w": torch.arange(3.0), "b": torch.ones(1)}
    write_checkpoint({"state_dict": state, "epoch": 3}, whole)
    content = whole.read_bytes()
    assert is_whole(whole)
    assert torch.load(whole, weights_only=True, mmap=True)["epoch"] == 3
    passed = []
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        damaged.write_bytes(flipped)
        if is_whole(damaged):
            passed.append(position)
    assert passed == []
    torch.save({"epoch": 3}, damaged)  # as earlier versions did
    assert is_whole(damaged)
    for size in range(len(content)):
        damaged.write_bytes(content[:size])
        assert not is_whole(damaged), size
