"""What a model says of image files, for who calls it from Python.

Imports no torch: an exported model answers without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graft.deploy.images import read_image, reason
from graft.deploy.predict import NOT_FINITE
from graft.deploy.spec import Model, Spec

BATCH = 64


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


def predict_files(model: Model, paths: str | Path | Iterable[str | Path]) -> list[Prediction]:
    """In their order; as few images as a batch are in memory at a time.

    Raises:
        ValueError: a file that is no image that can be read; the message names it.
        OSError: a file that is not there, or that may not be read.
    """
    given = iter([paths] if isinstance(paths, str | Path) else paths)
    found: list[Prediction] = []
    while part := list(islice(given, BATCH)):
        images = [_read(path, model.spec) for path in part]
        outputs = _outputs(model, images)
        for path, row in zip(part, outputs, strict=True):
            if not np.isfinite(row).all():
                raise ValueError(f"{path}: {NOT_FINITE}")
            found.append(Prediction.of(path, row, model.spec))
    return found


def _read(path: str | Path, spec: Spec) -> NDArray[np.uint8]:
    try:
        return read_image(Path(path), spec)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # PIL raises a dozen kinds
        raise ValueError(f"{path}: {reason(error)}") from error


def _outputs(model: Model, images: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """One row for each image; those of one size are a batch."""
    of_size: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        of_size.setdefault(image.shape, []).append(i)
    rows: dict[int, NDArray[np.float32]] = {}
    for places in of_size.values():
        outputs = model.predict_rows(np.stack([images[i] for i in places]))
        rows |= zip(places, outputs, strict=True)
    return [rows[i] for i in range(len(images))]
