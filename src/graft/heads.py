"""Heads: features (N, num_features) to logits (N, num_classes)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FeatureNorm = Literal["none", "standardize", "batchnorm"]


class Standardize(nn.Module):
    """Features to zero mean and unit variance, with statistics measured once and then frozen.

    Buffers, so they travel with the checkpoint. Unlike BatchNorm it behaves the same in training
    and evaluation, and small batches don't disturb it.
    """

    mean: Tensor
    std: Tensor
    measured: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.register_buffer("measured", torch.tensor(False))

    @torch.no_grad()
    def measure(self, parts: Iterable[Tensor]) -> None:
        """Fix the statistics from the training features, (n, num_features) at a time."""
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for part in parts:  # Chan et al. 1979: no large numbers are subtracted
            part = part.double()
            n, new = len(part), part.mean(0)
            delta = new - mean.to(new.device)
            squares = squares.to(new.device) + (part - new).square().sum(0)
            squares = squares + delta.square() * (count * n / (count + n))
            mean = mean.to(new.device) + delta * (n / (count + n))
            count += n
        self.mean.copy_(mean)
        # A dead feature has no spread; dividing by (almost) nothing would blow up noise at test.
        std = (squares / count).sqrt()
        self.std.copy_(std.clamp_min(1e-3 * float(std.mean()) + 1e-12))
        self.measured.fill_(True)

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


class Head(nn.Module, ABC):
    """Base of all heads: an optional normalisation of the features, dropout, then `classify`.

    Args:
        norm: "none"; "standardize" (measured once on the training features); "batchnorm"
            (BatchNorm without affine, as in MAE's linear probe, He et al. 2022).
        dropout: probability of dropping a feature during training.
    """

    def __init__(
        self, num_features: int, *, norm: FeatureNorm = "none", dropout: float = 0.0
    ) -> None:
        super().__init__()
        norms: dict[str, Callable[[], nn.Module]] = {
            "none": nn.Identity,
            "standardize": lambda: Standardize(num_features),
            "batchnorm": lambda: nn.BatchNorm1d(num_features, affine=False),
        }
        if norm not in norms:
            raise ValueError(f"head.norm={norm}: must be one of {', '.join(norms)}")
        self.norm = norms[norm]()
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        return self.classify(self.dropout(self.norm(features)))

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """(N, num_features) normalised features -> (N, num_classes) logits."""


class LinearHead(Head):
    """One linear layer. Starts at zero: logits are equal, the first steps disturb the least."""

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        norm: FeatureNorm = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_features, norm=norm, dropout=dropout)
        self.linear = nn.Linear(num_features, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def classify(self, features: Tensor) -> Tensor:
        return self.linear(features)


class MLPHead(Head):
    """`layers` hidden layers of `hidden` units with ReLU, then a linear layer."""

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        hidden: int = 512,
        layers: int = 1,
        norm: FeatureNorm = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_features, norm=norm, dropout=dropout)
        widths = [num_features, *[hidden] * layers]
        modules: list[nn.Module] = []
        for width, following in pairwise(widths):
            modules += [nn.Linear(width, following), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*modules, nn.Linear(widths[-1], num_classes))

    def classify(self, features: Tensor) -> Tensor:
        return self.mlp(features)


class CosineHead(Head):
    """Scaled cosine similarity to one learnt direction per class (Gidaris & Komodakis 2018)."""

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        scale: float = 16.0,
        norm: FeatureNorm = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_features, norm=norm, dropout=dropout)
        self.weight = nn.Parameter(torch.randn(num_classes, num_features) * num_features**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def classify(self, features: Tensor) -> Tensor:
        return self.log_scale.exp() * F.linear(F.normalize(features), F.normalize(self.weight))
