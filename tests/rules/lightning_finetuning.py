"""The same job done with Lightning's fine-tuning callbacks, as their documentation shows them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from graft.training.build import build
from tests.conftest import TINY, compose
from tests.rules.watch import WatchEpochs

UNFREEZE_AT, EPOCHS, LR = 2, 5, 0.05


class Classifier(L.LightningModule):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.backbone(batch["input"])), batch["label"])

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.head.parameters(), lr=LR, momentum=0.9)


class UnfreezeBlocks(BaseFinetuning):
    """Each block with a rate of its own; BatchNorm is frozen too."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(
        self, pl_module: L.LightningModule, epoch: int, optimizer: Optimizer
    ) -> None:
        if epoch != UNFREEZE_AT:
            return
        for depth, block in enumerate(reversed(pl_module.backbone.blocks)):  # type: ignore[union-attr, arg-type]
            self.unfreeze_and_add_param_group(block, optimizer, lr=LR * 0.5**depth)


CALLBACKS: dict[str, Callable[[], BaseFinetuning]] = {
    "BaseFinetuning": UnfreezeBlocks,
    "BackboneFinetuning": lambda: BackboneFinetuning(UNFREEZE_AT, backbone_initial_lr=LR),
}


def train(callback: str, folder: Path, *, ranks: int = 1, checkpoint: Path | None = None) -> None:
    L.seed_everything(0, verbose=False)
    built, datamodule = build(compose(*TINY, f"data.batch_size={8 // ranks}"))
    datamodule.start_stage(0, augment=False)
    several: dict[str, Any] = {"strategy": "ddp"} if ranks > 1 else {}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        max_epochs=EPOCHS,
        callbacks=[
            CALLBACKS[callback](),
            WatchEpochs(str(folder), UNFREEZE_AT),
            ModelCheckpoint(folder, "last", enable_version_counter=False),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the datamodule's order knows the ranks
        **several,
    )
    trainer.fit(Classifier(built.backbone, built.head), datamodule=datamodule, ckpt_path=checkpoint)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]), ranks=int(sys.argv[3]))
