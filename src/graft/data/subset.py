"""Stratified subsets of a labelled set: indices from labels, a pure function of the seed.

Each class is shuffled once per seed and its first k images are taken. So for one seed a smaller
subset is contained in every larger one, and one class does not change another's draw.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def stratified_split(
    labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[Indices, Indices]:
    """(kept, held out): `fraction` of each class held out, at least one image on either side."""
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction to hold out lies between 0 and 1, not {fraction}")

    def count(label: int, available: int) -> int:
        if available < 2:
            raise ValueError(f"class {label} has a single image: it cannot be in both parts")
        return min(_rounded(fraction, available), available - 1)

    held_out = _draw(labels, seed, count)
    kept = np.ones(len(labels), dtype=bool)
    kept[held_out] = False
    return np.flatnonzero(kept), held_out


def stratified_fraction(labels: NDArray[np.int64], fraction: float, seed: int) -> Indices:
    """`fraction` of each class, rounded, at least one image."""
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction to take lies above 0 and up to 1, not {fraction}")
    return _draw(labels, seed, lambda _, available: _rounded(fraction, available))


def shots_per_class(labels: NDArray[np.int64], shots: int, seed: int) -> Indices:
    """`shots` images of each class."""
    if shots < 1:
        raise ValueError(f"shots per class is at least 1, not {shots}")

    def count(label: int, available: int) -> int:
        if available < shots:
            raise ValueError(f"class {label} has {available} images, fewer than {shots} shots")
        return shots

    return _draw(labels, seed, count)


def _rounded(fraction: float, available: int) -> int:
    return max(1, int(np.floor(fraction * available + 0.5)))


def _draw(labels: NDArray[np.int64], seed: int, count: Callable[[int, int], int]) -> Indices:
    """The first count(label, available) of each shuffled class, sorted."""
    if not len(labels):
        raise ValueError("there are no images to draw from")
    drawn = []
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([seed, label]).permutation(len(members))
        drawn.append(members[order[: count(label, len(members))]])
    return np.sort(np.concatenate(drawn)).astype(np.int64, copy=False)
