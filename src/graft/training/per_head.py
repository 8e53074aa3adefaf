"""One optimizer for a grid of heads, each with a learning rate and weight decay of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from graft.models.heads import HeadGrid


def grid_groups(
    grid: HeadGrid,
    rates: list[float],
    decays: list[float],
    *,
    decay_norm_and_bias: bool = False,
) -> list[dict[str, Any]]:
    """The groups of `param_groups` for stacked heads.

    A group's `lr` is that of the fastest head, which schedules and monitors work with; `lr_scale`
    and `decay` hold a number per head, for `PerHead`.
    """
    fastest = max(rates)
    groups = []
    for name, matrices in (("head", True), ("head/norm_bias", False)):
        # The first dimension counts the heads.
        params = [p for p in grid.parameters() if (p.ndim > 2) is matrices]
        if params:
            decayed = matrices or decay_norm_and_bias
            groups.append(
                {
                    "name": name,
                    "params": params,
                    "lr": fastest,
                    "weight_decay": 0.0,
                    "lr_scale": [rate / fastest for rate in rates],
                    "decay": decays if decayed else [0.0] * len(decays),
                }
            )
    return groups


class PerHead(Optimizer):
    """Steps of torch's SGD, Adam or AdamW in which every head has its own rate and weight decay.

    Their step is proportional to the learning rate, and depends on the weights through the decay
    alone. So one step is taken from zeros in place of the weights, at the fastest rate and without
    decay: what is left there is the update, which is added to the weights scaled per head. (The
    difference of two weights would lose digits.) Groups come from `grid_groups`.
    """

    def __init__(self, inner: Optimizer) -> None:
        if type(inner) not in (SGD, Adam, AdamW):
            raise ValueError(
                f"optimizer: head.grid works with SGD, Adam and AdamW of torch.optim, and not with "
                f"{type(inner).__name__}: its step is not proportional to a head's learning rate"
            )
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self._columns: dict[tuple[Tensor, str, torch.dtype], Tensor] = {}
        self._scratch: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = {}
        for group in self.param_groups:
            decayed, decoupled = any(group["decay"]), group.get("decoupled_weight_decay", False)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if decayed and decoupled:
                    rate = group["lr"] * self._column(p, group, "lr_scale")
                    p.mul_((1 - rate * self._column(p, group, "decay")).to(p.dtype))
                elif decayed:
                    p.grad.addcmul_(p, self._column(p, group, "decay", p.dtype))
                weights[p], p.data = p.data, self._zeros(p)
        # Ours are the ones that schedulers change and checkpoints restore.
        self.inner.param_groups, self.inner.state = self.param_groups, self.state
        self.inner.step()
        for group in self.param_groups:
            for p in group["params"]:
                if p in weights:
                    update, p.data = p.data, weights[p]
                    p.addcmul_(update, self._column(p, group, "lr_scale", p.dtype))
        return loss

    def _zeros(self, p: Tensor) -> Tensor:
        """Where `p` lies during a step; the same memory in every step."""
        if p not in self._scratch:
            self._scratch[p] = torch.empty_like(p)
        return self._scratch[p].zero_()

    def _column(
        self, p: Tensor, group: dict[str, Any], key: str, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """A number per head, shaped to act along the first dimension of `p`."""
        if (p, key, dtype) not in self._columns:
            column = torch.tensor(group[key], dtype=dtype, device=p.device)
            self._columns[p, key, dtype] = column.view(-1, *[1] * (p.ndim - 1))
        return self._columns[p, key, dtype]
