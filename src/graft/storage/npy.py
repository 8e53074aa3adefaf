"""Rows in `.npy` files: written whole or not at all, under a lock; read without surprises."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import DTypeLike, NDArray

log = logging.getLogger(__name__)


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


def rows_of(images: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """`images[rows]`; reading a mapped file past the end it has by now would kill the process.

    Raises:
        OSError: the file has been cut.
    """
    if isinstance(images, np.memmap) and images.filename is not None:
        with suppress(FileNotFoundError):  # deleted: what is mapped stays
            if Path(images.filename).stat().st_size < images.offset + images.nbytes:
                raise OSError(f"{images.filename} was cut while in use: start again to rebuild it")
    return images[rows]
