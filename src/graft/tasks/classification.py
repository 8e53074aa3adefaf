"""Classification: cross-entropy or focal loss, accuracy and macro F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from graft.data.datasets import Batch
from graft.tasks.base import Model, Tally, Task

if TYPE_CHECKING:
    from torchmetrics import Metric


class Classification(Task):
    """One class for each example.

    The training loss is a mean over examples of weight * loss. Weights have a mean of 1 over the
    training examples, and the mean is not over the weights of a batch, so that ranks and
    accumulated batches add up to what one large batch gives.

    Args:
        loss: "cross_entropy", or "focal": -(1 - p)^gamma log p (Lin et al. 2017).
        class_weights: of the training loss; "balanced": in inverse proportion to how often a class
            occurs, or a number for each class in the order of their names.
        label_smoothing: of the training loss; a stage may have its own.
    """

    weights: Tensor | None
    classifies = True
    output_kind = "classes"

    def __init__(
        self,
        *,
        monitor: str = "val/acc",
        mode: str = "max",
        loss: Literal["cross_entropy", "focal"] = "cross_entropy",
        gamma: float = 2.0,
        class_weights: Literal["balanced"] | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, metrics=metrics)
        if loss not in ("cross_entropy", "focal"):
            raise ValueError(f"task.loss={loss}: must be cross_entropy or focal")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"task.label_smoothing={label_smoothing}: must be in [0, 1)")
        self.gamma = gamma if loss == "focal" else 0.0
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.stage_label_smoothing: float | None = None
        self.register_buffer("weights", None, persistent=False)

    def prepare(self, labels: NDArray[np.int64], classes: Sequence[str]) -> None:
        if labels.ndim != 1:
            raise ValueError(
                "task=classification needs one class for each image; this data has columns: use "
                "task=multilabel or task=regression"
            )
        if self.class_weights is None:
            return
        counts = np.bincount(labels, minlength=len(classes))
        if isinstance(self.class_weights, str):
            if missing := [name for name, n in zip(classes, counts, strict=True) if n == 0]:
                raise ValueError(
                    f"task.class_weights=balanced: no training image shows {missing[0]}: give a "
                    "number for each class"
                )
            weights = 1 / counts
        else:
            weights = np.array(self.class_weights, dtype=float)
            if len(weights) != len(classes):
                raise ValueError(
                    f"task.class_weights has {len(weights)} numbers, and the data {len(classes)} "
                    f"classes ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"
                )
        weights = weights * counts.sum() / (weights * counts).sum()
        self.weights = torch.as_tensor(weights, dtype=torch.float32)

    def start_stage(self, label_smoothing: float | None) -> None:
        self.stage_label_smoothing = label_smoothing

    @property
    def smoothing(self) -> float:
        """Label smoothing of the current stage."""
        own = self.stage_label_smoothing
        return self.label_smoothing if own is None else own

    def loss(self, model: Model, batch: Batch) -> Tensor:
        # Probabilities, where images are mixed.
        return self.losses(model.outputs(batch), batch.get("target", batch["label"])).mean(0)

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Training losses (N,) or (N, K) of logits (N, C) or (N, K, C).

        Args:
            target: labels (N,), or probabilities (N, C).
        """
        if self.weights is None and not self.gamma:
            return cross_entropy(logits, target, self.smoothing)
        classes = logits.shape[-1]
        if target.ndim == 1:
            target = F.one_hot(target, classes)
        target = target * (1 - self.smoothing) + self.smoothing / classes
        if logits.ndim == 3:
            target = target[:, None]
        log_p = F.log_softmax(logits, -1)
        terms = -target * log_p * (1 - log_p.exp()) ** self.gamma
        return (terms if self.weights is None else terms * self.weights).sum(-1)

    def predicted(self, outputs: Tensor) -> Tensor:
        return outputs.float().softmax(-1)

    def evaluate(self, model: Model, batch: Batch, tally: Tally) -> Tensor:
        logits, label = model.outputs(batch), batch["label"]
        for metric in self.own_metrics.values():
            metric.update(logits, label)  # type: ignore[operator]
        prediction = logits.argmax(-1)
        hit = prediction == (label[:, None] if logits.ndim == 3 else label)
        tally.add(
            loss=cross_entropy(logits, label).sum(0, dtype=torch.float64),
            images=class_counts(label, logits.shape[-1]),
            predicted=class_counts(prediction, logits.shape[-1]),
            right=class_counts(prediction, logits.shape[-1], hit),
        )
        return logits

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images, predicted, right = (sums[name] for name in ("images", "predicted", "right"))
        f1 = 2 * right / (images + predicted)  # nan where a class neither occurs nor is predicted
        return {
            "loss": sums["loss"] / images.sum(),
            "acc": right.sum(-1) / images.sum(),
            "f1": f1.nanmean(-1),
        }


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Of each example: (N,) or (N, K) of logits (N, C) or (N, K, C)."""
    if logits.ndim == 3:
        # Heads innermost in memory: the softmax over a few classes runs along many numbers.
        logits = logits.transpose(1, 2).contiguous()
        target = target[:, None].expand(len(target), logits.shape[2])
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)


def class_counts(classes: Tensor, num_classes: int, weights: Any = None) -> Tensor:
    """(N,) or (N, K) classes -> (num_classes,) or (K, num_classes): how often each occurs."""
    shape = (*classes.shape[1:], num_classes)
    ones = torch.ones_like(classes) if weights is None else weights
    counts = torch.zeros(shape, dtype=torch.float64, device=classes.device)
    return counts.scatter_add_(-1, classes.movedim(0, -1), ones.movedim(0, -1).double())
