"""One stage of a transfer plan, as a value: what learns, for how long, with what optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer

from graft.config.stage import StageOptions
from graft.plan.grid import Grid
from graft.plan.lora import LoRA
from graft.plan.schedules import Schedule


@dataclass(kw_only=True)
class Stage(StageOptions):
    """One fit.

    Args:
        optimizer: called with (parameter groups, lr=...).
        grid: heads that train together in place of the module's own; the best becomes its head.
    """

    name: str
    optimizer: Callable[..., Optimizer]
    schedule: Schedule
    lr: float
    weight_decay: float = 0.0
    lora: LoRA | None = None
    grid: Grid | None = None
