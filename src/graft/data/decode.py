"""Image files -> uint8 arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class MixedSizesError(Exception):
    """An image differs from the size that all were expected to share."""


def decode(path: Path, side: int, *, resize: bool = True) -> NDArray[np.uint8]:
    """The image as (3, side, side) RGB.

    The shorter side is resized to `side` (bilinear, antialiased) and the central square kept;
    with `resize=False` an image of any other size raises MixedSizesError. Grey, palette and 16-bit
    images become 8-bit RGB, transparency is dropped, EXIF orientation is applied.
    """
    with Image.open(path) as image:
        if resize:
            # A JPEG many times too large is decoded at 1/2, 1/4 or 1/8: never below 2 x side.
            image.draft(None, (2 * side, 2 * side))
        elif image.size != (side, side):
            raise MixedSizesError(f"{path}: {image.size}")
        rgb = _rgb(image)
    if rgb.size != (side, side):
        width, height = rgb.size
        edge = min(width, height)
        left, top = (width - edge) / 2, (height - edge) / 2
        box = (left, top, left + edge, top + edge)
        rgb = rgb.resize((side, side), Image.Resampling.BILINEAR, box=box)
    return np.asarray(rgb).transpose(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits: PIL would clip everything above 255 to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def reason(error: Exception) -> str:
    """Why an image cannot be read, in a few words; re-raises what is not the image's fault."""
    if isinstance(error, (MixedSizesError, MemoryError)):
        raise error
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that can be read"
    if isinstance(error, OSError) and error.errno is not None:
        raise error  # permissions, the disk, the network: trying again may help
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Batch:
    images: NDArray[np.uint8]  # (N, 3, side, side), of the files that could be read
    labels: list[int]
    unreadable: list[tuple[str, str]]  # (path, why)


def decode_batch(root: Path, files: list[tuple[str, int]], side: int, *, resize: bool) -> Batch:
    """Decode (path, label) pairs, paths relative to `root`; unreadable ones are listed."""
    images = np.empty((len(files), 3, side, side), dtype=np.uint8)
    labels: list[int] = []
    unreadable: list[tuple[str, str]] = []
    for path, label in files:
        try:
            images[len(labels)] = decode(root / path, side, resize=resize)
        except Exception as error:  # PIL raises a dozen kinds
            unreadable.append((path, reason(error)))
        else:
            labels.append(label)
    return Batch(images[: len(labels)], labels, unreadable)


def native_side(root: Path, files: Iterable[tuple[str, int]], size: int) -> int | None:
    """Side of the first readable image if it is square and no larger than `size`."""
    for path, _ in files:
        try:
            with Image.open(root / path) as image:
                width, height = image.size
        except Exception as error:
            reason(error)
        else:
            return width if width == height <= size else None
    return None
