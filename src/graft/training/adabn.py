"""AdaBN (Li et al. 2016): BatchNorm statistics of the images a model is to be used on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from graft.models.backbone import Backbone
from graft.plan.freeze import batch_norms


def require_batch_norms(backbone: Backbone, method: str) -> None:
    """Raises a ValueError for a backbone in which no BatchNorm has statistics."""
    if not any(norm.running_mean is not None for norm in batch_norms(backbone)):
        raise ValueError(
            f"{method}: {backbone.description or 'the backbone'} has no BatchNorm whose "
            "statistics could be those of other images"
        )


class _ReachedError(Exception):
    """Ends a forward at the layer of which the inputs were wanted."""


@torch.no_grad()
def estimate_statistics(
    backbone: Backbone, batches: Sequence[Tensor], head: nn.Module | None = None
) -> None:
    """AdaBN: each BatchNorm's statistics become those of its inputs on all of `batches`.

    Exact, so that neither order nor size of the batches matters: layer by layer, each on what the
    ones before give with statistics that are final. Blocks are passed through once for each of
    their BatchNorms and once more; what goes from block to block is held in memory.

    Args:
        batches: inputs of the backbone, as a test gives them to it.
        head: what takes the features; its BatchNorms follow.
    """
    compiled = "torch._dynamo" in sys.modules  # hooks are not noticed by what is compiled already
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        _estimate(backbone, batches, head)


def _estimate(backbone: Backbone, batches: Sequence[Tensor], head: nn.Module | None) -> None:
    backbone.eval()
    states: list[Any] = list(batches)
    if backbone.mirror:
        states += [batch.flip(3) for batch in batches]
    for block in backbone.blocks:
        for norm in _in_order(block, states[0]):
            _take_moments(norm, block, states)
        for i, state in enumerate(states):  # in place of the one before: there may be many
            states[i] = block(state)
    if head is not None and batch_norms(head):
        features = [backbone(batch) for batch in batches]
        for norm in _in_order(head.eval(), features[0]):
            _take_moments(norm, head, features)


def _in_order(block: nn.Module, state: Any) -> list[nn.Module]:
    """The BatchNorms of a block as a forward comes to them."""
    met: list[nn.Module] = []
    norms = [norm for norm in batch_norms(block) if norm.running_mean is not None]
    hooks = [norm.register_forward_pre_hook(lambda norm, _: met.append(norm)) for norm in norms]
    block(state)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(met))


def _take_moments(norm: Any, block: nn.Module, states: Sequence[Any]) -> None:
    around = norm.running_mean.double()  # so that no large numbers are subtracted
    count, sums = 0, torch.zeros(2, len(around), dtype=torch.float64, device=around.device)

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        rows = inputs[0].transpose(0, 1).flatten(1).double() - around[:, None]
        count += rows.shape[1]
        sums.add_(torch.stack([rows.sum(1), rows.square().sum(1)]))
        raise _ReachedError

    hook = norm.register_forward_pre_hook(add)
    for state in states:
        try:
            block(state)
        except _ReachedError:
            continue
    hook.remove()
    mean = sums[0] / count
    norm.running_mean.copy_(around + mean)
    norm.running_var.copy_((sums[1] / count - mean.square()) * (count / max(1, count - 1)))
