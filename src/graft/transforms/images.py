"""Images as inputs of a model: augmentation of a whole uint8 batch on its device.

Training differs from evaluation by what `Augment` does; geometry and normalisation are the same
code for both, so they cannot drift apart.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graft.transforms.boxes import BOX_DRAWS, inside, random_boxes
from graft.transforms.color import COLOR_DRAWS, recolored
from graft.transforms.draws import COLOR, CROP, ERASE, MOVE, uniform
from graft.transforms.inputs import Inputs, Views, drawn_view, views_count
from graft.transforms.mixing import mix
from graft.transforms.prepare import Prepare
from graft.transforms.preprocessing import Preprocessing, stored_form

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
        color: strength of random brightness, contrast, saturation and hue: see `recolored`.
        grayscale: probability that the colours go.
        erase: probability that a box of 2 to 33 % of the area becomes the mean colour.
        mixup, cutmix: alpha of each; 0 is off.
    """

    shift: float = 0.125
    flip: float = 0.5
    scale: Sequence[float] | None = None
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    color: float = 0.0
    grayscale: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.shift < 1:
            raise ValueError(f"data.augment.shift={self.shift}: must be in [0, 1)")
        for name in ("flip", "color", "grayscale", "erase"):
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
        if self.color or self.grayscale:
            u = uniform(seed, epoch, index, COLOR_DRAWS, first=COLOR)
            images = recolored(images, u, self.color, self.grayscale)
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


class ImageInputs(Inputs):
    """uint8 images (N, 3, H, W) -> normalised ones (N, 3, crop_size, crop_size).

    Args:
        preprocessing: the backbone's; `image_size`, `resize_size` override it.
        image_size: side in px of the images the backbone gets. None takes the weights' own resize
            and crop; a number resizes the whole image to it, without a crop.
        resize_size: shorter side before the central crop, if other than `image_size`.
        augment: of training images; stages may change it.
        sample_transform: of single training images, in the workers; see `SampleTransformed`.
    """

    takes = Preprocessing
    preprocessing: Preprocessing
    prepare: Prepare
    unit = "px"

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        image_size: int | None = None,
        resize_size: int | None = None,
        augment: Augment | None = None,
        sample_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.preprocessing = preprocessing.at(image_size, resize_size)
        self.prepare = Prepare(self.preprocessing)
        self.size = self.preprocessing.crop_size
        self.augmentation = self.stage_augmentation = augment
        self.sample_transform = sample_transform
        self.views: Views = "none"

    @property
    def crops(self) -> bool:
        """Whether training images are random crops, of what is stored of them."""
        return self.stage_augmentation is not None and self.stage_augmentation.scale is not None

    @property
    def augments(self) -> bool:
        return self.stage_augmentation is not None or self.sample_transform is not None

    def of_stage(
        self,
        *,
        augment: bool | Mapping[str, Any] = True,
        size: int | None = None,
        views: Views = "none",
    ) -> Self:
        stage = copy.copy(self)
        stage.preprocessing = self.preprocessing.at(size)
        stage.prepare = Prepare(stage.preprocessing)
        stage.size = stage.preprocessing.crop_size
        stage.views = views
        if augment is False:
            stage.sample_transform = None
        if isinstance(augment, Mapping):
            stage.stage_augmentation = replace(self.augmentation or Augment(), **augment)
        elif not augment:
            stage.stage_augmentation = None
        return stage

    def example(self, count: int) -> Tensor:
        side = self.preprocessing.resize_size
        return torch.zeros(count, 3, side, side, dtype=torch.uint8)

    def describe(self) -> str:
        p = self.preprocessing
        crop = f" of {p.resize_size}" if p.resize_size != p.crop_size else ""
        origin = p.origin or "with mean " + " ".join(f"{v:g}" for v in p.mean)
        return f"{self.size} x {self.size} px{crop}, {p.interpolation}, normalised {origin}"

    def to_store(self, sizes: Sequence[int]) -> Preprocessing:
        return stored_form(self.preprocessing, sizes)

    def augment(
        self, batch: dict[str, Tensor], num_classes: int, *, seed: int, epoch: int
    ) -> dict[str, Tensor]:
        images, index = batch["input"], batch["index"]
        if (count := views_count(self.views)) > 1:
            view = drawn_view(count, index, seed=seed, epoch=epoch)
            return {**batch, "input": self.viewed(images, index, view, self.views)}
        if self.stage_augmentation is None:
            return {**batch, "input": self.prepare(images)}
        return self.stage_augmentation.batch(
            batch, self.prepare, num_classes, seed=seed, epoch=epoch
        )

    def viewed(self, rows: Tensor, index: Tensor, view: Tensor, views: Views) -> Tensor:
        if views == "flip":
            rows = torch.where((view == 1)[:, None, None, None], rows.flip(3), rows)
        elif isinstance(views, int) and self.augmentation is not None:
            # Not mixed: a view is of one image.
            augmentation = replace(self.augmentation, mixup=0.0, cutmix=0.0)
            drawn = {"input": rows, "index": index * views + view}
            return augmentation.batch(drawn, self.prepare, 0, seed=0, epoch=0)["input"]
        return self.prepare(rows)

    def key(self, views: Views) -> dict[str, Any]:
        parts = (Augment, Prepare, random_boxes, recolored, uniform)
        code = [sys.modules[part.__module__] for part in parts]
        drawn = self.augmentation if isinstance(views, int) else None
        return {"transform": self.preprocessing, "views": (views, drawn), "code": code}

    def problem(self, rows: NDArray[Any]) -> str | None:
        shape = rows.shape
        if len(shape) != 4 or shape[1] != 3 or 0 in shape:
            hint = ""
            if len(shape) == 4 and shape[3] == 3:
                hint = ": channels come first, images.transpose(0, 3, 1, 2)"
            elif len(shape) == 3:
                hint = ": repeat a grey channel, images[:, None].repeat(3, axis=1)"
            elif len(shape) == 4 and shape[1] == 1:
                hint = ": repeat a grey channel, images.repeat(3, axis=1)"
            elif len(shape) == 4 and shape[1] > 3:
                hint = ": choose three channels, images[:, :3]"
            return f"images must be (N, 3, height, width) and not empty, not {shape}{hint}"
        if rows.dtype != np.uint8:
            hint = ": for 0..1, (images * 255).round().astype(np.uint8)" * (rows.dtype.kind == "f")
            return f"images must be uint8 from 0 to 255, not {rows.dtype}{hint}"
        return None
