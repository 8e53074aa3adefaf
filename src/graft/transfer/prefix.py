"""The frozen prefix of a stage as a function of images, run in the fastest way this machine has."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from graft.backbones.base import Backbone

log = logging.getLogger(__name__)

CPU_BATCH, GPU_BATCH = 16, 256  # images; activations of 16 stay in a CPU's cache
TOLERANCE = 1e-4  # of the largest output: what folding BatchNorm may change

Prepared = Callable[[NDArray[np.int64]], Tensor]
"""Positions -> prepared images on the prefix's device."""


class FrozenPrefix:
    """`blocks[:cut]` of a backbone, or its features where `cut` is past the last block.

    A copy with BatchNorm folded into the convolutions before it; always in eval.

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
        whole = cut == len(backbone.blocks)
        self.plain: nn.Module = backbone if whole else backbone.blocks[:cut]
        self.device = next(backbone.parameters()).device
        self.module = self._folded(backbone, cut) if whole else fold(self.plain)
        self.module.eval()

    def _folded(self, backbone: Backbone, cut: int) -> nn.Module:
        copied = copy.copy(backbone)  # its blocks alone are replaced, not those of the original
        copied._modules = dict(backbone._modules)
        copied.blocks = fold(backbone.blocks)
        return copied

    def check(self, images: Tensor) -> None:
        """Go back to the plain modules if folding changed what they give for `images`."""
        was_training = self.plain.training
        self.plain.eval()
        expected, found = self._apply(self.plain, images), self._apply(self.module, images)
        if not torch.allclose(found, expected, atol=TOLERANCE * float(expected.abs().max())):
            log.warning("folding BatchNorm changes the features of this backbone: left as it is")
            self.module = copy.deepcopy(self.plain).eval()
        self.plain.train(was_training)

    def __call__(self, images: Tensor) -> Tensor:
        return self._apply(self.module, images)

    @torch.inference_mode()
    def _apply(self, module: nn.Module, images: Tensor) -> Tensor:
        with self.context():
            return module(images).float()


def fold(blocks: nn.Module) -> nn.Sequential:
    """A copy of `blocks` with BatchNorm folded into convolutions, block by block where possible."""
    folded = nn.Sequential()
    for name, block in blocks.named_children():
        new = copy.deepcopy(block).eval()
        if any(isinstance(m, nn.BatchNorm2d) for m in new.modules()):
            try:
                new = fuse(new)
            except Exception as error:  # tracing fails in many ways; the copy is right as it is
                log.debug("block %s is not folded: %s", name, error)
        folded.add_module(name, new)
    return folded


class Extractor:
    """Rows of features for positions, in batches spread over the cores.

    On a CPU, one batch per core at a time, each on a single thread, usually beats all threads on
    one batch (small layers don't split well, and a busy machine stalls every barrier). Which one
    does is measured on the first two rounds.
    """

    def __init__(self, prefix: FrozenPrefix, prepared: Prepared) -> None:
        self.prefix, self.prepared = prefix, prepared
        self.on_cpu = prefix.device.type == "cpu"
        self.batch = CPU_BATCH if self.on_cpu else GPU_BATCH
        self.threads = torch.get_num_threads()
        self.workers: int | None = None if self.on_cpu and self.threads > 1 else 1

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n,) -> (n, ...)."""
        return np.concatenate([part.numpy() for part in self.parts(positions)])

    def parts(self, positions: NDArray[np.int64]) -> Iterator[Tensor]:
        """The same in parts, on the CPU."""
        batches = [
            positions[start : start + self.batch] for start in range(0, len(positions), self.batch)
        ]
        if self.workers is None and len(batches) >= 4 * self.threads:
            self.workers = self._choose(batches[: 2 * self.threads])
        if (self.workers or 1) > 1:
            yield from self._side_by_side(batches)
        else:
            yield from map(self._one, batches)

    def _one(self, batch: NDArray[np.int64]) -> Tensor:
        return self.prefix(self.prepared(batch)).cpu()

    def _side_by_side(self, batches: list[NDArray[np.int64]]) -> Iterator[Tensor]:
        try:
            with ThreadPoolExecutor(self.threads, initializer=_single_thread) as pool:
                yield from pool.map(self._one, batches)
        finally:
            torch.set_num_threads(self.threads)  # part of the setting is the whole process's

    def _choose(self, batches: list[NDArray[np.int64]]) -> int:
        self._one(batches[0])  # chooses kernels
        seconds = {}
        for workers, run in ((1, lambda b: map(self._one, b)), (self.threads, self._side_by_side)):
            started = time.perf_counter()
            for _ in run(batches):
                pass
            seconds[workers] = time.perf_counter() - started
        return min(seconds, key=lambda workers: seconds[workers])


def _single_thread() -> None:
    torch.set_num_threads(1)
