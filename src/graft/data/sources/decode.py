"""Image files -> uint8 arrays."""

from __future__ import annotations

import errno
import io
import math
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps, PngImagePlugin, UnidentifiedImageError

from graft.data.sources.depth import (
    Extremes,
    Range,
    RangeUnknownError,
    has_low_bytes,
    is_deep,
    take_low_bytes,
    to_8_bits,
)
from graft.storage.digests import content_digest

if TYPE_CHECKING:
    from graft.transforms.preprocessing import Preprocessing

# Pillow's decoders that may read people's files, with the extensions that list a file as an image;
# the content decides which decoder reads it. Never one that starts a program (EPS, WMF) or that
# takes files without a mark at their start (TGA), or whose inner images have sizes of their own
# (ICO, ICNS). To read another format, add it here.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf"),
    "AVIF": (".avif",),
    "QOI": (".qoi",),
    "SGI": (".sgi",),
}
DECODERS = tuple(FORMATS)
EXTENSIONS = frozenset(extension for several in FORMATS.values() for extension in several)
# Where Pillow looks for an orientation; looking takes a tenth of the time of a small image.
TURNED_BY = frozenset(("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"))
LARGE = 1 << 24  # pixels; images above are decoded one at a time, whatever the number of threads
_large = threading.Lock()

# `max_megapixels` is the limit, and counts what is decoded.
Image.MAX_IMAGE_PIXELS = 1 << 30
# Texts and colour profiles above a megabyte made good images "unreadable".
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# Errors of a read that say the file's content is wrong. Others are of permissions, the disk or the
# network: trying again may help.
CONTENT_ERRORS = (errno.EINVAL, errno.EOVERFLOW)


class MixedSizesError(Exception):
    """An image differs from the size that all were expected to share."""


@dataclass(frozen=True)
class Reading:
    """How files become 8-bit RGB.

    Args:
        background: the colour behind transparent parts, as Pillow names colours (white, #80ff00).
        value_range: what is black and white in images of more than 8 bits.
        max_megapixels: larger images are refused: each pixel may take 8 bytes of memory.
    """

    background: str = "white"
    value_range: Range | None = None
    max_megapixels: float = 200

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.background)
        except (ValueError, AttributeError, TypeError):
            wanted = "must be a colour: white, black, gray, '#80ff00'"
            raise ValueError(f"data.source.background={self.background!r}: {wanted}") from None
        if not (isinstance(self.max_megapixels, int | float) and self.max_megapixels > 0):
            wanted = "must be a number above 0"
            raise ValueError(f"data.source.max_megapixels={self.max_megapixels}: {wanted}")


