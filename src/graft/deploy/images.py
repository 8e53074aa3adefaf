"""Image files as the rows of uint8 that a deployed model takes: the road that training images take.

Imports no torch: an exported model answers without it.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from graft.data.sources.decode import decode, open_image
from graft.data.sources.decode import reason as _reason
from graft.data.sources.depth import RangeUnknownError
from graft.deploy.spec import Spec

OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors of whoever reads, whatever the file


def read_image(file: Path | BinaryIO, spec: Spec) -> NDArray[np.uint8]:
    """(3, H, W) RGB: as it is, if it is square and no larger than the resize makes images, as
    class folders of one size are stored; else resized as the weights want it.

    Raises:
        Exception: of a damaged or foreign file, almost any kind: see `reason`.
    """
    side = spec.stored.resize_size
    with open_image(file) as image:
        width, height = image.size
    if not isinstance(file, Path):
        file.seek(0)
    # A line of 100,000 pixels is small, and huge once its shorter side is resized.
    high, wide = spec.stored.resized(height, width)
    if high * wide > spec.reading.max_megapixels * 1e6:
        raise ValueError(f"{width} x {height}: too long a strip, it is {wide} x {high} if resized")
    if spec.keeps_small and spec.input_size is None and width == height <= side:
        return decode(file, width, None, spec.reading)
    return decode(file, side, spec.stored, spec.reading)


def reason(error: Exception) -> str:
    """Why an image cannot be read, in a few words; re-raises what is not the image's fault."""
    if isinstance(error, RangeUnknownError):
        return (
            "more than 8 bits a channel, and the model was trained on images of 8: what is black "
            "and white in it is not known"
        )
    if isinstance(error, OSError) and error.errno not in (None, *OURS):
        return str(error.strerror)
    return _reason(error)
