"""Digests: what tells images, weights and code apart, for names of stored features."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graft.storage.npy import rows_of

if TYPE_CHECKING:
    from torch import nn


def rows_digest(images: NDArray[Any], rows: NDArray[np.int64]) -> str:
    """SHA-256 of the chosen rows' shape and content, in their order."""
    kind = "" if images.dtype == np.uint8 else str(images.dtype)
    digest = hashlib.sha256(f"{images.shape[1:]}{kind}".encode())
    for start in range(0, len(rows), 2048):
        digest.update(np.ascontiguousarray(rows_of(images, rows[start : start + 2048])).data)
    return digest.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers."""
    import torch  # not above: an exported model reads images without it

    digest = hashlib.sha256()
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def module_digest(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, its structure, and the code it runs."""
    digest = hashlib.sha256(repr(module).encode())
    for name, part in module.named_modules():
        plain = {k: v for k, v in sorted(vars(part).items()) if _is_plain(k, v)}
        digest.update(f"{name} {plain}".encode())
    digest.update(weights_digest(module).encode())
    for kind in sorted({type(m) for m in module.modules()}, key=lambda k: k.__qualname__):
        if not kind.__module__.startswith("torch."):  # torch's own code is known by its version
            digest.update(source_of(kind).encode())
    return digest.hexdigest()


def _is_plain(name: str, value: Any) -> bool:
    """Attributes that a `repr` may leave out and that decide results: strides, pooling, heads."""
    kinds = (bool, int, float, str, tuple, list, type(None))
    return name[0] != "_" and name != "training" and isinstance(value, kinds)


def source_of(what: Any) -> str:
    """Source text of a class, function or module; its name where it was made at run time."""
    try:
        return inspect.getsource(what)
    except (OSError, TypeError):
        return f"{getattr(what, '__module__', '')}.{getattr(what, '__qualname__', what)}"


def entry_path(cache: Path, parts: Mapping[str, Any]) -> Path:
    """The folder of features that `parts` describe completely."""
    content = repr(sorted((key, str(value)) for key, value in parts.items()))
    return cache / f"features-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def content_digest(content: bytes | memoryview) -> int:
    """64 bits: enough to tell the items of a data set apart, few enough to record them all."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
