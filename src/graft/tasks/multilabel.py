"""Several labels for each example: binary cross-entropy, accuracy and macro F1 over labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from graft.data.datasets import Batch
from graft.tasks.base import Model, Tally, Task, as_wide

if TYPE_CHECKING:
    from torchmetrics import Metric


class MultiLabel(Task):
    """Targets (N, L) of 0 and 1; an example has a label where its logit is above 0.

    Args:
        pos_weight: how much a 1 counts in the training loss: "balanced": as much as all 0 of its
            label together, or a number for each label.
    """

    weights: Tensor | None
    output_kind = "labels"

    def __init__(
        self,
        *,
        monitor: str = "val/f1",
        mode: str = "max",
        pos_weight: Literal["balanced"] | Sequence[float] | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, metrics=metrics)
        self.pos_weight = pos_weight
        self.register_buffer("weights", None, persistent=False)

    def prepare(self, labels: NDArray[np.float32], classes: Sequence[str]) -> None:
        if labels.ndim != 2:
            raise ValueError("task=multilabel needs columns of 0 and 1, like those of image_table")
        if len(wrong := np.argwhere((labels < 0) | (labels > 1))):
            row, column = wrong[0]
            raise ValueError(
                f"task=multilabel: {classes[column]} has the value {labels[row, column]:g}: labels "
                "are from 0 to 1; for other numbers there is task=regression"
            )
        if self.pos_weight is None:
            return
        if isinstance(self.pos_weight, str):
            ones = labels.sum(0)
            if not ones.all():
                name = classes[int(ones.argmin())]
                raise ValueError(f"task.pos_weight=balanced: no training image shows {name}")
            weights = (len(labels) - ones) / ones
        else:
            weights = np.array(self.pos_weight, dtype=float)
            if len(weights) != len(classes):
                raise ValueError(
                    f"task.pos_weight has {len(weights)} numbers, the data {len(classes)} labels"
                )
        self.weights = torch.as_tensor(weights, dtype=torch.float32)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return self.losses(model.outputs(batch), batch["target"], self.weights).mean(0)

    @staticmethod
    def losses(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Of each example, a mean over labels: (N,) or (N, K)."""
        return F.binary_cross_entropy_with_logits(
            logits, as_wide(target, logits), reduction="none", pos_weight=weights
        ).mean(-1)

    def predicted(self, outputs: Tensor) -> Tensor:
        return outputs.float().sigmoid()

    def evaluate(self, model: Model, batch: Batch, tally: Tally) -> Tensor:
        logits, target = model.outputs(batch), batch["target"]
        for metric in self.own_metrics.values():
            metric.update(logits, target.int())  # type: ignore[operator]
        predicted, true = logits > 0, as_wide(target, logits) > 0.5
        tally.add(
            loss=self.losses(logits, target).sum(0, dtype=torch.float64),
            examples=len(target),
            true=true.sum(0),
            predicted=predicted.sum(0),
            right=(predicted & true).sum(0),
            equal=(predicted == true).sum(0),
            exact=(predicted == true).all(-1).sum(0),
        )
        return logits

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        f1 = 2 * sums["right"] / (sums["true"] + sums["predicted"])  # nan: never there, nor said
        return {
            "loss": sums["loss"] / sums["examples"],
            "acc": (sums["equal"] / sums["examples"]).mean(-1),
            "f1": f1.nanmean(-1),
            "exact": sums["exact"] / sums["examples"],
        }
