"""Parameter groups of a stage: every trainable parameter in exactly one, each with its own rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from graft.backbones.base import Backbone


def param_groups(
    backbone: Backbone,
    head: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    head_lr_scale: float = 1.0,
    decay_norm_and_bias: bool = False,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, input to output, the head last.

    Args:
        layer_decay: factor on the learning rate from each block to the one before it; 1 puts the
            whole backbone into one rate. It is written into each group's `lr`: torch optimizers
            ignore the `lr_scale` key that some libraries set.
        head_lr_scale: factor on the head's learning rate.
        decay_norm_and_bias: whether weight decay also acts on one-dimensional parameters.

    Raises:
        ValueError: nothing is trainable.
    """
    parts: list[tuple[str, nn.Module, float]] = []
    if layer_decay == 1.0:
        parts.append(("backbone", backbone, lr))
    else:
        names = backbone.learnable_blocks
        for depth, name in enumerate(names):
            rate = lr * layer_decay ** (len(names) - depth)
            parts.append((name, backbone.blocks.get_submodule(name), rate))
    parts.append(("head", head, lr * head_lr_scale))

    groups = []
    for name, module, rate in parts:
        trainable = [p for p in module.parameters() if p.requires_grad]
        plain = [p for p in trainable if p.ndim > 1 or decay_norm_and_bias]
        bare = [p for p in trainable if not (p.ndim > 1 or decay_norm_and_bias)]
        if plain:
            groups.append({"name": name, "params": plain, "lr": rate, "weight_decay": weight_decay})
        if bare:
            groups.append(
                {"name": f"{name}/norm_bias", "params": bare, "lr": rate, "weight_decay": 0.0}
            )
    if not groups:
        raise ValueError("nothing is trainable in this stage: neither backbone nor head")
    return groups


def describe_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per group for the printed and logged table."""
    return [
        {
            "group": group["name"],
            "tensors": len(group["params"]),
            "parameters": sum(p.numel() for p in group["params"]),
            "lr": _span([group["lr"] * scale for scale in group.get("lr_scale", [1.0])]),
            "weight_decay": _span(group.get("decay", [group["weight_decay"]])),
        }
        for group in groups
    ]


def _span(values: list[float]) -> float | str:
    """One value, or the range over a grid of heads."""
    low, high = min(values), max(values)
    return low if low == high else f"{low:.3g} to {high:.3g}"
