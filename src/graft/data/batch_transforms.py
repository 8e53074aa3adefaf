"""Transforms of a whole uint8 batch on its device: augmentation, resize, crop, normalisation.

Training differs from evaluation by a random shift and mirror at the stored resolution; geometry
and normalisation are the same code for both, so they cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.backbones.base import Interpolation, Preprocessing

CPU_CHUNK = 16  # images; a chunk at 224 px stays in the CPU's cache, a batch does not
MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Augment:
    """What happens to a training image, as a pure function of (seed, epoch, index).

    Args:
        shift: largest shift in each direction, as a fraction of the stored side; the border is
            filled by reflection. 4 px of CIFAR-10's 32 is 0.125, the usual padded random crop.
            Where the evaluation crops (256 to 224: a margin of 1/16), a shift of 0.0625 is
            exactly the usual random crop.
        flip: probability of a horizontal mirror image.
    """

    shift: float = 0.125
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.shift < 1:
            raise ValueError(f"data.augment.shift={self.shift}: must be in [0, 1)")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.augment.flip={self.flip}: must be in [0, 1]")

    def __call__(self, images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """(N, 3, H, W) uint8 -> the same shape, each image moved by its own draw."""
        u = uniform(seed, epoch, index, 3)
        rows = _shifted(images.shape[2], self.shift, u[:, 0])
        columns = _shifted(images.shape[3], self.shift, u[:, 1])
        mirrored = (u[:, 2] < self.flip)[:, None]
        columns = torch.where(mirrored, columns.flip(1), columns)
        n, c, h, w = images.shape
        images = images.gather(2, rows[:, None, :, None].expand(n, c, h, w))
        return images.gather(3, columns[:, None, None, :].expand(n, c, h, w))


def _shifted(size: int, fraction: float, u: Tensor) -> Tensor:
    """(N, size) source positions of an axis shifted by up to `fraction`, reflected at the ends."""
    limit = round(size * fraction)
    shift = (u * (2 * limit + 1)).long() - limit
    position = torch.arange(size, device=u.device)[None] + shift[:, None]
    return (size - 1) - ((size - 1) - position.abs()).abs()


def uniform(seed: int, epoch: int, index: Tensor, draws: int) -> Tensor:
    """(N, draws) numbers in [0, 1) that depend on nothing but (seed, epoch, index, draw).

    Counter-based (splitmix64, Steele et al. 2014): no generator state to save or to share, so the
    stream does not depend on batch composition, workers, ranks or what ran before.
    """
    key = _mix(_mix(seed & MASK64) + epoch & MASK64)
    key = key - (1 << 64) if key >> 63 else key
    counter = index.long()[:, None] * 64 + torch.arange(draws, device=index.device)[None]
    z = counter * -7046029254386353131 + key  # the golden ratio's 0x9E3779B97F4A7C15
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 40).float() / (1 << 24)


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts keep the sign; drop it


class Prepare:
    """uint8 images to what the backbone expects: resize, central crop, normalise.

    The resize is two small matrix products whose matrices are torch's own antialiased
    `interpolate` applied to the identity; the crop keeps the rows it needs.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, 3, crop_size, crop_size) float32, channels last."""
        p = self.preprocessing
        rows, columns = _axes(images.shape[2], images.shape[3], p)
        rows, columns = rows.to(images.device), columns.to(images.device)
        mean = torch.tensor(p.mean, device=images.device)[:, None, None]
        scale = 1 / (255 * torch.tensor(p.std, device=images.device))[:, None, None]
        resize = images.shape[2:] != (p.crop_size, p.crop_size) or p.resize_size != p.crop_size
        out = torch.empty(
            (len(images), 3, p.crop_size, p.crop_size),
            device=images.device,
            memory_format=torch.channels_last,
        )
        chunk = CPU_CHUNK if resize and images.device.type == "cpu" else max(len(images), 1)
        for start in range(0, len(images), chunk):
            x = (images[start : start + chunk] - 255 * mean) * scale
            out[start : start + chunk] = rows @ (x @ columns.T) if resize else x
        return out


def _axes(height: int, width: int, p: Preprocessing) -> tuple[Tensor, Tensor]:
    shorter = min(height, width)
    return (
        resize_matrix(height, int(p.resize_size * height / shorter), p.crop_size, p.interpolation),
        resize_matrix(width, int(p.resize_size * width / shorter), p.crop_size, p.interpolation),
    )


@lru_cache(maxsize=32)
def resize_matrix(size: int, resized: int, crop: int, mode: Interpolation) -> Tensor:
    """(crop, size): the central `crop` rows of the matrix that resizes an axis to `resized`."""
    if crop > resized:
        raise ValueError(f"crop of {crop} px from an image resized to {resized} px: must fit")
    identity = torch.eye(size)[None, None]
    matrix = F.interpolate(
        identity, size=(resized, size), mode=mode, antialias=True, align_corners=False
    )[0, 0]
    start = round((resized - crop) / 2)
    return matrix[start : start + crop].contiguous()
