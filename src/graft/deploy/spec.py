"""What a deployed model says of itself, as JSON inside it: classes, how files are read, origin.

Imports no torch: an exported model answers without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from graft.data.sources.decode import Reading, as_range
from graft.transforms.preprocessing import Preprocessing

VERSION = 1
KINDS = ("classes", "labels", "numbers")


@dataclass(frozen=True)
class Spec:
    """How images become what a model takes, and what its outputs are.

    Attributes:
        classes: of each output, in order; for numbers, the names of their columns.
        output_kind: probabilities of "classes" that exclude each other, of "labels" that do not,
            or "numbers".
        stored: how an image file is resized before it is a row of uint8; see `read`.
        preprocessing: what the model then does itself: resize, crop, normalisation.
        reading: how files become 8-bit RGB.
        input_size: (height, width) that images must have; None: any.
        keeps_small: whether a square image smaller than `stored` makes it is left at its size.
        provenance: run, commit, versions, data digest, metrics: plain values.
    """

    classes: list[str]
    output_kind: Literal["classes", "labels", "numbers"]
    stored: Preprocessing
    preprocessing: Preprocessing
    reading: Reading
    input_size: tuple[int, int] | None = None
    keeps_small: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"graft_version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Raises a ValueError that says what is wrong with it."""
        try:
            values = json.loads(text)
            version = values.pop("graft_version")
            if not isinstance(version, int) or version > VERSION:
                raise ValueError(
                    f"it was written by a newer graft (version {version}, this one knows {VERSION})"
                )
            if values["output_kind"] not in KINDS:
                raise ValueError(f"output_kind is {values['output_kind']!r}")
            if not isinstance(values["classes"], list) or not isinstance(
                values["provenance"], dict
            ):
                raise TypeError("a part is of another type")
            if not values["classes"] or not all(isinstance(c, str) for c in values["classes"]):
                raise ValueError("classes are no list of names")
            for key in ("stored", "preprocessing"):
                values[key] = Preprocessing(**values[key])
            reading = values["reading"]
            reading["value_range"] = as_range(reading["value_range"])
            values["reading"] = Reading(**reading)
            size = values["input_size"]
            values["input_size"] = None if size is None else (int(size[0]), int(size[1]))
            return cls(**values)
        except (
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
            json.JSONDecodeError,
        ) as error:
            raise ValueError(
                f"its description is damaged ({type(error).__name__}: {error})"
            ) from error


class Model(Protocol):
    """What predicts: a run's own model, or an exported one."""

    spec: Spec

    def predict_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, 3, H, W) RGB -> (N, outputs): probabilities, or numbers in their own units."""

    def embed_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, 3, H, W) RGB -> (N, num_features).

        Raises:
            ValueError: an exported model that was made without features.
        """


@dataclass(frozen=True)
class Threads:
    """How many threads may call a model side by side, and what each of them does first."""

    count: int
    start: Callable[[], None]


@runtime_checkable
class Hastened(Protocol):
    """A model that has a faster way for many images."""

    def for_many(self, images: NDArray[np.uint8]) -> AbstractContextManager[Threads | None]:
        """Take it meanwhile, having tried it on a few images; None: one call at a time."""
