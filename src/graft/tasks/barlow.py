"""Barlow Twins (Zbontar et al. 2021): equal features of two views, no two features alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graft.data.datasets import Batch
from graft.models.backbone import Backbone
from graft.tasks.base import Model, Tally, gathered
from graft.tasks.pretraining import Pretraining


class Barlow(Pretraining):
    """The loss is of the cross-correlation of the projections of two augmentations of each image,
    over the batches of all ranks; in validation, over all images. An accumulated batch is a batch
    of its own.

    Args:
        width, layers: of the projector: that many linear layers, BatchNorm and ReLU between them.
        redundancy: weight of the off-diagonal terms, lambda in the paper.
    """

    two_views = True

    def __init__(
        self,
        *,
        monitor: str = "val/loss",
        mode: str = "min",
        probe: int = 5,
        width: int = 512,
        layers: int = 3,
        redundancy: float = 0.005,
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, probe=probe)
        self.width, self.layers, self.redundancy = width, layers, redundancy

    def build(self, num_outputs: int, backbone: Backbone) -> None:
        parts: list[nn.Module] = []
        incoming = backbone.num_features
        for _ in range(self.layers - 1):
            parts += [
                nn.Linear(incoming, self.width, bias=False),
                nn.BatchNorm1d(self.width),
                nn.ReLU(inplace=True),
            ]
            incoming = self.width
        self.projector = nn.Sequential(*parts, nn.Linear(incoming, self.width, bias=False))

    def projections(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """(N, width) of each view, in float32. Each goes through BatchNorms on its own."""
        first, second = (
            self.projector(model.backbone(batch[view])).float() for view in ("input", "second")
        )
        return first, second

    def loss(self, model: Model, batch: Batch) -> Tensor:
        both = torch.stack(self.projections(model, batch), 1)
        if len(both) < 2:
            raise ValueError("task=barlow: one image has no correlations: raise data.batch_size")
        both = gathered(both)
        first, second = (both - both.mean(0)).unbind(1)  # so that no large numbers are subtracted
        with torch.autocast(both.device.type, enabled=False):
            return self._loss(_sums(first, second), len(first))

    def evaluate(self, model: Model, batch: Batch, tally: Tally) -> Tensor:
        first, second = self.projections(model, batch)
        tally.add(images=len(first), **_sums(first.double(), second.double()))
        return first

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self._loss(sums, sums["images"])}

    def _loss(self, sums: Mapping[str, Tensor], count: Tensor | int) -> Tensor:
        mean = sums["sums"] / count
        variance = sums["squares"] / count - mean.square()
        covariance = sums["products"] / count - torch.outer(mean[0], mean[1])
        spread = (variance + 1e-5).sqrt()
        correlation = covariance / torch.outer(spread[0], spread[1])
        diagonal = correlation.diagonal()
        invariance = (1 - diagonal).square().sum()
        return invariance + self.redundancy * (correlation.square().sum() - diagonal.square().sum())


def _sums(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    both = torch.stack([first, second])
    return {
        "sums": both.sum(1),
        "squares": both.square().sum(1),
        "products": first.T @ second,
    }
