"""The fit of a grid of heads: which of them is best, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graft.plan.grid import GridPoint, GridRecord


class GridFit:
    """What a module needs beside its `HeadGrid` during a fit: each head's best score so far."""

    def __init__(self, points: Sequence[GridPoint], monitor: str, mode: str) -> None:
        self.record = GridRecord(list(points), monitor, mode)

    def end_epoch(self, metrics: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        """Metrics of the best head, then the one with the lowest loss, of those (K,) of all.

        A head whose loss is not finite is the worst: an argmax over NaN would still hit a class.
        """
        # As they are logged: the best checkpoint goes by these.
        metrics = {name: values.float() for name, values in metrics.items()}
        loss, score = metrics["val/loss"], metrics[self.record.monitor]
        rank = torch.where(loss.isfinite(), score * self.record.sign, -torch.inf)
        self.record.update(rank.tolist(), loss.tolist(), epoch)
        best = int(torch.where(rank == rank.max(), loss.nan_to_num(torch.inf), torch.inf).argmin())
        return {name: values[best] for name, values in metrics.items()}
