"""Parameter groups of a stage: every trainable parameter in exactly one, each with its own rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from graft.models.backbone import Backbone
from graft.plan.freeze import norm_mode


def param_groups(
    backbone: Backbone,
    head: nn.Module,
    task: nn.Module | None = None,
    *,
    lr: float,
    weight_decay: float,
    backbone_weight_decay: float | None = None,
    layer_decay: float = 1.0,
    head_lr_scale: float = 1.0,
    decay_norm_and_bias: bool = False,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, input to output, the head and the task's own at the end.

    Args:
        backbone_weight_decay: if other than `weight_decay`.
        layer_decay: factor on the learning rate from each block to the one before it; 1 puts the
            whole backbone into one rate. It is written into each group's `lr`: torch optimizers
            ignore the `lr_scale` key that some libraries set.
        head_lr_scale: factor on the head's learning rate.
        decay_norm_and_bias: whether weight decay also acts on one-dimensional parameters and on
            `backbone.no_weight_decay`.

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
    if task is not None:
        parts.append(("task", task, lr * head_lr_scale))

    named = backbone.blocks.named_parameters()  # an adapter has renamed what it sits on
    spared = {id(p) for name, p in named if name in backbone.no_weight_decay}

    def decays(parameter: nn.Parameter) -> bool:
        return decay_norm_and_bias or (parameter.ndim > 1 and id(parameter) not in spared)

    groups = []
    for name, module, rate in parts:
        trainable = [p for p in module.parameters() if p.requires_grad]
        plain = [p for p in trainable if decays(p)]
        bare = [p for p in trainable if not decays(p)]
        decay = weight_decay
        if name not in ("head", "task") and backbone_weight_decay is not None:
            decay = backbone_weight_decay
        if plain:
            groups.append({"name": name, "params": plain, "lr": rate, "weight_decay": decay})
        if bare:
            groups.append(
                {"name": f"{name}/norm_bias", "params": bare, "lr": rate, "weight_decay": 0.0}
            )
    if not groups:
        raise ValueError("nothing is trainable in this stage: neither backbone nor head")
    return groups


def describe_groups(
    groups: list[dict[str, Any]],
    backbone: Backbone,
    head: nn.Module,
    task: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """One row per group, then one per frozen part: the table that is printed and logged.

    "norm" is the mode of the BatchNorms of that part of the model, read from the layers.
    """
    blocks = {name: backbone.blocks.get_submodule(name) for name in backbone.learnable_blocks}
    learning = [b for b in blocks.values() if any(p.requires_grad for p in b.parameters())]
    parts: dict[str, nn.Module] = {
        "backbone": nn.ModuleList(learning),
        **blocks,
        "head": head,
        "task": task or nn.Module(),
    }
    rows = [
        {
            "group": group["name"],
            "tensors": len(group["params"]),
            "parameters": sum(p.numel() for p in group["params"]),
            "lr": _span([group["lr"] * scale for scale in group.get("lr_scale", [1.0])]),
            "weight_decay": _span(group.get("decay", [group["weight_decay"]])),
            "trainable": "yes",
            "norm": norm_mode(parts[group["name"].split("/")[0]]),
        }
        for group in groups
    ]
    for name, part in {**blocks, "head": head}.items():
        frozen = [p for p in part.parameters() if not p.requires_grad]
        if frozen:
            count = sum(p.numel() for p in frozen)
            row = {"group": name, "tensors": len(frozen), "parameters": count, "lr": 0.0}
            rows.append(row | {"weight_decay": 0.0, "trainable": "no", "norm": norm_mode(part)})
    return rows


def _span(values: list[float]) -> float | str:
    """One value, or the range over a grid of heads."""
    low, high = min(values), max(values)
    return low if low == high else f"{low:.3g} to {high:.3g}"
