"""What the files of `graft export` have in common: names in them, and their description.

Imports no torch: an exported model answers without it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graft.deploy.spec import Spec

KEY = "graft"  # of the `Spec` in a file's metadata
CONFIG = "graft_config"  # of what else builds the model of a safetensors file
IMAGES, FEATURES = "images", "features"  # an input and an output of the graph; `answer` is another
INSTALL = "pip install 'graft[export]'"


def answer(spec: Spec) -> str:
    """Name of the graph's other output."""
    return "numbers" if spec.output_kind == "numbers" else "probabilities"


def foreign(path: Path) -> str:
    return f"{path} was not made by graft export: it does not say how its images are prepared"


def read_spec(path: Path, text: str) -> Spec:
    try:
        return Spec.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_size(spec: Spec, images: NDArray[np.uint8]) -> None:
    """Raises a ValueError for images of another size than the one that a model takes."""
    if spec.input_size is not None and images.shape[2:] != spec.input_size:
        size, own = (" x ".join(map(str, s)) for s in (images.shape[2:], spec.input_size))
        raise ValueError(f"images of {size} px: this model takes {own} px alone")
