"""Rule 10: a run that was stopped and resumed is the run that never stopped, bit for bit."""

from __future__ import annotations

import csv
import os
import signal
from typing import Any
from unittest import mock

import pytest
import torch

from graft import cli
from graft.plan.schedules import one_cycle
from graft.runs.folder import RunFolder
from graft.training import run_stages
from graft.training.last_checkpoint import LastCheckpoint
from graft.training.module import TransferModule
from tests.integration.conftest import (
    BASE,
    MLP,
    RUNS,
    Break,
    Crash,
    Runs,
    assert_equal,
    curves,
    record,
)  # fmt: skip

POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "before anything is saved": (TransferModule, "loss", 2, False),
    "within an epoch": (TransferModule, "loss", 9, False),
    "in the last batch of an epoch": (TransferModule, "loss", 10, False),
    "in the first batch of an epoch": (TransferModule, "loss", 6, False),
    "in a validation": (TransferModule, "validation_step", 2, False),
    "after a validation": (TransferModule, "on_validation_epoch_end", 2, True),
    "when the best is saved and the last is not": (
        LastCheckpoint,
        "on_train_epoch_start",
        2,
        False,
    ),
    "at the end of the stage": (TransferModule, "finish_stage", 1, False),
    "in the test": (TransferModule, "test_step", 1, False),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_crashed_goes_on_as_if_it_had_not(
    runs: Runs, break_at: Break, point: str
) -> None:
    whole = runs.whole("fine-tuning")
    owner, method, number, after = POINTS[point]
    break_at(owner, method, number, after=after)
    folder, code = runs.start("fine-tuning")
    assert code == 1
    assert record(folder)["status"] == "failed"
    runs.resume(folder)
    assert_equal(folder, whole)


