"""What a data set is (`Source`), and the cache that decoded images are kept in.

A cache entry is a folder of `.npy` files plus `entry.json`. It is written elsewhere and renamed
when complete, so a build that was killed, or ran out of disk, is never taken for a data set.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    images: NDArray[np.uint8]  # (N, 3, H, W), in memory or memory-mapped read-only
    labels: NDArray[np.int64]  # (N,)


@dataclass(frozen=True)
class Splits:
    classes: list[str]
    train: Split
    val: Split | None  # None: drawn from train by the datamodule
    test: Split | None


class Source(ABC):
    """A data set. One class, one YAML. Plain constructor arguments."""

    def prepare(self, size: int) -> None:  # noqa: B027 (a source that needs nothing is complete)
        """Download and decode once; safe when several processes start together.

        size: shorter side in px that larger or mixed-size images are stored at.
        """

    @abstractmethod
    def load(self, size: int) -> Splits:
        """Open what `prepare(size)` wrote, without a copy."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the system frees it when its holder is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log.info("waiting for another process that holds %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class NpyWriter:
    """Rows appended to a `.npy` file whose final length is not known yet.

    Plain writes, not a memory map: a full disk is an OSError instead of a bus error, and what
    has been written doesn't count as resident memory.
    """

    def __init__(self, path: Path, row_shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        self.row_shape, self.dtype, self.rows = row_shape, np.dtype(dtype), 0
        self.file = path.open("wb")
        self.start = self._header()

    def _header(self) -> int:
        # numpy pads the header so that the first axis may grow in place (GROWTH_AXIS_MAX_DIGITS).
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(
            self.file,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.rows, *self.row_shape),
            },
        )
        return self.file.tell()

    def append(self, rows: NDArray[Any]) -> None:
        self.file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self.rows += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with self.file:
            if kind is None:
                assert self._header() == self.start, "the .npy header changed its length"
                self.file.flush()
                os.fsync(self.file.fileno())


@contextmanager
def writing(entry: Path) -> Iterator[Path]:
    """A fresh folder that becomes `entry` if the block succeeds. Hold a lock around it."""
    partial = entry.with_name(entry.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed build
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(entry, ignore_errors=True)  # a damaged one
    partial.rename(entry)


def seal(folder: Path, classes: Sequence[str], **extra: Any) -> None:
    """Write `entry.json`: the classes, and the size of each file, to notice a torn one."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.npy"))}
    text = json.dumps({"classes": list(classes), "files": sizes, **extra}, indent=1)
    with (folder / "entry.json").open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_entry(entry: Path) -> dict[str, Any] | None:
    """The `entry.json` of a complete cache entry; None when it is missing or damaged."""
    try:
        info: dict[str, Any] = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
        whole = all((entry / name).stat().st_size == size for name, size in info["files"].items())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError):
        whole = False
    if not whole:
        log.warning("%s is damaged and will be built again", entry)
        return None
    return info


def open_entry(entry: Path) -> Splits:
    """The splits in a cache entry, images memory-mapped read-only."""
    info = read_entry(entry)
    if info is None:
        raise FileNotFoundError(f"{entry}: no complete cache entry; call prepare() before load()")

    def split(name: str) -> Split | None:
        if f"{name}-images.npy" not in info["files"]:
            return None
        images = np.load(entry / f"{name}-images.npy", mmap_mode="r")
        return Split(images, np.load(entry / f"{name}-labels.npy"))

    train = split("train")
    if train is None:
        raise FileNotFoundError(f"{entry}: the cache entry has no train split; delete it")
    return Splits(info["classes"], train, split("val"), split("test"))
