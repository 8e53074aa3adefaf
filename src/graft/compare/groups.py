"""Runs grouped by everything but the seed, and the config keys that tell the groups apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from graft.compare.statistics import Summary, summarise
from graft.runs.records import IGNORED, Run, as_number

ABSENT = "-"  # the value of a key that a config does not have


@dataclass(frozen=True)
class Group:
    """Finished runs that differ by nothing but the seed, by seed; the newest of each."""

    runs: Mapping[str, Run]

    @cached_property
    def values(self) -> dict[str, str]:
        """What all of them agree on."""
        first, *others = self.runs.values()
        return {
            key: value
            for key, value in first.values.items()
            if all(run.values.get(key) == value for run in others)
        }

    def numbers(self, name: str) -> dict[str, float]:
        """A metric by seed, of the runs that have it."""
        found = {seed: run.number(name) for seed, run in self.runs.items()}
        return {seed: number for seed, number in found.items() if number is not None}

    def summary(self, name: str) -> Summary | None:
        return summarise([*self.numbers(name).values()])


@dataclass(frozen=True)
class Comparison:
    """Groups, in the order of their columns.

    Args:
        columns: config keys and groups that tell the groups apart.
        along: keys that differ too, though never without the columns.
        repeats: older runs of a config and seed that ran again: not counted.
        left_out: runs that are not done.
    """

    groups: Sequence[Group]
    columns: Sequence[str]
    along: Sequence[str]
    repeats: Sequence[Run]
    left_out: Sequence[Run]

    def cells(self, group: Group) -> list[str]:
        return [group.values.get(key, ABSENT) for key in self.columns]

    def levels(self, key: str) -> list[str]:
        """The values of a key: numbers by size, others as they first appeared."""
        found = [*dict.fromkeys(group.values.get(key, ABSENT) for group in self.groups)]
        return sorted(found, key=_size)  # stable

    def metrics(self) -> list[str]:
        """Metrics that any run has."""
        runs = [run for group in self.groups for run in group.runs.values()]
        return [*dict.fromkeys(name for run in runs for name in run.metrics)]

    def baselines(self, wanted: Mapping[str, str]) -> list[Group | None]:
        """Of each group the one to compare it with: the only one with the `wanted` values, or
        else that of them which agrees with it in all other columns.

        Raises:
            ValueError: no group has these values.
        """
        candidates = [g for g in self.groups if wanted.items() <= g.values.items()]
        if not candidates:
            raise ValueError(f"baseline {_listed(wanted)}: no finished run has that")
        if len(candidates) == 1:
            return [candidates[0]] * len(self.groups)
        others = [key for key in self.columns if key not in wanted]

        def like(group: Group) -> Group | None:
            same = [
                c
                for c in candidates
                if all(c.values.get(key) == group.values.get(key) for key in others)
            ]
            return same[0] if len(same) == 1 else None

        found = [like(group) for group in self.groups]
        if not any(b is not None and b is not g for g, b in zip(self.groups, found, strict=True)):
            raise ValueError(
                f"baseline {_listed(wanted)}: {len(candidates)} groups have that; name one by "
                f"{' and '.join(others)} too"
            )
        return found


def grouped(runs: Sequence[Run]) -> Comparison:
    """Group what is done; the rest is listed, not mixed in."""
    by_identity: dict[tuple[tuple[str, str], ...], dict[str, Run]] = {}
    repeats, left_out = [], []
    for run in sorted(runs, key=lambda run: str(run.record.get("started"))):
        if run.status != "done":
            left_out.append(run)
            continue
        seeds = by_identity.setdefault(run.identity, {})
        seed = run.values.get("seed", ABSENT)
        if seed in seeds:
            repeats.append(seeds[seed])
        seeds[seed] = run
    groups = [Group(seeds) for seeds in by_identity.values()]
    columns, along = _distinguishing(groups)
    comparison = Comparison(groups, columns, along, repeats, left_out)
    ranks = {key: {v: i for i, v in enumerate(comparison.levels(key))} for key in columns}
    groups.sort(
        key=lambda g: [ranks[k][v] for k, v in zip(columns, comparison.cells(g), strict=True)]
    )
    return comparison


def _distinguishing(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """(columns, keys that differ along with them).

    A resolved config repeats itself (a stage's learning rate is the optimizer's), and another plan
    differs in dozens of keys. So the columns are what somebody set, and beyond that as few keys as
    tell all groups apart: options of config groups first.
    """
    if not groups:
        return [], []
    runs = [run for group in groups for run in group.runs.values()]
    choices = dict.fromkeys(group for run in runs for group in run.record.get("choices") or {})
    given = dict.fromkeys(key for run in runs for key in run.overridden)
    values = [group.values for group in groups]
    told_by = dict.fromkeys(key for run in runs for key, _ in run.identity)
    known = dict.fromkeys([*(key for key in choices if key not in IGNORED), "tags", *told_by])
    keys = dict.fromkeys([*(key for key in given if key in known), *known])
    differing = [key for key in keys if len({value.get(key, ABSENT) for value in values}) > 1]

    def is_given(key: str) -> bool:  # head.grid={...} gives head.grid.lr
        return key in given or any(key.startswith(f"{k}.") for k in given if k not in choices)

    columns = [key for key in differing if is_given(key)]
    told = len({tuple(v.get(k) for k in columns) for v in values})
    for key in differing:
        if told < len(groups) and key not in columns:
            more = len({tuple(v.get(k) for k in [*columns, key]) for v in values})
            if more > told:
                columns, told = [*columns, key], more
    return columns, [key for key in differing if key not in columns]


def settings(keys: Sequence[str], rows: Sequence[Mapping[str, str]]) -> tuple[list[str], str]:
    """Of each row the values of these keys that most other rows do not have, as few words as can
    be; and those that most have.
    """
    lasts = [key.rpartition(".")[2] for key in keys]
    short = {k: last if lasts.count(last) == 1 else k for k, last in zip(keys, lasts, strict=True)}
    usual = {}
    for key in keys:
        value, count = Counter(row.get(key, ABSENT) for row in rows).most_common(1)[0]
        if 2 * count > len(rows):
            usual[key] = value

    def words(values: Mapping[str, str]) -> str:
        return " ".join(f"{short[k]}={v}" for k, v in values.items() if v != ABSENT)

    texts = []
    for row in rows:
        values = {key: row.get(key, ABSENT) for key in keys}
        texts.append(words({k: v for k, v in values.items() if usual.get(k) != v}) or ABSENT)
    return texts, words(usual)


def _size(value: str) -> float:
    number = as_number(value)
    return float("inf") if number is None else number


def _listed(wanted: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in wanted.items())
