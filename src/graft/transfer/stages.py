"""A transfer plan is an ordered list of stages; each is its own fit on the same module."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from graft.loggers import advance
from graft.transfer.checkpoint import load_checkpoint, replace_weights
from graft.transfer.ema import EMA
from graft.transfer.freeze import NormPolicy, Trainable
from graft.transfer.grid import Grid, GridRecord, finish_grid, start_grid
from graft.transfer.lora import LoRA
from graft.transfer.schedules import Schedule
from graft.transfer.solvers import Solve, Solver
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
        trainable: the part of the backbone that learns; see `learning_parameters`.
        train_head: whether the head learns too.
        norm: BatchNorm of the learning blocks: "train", "stats" (statistics move, affine fixed),
            "affine" (the reverse) or "frozen" (both fixed).
        augment: whether training images are augmented, or how: what differs from `data.augment`.
        image_size: side in px of this stage's images, in training and evaluation; None is the
            data's own.
        label_smoothing: if other than the run's.
        cache: compute what is frozen once. "auto": where the stage does not augment and the
            outputs fit `cache_limit_gb`; "on": or else refuse; "off": recompute every epoch.
        cache_dtype: "float32", or "float16" for half the size.
        views: of each training image: "none" (the image), "flip" (its mirror image too) or a
            number of random augmentations, all of which can be stored; each epoch draws one.
        optimizer: called with (parameter groups, lr=...).
        solver: "sgd" (a fit with `optimizer`), or "ridge" or "lbfgs" for a linear head on stored
            features. lbfgs: `epochs` is its largest number of iterations, `weight_decay` its
            strength, and `lr`, `optimizer` and `schedule` say nothing.
        strengths: those that ridge tries; None for 30 around the scale of the features.
        grid: heads that train together in place of the module's own; the best becomes its head.
        layer_decay, head_lr_scale, decay_norm_and_bias: see `param_groups`.
        lora: low-rank adapters in place of the weights that `trainable` chooses.
        l2_sp: strength of the penalty towards the pretrained backbone, l2_sp / 2 * |w - w0|^2, in
            place of its weight decay (Li et al. 2018).
        ema: decay of a moving average of the weights, which is what is validated and kept; 0: none.
    """

    name: str
    epochs: int
    optimizer: Callable[..., Optimizer]
    schedule: Schedule
    lr: float
    trainable: Trainable = "all"
    train_head: bool = True
    norm: NormPolicy = "train"
    augment: bool | Mapping[str, Any] = True
    image_size: int | None = None
    label_smoothing: float | None = None
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    head_lr_scale: float = 1.0
    decay_norm_and_bias: bool = False
    lora: LoRA | None = None
    l2_sp: float = 0.0
    ema: float = 0.0
    cache: str = "auto"
    cache_limit_gb: float = 4.0
    cache_dtype: str = "float32"
    views: str | int = "none"
    solver: Solver = "sgd"
    strengths: Sequence[float] | None = None
    grid: Grid | None = None


@dataclass
class StageResult:
    """`head`: hyper-parameters the stage chose; `grid`: scores of all its heads, if it had many."""

    name: str
    best_checkpoint: Path
    best_score: float
    seconds: float = 0.0
    head: dict[str, Any] = field(default_factory=dict)
    grid: GridRecord | None = None


MakeTrainer = Callable[[Stage, list[L.Callback]], L.Trainer]


