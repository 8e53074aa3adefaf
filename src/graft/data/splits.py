"""The train, val and test splits of what a source has loaded, and whether it can be trained on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from graft.config.words import plural
from graft.data.datasets import ImageDataset
from graft.data.sources.base import Split, Splits
from graft.data.subset import shots_per_class as draw_shots
from graft.data.subset import stratified_fraction, stratified_split
from graft.transforms.inputs import Inputs

WATCHED = 2000  # images of a target by which epochs are scored without labels


def draw_splits(
    loaded: Splits,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    train_fraction: float,
    shots_per_class: int | None,
    stratified: bool = True,
) -> dict[str, ImageDataset]:
    """Each split by name; those the source lacks are held out of its training images.

    The arguments are those of `TransferDataModule`; `seed` is its `split_seed`.

    Args:
        stratified: or else labels decide nothing.
    """
    if train_fraction != 1.0 and shots_per_class is not None:
        raise ValueError("data.train_fraction and data.shots_per_class exclude each other")
    labels, classes = loaded.train.labels, loaded.classes
    if not stratified:
        labels, classes = np.zeros_like(labels), ["unlabelled"]
    keep = _order(loaded.train, stratified)
    held_out: dict[str, ImageDataset] = {}
    given = {"val": loaded.val, "test": loaded.test}
    drawn_splits = [name for name, split in given.items() if split is None]
    if short := _below(len(drawn_splits) + 1, labels, classes):
        raise ValueError(
            f"{short}: too few for train and {' and '.join(drawn_splits)}, which are drawn from "
            "the training images: add images, leave the class out, or bring splits of your own"
        )
    for offset, (name, fraction) in enumerate((("test", test_fraction), ("val", val_fraction))):
        split = given[name]
        if split is not None:
            held_out[name] = ImageDataset(split, _order(split, stratified))
            continue
        kept, drawn = stratified_split(labels[keep], fraction, seed + offset)
        held_out[name] = ImageDataset(loaded.train, keep[drawn])
        keep = keep[kept]
    if shots_per_class is not None and loaded.train.targets is not None:
        raise ValueError(
            f"data.shots_per_class={shots_per_class}: this data has no classes: use "
            "data.train_fraction"
        )
    if shots_per_class is not None:
        if short := _below(shots_per_class, labels[keep], loaded.classes):
            fewest = min(np.unique(labels[keep], return_counts=True)[1])
            raise ValueError(
                f"data.shots_per_class={shots_per_class}: {short} to train on: set "
                f"data.shots_per_class={fewest} or less, or add images"
            )
        keep = keep[draw_shots(labels[keep], shots_per_class, seed)]
    elif train_fraction != 1.0:
        keep = keep[stratified_fraction(labels[keep], train_fraction, seed)]
    more = {
        name: ImageDataset(split, _order(split, bool((split.labels >= 0).any())))
        for name, split in loaded.more.items()
    }
    if target := more.get("target"):
        watched = np.random.default_rng(0).permutation(len(target))[:WATCHED]
        more["val_target"] = ImageDataset(target.split, target.rows[np.sort(watched)])
    return {"train": ImageDataset(loaded.train, keep), **held_out, **more}


def _order(split: Split, labelled: bool) -> np.ndarray:
    """The source's own, or without labels one that no class folder decides."""
    if labelled or split.digests is None:
        return np.arange(len(split.labels))
    return np.argsort(split.digests, kind="stable")


def _below(least: int, labels: np.ndarray, classes: list[str]) -> str:
    """The class with the fewest images, where that is less than `least`; "" where none is."""
    present, counts = np.unique(labels, return_counts=True)
    short = np.flatnonzero(counts < least)
    if not len(short):
        return ""
    first = short[np.argmin(counts[short])]
    more = f" ({len(short) - 1} more classes have too few)" if len(short) > 1 else ""
    return f"class {classes[present[first]]} has {plural(int(counts[first]), 'image')}{more}"


def renumbered(dataset: ImageDataset, own: Sequence[str], names: Sequence[str]) -> ImageDataset:
    """The same with labels that count the classes `names` in place of its `own`.

    Raises:
        ValueError: a class is not among `names`.
    """
    if unknown := [name for name in own if name not in names]:
        raise ValueError(
            f"the data has classes that the run does not know: {few(unknown)}; it knows "
            f"{few(names)}"
        )
    dataset = copy.copy(dataset)
    dataset.labels = np.array([names.index(name) for name in own])[dataset.labels]
    return dataset


def few(names: Sequence[str]) -> str:
    """The first of them."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_splits(loaded: Splits, source: str, inputs: Inputs) -> None:
    """That a source has loaded what a `Splits` holds, of rows that `inputs` takes.

    Raises:
        ValueError: it has not; it names the source, the split and what to do.
    """
    classes = loaded.classes
    if not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{source}: classes must be a list of names, not {classes!r}")
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise ValueError(f"{source}: two classes have the name {twice[0]}: each needs its own")
    for name, split in loaded.named().items():
        if problem := _problem(split, classes, inputs, unknown=name in loaded.more):
            raise ValueError(f"{source}, {name} split: {problem}")


def _problem(split: Split, classes: list[str], inputs: Inputs, *, unknown: bool) -> str | None:
    """unknown: whether labels may be -1."""
    for what in ("images", "labels"):
        array: Any = getattr(split, what)
        if not isinstance(array, np.ndarray):
            return f"{what} must be a numpy array, not {type(array).__name__}"
    return inputs.problem(split.images) or _label_problem(split, classes, -1 if unknown else 0)


def _label_problem(split: Split, classes: list[str], lowest: int) -> str | None:
    labels, count = split.labels, len(split.images)
    if labels.ndim != 1:
        hint = ", labels.argmax(1) if they are one-hot" if labels.ndim == 2 else ""
        return f"labels must be (N,), one class for each image, not {labels.shape}{hint}"
    for what in ("labels", "names", "digests", "targets"):
        array = getattr(split, what)
        if array is not None and len(array) != count:
            return f"{count:,} images, but {len(array):,} {what}: each image needs one"
    if split.targets is not None and (problem := _target_problem(split.targets, classes)):
        return problem
    if labels.dtype != np.int64:
        return f"labels must be int64, not {labels.dtype}: labels.astype(np.int64)"
    wrong = np.flatnonzero((labels < lowest) | (labels >= len(classes)))
    if len(wrong):
        return (
            f"labels must be 0 to {len(classes) - 1} for {len(classes)} classes; number {wrong[0]} "
            f"is {labels[wrong[0]]}"
        )
    return None


def _target_problem(targets: np.ndarray, names: list[str]) -> str | None:
    if targets.ndim != 2 or targets.shape[1] != len(names):
        return f"targets must be (N, {len(names)}), one for each name, not {targets.shape}"
    if targets.dtype != np.float32:
        return f"targets must be float32, not {targets.dtype}: targets.astype(np.float32)"
    return None if np.isfinite(targets).all() else "a target is not finite"
