"""A transfer plan is an ordered list of stages; each is its own fit on the same module."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from graft.loggers import advance
from graft.transfer.freeze import NormPolicy, Trainable
from graft.transfer.schedules import Schedule
from graft.transfer.stored import FeatureStore, measure_head

if TYPE_CHECKING:
    from graft.data.datamodule import TransferDataModule
    from graft.module import TransferModule

NewStore = Callable[..., FeatureStore]
SMALL_STEP = 1e9
"""FLOP below which a step on stored features runs on one thread: to split it gains little, and on
a busy machine each of its barriers waits for a core (measured: 10 times slower)."""


@dataclass
class Stage:
    """One fit: what learns, for how long, with what optimizer.

    Args:
        trainable: "head", "all", a number of top blocks, or block names.
        norm: BatchNorm of the learning blocks: "train", "stats" (statistics move, affine fixed) or
            "frozen" (both fixed).
        augment: whether training images are augmented.
        cache: compute what is frozen once. "auto": where the stage does not augment and the
            outputs fit `cache_limit_gb`; "on": or else refuse; "off": recompute every epoch.
        cache_dtype: "float32", or "float16" for half the size.
        views: what is stored of each training image: "none" (the image), "flip" (its mirror image
            too) or a number of random augmentations; each epoch draws one of them.
        optimizer: called with (parameter groups, lr=...).
        layer_decay, head_lr_scale, decay_norm_and_bias: see `param_groups`.
    """

    name: str
    epochs: int
    optimizer: Callable[..., Optimizer]
    schedule: Schedule
    lr: float
    trainable: Trainable = "all"
    norm: NormPolicy = "train"
    augment: bool = True
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    head_lr_scale: float = 1.0
    decay_norm_and_bias: bool = False
    cache: str = "auto"
    cache_limit_gb: float = 4.0
    cache_dtype: str = "float32"
    views: str | int = "none"


@dataclass
class StageResult:
    name: str
    best_checkpoint: Path
    best_score: float
    seconds: float


def run_stages(
    module: TransferModule,
    datamodule: TransferDataModule,
    stages: Sequence[Stage],
    make_trainer: Callable[[Stage, list[L.Callback]], L.Trainer],
    checkpoints: Path,
    *,
    new_store: NewStore,
    on_stage: Callable[[Stage], None] = lambda stage: None,
) -> list[StageResult]:
    """Fit the stages in order; each ends with the weights of its best `val/acc`.

    Args:
        new_store: called with (module, datamodule, stage, precision=...) for its stored features.

    Separate fits, rather than unfreezing within one, because DDP learns what trains when it wraps
    the module: what is unfrozen later is never synchronised.
    """
    results = []
    for index, stage in enumerate(stages):
        started = time.perf_counter()
        module.start_stage(stage)
        best, last = _checkpoints(checkpoints / stage.name)
        on_stage(stage)
        trainer = make_trainer(stage, [best, last, StartStage(stage, index, datamodule, new_store)])
        trainer.fit(module, datamodule=datamodule)
        if trainer.interrupted:
            raise KeyboardInterrupt
        if best.best_model_score is None:
            raise RuntimeError(f"stage {stage.name} ended without a checkpoint")
        path = Path(best.best_model_path)
        load_checkpoint(module, path)
        advance(trainer.loggers, trainer.global_step)
        seconds = time.perf_counter() - started
        results.append(StageResult(stage.name, path, float(best.best_model_score), seconds))
    return results


def _checkpoints(folder: Path) -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """`best.ckpt` by val/acc and `last.ckpt` of every epoch.

    Two callbacks, because `save_last=True` beside a monitor writes only when the best improves.
    """
    return (
        ModelCheckpoint(
            folder, "best", monitor="val/acc", mode="max", enable_version_counter=False
        ),
        ModelCheckpoint(folder, "last", enable_version_counter=False),
    )


class StartStage(L.Callback):
    """Hands the datamodule its stage and stored features, once every rank's device is known."""

    def __init__(
        self, stage: Stage, index: int, datamodule: TransferDataModule, new_store: NewStore
    ) -> None:
        self.stage = stage
        self.index = index
        self.datamodule = datamodule
        self.new_store = new_store
        self.threads = torch.get_num_threads()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = cast("TransferModule", pl_module)
        module.to(trainer.strategy.root_device)
        store = self.new_store(
            module, self.datamodule, self.stage, precision=trainer.precision_plugin
        )
        splits = ("test",) if stage == "test" else ("train", "val")
        features = store.features(splits)
        self.datamodule.start_stage(self.index, augment=self.stage.augment, features=features)
        if stage != "test":
            measure_head(module, store, features.get("train"))
        head_alone = bool(features) and module.cut == len(module.backbone.blocks)
        work = 6 * self.datamodule.batch_size * sum(p.numel() for p in module.head.parameters())
        if head_alone and work < SMALL_STEP:
            torch.set_num_threads(1)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        torch.set_num_threads(self.threads)


def load_checkpoint(module: TransferModule, path: Path) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict(state)
