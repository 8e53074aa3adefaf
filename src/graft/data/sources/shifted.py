"""Images as one of the corruptions of CIFAR-10-C changes them: built once, kept in the cache."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from graft.config.words import plural
from graft.data.datasets import ImageDataset
from graft.data.sources.base import Source, Split, Splits, open_entry, read_entry, save_items, seal
from graft.storage.digests import source_of
from graft.storage.npy import NpyWriter, locked, rows_of, writing
from graft.transforms import corruptions, distortions
from graft.transforms.images import ImageInputs
from graft.transforms.preprocessing import Preprocessing

log = logging.getLogger(__name__)
CHUNK = 256  # images that are floating-point numbers at a time


class Shifted(Source):
    """Every split of another source, corrupted.

    Args:
        shift, severity: see `transforms.corruptions`.
        cache: where the corrupted images go; safe to delete.

    Raises:
        ValueError: the source has no images.
    """

    def __init__(self, source: Source, shift: str, severity: int, cache: str | Path) -> None:
        if not issubclass(source.inputs, ImageInputs):
            raise ValueError(f"data.shift={shift} is for images, and this data has none")
        self.source, self.shift, self.severity = source, shift, severity
        self.cache = Path(cache).expanduser().absolute()

    def prepare(self, preprocessing: Preprocessing) -> None:
        self.source.prepare(preprocessing)
        self.load(preprocessing)

    def load(self, preprocessing: Preprocessing) -> Splits:
        splits = self.source.load(preprocessing)

        def shifted(split: Split) -> Split:
            return corrupted(ImageDataset(split), self.shift, self.severity, self.cache).split

        return replace(
            splits,
            train=shifted(splits.train),
            val=None if splits.val is None else shifted(splits.val),
            test=None if splits.test is None else shifted(splits.test),
            more={name: shifted(split) for name, split in splits.more.items()},
        )


def corrupted(dataset: ImageDataset, name: str, severity: int, cache: Path) -> ImageDataset:
    """The images of a data set corrupted, in the same order and with the same labels.

    What is random in an image depends on its place in the whole split alone, so a part of a split
    has the images of the whole.
    """
    split, rows = dataset.split, dataset.rows
    how = (
        f"{name} {severity} "
        + hashlib.sha256((source_of(corruptions) + source_of(distortions)).encode()).hexdigest()
    )
    content = f"{how} {dataset.digest()} ".encode() + rows.tobytes()
    entry = cache / f"shifted-{hashlib.sha256(content).hexdigest()[:32]}"
    if read_entry(entry) is None:
        with locked(cache / f"{entry.name}.lock"):
            if read_entry(entry) is None:  # another process may have built it meanwhile
                _build(dataset, name, severity, entry)
    images = open_entry(entry).train.images
    changed = Split(
        images,
        dataset.labels,
        None if split.names is None else split.names[rows],
        # Of the image before: a run that was trained on it is to notice.
        None if split.digests is None or split.decoding is None else split.digests[rows],
        None if split.decoding is None else f"{split.decoding} {how}",
        dataset.targets,
    )
    return ImageDataset(changed)


def _build(dataset: ImageDataset, name: str, severity: int, entry: Path) -> None:
    images, rows = dataset.images, dataset.rows
    log.info("%s: severity %d, %s", name, severity, plural(len(rows), "image"))
    with writing(entry) as folder:
        with NpyWriter(folder / "train-images.npy", images.shape[1:], np.uint8) as file:
            for start in range(0, len(rows), CHUNK):
                chosen = rows[start : start + CHUNK]
                part = torch.from_numpy(np.array(rows_of(images, chosen)))
                number = torch.from_numpy(chosen)
                file.append(corruptions.corrupt(part, number, name, severity).numpy())
        save_items(folder, "train", dataset.labels.tolist(), [0] * len(rows))
        seal(folder, [f"{name} {severity}"])
