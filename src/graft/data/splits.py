"""The train, val and test splits of what a source has loaded."""

from __future__ import annotations

import numpy as np

from graft.data.datasets import ImageDataset
from graft.data.source import Splits
from graft.data.subset import shots_per_class as draw_shots
from graft.data.subset import stratified_fraction, stratified_split


def draw_splits(
    loaded: Splits,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    train_fraction: float,
    shots_per_class: int | None,
) -> dict[str, ImageDataset]:
    """Each split by name; those the source lacks are held out of its training images.

    The arguments are those of `TransferDataModule`; `seed` is its `split_seed`.
    """
    labels = loaded.train.labels
    keep = np.arange(len(labels))
    held_out: dict[str, ImageDataset] = {}
    given = {"val": loaded.val, "test": loaded.test}
    for offset, (name, fraction) in enumerate((("test", test_fraction), ("val", val_fraction))):
        split = given[name]
        if split is not None:
            held_out[name] = ImageDataset(split)
            continue
        kept, drawn = stratified_split(labels[keep], fraction, seed + offset)
        held_out[name] = ImageDataset(loaded.train, keep[drawn])
        keep = keep[kept]
    if shots_per_class is not None:
        keep = keep[draw_shots(labels[keep], shots_per_class, seed)]
    elif train_fraction != 1.0:
        keep = keep[stratified_fraction(labels[keep], train_fraction, seed)]
    return {"train": ImageDataset(loaded.train, keep), **held_out}
