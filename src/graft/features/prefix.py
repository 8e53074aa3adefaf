"""The frozen prefix of a stage as a function of inputs, run in the fastest way this machine has."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from graft.models.backbone import Backbone

log = logging.getLogger(__name__)

CPU_BATCH, GPU_BATCH = 16, 256  # images; activations of 16 stay in a CPU's cache
TOLERANCE = (1e-4, 1e-2)  # of the largest output, CPU and CUDA (TF32): what folding may change

Prepared = Callable[[NDArray[np.int64]], Any]
"""Positions -> inputs on the prefix's device: a tensor, or a tuple of tensors."""


class FrozenPrefix:
    """`blocks[:cut]` of a backbone, or its features where `cut` is past the last block.

    A copy, always in eval, with BatchNorm folded into the convolutions before it. The original is
    never touched: to switch it to eval and back would put its frozen blocks into train mode.

    Args:
        context: autocast of the trainer's precision, so that stored features are those that the
            stage would compute.
    """

    def __init__(
        self,
        backbone: Backbone,
        cut: int,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.context = context
        self.device = next(backbone.parameters()).device
        whole = copy.deepcopy(backbone).eval()
        self.whole = cut == len(whole.blocks)
        self.plain: nn.Module = whole if self.whole else whole.blocks[:cut].eval()
        self.module: nn.Module | None = None

    def fold(self, inputs: Any) -> None:
        """Fold BatchNorm, unless that changes what comes out for `inputs`."""
        if isinstance(self.plain, Backbone):
            folded: nn.Module = copy.copy(self.plain)  # its blocks alone are replaced
            folded._modules = dict(self.plain._modules)
            folded.blocks = fold(self.plain.blocks)
        else:
            folded = fold(self.plain)
        with torch.inference_mode():  # without autocast, whose rounding is larger than any error
            expected, found = self.plain(inputs), folded.eval()(inputs)
        tolerance = TOLERANCE[self.device.type == "cuda"] * float(expected.abs().max())
        self.module = folded
        if not torch.allclose(found, expected, atol=tolerance):
            log.warning("folding BatchNorm changes the features of this backbone: left as it is")
            self.module = self.plain

    @torch.inference_mode()
    def row_shape(self, inputs: Any) -> tuple[int, ...]:
        """The shape of what comes out for each example."""
        return tuple(self.plain(inputs).shape[1:])

    def ready(self, inputs: Any) -> None:
        """Fold now: threads must not do it side by side."""
        if self.module is None:
            several = isinstance(inputs, tuple)
            self.fold(tuple(part[:2] for part in inputs) if several else inputs[:2])

    @torch.inference_mode()
    def __call__(self, inputs: Any) -> Tensor:
        self.ready(inputs)
        module = self.module or self.plain
        with self.context():
            return module(inputs).float()


def fold(blocks: nn.Module) -> nn.Sequential:
    """`blocks` with copies, BatchNorm folded into convolutions, of those where that is possible."""
    folded = nn.Sequential()
    for name, block in blocks.named_children():
        if any(isinstance(m, nn.BatchNorm2d) for m in block.modules()):
            try:
                block = fuse(block)
            except Exception as error:  # tracing fails in many ways; the block is right as it is
                log.debug("block %s is not folded: %s", name, error)
        folded.add_module(name, block)
    return folded


class Extractor:
    """Rows of features for positions, in batches spread over the cores.

    On a CPU, one batch per core at a time, each on a single thread, usually beats all threads on
    one batch (small layers don't split well, and a busy machine stalls every barrier). `choose`
    measures which one does, here and now.
    """

    def __init__(self, prefix: FrozenPrefix, prepared: Prepared) -> None:
        self.prefix, self.prepared = prefix, prepared
        self.on_cpu = prefix.device.type == "cpu"
        self.batch = CPU_BATCH if self.on_cpu else GPU_BATCH
        self.threads = torch.get_num_threads()
        self.workers = 1

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n,) -> (n, ...)."""
        return np.concatenate([part.numpy() for part in self.parts(positions)])

    def parts(self, positions: NDArray[np.int64]) -> Iterator[Tensor]:
        """The same in parts, on the CPU."""
        # No larger than leaves a batch for each core.
        size = min(self.batch, -(-len(positions) // self.threads)) if self.on_cpu else self.batch
        batches = [positions[start : start + size] for start in range(0, len(positions), size)]
        if self.workers > 1:
            yield from self._side_by_side(batches)
        else:
            yield from map(self._one, batches)

    def choose(self, positions: NDArray[np.int64]) -> int:
        """Try both ways on a few batches of `positions`, and stay with the faster one."""
        batches = [
            positions[start : start + self.batch] for start in range(0, len(positions), self.batch)
        ][: 2 * self.threads]
        if self.on_cpu and 1 < self.threads <= len(batches):
            self._one(batches[0])  # folds, and chooses kernels
            seconds = {}
            for workers, run in (
                (1, lambda b: map(self._one, b)),
                (self.threads, self._side_by_side),
            ):
                started = time.perf_counter()
                for _ in run(batches):
                    pass
                seconds[workers] = time.perf_counter() - started
            self.workers = min(seconds, key=lambda workers: seconds[workers])
        return self.workers

    def _one(self, batch: NDArray[np.int64]) -> Tensor:
        return self.prefix(self.prepared(batch)).cpu()

    def _side_by_side(self, batches: list[NDArray[np.int64]]) -> Iterator[Tensor]:
        self.prefix.ready(self.prepared(batches[0][:2]))
        try:
            with ThreadPoolExecutor(self.threads, initializer=single_thread) as pool:
                yield from pool.map(self._one, batches)
        finally:
            torch.set_num_threads(self.threads)  # part of the setting is the whole process's


def single_thread() -> None:
    torch.set_num_threads(1)
