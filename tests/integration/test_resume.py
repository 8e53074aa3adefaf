"""Rule 10: a run that was stopped and resumed is the run that never stopped, bit for bit."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from graft.module import TransferModule
from graft.runs.folder import RunFolder
from graft.transfer.last_checkpoint import LastCheckpoint
from graft.transfer.schedules import one_cycle
from tests.conftest import TINY, Graft, same

# Five batches an epoch. Dropout draws from torch's own state; the rate changes in every step.
BASE = [
    *TINY, "trainer.max_epochs=3",
    "trainer.checkpoint_every_n_steps=2", "trainer.log_every_n_steps=1", "optimizer.lr=0.05",
]  # fmt: skip
MLP = ["head=mlp", "head.hidden=16", "head.dropout=0.3"]
SECOND = "+transfer.stages.second={trainable: 2, epochs: 3, lr: 0.01, ema: 0.9, norm: train}"
RUNS: dict[str, list[str]] = {
    "fine-tuning": MLP,
    "workers": [
        *MLP, "data.num_workers=2", "sample_transform=rand_augment",
        "data.sample_transform.magnitude=3",
    ],
    "two stages": [*MLP, "transfer=linear_probe", "head.norm=standardize", SECOND],
    "grid": [
        *MLP, "transfer=linear_probe", "head.dropout=0", SECOND,
        "head.grid={lr:[0.001,0.1],seed:[0,1]}",
    ],
    "solver": ["head=linear", "transfer=ridge_probe", SECOND],
    "lora": [*MLP, "transfer=lora", "transfer.stages.finetune.lora.rank=2"],
    "accumulation": [
        *MLP, "trainer.accumulate_grad_batches=2", "trainer.checkpoint_every_n_steps=1",
        "transfer=ema", "transfer.stages.finetune.ema=0.9",
    ],
    "early stopping": [*MLP, "callbacks=early_stopping", "callbacks.early_stopping.patience=1"],
}  # fmt: skip


class Crash(Exception):
    pass


Break = Callable[..., None]


@pytest.fixture
def break_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Break]:
    """`break_at(TransferModule, "training_step", 3)`: the third call crashes, or does `do`."""

    def plan(owner: Any, method: str, number: int, *, after: bool = False, do: Any = None) -> None:
        original = getattr(owner, method)
        calls = 0

        def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            result = original(self, *args, **kwargs) if after or calls != number else None
            if calls == number:
                if do is None:
                    raise Crash
                do()
                return result if after else original(self, *args, **kwargs)
            return result

        monkeypatch.setattr(owner, method, broken)

    yield plan
    monkeypatch.undo()


class Runs:
    """Whole runs, made once; and stopped ones to compare with them."""

    def __init__(self, graft: Graft, tmp_path: Path, shared: Path) -> None:
        self.graft, self.tmp_path, self.shared = graft, tmp_path, shared

    def whole(self, kind: str) -> Path:
        kept = self.shared / kind.replace(" ", "_")
        if not kept.exists():
            done = self.graft("train", *BASE, *RUNS[kind], f"paths.logs={self.tmp_path / 'whole'}")
            assert done.returncode == 0, done.stderr
            (folder,) = (self.tmp_path / "whole").iterdir()
            shutil.copytree(folder, kept)
        return kept

    def start(self, kind: str, *overrides: str) -> tuple[Path, int]:
        """The folder of a run that ends early, and the exit code."""
        logs = self.tmp_path / "stopped"
        code = self.graft("train", *BASE, *RUNS[kind], *overrides, f"paths.logs={logs}").returncode
        (folder,) = logs.iterdir()
        return folder, code

    def resume(self, folder: Path, *overrides: str) -> str:
        done = self.graft("resume", str(folder), *overrides)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def runs(graft: Graft, tmp_path: Path, shared: Path) -> Runs:
    return Runs(graft, tmp_path, shared)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def assert_equal(resumed: Path, whole: Path) -> None:
    """Weights, optimizers, counters, metrics, every logged row."""
    assert record(resumed)["status"] == "done"
    for key in ("metrics", "head"):
        assert record(resumed).get(key) == record(whole).get(key)
    stages = [[{**s, "seconds": 0} for s in record(run)["stages"]] for run in (resumed, whole)]
    assert stages[0] == stages[1]
    files = [sorted(p.relative_to(run) for p in run.rglob("*.ckpt")) for run in (resumed, whole)]
    assert files[0] == files[1]
    for file in files[0]:
        a, b = (torch.load(run / file, weights_only=True) for run in (resumed, whole))
        assert same(a["state_dict"], b["state_dict"]), file
        for key in ("epoch", "global_step", "optimizer_states", "lr_schedulers", "loops"):
            if key == "loops":  # what it counts in this process alone is not part of it
                a, b = ({**c, "loops": c["loops"]["fit_loop"]["epoch_progress"]} for c in (a, b))
            assert equal(a[key], b[key]), (file, key)
    assert (resumed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b


POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "before anything is saved": (TransferModule, "training_step", 2, False),
    "within an epoch": (TransferModule, "training_step", 9, False),
    "in the last batch of an epoch": (TransferModule, "training_step", 10, False),
    "in the first batch of an epoch": (TransferModule, "training_step", 6, False),
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


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_crashes_again_and_again(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In each attempt three batches later; where a grid's winner or adapters are merged, twice."""
    whole = runs.whole(kind)
    original, calls = TransferModule.training_step, 0

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
        patch.setattr(TransferModule, "training_step", step)
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
    ("owner", "method", "number"),
    [
        (TransferModule, "training_step", 8),
        (TransferModule, "training_step", 10),
        (TransferModule, "validation_step", 2),
    ],
)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_next_batch_or_epoch_and_stops(
    runs: Runs, break_at: Break, owner: Any, method: str, number: int, signum: signal.Signals
) -> None:
    """Not at the end of the run, and not without what was trained since the last checkpoint."""
    whole = runs.whole("fine-tuning")
    break_at(owner, method, number, do=lambda: os.kill(os.getpid(), signum))
    folder, code = runs.start("fine-tuning", "trainer.checkpoint_every_n_steps=null")
    assert code == 128 + signum
    assert record(folder)["status"] == "preempted"
    assert record(folder)["error"] == f"stopped by {signum.name}"
    last = torch.load(folder / "checkpoints" / "finetune" / "last.ckpt", weights_only=True)
    assert last["global_step"] == {8: 8, 10: 10, 2: 10}[number]
    assert "after" in runs.resume(folder)
    assert_equal(folder, whole)
    assert signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler)


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
    monkeypatch.setattr("graft.transfer.last_checkpoint.time", clock)
    break_at(TransferModule, "training_step", 5)
    minutes = ["trainer.checkpoint_every_n_steps=null", "trainer.checkpoint_every_n_minutes=1"]
    folder, _ = runs.start("fine-tuning", *minutes)
    last = torch.load(folder / "checkpoints" / "finetune" / "last.ckpt", weights_only=True)
    assert 0 < last["global_step"] < 5


