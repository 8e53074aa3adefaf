"""Steps of a small head, several in what Lightning takes for one batch.

What Lightning does around a batch takes as long as a step of a linear head on stored features.
Where nothing looks at single steps (see `steps_per_batch`), a batch is `Steps`, and these are taken
here, by Lightning's manual optimization: weights, logs and counts are those of its own steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from graft.data.datasets import Batch
from graft.data.loaders import Steps


def take(trainer: Any, steps: Steps, loss_of: Callable[[Batch], Tensor]) -> None:
    """Train on each batch, as Lightning would."""
    module = trainer.lightning_module
    loop, log = trainer.fit_loop.epoch_loop, trainer._logger_connector
    counts = loop.manual_optimization.optim_step_progress
    monitors = [c for c in trainer.callbacks if isinstance(c, LearningRateMonitor)]
    optimizer = module.optimizers(use_pl_optimizer=False)
    scheduler = module.lr_schedulers()
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    mixed = isinstance(trainer.precision_plugin, MixedPrecision)
    for number, batch in enumerate(steps):
        if number:  # at the first one Lightning has done this
            loop._batches_that_stepped += 1  # the step that is logged
            for monitor in monitors:
                monitor.on_train_batch_start(trainer, module)
        loss = loss_of({name: value.to(module.device) for name, value in batch.items()})
        for parameter in learning:  # `zero_grad` takes a tenth of a step
            parameter.grad = None
        if mixed:  # what autocast has kept of the weights goes with these weights alone
            with torch.autocast(module.device.type, enabled=False):
                loss.sum().backward()
            torch.clear_autocast_cache()
        else:
            loss.sum().backward()
        counts.increment_ready()
        optimizer.step()
        counts.increment_completed()
        scheduler.step()
        if log.should_update_logs:
            log.log_metrics({"train/loss_step": mean_of_heads(loss)})


def mean_of_heads(loss: Tensor) -> Tensor:
    """Of (K,) losses, the mean of those that have not diverged."""
    loss = loss.detach()
    return torch.where(loss.isfinite(), loss, torch.nan).nanmean() if loss.ndim else loss
