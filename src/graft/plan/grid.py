"""A grid of heads, as values: its points, and each head's best score."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
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
    """Each head's best epoch: by the monitored metric, then the lower loss, then the earlier.

    Plain lists: it goes in checkpoints. A head that diverges keeps the best it had before; one
    that never was finite has epoch 0.

    Args:
        monitor: the metric, "val/acc" say.
        mode: "max", or "min" if smaller is better.
        score: larger is better: of "min", the metric's negative.
    """

    points: list[GridPoint]
    monitor: str
    mode: str
    score: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    epoch: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = len(self.points)
        self.score = self.score or [-math.inf] * size
        self.loss = self.loss or [math.inf] * size
        self.epoch = self.epoch or [0] * size

    @property
    def sign(self) -> int:
        return 1 if self.mode == "max" else -1

    def update(self, score: Sequence[float], loss: Sequence[float], epoch: int) -> None:
        """Take over who is better than before; `epoch` counts from 1."""
        for k, (new, with_loss) in enumerate(zip(score, loss, strict=True)):
            if new > -math.inf and (new, -with_loss) > (self.score[k], -self.loss[k]):
                self.score[k], self.loss[k], self.epoch[k] = new, with_loss, epoch

    def state(self) -> dict[str, Any]:
        return {"score": list(self.score), "loss": list(self.loss), "epoch": list(self.epoch)}

    def restored(self, state: dict[str, Any]) -> GridRecord:
        """The same heads with the state of a checkpoint; of format 2, its "acc" is the score."""
        score = state["score"] if "score" in state else state["acc"]
        return replace(self, score=score, loss=state["loss"], epoch=state["epoch"])

    def ranked(self) -> list[int]:
        """Heads from best to worst. The first is the best head of the best checkpoint, which goes
        by the same rule.
        """
        return sorted(
            range(len(self.points)), key=lambda k: (-self.score[k], self.loss[k], self.epoch[k])
        )

    def row(self, index: int) -> dict[str, Any]:
        scores = {self.monitor: self.sign * self.score[index], "val/loss": self.loss[index]}
        return {**asdict(self.points[index]), **scores, "epoch": self.epoch[index]}

    def write(self, path: Path) -> None:
        """All heads, best first, as CSV."""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.row(0)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.row(k) for k in self.ranked())
