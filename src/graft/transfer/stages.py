"""A transfer plan is an ordered list of stages; each is its own fit on the same module."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer

from graft.data.features import extract
from graft.heads import Standardize
from graft.loggers import advance
from graft.transfer.freeze import NormPolicy, Trainable
from graft.transfer.schedules import Schedule

if TYPE_CHECKING:
    from graft.data.datamodule import TransferDataModule
    from graft.module import TransferModule


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
    on_stage: Callable[[Stage], None] = lambda stage: None,
) -> list[StageResult]:
    """Fit the stages in order; each ends with the weights of its best `val/acc`.

    Separate fits, rather than unfreezing within one, because DDP learns what trains when it wraps
    the module: what is unfrozen later is never synchronised.
    """
    results = []
    for index, stage in enumerate(stages):
        started = time.perf_counter()
        module.start_stage(stage)
        best, last = _checkpoints(checkpoints / stage.name)
        on_stage(stage)
        trainer = make_trainer(stage, [best, last, StartStage(stage, index, datamodule)])
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

    def __init__(self, stage: Stage, index: int, datamodule: TransferDataModule) -> None:
        self.stage = stage
        self.index = index
        self.datamodule = datamodule

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = cast("TransferModule", pl_module)
        module.to(trainer.strategy.root_device)
        features = stored_features(module, self.datamodule, self.stage)
        self.datamodule.start_stage(self.index, augment=self.stage.augment, features=features)
        _measure_head(module, self.datamodule)


def load_checkpoint(module: TransferModule, path: Path) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict(state)


def stored_features(
    module: TransferModule, datamodule: TransferDataModule, stage: Stage
) -> Mapping[str, Tensor]:
    """Outputs of the frozen prefix for train and val, where the stage can train from them."""
    blocks = module.backbone.blocks
    if stage.cache not in ("auto", "on", "off"):
        raise ValueError(f"cache={stage.cache}: must be auto, on or off")
    if stage.cache == "off":
        return {}
    reason = None
    if module.cut == 0:
        reason = "its first block learns"
    elif stage.augment and datamodule.augment is not None:
        reason = "it augments the images"
    elif module.backbone.taps is not None and module.cut < len(blocks):
        reason = "taps need the earlier blocks"
    if reason is None:
        gigabytes = _features_gb(module, datamodule)
        if gigabytes > stage.cache_limit_gb:
            reason = f"its outputs would take {gigabytes:.1f} GB (cache_limit_gb)"
    if reason is not None:
        if stage.cache == "on":
            raise ValueError(f"stage {stage.name}: cache=on is not possible: {reason}")
        return {}

    return {split: _extract(module, datamodule, split, module.cut) for split in ("train", "val")}


def _prefix(module: TransferModule, cut: int) -> Callable[[Tensor], Tensor]:
    backbone = module.backbone
    return backbone if cut == len(backbone.blocks) else backbone.blocks[:cut]


def _features_gb(module: TransferModule, datamodule: TransferDataModule) -> float:
    size = datamodule.preprocessing.crop_size
    blank = torch.zeros(1, 3, size, size, device=module.device)
    was_training = module.training
    module.eval()
    with torch.inference_mode():
        width = _prefix(module, module.cut)(blank).numel()
    module.train(was_training)
    return width * 4 * (len(datamodule.splits["train"]) + len(datamodule.splits["val"])) / 1e9


def _extract(
    module: TransferModule, datamodule: TransferDataModule, split: str, cut: int
) -> Tensor:
    """Un-augmented outputs of `blocks[:cut]` for a whole split, in its order."""
    was_training = module.training
    module.eval()
    batches = (
        datamodule.transform({k: v.to(module.device) for k, v in batch.items()}, augment=False)
        for batch in datamodule.full_loader(split)
    )
    features = extract(_prefix(module, cut), batches, len(datamodule.splits[split]))
    module.train(was_training)
    return features


def _measure_head(module: TransferModule, datamodule: TransferDataModule) -> None:
    """Fix the head's feature statistics on the training images, once in a plan."""
    norm = module.head.norm
    if not isinstance(norm, Standardize) or norm.measured:
        return
    stored = datamodule.features.get("train")
    if stored is None or module.cut < len(module.backbone.blocks):
        stored = _extract(module, datamodule, "train", len(module.backbone.blocks))
    norm.measure(stored)
