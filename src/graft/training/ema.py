"""Exponential moving average of the weights, which is what gets validated, kept and tested."""

from __future__ import annotations

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA(WeightAveraging):
    """Lightning's averaging with a decay that starts low: min(decay, (1 + step) / (10 + step)).

    Without that, a stage of a few hundred steps would end on an average that still holds its start
    (the schedule is TensorFlow's and timm's). BatchNorm statistics are averaged too.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay
        self.step = 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is None:
            return False
        self.step = step_idx
        return True

    def _average(self, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(averaged, current, count)
