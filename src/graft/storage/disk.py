"""Files on disks that may be full: whole or not there, with errors that say what to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
# What a killed process was writing: names that nobody else gives.
LEFTOVER = re.compile(r"\..+(\.graft-\d+|\.ckpt\.unfinished)")


def create_exclusively(parent: Path, name: str) -> Path:
    """A new folder `name`, or `name-2`, ... where that is taken."""
    for attempt in range(1, 1000):
        path = parent / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{parent / name} and 999 more exist")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Whole or not at all, whatever stops the process."""
    with written_beside(path, content.encode() if isinstance(content, str) else content):
        pass


@contextmanager
def written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A file with `data` beside `path`, which takes its place at the end, if nothing is raised."""
    temporary = path.with_name(f".{path.name}.graft-{os.getpid()}")
    try:
        with explained(path, lambda: len(data)), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        with explained(path, lambda: len(data)):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def overwrite(path: Path, content: str) -> None:
    """In place, padded with spaces: for a full disk, or a folder that takes no new file.

    Raises:
        OSError: the content is longer than the file, or the file cannot be written to.
    """
    data = content.encode()
    with path.open("r+b", buffering=0) as file:
        size = path.stat().st_size
        if len(data) > size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file.write(data.ljust(size))
        os.fsync(file.fileno())


def remove_leftovers(*folders: Path) -> None:
    """Delete what killed processes were writing; for who holds the lock of these folders."""
    for folder in folders:
        for path in folder.glob(".*"):
            if LEFTOVER.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)


def mark_used(path: Path) -> None:
    """Note by a file's time that what it belongs to is in use: `graft cache prune` goes by it."""
    with suppress(OSError):  # the cache is somebody else's, and only they prune it
        os.utime(path)


@contextmanager
def explained(path: Path, needed: Callable[[], int]) -> Iterator[None]:
    """Says of a failure to write `path`, of `needed` bytes, where it is and what is missing.

    Raises:
        OSError: in place of the system's, or of torch's RuntimeError, which hides the system's.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno):
            cause = cause.__context__
        if cause is None:
            raise OSError(f"cannot write {path}: {error}") from error
        reason = cause.strerror
        if cause.errno in FULL:
            free = shutil.disk_usage(_existing(path)).free
            reason = f"the disk is full ({readable(needed())} needed, {readable(free)} free)"
        failure = OSError(f"cannot write {path}: {reason}")
        failure.errno = cause.errno
        raise failure from error


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def readable(count: float) -> str:
    """12.3 MB; in powers of 1,000."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