def test_tensorboard_shows_each_step_once(runs: Runs, break_at: Break) -> None:
    """A step that was logged twice shows as a loop in the curve, one that was lost as a gap."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(folder)).Reload()
        return {
            tag: [(e.step, e.value) for e in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }

    logs = {}
    for name in ("whole", "stopped"):
        if name == "stopped":
            break_at(TransferModule, "training_step", 24)  # nine steps into the second stage
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
    break_at(TransferModule, "training_step", 13)
    folder, _ = runs.start("fine-tuning", *constant)
    runs.resume(folder, "trainer.max_epochs=5", "trainer.log_every_n_steps=1")
    assert_equal(folder, whole)
    assert "epochs: 5" in (folder / "config.yaml").read_text()
    assert (folder / "overrides.yaml").read_text().splitlines()[-2] == "- trainer.max_epochs=5"


def test_another_length_changes_the_rate_at_once(runs: Runs, break_at: Break) -> None:
    break_at(TransferModule, "training_step", 11)
    folder, _ = runs.start("fine-tuning")
    runs.resume(folder, "trainer.max_epochs=30")
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    column = next(name for name in rows[0] if name.startswith("lr-"))
    rates = {int(row["step"]): float(row[column]) for row in rows if row[column]}
    plan = [one_cycle(step, 150) * 0.05 for step in range(150)]
    assert [rates[step] for step in range(10, 150)] == pytest.approx(plan[10:])
    assert rates[9] == pytest.approx(one_cycle(9, 15) * 0.05)


def test_a_run_folder_that_was_moved(runs: Runs, break_at: Break) -> None:
    whole = runs.whole("two stages")
    break_at(TransferModule, "training_step", 24)
    folder, _ = runs.start("two stages")
    moved = folder.rename(runs.tmp_path / "moved")
    runs.resume(moved)
    assert_equal(moved, whole)


# ---------------------------------------------------------------- bad input


@pytest.fixture
def stopped(runs: Runs, break_at: Break) -> Path:
    """A run of two stages that stopped in the third epoch of its second."""
    break_at(TransferModule, "training_step", 27)
    folder, _ = runs.start("two stages")
    return folder


def error(graft: Graft, *arguments: Any) -> str:
    done = graft("resume", *map(str, arguments))
    assert done.returncode == 1
    assert done.stderr.startswith("graft: error: ")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr.removeprefix("graft: error: ")


def test_what_cannot_change_is_refused_with_the_reason(graft: Graft, stopped: Path) -> None:
    for override, reason in {
        "backbone=squeezenet1_1": "the checkpoint holds the weights of another one",
        "data.batch_size=4": "the epoch goes on in the middle of the images' order",
        "optimizer.lr=0.1": "its state in the checkpoint goes with the settings it was made with",
        "scheduler=cosine": "a part of it has been run through",
        "transfer.stages.second.norm=frozen": "the stages so far were trained with another plan",
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


def test_a_config_that_was_edited_is_noticed(graft: Graft, stopped: Path) -> None:
    config = stopped / "config.yaml"
    config.write_text(config.read_text().replace("label_smoothing: 0.0", "label_smoothing: 0.1"))
    assert error(graft, stopped).startswith("label_smoothing cannot change in a resumed run")


def test_a_finished_run_is_left_alone(runs: Runs) -> None:
    folder = runs.whole("fine-tuning")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert "is finished: there is nothing to resume" in runs.resume(folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_no_run_folder_or_one_of_another_version(graft: Graft, stopped: Path) -> None:
    assert "is not a run folder: no readable run.json" in error(graft, stopped / "checkpoints")
    assert f"there are 1 in it, like {stopped}" in error(graft, stopped.parent)
    content = (stopped / "run.json").read_text()
    for found, age in ((99, "a newer"), (1, "an older")):
        (stopped / "run.json").write_text(content.replace('"format": 2', f'"format": {found}'))
        assert f"written by {age} version of graft" in error(graft, stopped)
    (stopped / "run.json").write_text(content[:100])
    assert "is not a run folder" in error(graft, stopped)


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
    assert message.startswith(f"cannot write the checkpoint {last}: ")
    assert last.read_bytes() == before
    assert {p.name for p in last.parent.iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
