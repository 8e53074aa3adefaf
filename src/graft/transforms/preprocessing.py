"""How a backbone's weights expect their images: sizes, crop, interpolation, normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, Literal, get_args

Interpolation = Literal["bilinear", "bicubic"]
CropMode = Literal["center", "squash"]


@dataclass(frozen=True)
class Preprocessing:
    """How the weights expect their images: taken from the weights' own metadata.

    The shorter side is resized to `resize_size` px (with `crop_mode="squash"` both sides, whatever
    the shape), the central `crop_size` px square is kept, values in [0, 1] are normalised per
    channel. Sizes are rounded as torchvision and timm round them.

    Args:
        origin: who says so, for the start-up summary: "as ... expects".
    """

    resize_size: int
    crop_size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bilinear"
    crop_mode: CropMode = "center"
    origin: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        for key in ("resize_size", "crop_size"):
            side = getattr(self, key)
            if not isinstance(side, int) or isinstance(side, bool) or side < 1:
                raise ValueError(f"{key}={side}: must be a whole number above 0")
        for key, lowest in (("mean", -float("inf")), ("std", 0.0)):
            values = getattr(self, key)
            numbers = isinstance(values, list | tuple) and [v for v in values if is_number(v)]
            if not numbers or len(numbers) != 3 or len(values) != 3 or min(numbers) <= lowest:
                raise ValueError(f"{key}={values}: must be three numbers, of values from 0 to 1")
            object.__setattr__(self, key, tuple(float(v) for v in numbers))
        for key, known in (("interpolation", Interpolation), ("crop_mode", CropMode)):
            if getattr(self, key) not in get_args(known):
                names = ", ".join(get_args(known))
                raise ValueError(f"{key}={getattr(self, key)}: must be one of {names}")

    def with_own(self, values: Mapping[str, Any]) -> Preprocessing:
        """With those of `backbone.preprocessing` that are not null in place of these.

        Raises:
            ValueError: an impossible one.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"backbone.preprocessing={values}: must be sizes, mean, std, ...")
        own = {key: value for key, value in values.items() if value is not None}
        if {"mean", "std"} & own.keys():
            own["origin"] = "as backbone.preprocessing says"
        try:
            changed = replace(self, **own)
        except (TypeError, ValueError) as error:
            raise ValueError(f"backbone.preprocessing: {error}") from error
        if changed.resize_size < changed.crop_size:
            raise ValueError(
                f"backbone.preprocessing: resize_size={changed.resize_size} is smaller than "
                f"crop_size={changed.crop_size}"
            )
        return changed

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image after its resize."""
        if self.crop_mode == "squash":
            return self.resize_size, self.resize_size
        shorter = min(height, width)
        return self.resize_size * height // shorter, self.resize_size * width // shorter

    def crop_start(self, side: int) -> int:
        """Where the central crop of a resized side begins."""
        return round((side - self.crop_size) / 2)

    def at(self, crop_size: int | None, resize_size: int | None = None) -> Preprocessing:
        """The same at other sizes: `crop_size` alone resizes the whole image; None is its own.

        Raises:
            ValueError: the crop is larger than what it is taken from.
        """
        if crop_size is None and resize_size is None:
            return self
        crop = crop_size or self.crop_size
        resize = resize_size or crop
        if resize < crop:
            raise ValueError(f"data.resize_size={resize} is smaller than the image ({crop} px)")
        return replace(self, crop_size=crop, resize_size=resize)


def stored_form(own: Preprocessing, sizes: Sequence[int]) -> Preprocessing:
    """How images are resized to be stored: stages with sizes of their own resize what is stored, so
    that is the largest.
    """
    return max((own, *map(own.at, sizes)), key=lambda form: form.resize_size)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
