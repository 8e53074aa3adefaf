"""Exported models that torch runs: a program (.pt2), and weights that a model is built for."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graft.deploy.files import CONFIG, KEY, check_size, foreign, read_spec
from graft.deploy.model import Deployed
from graft.deploy.predictions import PythonModel
from graft.models.weights import check_finite, load_state
from graft.runs.open import damaged
from graft.runs.trust import require_trusted, trusts
from graft.training.build import build_backbone, build_module

PROGRAM = "torch.export"  # what is trusted where a .pt2 file is


class ProgramModel(PythonModel):
    """A .pt2 file of `graft export`.

    Args:
        trusted: this process has written it.

    Raises:
        ValueError: it is another, damaged, or not trusted: torch unpickles parts of such a file,
            and evaluates text in it, so that reading it can run code.
    """

    def __init__(self, path: Path, device: str | None = None, *, trusted: bool = False) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if n.endswith(f"extra/{KEY}.json")]
                text = archive.read(names[0]).decode() if names else None
        except (zipfile.BadZipFile, UnicodeDecodeError, OSError, NotImplementedError) as error:
            raise ValueError(f"{path} is damaged, or no .pt2 file: {error}") from error
        if text is None:
            raise ValueError(foreign(path))
        self.spec = read_spec(path, text)
        if not (trusted or trusts(PROGRAM)):
            raise ValueError(
                f"{path} is not opened: reading a .pt2 file can run code that is in it (if you "
                f"know where it comes from, add --trust {PROGRAM})"
            )
        try:
            with path.open("rb") as file, _quiet():
                program = torch.export.load(file)
        except Exception as error:  # of a damaged file, torch raises almost any
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} is damaged: {reason}") from error
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, str(self.device))
        self.module = program.module()

    def predict_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._run(0, images)

    def embed_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._run(1, images)

    @torch.inference_mode()
    def _run(self, output: int, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        check_size(self.spec, images)
        return self.module(torch.tensor(images).to(self.device))[output].cpu().numpy()


@contextmanager
def _quiet() -> Iterator[None]:
    """Of a damaged file, torch logs a stack trace before it raises another error."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def open_safetensors(path: Path, device: str | None = None) -> Deployed:
    """The model that a file's description names, with the file's weights."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a class of its own
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    if KEY not in metadata or CONFIG not in metadata:
        raise ValueError(foreign(path))
    spec = read_spec(path, metadata[KEY])
    with damaged(path):
        config: dict[str, Any] = json.loads(metadata[CONFIG])
        require_trusted(config, path)
        backbone = build_backbone(config["backbone"], pretrained=False)
        module = build_module(config, backbone, len(spec.classes))
    state = {
        name: value.float() if value.dtype == torch.half else value for name, value in state.items()
    }
    model = Deployed(spec, module.backbone, module.head, module.task)
    check_finite(state, path)
    load_state(model, state, source=path, label="that it describes")
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
