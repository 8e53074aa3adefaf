"""Successive halving within a budget of time (Jamieson & Talwalkar 2016): who runs how long.

Nothing here runs or measures: values in, decisions out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BACKWARD = 3.0  # a step in forward passes: the gradient costs about two
SHARES = (1.0, 1 / 2, 1 / 4, 1 / 8)  # of a full training: what is shorter tells little
FEWEST = 200  # training images whose features are looked at, where there are so many
FIRST = 1 / 3  # of the time that the features of all candidates may take


@dataclass(frozen=True)
class Cost:
    """Of one candidate on this machine, and what all runs with this data share.

    Attributes:
        seconds: of the forward pass of one image.
        macs: multiply-adds of that.
        features: their number.
        train, val, test: images of the splits.
        epoch: images of an epoch; `batch`: images of a batch.
    """

    seconds: float
    macs: int
    parameters: int
    features: int
    train: int
    val: int
    test: int
    epoch: int
    batch: int


@dataclass(frozen=True)
class Arm:
    """A backbone (and image size) with a plan."""

    candidate: str
    plan: str

    def __str__(self) -> str:
        return f"{self.candidate} {self.plan}"


@dataclass(frozen=True)
class Result:
    """What the latest run of an arm came to.

    Attributes:
        score: its validation accuracy; `knn`: that of nearest neighbours.
        share: of a full training that it was; of the training images, if it was of features alone.
        seconds: that it took; `spent`: all runs of the arm.
        full: seconds that a full training and its test would take, with nothing stored.
        memory: MB, of the GPU where there is one.
    """

    score: float
    share: float
    seconds: float
    spent: float
    full: float
    memory: float
    knn: float | None = None


def work(
    config: Mapping[str, Any],
    cost: Cost,
    *,
    share: float = 1.0,
    part: float = 1.0,
    stored: bool = False,
) -> float:
    """Forward passes of single images that the stages of a run take, without its test.

    Args:
        config: of the full run, of which this is a `share`.
        part: of the training images that there are.
        stored: whether features of the whole backbone are at hand.
    """
    passes = 0.0
    for stage in config["transfer"]["stages"].values():
        head = stage["trainable"] == "head"
        if head and stage["augment"] is False:
            passes += 0.0 if stored else part * cost.train + cost.val
            continue
        whole = share * stage["epochs"]
        each = (1 if head else BACKWARD) * cost.epoch
        passes += whole * each + max(1, round(whole)) * cost.val
    return passes


def learns(config: Mapping[str, Any]) -> bool:
    """Whether a plan trains more than a head on stored features."""
    stages = config["transfer"]["stages"].values()
    return any(stage["trainable"] != "head" or stage["augment"] is not False for stage in stages)


def shortened(share: float, config: Mapping[str, Any], cost: Cost) -> list[str]:
    """Overrides for a share of a full training: fewer epochs, each of all images; below one epoch,
    a part of the images. Batches stay those of the full training, and so does what they take; a
    head on stored features is trained in full, which costs little.
    """
    if share == 1:
        return []
    whole = share * config["trainer"]["max_epochs"]
    images = max(cost.batch, round(min(1.0, whole) * cost.epoch))
    overrides = [f"trainer.max_epochs={max(1, round(whole))}"]
    for name, stage in config["transfer"]["stages"].items():
        if stage["trainable"] != "head" and stage["epochs"] != config["trainer"]["max_epochs"]:
            epochs = max(1, round(share * stage["epochs"]))
            overrides.append(f"transfer.stages.{name}.epochs={epochs}")
    if images < cost.epoch:
        overrides += [f"data.epoch_images={images}", f"data.batch_size={cost.batch}"]
        for name, stage in config["transfer"]["stages"].items():
            if stage["trainable"] == "head" and stage["solver"] == "sgd":
                epochs = math.ceil(stage["epochs"] * cost.epoch / images)
                overrides.append(f"transfer.stages.{name}.epochs={epochs}")
    return overrides


def first_part(
    costs: Mapping[str, Cost], left: float, overhead: float
) -> tuple[float, dict[str, str]]:
    """The part of the training images whose features all candidates are compared by, and who is
    left out for which reason.

    Args:
        left: seconds of the budget.
        overhead: seconds of a run beside its stages.

    Raises:
        ValueError: the features of the fastest candidate alone take longer than the budget.
    """

    def seconds(name: str, part: float) -> float:
        cost = costs[name]
        return overhead + cost.seconds * (part * cost.train + cost.val)

    train = next(iter(costs.values())).train
    least = min(1.0, FEWEST / train)
    racing = sorted(costs, key=lambda name: seconds(name, least))
    fastest = seconds(racing[0], least)
    if fastest > left:
        raise ValueError(
            f"--budget: {max(0, left):.0f} s of it are left for features, and those of the fastest "
            f"candidate, {racing[0]}, take {fastest:.0f} s: add {math.ceil(3 * fastest - left)} s "
            "or more"
        )
    left_out = {}
    while len(racing) > 1 and sum(seconds(name, least) for name in racing) > FIRST * left:
        slowest = racing.pop()
        took = f"{seconds(slowest, least):.0f} s of the {left:.0f} that are left"
        left_out[slowest] = f"its features would take {took}"
    fixed = sum(seconds(name, 0.0) for name in racing)
    of_all = sum(seconds(name, 1.0) for name in racing) - fixed
    part = (FIRST * left - fixed) / of_all if of_all else 1.0
    return min(1.0, max(least, part)), left_out


def next_round(
    arms: Sequence[Arm],
    seconds: float,
    predicted: Callable[[Arm, float], float],
    above: float = 0.0,
) -> tuple[float, list[Arm]]:
    """The largest share of a full training that all `arms`, best first, can have in that time;
    where none is, the last of them are left out, if need be all.

    Args:
        above: the share that they have had.
    """
    kept = [*arms]
    while kept:
        for share in (share for share in SHARES if share > above):
            if sum(predicted(arm, share) for arm in kept) <= seconds:
                return share, kept
        kept.pop()
    return above, []


def better_half(results: Mapping[Arm, Result], images: int) -> list[Arm]:
    """The better half, best first, and who is within a standard error of the last of it."""

    def rank(arm: Arm) -> tuple[float, float]:
        return results[arm].score, results[arm].knn or 0.0

    arms = sorted(results, key=rank, reverse=True)
    last = results[arms[math.ceil(len(arms) / 2) - 1]].score
    return [arm for arm in arms if results[arm].score >= last - standard_error(last, images)]


def halved(arms: Sequence[Arm], results: Mapping[Arm, Result]) -> list[Arm]:
    """Of each plan the better half of those that have a result; the best of each plan first.

    Plans do not compete before the end: after a short training one that starts from a probe is
    ahead of one that starts from a random head, whatever comes of them.
    """
    ranked: list[tuple[int, Arm]] = []
    for plan in dict.fromkeys(arm.plan for arm in arms):
        alike = sorted(
            (arm for arm in arms if arm.plan == plan and arm in results),
            key=lambda arm: -results[arm].score,
        )
        ranked += enumerate(alike[: math.ceil(len(alike) / 2)])
    return [arm for _, arm in sorted(ranked, key=lambda place: place[0])]


def winner(results: Mapping[Arm, Result], images: int) -> Arm:
    """The arm of the best validation score.

    Of those within a standard error of it, one that was not trained in full yet goes before one
    that was, because it has still to gain.

    Args:
        images: that were validated on.
    """
    best = max(result.score for result in results.values())
    least = best - standard_error(best, images)
    close = [arm for arm, result in results.items() if result.score >= least]
    return min(close, key=lambda a: (results[a].share == 1, -results[a].score, results[a].full))


def standard_error(score: float, images: int) -> float:
    """Of an accuracy; a perfect one has an error too (Agresti & Coull 1998)."""
    share = (score * images + 2) / (images + 4)
    return math.sqrt(share * (1 - share) / (images + 4))


def interval(score: float, images: int) -> tuple[float, float]:
    """Of an accuracy, at 95 % (Wilson 1927): what other images of the same kind would give."""
    z2 = 1.96**2 / images
    middle = (score + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * score * (1 - score) + z2**2 / 4) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)
