"""What each rank held when: callbacks for runs in other processes, and reading what they wrote."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch.distributed.tensor import DTensor

from graft.training.module import TransferModule

State = dict[str, torch.Tensor]


class WriteStates(L.Callback):
    """Writes every rank's weights and buffers when a fit starts, when it has ended, and at test."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def part(self, trainer: L.Trainer, module: L.LightningModule) -> str:
        return _stage(module)

    def write(self, trainer: L.Trainer, module: L.LightningModule, moment: str) -> None:
        self.folder.mkdir(exist_ok=True)
        name = f"{self.part(trainer, module)}-{moment}-{trainer.global_rank}.pt"
        torch.save(module.state_dict(), self.folder / name)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, pl_module, "start")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, pl_module, "end")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, pl_module, "test")


class StopOnce(L.Callback):
    """SIGTERM for the first rank, in the second epoch of a stage, when it first comes to that."""

    def __init__(self, folder: str, stage: str) -> None:
        self.done, self.stage = Path(folder) / "sigterm-sent", stage

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        place = (_stage(pl_module), trainer.current_epoch, batch_idx, trainer.global_rank)
        if place == (self.stage, 1, 2, 0) and not self.done.exists():
            self.done.touch()
            os.kill(os.getpid(), signal.SIGTERM)


class WriteShare(L.Callback):
    """Writes what part of the numbers in weights and optimizer state is on this rank."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        states = [s for o in trainer.optimizers for s in o.state.values()]
        tensors = [*pl_module.parameters(), *(v for s in states for v in s.values() if v.ndim)]
        here = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in tensors)
        share = here / sum(t.numel() for t in tensors)
        (self.folder / f"{_stage(pl_module)}-share-{trainer.global_rank}").write_text(str(share))


def _stage(module: L.LightningModule) -> str:
    return cast(TransferModule, module).stage.name  # type: ignore[union-attr]


def read_states(folder: Path, stage: str, moment: str) -> list[State]:
    """One state per rank, in their order."""
    paths = sorted(folder.glob(f"{stage}-{moment}-*.pt"))
    return [torch.load(path, weights_only=True) for path in paths]
