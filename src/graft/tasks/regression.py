"""Numbers for each example: squared, absolute or Huber loss; errors in the numbers' own units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from graft.data.datasets import Batch
from graft.models.backbone import Backbone
from graft.tasks.base import Model, Tally, Task, as_wide

if TYPE_CHECKING:
    from torchmetrics import Metric

LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
}


class Regression(Task):
    """Targets (N, T) of numbers, which the head learns scaled.

    The scale, zero mean and unit variance over the training examples, goes into checkpoints: a
    prediction is output * std + mean.

    Args:
        loss: "mse", "l1" or "huber" (delta 1), of scaled numbers.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        monitor: str = "val/rmse",
        mode: str = "min",
        loss: Literal["mse", "l1", "huber"] = "mse",
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, metrics=metrics)
        if loss not in LOSSES:
            raise ValueError(f"task.loss={loss}: must be one of {', '.join(LOSSES)}")
        self.kind = loss

    def build(self, num_outputs: int, backbone: Backbone) -> None:
        self.register_buffer("mean", torch.zeros(num_outputs))
        self.register_buffer("std", torch.ones(num_outputs))

    def prepare(self, labels: NDArray[np.float32], classes: Sequence[str]) -> None:
        if labels.ndim != 2:
            raise ValueError("task=regression needs columns of numbers, like those of image_table")
        std = labels.std(0, dtype=np.float64)
        if not std.all():
            name = classes[int(std.argmin())]
            raise ValueError(f"task=regression: {name} is the same for every training image")
        self.mean.copy_(torch.from_numpy(labels.mean(0, dtype=np.float64)))
        self.std.copy_(torch.from_numpy(std))

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return self.losses(model.outputs(batch), batch["target"]).mean(0)

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Of each example, a mean over numbers: (N,) or (N, K)."""
        scaled = as_wide((target - self.mean) / self.std, outputs)
        return LOSSES[self.kind](outputs.float(), scaled, reduction="none").mean(-1)

    def predicted(self, outputs: Tensor) -> Tensor:
        """In the units of the numbers."""
        return outputs.float() * self.std + self.mean

    def evaluate(self, model: Model, batch: Batch, tally: Tally) -> Tensor:
        outputs, target = model.outputs(batch), batch["target"]
        predicted = self.predicted(outputs)
        for metric in self.own_metrics.values():
            metric.update(predicted.squeeze(-1), target.squeeze(-1))  # type: ignore[operator]
        error = predicted.double() - as_wide(target, outputs)
        # About the training mean: no large numbers are subtracted in `metrics`.
        off = target.double() - self.mean
        tally.add(
            loss=self.losses(outputs, target).sum(0, dtype=torch.float64),
            examples=len(target),
            absolute=error.abs().sum(0),
            squared=error.square().sum(0),
            off=off.sum(0),
            off_squared=off.square().sum(0),
        )
        return outputs

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        n = sums["examples"]
        spread = sums["off_squared"] - sums["off"].square() / n
        return {
            "loss": sums["loss"] / n,
            "mae": (sums["absolute"] / n).mean(-1),
            "rmse": (sums["squared"] / n).sqrt().mean(-1),
            "r2": (1 - sums["squared"] / spread).mean(-1),
        }
