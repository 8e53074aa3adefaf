"""Steps of a small head, several in what Lightning takes for one batch.

What Lightning does around a batch takes as long as a step of a linear head on stored features.
Where nothing looks at single steps (see `steps_per_batch`), a batch is `Steps`, and these are taken
here, by Lightning's manual optimization: weights, logs and counts are those of its own steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor
from torch.optim import Optimizer

from graft.data.datasets import Batch
from graft.data.loaders import Steps


def take_steps(trainer: Any, steps: Steps, loss_of: Callable[[Batch], Tensor]) -> None:
    """Train on each batch, as Lightning would."""
    module, device = trainer.lightning_module, trainer.strategy.root_device
    loop, log = trainer.fit_loop.epoch_loop, trainer._logger_connector
    counts = loop.manual_optimization.optim_step_progress
    monitors = [c for c in trainer.callbacks if isinstance(c, LearningRateMonitor)]
    optimizer = module.optimizers(use_pl_optimizer=False)
    scheduler = module.lr_schedulers()
    forward = trainer.precision_plugin.forward_context
    loss = torch.empty(0)

    def forward_and_backward(batch: Batch) -> Tensor:
        nonlocal loss
        with torch.enable_grad():
            with forward():
                loss = loss_of(batch)
            total = loss.sum()
            zero_grad(optimizer)
            total.backward()
        return total.detach()

    # Lightning is within autocast here, which is for `forward` alone.
    with torch.autocast(device.type, enabled=False):
        for number, batch in enumerate(steps):
            if number:  # at the first one Lightning has done this
                loop._batches_that_stepped += 1  # the step that is logged
                for monitor in monitors:
                    monitor.on_train_batch_start(trainer, module)
            batch = {name: value.to(device) for name, value in batch.items()}
            counts.increment_ready()
            optimizer.step(partial(forward_and_backward, batch))
            counts.increment_completed()
            scheduler.step()
            if log.should_update_logs:
                log.log_metrics({"train/loss_step": mean_of_heads(loss)})
    trainer.callback_metrics["train/loss_step"] = mean_of_heads(loss)


def zero_grad(optimizer: Optimizer) -> None:
    """torch's own without the profiler's mark, which takes longer than all the rest."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def mean_of_heads(loss: Tensor) -> Tensor:
    """Of (K,) losses, the mean of those that have not diverged."""
    loss = loss.detach()
    return torch.where(loss.isfinite(), loss, torch.nan).nanmean() if loss.ndim else loss
