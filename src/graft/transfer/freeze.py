"""Which part of the model learns in a stage, and in which mode the rest runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from graft.backbones.base import Backbone

Trainable = str | int | Sequence[str]
NormPolicy = Literal["frozen", "stats", "train"]


def learning_blocks(backbone: Backbone, trainable: Trainable) -> list[str]:
    """Names of the blocks that learn.

    Args:
        trainable: "head" (none), "all", the number of top blocks that hold parameters, or names.

    Raises:
        ValueError: a name or number that matches nothing.
    """
    names = backbone.block_names
    if trainable == "head":
        return []
    if trainable == "all":
        return names
    if isinstance(trainable, int):
        learnable = backbone.learnable_blocks
        if not 1 <= trainable <= len(learnable):
            raise ValueError(
                f"trainable={trainable}: the backbone has {len(learnable)} blocks with parameters"
            )
        return names[names.index(learnable[-trainable]) :]
    wanted = [trainable] if isinstance(trainable, str) else list(trainable)
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise ValueError(
            f"trainable: no block named {', '.join(unknown) or '(empty list)'}; use head, all, "
            f"a number of top blocks, or names of {', '.join(names)}"
        )
    return [name for name in names if name in wanted]


def freeze_for_stage(backbone: Backbone, learning: Sequence[str], norm: NormPolicy) -> int:
    """Set `requires_grad` for a stage; `set_modes` must follow every `train()` call.

    Returns the frozen prefix's length: the index of the lowest learning block.
    """
    for name, block in backbone.blocks.named_children():
        block.requires_grad_(name in learning)
        if norm != "train":
            for module in batch_norms(block):
                module.requires_grad_(False)
    names = backbone.block_names
    return names.index(learning[0]) if learning else len(names)


def set_modes(backbone: Backbone, learning: Sequence[str], norm: NormPolicy) -> None:
    """Frozen blocks to eval, so that neither dropout nor BatchNorm statistics move in them.

    `requires_grad=False` alone leaves the statistics of a BatchNorm in train mode moving.
    """
    if not learning:
        backbone.eval()
    for name, block in backbone.blocks.named_children():
        if name not in learning:
            block.eval()
        elif norm == "frozen":
            for module in batch_norms(block):
                module.eval()


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]
