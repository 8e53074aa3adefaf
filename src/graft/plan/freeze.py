"""Which part of the model learns in a stage, and in which mode the rest runs."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from graft.config.stage import NormPolicy, Trainable
from graft.config.words import plural
from graft.models.backbone import Backbone

MOVING: tuple[NormPolicy, ...] = ("stats", "train")
"""Policies under which statistics move; under "affine" and "train" scale and shift learn."""
KINDS = ("norms", "biases")


def learning_parameters(backbone: Backbone, trainable: Trainable) -> list[str]:
    """Names of the backbone's parameters that learn, such as "layer4.0.conv1.weight".

    Args:
        trainable: "head" (none of the backbone), "all", a number of top blocks that hold
            parameters, or any of: names of blocks, "norms" (all of every normalisation layer),
            "biases" (of every layer), and patterns of parameter names ("layer[34].*.conv2.*").

    Raises:
        ValueError: a name, pattern or number that matches nothing.
    """
    names = [name for name, _ in backbone.blocks.named_parameters()]
    if trainable == "head":
        return []
    if trainable == "all":
        return names
    if isinstance(trainable, int):
        learnable = backbone.learnable_blocks
        if not 1 <= trainable <= len(learnable):
            raise ValueError(
                f"trainable={trainable}: the backbone has {plural(len(learnable), 'block')} with "
                "parameters"
            )
        trainable = learnable[-trainable:]
    wanted = [trainable] if isinstance(trainable, str) else list(trainable)
    found = {entry: _matches(backbone, names, entry) for entry in wanted}
    if empty := [entry for entry, matches in found.items() if not matches] or not wanted:
        missing = ", ".join(empty) if isinstance(empty, list) else "(empty list)"
        raise ValueError(
            f"trainable: nothing to learn in {missing}; use head, all, a number of top blocks, "
            f"norms, biases, a pattern of parameter names ({names[-1]}), or blocks: "
            f"{', '.join(backbone.learnable_blocks)}"
        )
    chosen = set().union(*found.values())
    return [name for name in names if name in chosen]


def _matches(backbone: Backbone, names: Sequence[str], entry: str) -> set[str]:
    if entry == "norms":
        layers = [name for name, m in backbone.blocks.named_modules() if is_norm(m)]
        return {name for name in names if name.rpartition(".")[0] in layers}
    if entry == "biases":
        return {name for name in names if name.endswith("bias")}  # in_proj_bias of attention too
    if entry in backbone.block_names:
        return {name for name in names if name.startswith(f"{entry}.")}
    return {name for name in names if fnmatchcase(name, entry)}


def is_norm(module: nn.Module) -> bool:
    """Of any library: torch's, torchvision's LayerNorm2d, timm's BatchNormAct2d."""
    return "Norm" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))


def freeze_for_stage(backbone: Backbone, learning: Sequence[str], norm: NormPolicy) -> list[str]:
    """Set `requires_grad` for a stage; `set_modes` must follow every `train()` call.

    Returns the blocks in which something learns.

    Args:
        learning: names of parameters.

    Raises:
        ValueError: the norm policy freezes all of them.
    """
    chosen = set(learning)
    blocks = {name.split(".")[0] for name in learning}
    for name, parameter in backbone.blocks.named_parameters():
        parameter.requires_grad_(name in chosen)
    if norm not in ("train", "affine"):
        for module in batch_norms(backbone.blocks):
            module.requires_grad_(False)
    if chosen and not any(p.requires_grad for p in backbone.parameters()):
        raise ValueError(f"norm={norm} freezes all that is trainable: use norm=train or affine")
    return [name for name in backbone.block_names if name in blocks]


def prefix_length(backbone: Backbone, blocks: Sequence[str]) -> int:
    """How many blocks lie below the lowest of `blocks`: they are frozen."""
    names = backbone.block_names
    return names.index(blocks[0]) if blocks else len(names)


def set_modes(backbone: Backbone, learning: Sequence[str], norm: NormPolicy) -> None:
    """Frozen blocks to eval, so that neither dropout nor BatchNorm statistics move in them.

    `requires_grad=False` alone leaves the statistics of a BatchNorm in train mode moving.

    Args:
        learning: names of the blocks in which something learns.
    """
    if not learning:
        backbone.eval()
    for name, block in backbone.blocks.named_children():
        if name not in learning:
            block.eval()
        elif norm not in MOVING:
            for module in batch_norms(block):
                module.eval()


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def norm_mode(module: nn.Module) -> str:
    """The policy that a part's BatchNorms are in, read from the layers; "" without any."""
    modes = set()
    for layer in batch_norms(module):
        learns = any(p.requires_grad for p in layer.parameters())
        modes.add({(1, 1): "train", (1, 0): "stats", (0, 1): "affine", (0, 0): "frozen"}[
            (int(layer.training), int(learns))
        ])  # fmt: skip
    return ", ".join(sorted(modes))
