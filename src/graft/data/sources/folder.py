"""Class folders: `root/train/<class>/*` with val and test beside it, or `root/<class>/*`."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL

from graft.config.names import visible
from graft.config.words import plural
from graft.data.sources.base import Source, Splits, open_entry, read_entry, save_items, seal
from graft.data.sources.decode import (
    MixedSizesError,
    Reading,
    as_range,
    decode_batch,
    extremes,
    native_side,
)
from graft.data.sources.depth import Range, RangeUnknownError, range_of
from graft.data.sources.listing import Listing, counted, list_images, list_unlabelled
from graft.storage.npy import NpyWriter, locked, writing

if TYPE_CHECKING:
    from graft.transforms.preprocessing import Preprocessing

log = logging.getLogger(__name__)

FORMAT = 2  # raise it when the same files would be stored as other pixels
BATCH = 32  # images that a thread decodes at a time


class ImageFolder(Source):
    """Images in class folders, decoded once.

    Storage: when all images share one size, square and no larger than the resize makes them, they
    are stored as they are. Otherwise they are resized as the weights want it, and a central square
    is kept.

    Args:
        root: see `list_images`.
        cache: where the decoded images go; safe to delete.
        on_error: `fail` or `skip` (leave out, with a warning) when images cannot be read.
        background, max_megapixels: see `Reading`.
        value_range: the values that are black and white in images of more than 8 bits; None
            measures the training images, see `range_of`.
    """

    def __init__(
        self,
        root: str | Path,
        cache: str | Path,
        on_error: Literal["fail", "skip"] = "fail",
        background: str | None = None,
        value_range: Sequence[float] | None = None,
        max_megapixels: float = 200,
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise ValueError(f"data.source.on_error is fail or skip, not {on_error!r}")
        self.root = Path(root).expanduser().absolute()
        self.cache = Path(cache).expanduser().absolute()
        self.on_error = on_error
        self.reading = Reading(background or "white", as_range(value_range), max_megapixels)
        self.listing: Listing | None = None  # walking and stat take a second for 60,000 files

    def prepare(self, preprocessing: Preprocessing) -> None:
        listing = self.listing = self._list()
        self._say_listing(listing)
        digest = self._digest(listing)
        entry = self._find(digest, preprocessing)
        if entry is None:
            with locked(self.cache / f"folder-{digest}.lock"):
                # Another process may have built it while this one waited.
                entry = self._find(digest, preprocessing) or self._build(listing, preprocessing)
        unreadable = self._check(entry)
        if unreadable:
            log.warning("%s; they are left out", unreadable)
        self._say_reading(read_entry(entry) or {})

    def load(self, preprocessing: Preprocessing) -> Splits:
        listing = self.listing or self._list()
        entry = self._find(self._digest(listing), preprocessing)
        if entry is None:
            size = preprocessing.resize_size
            raise FileNotFoundError(
                f"{self._shown()}: not decoded at {size} px, or changed since; call prepare() first"
            )
        self._check(entry)
        return open_entry(entry)

    def _list(self) -> Listing:
        return list_images(self.root)

    def _shown(self, path: str = ".") -> str:
        return visible(str(self.root / path))

    def _digest(self, listing: Listing) -> str:
        key = repr((FORMAT, listing.digest, self.reading))
        return hashlib.sha256(key.encode()).hexdigest()[:32]

    def _entry(self, digest: str, p: Preprocessing | None) -> Path:
        """Of images resized by `p`, or of images as they are."""
        return self.cache / f"folder-{digest}-{_form(p)}"

    def _find(self, digest: str, preprocessing: Preprocessing) -> Path | None:
        native = read_entry(self._entry(digest, None))
        if native is not None and native["side"] <= preprocessing.resize_size:
            return self._entry(digest, None)
        entry = self._entry(digest, preprocessing)
        return entry if read_entry(entry) is not None else None

    def _say_listing(self, listing: Listing) -> None:
        places = {split: place for split, place in listing.folders.items() if split != place}
        if places:
            said = ", ".join(
                f"{split} from {visible(place) if place != '.' else 'the class folders'}"
                for split, place in places.items()
            )
            log.info("%s: %s", self._shown(), said)
        if listing.ignored:
            kinds = Counter(Path(name).suffix or "none" for name in listing.ignored)
            log.warning(
                "%s: %s left out, no image by their extension (%s), first: %s",
                self._shown(),
                plural(len(listing.ignored), "file"),
                counted(kinds),
                visible(listing.ignored[0]),
            )
        if listing.unused:
            more = f" and {len(listing.unused) - 5} more" if len(listing.unused) > 5 else ""
            names = ", ".join(visible(name) for name in listing.unused[:5])
            log.warning("%s: left unused: %s%s", self._shown(), names, more)
        if listing.junk:
            log.info("%s: skipped, no data: %s", self._shown(), counted(listing.junk))

    def _say_reading(self, info: dict[str, Any]) -> None:
        if deep := info.get("deep"):
            black, white = info["value_range"]
            log.info(
                "%s: %s of over 8 bits: %g is black, %g white (data.source.value_range)",
                *(self._shown(), plural(deep, "image"), black, white),
            )
        if transparent := info.get("transparent"):
            log.info(
                "%s: %s with transparent parts, shown on %s (data.source.background)",
                *(self._shown(), plural(transparent, "image"), self.reading.background),
            )

    def _check(self, entry: Path) -> str | None:
        """What to say of unreadable images, None when there are none; raises unless skipping."""
        info = read_entry(entry)
        if info is None or not info["unreadable"]:
            return None
        path, why = info["unreadable"][0]
        message = (
            f"{len(info['unreadable'])} of {info['total']} images cannot be read, "
            f"first: {self._shown(path)}: {visible(why)}"
        )
        if self.on_error == "fail":
            raise ValueError(f"{message}; data.source.on_error=skip leaves them out")
        for place, lost, total in info["lost"]:
            left = "none is left" if lost == total else f"{total - lost} of {total} are left"
            raise ValueError(f"{message}; {left} in {self._shown(place)}")
        return message

    def _build(self, listing: Listing, preprocessing: Preprocessing) -> Path:
        try:
            return self._decode(listing, preprocessing, self.reading)
        except RangeUnknownError:
            limits = self._measure(listing)
            return self._decode(listing, preprocessing, replace(self.reading, value_range=limits))

    def _measure(self, listing: Listing) -> Range:
        """The range of the training images; of all images if only others are deep."""
        others = [pair for images in listing.images.values() for pair in images]
        work = partial(extremes, self.root, reading=self.reading)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for images in (listing.images["train"], others):
                found = [one for part in pool.map(work, _chunks(images, BATCH)) for one in part]
                if limits := range_of(found, self.root):
                    return limits
        return (0.0, 1.0)  # no deep image has a finite value

    def _decode(self, listing: Listing, preprocessing: Preprocessing, reading: Reading) -> Path:
        digest, size = self._digest(listing), preprocessing.resize_size
        native = native_side(self.root, listing.images["train"], size)
        if native is not None:
            entry = self._entry(digest, None)
            try:
                self._write(entry, listing, native, None, reading)
            except MixedSizesError:
                log.info("%s: mixed sizes, all images are resized to %d px", self._shown(), size)
            else:
                return entry
        entry = self._entry(digest, preprocessing)
        self._write(entry, listing, size, preprocessing, reading)
        return entry

    def _write(
        self,
        entry: Path,
        listing: Listing,
        side: int,
        resize: Preprocessing | None,
        reading: Reading,
    ) -> None:
        total = sum(len(images) for images in listing.images.values())
        unreadable = list(listing.broken)
        lost: list[tuple[str, int, int]] = []  # (folder, unreadable, all) where most are
        seen: Counter[str] = Counter()
        done, told = 0, time.monotonic()
        # Below 64 px threads get in each other's way: most of the time is Python, not decoding.
        workers = 1 if side <= 64 and resize is None else min(8, os.cpu_count() or 1)
        decoder = partial(decode_batch, self.root, side=side, resize=resize, reading=reading)
        with writing(entry) as folder, ThreadPoolExecutor(workers) as pool:
            for split, images in listing.images.items():
                labels: list[int] = []
                names: list[bytes] = []
                digests: list[int] = []
                with NpyWriter(folder / f"{split}-images.npy", (3, side, side), np.uint8) as file:
                    # One round of batches at a time, so that few decoded images are in memory.
                    for round_ in _chunks(images, BATCH * workers):
                        for part in pool.map(decoder, _chunks(round_, BATCH)):
                            file.append(part.images)
                            labels += part.labels
                            names += part.names
                            digests += part.digests
                            unreadable += part.unreadable
                            seen += part.seen
                        done += len(round_)
                        if time.monotonic() - told > 5:
                            told = time.monotonic()
                            log.info("%s: decoded %d of %d images", self._shown(), done, total)
                self._save(folder, split, labels, digests, names)
                lost += self._lost(listing, split, labels)
            seal(
                folder,
                listing.classes,
                side=side,
                total=total + len(listing.broken),
                unreadable=unreadable,
                lost=lost,
                deep=seen["deep"],
                transparent=seen["transparent"],
                cut=seen["cut"],
                value_range=reading.value_range,
                decoding=f"{FORMAT} {_form(resize)} {reading} Pillow {PIL.__version__}",
            )

    def _save(
        self, folder: Path, split: str, labels: list[int], digests: list[int], names: list[bytes]
    ) -> None:
        save_items(folder, split, labels, digests, names)

    def _lost(self, listing: Listing, split: str, kept: list[int]) -> list[tuple[str, int, int]]:
        """(folder, unreadable, all) of each class that has lost most of its images."""
        left, lost = Counter(kept), []
        for label, count in Counter(label for _, label in listing.images[split]).items():
            if left[label] < count - left[label]:
                place = f"{listing.folders[split]}/{listing.classes[label]}"
                lost.append((place, count - left[label], count))
        return lost


class EvalFolder(ImageFolder):
    """Images to evaluate on alone: `root/test/<class>/*`, or `root/<class>/*`.

    They stand for every split, because a data set has a train split.
    """

    def load(self, preprocessing: Preprocessing) -> Splits:
        splits = super().load(preprocessing)
        return replace(splits, val=splits.train, test=splits.train)

    def _list(self) -> Listing:
        return list_images(self.root, evaluation=True)

    def _say_listing(self, listing: Listing) -> None:
        super()._say_listing(replace(listing, folders={}))  # "train" is not what it is


class UnlabelledFolder(ImageFolder):
    """All images in a folder and the folders in it: for tasks that see no labels."""

    def _list(self) -> Listing:
        return list_unlabelled(self.root)

    def _digest(self, listing: Listing) -> str:
        return "unlabelled-" + super()._digest(listing)[:21]


def _form(p: Preprocessing | None) -> str:
    if p is None:
        return "native"
    mode = "" if p.crop_mode == "center" else f"-{p.crop_mode}"
    return f"{p.resize_size}-{p.crop_size}-{p.interpolation}{mode}"


def _chunks(items: list[tuple[str, int]], length: int) -> list[list[tuple[str, int]]]:
    return [items[start : start + length] for start in range(0, len(items), length)]
