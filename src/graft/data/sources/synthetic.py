"""Made-up images for tests and dry runs: learnable, instant, the same every time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graft.data.sources.base import Source, Split, Splits
from graft.transforms.preprocessing import Preprocessing


class Synthetic(Source):
    """Each class is a random pattern of 4 x 4 colours; an image is that, dimmed and noisy.

    Args:
        per_class: training images of each class; the test split has `test_per_class` more.
    """

    def __init__(
        self,
        classes: int = 10,
        per_class: int = 100,
        test_per_class: int = 20,
        image_size: int = 32,
        seed: int = 0,
    ) -> None:
        if classes < 2 or per_class < 1 or test_per_class < 1 or image_size < 1:
            raise ValueError(
                "synthetic data has 2 classes or more and 1 image, test image and px or more, "
                f"not {classes}, {per_class}, {test_per_class}, {image_size}"
            )
        self.classes, self.image_size, self.seed = classes, image_size, seed
        self.per_class, self.test_per_class = per_class, test_per_class

    def load(self, preprocessing: Preprocessing) -> Splits:
        rng = np.random.default_rng(self.seed)
        coarse = rng.uniform(-1, 1, (self.classes, 3, 4, 4)).astype(np.float32)
        cells = np.arange(self.image_size) * 4 // self.image_size
        patterns = coarse[:, :, cells][:, :, :, cells]
        return Splits(
            classes=[f"class_{label}" for label in range(self.classes)],
            train=self._split(patterns, self.per_class, np.random.default_rng([self.seed, 0])),
            val=None,
            test=self._split(patterns, self.test_per_class, np.random.default_rng([self.seed, 1])),
        )

    def _split(
        self, patterns: NDArray[np.float32], per_class: int, rng: np.random.Generator
    ) -> Split:
        labels = rng.permutation(np.repeat(np.arange(self.classes, dtype=np.int64), per_class))
        images = np.empty((len(labels), *patterns.shape[1:]), dtype=np.uint8)
        for row, label in enumerate(labels):  # one by one: no float copy of the whole set
            contrast = rng.uniform(20, 60)
            noise = rng.normal(0, 30, patterns.shape[1:])
            images[row] = np.clip(128 + contrast * patterns[label] + noise, 0, 255)
        return Split(images, labels)
