"""Augmentation of a whole uint8 batch on its device.

Training differs from evaluation by what `Augment` does; geometry and normalisation are the same
code for both, so they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graft.transforms.boxes import BOX_DRAWS, inside, random_boxes
from graft.transforms.draws import CROP, ERASE, MOVE, uniform
from graft.transforms.mixing import mix
from graft.transforms.prepare import Prepare

ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)  # Zhong et al. 2017


@dataclass(frozen=True)
class Augment:
    """What happens to a training image, as a pure function of (seed, epoch, index).

    Only the partner in `mixup` and `cutmix` also depends on the batch: see `mix`.

    Args:
        shift: largest shift in each direction, as a fraction of the stored side; the border is
            filled by reflection. 4 px of CIFAR-10's 32 is 0.125, the usual padded random crop.
            Where the evaluation crops (256 to 224: a margin of 1/16), a shift of 0.0625 is
            exactly the usual random crop.
        flip: probability of a horizontal mirror image.
        scale: smallest and largest area of a random resized crop, as a fraction of the stored
            image; it takes the place of the shift, and of the evaluation's resize and crop.
        ratio: smallest and largest width / height of that crop.
        erase: probability that a box of 2 to 33 % of the area becomes the mean colour.
        mixup, cutmix: alpha of each; 0 is off.
    """

    shift: float = 0.125
    flip: float = 0.5
    scale: Sequence[float] | None = None
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.shift < 1:
            raise ValueError(f"data.augment.shift={self.shift}: must be in [0, 1)")
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.augment.{name}={getattr(self, name)}: must be in [0, 1]")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.augment.scale={self.scale}: must be two areas in (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"data.augment.ratio={self.ratio}: must be two numbers above 0")
        if min(self.mixup, self.cutmix) < 0:
            raise ValueError("data.augment.mixup and cutmix must be 0 or more")

    def __call__(self, images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """(N, 3, H, W) uint8 -> the same shape, each image moved by its own draw."""
        u = uniform(seed, epoch, index, 3, first=MOVE)
        mirrored = (u[:, 2] < self.flip)[:, None]
        if self.scale is not None or not self.shift:  # nothing is shifted
            return torch.where(mirrored[:, :, None, None], images.flip(3), images)
        n, c, h, w = images.shape
        rows = _shifted(h, self.shift, u[:, 0])
        columns = _shifted(w, self.shift, u[:, 1])
        columns = torch.where(mirrored, columns.flip(1), columns)
        pixel = (rows[:, :, None] * w + columns[:, None, :]).view(n, 1, h * w)
        return images.reshape(n, c, h * w).gather(2, pixel.expand(n, c, h * w)).view(n, c, h, w)

    def batch(
        self,
        batch: dict[str, Tensor],
        prepare: Prepare,
        num_classes: int,
        *,
        seed: int,
        epoch: int,
    ) -> dict[str, Tensor]:
        """A training batch, prepared; with soft labels "target" (N, num_classes) if it is mixed."""
        index = batch["index"]
        images = self(batch["input"], index, seed=seed, epoch=epoch)
        boxes = None
        if self.scale is not None:
            u = uniform(seed, epoch, index, BOX_DRAWS, first=CROP)
            boxes = random_boxes(u, images.shape[2], images.shape[3], self.scale, self.ratio)
        images = prepare(images, boxes)
        if self.erase:
            u = uniform(seed, epoch, index, 1 + BOX_DRAWS, first=ERASE)
            height, width = images.shape[2:]
            boxes = random_boxes(u[:, 1:], height, width, ERASED_AREA, ERASED_RATIO)
            erased = inside(boxes, height, width) & (u[:, 0] < self.erase)[:, None, None, None]
            images = images.masked_fill_(erased, 0.0)
        if not (self.mixup or self.cutmix):
            return {**batch, "input": images}
        images, target = mix(
            images,
            batch.get("target", batch["label"]),
            index,
            num_classes,
            mixup=self.mixup,
            cutmix=self.cutmix,
            seed=seed,
            epoch=epoch,
        )
        return {**batch, "input": images, "target": target}


def _shifted(size: int, fraction: float, u: Tensor) -> Tensor:
    """(N, size) source positions of an axis shifted by up to `fraction`, reflected at the ends."""
    limit = min(round(size * fraction), size - 1)
    shift = (u * (2 * limit + 1)).long() - limit
    position = torch.arange(size, device=u.device)[None] + shift[:, None]
    return (size - 1) - ((size - 1) - position.abs()).abs()
