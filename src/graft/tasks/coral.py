"""Deep CORAL: domains whose features have the same covariance (Sun & Saenko 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.tasks.base import gathered
from graft.tasks.domains import TwoDomains


class Coral(TwoDomains):
    """Classification, plus `weight` times |C_source - C_target|^2 / 4 F^2 of features (N, F), over
    the batches of all ranks.

    Args:
        weight: such that at the end of training both losses are of one size, as the paper has it.
    """

    def domain_loss(self, source: Tensor, target: Tensor, progress: float) -> Tensor:
        source, target = gathered(source.float()), gathered(target.float())
        with torch.autocast(source.device.type, enabled=False):
            difference = covariance(source) - covariance(target)
        return self.weight * difference.square().sum() / (4 * source.shape[1] ** 2)


def covariance(features: Tensor) -> Tensor:
    """(N, F) -> (F, F), over N - 1."""
    centred = features - features.mean(0)
    return centred.T @ centred / max(1, len(features) - 1)
