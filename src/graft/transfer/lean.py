"""Lightning's training step without the hooks around it that nothing uses."""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.optimization.automatic import ClosureResult, _AutomaticOptimization
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

OF_CALLBACKS = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
OF_MODULES = (
    *OF_CALLBACKS[:-1],  # the module's own on_before_optimizer_step is called
    "backward",
    "optimizer_zero_grad",
    "optimizer_step",
    "configure_gradient_clipping",
)


class LeanOptimization(_AutomaticOptimization):
    """Forward, backward and optimizer step, and Lightning's count of them.

    Lightning calls a dozen hooks in between, each through layers of its own. Where one of them
    does something (clipping, accumulation, loss scaling, several devices, an override, a
    profiler), its own code runs.
    """

    @cached_property
    def _plain(self) -> bool:
        trainer: Any = self.trainer
        module, precision = trainer.lightning_module, trainer.precision_plugin
        return (
            type(trainer.strategy) is SingleDeviceStrategy
            and type(precision) in (Precision, MixedPrecision)
            and getattr(precision, "scaler", None) is None
            and type(trainer.profiler) is PassThroughProfiler
            and not any(is_overridden(hook, module, L.LightningModule) for hook in OF_MODULES)
            and not any(is_overridden(h, c) for h in OF_CALLBACKS for c in trainer.callbacks)
        )

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> Any:
        trainer = self.trainer  # these two may change during a fit:
        if trainer.gradient_clip_val or trainer.accumulate_grad_batches != 1 or not self._plain:
            return super().run(optimizer, batch_idx, kwargs)
        module, counts = trainer.lightning_module, self.optim_progress.optimizer
        result = ClosureResult(None)

        @torch.enable_grad()
        def closure() -> Any:
            nonlocal result
            module._current_fx_name = "training_step"  # `self.log` asks who calls it
            with trainer.precision_plugin.train_step_context():
                output = module.training_step(*kwargs.values())
            result = ClosureResult.from_training_step_output(output)
            counts.zero_grad.increment_ready()
            counts.zero_grad.increment_started()
            optimizer.zero_grad()
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