def run_stages(
    module: TransferModule,
    datamodule: TransferDataModule,
    stages: Sequence[Stage],
    make_trainer: MakeTrainer,
    checkpoints: Path,
    *,
    new_store: NewStore,
    on_stage: Callable[[Stage], None] = lambda stage: None,
    on_result: Callable[[StageResult], None] = lambda result: None,
) -> list[StageResult]:
    """Fit the stages in order; each ends with the weights of its best `val/acc`.

    Args:
        new_store: called with (module, datamodule, stage, precision=...) for its stored features.

    Separate fits, rather than unfreezing within one, because DDP learns what trains when it wraps
    the module: what is unfrozen later is never synchronised.
    """
    if any(stage.l2_sp for stage in stages):
        module.remember_pretrained()
    results = []
    for index, stage in enumerate(stages):
        started = time.perf_counter()
        module.start_stage(stage)
        if stage.grid is not None:
            start_grid(module, stage.grid, datamodule.num_classes)
        on_stage(stage)
        start = StartStage(stage, index, datamodule, new_store)
        fit = _fit if stage.solver == "sgd" else _solve
        result = fit(module, datamodule, stage, start, make_trainer, checkpoints / stage.name)
        result.seconds = time.perf_counter() - started
        on_result(result)
        results.append(result)
    return results


def _fit(
    module: TransferModule,
    datamodule: TransferDataModule,
    stage: Stage,
    start: StartStage,
    make_trainer: MakeTrainer,
    folder: Path,
) -> StageResult:
    best, last = _checkpoints(folder)
    average = [EMA(stage.ema)] if stage.ema else []
    trainer = make_trainer(stage, [best, last, start, *average])
    trainer.fit(module, datamodule=datamodule)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if best.best_model_score is None:
        raise RuntimeError(f"stage {stage.name} ended without a checkpoint")
    path = Path(best.best_model_path)
    load_checkpoint(module, path)
    result = StageResult(stage.name, path, float(best.best_model_score))
    if stage.grid is not None:
        result.grid = finish_grid(module, trainer.strategy.barrier, path)
        result.head = result.grid.row(result.grid.ranked()[0])
    if stage.lora is not None:
        module.finish_stage()
        if trainer.is_global_zero:
            replace_weights(path, module)
        trainer.strategy.barrier()
    advance(trainer.loggers, trainer.global_step)
    return result


def _solve(
    module: TransferModule,
    datamodule: TransferDataModule,
    stage: Stage,
    start: StartStage,
    make_trainer: MakeTrainer,
    folder: Path,
) -> StageResult:
    """As a fit would leave it: the head solved, val metrics logged, best.ckpt and last.ckpt."""
    solve = Solve(datamodule, stage)
    trainer = make_trainer(stage, [start, solve])  # both act in `setup`, in this order
    (metrics,) = trainer.validate(module, datamodule=datamodule, verbose=False)
    if trainer.interrupted:
        raise KeyboardInterrupt
    for metric in (module.val_loss, module.val_acc):
        metric.reset()  # or a later fit meets tensors of `validate`'s inference mode
    folder = trainer.strategy.broadcast(folder)  # the run's folder is known to the first rank
    for name in ("last.ckpt", "best.ckpt"):
        trainer.save_checkpoint(folder / name)
    return StageResult(
        stage.name, folder / "best.ckpt", metrics["val/acc"], head={**solve.chosen, **metrics}
    )


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
        self.threads = torch.get_num_threads()  # the launcher has divided the cores by now
        self.datamodule.start_stage(
            self.index,
            augment=self.stage.augment,
            image_size=self.stage.image_size,
            views=self.stage.views,
        )
        splits = ("test",) if stage == "test" else ("train", "val")
        limits = [getattr(trainer, f"limit_{split}_batches") for split in splits]
        store = self.new_store(
            module,
            self.datamodule,
            self.stage,
            precision=trainer.precision_plugin,
            limited=any(limit != 1.0 or isinstance(limit, int) for limit in limits),
        )
        features = store.features(splits)
        self.datamodule.features = dict(features)
        if stage != "test":
            measure_head(module, store, features.get("train"))
        head_alone = bool(features) and module.cut == len(module.backbone.blocks)
        work = 6 * self.datamodule.batch_size * sum(p.numel() for p in module.head.parameters())
        if head_alone and work < SMALL_STEP:
            torch.set_num_threads(1)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        torch.set_num_threads(self.threads)  # `teardown` is not called

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        torch.set_num_threads(self.threads)
