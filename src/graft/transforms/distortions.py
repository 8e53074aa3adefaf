"""What the corruptions of `graft.transforms.corruptions` do to images, one function each.

(N, 3, H, W) images in [0, 1] and the number of each, from which alone comes what is random in it ->
images of the same shape, not yet clamped. Lengths are in px of a 32 px image, and grow with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from graft.transforms.draws import sample_seed

SEED = 20190326  # any constant: two models are to meet the same images


def as_bytes(x: Tensor) -> Tensor:
    # Down, as theirs; what a float lacks of a whole grey level is rounding.
    return (255 * x + 1e-3).clamp(0, 255).to(torch.uint8)


def _draw(index: Tensor, *shape: int, normal: bool = False) -> Tensor:
    """(N, *shape), uniform in [0, 1) or normal; each row by the image's number alone."""
    out = torch.empty(len(index), *shape)
    generator = torch.Generator()
    for row, i in zip(out, index.tolist(), strict=True):
        generator.manual_seed(sample_seed(SEED, 0, i))
        (row.normal_ if normal else row.uniform_)(generator=generator)
    return out


# ---------------------------------------------------------------- noise
def gaussian_noise(x: Tensor, index: Tensor, sigma: float) -> Tensor:
    return x + sigma * _draw(index, *x.shape[1:], normal=True)


def shot_noise(x: Tensor, index: Tensor, photons: float) -> Tensor:
    """photons: that make a pixel white."""
    out = torch.empty_like(x)
    generator = torch.Generator()
    for row, image, i in zip(out, x, index.tolist(), strict=True):
        generator.manual_seed(sample_seed(SEED, 0, i))
        row.copy_(torch.poisson(image * photons, generator))
    return out / photons


def impulse_noise(x: Tensor, index: Tensor, amount: float) -> Tensor:
    """Salt and pepper, in each channel by itself."""
    hit, salt = _draw(index, 2, *x.shape[1:]).unbind(1)
    return torch.where(hit < amount, (salt < 0.5).float(), x)


# ---------------------------------------------------------------- blur
def defocus_blur(x: Tensor, index: Tensor, radius: float, smoothing: float) -> Tensor:
    """A disk of equal weights, its edge smoothed by a Gaussian."""
    scale = x.shape[3] / 32
    reach = max(8, math.ceil(radius * scale) + 1)
    grid = torch.arange(-reach, reach + 1.0)
    disk = (grid[:, None] ** 2 + grid**2 <= (radius * scale) ** 2).float()
    edge = torch.exp(-(torch.arange(-1.0, 2.0) ** 2) / (2 * smoothing**2))
    edge = (edge[:, None] * edge)[None, None] / edge.sum() ** 2
    kernel = F.conv2d(disk[None, None] / disk.sum(), edge, padding=1)
    beyond = "reflect" if min(x.shape[2:]) > reach else "replicate"
    padded = F.pad(x.flatten(0, 1)[:, None], [reach] * 4, mode=beyond)
    return F.conv2d(padded, kernel).view_as(x)


def glass_blur(x: Tensor, index: Tensor, sigma: float, delta: int, times: int) -> Tensor:
    """Pixels take the place of their neighbours up and to the left, between two blurs."""
    height, width = x.shape[2:]
    delta = max(1, round(delta * width / 32))
    x = as_bytes(_blurred(x, sigma * width / 32)).float() / 255
    # Theirs swaps by way of views of one array, by which the second half of a swap does nothing.
    moves = (_draw(index, times, 2, height, width) * 2 * delta).long() - delta
    inner = torch.zeros(height, width, dtype=torch.bool)
    inner[delta + 1 : height - delta + 1, delta + 1 : width - delta + 1] = True
    moves = torch.where(inner, moves, 0)
    for move in moves.unbind(1):
        rows = torch.arange(height)[:, None] + move[:, 0]
        columns = torch.arange(width) + move[:, 1]
        x = _pixels(x, rows, columns)
    return _blurred(x, sigma * width / 32)


