"""What a pretraining run shows of its encoder on the way: an online score, and restored images."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from graft.models.heads import LinearHead, Standardize
from graft.reporting.tensorboard import log_restored
from graft.tasks.base import Task
from graft.tasks.pretraining import Pretraining, Restoring
from graft.training.solvers import ridge

if TYPE_CHECKING:
    from graft.data.datamodule import TransferDataModule
    from graft.training.module import TransferModule

LARGEST = 4000  # images of a score
SHARE = 0.08  # of the forward passes of training images since the last one: below 3 % of the time
SHOWN = 8


def watching(task: Task, datamodule: TransferDataModule) -> list[L.Callback]:
    """Callbacks of a fit; none for a task that does not pretrain.

    Raises:
        ValueError: a score is asked for, and the data has no classes.
    """
    callbacks: list[L.Callback] = []
    if isinstance(task, Pretraining) and task.probe:
        if len(np.unique(datamodule.splits["train"].labels)) < 2:
            raise ValueError(
                f"task.probe={task.probe}: this data has no classes to score features by: set "
                "task.probe=0"
            )
        callbacks.append(OnlineProbe(datamodule, task.probe))
    return [*callbacks, ShowRestored(datamodule)] if isinstance(task, Restoring) else callbacks


class OnlineProbe(L.Callback):
    """val/probe_acc: accuracy on validation images of a ridge on features of training images.

    Every rank computes it, on the same images; no weight depends on it.
    """

    def __init__(self, datamodule: TransferDataModule, every: int) -> None:
        self.datamodule, self.every = datamodule, every

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if trainer.state.fn != TrainerFn.FITTING or (
            epoch % self.every and epoch != trainer.max_epochs
        ):
            return
        with trainer.precision_plugin.forward_context():
            score = self.score(cast("TransferModule", pl_module))
        pl_module.log("val/probe_acc", score, sync_dist=True)

    @torch.no_grad()
    def score(self, module: TransferModule) -> float:
        data = self.datamodule
        most = min(LARGEST, int(SHARE * self.every * len(data.splits["train"])))
        train, labels = self._features(module, "train", max(10, most // 2))
        val, truth = self._features(module, "val", max(10, most // 2))
        with torch.random.fork_rng(devices=[]):  # training draws as if nobody had looked
            head = LinearHead(train.shape[1], data.num_classes, norm="standardize")
        head = head.to(module.device)
        cast("Standardize", head.norm).measure([train])
        chooses = torch.arange(len(labels), device=labels.device) % 5 == 4
        _, weight, bias = ridge(
            head, (train[~chooses], labels[~chooses]), (train[chooses], labels[chooses])
        )
        logits = head.norm(val.double()) @ weight.T + bias
        return float((logits.argmax(1) == truth).double().mean())

    def _features(self, module: TransferModule, split: str, images: int) -> tuple[Tensor, Tensor]:
        """Of evenly chosen images of a split, with their labels."""
        data = self.datamodule
        total, size = len(data.splits[split]), data.eval_batch_size
        rows = np.linspace(0, total - 1, min(images, total)).astype(np.int64)
        features = [
            module.backbone(data.prepared(split, rows[at : at + size], module.device)).float()
            for at in range(0, len(rows), size)
        ]
        labels = torch.from_numpy(data.splits[split].labels[rows])
        return torch.cat(features), labels.to(module.device)


class ShowRestored(L.Callback):
    """Validation images as they are, corrupted and restored, after epochs 1, 2, 4, 8, ..."""

    def __init__(self, datamodule: TransferDataModule) -> None:
        self.datamodule = datamodule

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch, data = trainer.current_epoch + 1, self.datamodule
        due = epoch & (epoch - 1) == 0 or epoch == trainer.max_epochs
        if not due or trainer.state.fn != TrainerFn.FITTING or not trainer.loggers:
            return
        module, total = cast("TransferModule", pl_module), len(data.splits["val"])
        rows = np.linspace(0, total - 1, min(SHOWN, total)).astype(np.int64)
        batch = {
            "input": data.prepared("val", rows, module.device),
            "index": torch.from_numpy(rows).to(module.device),
        }
        shown = cast("Restoring", module.task).pictures(module, batch)
        log_restored(trainer.loggers, data, shown, trainer.global_step)
