"""The fit of a grid of heads: their losses and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from graft.plan.grid import GridPoint, GridRecord

if TYPE_CHECKING:
    pass


class HeadScores(Metric):
    """Loss and accuracy of each of K heads: exact over ranks with unequal shares.

    `compute` gives (loss, acc), both (K,); the accuracy of a head whose loss is not finite is -1,
    because an argmax over NaN would still hit some class.
    """

    full_state_update = False
    loss: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.add_state("loss", torch.zeros(heads), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros(heads), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, losses: Tensor, count: int, correct: Tensor | None = None) -> None:
        """Mean losses (K,) of `count` examples, and how many each head got right (K,)."""
        self.loss += losses * count
        self.count += count
        if correct is not None:
            self.correct += correct

    def compute(self) -> tuple[Tensor, Tensor]:
        loss = self.loss / self.count
        return loss, torch.where(loss.isfinite(), self.correct / self.count, -1.0)


class GridFit(nn.Module):
    """What a module needs beside its `HeadGrid` during a fit: scores per head, and the record."""

    def __init__(self, points: Sequence[GridPoint]) -> None:
        super().__init__()
        self.record = GridRecord(list(points))
        self.trained = HeadScores(len(points))
        self.validated = HeadScores(len(points))

    def training_losses(self, logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        losses = head_losses(logits, labels, label_smoothing=label_smoothing)
        self.trained.update(losses.detach(), len(labels))
        return losses

    def validate(self, logits: Tensor, labels: Tensor) -> None:
        correct = (logits.argmax(-1) == labels[:, None]).sum(0)
        self.validated.update(head_losses(logits, labels), len(labels), correct)

    def end_epoch(self, epoch: int) -> dict[str, Tensor]:
        """Metrics of the head with the highest accuracy, then the lowest loss."""
        # A Metric gives a tensor of one element without its dimension.
        loss, acc = (values.reshape(-1) for values in self.validated.compute())
        train_loss = self.trained.compute()[0].reshape(-1)
        for scores in (self.trained, self.validated):
            scores.reset()
        self.record.update(acc.tolist(), loss.tolist(), epoch)
        best = int(torch.where(acc == acc.max(), loss.nan_to_num(torch.inf), torch.inf).argmin())
        return {"train/loss": train_loss[best], "val/loss": loss[best], "val/acc": acc[best]}


def head_losses(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of each head (K,) from logits (N, K, C)."""
    # Heads innermost in memory: the softmax over a few classes then runs along many numbers.
    losses = F.cross_entropy(
        logits.transpose(1, 2).contiguous(),
        labels[:, None].expand(logits.shape[:2]),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.mean(0)
