"""Images with a table of labels or numbers, in place of class folders."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graft.config.names import visible
from graft.data.sources.base import save_items
from graft.data.sources.folder import ImageFolder
from graft.data.sources.listing import Listing
from graft.storage.digests import content_digest
from graft.storage.reading import read_bytes

SPLITS = ("train", "val", "test")


class ImageTable(ImageFolder):
    """Images that a CSV file lists: a column `file`, and a column for each target.

    `classes` are the names of those columns. See `ImageFolder` for what is not named here.

    Args:
        root: the folder that the table's paths start from.
        table: the CSV file, below `root`.
        columns: those that are targets; None: all but `file` and `split`.

    Raises:
        ValueError: a line of the table that can't be used, by its number.
    """

    def __init__(
        self,
        root: str | Path,
        cache: str | Path,
        table: str = "labels.csv",
        columns: Sequence[str] | None = None,
        **reading: Any,
    ) -> None:
        super().__init__(root, cache, **reading)
        self.table = self.root / table
        self.columns = columns
        self.targets: NDArray[np.float32] = np.zeros((0, 0), np.float32)  # by line of the table

    def _list(self) -> Listing:
        if not self.table.is_file():
            raise FileNotFoundError(
                f"{visible(str(self.table))}: no such file; data.root= is the folder of the table, "
                "data.source.table= its name"
            )
        content = read_bytes(self.table, 1 << 30)
        lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        header = next(lines, [])
        names = self._columns(header)
        at = {name: header.index(name) for name in ("file", "split", *names) if name in header}
        listing = Listing(classes=names, digest="")
        digest = hashlib.sha256(repr((str(self.root.resolve()), names)).encode() + content)
        rows: list[list[float]] = []
        for number, line in enumerate(lines, 2):
            if not line:
                continue
            where = f"{visible(str(self.table))}, line {number}"
            if len(line) != len(header):
                raise ValueError(f"{where}: {len(line)} cells under {len(header)} columns")
            split = line[at["split"]].strip().lower() if "split" in at else "train"
            if split not in SPLITS:
                raise ValueError(f"{where}: split={visible(split)}: must be {', '.join(SPLITS)}")
            rows.append([_number(line[at[name]], name, where) for name in names])
            file = line[at["file"]]
            problem = self._problem(file)
            if problem:
                listing.broken.append((file, problem))
                continue
            status = (self.root / file).stat()
            digest.update(f"{file}\0{status.st_size} {status.st_mtime_ns}\n".encode())
            listing.images.setdefault(split, []).append((file, len(rows) - 1))
            listing.folders[split] = split
        if "train" not in listing.images:
            raise ValueError(f"{visible(str(self.table))}: no images to train on")
        listing.images = {name: listing.images[name] for name in SPLITS if name in listing.images}
        self.targets = np.array(rows, np.float32)
        listing.digest = digest.hexdigest()[:32]
        return listing

    def _columns(self, header: list[str]) -> list[str]:
        shown = visible(str(self.table))
        if "file" not in header:
            raise ValueError(f"{shown}: no column `file`; it has {visible(', '.join(header))}")
        names = list(self.columns or [name for name in header if name not in ("file", "split")])
        if missing := [name for name in names if name not in header]:
            known = visible(", ".join(header))
            raise ValueError(f"{shown}: no column {visible(missing[0])}; it has {known}")
        if not names:
            raise ValueError(f"{shown}: no columns but file and split: what is to be learnt?")
        if twice := [name for name in ("file", *names) if header.count(name) > 1]:
            raise ValueError(f"{shown}: two columns are named {visible(twice[0])}")
        return names

    def _problem(self, file: str) -> str:
        path = self.root / file
        if not path.resolve().is_relative_to(self.root.resolve()):
            return "it lies outside of the table's folder"
        return "" if path.is_file() else "no such file"

    def _save(
        self, folder: Path, split: str, rows: list[int], digests: list[int], names: list[bytes]
    ) -> None:
        """A digest covers an item's targets too: an example with other ones is another example."""
        targets = self.targets[rows]
        pairs = zip(digests, targets, strict=True)
        both = [content_digest(d.to_bytes(8, "little") + row.tobytes()) for d, row in pairs]
        save_items(folder, split, [0] * len(rows), both, names, targets)

    def _lost(self, listing: Listing, split: str, kept: list[int]) -> list[tuple[str, int, int]]:
        total = len(listing.images[split])
        few = len(kept) < total - len(kept)
        return [(self.table.name, total - len(kept), total)] if few else []


def _number(text: str, column: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: {visible(column)}={visible(text)}: must be a number")
    return value
