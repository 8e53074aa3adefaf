"""Any torchvision v2 transform, image by image in the loader's workers.

Slower than the transforms of whole batches; here for those that have no such form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from graft.data.order import BatchOrder, Positions
from graft.transforms.draws import sample_seed

if TYPE_CHECKING:
    from graft.data.datasets import Batch, ImageDataset


class SampleTransformed(Dataset["Batch"]):
    """Images of a data set, each through `transform` with randomness of its own.

    torch's generator is seeded for each image from (seed, epoch, index) and put back afterwards.
    So a transform must draw from torch, as torchvision's v2 do, not from numpy or `random`.

    Args:
        transform: uint8 (C, H, W) -> uint8 (C, h, w), of one size within a batch.
    """

    def __init__(
        self, dataset: ImageDataset, transform: Callable[[Tensor], Tensor], seed: int
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, drawn: tuple[Positions, int]) -> Batch:
        positions, epoch = drawn
        batch = self.dataset[positions]
        state = torch.get_rng_state()
        try:
            images = []
            for image, index in zip(batch["input"], batch["index"].tolist(), strict=True):
                torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
                images.append(self.transform(image))
        finally:
            torch.set_rng_state(state)
        return {**batch, "input": _stack(images)}


def _stack(images: list[Tensor]) -> Tensor:
    kinds = sorted({_kind(image) for image in images})
    if not all(kind.startswith("uint8 (3, ") for kind in kinds):
        raise ValueError(f"data.sample_transform gave {kinds[0]}: must be uint8 (3, H, W)")
    if len(kinds) > 1:
        raise ValueError(
            f"data.sample_transform gave {kinds[0]} and {kinds[1]} in one batch: end it with a "
            "resize or crop to one size"
        )
    return torch.stack(images)


def _kind(image: object) -> str:
    if not isinstance(image, Tensor):
        return type(image).__name__
    return f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"


class WithEpoch(Sampler[tuple[Positions, int]]):
    """(positions, epoch): workers, who are not told of epochs, read it from what they are asked."""

    def __init__(self, batches: BatchOrder) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Positions, int]]:
        epoch = self.batches.epoch()
        for positions in self.batches:
            yield positions, epoch
