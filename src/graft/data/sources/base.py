"""What a data set is (`Source`), and the cache that decoded images are kept in.

A cache entry is a folder of `.npy` files plus `entry.json`. It is written elsewhere and renamed
when complete, so a build that was killed, or ran out of disk, is never taken for a data set.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from graft.storage.disk import mark_used
from graft.storage.npy import NpyWriter
from graft.storage.reading import read_json
from graft.transforms.images import ImageInputs
from graft.transforms.inputs import Inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Rows with their labels, and what tells an item again: a source may leave that out."""

    # Images (N, 3, H, W), or rows (N, ...) of another modality; in memory or memory-mapped.
    images: NDArray[Any]
    labels: NDArray[np.int64]  # (N,)
    names: NDArray[np.bytes_] | None = None  # (N,) paths below the root; None: positions
    digests: NDArray[np.uint64] | None = None  # (N,) `content_digest` of each; None: of its pixels
    # How images were made of what has these digests: together they stand for the pixels.
    decoding: str | None = None
    # (N, T), where an image has several labels, or numbers: labels are 0 then, `classes` T names.
    targets: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Splits:
    classes: list[str]
    train: Split
    val: Split | None  # None: drawn from train by the datamodule
    test: Split | None
    # What was black and white in images of more than 8 bits; other images are to be read alike.
    value_range: tuple[float, float] | None = None
    cut: int = 0  # images of which only the central square is here, texts without their end
    # Others by name, of which tasks train on some: see `Task.streams`. Labels of -1: unknown.
    more: Mapping[str, Split] = field(default_factory=dict)

    def named(self) -> dict[str, Split]:
        """Each split that there is."""
        own = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in own.items() if split is not None} | dict(self.more)


class Source(ABC):
    """A data set. One class, one YAML. Plain constructor arguments.

    Attributes:
        inputs: what its rows are, and how a model takes them.
    """

    inputs: ClassVar[type[Inputs]] = ImageInputs

    def prepare(self, preprocessing: Any) -> None:  # noqa: B027 (may need nothing)
        """Download and decode once; safe when several processes start together.

        Args:
            preprocessing: what the backbone expects; of images, a `Preprocessing`: how larger ones,
                or those of mixed sizes, are resized to be stored.
        """

    @abstractmethod
    def load(self, preprocessing: Any) -> Splits:
        """Open what `prepare(preprocessing)` wrote, without a copy."""


def save_items(
    folder: Path,
    split: str,
    labels: Sequence[int],
    digests: Sequence[int],
    names: Sequence[bytes] | None = None,
    targets: NDArray[np.float32] | None = None,
) -> None:
    """Write what a `Split` has beside its images."""
    arrays: dict[str, NDArray[Any]] = {
        "labels": np.array(labels, np.int64),
        "digests": np.array(digests, np.uint64),
    }
    if names is not None:
        arrays["names"] = np.array(names, np.bytes_)
    if targets is not None:
        arrays["targets"] = targets
    for name, values in arrays.items():
        with NpyWriter(folder / f"{split}-{name}.npy", values.shape[1:], values.dtype) as file:
            file.append(values)


def seal(folder: Path, classes: Sequence[str], **extra: Any) -> None:
    """Write `entry.json`: the classes, and what tells a torn file, or a torn `entry.json`."""
    files = {path.name: _mark(path) for path in sorted(folder.glob("*.npy"))}
    info = {"classes": list(classes), "files": files, **extra}
    with (folder / "entry.json").open("w", encoding="utf-8") as file:
        file.write(json.dumps({**info, "checksum": _checksum(info)}, indent=1))
        file.flush()
        os.fsync(file.fileno())


def _mark(path: Path) -> list[int]:
    """A file's size and a checksum of its header: enough to map it without a surprise."""
    with path.open("rb") as file:
        return [path.stat().st_size, zlib.crc32(file.read(128))]


def _checksum(info: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(info, sort_keys=True).encode())


def read_entry(entry: Path) -> dict[str, Any] | None:
    """The `entry.json` of a complete cache entry; None when it is missing or damaged."""
    try:
        info = read_json(entry / "entry.json", 1 << 30)
        whole = (
            info.pop("checksum", None) == _checksum(info)
            and all(_mark(entry / name) == mark for name, mark in info["files"].items())
            and _is_consistent(entry, info)
        )
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # `locked` says why
        return None
    except (ValueError, LookupError, TypeError, AttributeError, EOFError):
        whole = False
    if not whole:
        log.warning("%s is damaged and will be built again", entry)
        return None
    return info


def _is_consistent(entry: Path, info: dict[str, Any]) -> bool:
    """Whether the files are arrays of the types and lengths that a split has; it may raise."""
    if not all(isinstance(name, str) for name in info["classes"]):
        return False
    for name in ("train", "val", "test"):
        files = [file for file in info["files"] if file.startswith(f"{name}-")]
        arrays = {file: np.load(entry / Path(file).name, mmap_mode="r") for file in files}
        if len({len(array) for array in arrays.values()}) > 1:
            return False
        images = arrays.get(f"{name}-images.npy")
        kinds = ((np.uint8, 4), (np.int32, 2))  # images, token ids
        if images is not None and (images.dtype, images.ndim) not in kinds:
            return False
        labels = arrays.get(f"{name}-labels.npy")
        if labels is not None and (labels.dtype != np.int64 or labels.ndim != 1):
            return False
    return True


def open_entry(entry: Path) -> Splits:
    """The splits in a cache entry, images memory-mapped read-only."""
    info = read_entry(entry)
    if info is None:
        raise FileNotFoundError(f"{entry}: no complete cache entry; call prepare() before load()")
    mark_used(entry / "entry.json")

    def array(file: str) -> NDArray[Any] | None:
        return np.load(entry / file) if file in info["files"] else None

    def split(name: str) -> Split | None:
        if f"{name}-images.npy" not in info["files"]:
            return None
        images = np.load(entry / f"{name}-images.npy", mmap_mode="r")
        labels = np.load(entry / f"{name}-labels.npy")
        names, digests, targets = (
            array(f"{name}-{what}.npy") for what in ("names", "digests", "targets")
        )
        return Split(images, labels, names, digests, info.get("decoding"), targets)

    train = split("train")
    if train is None:
        raise FileNotFoundError(f"{entry}: the cache entry has no train split; delete it")
    limits = info.get("value_range")
    limits = tuple(limits) if limits else None
    return Splits(info["classes"], train, split("val"), split("test"), limits, info.get("cut", 0))
