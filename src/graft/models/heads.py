"""Heads: features (N, num_features) to logits (N, num_classes)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

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
        return (features - self.mean).div_(self.std)


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

    def classify_stacked(self, stacked: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """`classify` of K heads of this kind at once -> (N, K, num_classes).

        Args:
            stacked: each parameter by name, of all heads along dimension 0.
        """

        def one(parameters: dict[str, Tensor], features: Tensor) -> Tensor:
            return functional_call(self, parameters, (features,))

        return torch.vmap(one, in_dims=(0, None), out_dims=1)(dict(stacked), features)


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

    def classify_stacked(self, stacked: Mapping[str, Tensor], features: Tensor) -> Tensor:
        if type(self).classify is not LinearHead.classify:  # a subclass that adds something
            return super().classify_stacked(stacked, features)
        # One product for all heads: a fifth of the batched one's time.
        weight, bias = (stacked[f"linear.{name}"] for name in ("weight", "bias"))
        logits = F.linear(features, weight.flatten(0, 1), bias.flatten())
        return logits.unflatten(1, weight.shape[:2])


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


class FeaturesHead(Head):
    """Passes the features on: for a task that has a decoder or projector of its own."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features)

    def classify(self, features: Tensor) -> Tensor:
        return features


def seeded_head(make: Callable[[int, int], Head], sizes: tuple[int, int], seed: int) -> Head:
    """`make(num_features, num_classes)` with initial weights that depend on `seed` alone.

    The one rule for a lone head (`head.seed`) and for the heads of a grid (`head.grid.seed`), so
    that they start equal; what was drawn before, for a backbone say, doesn't matter.
    """
    state = torch.get_rng_state()
    # An offset, so that the head doesn't repeat the numbers the backbone of this seed started with.
    torch.default_generator.manual_seed(seed + 7919)
    try:
        return make(*sizes)
    finally:
        torch.set_rng_state(state)


class HeadGrid(Head):
    """K heads of one kind on the same features, which are normalised once: logits (N, K, C).

    Heads don't see each other: a head that diverges leaves the others as they would be alone.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__(0)
        plain = copy.deepcopy(heads[0])
        self.norm, plain.norm = plain.norm, nn.Identity()
        stripped = [copy.deepcopy(head) for head in heads]
        for head in stripped:
            head.norm = nn.Identity()
        parameters, buffers = stack_module_state(list[nn.Module](stripped))
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in plain.modules()):
            raise ValueError(
                "head.grid: a head with dropout draws other masks in a grid than alone: set "
                "head.dropout=0"
            )
        if buffers:
            raise ValueError(
                f"head.grid: {type(plain).__name__} keeps {', '.join(buffers)} outside its norm; "
                "a grid can only share what lies in head.norm"
            )
        # Names of parameters hold dots, those of a ParameterDict may not.
        self.stacked = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(value) for name, value in parameters.items()}
        )
        self._plain = [plain]  # in a list: its own weights are no part of the model

    def __len__(self) -> int:
        return len(next(iter(self.stacked.values())))

    @property
    def kind(self) -> str:
        return type(self._plain[0]).__name__

    def classify(self, features: Tensor) -> Tensor:
        stacked = {name.replace("/", "."): value for name, value in self.stacked.items()}
        return self._plain[0].classify_stacked(stacked, features)

    def head(self, index: int) -> Head:
        """The head at `index` as an ordinary one, with the norm of all."""
        head = copy.deepcopy(self._plain[0])
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                parameter.copy_(self.stacked[name.replace(".", "/")][index])
        head.norm = copy.deepcopy(self.norm)
        return head.to(next(self.parameters()).device)
