"""A grid of heads, as values: its points, and each head's best score."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from graft.models.heads import Head, HeadGrid, seeded_head


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
