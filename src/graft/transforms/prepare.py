"""Resize, crop and normalisation of a whole uint8 batch on its device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.transforms.boxes import box_matrices
from graft.transforms.preprocessing import Interpolation, Preprocessing

CPU_CHUNK = 150_000  # px, input or output: a chunk stays in a core's cache, a batch does not
SMALL = 64  # px: up to here dense matrices beat `interpolate`, which skips their zeros, on a CPU


class Prepare(nn.Module):
    """uint8 images to what the backbone expects: resize, central crop, normalise.

    The resize is torch's antialiased `interpolate` of bytes, which gives what Pillow gives to a
    grey level, or two small matrix products where these are faster: their matrices are
    `interpolate` applied to the identity.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
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
