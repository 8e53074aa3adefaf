"""Weights of a stage: read from its checkpoint, or put into it when they have changed shape."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from graft.module import TransferModule


def load_checkpoint(module: TransferModule, path: Path) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict(state)


def replace_weights(path: Path, module: TransferModule, **note: Any) -> None:
    """The module's weights in place of those in a checkpoint, and nothing to resume from.

    For a stage that ends with other weights than it trained: the winner of a grid, merged adapters.
    The state of its optimizer says nothing about them.

    Args:
        note: goes into the checkpoint's "graft" part.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    checkpoint["state_dict"] = {k: v.cpu().clone() for k, v in module.state_dict().items()}
    checkpoint["graft"] = {**checkpoint["graft"], **note}
    checkpoint["graft"].pop("grid", None)
    checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
    for key in ("current_model_state", "averaging_state"):  # of a stage with ema
        checkpoint.pop(key, None)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
