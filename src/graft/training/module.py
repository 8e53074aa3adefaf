"""TransferModule: a pretrained backbone and a new head, trained for a task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from graft.data.datasets import Batch
from graft.data.loaders import Steps
from graft.models.backbone import Backbone
from graft.models.heads import Head, HeadGrid
from graft.plan.freeze import (
    MOVING,
    batch_norms,
    freeze_for_stage,
    learning_parameters,
    prefix_length,
    set_modes,
)
from graft.plan.grid import Grid, GridRecord
from graft.plan.lora import add_adapters, merge_adapters
from graft.plan.param_groups import param_groups
from graft.plan.stage import Stage
from graft.tasks.base import Tally, Task
from graft.tasks.label_free import label_free
from graft.training.grid import GridFit
from graft.training.per_head import PerHead, grid_groups
from graft.training.steps import mean_of_heads, take_steps


class TransferModule(L.LightningModule):
    """Backbone and head under one of the stages of a transfer plan.

    Call `start_stage` before each `fit`: it decides what learns. A `Batch` has "input", for the
    first block, or "features", stored outputs of the frozen prefix.
    """

    def __init__(self, backbone: Backbone, head: Head, task: Task) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.task = task
        if backbone.channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        # Of the epoch; `unlabelled` are outputs for images of a target.
        self.trained, self.evaluated, self.oracle = Tally(), Tally(), Tally()
        self.unlabelled: list[Tensor] = []
        self.val_splits: Sequence[str] = ("val",)
        self.tested = "test"  # the split
        self.stage: Stage | None = None
        self.learning: Sequence[str] = ()
        self.cut = len(backbone.blocks)
        self.grid: GridFit | None = None  # while the head is a grid of heads
        self.pretrained: dict[str, Tensor] = {}  # of the backbone, for stages with l2_sp
        self.checkpoint_note: dict[str, Any] = {}
        self.steps_per_epoch = 0  # where a batch is of several
        self.total_steps = 0  # of the stage

    def start_stage(self, stage: Stage) -> None:
        """Freeze what the stage does not train; `cut` becomes the first learning block.

        Raises:
            ValueError: a part that matches nothing, or a stage in which nothing learns.
        """
        self.stage = stage
        self.take_several_steps(1, 0)
        names = learning_parameters(self.backbone, stage.trainable)
        self.learning = freeze_for_stage(self.backbone, names, stage.norm)
        self.cut = prefix_length(self.backbone, self.learning)
        if stage.lora is not None:
            self.backbone.requires_grad_(False)
            if add_adapters(self.backbone.blocks, names, stage.lora) == 0:
                raise ValueError(f"lora: no linear layer or convolution in {stage.trainable}")
        self.head.requires_grad_(stage.train_head)
        self.task.start_stage(stage.label_smoothing)
        if not any(p.requires_grad for p in self.parameters()):
            raise ValueError(f"stage {stage.name}: nothing is trainable, neither backbone nor head")
        if stage.l2_sp and not self.pretrained:
            raise RuntimeError("call remember_pretrained before a stage with l2_sp")
        self.train()

    def take_several_steps(self, per_batch: int, per_epoch: int) -> None:
        """Whether a training batch is `Steps`, which needs the number of steps of an epoch."""
        self.automatic_optimization = per_batch == 1
        self.steps_per_epoch = per_epoch if per_batch > 1 else 0

    def finish_stage(self) -> None:
        """Call it with the stage's best weights loaded: its adapters become part of them."""
        merge_adapters(self.backbone.blocks)

    def start_grid(self, grid: Grid, num_classes: int) -> None:
        """The grid becomes the head for a stage."""
        self.head = grid.heads(self.backbone.num_features, num_classes)
        self.grid = GridFit(grid.points, self.task.monitor, self.task.mode)

    def finish_grid(self) -> GridRecord:
        """The winner becomes the head. Call it with the grid's best weights loaded."""
        fit, heads = self.grid, self.head
        if fit is None or not isinstance(heads, HeadGrid):
            raise RuntimeError("call start_grid before finish_grid")
        self.head, self.grid = heads.head(fit.record.ranked()[0]), None
        return fit.record

    def remember_pretrained(self) -> None:
        """Keep the backbone's weights as they are now, for the penalty of stages with l2_sp."""
        parameters = self.backbone.named_parameters()
        self.pretrained = {name: p.detach().clone() for name, p in parameters}

    def train(self, mode: bool = True) -> TransferModule:
        """As `nn.Module.train`, but what is frozen stays in eval whoever asks."""
        super().train(mode)
        if self.stage is not None and mode:
            set_modes(self.backbone, self.learning, self.stage.norm)
            self.head.train(self.stage.train_head)
        return self

    def forward(self, inputs: Any) -> Tensor:
        """What `Inputs.prepare` gives -> (N, num_classes) logits."""
        return self.head(self.backbone(inputs))

    def features(self, batch: Batch) -> Tensor:
        """(N, num_features), of inputs or of what is stored."""
        if "features" in batch:
            return self.backbone.forward_from(self.cut, batch["features"])
        return self.backbone(batch["input"])

    def outputs(self, batch: Batch) -> Tensor:
        """Of the head, for inputs or stored features."""
        return self.head(self.features(batch))

    @property
    def progress(self) -> float:
        """Which part of the stage's steps is done: from 0 to 1."""
        return min(1.0, self.trainer.global_step / max(1, self.total_steps))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if isinstance(batch, Steps):
            take_steps(self.trainer, batch, self.loss)  # the optimizer steps in there
            return None
        loss = self.loss(batch)
        # `self.log` takes as long as a step of a small head: it is called when something is due.
        if self.trainer._logger_connector.should_update_logs:
            self.log("train/loss_step", mean_of_heads(loss), batch_size=1)
        return loss.sum()  # a head's gradient is that of its own loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.is_last_batch and self.grid is None:
            mean = self._mean_trained()  # of all ranks: to average equal values changes nothing
            self.log("train/loss", mean, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def loss(self, batch: Any) -> Tensor:
        """The training loss of a batch, (), or (K,) of a grid; it counts in the epoch's mean."""
        loss = self.task.loss(self, batch)
        images = len(batch.get("train", batch)["label"])
        self.trained.add(loss=loss.detach() * images, images=images)
        return loss

    def _mean_trained(self) -> Tensor:
        sums = self._taken(self.trained)
        return sums["loss"] / sums["images"]

    def _taken(self, tally: Tally) -> dict[str, Tensor]:
        """The sums over all ranks."""

        def reduce(sums: Tensor) -> Tensor:
            return self.trainer.strategy.reduce(sums, reduce_op="sum")

        return tally.take(reduce, self.device)

    def on_fit_start(self) -> None:
        self.pretrained = {name: w.to(self.device) for name, w in self.pretrained.items()}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The gradient of l2_sp / 2 * |w - w_pretrained|^2, before any clipping.

        Here rather than in the loss: it costs one pass over the weights for each step, and is
        exact under accumulation, ranks and loss scaling.
        """
        if self.stage is None or not self.stage.l2_sp:
            return
        learning = {n: p for n, p in self.backbone.named_parameters() if p.grad is not None}
        start = [self.pretrained[name] for name in learning]
        gradients = [p.grad for p in learning.values() if p.grad is not None]
        away = torch._foreach_sub([p.detach() for p in learning.values()], start)
        torch._foreach_add_(gradients, away, alpha=self.stage.l2_sp)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        split = self.val_splits[dataloader_idx]
        if split == "val":
            self.task.evaluate(self, batch, self.evaluated)
            return
        outputs = self.outputs(batch)
        if split == "val_target":
            self.unlabelled.append(outputs)
        else:
            hits = outputs.argmax(-1).movedim(0, -1) == batch["label"]
            self.oracle.add(right=hits.sum(-1), images=len(batch["label"]))

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.task.evaluate(self, batch, self.evaluated)

    def on_validation_epoch_start(self) -> None:  # not earlier: EMA has put its average in here
        self.sync_batch_norms()

    def on_validation_epoch_end(self) -> None:
        # Before any checkpoint is written: a broken model must not become the best one.
        metrics = self._evaluation()
        if self.grid is not None:
            if self.trained.sums:
                metrics["train/loss"] = self._mean_trained()
            metrics = self.grid.end_epoch(metrics, self.current_epoch + 1)
        self._log_metrics(metrics)
        for name in ("val/loss", self.task.monitor):
            if name in metrics and not torch.isfinite(metrics[name]):
                what = "the validation loss" if name == "val/loss" else name
                raise FloatingPointError(
                    f"{what} is {metrics[name].item()} in epoch {self.current_epoch}: lower "
                    "optimizer.lr, add scheduler.warmup or set trainer.gradient_clip_val=1"
                )

    def on_test_epoch_end(self) -> None:
        self._log_metrics(self._evaluation(self.tested))

    def _evaluation(self, split: str = "val") -> dict[str, Tensor]:
        metrics = self.task.metrics(self._taken(self.evaluated)) | self.task.own_values()
        if self.unlabelled:
            metrics |= label_free(self._gathered(torch.cat(self.unlabelled)))
            self.unlabelled = []
        found = {f"{split}/{name}": value for name, value in metrics.items()}
        if self.oracle.sums:
            sums = self._taken(self.oracle)
            found["oracle/acc"] = sums["right"] / sums["images"]
        return found

    def _gathered(self, outputs: Tensor) -> Tensor:
        """Those of all ranks, which may have unequal numbers."""
        if self.trainer.world_size == 1:
            return outputs
        parts: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, outputs.cpu())
        return torch.cat(parts).to(self.device)

    def _log_metrics(self, metrics: dict[str, Tensor]) -> None:
        # Every rank has the same values: they are computed over all.
        self.log_dict({name: value.float() for name, value in metrics.items()}, sync_dist=True)

    def sync_batch_norms(self) -> None:
        """Average the BatchNorm statistics that move over ranks: one model for every rank.

        DDP's own broadcast happens in every forward, also in evaluation, where ranks with unequal
        numbers of batches would wait for each other for ever; it is switched off.
        """
        if self.trainer.world_size > 1:
            for buffer in self.moving_statistics():
                buffer.copy_(self.trainer.strategy.reduce(buffer, reduce_op="mean"))

    def moving_statistics(self) -> list[Tensor]:
        """Means and variances of the BatchNorms that learn: between validations each rank's own."""
        if self.stage is None:
            return []
        moving: list[nn.Module] = [self.head, self.task]
        if self.stage.norm in MOVING:
            moving += [self.backbone.blocks.get_submodule(name) for name in self.learning]
        norms = [norm for module in moving for norm in batch_norms(module)]
        buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        return [buffer for buffer in buffers if buffer is not None]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        stage = self.stage
        if stage is None:
            raise RuntimeError("call start_stage before fitting")
        optimizer = stage.optimizer(self.stage_groups(), lr=stage.lr, **self._fused(stage))
        # By this name a fused optimizer tells that it unscales gradients itself, within its step.
        # Clipping and l2_sp come before that: Lightning then refuses the one, in bf16-mixed too,
        # and the other would meet scaled gradients.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if self.grid is not None:
            optimizer = PerHead(optimizer)
        total = self.steps_per_epoch * stage.epochs or int(self.trainer.estimated_stepping_batches)
        self.total_steps = total
        scheduler = LambdaLR(optimizer, lambda step: stage.schedule(step, total))
        return {
            "optimizer": optimizer,
            # Its rates are logged as lr/GROUP, whatever the optimizer.
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    def _fused(self, stage: Stage) -> dict[str, bool]:
        """One kernel for all of an optimizer's step, where it has one and nobody said otherwise."""
        chosen = stage.optimizer
        kind = chosen.func if isinstance(chosen, partial) else chosen
        named = chosen.keywords if isinstance(chosen, partial) else {}
        # SGD's has no form for parts of weights.
        sharded = isinstance(next(self.backbone.parameters()), DTensor)
        chosen_already = {"fused", "foreach"} & named.keys()
        if kind not in (SGD, Adam, AdamW) or chosen_already or sharded:
            return {}
        return {"fused": self.device.type in ("cpu", "cuda")}

    def stage_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the current stage, each with its own base learning rate."""
        stage = self.stage
        if stage is None:
            raise RuntimeError("call start_stage before asking for parameter groups")
        if self.grid is not None and isinstance(self.head, HeadGrid):
            points = self.grid.record.points
            return grid_groups(
                self.head,
                [stage.head_lr_scale * point.lr for point in points],
                [point.weight_decay for point in points],
                decay_norm_and_bias=stage.decay_norm_and_bias,
            )
        return param_groups(
            self.backbone,
            self.head,
            self.task,
            lr=stage.lr,
            weight_decay=stage.weight_decay,
            backbone_weight_decay=0.0 if stage.l2_sp else stage.weight_decay,
            layer_decay=stage.layer_decay,
            head_lr_scale=stage.head_lr_scale,
            decay_norm_and_bias=stage.decay_norm_and_bias,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain values only: modules, partials or configs would not load under weights_only=True.
        checkpoint["graft"] = dict(self.checkpoint_note)
        if self.grid is not None:
            checkpoint["graft"]["grid"] = self.grid.record.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.grid is not None:
            self.grid.record = self.grid.record.restored(checkpoint["graft"]["grid"])
