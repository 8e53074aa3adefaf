"""Random numbers that depend on nothing but (seed, epoch, index of the image, draw).

Counter-based (splitmix64, Steele et al. 2014): no generator state to save or to share, so the
stream does not depend on batch composition, workers, ranks or what ran before.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Who uses which of an image's 64 draws: the first of each. One that is off changes no other.
MOVE, CROP, ERASE, MIX, VIEW, COLOR = 0, 3, 25, 48, 53, 54
DRAWS = 64
MASK64 = (1 << 64) - 1


def uniform(seed: int, epoch: int, index: Tensor, draws: int, *, first: int = MOVE) -> Tensor:
    """(N, draws) numbers in [0, 1): those numbered `first`, `first` + 1, ... of each image."""
    key = _mix(_mix(seed & MASK64) + epoch & MASK64)
    key = key - (1 << 64) if key >> 63 else key
    numbers = torch.arange(first, first + draws, device=index.device)
    z = (
        index.long()[:, None] * DRAWS + numbers
    ) * -7046029254386353131  # 0x9E3779B97F4A7C15: golden
    z = z + key
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 40).float() / (1 << 24)


def uniform_many(seed: int, epoch: int, index: Tensor, draws: int) -> Tensor:
    """(N, draws) numbers in [0, 1), however many: other ones than those of `uniform`."""
    return uniform(seed + 15_485_863, epoch, index * -(-draws // DRAWS), draws)


def normal(seed: int, epoch: int, index: Tensor, draws: int) -> Tensor:
    """(N, draws) standard normal numbers, by the transform of Box & Muller 1958."""
    half = -(-draws // 2)
    u = uniform_many(seed, epoch, index, 2 * half)
    radius = (-2 * (1 - u[:, :half]).log()).sqrt()
    angle = 2 * math.pi * u[:, half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :draws]


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A seed of one image in one epoch, for a generator that needs one."""
    return _mix(_mix(_mix(seed & MASK64) + epoch & MASK64) + index & MASK64)


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts keep the sign; drop it


def beta(alpha: float, u: Tensor) -> Tensor:
    """Uniform draws turned into draws of Beta(alpha, alpha), by its inverse distribution."""
    table = _beta_quantiles(alpha).to(u.device)
    place = u * (len(table) - 1)
    low = place.long()
    return torch.lerp(table[low], table[low + 1], place - low)


@lru_cache(maxsize=8)
def _beta_quantiles(alpha: float, steps: int = 2048) -> Tensor:
    """(2 * steps + 1,) quantiles, evenly spaced.

    The lower half of the density, integrated over t = x^alpha: in t it has no pole at 0.
    """
    t = np.linspace(0, 0.5**alpha, 20_001)
    density = (1 - t ** (1 / alpha)) ** (alpha - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    lower = np.interp(np.linspace(0, 0.5, steps + 1), mass / mass[-1] / 2, t) ** (1 / alpha)
    return torch.from_numpy(np.concatenate([lower, 1 - lower[-2::-1]])).float()
