"""Weights from a file or a run folder into a module, with errors that say what does not fit."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graft.config.words import did_you_mean, plural
from graft.storage.run_json import read_record
from graft.transforms.preprocessing import Preprocessing

AVERAGED = re.compile(r"(?<![a-z])(?:ema|teacher)(?![a-z])")
"""Parts of a file that are meant where it also holds what they are the average of."""
# Plain values that training scripts keep beside their weights, and that run no code when read.
PREPROCESSING = "graft_preprocessing"  # in the metadata of a .safetensors file
_SCALAR = getattr(np, "_core", None) or np.core
PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.bool_)),
    *((_SCALAR.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


@dataclass(frozen=True)
class WeightsFile:
    """What a file holds, read without running anything in it.

    Attributes:
        preprocessing: of the run that a checkpoint of ours comes from.
    """

    path: Path
    content: Mapping[str, Any]
    preprocessing: Any = None

    @classmethod
    def read(cls, weights: str | Path, takes: type = Preprocessing) -> WeightsFile:
        """Of a file, or of the best checkpoint of a run folder of ours.

        Args:
            takes: the kind of preprocessing that the backbone has.

        Raises:
            ValueError: it holds no weights, or what could run code; the message says what to do.
        """
        path = Path(weights).expanduser()  # no shell does it in backbone.weights=~/...
        path = best_checkpoint(path) if path.is_dir() else path
        content = read_file(path)
        note = content.get("graft")
        values = note.get("preprocessing") if isinstance(note, Mapping) else None
        if values is None:
            return cls(path, content)
        try:
            return cls(path, content, takes(**{**values, "origin": f"as in {path}"}))
        except (TypeError, ValueError) as error:
            if {*values} - {f.name for f in fields(takes)}:
                raise ValueError(f"weights: {path} is of a backbone for other inputs") from error
            raise ValueError(f"weights: {path}: its preprocessing is damaged: {error}") from error


def read_file(path: Path) -> Mapping[str, Any]:
    """Names -> tensors of a `.safetensors` or torch file; nested, with other things, in many."""
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {path}")
    with path.open("rb") as file:
        start = file.read(64)
    if start.lstrip()[:1] == b"<":
        raise ValueError(f"weights: {path} is a web page: download the file that it links to")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"weights: {path} only points to a file in Git LFS: run `git lfs pull`")
    try:
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            return _read_safetensors(path)
        with torch.serialization.safe_globals(PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and (
            foreign := re.search(r"(?:GLOBAL|class) ([\w.]+\.[\w.]+)", str(error))
        ):
            raise ValueError(
                f"weights: {path} holds more than weights: reading its {foreign[1]} could run "
                "code. Let the program that wrote it save the tensors alone: "
                "torch.save(model.state_dict(), FILE)"
            ) from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's advice is to read it unsafely
            reason = "torn, or no file of torch"
        raise ValueError(f"weights: {path} cannot be read: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"weights: {path} holds a {type(content).__name__}, not names and tensors")
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Its preprocessing, if it says one, stands where a checkpoint of ours has it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        own = (file.metadata() or {}).get(PREPROCESSING)
    return content if own is None else {**content, "graft": {"preprocessing": json.loads(own)}}


def best_checkpoint(run: Path) -> Path:
    """That of the last stage that has one."""
    try:
        record = read_record(run)
        stages = [Path(str(name)).name for name in record["config"]["transfer"]["stages"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"weights: {run} is neither a file nor a run folder of graft") from error
    found = [run / "checkpoints" / stage / "best.ckpt" for stage in stages]
    if not (found := [path for path in found if path.is_file()]):
        raise ValueError(f"weights: the run {run} has no best checkpoint yet")
    return found[-1]


Part = tuple[str, dict[str, Tensor]]
"""Where in a file, and the tensors that are there."""


def parts_of(content: Mapping[str, Any], where: str = "", depth: int = 3) -> Iterator[Part]:
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield where, tensors
    for key, value in content.items():
        if isinstance(value, Mapping) and depth > 0:
            yield from parts_of(value, f"{where}.{key}".strip("."), depth - 1)


@dataclass(frozen=True)
class Match:
    """The part and prefix of a file whose tensors fit a module's names and shapes best."""

    where: str
    prefix: str
    state: dict[str, Tensor]
    fitting: int
    others: list[str]  # names of tensors in that part without the prefix


