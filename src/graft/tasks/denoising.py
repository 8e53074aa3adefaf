"""Denoising autoencoder (Vincent et al. 2008): images from noisy ones."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from graft.tasks.pretraining import Restoring
from graft.transforms.draws import normal


class Denoising(Restoring):
    """The loss is the mean over pixels of ||x - DAE(x~)||^2, of normalised images.

    Args:
        noise: standard deviation of the Gaussian noise, in those of normalised images.
        blur: standard deviation in px of a Gaussian blur before the noise; 0: none.
    """

    def __init__(
        self,
        *,
        monitor: str = "val/loss",
        mode: str = "min",
        probe: int = 5,
        decoder_width: int = 128,
        noise: float = 1.0,
        blur: float = 0.0,
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, probe=probe, decoder_width=decoder_width)
        if not (noise > 0 or blur > 0):
            raise ValueError("task.noise=0 and task.blur=0: nothing would be left to restore")
        self.noise, self.blur = noise, blur

    def corrupted(self, images: Tensor, seed: int, epoch: int, index: Tensor) -> tuple[Tensor, ...]:
        seen = images
        if self.blur:
            side = 2 * math.ceil(3 * self.blur) + 1
            seen = gaussian_blur(seen, [side, side], [self.blur, self.blur])
        noise = normal(seed, epoch, index, images[0].numel()).view_as(images)
        return (seen + self.noise * noise.to(images.dtype),)

    def losses(self, restored: Tensor, images: Tensor, *more: Tensor) -> Tensor:
        return F.mse_loss(restored, images.float(), reduction="none").mean((1, 2, 3))
