"""The LightningModule most projects start from, on images and, as a Hydra job, on features.

Two torchmetrics with a full forward and a log call each in every step, a progress bar, a
checkpoint, TensorBoard, the default sampler. `python bench/baselines_lightning.py -m lr=...
features=FILE out=FILE` is a sweep of it; each job appends a line of JSON to `out`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.plan.schedules import cosine, one_cycle


class EpochClock(L.Callback):
    """Writes the seconds of each epoch's training batches.

    For both sides: Graft takes it as `+callbacks.clock._target_=baselines_lightning.EpochClock`.
    """

    epochs_only = True  # Graft may take several steps in a batch

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.file.write_text(json.dumps(self.seconds))


class FirstStep(L.Callback):
    """Writes when the first training step was done."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, *arguments: Any) -> None:
        if not self.file.exists():
            self.file.write_text(json.dumps(time.time()))


class Conventional(L.LightningModule):
    def __init__(
        self,
        net: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        schedule: Callable[[int, int], float],
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

        self.net = net
        self.make_optimizer = make_optimizer
        self.schedule = schedule
        self.smoothing = smoothing
        self.losses = nn.ModuleDict({f"{k}_loss": MeanMetric() for k in ("train", "val", "test")})
        self.accuracies = nn.ModuleDict(
            {f"{k}_acc": MulticlassAccuracy(10, average="micro") for k in ("train", "val", "test")}
        )

    def _step(self, batch: tuple[Tensor, Tensor], split: str) -> Tensor:
        inputs, labels = batch
        logits = self.net(inputs)
        loss = F.cross_entropy(
            logits, labels, label_smoothing=self.smoothing if split == "train" else 0.0
        )
        mean: Any = self.losses[f"{split}_loss"]
        accuracy: Any = self.accuracies[f"{split}_acc"]
        mean(loss)
        accuracy(logits.argmax(1), labels)
        self.log(f"{split}/loss", mean, on_step=False, on_epoch=True, prog_bar=True)
        self.log(f"{split}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "test")

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.net)
        total = int(self.trainer.estimated_stepping_batches)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: self.schedule(s, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def run(
    module: Conventional,
    parts: dict[str, Any],
    epochs: int,
    out: Path,
    clock: EpochClock | None = None,
    clip: float | None = None,
) -> dict[str, float]:
    """Fit, test the best checkpoint. Returns val and test accuracy in percent."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    best = ModelCheckpoint(out / "checkpoints", monitor="val/acc", mode="max", save_last=True)
    trainer = L.Trainer(
        max_epochs=epochs,
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        callbacks=[best, *([clock] if clock else [])],
        logger=TensorBoardLogger(str(out), name=None),
        gradient_clip_val=clip,
    )
    trainer.fit(module, parts["train"], parts["val"])
    tested = trainer.test(module, parts["test"], ckpt_path="best", verbose=False)[0]
    assert best.best_model_score is not None
    return {"val": 100 * float(best.best_model_score), "accuracy": 100 * tested["test/acc"]}


def finetune(a: argparse.Namespace) -> dict[str, float]:
    """All of a network on images, by PIL transforms in two workers."""
    from baselines_parts import CLASSES, folders, loaders, network, sgd

    net = network(a.model, a.weights, CLASSES)[0]
    clock = EpochClock(str(a.out / "epochs.json"))
    parts = loaders(folders(a.images, a.size, augment=True), a.batch)
    result = run(Conventional(net, sgd, one_cycle, 0.1), parts, a.epochs, a.out, clock, clip=5.0)
    return {"accuracy": result["accuracy"], "seconds": median(clock.seconds[1:] or clock.seconds)}


@dataclass
class Job:
    features: str = "???"
    out: str = "???"
    lr: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0
    epochs: int = 10
    batch: int = 512


def sweep() -> None:
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from torch.utils.data import TensorDataset

    from baselines_parts import adamw, linear_head, loaders

    ConfigStore.instance().store("job", Job)

    @hydra.main(version_base="1.3", config_path=None, config_name="job")
    def job(config: Any) -> float:
        L.seed_everything(config.seed, verbose=False)
        data = torch.load(config.features)
        parts = loaders({k: TensorDataset(x, y) for k, (x, y) in data.items()}, config.batch, 0)
        make = partial(adamw, lr=config.lr, decay=config.weight_decay)
        head = linear_head(data["train"][0].shape[1])
        module = Conventional(head, make, partial(cosine, warmup=0.05))
        result = run(module, parts, config.epochs, Path(HydraConfig.get().runtime.output_dir))
        with Path(config.out).open("a") as file:
            file.write(json.dumps(result) + "\n")
        return result["val"]

    job()


if __name__ == "__main__":
    sweep()
