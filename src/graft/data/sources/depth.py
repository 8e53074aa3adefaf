"""Images of more than 8 bits a channel: their values, and which of them are black and white.

A 16-bit file may use 8, 10, 12 or all of its bits, a float file any range: nothing in it says
which. One range serves a whole data set, so that an image means the same wherever it is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Range = tuple[float, float]  # the values shown as black and as white

# Pillow reads the high bytes of 16-bit colours alone. Taken for the other byte order, the same
# data gives their low bytes. TIFF: N, the machine's own order, is little-endian wherever we run.
LOW_BYTES = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B"))
}
BITS = (8, 10, 12, 14, 16)


class RangeUnknownError(Exception):
    """An image of more than 8 bits came before the range of its data set was known."""


def is_deep(image: Image.Image) -> bool:
    """Whether a file that is opened, and not loaded yet, has more than 8 bits a channel."""
    return image.mode[0] in "IF" or has_low_bytes(image)


def has_low_bytes(image: Image.Image) -> bool:
    """Whether loading would drop the low bytes of 16-bit colours."""
    return image.mode[0] == "R" and any(_raw_mode(tile) in LOW_BYTES for tile in _tiles(image))


def take_low_bytes(image: Image.Image) -> None:
    """Let a file that is opened load the low bytes of its 16-bit colours."""
    image.tile = [  # type: ignore[attr-defined]
        tile._replace(args=_with_raw_mode(tile.args, LOW_BYTES[_raw_mode(tile)]))
        for tile in _tiles(image)
    ]


def to_8_bits(values: NDArray[Any], limits: Range) -> NDArray[np.uint8]:
    """Values from black to white as 0 to 255, rounded; what lies outside is clipped, NaN black."""
    result = np.empty(values.shape, np.uint8)
    for row, stored in zip(values, result, strict=True):  # an image of doubles would be large
        stored[:] = np.rint(np.interp(np.nan_to_num(row, nan=limits[0]), limits, (0, 255)))
    return result


@dataclass(frozen=True)
class Extremes:
    """The smallest and largest finite value of deep images, and whether they are floats."""

    least: float
    most: float
    floats: bool

    @classmethod
    def of(cls, values: NDArray[Any]) -> Extremes | None:
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        if finite.size == 0:
            return None
        return cls(float(finite.min()), float(finite.max()), values.dtype.kind == "f")


def range_of(extremes: Iterable[Extremes], root: Path) -> Range | None:
    """The range that a data set's values need; None without deep images.

    Whole numbers go from 0 to the largest of the fewest bits (8, 10, 12, 14, 16) that hold them
    all, floats from 0 to 1 if they fit; anything else from its smallest to its largest value.
    """
    found = list(extremes)
    if not found:
        return None
    if len({one.floats for one in found}) > 1:
        raise ValueError(
            f"{root}: holds images of floats and of whole numbers with more than 8 bits; say which "
            "values are black and white: data.source.value_range=[0,4095]"
        )
    least, most = min(one.least for one in found), max(one.most for one in found)
    whites = (1.0,) if found[0].floats else ()
    for white in (*whites, *(2.0**bits - 1 for bits in BITS)):
        if least >= 0 and most <= white:
            return 0.0, white
    return least, max(most, least + 1)


def _tiles(image: Image.Image) -> list[Any]:
    return getattr(image, "tile", [])


def _raw_mode(tile: Any) -> str:
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def _with_raw_mode(args: Any, mode: str) -> Any:
    return (mode, *args[1:]) if isinstance(args, tuple) else mode
