"""What happens inside the fits of a subject, written down for a test that may be another process.

A subject trains in two parts, "probe" (the head alone) and "finetune" (everything).
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn

from tests.rank_states import WriteStates


class Stopped(Exception):
    pass


class Watch(WriteStates):
    """States when a part starts and ends; what the backbone made of the first batch of the probe;
    in how many places of the optimizer each parameter is; and a stop, once, if a file asks for it.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.part(trainer, pl_module) == "probe":
            pl_module.backbone.register_forward_hook(self.write_features)  # type: ignore[union-attr]

    def write_features(self, backbone: nn.Module, inputs: Any, features: torch.Tensor) -> None:
        path = self.folder / "features.pt"
        if not path.exists():
            torch.save((inputs[0], features.detach()), path)

    def epochs_into_part(self, trainer: L.Trainer) -> int:
        return trainer.current_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stop = self.folder / "stop"
        if self.part(trainer, pl_module) != "finetune" or not stop.exists():
            return
        if self.epochs_into_part(trainer) == 1:
            stop.unlink()
            self.write(trainer, pl_module, "stopped")
            raise Stopped

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        grouped = [id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]]
        learning = {n: p for n, p in pl_module.named_parameters() if p.requires_grad}
        places = {name: grouped.count(id(p)) for name, p in learning.items()}
        torch.save(places, self.folder / f"{self.part(trainer, pl_module)}-places.pt")


class WatchEpochs(Watch):
    """The same for one fit of both parts, the second from epoch `unfreeze_at` on."""

    def __init__(self, folder: str, unfreeze_at: int) -> None:
        super().__init__(folder)
        self.unfreeze_at = unfreeze_at

    def part(self, trainer: L.Trainer, module: L.LightningModule) -> str:
        return "probe" if trainer.current_epoch < self.unfreeze_at else "finetune"

    def epochs_into_part(self, trainer: L.Trainer) -> int:
        return trainer.current_epoch - self.unfreeze_at

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.unfreeze_at - 1:
            self.write(trainer, pl_module, "end")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.unfreeze_at:
            self.write(trainer, pl_module, "start")
        super().on_train_epoch_start(trainer, pl_module)
