"""Checkpoint files: written whole or not at all, checked, and what a stage does with them."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection

from graft.storage.disk import explained

if TYPE_CHECKING:
    from graft.training.module import TransferModule

from graft.plan.results import BEST, LAST, PREVIOUS

MARK = b"graft crc32 "
COMMENT_BYTES = 2 + len(MARK) + 8


# Of Lightning's checkpoint, what is left of one that is not to be resumed from.
WEIGHTS = ("state_dict", "graft", "epoch", "global_step", "loops", "pytorch-lightning_version")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Whole files or none, on whatever file system the run folder is; in `best.ckpt`, weights."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        if path.name == BEST:
            checkpoint = {key: checkpoint[key] for key in WEIGHTS}
        write_checkpoint(checkpoint, path)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Replace `path` in one step; of `last.ckpt`, the one before stays as `previous.ckpt`.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        with explained(path, lambda: tensor_bytes(checkpoint)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w+b") as file:
                torch.save(checkpoint, file)
                end = file.tell() - 2  # an archive ends with the length of its comment, 0
                file.seek(0)
                file.write(_comment(file, end))
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                path.replace(path.with_name(PREVIOUS))
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def tensor_bytes(checkpoint: dict[str, Any]) -> int:
    sizes: list[int] = []
    apply_to_collection(checkpoint, torch.Tensor, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there, to its end, with the bytes it was written with.

    The archive's own checksums leave out its directory, which torch and Python read differently.
    """
    try:
        with path.open("rb") as file:
            comment = _comment(file, path.stat().st_size - COMMENT_BYTES)
            end = file.read()
        if end == comment or not end.endswith(b"\0\0"):
            return end == comment
        with zipfile.ZipFile(path) as archive:  # without one: of an earlier version
            return archive.testzip() is None
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile):
        return False


def _comment(file: BinaryIO, size: int) -> bytes:
    """The end of an archive, with the checksum of its first `size` bytes, which are read."""
    crc = 0
    while size > 0 and (part := file.read(min(size, 1 << 20))):
        crc, size = zlib.crc32(part, crc), size - len(part)
    file.seek(file.tell())  # between reading and writing
    text = MARK + b"%08x" % crc
    return len(text).to_bytes(2, "little") + text


def load_checkpoint(module: TransferModule, path: Path) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict(state)


def replace_weights(path: Path, module: TransferModule, **note: Any) -> None:
    """The module's weights in place of those in a checkpoint.

    For a stage that ends with other weights than it trained: the winner of a grid, merged adapters.

    Args:
        note: goes into the checkpoint's "graft" part.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    checkpoint["state_dict"] = {k: v.cpu().clone() for k, v in module.state_dict().items()}
    checkpoint["graft"] = {**checkpoint["graft"], **note, "final": True}
    checkpoint["graft"].pop("grid", None)
    write_checkpoint(checkpoint, path)


def is_final(path: Path) -> bool:
    """Whether `replace_weights` was here."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return checkpoint["graft"].get("final", False)
