"""Test images that are corrupted when they are asked for."""

from __future__ import annotations

import torch

from graft.data.datasets import Batch, ImageDataset
from graft.data.order import Positions
from graft.transforms.corruptions import corrupt


class CorruptedImages(ImageDataset):
    """The images of a data set as `corrupt` changes them."""

    def __init__(self, clean: ImageDataset, name: str, severity: int) -> None:
        self.split, self.images = clean.split, clean.images
        self.rows, self.labels = clean.rows, clean.labels
        self.name, self.severity = name, severity

    def __getitem__(self, positions: Positions) -> Batch:
        batch = super().__getitem__(positions)
        index = torch.from_numpy(self.rows[positions])
        return {**batch, "input": corrupt(batch["input"], index, self.name, self.severity)}
