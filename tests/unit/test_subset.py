"""Stratified subsets: right counts, nested, disjoint, a pure function of the seed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from graft.data.subset import shots_per_class, stratified_fraction, stratified_split

SIZES = {0: 100, 1: 30, 2: 7, 5: 2}  # unbalanced, with a gap in the labels
Indices = NDArray[np.int64]


@pytest.fixture
def labels() -> Indices:
    ordered = np.repeat(list(SIZES), list(SIZES.values())).astype(np.int64)
    return np.random.default_rng(7).permutation(ordered)


def counts(labels: Indices, indices: Indices) -> dict[int, int]:
    return {label: int((labels[indices] == label).sum()) for label in SIZES}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_split_is_a_stratified_partition(labels: Indices, fraction: float) -> None:
    kept, held_out = stratified_split(labels, fraction, seed=0)

    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    for label, size in SIZES.items():
        expected = min(max(round(fraction * size), 1), size - 1)
        assert counts(labels, held_out)[label] == expected
    for part in (kept, held_out):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


@pytest.mark.parametrize(
    "draw",
    [
        lambda labels, seed: stratified_split(labels, 0.2, seed)[1],
        lambda labels, seed: stratified_fraction(labels, 0.2, seed),
        lambda labels, seed: shots_per_class(labels, 1, seed),
    ],
)
def test_only_the_seed_decides(labels: Indices, draw: Callable[[Indices, int], Indices]) -> None:
    np.random.seed(0)  # noqa: NPY002  the global generator must play no part
    before = draw(labels, 3)
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(draw(labels, 3), before)
    assert not np.array_equal(draw(labels, 4), before)
    drawn = np.random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert drawn == np.random.random()  # noqa: NPY002  nor was it touched


def test_smaller_subsets_are_inside_larger_ones(labels: Indices) -> None:
    fractions = [0.01, 0.05, 0.1, 0.33, 0.5, 0.9, 1.0]
    by_fraction = [set(stratified_fraction(labels, f, 5).tolist()) for f in fractions]
    by_shots = [set(shots_per_class(labels, shots, 5).tolist()) for shots in (1, 2)]
    held_out = [set(stratified_split(labels, f, 5)[1].tolist()) for f in fractions[:-1]]
    for nested in (by_fraction, by_shots, held_out):
        for small, large in pairwise(nested):
            assert small < large or small == large
        assert len(nested[0]) < len(nested[-1])
    assert by_fraction[-1] == set(range(len(labels)))


def test_one_class_does_not_change_another(labels: Indices) -> None:
    without = labels[labels != 5]
    positions = np.flatnonzero(labels != 5)
    drawn = stratified_fraction(labels, 0.3, 1)
    np.testing.assert_array_equal(
        positions[stratified_fraction(without, 0.3, 1)], drawn[labels[drawn] != 5]
    )


def test_draws_are_not_the_first_images(labels: Indices) -> None:
    drawn = shots_per_class(labels, 2, 0)
    first = np.sort(np.concatenate([np.flatnonzero(labels == c)[:2] for c in SIZES]))
    assert not np.array_equal(drawn, first)


def test_shots(labels: Indices) -> None:
    assert counts(labels, shots_per_class(labels, 2, 0)) == dict.fromkeys(SIZES, 2)
    with pytest.raises(ValueError, match=r"^class 5 has 2 images, fewer than 3 shots$"):
        shots_per_class(labels, 3, 0)
    with pytest.raises(ValueError, match="at least 1"):
        shots_per_class(labels, 0, 0)


@pytest.mark.parametrize("fraction", [-0.1, 0.0, 1.0, 1.5])
def test_bad_fractions(labels: Indices, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"not {fraction}"):
        stratified_split(labels, fraction, 0)
    if fraction != 1:
        with pytest.raises(ValueError, match=f"not {fraction}"):
            stratified_fraction(labels, fraction, 0)


def test_split_of_a_single_image() -> None:
    with pytest.raises(ValueError, match="class 4 has a single image"):
        stratified_split(np.array([0, 0, 4]), 0.5, 0)
    with pytest.raises(ValueError, match="no images"):
        stratified_fraction(np.array([], dtype=np.int64), 0.5, 0)
