"""Rows that live on the GPU: no worker, no copy per batch, one indexing kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from graft.storage.stored import DEVICE_SHARE

if TYPE_CHECKING:
    from graft.data.datasets import Batch, ImageDataset
    from graft.data.order import Positions

CHUNK = 4096  # rows on their way to the device


class ResidentDataset(Dataset["Batch"]):
    """A copy of an `ImageDataset`'s rows on `device`; its batches are made there."""

    def __init__(self, dataset: ImageDataset, device: torch.device) -> None:
        first = dataset[[0]]["input"]
        self.rows = torch.empty((len(dataset), *first.shape[1:]), dtype=first.dtype, device=device)
        for start in range(0, len(dataset), CHUNK):
            positions = list(range(start, min(start + CHUNK, len(dataset))))
            self.rows[start : start + CHUNK] = dataset[positions]["input"].to(device)
        self.labels = torch.from_numpy(dataset.labels).to(device)
        targets = dataset.targets
        self.targets = None if targets is None else torch.from_numpy(targets).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, positions: Positions) -> Batch:
        index = torch.tensor(positions, device=self.labels.device)
        at = index % len(self)
        batch = {"input": self.rows[at], "label": self.labels[at], "index": index}
        if self.targets is not None:
            batch["target"] = self.targets[at]
        return batch


def fits_on_gpu(mode: str, dataset: ImageDataset, device: torch.device) -> bool:
    """Whether a split's rows should live on `device`.

    Args:
        mode: "auto": on a CUDA device, where they take at most `DEVICE_SHARE` of its free memory;
            "on": whatever they take; "off".
    """
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"data.resident={mode}: must be auto, on or off")
    if device.type != "cuda":
        if mode == "on":
            raise ValueError(f"data.resident=on needs a CUDA device; this run is on {device.type}")
        return False
    if mode != "auto":
        return mode == "on"
    size = len(dataset) * dataset.images[0].nbytes
    return size <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
