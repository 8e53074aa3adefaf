"""DANN: features by which no discriminator can tell the domains apart (Ganin et al. 2016)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.models.backbone import Backbone
from graft.tasks.domains import TwoDomains


class Dann(TwoDomains):
    """Classification, plus a discriminator of domains whose gradient is reversed on its way into
    the backbone: the discriminator learns, and the backbone learns the opposite.

    Args:
        weight: the largest factor on the reversed gradient; it grows as 2 / (1 + exp(-10 p)) - 1
            with the part p of the stage that is done. The discriminator itself learns at 1.
        hidden: units in each of the discriminator's two hidden layers.
    """

    def __init__(self, *, hidden: int, **options: Any) -> None:
        super().__init__(**options)
        self.hidden = hidden

    def build(self, num_outputs: int, backbone: Backbone) -> None:
        sizes = (backbone.num_features, self.hidden, self.hidden)
        self.discriminator = nn.Sequential(
            nn.Linear(sizes[0], sizes[1]),
            nn.ReLU(),
            nn.Linear(sizes[1], sizes[2]),
            nn.ReLU(),
            nn.Linear(sizes[2], 1),
        )

    def domain_loss(self, source: Tensor, target: Tensor, progress: float) -> Tensor:
        strength = self.weight * (2 / (1 + math.exp(-10 * progress)) - 1)
        features = reverse_gradient(torch.cat([source, target]), strength)
        is_source = torch.zeros(len(features), device=features.device)
        is_source[: len(source)] = 1
        logits = self.discriminator(features)[:, 0].float()
        return F.binary_cross_entropy_with_logits(logits, is_source)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def reverse_gradient(features: Tensor, strength: float) -> Tensor:
    """The same features; their gradient is multiplied by minus `strength`."""
    return _Reverse.apply(features, strength)
