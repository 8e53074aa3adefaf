"""Handwritten digits that come with this package: real images, no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graft.data.sources.base import Source, Split, Splits
from graft.data.subset import stratified_split
from graft.transforms.preprocessing import Preprocessing

# scikit-learn's own file, byte for byte: the test set of E. Alpaydin and C. Kaynak, Optical
# Recognition of Handwritten Digits (UCI repository, 1998, CC BY 4.0). A row is 64 pixels, row by
# row, and the digit. Here, because to import scikit-learn, and scipy with it, takes a second.
FILE = Path(__file__).with_name("digits.csv.gz")
SIDE = 32
TEST_FRACTION, TEST_SEED = 1 / 3, 2024  # constants: the test split is the same in every run


class Digits(Source):
    """1,797 digits of 8 x 8 pixels in 16 grey levels, enlarged to 32 x 32 RGB (bicubic).

    The set has no official test split; a fixed, stratified third serves as one.
    """

    def load(self, preprocessing: Preprocessing) -> Splits:
        table = np.loadtxt(FILE, delimiter=",")
        images = np.stack([_enlarge(pixels.reshape(8, 8)) for pixels in table[:, :64]])
        labels = table[:, 64].astype(np.int64)
        train, test = stratified_split(labels, TEST_FRACTION, TEST_SEED)
        return Splits(
            classes=[str(digit) for digit in range(10)],
            train=Split(images[train], labels[train]),
            val=None,
            test=Split(images[test], labels[test]),
        )


def _enlarge(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(8, 8), 0..16 -> (3, 32, 32), 0..255."""
    grey = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
    large = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return np.broadcast_to(large, (3, SIDE, SIDE))
