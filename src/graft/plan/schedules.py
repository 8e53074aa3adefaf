"""Learning-rate schedules: the multiplier of every group's base rate at a step of the stage.

One multiplier for all groups keeps their ratios (layer-wise decay) through the whole schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int, int], float]
"""(step, total_steps) -> multiplier; total_steps is the true number of optimizer steps."""


def warmup_steps(warmup: float, total: int) -> int:
    """`warmup` below 1 is a fraction of the stage, otherwise a number of steps."""
    if warmup < 0:
        raise ValueError(f"scheduler.warmup={warmup}: must not be negative")
    return round(warmup * total) if warmup < 1 else int(warmup)


def constant(step: int, total: int, *, warmup: float = 0.0) -> float:
    """The base rate after a linear warm-up."""
    rising = warmup_steps(warmup, total)
    return (step + 1) / (rising + 1) if step < rising else 1.0


def cosine(step: int, total: int, *, warmup: float = 0.0, final: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from 1 down to `final` (Loshchilov & Hutter 2017)."""
    rising = warmup_steps(warmup, total)
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = min(1.0, (step - rising) / max(1, total - rising))
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def one_cycle(
    step: int, total: int, *, warmup: float = 0.3, initial: float = 0.04, final: float = 4e-6
) -> float:
    """Cosine up from `initial` to 1, cosine down to `final` (Smith & Topin 2018)."""
    rising = warmup_steps(warmup, total)
    if step < rising:
        start, end, progress = initial, 1.0, step / rising
    else:
        start, end, progress = 1.0, final, min(1.0, (step - rising) / max(1, total - 1 - rising))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
