"""A transfer plan is an ordered list of stages; each is its own fit on the same module."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from graft.data.draws import sample_seed
from graft.loggers import advance
from graft.transfer.checkpoint import BEST, LAST, is_final, load_checkpoint, replace_weights
from graft.transfer.ema import EMA
from graft.transfer.freeze import NormPolicy, Trainable
from graft.transfer.grid import Grid, finish_grid, start_grid
from graft.transfer.last_checkpoint import LastCheckpoint, explain_restoring
from graft.transfer.lora import LoRA
from graft.transfer.results import Resumed, StageResult
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


MakeTrainer = Callable[[Stage, list[L.Callback]], L.Trainer]


def run_stages(
    module: TransferModule,
    datamodule: TransferDataModule,
    stages: Sequence[Stage],
    make_trainer: MakeTrainer,
    checkpoints: Path,
    *,
    new_store: NewStore,
    new_last: Callable[[Path], LastCheckpoint] = LastCheckpoint,
    resumed: Resumed | None = None,
    on_stage: Callable[[Stage], None] = lambda stage: None,
    on_result: Callable[[StageResult], None] = lambda result: None,
) -> list[StageResult]:
    """Fit the stages in order; each ends with the weights of its best `val/acc`.

    Args:
        new_store: called with (module, datamodule, stage, precision=...) for its stored features.
        new_last: called with a stage's folder, for what saves its `last.ckpt`.

    Separate fits, rather than unfreezing within one, because DDP learns what trains when it wraps
    the module: what is unfrozen later is never synchronised.
    """
    if any(stage.l2_sp for stage in stages):
        module.remember_pretrained()
    resumed = resumed or Resumed()
    results = list(resumed.done)
    for index, stage in enumerate(stages):
        started = time.perf_counter()
        seed_stage(datamodule.seed, index)
        module.start_stage(stage)
        if index < len(resumed.done):
            module.finish_stage()
            load_checkpoint(module, results[index].best_checkpoint)
            continue
        if stage.grid is not None:
            start_grid(module, stage.grid, datamodule.num_classes)
        on_stage(stage)
        start = StartStage(stage, index, datamodule, new_store)
        folder = checkpoints / stage.name
        if stage.solver == "sgd":
            checkpoint = resumed.checkpoint if index == len(resumed.done) else None
            last = new_last(folder)
            result = _fit(module, datamodule, stage, start, last, make_trainer, checkpoint)
        else:
            result = _solve(module, datamodule, stage, start, make_trainer, folder)
        result.seconds = time.perf_counter() - started
        on_result(result)
        results.append(result)
    return results


def _fit(
    module: TransferModule,
    datamodule: TransferDataModule,
    stage: Stage,
    start: StartStage,
    last: LastCheckpoint,
    make_trainer: MakeTrainer,
    checkpoint: Path | None,
) -> StageResult:
    best = ModelCheckpoint(
        last.folder, "best", monitor="val/acc", mode="max", enable_version_counter=False
    )
    average = [EMA(stage.ema)] if stage.ema else []
    trainer = make_trainer(stage, [last, best, start, *average])
    if checkpoint is not None:
        explain_restoring(trainer, checkpoint)
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if best.best_model_score is None:
        raise RuntimeError(f"stage {stage.name} ended without a checkpoint")
    path = Path(best.best_model_path)
    result = StageResult(stage.name, path, float(best.best_model_score), steps=trainer.global_step)
    _keep_best(module, stage, trainer, result)
    advance(trainer.loggers, result.steps)
    return result


def _keep_best(
    module: TransferModule, stage: Stage, trainer: L.Trainer, result: StageResult
) -> None:
    """The best weights in the module, and in `best.ckpt` those that the stage ends with."""
    path = result.best_checkpoint
    final = is_final(path)  # this stage had come to here before, and was not recorded as done
    if not final:
        load_checkpoint(module, path)
    if stage.grid is not None:
        result.grid = finish_grid(module)
        result.head = result.grid.row(result.grid.ranked()[0])
    module.finish_stage()
    if final:
        load_checkpoint(module, path)
    elif stage.grid is not None or stage.lora is not None:
        trainer.strategy.barrier()  # every rank has read the weights it was trained with
        if trainer.is_global_zero:
            replace_weights(path, module, **({"head": result.head} if result.head else {}))
        trainer.strategy.barrier()


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
    for name in (LAST, BEST):
        trainer.save_checkpoint(folder / name)
    advance(trainer.loggers, 1)
    head = {**solve.chosen, **metrics}
    return StageResult(stage.name, folder / BEST, metrics["val/acc"], steps=1, head=head)


def seed_stage(seed: int, index: int, rank: int = 0) -> None:
    """What a stage draws (new weights, dropout) depends on nothing that ran before it."""
    L.seed_everything(sample_seed(seed, index, rank) % 2**32, workers=True, verbose=False)


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
        seed_stage(self.datamodule.seed, self.index, trainer.global_rank)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        torch.set_num_threads(self.threads)  # `teardown` is not called

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        torch.set_num_threads(self.threads)
