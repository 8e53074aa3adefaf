"""A transfer plan is an ordered list of stages; each is its own fit on the same module."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning as L
import numpy as np
import torch

from graft.features.store import FeatureStore
from graft.models.heads import Standardize
from graft.plan.freeze import MOVING
from graft.plan.results import BEST, LAST, Resumed, StageResult
from graft.plan.stage import Stage
from graft.reporting.loggers import advance
from graft.storage.stored import StoredFeatures
from graft.training.adabn import estimate_statistics
from graft.training.best import Best
from graft.training.checkpoint import is_final, load_checkpoint, replace_weights
from graft.training.ema import EMA
from graft.training.last_checkpoint import LastCheckpoint, explain_restoring, restoring
from graft.training.probe import watching
from graft.training.solvers import Solve
from graft.training.trainer import steps_per_batch
from graft.transforms.draws import sample_seed

if TYPE_CHECKING:
    from graft.data.datamodule import TransferDataModule
    from graft.training.module import TransferModule

NewStore = Callable[..., FeatureStore]
SMALL_STEP = 1e9
"""FLOP below which a step on stored features runs on one thread: to split it gains little, and on
a busy machine each of its barriers waits for a core (measured: 10 times slower)."""
CLEAN_PIXELS = 2**24
"""Of the images that BatchNorm statistics are estimated on: 16,384 at 32 px, 334 at 224 px."""

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
    """Fit the stages in order; each ends with the weights of its best validation.

    Args:
        new_store: called with (backbone, cut, datamodule, stage, device=...), for its features.
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
            module.start_grid(stage.grid, datamodule.num_classes)
        on_stage(stage)
        checkpoint = resumed.checkpoint if index == len(resumed.done) else None
        start = StartStage(stage, index, datamodule, new_store, resumed=checkpoint)
        folder = checkpoints / stage.name
        if stage.solver == "sgd":
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
    best = Best(last.folder / BEST, module.task.monitor, module.task.mode)
    average = [EMA(stage.ema)] if stage.ema else []
    watch = watching(module.task, datamodule)
    trainer = make_trainer(stage, [last, best, start, *average, *watch])
    if checkpoint is not None:
        explain_restoring(trainer, checkpoint)
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if best.score is None:
        raise RuntimeError(f"stage {stage.name} ended without a checkpoint")
    result = StageResult(stage.name, best.path, best.score, steps=trainer.global_step)
    result.oracle = best.oracle
    _keep_best(module, datamodule, stage, trainer, result)
    advance(trainer.loggers, result.steps)
    return result


def _keep_best(
    module: TransferModule,
    datamodule: TransferDataModule,
    stage: Stage,
    trainer: L.Trainer,
    result: StageResult,
) -> None:
    """The best weights in the module, and in `best.ckpt` those that the stage ends with."""
    path = result.best_checkpoint
    final = is_final(path)  # this stage had come to here before, and was not recorded as done
    if not final:
        load_checkpoint(module, path)
    if stage.grid is not None:
        result.grid = module.finish_grid()
        result.head = result.grid.row(result.grid.ranked()[0])
    module.finish_stage()
    if final:
        load_checkpoint(module, path)
    elif stage.grid is not None or stage.lora is not None or stage.adabn or module.task.pretrains:
        if stage.adabn:
            _estimate_norms(module, datamodule, "val_target", trainer)
        trainer.strategy.barrier()  # every rank has read the weights it was trained with
        if trainer.is_global_zero:
            if module.task.pretrains and stage.norm in MOVING:  # rule 22: noise was for training
                _estimate_norms(module, datamodule, "train", trainer)
            replace_weights(path, module, **({"head": result.head} if result.head else {}))
        trainer.strategy.barrier()
        if module.task.pretrains:
            load_checkpoint(module, path)


