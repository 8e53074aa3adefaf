"""Stored features of a split, in memory, on a GPU or on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graft.storage.shards import ShardedRows

IN_MEMORY_BYTES = 1 << 30  # larger features are read row by row
DEVICE_SHARE = 0.25  # of free GPU memory that features may take


class StoredFeatures:
    """Features of a split, (N, *shape), or of V views of each image: row `position * V + view`.

    `features[row numbers]` gives float32 rows. Held in memory, or on the GPU, where they fit;
    otherwise read from disk, so that memory does not grow with the data.
    """

    def __init__(self, rows: ShardedRows, views: int = 1, device: torch.device | None = None):
        self.rows, self.views = rows, views
        self.tensor: Tensor | None = None
        if device is not None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if rows.bytes < DEVICE_SHARE * free:
                self.tensor = self._load().to(device)
        elif rows.bytes <= min(IN_MEMORY_BYTES, _free_memory() // 4):
            self.tensor = self._load()

    def __len__(self) -> int:
        return self.rows.rows

    def __getitem__(self, index: Tensor) -> Tensor:
        if self.tensor is not None:
            # Copies whole rows: twice as fast on CPUs as `tensor[index]`.
            return self.tensor.index_select(0, index.to(self.tensor.device)).float()
        return torch.from_numpy(self.rows.gather(index.numpy())).float()

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, in parts that are small."""
        for block in self.rows.blocks():
            yield torch.from_numpy(block).float()

    def _load(self) -> Tensor:
        whole = np.empty((self.rows.rows, *self.rows.row_shape), self.rows.dtype)
        start = 0
        for block in self.rows.blocks():
            whole[start : start + len(block)] = block
            start += len(block)
        return torch.from_numpy(whole)


def _free_memory() -> int:
    """Bytes that can be had without swapping; the page cache is such memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return 8 << 30
