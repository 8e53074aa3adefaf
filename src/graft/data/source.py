"""What a data set is (`Source`), and the cache that decoded images are kept in.

A cache entry is a folder of `.npy` files plus `entry.json`. It is written elsewhere and renamed
when complete, so a build that was killed, or ran out of disk, is never taken for a data set.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import DTypeLike, NDArray

from graft.reading import read_json

if TYPE_CHECKING:
    from graft.backbones.base import Preprocessing


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Images with their labels, and what tells an item again: a source may leave that out."""

    images: NDArray[np.uint8]  # (N, 3, H, W), in memory or memory-mapped read-only
    labels: NDArray[np.int64]  # (N,)
    names: NDArray[np.bytes_] | None = None  # (N,) paths below the root; None: positions
    digests: NDArray[np.uint64] | None = None  # (N,) `content_digest` of each; None: of its pixels


@dataclass(frozen=True)
class Splits:
    classes: list[str]
    train: Split
    val: Split | None  # None: drawn from train by the datamodule
    test: Split | None
    # What was black and white in images of more than 8 bits; other images are to be read alike.
    value_range: tuple[float, float] | None = None


class Source(ABC):
    """A data set. One class, one YAML. Plain constructor arguments."""

    def prepare(self, preprocessing: Preprocessing) -> None:  # noqa: B027 (may need nothing)
        """Download and decode once; safe when several processes start together.

        Args:
            preprocessing: how larger or mixed-size images are resized to be stored.
        """

    @abstractmethod
    def load(self, preprocessing: Preprocessing) -> Splits:
        """Open what `prepare(preprocessing)` wrote, without a copy."""


def content_digest(content: bytes | memoryview) -> int:
    """64 bits: enough to tell the items of a data set apart, few enough to record them all."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the system frees it when its holder is killed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # of a run from another machine, say
        raise OSError(
            f"cannot make the folder {path.parent} ({error.strerror}): paths.cache=FOLDER keeps "
            "what is computed elsewhere"
        ) from error
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

    def __init__(self, path: Path, row_shape: tuple[int, ...], dtype: DTypeLike) -> None:
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


def save_items(
    folder: Path,
    split: str,
    labels: Sequence[int],
    digests: Sequence[int],
    names: Sequence[bytes] | None = None,
) -> None:
    """Write what a `Split` has beside its images."""
    arrays = {"labels": np.array(labels, np.int64), "digests": np.array(digests, np.uint64)}
    if names is not None:
        arrays["names"] = np.array(names, np.bytes_)
    for name, values in arrays.items():
        with NpyWriter(folder / f"{split}-{name}.npy", (), values.dtype) as file:
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
        if images is not None and (images.dtype != np.uint8 or images.ndim != 4):
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

    def array(file: str) -> NDArray[Any] | None:
        return np.load(entry / file) if file in info["files"] else None

    def split(name: str) -> Split | None:
        if f"{name}-images.npy" not in info["files"]:
            return None
        images = np.load(entry / f"{name}-images.npy", mmap_mode="r")
        labels = np.load(entry / f"{name}-labels.npy")
        return Split(images, labels, array(f"{name}-names.npy"), array(f"{name}-digests.npy"))

    train = split("train")
    if train is None:
        raise FileNotFoundError(f"{entry}: the cache entry has no train split; delete it")
    limits = info.get("value_range")
    return Splits(
        info["classes"], train, split("val"), split("test"), tuple(limits) if limits else None
    )


def rows_of(images: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """`images[rows]`; reading a mapped file past the end it has by now would kill the process.

    Raises:
        OSError: the file has been cut.
    """
    if isinstance(images, np.memmap) and images.filename is not None:
        with suppress(FileNotFoundError):  # deleted: what is mapped stays
            if Path(images.filename).stat().st_size < images.offset + images.nbytes:
                raise OSError(f"{images.filename} was cut while in use: start again to rebuild it")
    return images[rows]
