"""What a test predicts, image by image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from graft.tasks.scores import Predictions


@dataclass(frozen=True)
class Outputs:
    """What a task without classes gives: one row for each image, in the order of their index."""

    index: Tensor
    outputs: Tensor
    target: Tensor

    @classmethod
    def joined(cls, parts: list[Outputs]) -> Outputs:
        index, outputs, target = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("index", "outputs", "target")
        )
        order = index.argsort()
        return cls(index[order], outputs[order], target[order])


class Collect(L.Callback):
    """Keeps what is predicted in a test, of all ranks, and what the head is given.

    Args:
        features: of how many images, those this rank comes to first.
    """

    def __init__(self, features: int = 0) -> None:
        self.wanted = features
        self.parts: list[Predictions] = []
        self.outputs: list[Outputs] = []
        self.features: list[Tensor] = []
        self.index = torch.zeros(0, dtype=torch.long)  # of the images of `features`
        self.seen = 0
        self.hook: Any = None

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def keep(head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.seen < self.wanted:
                part = inputs[0].flatten(1)[: self.wanted - self.seen]
                self.features.append(part.float().cpu())
                self.seen += len(part)

        self.hook = pl_module.head.register_forward_pre_hook(keep)  # type: ignore[union-attr]

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if "target" in batch:  # of a task without classes
            values = (batch["index"], outputs.float(), batch["target"])
            self.outputs.append(Outputs(*(value.cpu() for value in values)))
        elif pl_module.task.classifies:  # type: ignore[union-attr]
            self.parts.append(Predictions.of(outputs, batch["label"], batch["index"]))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.hook.remove()
        if self.seen:
            indices = [part.index for part in self.parts] + [part.index for part in self.outputs]
            self.index = torch.cat(indices)[: self.seen]
        if trainer.world_size > 1:
            ranks: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(ranks, (self.parts, self.outputs))
            self.parts = [part for parts, _ in ranks for part in parts]
            self.outputs = [part for _, parts in ranks for part in parts]
