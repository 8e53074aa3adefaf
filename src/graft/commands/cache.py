"""`graft cache`: what lies in the cache of decoded images and frozen features, and its upkeep."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.config.names import visible
from graft.config.overrides import own_cache, place
from graft.data.sources.base import read_entry
from graft.storage.disk import readable
from graft.storage.reading import read_json
from graft.storage.shards import is_whole

PREFIXES = ("features-", "folder-", "cifar10-")


@dataclass(frozen=True)
class Entry:
    path: Path
    what: str
    bytes: int
    days: float  # since it was last read or written

    @property
    def line(self) -> str:
        return f"{self.bytes / 1e6:10.1f} MB {self.days:6.1f} days  {self.path.name}  {self.what}"


def entries(cache: Path) -> list[Entry]:
    """Everything in the cache, largest first."""
    found = []
    folders = cache.iterdir() if cache.is_dir() else []
    for path in folders:
        if not path.is_dir() or not path.name.startswith(PREFIXES):
            continue
        stats = [file.stat() for file in path.iterdir() if file.is_file()]
        used = max([max(s.st_atime, s.st_mtime) for s in stats], default=path.stat().st_mtime)
        found.append(
            Entry(
                path, _describe(path), sum(s.st_size for s in stats), (time.time() - used) / 86400
            )
        )
    return sorted(found, key=lambda entry: -entry.bytes)


def _describe(path: Path) -> str:
    if not path.name.startswith("features-"):
        info = read_entry(path)
        return f"images of {len(info['classes'])} classes" if info else "unfinished"
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
        return [path for path in sorted(entry.path.glob("*-*.npy")) if not is_whole(path)]
    return [] if read_entry(entry.path) is not None else [entry.path]


def main(arguments: Sequence[str]) -> None:
    default = own_cache()
    parser = argparse.ArgumentParser(
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
            shutil.rmtree(entry.path)
            kept.remove(entry)
            print(f"deleted {visible(entry.line)}")
    print(f"{len(kept)} entries, {readable(sum(e.bytes for e in kept))} in {cache}")
    if bad:
        sys.exit(f"graft: {bad} damaged files; they are computed again when a run needs them")