def motion_blur(x: Tensor, index: Tensor, radius: float, sigma: float) -> Tensor:
    return _moved(x, _draw(index, 1)[:, 0] * 90 - 45, radius, sigma)


def _moved(x: Tensor, degrees: Tensor, radius: float, sigma: float) -> Tensor:
    """Half a Gaussian along a line, as ImageMagick draws motion."""
    height, width = x.shape[2:]
    steps = torch.arange(2.0 * math.ceil(radius * width / 32) + 1)
    weights = torch.exp(-(steps**2) / (2 * (sigma * width / 32) ** 2))
    angle = torch.deg2rad(degrees)
    out = torch.zeros_like(x)
    for step, weight in zip(steps.tolist(), (weights / weights.sum()).tolist(), strict=True):
        down, right = ((step * part(angle) - 0.5).ceil().long() for part in (torch.sin, torch.cos))
        rows = (torch.arange(height) + down[:, None]).clamp(0, height - 1)
        columns = (torch.arange(width) + right[:, None]).clamp(0, width - 1)
        shape = (len(x), height, width)
        out += weight * _pixels(x, rows[:, :, None].expand(shape), columns[:, None].expand(shape))
    return out


def zoom_blur(x: Tensor, index: Tensor, most: float) -> Tensor:
    """The mean of the image and of its middle, ever larger, in steps of 1 %."""
    factors = np.arange(1, most, 0.01)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _zoomed(x: Tensor, factor: float) -> Tensor:
    """The middle of each image, enlarged to its size."""
    height, width = x.shape[2:]
    rows, columns = (math.ceil(side / factor) for side in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = x[:, :, top : top + rows, left : left + columns]
    size = (round(rows * factor), round(columns * factor))
    large = F.interpolate(middle, size=size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, :, top : top + height, left : left + width]


# ---------------------------------------------------------------- weather
def snow(
    x: Tensor,
    index: Tensor,
    mean: float,
    spread: float,
    zoom: float,
    threshold: float,
    radius: float,
    sigma: float,
    kept: float,
) -> Tensor:
    flakes = mean + spread * _draw(index, 1, *x.shape[2:], normal=True)
    flakes = _zoomed(flakes, zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = _moved(flakes, -135 + 90 * _draw(index, 1)[:, 0], radius, sigma)
    grey = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    pale = torch.maximum(x, 1.5 * grey + 0.5)
    return kept * x + (1 - kept) * pale + flakes + flakes.rot90(2, (2, 3))


def frost(x: Tensor, index: Tensor, kept: float, ice: float) -> Tensor:
    """Ridges of a fractal, pale blue, in place of the published photographs of ice."""
    ridges = 1 - (2 * _fractal(index, x.shape[2:], 1.7) - 1).abs()
    colour = torch.tensor([0.82, 0.92, 1.0])[:, None, None]
    return kept * x + ice * (0.35 + 0.65 * ridges[:, None] ** 2) * colour


def fog(x: Tensor, index: Tensor, thickness: float, decay: float) -> Tensor:
    brightest = x.amax((1, 2, 3), keepdim=True)
    veil = thickness * _fractal(index, x.shape[2:], decay)[:, None]
    return (x + veil) * brightest / (brightest + thickness)


def _fractal(index: Tensor, sides: Sequence[int], decay: float) -> Tensor:
    """(N, *sides) heights in [0, 1] by the diamond-square algorithm, which repeats at its
    edges: the larger `decay`, the smoother.
    """
    size = max(2, 1 << (max(sides) - 1).bit_length())
    u = 2 * _draw(index, 2, size, size) - 1  # of each point that is set, the square's or diamond's
    heights = torch.zeros(len(index), size, size)
    step, wobble = size, 100.0
    while step >= 2:
        half = step // 2
        even, odd = slice(0, size, step), slice(half, size, step)

        def mean(total: Tensor, rows: slice, columns: slice, wobble: float = wobble) -> Tensor:
            return total / 4 + wobble * wobble * u[:, 0, rows, columns]

        corners = heights[:, even, even]
        total = corners + corners.roll(-1, 1)
        heights[:, odd, odd] = mean(total + total.roll(-1, 2), odd, odd)
        centres = heights[:, odd, odd]
        across = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        heights[:, even, odd] = mean(across, even, odd)
        down = centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        heights[:, odd, even] = mean(down, odd, even)
        step, wobble = half, wobble / decay
    heights -= heights.amin((1, 2), keepdim=True)
    return (heights / heights.amax((1, 2), keepdim=True))[:, : sides[0], : sides[1]]


# ---------------------------------------------------------------- light, shape, storage
def brightness(x: Tensor, index: Tensor, added: float) -> Tensor:
    """Added to the value of HSV: colours keep their hue and saturation."""
    value = x.amax(1, keepdim=True)
    brighter = (value + added).clamp(0, 1)
    return torch.where(value > 0, x * brighter / value.clamp_min(1e-9), brighter)


def contrast(x: Tensor, index: Tensor, kept: float) -> Tensor:
    """Of each channel's distance from its mean."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * kept + mean


def elastic_transform(
    x: Tensor, index: Tensor, strength: float, smooth: float, bend: float
) -> Tensor:
    """A random affine map, then random displacements; all lengths in sides of the image."""
    n, _, height, width = x.shape
    u = 2 * _draw(index, 6 + 2 * height * width) - 1
    middle, third = width // 2, width // 3
    points = torch.tensor([[third, third], [third, -third], [-third, -third]]) + middle
    moved = points + bend * width * u[:, :6].view(n, 3, 2)
    ones = torch.ones(n, 3, 1)
    affine = torch.linalg.solve(torch.cat([moved, ones], 2), points.expand(n, 3, 2).float())
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack([columns, rows, torch.ones_like(rows)], -1).float() @ affine[:, None]
    x = _sampled(x, at, "reflection")
    shift = u[:, 6:].view(n, 2, height, width)
    shift = strength * width * _blurred(shift, smooth * width, truncate=3)
    at = torch.stack([columns + shift[:, 0], rows + shift[:, 1]], -1)
    return _sampled(x, at, "border")


def pixelate(x: Tensor, index: Tensor, scale: float) -> Tensor:
    def coarse(image: Image.Image) -> Image.Image:
        small = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        box = Image.Resampling.BOX
        return image.resize(small, box).resize(image.size, box)

    return _by_pillow(x, coarse)


def jpeg_compression(x: Tensor, index: Tensor, quality: int) -> Tensor:
    # By way of Pillow: torchvision's own codec, for tensors, is about to be removed.
    return _by_pillow(x, lambda image: TF.jpeg(image, quality))


def _by_pillow(x: Tensor, how: Callable[[Image.Image], Image.Image]) -> Tensor:
    images = (how(TF.to_pil_image(image)) for image in as_bytes(x))
    return torch.stack([TF.pil_to_tensor(image) for image in images]).float() / 255


# ---------------------------------------------------------------- helpers
def _blurred(x: Tensor, sigma: float, truncate: int = 4) -> Tensor:
    """Gaussian; beyond its edge an image goes on as its last pixel is."""
    if sigma == 0:
        return x
    reach = int(truncate * sigma + 0.5)
    weights = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    weights /= weights.sum()

    def matrix(side: int) -> Tensor:
        columns = (torch.arange(side)[:, None] + torch.arange(-reach, reach + 1)).clamp(0, side - 1)
        return torch.zeros(side, side).scatter_add_(1, columns, weights.expand(side, -1))

    return matrix(x.shape[2]) @ x @ matrix(x.shape[3]).T


def _pixels(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of each image, the pixels at (N, H, W) rows and columns."""
    at = (rows * x.shape[3] + columns).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, at).view_as(x)


def _sampled(x: Tensor, at: Tensor, beyond: str) -> Tensor:
    """Bilinear, at (N, H, W, 2) columns and rows in px."""
    size = torch.tensor([x.shape[3] - 1, x.shape[2] - 1])
    grid = 2 * at / size - 1
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=beyond, align_corners=True)
