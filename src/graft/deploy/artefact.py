"""A model for predictions from whatever it is kept as: a run folder, or a file of `graft export`.

Imports no torch: an ONNX model answers without it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graft.deploy.files import (
    FEATURES,
    IMAGES,
    INSTALL,
    KEY,
    answer,
    check_size,
    foreign,
    read_spec,
)
from graft.deploy.predictions import PythonModel


def open_model(
    path: str | Path, ckpt: str = "best", *, mirror: bool = False, device: str | None = None
) -> PythonModel:
    """The model of a run folder or of an exported file (.onnx, .pt2, .safetensors).

    Args:
        ckpt, mirror: of a run folder, see `model.load`; a file has been exported with its own.
        device: "cpu", "cuda", ...; None: a GPU where there is one.

    Raises:
        ValueError: it is neither, damaged, of a newer version, or could run code.
    """
    path = Path(path)
    if path.is_dir():
        from graft.deploy.model import load

        return load(path, ckpt, mirror=mirror, device=device)
    if not path.is_file():
        raise ValueError(f"{path}: no such run folder or file")
    if path.suffix not in OPEN:
        raise ValueError(f"{path} is neither a run folder nor a file of {', '.join(OPEN)}")
    if ckpt != "best" or mirror:
        option = "mirror" if mirror else "ckpt"
        raise ValueError(
            f"--{option} is for run folders: {path} has been exported with its own "
            f"(graft export RUN --{option} makes another)"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return OPEN[path.suffix](path, device)


class OnnxModel(PythonModel):
    """An ONNX file of `graft export`, run by onnxruntime."""

    def __init__(self, path: Path, device: str | None = None) -> None:
        try:
            import onnxruntime as ort  # type: ignore[import-untyped]
        except ImportError as error:
            raise ValueError(f"{path} needs onnxruntime: {INSTALL}") from error
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors: of warnings there is one for each odd node
        try:
            self.session = ort.InferenceSession(path, options, providers=_providers(device))
        except Exception as error:  # its errors share no class but this one
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is damaged, or no ONNX model: {reason}") from error
        text = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise ValueError(foreign(path))
        self.spec = read_spec(path, text)
        self.outputs = {output.name for output in self.session.get_outputs()}
        inputs = [(i.name, i.type, len(i.shape)) for i in self.session.get_inputs()]
        if inputs != [(IMAGES, "tensor(uint8)", 4)] or answer(self.spec) not in self.outputs:
            raise ValueError(f"{path} is damaged: its inputs and outputs are not those of graft's")

    def predict_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._run(answer(self.spec), images)

    def embed_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        if FEATURES not in self.outputs:
            raise ValueError("this model was exported without features")
        return self._run(FEATURES, images)

    def _run(self, output: str, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        check_size(self.spec, images)
        result: Any = self.session.run([output], {IMAGES: images})[0]
        return result


def _providers(device: str | None) -> list[str]:
    """Of onnxruntime, the fastest first; each leaves to the next what it has not."""
    import onnxruntime as ort

    gpu = "CUDAExecutionProvider"
    has_gpu = gpu in ort.get_available_providers()
    if device not in (None, "cpu") and not has_gpu:
        raise ValueError(
            f"device {device}: this onnxruntime runs on CPUs alone (onnxruntime-gpu on NVIDIA's)"
        )
    return [*([gpu] if has_gpu and device != "cpu" else []), "CPUExecutionProvider"]


def _open_pt2(path: Path, device: str | None) -> PythonModel:
    from graft.deploy.torch_files import ProgramModel

    return ProgramModel(path, device)


def _open_safetensors(path: Path, device: str | None) -> PythonModel:
    from graft.deploy.torch_files import open_safetensors

    return open_safetensors(path, device)


OPEN: dict[str, Callable[[Path, str | None], PythonModel]] = {
    ".onnx": OnnxModel,
    ".pt2": _open_pt2,
    ".safetensors": _open_safetensors,
}
