"""Runs that stop, and whole ones to compare what is resumed with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.conftest import TINY, Graft, equal, same

# Five batches an epoch. Dropout draws from torch's own state; the rate changes in every step.
BASE = [
    *TINY, "trainer.max_epochs=3",
    "trainer.checkpoint_every_n_steps=2", "trainer.log_every_n_steps=1", "optimizer.lr=0.05",
]  # fmt: skip
MLP = ["head=mlp", "head.hidden=16", "head.dropout=0.3"]
SECOND = "+transfer.stages.second={trainable: 2, epochs: 3, ema: 0.9, norm: train}"
POLISH = (
    "+transfer.stages.polish={trainable: head, solver: lbfgs, augment: false, cache: on, lr: 1, "
    "epochs: 9, weight_decay: 0.01}"
)
CLIPPED = ["trainer.gradient_clip_val=0.5", "transfer=l2_sp"]
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
    "solvers": ["head=linear", "transfer=ridge_probe", POLISH, SECOND],
    "lora": [*MLP, "transfer=lora", "transfer.stages.finetune.lora.rank=2"],
    "accumulation": [
        *MLP, "trainer.accumulate_grad_batches=2", "trainer.checkpoint_every_n_steps=1",
        "transfer=ema", "transfer.stages.finetune.ema=0.9",
    ],
    "bf16-mixed": [*MLP, *CLIPPED, "trainer.precision=bf16-mixed"],
    "16-mixed": [*MLP, *CLIPPED, "trainer.precision=16-mixed"],
    "own checkpoints": [
        *MLP, f"+callbacks.mine={{_target_: {__name__}.OwnCheckpoint, every_n_train_steps: 2}}",
    ],
    "masked": [
        "task=masked", "head=features", "task.probe=1", "trainer.accumulate_grad_batches=2",
        "trainer.checkpoint_every_n_steps=1",
    ],
    "barlow": ["task=barlow", "task.width=16", "head=features", "data.augment.color=0.4"],
    "two domains": [
        *MLP, "task=dann", "transfer=adabn", "data.target={shift: contrast, severity: 3}",
        "data.oracle=true", "data.sampling=importance",
    ],
    "early stopping": [*MLP, "callbacks=early_stopping", "callbacks.early_stopping.patience=1"],
}  # fmt: skip


class OwnCheckpoint(ModelCheckpoint):
    """As a user may have one; here its first file comes before our own best.ckpt."""


class Crash(Exception):
    pass


Break = Callable[..., None]


@pytest.fixture
def break_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Break]:
    """`break_at(TransferModule, "loss", 3)`: the third call crashes, or does `do`."""

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


@pytest.fixture(scope="session")
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
        assert a.get("MixedPrecision") == b.get("MixedPrecision"), file  # the scale of the loss
        for key in ("epoch", "global_step", "optimizer_states", "lr_schedulers", "loops"):
            if key == "loops":  # what it counts in this process alone is not part of it
                a, b = ({**c, "loops": c["loops"]["fit_loop"]["epoch_progress"]} for c in (a, b))
            assert equal(a.get(key), b.get(key)), (file, key)
    assert (resumed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: a step logged twice would be a loop, one that is lost a gap."""
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    shown = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert len(shown.pop("time/fit_seconds", [0])) == 1  # no two runs are equal in it
    return shown
