"""What a model says of image files, for who calls it from Python.

Imports no torch: an exported model answers without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graft.deploy.predict import predict
from graft.deploy.spec import Model, Spec


@dataclass(frozen=True)
class Prediction:
    """Of one image.

    Attributes:
        path: as it was given.
        label: the most probable class; None of a model whose labels do not exclude each other,
            or that predicts numbers.
        probability: of `label`.
        probabilities: of each class or label.
        numbers: of a model that predicts numbers, by column, in their own units.
    """

    path: str | Path
    label: str | None
    probability: float | None
    probabilities: dict[str, float]
    numbers: dict[str, float]

    @classmethod
    def of(cls, path: str | Path, outputs: NDArray[np.float32], spec: Spec) -> Prediction:
        named = dict(zip(spec.classes, outputs.tolist(), strict=True))
        if spec.output_kind == "numbers":
            return cls(path, None, None, {}, named)
        if spec.output_kind == "labels":
            return cls(path, None, None, named, {})
        label = spec.classes[int(outputs.argmax())]
        return cls(path, label, named[label], named, {})


class PythonModel(Model):
    """What every model offers who calls it from Python."""

    @property
    def classes(self) -> list[str]:
        return self.spec.classes

    def predict(self, paths: str | Path | Iterable[str | Path]) -> list[Prediction]:
        """Of image files, in their order; few images are in memory at a time.

        Raises:
            ValueError: a file that is no image that can be read; the message names it.
            OSError: a file that is not there, or that may not be read.
        """
        given = [paths] if isinstance(paths, str | Path) else [*paths]
        for path in given:
            Path(path).stat()
        found: list[Prediction] = []
        with closing(predict(self, ((str(path), "") for path in given))) as batches:
            for row in (row for batch in batches for row in batch):
                if row.values is None:
                    raise ValueError(f"{row.path}: {row.error}")
                found.append(Prediction.of(given[len(found)], row.values, self.spec))
        return found
