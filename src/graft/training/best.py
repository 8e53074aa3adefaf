"""`best.ckpt`: the weights of a stage's best validation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn


class Best(L.Callback):
    """Keeps the weights with the best score; of equal ones those with the lower validation loss.

    Args:
        path: always this one.
        monitor: a metric that is logged in validation.
        mode: "max", or "min" if smaller is better.
    """

    def __init__(self, path: Path, monitor: str, mode: str) -> None:
        self.path, self.monitor = path, monitor
        self.sign = 1 if mode == "max" else -1
        self.best: tuple[float, float] | None = None  # larger is better: score, minus the loss
        self.oracle: float | None = None  # the best accuracy on a target's test split, for a table

    @property
    def score(self) -> float | None:
        return None if self.best is None else self.sign * self.best[0]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.path = trainer.strategy.broadcast(self.path)  # the first rank knows it

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(
                f"task.monitor={self.monitor}: there is no such metric; validation gives "
                f"{', '.join(name for name in metrics if name.startswith('val/'))}"
            )
        if "oracle/acc" in metrics:
            self.oracle = max(self.oracle or 0.0, float(metrics["oracle/acc"]))
        loss = float(metrics["val/loss"]) if "val/loss" in metrics else math.inf
        now = (self.sign * float(metrics[self.monitor]), -loss)
        if self.best is None or now > self.best:
            self.best = now
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        best = None if self.best is None else list(self.best)
        return {"best": best} if self.oracle is None else {"best": best, "oracle": self.oracle}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = None if state_dict["best"] is None else tuple(state_dict["best"])
        self.oracle = state_dict.get("oracle")


def state_of_format_2(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """That of `Best` in a checkpoint of format 2, where Lightning's ModelCheckpoint was in its
    place: it kept the first of equal scores.
    """
    for state in checkpoint["callbacks"].values():
        if Path(state.get("best_model_path") or "").name == "best.ckpt":
            return {"best": [float(state["best_model_score"]), math.inf]}
    return None
