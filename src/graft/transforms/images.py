"""Transforms of a whole uint8 batch on its device: augmentation, resize, crop, normalisation.

Training differs from evaluation by what `Augment` does; geometry and normalisation are the same
code for both, so they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.transforms.boxes import BOX_DRAWS, box_matrices, inside, random_boxes
from graft.transforms.draws import CROP, ERASE, MOVE, uniform
from graft.transforms.mixing import mix
from graft.transforms.preprocessing import Interpolation, Preprocessing

CPU_CHUNK = 150_000  # px, input or output: a chunk stays in a core's cache, a batch does not
SMALL = 64  # px: up to here dense matrices beat `interpolate`, which skips their zeros, on a CPU
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


class Prepare:
    """uint8 images to what the backbone expects: resize, central crop, normalise.

    The resize is torch's antialiased `interpolate` of bytes, which gives what Pillow gives to a
    grey level, or two small matrix products where these are faster: their matrices are
    `interpolate` applied to the identity.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, 3, crop_size, crop_size) float32, channels last.

        Args:
            boxes: (N, 4) top, left, height, width: each image's own part to be resized to
                `crop_size`, in place of the resize and the central crop.
        """
        crop = self.preprocessing.crop_size
        height, width = images.shape[2:]
        out = torch.empty(
            (len(images), 3, crop, crop),
            device=images.device,
            memory_format=torch.channels_last,
        )
        chunk = max(len(images), 1)
        if images.device.type == "cpu":
            chunk = max(1, CPU_CHUNK // max(height * width, crop * crop))
        for start in range(0, len(images), chunk):
            part = slice(start, start + chunk)
            if boxes is None:
                self._resize(images[part], out[part])
            else:
                self._resize_boxes(images[part], boxes[part], out[part])
        return out

    def _resize(self, images: Tensor, out: Tensor) -> None:
        p = self.preprocessing
        height, width = images.shape[2:]
        resized = p.resized(height, width)
        if p.crop_size > min(resized):
            raise ValueError(
                f"crop of {p.crop_size} px from an image resized to {min(resized)} px: must fit"
            )
        top, left = (p.crop_start(side) for side in resized)
        crop = (..., slice(top, top + p.crop_size), slice(left, left + p.crop_size))
        mode, device = p.interpolation, images.device
        if resized == (height, width):
            out[:] = self._normalised(images[crop])
        elif _as_bytes(images, mode):
            x = images.contiguous(memory_format=torch.channels_last)
            x = F.interpolate(x, size=resized, mode=mode, antialias=True)
            out[:] = self._normalised(x[crop])
        else:
            rows = row_bands(height, resized[0], (top, top + p.crop_size), mode, device)
            columns = resize_matrix(width, resized[1], mode, device)[crop[2]]
            if mode == "bilinear":
                _products(rows, self._normalised(images), columns, out)
            else:  # overshoots: without Pillow's clipping it would be 20 grey levels off
                _products(rows, images.float(), columns, out, clip=True)
                out.copy_(self._normalised(out))

    def _resize_boxes(self, images: Tensor, boxes: Tensor, out: Tensor) -> None:
        size, mode = self.preprocessing.crop_size, self.preprocessing.interpolation
        x = self._normalised(images)
        if _sparse(images):
            for i, (top, left, h, w) in enumerate(boxes.tolist()):
                part = x[i : i + 1, :, top : top + h, left : left + w]
                out[i : i + 1] = F.interpolate(part, size=(size, size), mode=mode, antialias=True)
            return
        top, left, h, w = boxes.unbind(1)
        rows = box_matrices(top, h, images.shape[2], size, mode)
        columns = box_matrices(left, w, images.shape[3], size, mode)
        _products([(slice(None), slice(None), rows)], x, columns[:, None], out)

    def _normalised(self, images: Tensor) -> Tensor:
        p = self.preprocessing
        offset, scale = _statistics(tuple(p.mean), tuple(p.std), images.device)
        return (images - offset) * scale


Band = tuple[slice, slice, Tensor]
"""Rows of a matrix, the columns in which they are not zero, and what is there."""


def _products(
    rows: Sequence[Band], images: Tensor, columns: Tensor, out: Tensor, *, clip: bool = False
) -> None:
    """rows @ images @ columns.T. Channels move to the end in between, where it is a third of the
    work, so that the second product writes `out` as it lies in memory.

    Args:
        clip: both products give whole numbers from 0 to 255, as in Pillow.
    """
    wide = images @ columns.mT
    if clip:
        wide.round_().clamp_(0, 255)
    wide = wide.permute(0, 2, 3, 1).flatten(2)
    lines = out.permute(0, 2, 3, 1).flatten(2)
    for written, read, band in rows:
        torch.matmul(band, wide[:, read], out=lines[:, written])
    if clip:
        out.round_().clamp_(0, 255)


def _as_bytes(images: Tensor, mode: Interpolation) -> bool:
    return _sparse(images) or (images.device.type == "cpu" and mode == "bicubic")


def _sparse(images: Tensor) -> bool:
    return images.device.type == "cpu" and max(images.shape[2:]) > SMALL


@lru_cache(maxsize=32)
def resize_matrix(size: int, resized: int, mode: Interpolation, device: torch.device) -> Tensor:
    """(resized, size): resizes an axis."""
    identity = torch.eye(size)[None, None]
    return F.interpolate(identity, size=(resized, size), mode=mode, antialias=True)[0, 0].to(device)


@lru_cache(maxsize=32)
def row_bands(
    size: int, resized: int, crop: tuple[int, int], mode: Interpolation, device: torch.device
) -> list[Band]:
    """The rows from `crop[0]` to before `crop[1]` of `resize_matrix`; on CPUs its upper and lower
    half without the zeros that each of them has: almost half of the work.
    """
    matrix = resize_matrix(size, resized, mode, device)[slice(*crop)]
    bands: list[Band] = []
    step = -(-len(matrix) // 2) if device.type == "cpu" else len(matrix)
    for start in range(0, len(matrix), step):
        part = matrix[start : start + step]
        used = part.any(0).nonzero()[:, 0].tolist()
        read = slice(used[0], used[-1] + 1)
        bands.append((slice(start, start + step), read, part[:, read].contiguous()))
    return bands


@lru_cache(maxsize=32)
def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of grey levels 0 to 255, as (3, 1, 1)."""
    offset = 255 * torch.tensor(mean, device=device)[:, None, None]
    return offset, 1 / (255 * torch.tensor(std, device=device))[:, None, None]
