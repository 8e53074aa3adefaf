"""Common corruptions of test images: how an accuracy holds up away from the training data.

After Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations"; generated here by torchvision from the images at their stored size. Strengths are
those of their CIFAR-10-C where torchvision does what theirs does: noise, blur, contrast and JPEG.
Their brightness adds to the value of HSV, torchvision's multiplies: its factors are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from graft.data.datasets import Batch, ImageDataset
from graft.data.order import Positions
from graft.transforms.draws import sample_seed

SEVERITIES = (1, 2, 3, 4, 5)
NOISE_SEED = 20190326  # any constant: two models are to meet the same images


def gaussian_noise(images: Tensor, index: Tensor, sigma: float) -> Tensor:
    """sigma: of grey levels in [0, 1]. One image has the same noise at all strengths."""
    noise = torch.empty(images.shape)
    generator = torch.Generator()
    for row, i in zip(noise, index.tolist(), strict=True):
        generator.manual_seed(sample_seed(NOISE_SEED, 0, i))
        torch.randn(row.shape, generator=generator, out=row)
    return _to_uint8(images + 255 * sigma * noise)


def gaussian_blur(images: Tensor, index: Tensor, sigma: float) -> Tensor:
    """sigma: in px of an image of 32 px; it grows with the side."""
    height, width = images.shape[2:]
    sigma *= width / 32
    return _to_uint8(_blur(height, sigma) @ images.float() @ _blur(width, sigma).T)


def _blur(side: int, sigma: float) -> Tensor:
    """(side, side): blurs an axis. Products with it take a 16th of a convolution's time."""
    size = 2 * math.ceil(4 * sigma) + 1
    return TF.gaussian_blur(torch.eye(side)[None], [1, size], [sigma, sigma])[0]


def contrast(images: Tensor, index: Tensor, factor: float) -> Tensor:
    """factor: of the distance from the image's mean grey."""
    return TF.adjust_contrast(images, factor)


def brightness(images: Tensor, index: Tensor, factor: float) -> Tensor:
    """factor: of all grey levels; what is brighter than white is white."""
    return TF.adjust_brightness(images, factor)


def jpeg(images: Tensor, index: Tensor, quality: float) -> Tensor:
    """Encoded and decoded; the smaller an image, the more a given quality shows."""
    # By way of PIL: torchvision's own codec, which it uses for tensors, is about to be removed.
    files = (TF.jpeg(TF.to_pil_image(image), int(quality)) for image in images)
    return torch.stack([TF.pil_to_tensor(file) for file in files])


Corruption = Callable[[Tensor, Tensor, float], Tensor]
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (brightness, (1.2, 1.4, 1.6, 1.8, 2.2)),
    "jpeg": (jpeg, (80, 65, 58, 50, 40)),
}
"""Name -> how, and with what strength at severities 1 to 5."""


def corrupt(images: Tensor, index: Tensor, name: str, severity: int) -> Tensor:
    """(N, 3, H, W) uint8 images on the CPU -> the same shape and type.

    Args:
        index: (N,) number of each image, on which its noise depends, and on nothing else.
        severity: 1 to 5.
    """
    how, strengths = CORRUPTIONS[name]
    return how(images, index, strengths[severity - 1])


class CorruptedImages(ImageDataset):
    """The images of a data set, corrupted when they are asked for."""

    def __init__(self, clean: ImageDataset, name: str, severity: int) -> None:
        self.split, self.images = clean.split, clean.images
        self.rows, self.labels = clean.rows, clean.labels
        self.name, self.severity = name, severity

    def __getitem__(self, positions: Positions) -> Batch:
        batch = super().__getitem__(positions)
        index = torch.from_numpy(self.rows[positions])
        return {**batch, "input": corrupt(batch["input"], index, self.name, self.severity)}


def _to_uint8(images: Tensor) -> Tensor:
    return images.round_().clamp_(0, 255).to(torch.uint8)
