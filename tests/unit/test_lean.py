"""A training step without Lightning's hooks around it is Lightning's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from graft.data.datamodule import TransferDataModule
from graft.training import trainer as trainer_module
from graft.training.module import TransferModule
from tests.conftest import Train, Trained, compose, equal

# Five batches an epoch.
PROBE = ["transfer=linear_probe", "trainer.max_epochs=2", "trainer.log_every_n_steps=1"]
RUNS: dict[str, list[str]] = {
    "adamw": [*PROBE, "optimizer=adamw"],
    "grid": [*PROBE, "+head.grid={lr:[0.001,0.1],weight_decay:[0.01],seed:[0]}"],
    "sgd, l2_sp and ema": [
        "transfer=l2_sp", "optimizer=sgd", "transfer.stages.finetune.ema=0.9",
        "callbacks=early_stopping",
    ],
}  # fmt: skip


class Hook(L.Callback):
    def on_before_optimizer_step(self, *_: Any) -> None:
        pass


class AccumulateLater(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.accumulate_grad_batches = 1 + trainer.current_epoch


class Counts(L.Callback):
    batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        Counts.batches += 1


class ComesLater(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.callbacks.append(Counts())  # type: ignore[attr-defined]


class EpochSchedulerLater(L.Callback):
    """As Lightning's StochasticWeightAveraging does."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.lr_scheduler_configs[0].interval = "epoch"


@pytest.fixture
def batches_of_lightning(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epoch of each batch around which Lightning's own code calls all hooks."""
    epochs: list[int] = []
    original = _TrainingEpochLoop.advance

    def spy(self: Any, *arguments: Any) -> None:
        epochs.append(self.trainer.current_epoch)
        original(self, *arguments)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", spy)
    return epochs


@pytest.fixture
def steps_of_lightning(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epoch of each batch that Lightning's own code trains on."""
    epochs: list[int] = []
    original = _AutomaticOptimization._make_closure

    def spy(self: Any, *arguments: Any) -> Any:
        epochs.append(self.trainer.current_epoch)
        return original(self, *arguments)

    monkeypatch.setattr(_AutomaticOptimization, "_make_closure", spy)
    return epochs


def last_checkpoint(run: Trained, stage: str) -> dict[str, Any]:
    return torch.load(run.folder / "checkpoints" / stage / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("kind", RUNS)
def test_weights_counters_and_logs_are_those_of_lightnings_own_loop(
    train_tiny: Train,
    monkeypatch: pytest.MonkeyPatch,
    batches_of_lightning: list[int],
    steps_of_lightning: list[int],
    kind: str,
) -> None:
    (stage,) = compose(*RUNS[kind])["transfer"]["stages"]
    lean = train_tiny(*RUNS[kind])
    assert not steps_of_lightning
    assert not batches_of_lightning
    monkeypatch.setattr(trainer_module, "make_lean", lambda trainer: None)
    own = train_tiny(*RUNS[kind])
    assert steps_of_lightning
    a, b = (last_checkpoint(run, stage) for run in (lean, own))
    for key in ("state_dict", "epoch", "global_step", "optimizer_states", "lr_schedulers", "loops"):
        assert equal(a[key], b[key]), key
    assert lean.metrics == own.metrics
    logs = [(run.folder / "metrics.csv").read_text() for run in (lean, own)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "override",
    [
        "trainer.gradient_clip_val=1",
        "trainer.accumulate_grad_batches=2",
        "+trainer.profiler=simple",
        "+callbacks.hook._target_=tests.unit.test_lean.Hook",
    ],
)
def test_where_something_happens_within_a_step_lightning_takes_it(
    train_tiny: Train, steps_of_lightning: list[int], override: str
) -> None:
    train_tiny(*PROBE, override)
    assert steps_of_lightning == [0] * 5 + [1] * 5


def test_a_module_with_a_hook_of_its_own_is_left_to_lightning(
    train_tiny: Train, steps_of_lightning: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransferModule, "on_after_backward", lambda self: None)
    train_tiny(*PROBE)
    assert len(steps_of_lightning) == 10


def passes_on(self: Any, batch: Any, *_: Any) -> Any:
    return batch


def does_nothing(self: Any, *_: Any) -> None:
    pass


def steps(self: Any, scheduler: Any, metric: Any) -> None:
    scheduler.step()


HOOKS: dict[str, tuple[type, Callable[..., Any]]] = {
    "on_train_batch_start": (TransferModule, does_nothing),
    "on_train_batch_end": (TransferModule, does_nothing),
    "lr_scheduler_step": (TransferModule, steps),
    "on_after_batch_transfer": (TransferModule, passes_on),
    "transfer_batch_to_device": (TransferDataModule, passes_on),
    "on_before_batch_transfer": (TransferDataModule, passes_on),
}


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in both")  # here
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_around_steps_is_called_by_lightning(
    train_tiny: Train, batches_of_lightning: list[int], monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    kind, function = HOOKS[hook]
    monkeypatch.setattr(kind, hook, function)
    train_tiny(*PROBE)
    assert batches_of_lightning == [0] * 5 + [1] * 5


def test_a_training_step_may_leave_out_the_number_of_the_batch(
    train_tiny: Train, batches_of_lightning: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TransferModule.training_step
    monkeypatch.setattr(
        TransferModule, "training_step", lambda self, batch: original(self, batch, 0)
    )
    train_tiny(*PROBE)
    assert len(batches_of_lightning) == 10


def test_a_scheduler_that_changes_to_epochs_steps_once_in_an_epoch(
    train_tiny: Train, batches_of_lightning: list[int]
) -> None:
    run = train_tiny(*PROBE, "+callbacks.later._target_=tests.unit.test_lean.EpochSchedulerLater")
    assert batches_of_lightning == [1] * 5
    (scheduler,) = last_checkpoint(run, "probe")["lr_schedulers"]
    assert scheduler["last_epoch"] == 5 + 1


def test_a_callback_that_comes_later_is_called(train_tiny: Train) -> None:
    Counts.batches = 0
    train_tiny(*PROBE, "+callbacks.later._target_=tests.unit.test_lean.ComesLater")
    assert Counts.batches == 5


def test_accumulation_that_starts_later_is_seen(
    train_tiny: Train, steps_of_lightning: list[int]
) -> None:
    run = train_tiny(*PROBE, "+callbacks.later._target_=tests.unit.test_lean.AccumulateLater")
    assert steps_of_lightning == [1] * 5
    assert last_checkpoint(run, "probe")["global_step"] == 5 + 3  # of 2, 2 and 1 batches
