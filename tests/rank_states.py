"""What each rank held when: a callback for runs in other processes, and reading what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import lightning as L
import torch

from graft.module import TransferModule

State = dict[str, torch.Tensor]


class WriteStates(L.Callback):
    """Writes every rank's weights and buffers when a fit starts, when it has ended, and at test."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def part(self, trainer: L.Trainer, module: L.LightningModule) -> str:
        return cast(TransferModule, module).stage.name  # type: ignore[union-attr]

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


def read_states(folder: Path, stage: str, moment: str) -> list[State]:
    """One state per rank, in their order."""
    paths = sorted(folder.glob(f"{stage}-{moment}-*.pt"))
    return [torch.load(path, weights_only=True) for path in paths]
