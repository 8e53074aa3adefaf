"""What a race came to: a table, the command to train with, and why."""

from __future__ import annotations

import math
from typing import Any

from graft.choose.entrants import FEATURES
from graft.choose.halving import Arm, interval, winner
from graft.choose.race import Race
from graft.compare.table import Column, Table
from graft.config.overrides import typed


def chosen(race: Race) -> Arm:
    images = next(iter(race.costs.values())).val
    results = {arm: race.results[arm] for arm in race.finalists}
    return winner(results, images, race.full_seconds)


def command(race: Race, arm: Arm) -> str:
    """What trains the arm in full, as it is typed in a shell."""
    overrides = race.entrants.overrides(arm.candidate, arm.plan)
    return " ".join(["graft train", *map(typed, overrides)])


def table(race: Race) -> Table:
    """A row for each arm, the best first."""
    columns = [
        Column("backbone", ["candidate"], is_key=True),
        Column("plan", ["plan"], is_key=True),
        Column("trained %", ["share"]),
        Column("val/acc %", ["val/acc"]),
        Column("95 % interval", ["low", "high"]),
        Column("kNN %", ["val/knn"]),
        Column("minutes", ["minutes"]),
        Column("parameters", ["parameters"], is_spare=True),
        Column("MMACs", ["macs"], is_spare=True),
        Column("full min", ["full_seconds"]),
        Column("full MB", ["memory_mb"], is_spare=True),
    ]
    arms = sorted(race.results, key=lambda arm: (-race.results[arm].score, arm.plan))
    for arm in arms:
        result, cost = race.results[arm], race.costs[arm.candidate]
        low, high = interval(result.score, cost.val)
        full = race.full_seconds(arm)
        share = race.state["part"] if arm.plan == FEATURES else result.share
        cells: tuple[tuple[Any, ...], ...] = (
            (arm.candidate, arm.candidate),
            ("ridge on features" if arm.plan == FEATURES else arm.plan, arm.plan),
            (f"{100 * share:.3g}", share),
            (f"{100 * result.score:.2f}", result.score),
            (f"[{100 * low:.1f}, {100 * high:.1f}]", low, high),
            ("-" if result.knn is None else f"{100 * result.knn:.2f}", result.knn),
            (f"{race.minutes[arm]:.2f}", race.minutes[arm]),
            (f"{cost.parameters:,}", cost.parameters),
            (f"{cost.macs / 1e6:,.0f}", cost.macs),
            (f"{full / 60:.2f}", full),
            (f"{result.memory:,.0f}", result.memory),
        )
        for column, (text, *numbers) in zip(columns, cells, strict=True):
            column.add(text, *numbers)
    notes = [
        "trained %: of a full training; of ridge, of the training images. MMACs: millions of "
        "multiply-adds of one image. full min, full MB: predicted for a full training with its "
        "test, from what was measured. The test split was not looked at."
    ]
    notes += [f"left out: {name}: {reason}" for name, reason in race.left_out.items()]
    return Table(columns, notes=notes)


def reason(race: Race, arm: Arm) -> str:
    """One sentence."""
    result, images = race.results[arm], race.costs[arm.candidate].val
    others = [a for a in race.results if a != arm and a.plan != FEATURES]
    text = f"{arm.candidate} with {_plan(arm)} reached {100 * result.score:.2f} % on {images:,} "
    text += "validation images"
    if result.share < 1:
        text += f" in {100 * result.share:.3g} % of a full training"
    if not others:
        return f"{text}; the budget allowed no training, only features."
    second = max(others, key=lambda other: race.results[other].score)
    than = f"{second.candidate} with {_plan(second)} ({100 * race.results[second].score:.2f} %)"
    error = math.sqrt(result.score * (1 - result.score) / images)
    gap = result.score - race.results[second].score
    if gap > 2 * error:
        return f"{text}, clearly above {than}."
    if gap < 0 and race.results[second].share == 1 > result.share:
        return f"{text}, within the noise of {than}, and it has still to gain from the rest."
    return f"{text}, which these images do not tell from {than}."


def _plan(arm: Arm) -> str:
    return "ridge regression" if arm.plan == FEATURES else arm.plan
