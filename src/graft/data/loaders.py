"""What yields batches: the datasets here make a whole one by a single indexing call."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from graft.data.datasets import Batch
from graft.data.order import BatchOrder, Positions


class Steps:
    """The batches of a few training steps, each read when it is asked for."""

    def __init__(self, dataset: Dataset[Batch], positions: Sequence[Positions]) -> None:
        self.dataset = dataset
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Batch]:
        return (self.dataset[positions] for positions in self.positions)


class Batches:
    """What a `DataLoader` without workers yields; or `Steps`, of `steps` such batches each.

    That one takes 50 us for each batch, which a small head notices.
    """

    def __init__(self, dataset: Dataset[Batch], order: BatchOrder, steps: int = 1) -> None:
        self.dataset = dataset
        self.order = order
        self.steps = steps

    def __len__(self) -> int:
        return -(-len(self.order) // self.steps)

    def __iter__(self) -> Iterator[Any]:
        # Not `yield` in here: the order is asked for now, not at the first batch.
        if self.steps == 1:
            return (self.dataset[positions] for positions in self.order)
        left = list(self.order)
        starts = range(0, len(left), self.steps)
        return (Steps(self.dataset, left[start : start + self.steps]) for start in starts)


def whole_batches(
    dataset: Dataset[Batch], sampler: Sampler[Any], *, num_workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """A DataLoader whose sampler yields whole batches."""
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=identity,  # type: ignore[arg-type]  # a batch, not a list of samples
        generator=torch.Generator(),  # iterating must not consume the global RNG
        worker_init_fn=_leave_process_group,
    )


def epoch_and_first_batch(trainer: L.Trainer | None) -> tuple[int, int]:
    """The epoch, and the batch it goes on with: 0, unless it was interrupted.

    From the counters of Lightning's loops, which checkpoints restore; `trainer.current_epoch`
    lags behind while it starts.
    """
    if trainer is None:
        return 0, 0
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return epochs.processed, batches.processed if epochs.ready > epochs.processed else 0


def identity(batch: Batch) -> Batch:
    return batch


def _leave_process_group(worker: int) -> None:
    # SLURM signals whole groups: a worker that dies of SIGTERM would take the run with it, before
    # the run has saved anything.
    os.setpgid(0, 0)
