"""What yields batches: the datasets here make a whole one by a single indexing call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from graft.data.datasets import Batch
from graft.data.order import BatchOrder


class Batches:
    """What a `DataLoader` without workers yields.

    That one takes 50 us for each batch, which a small head notices.
    """

    def __init__(self, dataset: Dataset[Batch], order: BatchOrder) -> None:
        self.dataset = dataset
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        # Not `yield` in here: the order is asked for now, not at the first batch.
        return (self.dataset[positions] for positions in self.order)


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


def identity(batch: Batch) -> Batch:
    return batch


def _leave_process_group(worker: int) -> None:
    # SLURM signals whole groups: a worker that dies of SIGTERM would take the run with it, before
    # the run has saved anything.
    os.setpgid(0, 0)
