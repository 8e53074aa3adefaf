"""Checkpoint files: written whole or not at all, checked, and what a stage does with them."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

if TYPE_CHECKING:
    from graft.module import TransferModule

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Whole files or none, on whatever file system the run folder is."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        write_checkpoint(checkpoint, Path(path))


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Replace `path` in one step; of `last.ckpt`, the one before stays as `previous.ckpt`.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST and path.exists():
            path.replace(path.with_name(PREVIOUS))
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into the latter
        raise OSError(f"cannot write the checkpoint {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there, to its end, with the checksums it was written with."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile):
        return False


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
    checkpoint["graft"] = {**checkpoint["graft"], **note, "final": True}
    checkpoint["graft"].pop("grid", None)
    checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
    for key in ("current_model_state", "averaging_state"):  # of a stage with ema
        checkpoint.pop(key, None)
    write_checkpoint(checkpoint, path)


def is_final(path: Path) -> bool:
    """Whether `replace_weights` was here."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return checkpoint["graft"].get("final", False)
