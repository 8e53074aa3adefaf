"""Adaptation at test time, without a label: Tent (Wang et al. 2021), and putting a model back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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
