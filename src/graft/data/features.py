"""What is frozen is computed once: outputs of a frozen prefix, keyed by all that decides them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graft.data.shards import ShardedRows
from graft.data.source import rows_of

IN_MEMORY_BYTES = 1 << 30  # larger features are read row by row
DEVICE_SHARE = 0.25  # of free GPU memory that features may take


class StoredFeatures:
    """Features of a split, (N, *shape), or of V views of each image: row `position * V + view`.

    `features[row numbers]` gives float32 rows. Held in memory, or on the GPU, where they fit;
    otherwise read from disk, so that memory does not grow with the data.
    """

    def __init__(self, rows: ShardedRows, views: int = 1, device: torch.device | None = None):
        self.rows, self.views = rows, views
        self.tensor: Tensor | None = None
        if device is not None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if rows.bytes < DEVICE_SHARE * free:
                self.tensor = self._load().to(device)
        elif rows.bytes <= min(IN_MEMORY_BYTES, _free_memory() // 4):
            self.tensor = self._load()

    def __len__(self) -> int:
        return self.rows.rows

    def __getitem__(self, index: Tensor) -> Tensor:
        if self.tensor is not None:
            # Copies whole rows: twice as fast on CPUs as `tensor[index]`.
            return self.tensor.index_select(0, index.to(self.tensor.device)).float()
        return torch.from_numpy(self.rows.gather(index.numpy())).float()

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, in parts that are small."""
        for block in self.rows.blocks():
            yield torch.from_numpy(block).float()

    def _load(self) -> Tensor:
        whole = np.empty((self.rows.rows, *self.rows.row_shape), self.rows.dtype)
        start = 0
        for block in self.rows.blocks():
            whole[start : start + len(block)] = block
            start += len(block)
        return torch.from_numpy(whole)


def _free_memory() -> int:
    """Bytes that can be had without swapping; the page cache is such memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return 8 << 30


def images_digest(images: NDArray[np.uint8], rows: NDArray[np.int64]) -> str:
    """SHA-256 of the chosen images' shape and pixels, in their order."""
    digest = hashlib.sha256(repr(images.shape[1:]).encode())
    for start in range(0, len(rows), 2048):
        digest.update(np.ascontiguousarray(rows_of(images, rows[start : start + 2048])).data)
    return digest.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers."""
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
