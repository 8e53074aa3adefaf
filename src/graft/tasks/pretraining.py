"""Self-supervised pretraining of a backbone, and what restores images: a decoder and its losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.data.datasets import Batch
from graft.models.backbone import Backbone, blank_image, pool_nhwc
from graft.tasks.base import Model, Tally, Task


def require_outputs(task: Task, run: Path) -> None:
    """Raises a ValueError for a run that has an encoder alone."""
    if task.pretrains:
        raise ValueError(
            f"{run}: a pretrained encoder, which predicts nothing: give it to a next run by "
            f"backbone.weights={run}, or export it by graft export {run} --backbone FILE"
        )


class Pretraining(Task):
    """A task without labels: its loss is all it measures.

    Args:
        probe: every so many epochs, a ridge on features of a few labelled images is fitted and
            scored on validation images: a curve, val/probe_acc; 0: never. No weight depends on it.
    """

    pretrains = True

    def __init__(self, *, monitor: str = "val/loss", mode: str = "min", probe: int = 5) -> None:
        super().__init__(monitor=monitor, mode=mode)
        self.probe = probe

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": sums["loss"] / sums["images"]}


def spatial_map(backbone: Backbone, images: Tensor) -> Tensor:
    """(N, C, h, w), the last output before pooling. Tokens (N, T, C) become a square, without the
    class token and what else comes before those of the patches.
    """
    maps = backbone.maps(images)
    if maps.ndim == 3:
        side = isqrt(maps.shape[1])
        return maps[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
    return maps.permute(0, 3, 1, 2) if backbone.pool is pool_nhwc else maps


class Decoder(nn.Sequential):
    """(N, C, h, w) -> (N, 3, stride h, stride w): a small convolution, and a linear layer that
    gives each place of the map its square of pixels, as in SimMIM (Xie et al. 2022).

    Args:
        width: of the convolution; 0 leaves it out.
    """

    def __init__(self, channels: int, stride: int, width: int) -> None:
        first = [nn.Conv2d(channels, width, 3, padding=1), nn.GELU()] if width else []
        last = nn.Conv2d(width or channels, 3 * stride**2, 1)
        super().__init__(*first, last, nn.PixelShuffle(stride))


class Restoring(Pretraining):
    """Images from corrupted ones, by a decoder on the last map of the encoder. What is corrupted,
    and how, is a pure function of (seed, epoch, index); in validation it is always the same.

    Args:
        decoder_width: see `Decoder`.
    """

    def __init__(
        self,
        *,
        monitor: str = "val/loss",
        mode: str = "min",
        probe: int = 5,
        decoder_width: int = 128,
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, probe=probe)
        self.width = decoder_width

    def build(self, num_outputs: int, backbone: Backbone) -> None:
        side, training = backbone.preprocessing.crop_size, backbone.training
        with torch.no_grad():
            _, channels, height, _ = spatial_map(backbone.eval(), blank_image(side)).shape
        backbone.train(training)
        if extra := _after_the_map(backbone, side):
            raise ValueError(
                f"task: block {extra} of this backbone comes after its last map and has weights, "
                "which no pixel would train: use task=barlow, or another backbone"
            )
        self.stride = round(side / height)
        self.decoder = Decoder(channels, self.stride, self.width)

    @abstractmethod
    def corrupted(self, images: Tensor, seed: int, epoch: int, index: Tensor) -> tuple[Tensor, ...]:
        """The images as the encoder gets them, and what else `losses` takes."""

    @abstractmethod
    def losses(self, restored: Tensor, images: Tensor, *more: Tensor) -> Tensor:
        """(N,) losses of restored images."""

    def shown(self, restored: Tensor, images: Tensor, *more: Tensor) -> Tensor:
        """Restored images to look at."""
        return restored

    def restored(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Restored images (N, 3, H, W), corrupted ones, and what else `losses` takes.

        Raises:
            ValueError: the images have a size that the encoder's stride does not divide.
        """
        images = batch["input"]
        seed, epoch = batch["draw"].tolist() if "draw" in batch else (0, 0)
        seen, *more = self.corrupted(images, seed, epoch, batch["index"])
        restored = self.decoder(spatial_map(model.backbone, seen)).float()
        if restored.shape != images.shape:
            raise ValueError(
                f"data.image_size={images.shape[2]}: the decoder gives {restored.shape[2]} px: use "
                f"a multiple of {self.stride}, the stride of this backbone"
            )
        return restored, seen, tuple(more)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        restored, _, more = self.restored(model, batch)
        return self.losses(restored, batch["input"], *more).mean()

    def evaluate(self, model: Model, batch: Batch, tally: Tally) -> Tensor:
        restored, _, more = self.restored(model, batch)
        losses = self.losses(restored, batch["input"], *more)
        tally.add(loss=losses.sum(dtype=torch.float64), images=len(losses))
        return restored

    def pictures(self, model: Model, batch: Batch) -> Tensor:
        """(N, 3, 3, H, W): each image as it is, corrupted and restored."""
        restored, seen, more = self.restored(model, batch)
        images = batch["input"]
        return torch.stack([images, seen, self.shown(restored, images, *more)], 1)


@torch.no_grad()
def _after_the_map(backbone: Backbone, side: int) -> str:
    """The first block with weights above the last map; "" where there is none."""
    state: Any = blank_image(side)
    names: list[str] = []
    training = backbone.training
    backbone.eval()
    for name, block in backbone.blocks.named_children():
        state = block(state)
        tensor = state[0] if isinstance(state, tuple) else state
        names = [] if tensor.ndim > 2 else [*names, name]
    backbone.train(training)
    # The block that pools gives no map, and may have weights below its pooling.
    return next((name for name in names[1:] if name in backbone.learnable_blocks), "")