QUICK = ("fine-tuning", "lora", "own checkpoints")
KINDS = [pytest.param(k, marks=[] if k in QUICK else [pytest.mark.slow]) for k in RUNS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_crashes_again_and_again(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In each attempt three batches later; where a grid's winner or adapters are merged, twice."""
    whole = runs.whole(kind)
    original, calls = TransferModule.loss, 0

    def step(self: TransferModule, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise Crash
        return original(self, *args)

    update, broken = RunFolder.update, set()

    def stop_before_a_stage_is_recorded(self: RunFolder, **fields: Any) -> None:
        if (stages := fields.get("stages")) and (name := stages[-1]["name"]) not in broken:
            broken.add(name)
            raise Crash
        update(self, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(TransferModule, "loss", step)
        patch.setattr(RunFolder, "update", stop_before_a_stage_is_recorded)
        folder, code = runs.start(kind)
        attempts = 0
        while code != 0:
            attempts += 1
            assert attempts < 20, "it does not get further"
            assert record(folder)["status"] == "failed"
            calls = 0
            code = runs.graft("resume", str(folder)).returncode
    assert attempts >= 3
    assert broken == {stage["name"] for stage in record(folder)["stages"]}
    assert_equal(folder, whole)


@pytest.mark.parametrize(
    ("owner", "method", "number", "signum"),
    [
        (TransferModule, "loss", 8, signal.SIGUSR1),
        (TransferModule, "loss", 10, signal.SIGTERM),
        (TransferModule, "loss", 9, signal.SIGHUP),
        (TransferModule, "loss", 9, signal.SIGINT),
        (TransferModule, "validation_step", 2, signal.SIGTERM),
    ],
)
def test_a_signal_saves_at_the_next_batch_or_epoch_and_stops(
    runs: Runs, break_at: Break, monkeypatch: pytest.MonkeyPatch,
    owner: Any, method: str, number: int, signum: signal.Signals,
) -> None:  # fmt: skip
    """Not at the end of the run, and not without what was trained since the last checkpoint."""
    monkeypatch.setattr(os, "isatty", lambda fd: False)  # SIGHUP: what pytest prints to stays open
    whole = runs.whole("fine-tuning")
    break_at(owner, method, number, do=lambda: os.kill(os.getpid(), signum))
    folder, code = runs.start("fine-tuning", "trainer.checkpoint_every_n_steps=null")
    assert code == 128 + signum
    assert record(folder)["status"] == "preempted"
    assert record(folder)["error"] == f"stopped by {signum.name}"
    last = torch.load(folder / "checkpoints" / "finetune" / "last.ckpt", weights_only=True)
    assert last["global_step"] == {8: 8, 9: 9, 10: 10, 2: 10}[number]
    assert "after" in runs.resume(folder)
    assert_equal(folder, whole)
    ours = (signal.SIG_DFL, cli._interrupted)  # and no handler of a run that is over
    assert signal.getsignal(signum) in ours


@pytest.mark.parametrize("method", ["start_stage", "test_step"])
def test_a_signal_outside_of_training_stops_at_once(
    runs: Runs, break_at: Break, method: str
) -> None:
    whole = runs.whole("fine-tuning")
    break_at(TransferModule, method, 1, do=lambda: os.kill(os.getpid(), signal.SIGTERM))
    folder, code = runs.start("fine-tuning")
    assert code == 143
    assert record(folder)["status"] == "preempted"
    runs.resume(folder)
    assert_equal(folder, whole)


def test_checkpoints_by_time(runs: Runs, break_at: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves 40 s a look: one checkpoint in two batches, with one minute."""
    looks = iter(range(0, 10_000, 40))
    clock = mock.Mock(monotonic=lambda: next(looks))
    monkeypatch.setattr("graft.training.last_checkpoint.time", clock)
    break_at(TransferModule, "loss", 5)
    minutes = ["trainer.checkpoint_every_n_steps=null", "trainer.checkpoint_every_n_minutes=1"]
    folder, _ = runs.start("fine-tuning", *minutes)
    last = torch.load(folder / "checkpoints" / "finetune" / "last.ckpt", weights_only=True)
    assert 0 < last["global_step"] < 5


@pytest.mark.parametrize("number", [9, 11])  # in an epoch, and at its start
def test_a_head_goes_on_in_batches_of_as_many_steps_on_another_device(
    runs: Runs, break_at: Break, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Where a step of it would be a batch."""
    whole = runs.whole("two stages")
    break_at(TransferModule, "loss", number)
    folder, code = runs.start("two stages")
    assert code == 1
    monkeypatch.setattr(run_stages, "SMALL_STEP", 0)
    runs.resume(folder)
    assert_equal(folder, whole)


def test_tensorboard_shows_each_step_once(runs: Runs, break_at: Break) -> None:
    logs = {}
    for name in ("whole", "stopped"):
        if name == "stopped":
            break_at(TransferModule, "loss", 24)  # nine steps into the second stage
        runs.tmp_path = runs.tmp_path / name
        folder, code = runs.start("grid", "logger=default")
        if name == "stopped":
            assert code == 1
            runs.resume(folder)
        logs[name] = folder
    assert curves(logs["stopped"]) == curves(logs["whole"])
    assert len(curves(logs["whole"])["val/acc"]) == 6


def test_a_longer_run_than_planned(runs: Runs, break_at: Break) -> None:
    """The same as if it had been planned so, where the schedule does not depend on its length."""
    constant = ["scheduler=constant", "trainer.checkpoint_every_n_steps=null"]
    logs = runs.tmp_path / "longer"
    overrides = [*BASE, *MLP, *constant, "trainer.max_epochs=5", f"paths.logs={logs}"]
    assert runs.graft("train", *overrides).returncode == 0
    (whole,) = logs.iterdir()
    break_at(TransferModule, "loss", 13)
    folder, _ = runs.start("fine-tuning", *constant)
    runs.resume(folder, "trainer.max_epochs=5", "trainer.log_every_n_steps=1")
    assert_equal(folder, whole)
    assert "epochs: 5" in (folder / "config.yaml").read_text()
    assert (folder / "overrides.yaml").read_text().splitlines()[-2] == "- trainer.max_epochs=5"


def test_another_length_changes_the_rate_at_once(runs: Runs, break_at: Break) -> None:
    break_at(TransferModule, "loss", 11)
    folder, _ = runs.start("fine-tuning")
    runs.resume(folder, "trainer.max_epochs=6")
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    column = next(name for name in rows[0] if name.startswith("lr/"))
    rates = {int(row["step"]): float(row[column]) for row in rows if row[column]}
    plan = [one_cycle(step, 30) * 0.05 for step in range(30)]
    assert [rates[step] for step in range(10, 30)] == pytest.approx(plan[10:])
    assert rates[9] == pytest.approx(one_cycle(9, 15) * 0.05)


def test_a_run_folder_that_was_moved(runs: Runs, break_at: Break) -> None:
    whole = runs.whole("two stages")
    break_at(TransferModule, "loss", 24)
    folder, _ = runs.start("two stages")
    moved = folder.rename(runs.tmp_path / "moved")
    runs.resume(moved)
    assert_equal(moved, whole)


def test_a_requeued_slurm_job_goes_on_with_the_run_it_began(
    runs: Runs, break_at: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with that of another job, or of the same one with other overrides."""
    whole = runs.whole("fine-tuning")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    break_at(TransferModule, "loss", 8)
    folder, _ = runs.start("fine-tuning")
    logs = folder.parent
    command = ["train", *BASE, *MLP, f"paths.logs={logs}"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    break_at(TransferModule, "loss", 1)
    assert runs.graft(*command, "seed=1").returncode == 1
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    break_at(TransferModule, "loss", 1)
    assert runs.graft(*command).returncode == 1
    assert len([*logs.iterdir()]) == 3
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert runs.graft(*command).returncode == 0
    assert_equal(folder, whole)
    assert "is finished" in runs.graft(*command).stdout
    assert len([*logs.iterdir()]) == 3
