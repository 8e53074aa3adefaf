"""What each rank held when: a callback for runs in other processes, and reading what it wrote."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch

State = dict[str, torch.Tensor]


class WriteStates(L.Callback):
    """Writes every rank's weights and buffers when a fit starts, when it has ended, and at test."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def _write(self, trainer: L.Trainer, module: L.LightningModule, moment: str) -> None:
        stage = module.stage.name  # type: ignore[union-attr]
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{stage}-{moment}-{trainer.global_rank}.pt"
        torch.save(module.state_dict(), path)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, "start")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, "end")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, "test")


def read_states(folder: Path, stage: str, moment: str) -> list[State]:
    """One state per rank, in their order."""
    paths = sorted(folder.glob(f"{stage}-{moment}-*.pt"))
    return [torch.load(path, weights_only=True) for path in paths]
