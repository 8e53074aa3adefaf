"""Rows on disk in shards: written by any number of processes at once, checked when opened.

A shard's file is named `00003-1a2b3c4d.npy`: its number and the CRC-32 of its bytes. One rename
publishes content and checksum together, so a shard is whole, torn (and noticed), or absent; a
build that was killed goes on with the shards it lacks.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from graft.storage.disk import readable
from graft.storage.npy import NpyWriter, locked
from graft.storage.reading import read_json

log = logging.getLogger(__name__)

SHARD_BYTES = 16 << 20  # small enough that ranks share the work and a kill loses seconds
MOST_SHARDS = 500  # each is an open file while it is read

Compute = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Positions (n,) -> their rows (n, *row_shape)."""


class ShardedRows:
    """`rows` rows of one shape and dtype in the folder `path`.

    Args:
        about: what the rows are, for a person; written into `about.json`.
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        row_shape: tuple[int, ...],
        dtype: str = "float32",
        *,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.rows, self.row_shape = path, rows, row_shape
        self.dtype = np.dtype(dtype)
        self.row_bytes = int(np.prod(row_shape)) * self.dtype.itemsize
        wanted = max(SHARD_BYTES, self.bytes // MOST_SHARDS) // max(1, self.row_bytes)
        self.shard_rows = max(1, min(wanted, rows))
        self.about = about or {}
        self._checked: dict[int, Path] = {}
        self._open: dict[int, tuple[int, int]] = {}  # shard -> (file descriptor, where rows start)

    @staticmethod
    def known_shape(path: Path) -> tuple[int, ...] | None:
        """The row shape of what is in the folder, if anything is."""
        try:
            shape = read_json(path / "about.json")["row_shape"]
        except (OSError, ValueError, KeyError):
            return None
        whole = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
        return tuple(shape) if whole else None

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def shards(self) -> range:
        return range(-(-self.rows // self.shard_rows))

    def positions(self, shard: int) -> NDArray[np.int64]:
        start = shard * self.shard_rows
        return np.arange(start, min(start + self.shard_rows, self.rows))

    def missing(self) -> list[int]:
        """Shards to be written; a damaged one counts as missing."""
        return [shard for shard in self.shards if self._find(shard) is None]

    def fill(self, compute: Compute, progress: Callable[[int, int], None] | None = None) -> None:
        """Compute and write what is missing, sharing the work with whoever else fills this folder.

        Raises:
            OSError: the disk does not hold it; what was written so far stays and will be used.
        """
        waiting = self.missing()
        if not waiting:
            return
        self._make_room(len(waiting))
        # Also between two shards: `graft cache prune` leaves what somebody holds a lock of.
        filling = FileLock(self.path / f"filling-{secrets.token_hex(4)}.lock")
        filling.acquire()
        try:
            while waiting:
                got_one = False
                for shard in waiting:
                    got_one |= self._fill_one(shard, compute)
                    if progress is not None:
                        progress(len(self._checked), len(self.shards))
                waiting = self.missing()
                if waiting and not got_one:
                    with locked(self.path / f"{waiting[0]:05d}.lock"):
                        pass  # its writer has finished, or was killed: look again
        finally:
            filling.release()
            Path(filling.lock_file).unlink(missing_ok=True)
            if progress is not None:
                progress(len(self.shards), len(self.shards))
        for lock in self.path.glob("*.lock"):
            lock.unlink(missing_ok=True)

    def _fill_one(self, shard: int, compute: Compute) -> bool:
        """False where somebody else computes it right now."""
        lock = FileLock(self.path / f"{shard:05d}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            if self._find(shard) is None:
                for remains in self.path.glob(f"{shard:05d}-*"):  # damaged or unfinished
                    remains.unlink(missing_ok=True)
                self._write(shard, compute(self.positions(shard)))
        finally:
            lock.release()
        return True

    def gather(self, index: NDArray[np.int64]) -> NDArray[Any]:
        """Rows in the order of `index`, read one by one: nothing stays in this process's memory,
        as the pages of a memory map would.
        """
        out = np.empty((len(index), *self.row_shape), self.dtype)
        view, size = out.reshape(-1).view(np.uint8).data, self.row_bytes
        for i, row in enumerate(index.tolist()):
            file, start = self._opened(row // self.shard_rows)
            where = start + row % self.shard_rows * size
            if os.preadv(file, [view[i * size : (i + 1) * size]], where) != size:
                raise OSError(f"{self.path}: a file was cut while it was read; start the run again")
        return out

    def blocks(self) -> Iterator[NDArray[Any]]:
        """All rows in order, a shard at a time."""
        for shard in self.shards:
            yield np.load(self._path(shard))

    def close(self) -> None:
        for file, _ in self._open.values():
            os.close(file)
        self._open.clear()

    def __del__(self) -> None:
        self.close()

    def _opened(self, shard: int) -> tuple[int, int]:
        if shard not in self._open:
            path = self._path(shard)
            start = path.stat().st_size - len(self.positions(shard)) * self.row_bytes
            self._open[shard] = (os.open(path, os.O_RDONLY), start)
        return self._open[shard]

    def _path(self, shard: int) -> Path:
        path = self._find(shard)
        if path is None or not path.exists():
            raise FileNotFoundError(f"{self.path}: shard {shard} is gone; start the run again")
        return path

    def _find(self, shard: int) -> Path | None:
        if shard not in self._checked:
            for path in sorted(self.path.glob(f"{shard:05d}-*.npy")):
                try:
                    whole = is_whole(path) and self._fits(path, shard)
                except FileNotFoundError:  # another process is replacing it
                    continue
                if whole:
                    self._checked[shard] = path
                    break
                log.warning("%s is damaged and will be computed again", path)
        return self._checked.get(shard)

    def _fits(self, path: Path, shard: int) -> bool:
        rows = np.load(path, mmap_mode="r")
        return rows.shape == (len(self.positions(shard)), *self.row_shape) and (
            rows.dtype == self.dtype
        )

    def _write(self, shard: int, rows: NDArray[Any]) -> None:
        partial = self.path / f"{shard:05d}-{os.getpid()}.partial"
        with np.errstate(over="ignore"):
            stored = rows.astype(self.dtype, copy=False)
        if np.isfinite(stored).sum() != np.isfinite(rows).sum():
            raise ValueError(
                f"features of up to {np.abs(rows).max():.3g} don't fit {self.dtype}: set the "
                "stage's cache_dtype=float32"
            )
        try:
            with NpyWriter(partial, self.row_shape, self.dtype.type) as file:
                file.append(stored)
            path = self.path / f"{shard:05d}-{checksum(partial):08x}.npy"
            self._checked[shard] = partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, missing: int) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        needed = min(missing * self.shard_rows, self.rows) * self.row_bytes
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OSError(
                f"stored features need {readable(needed)} in {self.path.parent}, where "
                f"{readable(free)} are free: set paths.cache to another disk, `graft cache "
                "prune`, or the stage's cache=off"
            )
        if self.known_shape(self.path) != self.row_shape:
            partial = self.path / f"about-{os.getpid()}.partial"
            partial.write_text(json.dumps({**self.about, "row_shape": self.row_shape}, indent=1))
            partial.replace(self.path / "about.json")


def checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            crc = zlib.crc32(part, crc)
    return crc


def is_whole(path: Path) -> bool:
    """Whether a shard's bytes are those it was written with, and an array's: a checksum in a name
    says nothing of who wrote it.
    """
    if path.stem.rpartition("-")[2] != f"{checksum(path):08x}":
        return False
    try:
        return np.load(path, mmap_mode="r").ndim > 0
    except FileNotFoundError:
        raise
    except Exception:  # numpy raises many kinds
        return False