def as_range(value: Any) -> Range | None:
    """The value of `data.source.value_range`, checked."""
    if value is None:
        return None
    numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value)
    if not (numbers and len(value) == 2 and -math.inf < value[0] < value[1] < math.inf):
        raise ValueError(
            f"data.source.value_range={value}: must be null, or the values of black and white: "
            "[0,4095]"
        )
    return float(value[0]), float(value[1])


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Open a file by its content, with the decoders that are allowed.

    Raises:
        ValueError: it is no regular file: opening a named pipe would wait for ever.
    """
    if isinstance(file, Path) and (why := why_no_file(file.stat())):
        raise ValueError(why)
    return Image.open(file, formats=DECODERS)


def why_no_file(status: os.stat_result) -> str | None:
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    kind = stat.S_IFMT(status.st_mode)
    return None if kind == stat.S_IFREG else f"{kinds.get(kind, 'a device')}, not a file"


def decode(
    file: Path | BinaryIO,
    side: int,
    resize: Preprocessing | None,
    reading: Reading = Reading(),
    seen: Counter[str] | None = None,
) -> NDArray[np.uint8]:
    """The image as (3, side, side) RGB.

    It is resized as `resize` says, whose `resize_size` is `side`, and a central square kept; with
    None an image of any other size raises MixedSizesError. Grey, palette and deep images become
    8-bit RGB, transparent parts show the background, EXIF orientation is applied, of an animation
    the first frame is taken.

    Args:
        seen: counts images that are "deep", "transparent", or "cut" to a square.
    """
    seen = Counter() if seen is None else seen
    with open_image(file) as image:
        if resize is None and image.size != (side, side):
            raise MixedSizesError(f"{image.size}")
        with _memory_for(image, side, reading):
            rgb = _rgb(image, file, reading, seen)
            if resize is not None:
                seen["cut"] += resize.resized(rgb.height, rgb.width) != (side, side)
                rgb = _resized(rgb, resize)
    if rgb.mode == "L":
        rgb = rgb.convert("RGB")
    return np.asarray(rgb).transpose(2, 0, 1)


def _resized(image: Image.Image, p: Preprocessing) -> Image.Image:
    """The square of the resized image that has its central crop in its own centre.

    Not a resize of that square alone: Pillow goes through rows or columns first as the shape of
    the whole makes it cheaper, and clips what overshoots in between.
    """
    height, width = p.resized(image.height, image.width)
    left, top = (p.crop_start(side) - p.crop_start(p.resize_size) for side in (width, height))
    whole = image.resize((width, height), Image.Resampling[p.interpolation.upper()])
    return whole.crop((left, top, left + p.resize_size, top + p.resize_size))


def _memory_for(
    image: Image.Image, side: int, reading: Reading
) -> threading.Lock | nullcontext[None]:
    """Held while an image is decoded.

    Raises:
        ValueError: it has too many pixels, as a JPEG even at a half, a quarter or an eighth of its
            sides that leaves 4 x side: then a reference is met within a grey level.
    """
    most = reading.max_megapixels * 1e6
    # A progressive JPEG is held in memory whole, whatever size is made of it.
    if image.width * image.height > most and not image.info.get("progressive"):
        image.draft(None, (4 * side, 4 * side))
    width, height = image.size
    if width * height > most:
        raise ValueError(
            f"{width} x {height} are {width * height / 1e6:.0f} megapixels, more than "
            f"data.source.max_megapixels={reading.max_megapixels:g}"
        )
    return _large if width * height > LARGE else nullcontext()


def _rgb(
    image: Image.Image, file: Path | BinaryIO, reading: Reading, seen: Counter[str]
) -> Image.Image:
    """8 bits, RGB or grey, upright."""
    if is_deep(image):
        if reading.value_range is None:
            raise RangeUnknownError
        seen["deep"] += 1
        image = _eight_bits(image, file, reading.value_range)
    else:
        _turn_upright(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            seen["transparent"] += 1
            canvas = Image.new("RGB", image.size, ImageColor.getrgb(reading.background)[:3])
            canvas.paste(image, mask=image)
            image = canvas
    return (
        image if image.mode in ("RGB", "L") else image.convert("L" if image.mode == "1" else "RGB")
    )


def _eight_bits(image: Image.Image, file: Path | BinaryIO, limits: Range) -> Image.Image:
    values = to_8_bits(_deep_values(image, file), limits)
    if image.mode == "RGBA":  # alpha covers its whole range
        values[..., 3] = np.asarray(image)[..., 3]
    return Image.fromarray(values)


def _deep_values(image: Image.Image, file: Path | BinaryIO) -> NDArray[Any]:
    """(H, W) or (H, W, channels), upright."""
    colours = has_low_bytes(image)  # not known any more once it is loaded
    _turn_upright(image)
    if not colours:
        return np.asarray(image)
    with open_image(file) as low:
        take_low_bytes(low)
        _turn_upright(low)
        return (np.asarray(image).astype(np.uint16) << 8) + np.asarray(low)


def _turn_upright(image: Image.Image) -> None:
    image.load()
    if TURNED_BY.isdisjoint(image.info) and not hasattr(image, "tag_v2"):  # of a TIFF
        return
    with suppress(Exception):  # a damaged EXIF block: many kinds, and the pixels are fine
        ImageOps.exif_transpose(image, in_place=True)


def extremes(root: Path, files: Iterable[tuple[str, int]], reading: Reading) -> list[Extremes]:
    """Of the deep images among (path, label) pairs; what cannot be read is left to `decode`."""
    found = []
    for path, _ in files:
        try:
            with open_image(root / path) as image:
                if is_deep(image):
                    with _memory_for(image, 1, reading):
                        values = _deep_values(image, root / path)
                        colours = values[..., :3] if values.ndim == 3 else values
                        found.append(Extremes.of(colours))
        except Exception as error:
            reason(error)
    return [one for one in found if one is not None]


def reason(error: Exception) -> str:
    """Why an image cannot be read, in a few words; re-raises what is not the image's fault."""
    if isinstance(error, (MixedSizesError, RangeUnknownError, MemoryError)):
        raise error
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in a format that can be read ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.errno not in (None, *CONTENT_ERRORS):
        raise error
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Batch:
    images: NDArray[np.uint8]  # (N, 3, side, side), of the files that could be read
    labels: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # their paths
    digests: list[int] = field(default_factory=list)  # of the files' bytes
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (path, why)
    seen: Counter[str] = field(default_factory=Counter)  # as `decode` counts


def decode_batch(
    root: Path,
    files: list[tuple[str, int]],
    side: int,
    resize: Preprocessing | None,
    reading: Reading = Reading(),
) -> Batch:
    """Decode (path, label) pairs, paths relative to `root`; unreadable ones are listed."""
    images = np.empty((len(files), 3, side, side), dtype=np.uint8)
    batch = Batch(images)
    for path, label in files:
        try:
            # A Path for each file would take longer than reading it.
            with open(f"{root}/{path}", "rb", buffering=0) as stored:  # noqa: PTH123
                content = stored.read()
            file = io.BytesIO(content)
            images[len(batch.labels)] = decode(file, side, resize, reading, batch.seen)
        except Exception as error:  # PIL raises a dozen kinds
            batch.unreadable.append((path, reason(error)))
        else:
            batch.labels.append(label)
            batch.names.append(os.fsencode(path))
            batch.digests.append(content_digest(content))
    return replace(batch, images=images[: len(batch.labels)])


def native_side(root: Path, files: Iterable[tuple[str, int]], size: int) -> int | None:
    """Side of the first readable image if it is square and no larger than `size`."""
    for path, _ in files:
        try:
            with open_image(root / path) as image:
                width, height = image.size
        except Exception as error:
            reason(error)
        else:
            return width if width == height <= size else None
    return None
