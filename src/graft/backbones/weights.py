"""Weights from a local file into a module, with an error that names the keys that differ."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a `.safetensors`, `.pth`/`.pt` or Lightning `.ckpt` file, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"weights: {path} cannot be read: {str(error).splitlines()[0]}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
        prefix = "backbone."
        if any(key.startswith(prefix) for key in state):  # a checkpoint of ours
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights: {path} holds no state dict")
    return state


def load_into(
    module: nn.Module, path: str | Path, *, ignore_missing: tuple[str, ...] = (), label: str = ""
) -> None:
    """Load a weights file into `module`, every key and shape accounted for.

    Args:
        ignore_missing: prefixes of keys that may be absent from the file or of another shape
            (the classifier of another number of classes); they keep their initial values.
        label: name of the architecture for the error message.

    Raises:
        ValueError: keys or shapes differ; the message names the first of them.
    """
    path = Path(path)
    state = read_weights(path)
    own = module.state_dict()
    optional = {key for key in own if key.startswith(ignore_missing)} if ignore_missing else set()
    missing = [key for key in own if key not in state and key not in optional]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape and key not in optional
    ]
    differences = [
        f"{len(items)} {what} ({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})"
        for what, items in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if items
    ]
    if differences:
        name = f" {label}" if label else ""
        raise ValueError(
            f"weights: {path} does not fit the architecture{name}: {'; '.join(differences)}"
        )
    usable = {k: v for k, v in state.items() if v.shape == own[k].shape}
    module.load_state_dict({**own, **usable})
