"""Mean, spread and significance of a few repeated runs; Student's t, exact, in closed form.

(SciPy has all this, and takes longer to import than a thousand runs to read.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Summary:
    """`sd` with n - 1; `half`: half of the 95 % interval of the mean; both None for one value."""

    n: int
    mean: float
    sd: float | None = None
    half: float | None = None


def summarise(values: Sequence[float]) -> Summary | None:
    """None of no values."""
    n = len(values)
    if n < 2:
        return Summary(n, values[0]) if values else None
    sd = stdev(values)
    return Summary(n, fmean(values), sd, t_quantile(0.975, n - 1) * sd / math.sqrt(n))


@dataclass(frozen=True)
class Paired:
    """Mean difference over `n` common seeds and its two-sided p, None for a single pair."""

    n: int
    difference: float
    p: float | None


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Paired | None:
    """Paired t-test over the seeds both have; None where they have none in common."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    summary = summarise(differences)
    if summary is None:
        return None
    if summary.sd is None:
        return Paired(1, summary.mean, None)
    if summary.sd == 0:
        return Paired(summary.n, summary.mean, 0.0 if summary.mean else 1.0)
    t = abs(summary.mean) / (summary.sd / math.sqrt(summary.n))
    return Paired(summary.n, summary.mean, 1 - t_inside(t, summary.n - 1))


def t_inside(t: float, df: int) -> float:
    """P(|T| < t) of Student's distribution: Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if df > 1 else 0.0))


def t_quantile(p: float, df: int) -> float:
    """The t that a share `p` > 0.5 of the distribution lies below."""
    inside = 2 * p - 1
    low, high = 0.0, 1.0
    while t_inside(high, df) < inside:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, df) < inside else (low, middle)
    return (low + high) / 2
