"""A grid of heads in a stage: what is in it, how its heads are scored, how the winner is kept."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from graft.heads import Head, HeadGrid, seeded_head

if TYPE_CHECKING:
    from graft.module import TransferModule


@dataclass(frozen=True)
class GridPoint:
    """Hyper-parameters of one head. The seed decides its initial weights; data is the run's."""

    lr: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Grid:
    """Every combination of the lists, as heads that train together.

    Args:
        make: called with (num_features, num_classes) for each head.
    """

    make: Callable[[int, int], Head]
    lr: Sequence[float]
    weight_decay: Sequence[float]
    seed: Sequence[int]

    @property
    def points(self) -> list[GridPoint]:
        return [GridPoint(*values) for values in product(self.lr, self.weight_decay, self.seed)]

    def heads(self, num_features: int, num_classes: int) -> HeadGrid:
        sizes = (num_features, num_classes)
        return HeadGrid([seeded_head(self.make, sizes, point.seed) for point in self.points])


@dataclass
class GridRecord:
    """Each head's first best epoch, by validation accuracy. Plain lists: it goes in checkpoints.

    A head that diverges keeps the best it had before; one that never was finite has -1 and epoch 0.
    """

    points: list[GridPoint]
    acc: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    epoch: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = len(self.points)
        self.acc = self.acc or [-1.0] * size
        self.loss = self.loss or [float("inf")] * size
        self.epoch = self.epoch or [0] * size

    def update(self, acc: Sequence[float], loss: Sequence[float], epoch: int) -> None:
        """Take over who is better than before; `epoch` counts from 1."""
        for k, (a, b) in enumerate(zip(acc, loss, strict=True)):
            if a > self.acc[k]:
                self.acc[k], self.loss[k], self.epoch[k] = a, b, epoch

    def state(self) -> dict[str, Any]:
        return {"acc": list(self.acc), "loss": list(self.loss), "epoch": list(self.epoch)}

    def ranked(self) -> list[int]:
        """Heads from best to worst. The first is the best head of the best checkpoint: that is
        written when an accuracy is reached for the first time, by the one with the lowest loss.
        """
        return sorted(
            range(len(self.points)), key=lambda k: (-self.acc[k], self.epoch[k], self.loss[k])
        )

    def row(self, index: int) -> dict[str, Any]:
        return {
            **asdict(self.points[index]),
            "val/acc": self.acc[index],
            "val/loss": self.loss[index],
            "epoch": self.epoch[index],
        }

    def write(self, path: Path) -> None:
        """All heads, best first, as CSV."""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.row(0)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.row(k) for k in self.ranked())


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


def start_grid(module: TransferModule, grid: Grid, num_classes: int) -> None:
    """The grid becomes the module's head for a stage."""
    module.head = grid.heads(module.backbone.num_features, num_classes)
    module.grid = GridFit(grid.points)


def finish_grid(module: TransferModule) -> GridRecord:
    """The winner becomes the module's head. Call it with the grid's best weights loaded."""
    fit, heads = module.grid, module.head
    if fit is None or not isinstance(heads, HeadGrid):
        raise RuntimeError("call start_grid before finish_grid")
    module.head, module.grid = heads.head(fit.record.ranked()[0]), None
    return fit.record
