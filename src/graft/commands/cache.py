"""`graft cache`: what lies in the cache of decoded images and frozen features, and its upkeep."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from graft.commands import Parser
from graft.config.names import visible
from graft.config.overrides import own_cache, place
from graft.config.words import plural
from graft.data.sources.base import read_entry
from graft.storage.disk import readable
from graft.storage.reading import read_json
from graft.storage.shards import is_whole

PREFIXES = ("features-", "folder-", "cifar10-", "shifted-")


@dataclass(frozen=True)
class Entry:
    path: Path
    what: str
    bytes: int
    days: float  # since it was last used or written: see `mark_used`

    @property
    def line(self) -> str:
        return f"{self.bytes / 1e6:10.1f} MB {self.days:6.1f} days  {self.path.name}  {self.what}"


def entries(cache: Path) -> list[Entry]:
    """Everything in the cache, largest first."""
    found = []
    for path in cache.iterdir() if cache.is_dir() else []:
        # No entry is a file, and a run may have renamed or deleted one since it was listed.
        with suppress(NotADirectoryError, FileNotFoundError):
            if path.name.startswith(PREFIXES):
                found.append(_entry(path))
    return sorted(found, key=lambda entry: -entry.bytes)


def _entry(path: Path) -> Entry:
    used, size = path.stat().st_mtime, 0
    for file in path.iterdir():
        with suppress(FileNotFoundError):  # a run that fills it has renamed or deleted the file
            stat = file.stat()
            # Not the time of access: many disks note none, and to verify an entry is no use of it.
            used, size = max(used, stat.st_mtime), size + stat.st_size
    return Entry(path, _describe(path), size, (time.time() - used) / 86400)


def _describe(path: Path) -> str:
    if not path.name.startswith("features-"):
        info = read_entry(path)
        if info is None:
            return "unfinished"
        if path.name.startswith("shifted-"):
            return f"images with {info['classes'][0]}"
        return f"images of {plural(len(info['classes']), 'class', 'classes')}"
    try:
        about = read_json(path / "about.json")
        return f"{about['backbone']}; blocks {about['blocks']}; {about['rows']}; {about['input']}"
    except (OSError, ValueError, KeyError):
        return "unfinished"


def damaged(entry: Entry) -> list[Path]:
    """Files that are not what was written; they are computed again when they are needed.

    Features by their checksums, decoded images by their sizes.
    """
    if entry.path.name.startswith("features-"):
        return [path for path in sorted(entry.path.glob("*-*.npy")) if _is_torn(path)]
    unfinished = entry.path.suffix == ".partial" or not entry.path.exists()
    return [] if unfinished or read_entry(entry.path) is not None else [entry.path]


def _is_torn(shard: Path) -> bool:
    try:
        return not is_whole(shard)
    except FileNotFoundError:  # a run has put another in its place
        return False


def delete(path: Path) -> None:
    """Delete an entry under its locks: those of its parts in it, or that of its images beside it.

    Raises:
        Timeout: another process holds one of them, so it is filling the entry.
        OSError: the entry cannot be deleted.
    """
    beside = [lock for lock in path.parent.glob("*.lock") if path.name.startswith(lock.stem)]
    with ExitStack() as locks:
        for lock in [*path.glob("*.lock"), *beside]:
            locks.enter_context(FileLock(lock).acquire(timeout=0))
        shutil.rmtree(path)


def main(arguments: Sequence[str]) -> None:
    default = own_cache()
    parser = Parser(
        prog="graft cache", description="decoded images and frozen features; safe to delete"
    )
    parser.add_argument("action", nargs="?", default="list", choices=("list", "verify", "prune"))
    parser.add_argument("--cache", type=Path, default=Path(default), help=f"default: {default}")
    parser.add_argument("--days", type=float, help="prune: what was not used for so many days")
    parser.add_argument("--all", action="store_true", help="prune: everything")
    options = parser.parse_args(arguments)
    if options.action == "prune" and options.all == (options.days is not None):
        parser.error("prune needs either --days N or --all")
    cache = place(options.cache)
    found = entries(cache)
    kept, bad = list(found), 0
    for entry in found:
        if options.action == "verify":
            wrong = damaged(entry)
            bad += len(wrong)
            print(f"{'damaged' if wrong else 'whole':8} {visible(entry.line)}")
        elif options.action == "list":
            print(visible(entry.line))
        elif options.all or entry.days >= options.days:
            try:
                delete(entry.path)
            except Timeout:
                print(f"left    {visible(entry.line)}: a run is filling it")
                continue
            except OSError as error:  # it is somebody else's
                print(f"left    {visible(entry.line)}: {error.strerror}")
                continue
            kept.remove(entry)
            print(f"deleted {visible(entry.line)}")
    count = plural(len(kept), "entry", "entries")
    print(f"{count}, {readable(sum(e.bytes for e in kept))} in {cache}")
    if bad:
        count = plural(bad, "damaged file")
        sys.exit(f"graft: {count}: what is damaged is computed again when a run needs it")
