"""An ONNX model with 8-bit weights and activations, scaled by what training images give."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graft.deploy.check import batches
from graft.deploy.files import IMAGES
from graft.deploy.formats import SCOPES

if TYPE_CHECKING:
    from onnx import ModelProto

LEARNED = ("backbone", "head")  # modules whose nodes become 8-bit


def quantised(model: ModelProto, images: NDArray[np.uint8]) -> ModelProto:
    """Backbone and head in 8 bits, per channel; geometry and the last step stay as they are.

    Weights have 7 bits: with 8, sums overflow on processors without VNNI, silently.

    Args:
        images: (N, 3, H, W) raw training images.
    """
    import onnx
    from onnxruntime.quantization import (  # type: ignore[import-untyped]
        CalibrationDataReader,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[NDArray[np.uint8]] = batches(images, 32)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {IMAGES: batch}

    nodes = [node.name for node in model.graph.node if _learned(node)]
    own = onnx.ModelProto()
    own.CopyFrom(model)  # it moves the weights of what it is given into a file
    logging.disable(logging.WARNING)  # it recommends a step that the exporter has done
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantize_static(
                own,
                path,
                Reader(),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=nodes,
            )
            return onnx.load(path)
    finally:
        logging.disable(logging.NOTSET)


def _learned(node: Any) -> bool:
    scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "")
    return any(f"'{name}'" in scopes for name in LEARNED)
