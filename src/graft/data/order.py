"""The order of the data, as a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Positions = NDArray[np.int64] | list[int]


class BatchOrder(Sampler[NDArray[np.int64]]):
    """Yields the positions of one batch at a time, for one rank of several.

    Training (`shuffle=True`): every epoch is a permutation drawn from (seed, epoch) alone. Batch i
    of all ranks together is what batch i of a single process with `world_size` times the batch
    size would be. Ranks get equally many batches, the remainder is left to the next epoch's draw.
    Without `drop_last` the end may differ: an image that a rank has left over, alone, joins the
    batch before, and a single process has one more batch of as many images as there are ranks.

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
        rows = [
            np.random.default_rng([self.seed, first + i]).permutation(self.size) + i * self.size
            for i in passes
        ]
        return np.concatenate(rows)[skipped : skipped + self.epoch_size]
