"""What a race came to: a table, the command to train with, and why."""

from __future__ import annotations

from typing import Any

from graft.choose.entrants import FEATURES
from graft.choose.halving import Arm, interval, standard_error, winner
from graft.choose.race import Race
from graft.compare.groups import ABSENT
from graft.compare.table import Column, Table
from graft.config.overrides import typed


def chosen(race: Race) -> Arm:
    images = next(iter(race.runs.costs.values())).val
    return winner({arm: race.runs.results[arm] for arm in race.finalists}, images)


def command(race: Race, arm: Arm) -> str:
    """What trains the arm in full, as it is typed in a shell."""
    overrides = race.runs.entrants.overrides(arm.candidate, arm.plan)
    return " ".join(["graft train", *map(typed, overrides)])


def table(race: Race) -> Table:
    """A row for each arm, the best first."""
    runs = race.runs
    columns = [
        Column("backbone", ["backbone"]),
        Column("plan", ["plan"]),
        Column("trained %", ["share"]),
        Column("val/acc %", ["val/acc"]),
        Column("95 % interval", ["low", "high"]),
        Column("kNN %", ["val/knn"]),
        Column("minutes", ["seconds"]),
        Column("parameters", ["parameters"], is_spare=True),
        Column("MMACs", ["macs"], is_spare=True),
        Column("full min", ["full_seconds"]),
        Column("full MB", ["memory_mb"], is_spare=True),
    ]
    for arm, result in sorted(runs.results.items(), key=lambda row: -row[1].score):
        cost = runs.costs[arm.candidate]
        low, high = interval(result.score, cost.val)
        cells: tuple[tuple[Any, ...], ...] = (
            (arm.candidate, arm.candidate),
            (_plan(arm), arm.plan),
            (f"{100 * result.share:.3g}", result.share),
            (f"{100 * result.score:.2f}", result.score),
            (f"[{100 * low:.1f}, {100 * high:.1f}]", low, high),
            (ABSENT if result.knn is None else f"{100 * result.knn:.2f}", result.knn),
            (f"{result.spent / 60:.2f}", result.spent),
            (f"{cost.parameters:,}", cost.parameters),
            (f"{cost.macs / 1e6:,.0f}", cost.macs),
            (f"{result.full / 60:.2f}", result.full),
            (f"{result.memory:,.0f}", result.memory),
        )
        for column, (text, *numbers) in zip(columns, cells, strict=True):
            column.add(text, *numbers)
    notes = [
        "trained %: of a full training, or with features of the training images. MMACs: millions "
        "of multiply-adds of one image. full: predicted for all of the training and its test. No "
        "run looked at the test split."
    ]
    return Table(columns, notes=notes + [f"left out: {a}: {b}" for a, b in race.left_out.items()])


def reason(race: Race, arm: Arm) -> str:
    """One sentence."""
    results, images = race.runs.results, race.runs.costs[arm.candidate].val
    result = results[arm]
    others = [a for a in results if a != arm and a.plan != FEATURES]
    text = f"{arm.candidate} with {_plan(arm)} reached {100 * result.score:.2f} % on {images:,} "
    text += "validation images"
    if result.share < 1:
        text += f" in {100 * result.share:.3g} % of a full training"
    if not others:
        return f"{text}; nothing else was trained to its end."
    second = max(others, key=lambda other: results[other].score)
    than = f"{second.candidate} with {_plan(second)} ({100 * results[second].score:.2f} %)"
    gap = result.score - results[second].score
    if gap > 2 * standard_error(result.score, images):
        return f"{text}, clearly above {than}."
    if gap < 0 and results[second].share == 1 > result.share:
        return f"{text}, within the noise of {than}, and it has still to gain from the rest."
    return f"{text}, which these images do not tell from {than}."


def _plan(arm: Arm) -> str:
    return "ridge on features" if arm.plan == FEATURES else arm.plan
