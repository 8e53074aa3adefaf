"""Random boxes, one for each image: to crop to, or to erase. And resizing each image's own box."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from graft.transforms.preprocessing import Interpolation

ATTEMPTS = 10
BOX_DRAWS = 2 * ATTEMPTS + 2


def random_boxes(
    u: Tensor, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> Tensor:
    """(N, 4) whole numbers: top, left, height, width of a box inside of (height, width).

    The distribution of torchvision's `RandomResizedCrop`: the area is uniform in `scale`, the
    logarithm of width / height in `ratio`; the first of ten attempts that fits is taken, or else
    the largest central box whose ratio is allowed.

    Args:
        u: (N, BOX_DRAWS) uniform draws.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, :ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * u[:, ATTEMPTS : 2 * ATTEMPTS])
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    allowed = min(max(width / height, ratio[0]), ratio[1])
    w = torch.where(found, w.gather(1, first)[:, 0], min(width, round(height * allowed)))
    h = torch.where(found, h.gather(1, first)[:, 0], min(height, round(width / allowed)))
    top = torch.where(found, (u[:, -2] * (height - h + 1)).long(), (height - h) // 2)
    left = torch.where(found, (u[:, -1] * (width - w + 1)).long(), (width - w) // 2)
    return torch.stack([top, left, h, w], dim=1)


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """(N, 3, height, width) bool, channels last: which pixels lie in each image's box.

    With all three channels, in the layout of the images: a mask that has to be broadcast over
    the innermost axis takes twice as long to apply.
    """
    rows = torch.arange(height, device=boxes.device)[None]
    columns = torch.arange(width, device=boxes.device)[None]
    top, left, h, w = boxes[:, :, None].unbind(1)
    vertical = (rows >= top) & (rows < top + h)
    horizontal = ((columns >= left) & (columns < left + w)).repeat_interleave(3, dim=1)
    mask = vertical[:, :, None] & horizontal[:, None, :]
    return mask.view(-1, height, width, 3).permute(0, 3, 1, 2)


def box_matrices(
    start: Tensor, length: Tensor, size: int, resized: int, mode: Interpolation
) -> Tensor:
    """(N, resized, size): resizes each image's `length` px from `start` on, along one axis.

    The weights of torch's antialiased `interpolate` on the cropped box, computed for all boxes
    at once: a filter as wide as an output pixel where that is larger than an input pixel.
    """
    start, scale = start.float()[:, None, None], length.float()[:, None, None] / resized
    centre = start + scale * (torch.arange(resized, device=start.device) + 0.5)[None, :, None]
    pixel = (torch.arange(size, device=start.device) + 0.5)[None, None]
    x = ((pixel - centre) / scale.clamp(min=1)).abs()
    weights = kernel(x, mode)
    weights = weights * ((pixel > start) & (pixel < start + scale * resized))
    return weights / weights.sum(2, keepdim=True)


def kernel(x: Tensor, mode: Interpolation) -> Tensor:
    """Weights at distances of 0 and more: a triangle, or Keys' kernel at a = -0.5, the one torch
    and Pillow use when they antialias.
    """
    if mode == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
