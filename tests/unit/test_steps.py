"""Several steps in one batch of Lightning's train as its own batches of one step do."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from graft.training import run_stages
from tests.conftest import Train, Trained, equal

PROBE = ["transfer=linear_probe", "trainer.max_epochs=3"]  # five steps an epoch
KINDS: dict[str, list[str]] = {
    "adamw": ["optimizer=adamw"],
    "sgd": ["optimizer=sgd", "data.drop_last=false"],
    "mlp with dropout": ["head=mlp", "head.dropout=0.5", "optimizer=adamw"],
    "batchnorm, early stopping": ["head.norm=batchnorm", "callbacks=early_stopping"],
    "grid": ["optimizer=adamw", "+head.grid={lr:[0.001,0.1],weight_decay:[0.01],seed:[0]}"],
    "views": ["transfer.stages.probe.views=flip"],
    "bfloat16": ["trainer.precision=bf16-mixed", "optimizer=adamw"],
    "bfloat16, steps with products of matrices": [
        "trainer.precision=bf16-mixed",
        "optimizer._target_=torch.optim.Adafactor",
        "~optimizer.momentum",
        "~optimizer.nesterov",
        "optimizer.lr=0.001",
    ],
    "an optimizer that calls a closure": [
        "optimizer._target_=tests.unit.test_steps.Twice",
    ],
    "saved every two steps": ["trainer.checkpoint_every_n_steps=2"],
}


class Twice(torch.optim.SGD):
    """As sharpness-aware minimisation, L-BFGS and others: it computes gradients by itself."""

    cleared = 0

    def step(self, closure: Any = None) -> Any:
        closure()
        super().step()
        loss = closure()
        super().step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        Twice.cleared += 1
        super().zero_grad(set_to_none)


def last_checkpoint(run: Trained) -> dict[str, Any]:
    return torch.load(run.folder / "checkpoints" / "probe" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_every", [1, 3])
def test_weights_counts_and_logs_are_those_of_lightnings_own_steps(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch, kind: str, log_every: int
) -> None:
    overrides = [*PROBE, *KINDS[kind], f"trainer.log_every_n_steps={log_every}"]
    Twice.cleared = 0
    several = train_tiny(*overrides)
    assert Twice.cleared == (30 if "closure" in kind else 0)
    monkeypatch.setattr(run_stages, "steps_per_batch", lambda trainer: 1)
    own = train_tiny(*overrides)
    a, b = last_checkpoint(several), last_checkpoint(own)
    assert a["resume"]["steps_per_batch"] == (2 if "saved" in kind else 32)
    assert b["resume"]["steps_per_batch"] == 1
    for key in ("state_dict", "epoch", "global_step", "optimizer_states", "lr_schedulers"):
        assert equal(a[key], b[key]), key
    assert several.metrics == own.metrics
    logs = [(run.folder / "metrics.csv").read_text() for run in (several, own)]
    assert logs[0] == logs[1]
    assert logs[0].count("\n") > 15 // log_every


class Counts(L.Callback):
    batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        Counts.batches += 1


class EpochsOnly(L.Callback):
    epochs_only = True
    epochs = 0

    def on_train_epoch_end(self, *_: Any) -> None:
        EpochsOnly.epochs += 1


class AccumulateLater(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.accumulate_grad_batches = 1 + trainer.current_epoch


@pytest.mark.parametrize(
    "override",
    [
        "trainer.gradient_clip_val=1",
        "trainer.accumulate_grad_batches=2",
        "trainer.limit_train_batches=4",
        "trainer.limit_train_batches=1 transfer.stages.probe.cache=on",
        "transfer.stages.probe.cache=off",
        "transfer.stages.probe.ema=0.9",
        "+trainer.profiler=simple",
        "+callbacks.mine._target_=tests.unit.test_steps.Counts",
        "+callbacks.mine._target_=tests.unit.test_steps.AccumulateLater",
    ],
)
def test_where_anything_looks_at_single_steps_a_batch_has_one(
    train_tiny: Train, override: str
) -> None:
    Counts.batches = 0
    run = train_tiny(*PROBE, *override.split())
    assert last_checkpoint(run)["resume"]["steps_per_batch"] == 1
    assert Counts.batches == (15 if "Counts" in override else 0)


def test_a_callback_that_asks_for_nothing_more_leaves_batches_of_several_steps(
    train_tiny: Train,
) -> None:
    EpochsOnly.epochs = 0
    run = train_tiny(*PROBE, "+callbacks.mine._target_=tests.unit.test_steps.EpochsOnly")
    assert last_checkpoint(run)["resume"]["steps_per_batch"] > 1
    assert EpochsOnly.epochs == 3


def test_a_stage_after_one_of_several_steps_has_its_own_options(train_tiny: Train) -> None:
    """Lightning refuses to accumulate where steps are taken by hand."""
    run = train_tiny("transfer=lp_ft", "trainer.max_epochs=1", "trainer.log_every_n_steps=1")
    probe, finetune = (
        torch.load(run.folder / "checkpoints" / stage / "last.ckpt", weights_only=True)
        for stage in ("probe", "finetune")
    )
    assert probe["resume"]["steps_per_batch"] > finetune["resume"]["steps_per_batch"] == 1
