"""Adaptation at test time, without a label: AdaBN (Li et al. 2016) and Tent (Wang et al. 2021).

Both move the model they are given; `kept` puts it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graft.models.backbone import Backbone
from graft.plan.freeze import batch_norms

TENT_LR = 1e-3  # of Adam, as published for CIFAR-10-C


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Afterwards, weights, statistics and modes are bit for bit what they were."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    training = {part: part.training for part in module.modules()}
    learning = {p: p.requires_grad for p in module.parameters()}
    tracking = {norm: norm.track_running_stats for norm in batch_norms(module)}
    try:
        yield
    finally:
        module.load_state_dict(state)
        for part, mode in training.items():
            part.training = mode
        for parameter, learns in learning.items():
            parameter.requires_grad_(learns)
            parameter.grad = None
        for norm, tracks in tracking.items():
            norm.track_running_stats = tracks


def require_batch_norms(backbone: Backbone, method: str) -> None:
    """Raises a ValueError for a backbone in which no BatchNorm has statistics."""
    if not any(norm.running_mean is not None for norm in batch_norms(backbone)):
        raise ValueError(
            f"--adapt {method}: {backbone.description or 'the backbone'} has no BatchNorm whose "
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


class Tent:
    """Minimises the entropy of its predictions by the scales and shifts of BatchNorms, which
    normalise by the statistics of the batch at hand. A batch is predicted before it is learned
    from.

    Args:
        model: backbone and head in one, inputs -> logits.
    """

    def __init__(self, model: nn.Module, lr: float = TENT_LR) -> None:
        self.model = model.eval().requires_grad_(False)
        learning = []
        for norm in batch_norms(model):
            norm.train()
            norm.track_running_stats = False  # the batch's, and the running ones stay
            learning += [p.requires_grad_() for p in norm.parameters(recurse=False)]
        if not learning:
            raise ValueError("--adapt tent: no BatchNorm here has a scale and shift to learn")
        self.optimizer = torch.optim.Adam(learning, lr=lr)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(N, C) logits, before the step that these inputs cause."""
        for norm in batch_norms(self.model):  # whatever a test has put it in since
            norm.train()
        with torch.enable_grad():
            logits = self.model(inputs)
            log_p = logits.float().log_softmax(1)
            entropy = -(log_p.exp() * log_p).sum(1).mean()
            self.optimizer.zero_grad()
            entropy.backward()
            self.optimizer.step()
        return logits.detach()
