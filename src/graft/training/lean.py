"""Lightning's training epoch and step without the hooks around them that nothing uses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.optimization.automatic import ClosureResult, _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric

IN_A_STEP = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
OF_MODULES = (
    *IN_A_STEP[:-1],  # the module's own on_before_optimizer_step is called
    "backward",
    "optimizer_zero_grad",
    "optimizer_step",
    "configure_gradient_clipping",
)
AROUND_A_STEP = (
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_train_batch_start",
    "on_train_batch_end",
    "lr_scheduler_step",
)


def make_lean(trainer: L.Trainer) -> None:
    """Have the trainer fit with the loops below; call it before anything else changes them."""
    own = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = LeanEpochLoop(trainer, own.min_steps, own.max_steps)


def is_plain(trainer: Any) -> bool:
    """Whether it trains on one device, unscaled and unprofiled."""
    precision = trainer.precision_plugin
    return (
        type(trainer.strategy) is SingleDeviceStrategy
        and type(precision) in (Precision, MixedPrecision)
        and getattr(precision, "scaler", None) is None
        and type(trainer.profiler) is PassThroughProfiler
    )


def zero_grad(optimizer: Optimizer) -> None:
    """torch's own without the profiler's mark, which takes longer than all the rest."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


class MeanOfBatches(MeanMetric):
    """`MeanMetric` of one number at a time, in two operations instead of ten."""

    def update(self, value: Tensor) -> None:  # type: ignore[override]
        self.mean_value += value
        self.weight += 1


class LeanEpochLoop(_TrainingEpochLoop):
    """The batches of an epoch, with the callbacks that have something to do at each.

    Lightning asks every callback, the module, the datamodule and the strategy, through layers of
    its own, at eight places. Where one of them does something that is not known here, and at the
    first batch after a restart, its own code runs.
    """

    def __init__(self, trainer: L.Trainer, min_steps: int | None, max_steps: int) -> None:
        super().__init__(trainer, min_steps, max_steps)
        self.automatic_optimization: LeanOptimization = LeanOptimization(trainer)
        self.plain = False
        self.starts: list[Callable[..., None]] = []
        self.ends: list[Callable[..., None]] = []

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """In every epoch: callbacks may have changed callbacks and schedulers."""
        super().on_run_start(data_fetcher)
        trainer: Any = self.trainer
        module, data = trainer.lightning_module, trainer.datamodule
        self.automatic_optimization.look()
        self.plain = (
            is_plain(trainer)
            and module.automatic_optimization
            and data is not None
            and not isinstance(data_fetcher, _DataLoaderIterDataFetcher)
            and not any(is_overridden(hook, module, L.LightningModule) for hook in AROUND_A_STEP)
            and not any(is_overridden(hook, data, DataHooks) for hook in AROUND_A_STEP[:2])
            and not is_overridden("on_after_batch_transfer", module, DataHooks)
            and "batch_idx" in self._build_kwargs(OrderedDict(), None, 0)
            and all(
                config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau
                for config in trainer.lr_scheduler_configs
            )
        )
        self.starts, self.ends = (
            [getattr(c, name) for c in trainer.callbacks if is_overridden(name, c, L.Callback)]
            for name in ("on_train_batch_start", "on_train_batch_end")
        )

    def advance(self, data_fetcher: _DataFetcher) -> None:
        trainer: Any = self.trainer
        if self.restarting or not self.plain or trainer.accumulate_grad_batches != 1:
            super().advance(data_fetcher)
            return
        module, log = trainer.lightning_module, trainer._logger_connector
        progress, output = self.batch_progress, None
        self.val_loop.restarting = False
        batch, *_ = next(data_fetcher)
        batch_idx = self.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        batch = trainer.precision_plugin.convert_input(batch)
        if trainer.strategy.root_device.type != "cpu":
            batch = move_data_to_device(batch, trainer.strategy.root_device)
        batch = trainer.datamodule.on_after_batch_transfer(batch, 0)

        progress.increment_ready()
        log.on_batch_start(batch)
        if batch is not None:  # as in Lightning: such a batch is left out
            module._current_fx_name = "on_train_batch_start"  # `self.log` asks who calls it
            for start in self.starts:
                start(trainer, module, batch, batch_idx)
            module._current_fx_name = None
            progress.increment_started()
            kwargs = OrderedDict(batch=batch, batch_idx=batch_idx)
            output = self.automatic_optimization.run(trainer.optimizers[0], batch_idx, kwargs)
        progress.increment_processed()
        for config in trainer.lr_scheduler_configs:
            self.scheduler_progress.increment_ready()
            config.scheduler.step()
            self.scheduler_progress.increment_completed()

        module._current_fx_name = "on_train_batch_end"
        for end in self.ends:
            end(trainer, module, output, batch, batch_idx)
        module._current_fx_name = None
        log.on_batch_end()
        progress.increment_completed()
        log.update_train_step_metrics()


class LeanOptimization(_AutomaticOptimization):
    """Forward, backward and optimizer step, and Lightning's count of them.

    Lightning calls a dozen hooks in between, each through layers of its own. Where one of them
    does something (clipping, accumulation, loss scaling, several devices, an override, a
    profiler), its own code runs.
    """

    plain = False

    def look(self) -> None:
        """Whether this code will do, from here on."""
        trainer: Any = self.trainer
        module = trainer.lightning_module
        self.plain = (
            is_plain(trainer)
            and not any(is_overridden(hook, module, L.LightningModule) for hook in OF_MODULES)
            and not any(is_overridden(h, c) for h in IN_A_STEP for c in trainer.callbacks)
        )

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> Any:
        trainer = self.trainer  # these two may change during a fit:
        if trainer.gradient_clip_val or trainer.accumulate_grad_batches != 1 or not self.plain:
            return super().run(optimizer, batch_idx, kwargs)
        module, counts = trainer.lightning_module, self.optim_progress.optimizer
        result = ClosureResult(None)

        @torch.enable_grad()
        def closure() -> Any:
            nonlocal result
            module._current_fx_name = "training_step"
            with trainer.precision_plugin.train_step_context():
                output = module.training_step(*kwargs.values())
            result = ClosureResult.from_training_step_output(output)
            counts.zero_grad.increment_ready()
            counts.zero_grad.increment_started()
            zero_grad(optimizer)
            counts.zero_grad.increment_completed()
            if result.closure_loss is not None:
                result.closure_loss.backward()
            module._current_fx_name = "on_before_optimizer_step"
            module.on_before_optimizer_step(optimizer)
            module._current_fx_name = None
            return result.loss

        counts.step.increment_ready()
        optimizer.step(closure)
        counts.step.increment_completed()
        return result.asdict() if result.loss is not None else {}
