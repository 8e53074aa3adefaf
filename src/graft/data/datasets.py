"""Chosen rows of a split as batches: of images, or of stored features in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from graft.data.order import Positions
from graft.data.sources.base import Split
from graft.storage.digests import rows_digest
from graft.storage.npy import rows_of
from graft.storage.stored import StoredFeatures
from graft.transforms.inputs import drawn_view

Batch = dict[str, Tensor]
"""With "index", "label", and "input" (rows, or what `Inputs.prepare` makes of them, which may be a
tuple of tensors) or "features"; "target" has soft labels, or several numbers for each example."""


class ImageDataset(Dataset[Batch]):
    """Chosen rows of a split, a batch by one indexing call: `dataset[list of positions]`.

    Positions count on past the end, as `BatchOrder` uses them; "index" holds them as they came.

    Rows are looked up, not copied out: a subset of memory-mapped images stays on disk.
    """

    def __init__(self, split: Split, rows: np.ndarray | None = None) -> None:
        self.split, self.images = split, split.images
        self.rows = np.arange(len(split.labels)) if rows is None else rows
        self.labels = split.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """SHA-256 of its images in their order, or of what stands for them: a record is read a
        thousand times faster than pixels.
        """
        split = self.split
        if split.digests is None or split.decoding is None:
            return rows_digest(self.images, self.rows)
        how = f"{split.decoding} {self.images.shape[1:]}".encode()
        return hashlib.sha256(how + split.digests[self.rows].tobytes()).hexdigest()

    def __getitem__(self, positions: Positions) -> Batch:
        at = np.asarray(positions) % len(self)
        batch = {
            "input": torch.from_numpy(np.asarray(rows_of(self.images, self.rows[at]))),
            "label": torch.from_numpy(self.labels[at]),
            "index": torch.as_tensor(positions),
        }
        if self.split.targets is not None:
            batch["target"] = torch.from_numpy(self.split.targets[self.rows[at]])
        return batch

    @property
    def targets(self) -> np.ndarray | None:
        """(N, T), where the data has no classes."""
        return None if self.split.targets is None else self.split.targets[self.rows]


class FeatureDataset(Dataset[Batch]):
    """The same positions and labels, with stored features in place of images.

    Of several views of an image, each epoch draws one, from (seed, epoch, index) alone.
    """

    def __init__(
        self, features: StoredFeatures, images: ImageDataset, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.features, self.seed, self.epoch = features, seed, epoch
        self.labels = torch.from_numpy(images.labels)
        self.targets = None if images.targets is None else torch.from_numpy(images.targets)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, positions: Positions) -> Batch:
        index = torch.as_tensor(positions)
        rows = at = index % len(self)
        if (views := self.features.views) > 1:
            view = drawn_view(views, index, seed=self.seed, epoch=self.epoch())
            rows = at * views + view
        labels = self.labels.index_select(0, at)
        batch = {"features": self.features[rows], "label": labels, "index": index}
        if self.targets is not None:
            batch["target"] = self.targets.index_select(0, at)
        return batch
