"""`graft resume` of what cannot be resumed, or not with that change: one clear line."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from graft.runs.folder import FORMAT, RunFolder
from graft.runs.open import read_overrides
from graft.runs.resume import changed, earlier
from graft.training.module import TransferModule
from tests.conftest import Graft
from tests.integration.conftest import Break, Runs, assert_equal, record


@pytest.fixture
def stopped(runs: Runs, break_at: Break) -> Path:
    """A run of two stages that stopped in the third epoch of its second; a copy for each test."""
    kept = runs.shared / "stopped"
    if not kept.exists():
        break_at(TransferModule, "loss", 27)
        shutil.copytree(runs.start("two stages")[0], kept)
    return shutil.copytree(kept, runs.tmp_path / "runs" / "stopped")


def error(graft: Graft, *arguments: Any) -> str:
    done = graft("resume", *map(str, arguments))
    assert done.returncode == 1
    assert done.stderr.startswith("graft: error: ")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr.removeprefix("graft: error: ")


def test_what_cannot_change_is_refused_with_the_reason(graft: Graft, stopped: Path) -> None:
    for override, reason in {
        "backbone=squeezenet1_1": "the checkpoint holds the weights of another one",
        "head=linear": "the checkpoint holds the weights of another one",
        "data=digits": "data cannot change in a resumed run: the epoch goes on in the middle",
        "transfer=lp_ft": "the stages so far were trained with another plan",
        "optimizer=adamw": "its state in the checkpoint goes with the settings it was made with",
        "data.batch_size=4": "the epoch goes on in the middle of the images' order",
        "optimizer.lr=0.1": "its state in the checkpoint goes with the settings it was made with",
        "scheduler=cosine": "a part of it has been run through",
        "transfer.stages.second.norm=frozen": "the stages so far were trained with another plan",
        "trainer.limit_train_batches=1": "it would not be the same run",  # one, not all of them
        "seed=1": "it would not be the same run",
        "transfer.stages.probe.epochs=9": "transfer.stages.probe.epochs cannot change: this stage",
        "transfer.stages.second.epochs=1": "transfer.stages.second.epochs=1: 2 are behind it",
        "trainer.max_epoch=9": "no config key trainer.max_epoch: did you mean trainer.max_epochs",
        "trainer.max_epochs=ten": "trainer.max_epochs=ten: must be a whole number above 0",
    }.items():
        before = (stopped / "config.yaml").read_text()
        assert reason in error(graft, stopped, override), override
        assert (stopped / "config.yaml").read_text() == before
        assert record(stopped)["status"] == "failed"


@pytest.mark.parametrize("written", ["", "config", "overrides", "config and overrides"])
def test_ranks_make_the_same_change_whatever_the_first_one_has_written(
    stopped: Path, written: str
) -> None:
    """On a network disk its files show up in any order; and the same command may be given again."""
    overrides = ["trainer.max_epochs=5", "data.num_workers=1"]
    old = read_overrides(stopped)
    folder = RunFolder.open(stopped)
    wanted = changed(folder, overrides)
    assert wanted["transfer"]["stages"]["second"]["epochs"] == 3  # set by itself
    assert wanted["trainer"]["max_epochs"] == 5
    if "config" in written:
        folder.write("config.yaml", wanted)
    if "overrides" in written:
        folder.write("overrides.yaml", [*old, *overrides])
    assert changed(folder, overrides) == wanted
    assert earlier(stopped, overrides) == old


def test_a_config_that_was_edited_is_noticed(graft: Graft, stopped: Path) -> None:
    config = stopped / "config.yaml"
    config.write_text(config.read_text().replace("label_smoothing: 0.0", "label_smoothing: 0.1"))
    assert error(graft, stopped).startswith("task.label_smoothing cannot change in a resumed run")


def test_a_finished_run_is_left_alone(runs: Runs) -> None:
    folder = runs.whole("fine-tuning")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert "is finished: nothing to resume" in runs.resume(folder)
    assert "has ended, so trainer.max_epochs=9 cannot change" in error(
        runs.graft, folder, "trainer.max_epochs=9"
    )
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_no_run_folder_or_one_of_another_version(graft: Graft, stopped: Path) -> None:
    assert "is not a run folder: no readable run.json" in error(graft, stopped / "checkpoints")
    assert f"there are 1 in it, like {stopped}" in error(graft, stopped.parent)
    content = (stopped / "run.json").read_text()
    for found, age in ((99, "a newer"), (1, "an older")):
        (stopped / "run.json").write_text(
            content.replace(f'"format": {FORMAT}', f'"format": {found}')
        )
        assert f"written by {age} version of graft" in error(graft, stopped)
    (stopped / "run.json").write_text(content[:100])
    assert "run.json is damaged" in error(graft, stopped)


def test_a_run_that_another_process_works_on(
    graft: Graft, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.runs.folder.LOCK_SECONDS", 0.1)
    with RunFolder.open(stopped).locked():
        assert "is being written by another process" in error(graft, stopped)
    assert record(stopped)["status"] == "failed"


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "a flipped byte"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    runs: Runs, stopped: Path, damage: str
) -> None:
    last = stopped / "checkpoints" / "second" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        last.unlink()
    else:
        part = {"empty": 0, "cut off": len(content) // 2, "a flipped byte": len(content)}[damage]
        last.write_bytes(content[:part])
    out = runs.resume(stopped)
    state = "missing" if damage == "missing" else "damaged"
    assert f"last.ckpt is {state}: the one before it is used" in out
    assert_equal(stopped, runs.whole("two stages"))


def test_a_stage_whose_best_weights_are_damaged_starts_anew(runs: Runs, stopped: Path) -> None:
    """No later epoch need be better: all of them would run, and the stage end without weights."""
    best = stopped / "checkpoints" / "second" / "best.ckpt"
    best.write_bytes(best.read_bytes()[:-100])
    out = runs.resume(stopped)
    assert f"note: {best} is missing or damaged, and what was best is in no other file" in out
    assert "stage second from its start" in out
    assert_equal(stopped, runs.whole("two stages"))


def test_without_any_checkpoint_the_stage_starts_anew(runs: Runs, stopped: Path) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        (stopped / "checkpoints" / "second" / name).write_bytes(b"")
    out = runs.resume(stopped)
    assert "there is none before it" in out
    assert "stage second from its start" in out
    assert_equal(stopped, runs.whole("two stages"))


def test_the_weights_of_a_stage_that_is_done_are_needed(graft: Graft, stopped: Path) -> None:
    best = stopped / "checkpoints" / "probe" / "best.ckpt"
    best.write_bytes(best.read_bytes()[:-100])
    assert f"{best} is missing or damaged, and stage probe cannot be skipped" in error(
        graft, stopped
    )


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(
    graft: Graft, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = stopped / "checkpoints" / "second" / "last.ckpt"
    before = last.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        message = error(graft, stopped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"cannot write {last}: ")
    assert last.read_bytes() == before
    assert {p.name for p in last.parent.iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