def match(content: Mapping[str, Any], module: nn.Module) -> Match | None:
    """None where no tensor fits."""
    own = module.state_dict()
    best: tuple[tuple[int, int], str, str, dict[str, Tensor]] | None = None
    for where, tensors in parts_of(content):
        fitting: Counter[str] = Counter()
        for name, value in tensors.items():
            start = 0
            while start >= 0:
                twin = own.get(name[start:])
                if twin is not None and twin.shape == value.shape:
                    fitting[name[:start]] += 1
                start = name.find(".", start) + 1 or -1
        for prefix, count in fitting.items():
            averaged = len(AVERAGED.findall(f"{where}.{prefix}"))
            if best is None or (count, averaged) > best[0]:
                best = (count, averaged), where, prefix, tensors
    if best is None:
        return None
    (count, _), where, prefix, tensors = best
    state = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    return Match(where, prefix, state, count, [n for n in tensors if not n.startswith(prefix)])


def load_file_into(
    file: WeightsFile,
    modules: Sequence[tuple[nn.Module, tuple[str, ...]]],
    *,
    label: str = "",
    rename: Callable[[str], str] = str,
) -> str:
    """Load the best match into the module it fits best; returns what was taken, in one line.

    Args:
        modules: layouts that the file may have, each with its optional keys (see `load_state`).
        rename: a name in the file -> today's.
    """
    content: Mapping[str, Any] = file.content
    if rename is not str:
        parts = parts_of(file.content)
        content = {where: {rename(n): v for n, v in named.items()} for where, named in parts}
    found = [(match(content, module), module, optional) for module, optional in modules]
    best, module, optional = max(found, key=lambda entry: entry[0].fitting if entry[0] else 0)
    if best is None:
        raise ValueError(
            f"weights: {file.path} does not fit the architecture {label}: no tensor in it has the "
            "name and the shape of one of the model's"
        )
    children = {name.partition(".")[0] for name in module.state_dict()}
    # A head or predictor of pretraining; what is more of a part that the model has is an error.
    foreign = [n for n in best.state if n.partition(".")[0] not in children]
    state = {name: value for name, value in best.state.items() if name not in foreign}
    check_finite(state, file.path)
    load_state(module, state, source=file.path, optional=optional, label=label)
    line = f"{plural(best.fitting, 'tensor')} of {file.path}"
    line += f", from {best.where}" if best.where else ""
    line += f", {best.prefix} taken off their names" if best.prefix else ""
    if left := [*foreign, *best.others]:
        line += f"; left out {left[0]}" + (f" and {len(left) - 1} more" if len(left) > 1 else "")
    return line


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
    differ = [key for key in own if key in state and state[key].shape != own[key].shape]
    loaded = module.load_state_dict(
        {key: value for key, value in state.items() if key not in differ}, strict=False
    )
    # As in torch itself: files older than this counter of BatchNorm fit, and it changes nothing.
    absent = {*differ, *(key for key in own if key.endswith("num_batches_tracked"))}
    missing = [key for key in loaded.missing_keys if key not in absent]
    name = f" {label}" if label else ""
    for key in differ:
        shape, wanted = state[key].shape, own[key].shape
        if len(shape) == len(wanted) == 4 and wanted[1] == 3 and shape[0] == wanted[0]:
            raise ValueError(
                f"weights: {source} takes {shape[1]}-channel images ({key} "
                f"{tuple(state[key].shape)}), and images here have 3 channels"
            )
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in differ
    ]
    differences = []
    for keys, what in (
        (missing, "missing"),
        (loaded.unexpected_keys, "unexpected"),
        (shapes, "of another shape"),
    ):
        if wrong := [key for key in keys if not (optional and key.startswith(optional))]:
            more = ", ..." if len(wrong) > 3 else ""
            differences.append(f"{len(wrong)} {what} ({', '.join(wrong[:3])}{more})")
    if differences:
        raise ValueError(
            f"weights: {source} does not fit the architecture{name}: {'; '.join(differences)}"
        )


def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Weights of a run that diverged are refused where they are loaded."""
    if broken := [key for key, value in state.items() if not value.isfinite().all()]:
        raise ValueError(
            f"weights: {source} holds values that are not finite in "
            f"{plural(len(broken), 'tensor')}, first {broken[0]}: a run that diverged wrote them"
        )


def unknown_weights(weights: str, model: str, names: Sequence[str]) -> ValueError:
    """The error for `weights` that are no file and none of the `names` that `model` has."""
    return ValueError(
        f"backbone.weights={weights}{did_you_mean(weights, names) or ':'} {model} has "
        f"{', '.join(names) or 'none'}; or give a .pth or .safetensors file, a run folder, or null"
    )


def describe_origin(entry: str, weights: str | None, *, known: bool) -> str:
    """Who says how images are normalised, for the start-up summary.

    Args:
        entry: the published weights whose preprocessing it is.
        known: whether they are the ones that are loaded.
    """
    if known:
        return f"as {entry} expects"
    if weights is None:
        return f"as {entry} expects (random weights expect nothing)"
    return f"as {entry} expects ({weights} does not say; backbone.preprocessing can)"
