"""Weights from a local file into a module, with an error that names the keys that differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")


def is_file_name(weights: str | Path) -> bool:
    """Whether `weights` means a file, rather than a name in a library."""
    return Path(weights).suffix in SUFFIXES


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a `.safetensors`, `.pth`/`.pt` or Lightning `.ckpt` file, on the CPU."""
    path = path.expanduser()  # no shell does it in backbone.weights=~/...
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"weights: {path} cannot be read: {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
        prefix = "backbone."
        if any(key.startswith(prefix) for key in state):  # a checkpoint of ours
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights: {path} holds no state dict")
    return state


def load_into(
    module: nn.Module, path: str | Path, *, optional: tuple[str, ...] = (), label: str = ""
) -> None:
    """`load_state` from a file."""
    load_state(module, read_weights(Path(path)), source=path, optional=optional, label=label)


def load_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str | Path,
    optional: tuple[str, ...] = (),
    label: str = "",
) -> None:
    """Load a state dict into `module`, every key and shape accounted for.

    Args:
        source: where the state comes from, for the error message.
        optional: prefixes of keys that may be absent, superfluous or of another shape (the
            classifier); where they don't fit, `module` keeps its initial values.
        label: name of the architecture for the error message.

    Raises:
        ValueError: keys or shapes differ; the message names the first of them.
    """
    own = module.state_dict()
    # As in torch itself: files older than this counter of BatchNorm fit, and it changes nothing.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    differences = []
    for keys, what in (
        (missing, "missing"),
        (unexpected, "unexpected"),
        (shapes, "of another shape"),
    ):
        if wrong := [key for key in keys if not (optional and key.startswith(optional))]:
            more = ", ..." if len(wrong) > 3 else ""
            differences.append(f"{len(wrong)} {what} ({', '.join(wrong[:3])}{more})")
    if differences:
        name = f" {label}" if label else ""
        raise ValueError(
            f"weights: {source} does not fit the architecture{name}: {'; '.join(differences)}"
        )
    usable = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    module.load_state_dict({**own, **usable})
