"""A trained model as the content of a file: ONNX, a program of torch.export, or weights."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from graft.config.overrides import is_path
from graft.deploy.files import CONFIG, FEATURES, IMAGES, INSTALL, KEY, answer
from graft.deploy.graph import Graph
from graft.deploy.model import Deployed
from graft.deploy.spec import Spec
from graft.models.backbone import Backbone
from graft.models.weights import PREPROCESSING

if TYPE_CHECKING:
    from onnx import ModelProto

Pack = Callable[[Spec], bytes]
"""The file's content, with a description."""
LARGEST = 2**31 - 1  # bytes of an ONNX file: it is one message of protobuf
SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules that it comes from


def traced(graph: Graph) -> ExportedProgram:
    """The graph's operations, for any number and size of images.

    Raises:
        ValueError: a module does what cannot be traced.
    """
    images = torch.zeros(2, 3, 40, 48, dtype=torch.uint8)
    sizes = {0: Dim("count"), 2: Dim("height"), 3: Dim("width")}
    try:
        with _for_export(), torch.no_grad():
            program = torch.export.export(graph, (images,), dynamic_shapes={IMAGES: sizes})
    except Exception as error:  # of any kind: the backbone's own code runs
        raise ValueError(f"this model cannot be exported: {_first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    return program


def to_onnx(program: ExportedProgram, spec: Spec) -> ModelProto:
    """Raises a ValueError if ONNX lacks one of its operations, or its libraries are not there."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--format onnx needs onnxscript and onnxruntime: {INSTALL}") from error
    try:
        with _for_export():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=[IMAGES],
                output_names=[answer(spec), FEATURES],
            )
    except Exception as error:
        raise ValueError(f"this model cannot be exported to ONNX: {_first_line(error)}") from error
    assert exported is not None
    return exported.model_proto


def pack_onnx(model: ModelProto) -> Pack:
    def pack(spec: Spec) -> bytes:
        import onnx

        kept = onnx.ModelProto()
        kept.CopyFrom(model)
        for part in (*kept.graph.node, *kept.graph.value_info, *kept.graph.initializer):
            del part.metadata_props[:]  # where in torch it comes from: most of a small model's file
        onnx.helper.set_model_props(kept, {KEY: spec.to_json()})
        if kept.ByteSize() > LARGEST:
            raise ValueError("this model is larger than 2 GB, the most of an ONNX file: use pt2")
        return kept.SerializeToString()

    return pack


def pack_program(program: ExportedProgram) -> Pack:
    def pack(spec: Spec) -> bytes:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No complete tensor found")  # of shared buffers
            torch.export.save(program, buffer, extra_files={f"{KEY}.json": spec.to_json()})
        return buffer.getvalue()

    return pack


def pack_weights(model: Deployed, config: dict[str, Any], *, half: bool = False) -> Pack:
    """Args:
    config: the run's: of it the parts are kept that build the model.
    """
    from safetensors.torch import save

    parts = {key: config[key] for key in ("backbone", "head", "task", "mirror", "seed")}
    parts["mirror"] = model.backbone.mirror
    parts["head"] = {**parts["head"], "grid": None}
    if is_path("backbone.weights", parts["backbone"].get("weights")):  # of this machine
        parts["backbone"] = {**parts["backbone"], "weights": None}
    state = {name: _plain(value, half=half) for name, value in model.state_dict().items()}

    def pack(spec: Spec) -> bytes:
        return save(state, {"format": "pt", KEY: spec.to_json(), CONFIG: json.dumps(parts)})

    return pack


def pack_backbone(backbone: Backbone) -> bytes:
    from safetensors.torch import save

    state = {name: _plain(value) for name, value in backbone.state_dict().items()}
    return save(state, {"format": "pt", PREPROCESSING: json.dumps(asdict(backbone.preprocessing))})


def _plain(value: Tensor, *, half: bool = False) -> Tensor:
    """In a memory of its own, as it is counted."""
    value = value.half() if half and value.is_floating_point() else value
    return value.detach().clone(memory_format=torch.contiguous_format)


@contextmanager
def _for_export() -> Iterator[None]:
    """Attention as its single operations: its fast path is one that other programs lack."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, about themselves
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__
