"""Masked image modelling: masked patches from the ones that are left (He et al. 2022, MAE).

As in SimMIM (Xie et al. 2022) the encoder sees whole images, with a token in place of what is
masked, so that it may be a convolutional network: the token is a colour that is learnt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.models.backbone import Backbone
from graft.tasks.pretraining import Restoring
from graft.transforms.draws import uniform_many


class Masked(Restoring):
    """The loss is the mean squared error of the pixels of masked patches, of which each is scaled
    to zero mean and unit variance.

    Args:
        patch: side of a patch in px.
        ratio: part of the patches that is masked, of every image equally many.
        normalise: whether a patch is scaled; or else the target is the normalised image.
    """

    def __init__(
        self,
        *,
        monitor: str = "val/loss",
        mode: str = "min",
        probe: int = 5,
        decoder_width: int = 128,
        patch: int = 4,
        ratio: float = 0.6,
        normalise: bool = True,
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, probe=probe, decoder_width=decoder_width)
        self.patch, self.ratio, self.normalise = patch, ratio, normalise

    def build(self, num_outputs: int, backbone: Backbone) -> None:
        super().build(num_outputs, backbone)
        self.token = nn.Parameter(torch.zeros(3, 1, 1))

    def corrupted(self, images: Tensor, seed: int, epoch: int, index: Tensor) -> tuple[Tensor, ...]:
        height, width = images.shape[2:]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"task.patch={self.patch} does not divide images of {height} x {width} px"
            )
        rows, columns = height // self.patch, width // self.patch
        masked = round(self.ratio * rows * columns)
        if not 0 < masked < rows * columns:
            raise ValueError(
                f"task.ratio={self.ratio} masks {masked} of the {rows * columns} patches of an "
                "image: some must be masked and some left"
            )
        order = uniform_many(seed, epoch, index, rows * columns).argsort(dim=1, stable=True)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :masked], True)
        pixels = mask.view(-1, 1, rows, columns)
        pixels = pixels.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        return torch.where(pixels, self.token.to(images.dtype), images), mask

    def losses(self, restored: Tensor, images: Tensor, *more: Tensor) -> Tensor:
        (mask,) = more
        target = self._patches(images.float())
        if self.normalise:
            mean, spread = _moments(target)
            target = (target - mean) / spread
        errors = (self._patches(restored) - target).square().mean(2)
        return (errors * mask).sum(1) / mask.sum(1)

    def shown(self, restored: Tensor, images: Tensor, *more: Tensor) -> Tensor:
        """What is visible, and in masked patches what is restored, in the scale of the patch."""
        (mask,), target, found = more, self._patches(images), self._patches(restored)
        if self.normalise:
            mean, spread = _moments(target)
            found = found * spread + mean
        whole = torch.where(mask[..., None], found, target).transpose(1, 2)
        return F.fold(whole, images.shape[2:], self.patch, stride=self.patch)

    def _patches(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, patches, pixels)."""
        return F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(patches, 2, keepdim=True)
    return mean, (variance + 1e-6).sqrt()
