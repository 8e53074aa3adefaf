"""Which items the splits of a run have: kept in its folder, and found again in the data later."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from graft.data.datasets import ImageDataset
from graft.data.sources.base import Split, Splits
from graft.storage.digests import content_digest

FILE = "splits.npz"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Items:
    """The items of a split in their order.

    Attributes:
        origin: the split of the source that they come from.
        names: paths below the source's root, or positions.
        digests: `content_digest` of each.
        side: (height, width) of images as they are stored, the shape of other rows.
    """

    origin: str
    names: NDArray[np.bytes_]
    digests: NDArray[np.uint64]
    labels: NDArray[np.int64]
    side: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class SplitRecord:
    """The items of each split of a run, and the names of the classes that labels count."""

    classes: list[str]
    splits: dict[str, Items]

    @classmethod
    def of(cls, loaded: Splits, chosen: Mapping[str, ImageDataset]) -> Self:
        """What was chosen from the splits of a source."""
        splits = {}
        for name, dataset in chosen.items():
            origin = next(o for o, split in loaded.named().items() if split is dataset.split)
            names, digests = _identity(dataset.split, dataset.rows)
            side = _side(dataset.split)
            splits[name] = Items(origin, names, digests, dataset.labels, side)
        return cls(loaded.classes, splits)

    def summary(self) -> dict[str, dict[str, Any]]:
        """For `run.json`: of each split the number of items, and a digest of their contents and
        classes that neither their names nor their order change.
        """
        found = {}
        for name, items in self.splits.items():
            pairs = np.rec.fromarrays([items.digests, items.labels.astype(np.uint64)])
            digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
            digest.update(np.sort(pairs).tobytes())
            found[name] = {"items": len(items), "digest": digest.hexdigest()[:16]}
        return found

    def packed(self) -> bytes:
        """The content of the file."""
        names = [name.encode("utf-8", "surrogateescape") for name in self.classes]
        arrays: dict[str, Any] = {"classes": np.array(names, np.bytes_)}
        for split, items in self.splits.items():
            for key, value in vars(items).items():
                arrays[f"{split}-{key}"] = np.asarray(value)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def read(cls, run: Path) -> Self | None:
        """That of a run folder; None where there is none: of a run that has not begun, or is older.

        Raises:
            ValueError: it is damaged.
        """
        path = run / FILE
        try:
            with np.load(path, allow_pickle=False) as file:
                classes = [n.decode("utf-8", "surrogateescape") for n in file["classes"].tolist()]
                names = [key.removesuffix("-origin") for key in file.files if key[-7:] == "-origin"]
                # The three are always there; without one the file is damaged.
                splits = {name: _items(file, name) for name in dict.fromkeys([*SPLITS, *names])}
        except FileNotFoundError:
            return None
        except Exception as error:  # zipfile and numpy raise a dozen kinds
            raise ValueError(f"{path} is damaged: {error}") from error
        return cls(classes, splits)

    def find(self, loaded: Splits) -> tuple[dict[str, ImageDataset], dict[str, str]]:
        """The recorded splits in what a source has loaded now: by name and content, else by content
        alone, so that files may have been renamed.

        Returns the splits, without what is not found, and by split what has changed, in words.
        """
        splits, changes = {}, {}
        for name, items in self.splits.items():
            if name not in SPLITS and items.origin not in loaded.more:
                continue  # of a target, and the run is evaluated without it
            split = loaded.named().get(items.origin, loaded.train)
            rows, gone = _find(items, split, loaded.classes, self.classes)
            kept = rows >= 0
            splits[name] = ImageDataset(split, rows[kept])
            splits[name].labels = items.labels[kept]  # as the run counts its classes
            if text := _told(items, gone):
                changes[name] = f"of {len(items):,} {name} images, {text}"
            elif _side(split) != items.side:
                now, before = ("x".join(map(str, s)) for s in (_side(split), items.side))
                changes[name] = f"{name} images are stored at {now} now, at {before} before"
        return splits, changes

    def trained_on(self, dataset: ImageDataset) -> int:
        """How many of other images have the content of one that the run was trained on."""
        _, digests = _identity(dataset.split, dataset.rows)
        return int(np.isin(digests, self.splits["train"].digests).sum())


def _side(split: Split) -> tuple[int, ...]:
    shape = split.images.shape
    return shape[2:] if len(shape) == 4 else shape[1:]


def _identity(
    split: Split, rows: NDArray[np.int64]
) -> tuple[NDArray[np.bytes_], NDArray[np.uint64]]:
    names = rows.astype(np.bytes_) if split.names is None else split.names[rows]
    if split.digests is not None:
        return names, split.digests[rows]
    pixels = (np.ascontiguousarray(split.images[row]).reshape(-1).view(np.uint8) for row in rows)
    return names, np.array([content_digest(p.data) for p in pixels], np.uint64)


def _items(file: Any, split: str) -> Items:
    names, digests, labels = (file[f"{split}-{key}"] for key in ("names", "digests", "labels"))
    if not len(names) == len(digests) == len(labels):
        raise ValueError(f"the {split} split has arrays of several lengths")
    origin, side = str(file[f"{split}-origin"]), tuple(file[f"{split}-side"].tolist())
    return Items(
        origin, names.astype(np.bytes_), digests.astype(np.uint64), labels.astype(np.int64), side
    )


def _find(
    items: Items, split: Split, now: list[str], before: list[str]
) -> tuple[NDArray[np.int64], dict[int, str]]:
    """(the row of each item in the split or -1, why there is none by its position).

    Args:
        now, before: the names of classes that the labels of the split and of the items count.
    """
    names, digests = (a.tolist() for a in _identity(split, np.arange(len(split.labels))))
    by_name = {name: row for row, name in enumerate(names)}
    rows = np.full(len(items), -1)
    lost = []
    for i, (name, digest) in enumerate(
        zip(items.names.tolist(), items.digests.tolist(), strict=True)
    ):
        row = by_name.get(name)
        if row is not None and digests[row] == digest:
            rows[i] = row
        else:
            lost.append((i, name, digest))
    why: dict[int, str] = {}
    if lost:
        unclaimed = defaultdict(list)
        for row in sorted({*range(len(names))} - {*rows.tolist()}, reverse=True):
            unclaimed[digests[row]].append(row)
        for i, name, digest in lost:
            if unclaimed[digest]:
                rows[i] = unclaimed[digest].pop()
            else:
                why[i] = "with another content" if name in by_name else "missing"
    known = [before.index(name) if name in before else -1 for name in now]
    numbers = np.array([*known, -1])  # the last is of label -1: unknown stays unknown
    moved = (rows >= 0) & (numbers[split.labels[rows]] != items.labels)
    why |= dict.fromkeys(np.flatnonzero(moved).tolist(), "in another class")
    rows[moved] = -1
    return rows, why


def _told(items: Items, why: Mapping[int, str]) -> str:
    first: dict[str, int] = {}
    for i, reason in why.items():
        first.setdefault(reason, i)
    counts = {reason: sum(r == reason for r in why.values()) for reason in first}
    return ", ".join(
        f"{counts[reason]:,} {reason} (first: {_shown(items.names[i])})"
        for reason, i in first.items()
    )


def _shown(name: bytes) -> str:
    return f"number {name.decode()}" if name.isdigit() else name.decode("utf-8", "backslashreplace")
