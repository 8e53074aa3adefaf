"""Low-rank adaptation (Hu et al. 2022) of linear layers, convolutions and attention projections.

The weight W (out, ...) of a layer stays as loaded; in its place W + alpha / rank * B A is used,
with B (out, rank) at zero first and A (rank, ...) learning. These are torch parametrizations: any
layer that reads its weight works, grouped convolutions and torch's attention too, and what is
merged at the end of a stage is the very tensor that was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class LoRA:
    """Adapters on the weights that a stage's `trainable` chooses; nothing else of them learns.

    Args:
        rank: of the update of each weight.
        alpha: scale of the update, in units of the rank: with alpha = rank it is B A.
    """

    rank: int = 8
    alpha: float = 8.0


class LowRank(nn.Module):
    """weight -> weight + scale * up @ down."""

    def __init__(self, weight: Tensor, lora: LoRA) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        rank = min(lora.rank, rows, columns)
        self.scale = lora.alpha / lora.rank
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        self.down = nn.Parameter(weight.new_empty(rank, columns))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as the authors' own code does

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down).view(weight.shape)


def add_adapters(blocks: nn.Module, names: Sequence[str], lora: LoRA) -> int:
    """Put an adapter on each of the named weights that a layer has; returns how many.

    Everything else in `blocks` is left as it is; freezing is the caller's.
    """
    chosen = set(names)
    found = [
        (module, attribute)
        for path, module, attribute in _weights(blocks)
        if f"{path}.{attribute}" in chosen
    ]
    for module, attribute in found:
        adapter = LowRank(getattr(module, attribute), lora)
        parametrize.register_parametrization(module, attribute, adapter)
    return len(found)


def merge_adapters(module: nn.Module) -> None:
    """Each adapted weight becomes what it was computed as; the layers are ordinary ones again."""
    for layer in list(module.modules()):
        if not parametrize.is_parametrized(layer):
            continue
        adapted = cast("nn.ModuleDict", layer.parametrizations)
        for attribute, steps in list(adapted.items()):
            if any(isinstance(step, LowRank) for step in steps.children()):
                parametrize.remove_parametrizations(layer, attribute)


def _weights(blocks: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, module in blocks.named_modules():
        if isinstance(module, nn.Linear | _ConvNd):
            yield path, module, "weight"
        elif isinstance(module, nn.MultiheadAttention) and torch.is_tensor(module.in_proj_weight):
            yield path, module, "in_proj_weight"
