"""Bootstrap percentile intervals of any task's metrics (Efron 1979)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from graft.tasks.base import Task


def intervals(
    task: Task,
    outputs: Tensor,
    target: Tensor,
    *,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, list[float]]:
    """(low, high) of each metric over examples drawn with replacement: what other examples of the
    same kind would have given. They know nothing of other seeds of the training.

    Args:
        outputs, target: (N, T), on the CPU.
    """
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(samples):
        rows = torch.from_numpy(rng.integers(len(target), size=len(target)))
        for name, value in task.scores(outputs[rows], target[rows]).items():
            drawn.setdefault(name, []).append(value)
    ends = [(1 - level) / 2, (1 + level) / 2]
    return {name: np.nanquantile(values, ends).tolist() for name, values in drawn.items()}
