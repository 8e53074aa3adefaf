"""Class folders: `root/train/<class>/*.jpg`, and the same for val and test."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from graft.data.decode import EXTENSIONS, MixedSizesError, decode_batch, native_side
from graft.data.source import (
    NpyWriter,
    Source,
    Splits,
    locked,
    open_entry,
    read_entry,
    seal,
    writing,
)

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same files would be stored as other pixels
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
BATCH = 32  # images that a thread decodes at a time


class ImageFolder(Source):
    """Images in class folders, decoded once.

    Storage: when all images share one size, square and no larger than `size`, they are stored as
    they are. Otherwise the shorter side is resized to `size` (bilinear, antialiased) and the
    central square is kept.

    Args:
        root: holds `train/<class>/*`, and optionally `val` (or `valid`, `validation`) and `test`.
        cache: where the decoded images go; safe to delete.
        on_error: `fail` or `skip` (leave out, with a warning) when images cannot be read.
    """

    def __init__(
        self, root: str | Path, cache: str | Path, on_error: Literal["fail", "skip"] = "fail"
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise ValueError(f"data.source.on_error is fail or skip, not {on_error!r}")
        self.root = Path(root).expanduser().absolute()
        self.cache = Path(cache).expanduser().absolute()
        self.on_error = on_error
        self.listing: Listing | None = None  # walking and stat take a second for 60,000 files

    def prepare(self, size: int) -> None:
        listing = self.listing = self._list()
        if listing.ignored:
            kinds = Counter(Path(name).suffix or "none" for name in listing.ignored)
            log.warning(
                "%s: %d files left out, no image by their extension (%s), first: %s",
                self.root,
                len(listing.ignored),
                ", ".join(f"{kind} {n}" for kind, n in kinds.most_common(5)),
                listing.ignored[0],
            )
        entry = self._find(listing.digest, size)
        if entry is None:
            with locked(self.cache / f"folder-{listing.digest}.lock"):
                # Another process may have built it while this one waited.
                entry = self._find(listing.digest, size) or self._build(listing, size)
        unreadable = self._check(entry)
        if unreadable:
            log.warning("%s; they are left out", unreadable)

    def load(self, size: int) -> Splits:
        listing = self.listing or self._list()
        entry = self._find(listing.digest, size)
        if entry is None:
            raise FileNotFoundError(
                f"{self.root}: not decoded at {size} px, or changed since; call prepare() first"
            )
        self._check(entry)
        return open_entry(entry)

    def _list(self) -> Listing:
        return list_images(self.root)

    def _entry(self, digest: str, size: int | None) -> Path:
        return self.cache / f"folder-{digest}-{size or 'native'}"

    def _find(self, digest: str, size: int) -> Path | None:
        native = read_entry(self._entry(digest, None))
        if native is not None and native["side"] <= size:
            return self._entry(digest, None)
        entry = self._entry(digest, size)
        return entry if read_entry(entry) is not None else None

    def _check(self, entry: Path) -> str | None:
        """What to say of unreadable images, None when there are none; raises unless skipping."""
        info = read_entry(entry)
        if info is None or not info["unreadable"]:
            return None
        path, why = info["unreadable"][0]
        message = (
            f"{len(info['unreadable'])} of {info['total']} images cannot be read, "
            f"first: {self.root / path}: {why}"
        )
        if self.on_error == "fail":
            raise ValueError(f"{message}; data.source.on_error=skip leaves them out")
        if info["emptied"]:
            raise ValueError(f"{message}; none is left in {self.root / info['emptied'][0]}")
        return message

    def _build(self, listing: Listing, size: int) -> Path:
        native = native_side(self.root, listing.images["train"], size)
        if native is not None:
            entry = self._entry(listing.digest, None)
            try:
                self._write(entry, listing, native, resize=False)
            except MixedSizesError:
                log.info("%s: mixed sizes, all images are resized to %d px", self.root, size)
            else:
                return entry
        entry = self._entry(listing.digest, size)
        self._write(entry, listing, size, resize=True)
        return entry

    def _write(self, entry: Path, listing: Listing, side: int, *, resize: bool) -> None:
        total = sum(len(images) for images in listing.images.values())
        unreadable: list[tuple[str, str]] = []
        emptied: list[str] = []
        done, told = 0, time.monotonic()
        # Below 64 px threads get in each other's way: most of the time is Python, not decoding.
        workers = 1 if side <= 64 and not resize else min(8, os.cpu_count() or 1)
        decoder = partial(decode_batch, self.root, side=side, resize=resize)
        with writing(entry) as folder, ThreadPoolExecutor(workers) as pool:
            for split, images in listing.images.items():
                labels: list[int] = []
                with NpyWriter(folder / f"{split}-images.npy", (3, side, side), np.uint8) as file:
                    # One round of batches at a time, so that few decoded images are in memory.
                    for round_ in _chunks(images, BATCH * workers):
                        for part in pool.map(decoder, _chunks(round_, BATCH)):
                            file.append(part.images)
                            labels += part.labels
                            unreadable += part.unreadable
                        done += len(round_)
                        if time.monotonic() - told > 5:
                            told = time.monotonic()
                            log.info("%s: decoded %d of %d images", self.root, done, total)
                with NpyWriter(folder / f"{split}-labels.npy", (), np.int64) as file:
                    file.append(np.array(labels, dtype=np.int64))
                emptied += [
                    f"{listing.folders[split]}/{listing.classes[label]}"
                    for label in sorted({label for _, label in images} - set(labels))
                ]
            seal(
                folder,
                listing.classes,
                side=side,
                total=total,
                unreadable=unreadable,
                emptied=emptied,
            )


class EvalFolder(ImageFolder):
    """Images to evaluate on alone: `root/test/<class>/*`, or `root/<class>/*`.

    They stand for every split, because a data set has a train split.
    """

    def load(self, size: int) -> Splits:
        splits = super().load(size)
        return replace(splits, val=splits.train, test=splits.train)

    def _list(self) -> Listing:
        inner = "test" if (self.root / "test").is_dir() else "."
        return list_images(self.root, {"train": (inner,)})


@dataclass
class Listing:
    """The files of a data set in a fixed order; `digest` covers names, sizes and mtimes."""

    classes: list[str] = field(default_factory=list)
    folders: dict[str, str] = field(default_factory=dict)  # split -> its folder: val -> valid
    images: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # (path, label)
    ignored: list[str] = field(default_factory=list)
    digest: str = ""


def list_images(root: Path, folders: Mapping[str, Sequence[str]] = FOLDERS) -> Listing:
    """Walk the class folders; every complaint is one line that names the path.

    Args:
        folders: the names that the folder of a split may have.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; data.root= says where the images are")
    listing = Listing()
    digest = hashlib.sha256(f"{FORMAT}\0{root.resolve()}\0".encode("utf-8", "surrogateescape"))
    for split, names in folders.items():
        present = [name for name in names if (root / name).is_dir()]
        if len(present) > 1:
            raise ValueError(f"{root}: both {' and '.join(present)}; which one is the val split?")
        if present:
            listing.folders[split] = present[0]
    if "train" not in listing.folders:
        raise ValueError(f"{root}: no train folder; expected {root}/train/<class>/<image>")
    train = root / listing.folders["train"]
    listing.classes = _class_names(train)
    if len(listing.classes) == 1:
        raise ValueError(f"{train}: only one class, {listing.classes[0]}; 2 are needed")
    for split, name in listing.folders.items():
        listing.images[split] = []
        for class_name in _class_names(root / name):
            if class_name not in listing.classes:
                raise ValueError(f"{root}/{name}/{class_name}: no such class in {root}/train")
            label = listing.classes.index(class_name)
            found = False
            for path, stat in sorted(_walk(root / name / class_name, f"{name}/{class_name}")):
                if not path.lower().endswith(EXTENSIONS):
                    listing.ignored.append(path)
                    continue
                found = True
                listing.images[split].append((path, label))
                digest.update(f"{path}\0{stat}\n".encode("utf-8", "surrogateescape"))
            if not found:
                raise ValueError(f"{root}/{name}/{class_name}: no images ({', '.join(EXTENSIONS)})")
    listing.digest = digest.hexdigest()[:32]
    return listing


def _class_names(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    names = [name for name in names if not name.startswith(".")]
    if not names:
        raise ValueError(f"{folder}: no class folders; expected {folder}/<class>/<image>")
    return names


def _walk(folder: Path, relative: str) -> Iterator[tuple[str, str]]:
    """(path below root, "size mtime") of all files, subfolders included, hidden ones not."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, f"{relative}/{entry.name}")
            else:
                stat = entry.stat()
                yield f"{relative}/{entry.name}", f"{stat.st_size} {stat.st_mtime_ns}"


def _chunks(items: list[tuple[str, int]], length: int) -> list[list[tuple[str, int]]]:
    return [items[start : start + length] for start in range(0, len(items), length)]
