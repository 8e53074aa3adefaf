"""The race: features of all candidates first, then short trainings of the better ones."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.choose.costs import NotAtHand, measure
from graft.choose.entrants import FEATURES, Entrants
from graft.choose.halving import Arm, better_half, first_part, halved, learns, next_round
from graft.choose.runs import Runs, locked
from graft.config.names import file_word
from graft.config.resolved import explain
from graft.config.words import plural
from graft.storage.disk import readable


@dataclass(frozen=True)
class Race:
    """What came of one.

    Attributes:
        finalists: the arms to choose from: those that were not left behind.
        left_out: who did not run, and why.
    """

    runs: Runs
    finalists: list[Arm]
    left_out: dict[str, str]


def run_race(
    entrants: Entrants,
    budget: float,
    tell: Callable[[str], None],
    *,
    download: bool = False,
) -> Race:
    """Race within `budget` seconds, or go on with the race of the same entrants.

    Raises:
        ValueError: nothing can run, or another process is at it.
        OSError: the disk does not hold the features.
    """
    _require_one_device(entrants.config["trainer"])
    paths = entrants.config["paths"]
    folder = _folder(Path(paths["logs"]), entrants)
    tell(f"race      {folder}")
    with locked(folder):
        runs = Runs(folder, entrants, budget, tell)
        left_out = _measure(runs, download=download)
        if runs.state["part"] is None:
            part, slow = first_part(runs.costs, runs.left, runs.overhead)
            names = [name for name in runs.costs if name not in slow]
            _require_disk(runs, part, names, Path(paths["cache"]))
            runs.save(part=part, slow=slow)
        left_out |= runs.state["slow"]
        part = runs.state["part"]
        count = part * next(iter(runs.costs.values())).train
        tell(f"features  ridge and nearest neighbours on {plural(round(count), 'training image')}")
        for name in runs.costs:
            if name not in left_out:
                runs.run(Arm(name, FEATURES), part)
        finalists = _rounds(runs) if runs.results else []
    left_out |= {str(arm): f"its run failed: {reason}" for arm, reason in runs.failed.items()}
    if not finalists:
        reasons = "; ".join(f"{who}: {reason}" for who, reason in left_out.items())
        raise ValueError(f"no run ended: {reasons or 'the budget is spent'}")
    return Race(runs, finalists, left_out)


def _require_one_device(trainer: dict[str, Any]) -> None:
    if trainer["devices"] not in (1, "1") or trainer["num_nodes"] != 1:
        raise ValueError(
            f"trainer.devices={trainer['devices']}, num_nodes={trainer['num_nodes']}: a race takes "
            "one device"
        )


def _folder(logs: Path, entrants: Entrants) -> Path:
    """The same for the same command, whatever its budget."""
    said = json.dumps([entrants.data, entrants.candidates, entrants.plans])
    name = file_word(entrants.data[-1].strip("'").rpartition("/")[2].rpartition("=")[2])
    return logs / f"choose_{name}_{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def _measure(runs: Runs, *, download: bool) -> dict[str, str]:
    """The costs of all candidates; returns which cannot be built, and why."""
    problems: dict[str, str] = {}
    absent = []
    for name in runs.entrants.candidates:
        if name in runs.costs:
            continue
        try:
            runs.costs[name] = measure(runs.full(Arm(name, FEATURES)), download=download)
        except NotAtHand:
            absent.append(name)
        except Exception as error:  # out of memory, say: the others race on
            problems[name] = explain(error)
        else:
            runs.save(costs={key: asdict(cost) for key, cost in runs.costs.items()})
    if not runs.costs and len({*problems.values()}) == 1 and not absent:
        raise ValueError(next(iter(problems.values())))  # of the data
    if absent:
        problems[", ".join(absent)] = "weights are not at hand (--download fetches them)"
    if not runs.costs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in problems.items())
        raise ValueError(f"no candidate can be built: {reasons}")
    return problems


def _require_disk(runs: Runs, part: float, names: list[str], cache: Path) -> None:
    costs = [runs.costs[name] for name in names]
    needed = sum(4 * cost.features * (part * cost.train + cost.val) for cost in costs)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    if needed > (free := shutil.disk_usage(there).free):
        raise OSError(
            f"paths.cache={cache}: the features of {plural(len(names), 'candidate')} take "
            f"{readable(needed)}, and the disk has {readable(free)} free: make room, or set "
            "paths.cache to another disk"
        )


def _rounds(runs: Runs) -> list[Arm]:
    """Short trainings of the better half of the candidates; returns the arms to choose from."""
    images = next(iter(runs.costs.values())).val
    names = [arm.candidate for arm in better_half(runs.results, images)]
    plans = [plan for plan in runs.entrants.plans if plan != FEATURES]
    # All of a head is trained at once, and of the best features only: ridge has ranked them.
    heads = [a for a in (Arm(names[0], plan) for plan in plans) if not learns(runs.full(a))]
    tuned = [Arm(name, plan) for name in names for plan in plans]
    tuned = [arm for arm in tuned if learns(runs.full(arm))]
    rounds, state, share = max(1, math.ceil(math.log2(len(names)))), runs.state, 0.0
    for number in range(rounds):
        if number == len(state["rounds"]):
            time = runs.left / (rounds - number)
            racing = tuned if number else [*heads, *tuned]
            share, racing = next_round(racing, time, runs.predicted, above=share)
            pairs = [[arm.candidate, arm.plan] for arm in racing]
            runs.save(rounds=[*state["rounds"], {"share": share, "arms": pairs}])
        share = state["rounds"][number]["share"]
        racing = [Arm(*pair) for pair in state["rounds"][number]["arms"]]
        if not racing:
            break
        long = f"{100 * share:.3g} % of a full training"
        runs.tell(f"round {number + 1}   {plural(len(racing), 'run')}, backbones for {long}")
        for arm in racing:
            runs.run(arm, 1.0 if arm in heads else share)
        tuned = [arm for arm in racing if arm in runs.results and arm not in heads]
        if share == 1 or not tuned:
            break
        if number < rounds - 1:
            tuned = halved(tuned, runs.results)
    tuned = [arm for arm in tuned if arm in runs.results]
    done = [arm for arm in heads if arm in runs.results]
    return [*done, *tuned] or [Arm(names[0], FEATURES)]
