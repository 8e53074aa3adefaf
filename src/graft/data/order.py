"""The order of the data, as a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Positions = NDArray[np.int64] | list[int]
FEW_STEPS = 8
"""Below that many steps an epoch is too short to train on, and a note says so."""


class BatchOrder(Sampler[NDArray[np.int64]]):
    """Yields the positions of one batch at a time, for one rank of several.

    Training (`shuffle=True`): every epoch is a permutation drawn from (seed, epoch) alone. Batch i
    of all ranks together is what batch i of a single process with `world_size` times the batch
    size would be. Ranks get equally many batches, the remainder is left to the next epoch's draw.
    Without `drop_last` the end may differ: an image that a rank has left over, alone, joins the
    batch before, and a single process has one more batch of as many images as there are ranks.

    `labels`: every pass over the data shows each class equally often, to within one example: those
    of rare classes come again and again, of frequent ones each pass shows others.

    `weights`: every pass shows each example as often as its weight says, to within one time.

    An epoch may also be longer or shorter than the data (`epoch_size`): it is then the next so many
    of an endless row of such permutations. Where it comes back to an example, the position has
    `size` added once more: the same image, and to augmentation a draw of its own.

    Evaluation: each example belongs to exactly one rank; nothing is padded, so that metrics over
    all ranks are exact (padding counts examples twice).

    Args:
        epoch, first: asked whenever an iteration starts, because loaders outlive epochs: which
            epoch it is, and with which of its batches a resumed one goes on.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        labels: NDArray[np.int64] | None = None,
        weights: NDArray[np.float64] | None = None,
        epoch_size: int | None = None,
        drop_last: bool = False,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        first: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.labels = labels
        self.weights = weights
        self.epoch_size = size if epoch_size is None else epoch_size
        self.drop_last = drop_last
        self.seed = seed
        self.epoch = epoch
        self.first = first
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        share = self._share()
        whole, left = divmod(share, self.batch_size)
        # BatchNorm can't train on a single image: the batch before takes it too.
        joined = self.shuffle and left == 1 and whole > 0
        return whole + (left > 0 and not self.drop_last and not joined)

    def _share(self) -> int:
        if self.shuffle:
            return self.epoch_size // self.world_size
        return len(range(self.rank, self.size, self.world_size))

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        order = np.arange(self.size)
        if self.shuffle:
            order = self._drawn(self.epoch() * self.epoch_size)
        mine = order[self.rank :: self.world_size][: self._share()]
        size, last = self.batch_size, len(self) - 1
        end = size * len(self) if self.drop_last else len(mine)
        # Not `yield` in here: that would ask for the place at the first batch, not now.
        return (
            mine[i * size : end if i == last else (i + 1) * size]
            for i in range(self.first(), len(self))
        )

    def _drawn(self, start: int) -> NDArray[np.int64]:
        """An epoch of the endless row, from `start` on."""
        first, skipped = divmod(start, self.size)
        passes = range(-(-(skipped + self.epoch_size) // self.size))
        rows: list[NDArray[np.int64]] = []
        for i in passes:
            rng = np.random.default_rng([self.seed, first + i])
            row = self._pass(rng)
            rows.append(row + (0 if i == 0 else self.size * (1 + int(rows[-1].max()) // self.size)))
        return np.concatenate(rows)[skipped : skipped + self.epoch_size]

    def _pass(self, rng: np.random.Generator) -> NDArray[np.int64]:
        if self.weights is not None:
            return weighted(self.weights, rng)
        return rng.permutation(self.size) if self.labels is None else balanced(self.labels, rng)


def weighted(weights: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """As many positions as there are weights, in random order, each as often as its weight says,
    to within one time (systematic resampling). Where one comes again, its position has
    `len(weights)` added once more.
    """
    size = len(weights)
    share = np.cumsum(weights) / weights.sum()
    rows = np.searchsorted(share, (rng.random() + np.arange(size)) / size).clip(max=size - 1)
    again = np.arange(size) - np.searchsorted(rows, rows)
    return rng.permutation(rows + again * size)


def balanced(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """As many positions as there are labels, in random order, of each class equally many.

    Where a class has to come back to an example, its position has `len(labels)` added once more.
    """
    classes = rng.permutation(np.unique(labels))
    each, more = divmod(len(labels), len(classes))
    drawn = []
    for i, label in enumerate(classes):
        members, wanted = np.flatnonzero(labels == label), each + (i < more)
        rounds = range(-(-wanted // len(members)))
        again = [rng.permutation(members) + k * len(labels) for k in rounds]
        drawn.append(np.concatenate([*again, members[:0]])[:wanted])
    return rng.permutation(np.concatenate(drawn))


def batch_size_for(images: int) -> int:
    """128, or the power of two down to 8 that gives an epoch of so many images enough steps.

    In a handful of steps the running statistics of BatchNorm do not follow the weights.
    """
    return next((size for size in (128, 64, 32, 16) if size * FEW_STEPS <= images), min(8, images))