def _estimate_norms(
    module: TransferModule,
    datamodule: TransferDataModule,
    split: str,
    trainer: L.Trainer,
) -> None:
    """BatchNorm statistics of a split's images as they are, exact for all of them, or for evenly
    chosen ones where there are too many to hold: what goes from block to block is in memory.
    """
    device, most = trainer.strategy.root_device, max(1, CLEAN_PIXELS // datamodule.inputs.size**2)
    total, size = len(datamodule.splits[split]), datamodule.eval_batch_size
    rows = np.linspace(0, total - 1, min(total, most)).astype(np.int64)
    batches = [
        datamodule.prepared(split, rows[start : start + size], device)
        for start in range(0, len(rows), size)
    ]
    estimate_statistics(module.to(device).backbone, batches, module.head)


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
    metrics = trainer.validate(module, datamodule=datamodule, verbose=False)[0]
    if trainer.interrupted:
        raise KeyboardInterrupt
    folder = trainer.strategy.broadcast(folder)  # the run's folder is known to the first rank
    if stage.adabn:
        _estimate_norms(module, datamodule, "val_target", trainer)
    for name in (LAST, BEST):
        trainer.save_checkpoint(folder / name)
    advance(trainer.loggers, 1)
    head = {**solve.chosen, **metrics}
    score, oracle = metrics[module.task.monitor], metrics.get("oracle/acc")
    return StageResult(stage.name, folder / BEST, score, steps=1, head=head, oracle=oracle)


def seed_stage(seed: int, index: int, rank: int = 0) -> None:
    """What a stage draws (new weights, dropout) depends on nothing that ran before it."""
    L.seed_everything(sample_seed(seed, index, rank) % 2**32, workers=True, verbose=False)


class StartStage(L.Callback):
    """Hands the datamodule its stage and stored features, once every rank's device is known.

    Args:
        resumed: the checkpoint that the stage goes on from.
    """

    def __init__(
        self,
        stage: Stage,
        index: int,
        datamodule: TransferDataModule,
        new_store: NewStore,
        resumed: Path | None = None,
    ) -> None:
        self.resumed = resumed
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
        data = self.datamodule
        module.val_splits, module.tested = data.val_splits, data.tested
        tested = stage == "test"
        splits = (data.tested,) if tested else (*data.streams, *data.val_splits)
        limits = [
            getattr(trainer, f"limit_{split}_batches")
            for split in (("test",) if tested else ("train", "val"))
        ]
        store = self.new_store(
            module.backbone,
            module.cut,
            self.datamodule,
            self.stage,
            device=module.device,
            precision=trainer.precision_plugin,
            limited=any(limit != 1.0 or isinstance(limit, int) for limit in limits),
        )
        features = store.features(splits)
        self.datamodule.features = dict(features)
        if stage != "test":
            measure_head(module, store, features.get("train"))
        head_alone = bool(features) and module.cut == len(module.backbone.blocks)
        work = 6 * self.datamodule.batch_size * sum(p.numel() for p in module.head.parameters())
        small = work < SMALL_STEP
        if head_alone and small:
            torch.set_num_threads(1)
        quick = small or module.device.type == "cuda"
        if head_alone and stage == "fit" and (quick or self.resumed is not None):
            self._take_several_steps(trainer, module)
        seed_stage(self.datamodule.seed, self.index, trainer.global_rank)

    def _take_several_steps(self, trainer: L.Trainer, module: TransferModule) -> None:
        steps = steps_per_batch(trainer)
        if self.resumed is not None:  # the counters there are of batches
            with restoring(self.resumed):
                saved = torch.load(self.resumed, weights_only=True, mmap=True)["resume"]
                steps = int(saved.get("steps_per_batch", 1))
                if steps < 1:
                    raise ValueError(f"steps_per_batch is {steps}")
        module.take_several_steps(steps, len(self.datamodule.order("train", train=True)))
        self.datamodule.steps_per_batch = steps

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        torch.set_num_threads(self.threads)  # `teardown` is not called

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        torch.set_num_threads(self.threads)


def measure_head(
    module: TransferModule, store: FeatureStore, stored: StoredFeatures | None
) -> None:
    """Fix the head's feature statistics on the training images, once in a plan."""
    norm = module.head.norm
    if not isinstance(norm, Standardize) or norm.measured:
        return
    if stored is None:
        norm.measure(store.backbone_features("train"))
        return
    was_training = module.training
    module.eval()
    with torch.no_grad():
        norm.measure(
            module.backbone.forward_from(module.cut, part.to(module.device))
            for part in stored.blocks()
        )
    module.train(was_training)
