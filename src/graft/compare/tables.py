"""What `graft compare` shows: groups of seeds, single runs, one key by another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from graft.compare.groups import ABSENT, Comparison, Group
from graft.compare.statistics import Summary, paired
from graft.compare.table import Column, Table
from graft.config.words import plural
from graft.reporting.console import is_share
from graft.runs.records import Run, known, objective

COSTS = {
    "fit_seconds": "fit s",  # of the stages
    "seconds": "run s",  # with preparing the data, testing, ...
    "memory_mb": "peak MB",
    "gpu_memory_mb": "GPU MB",
}
LISTED = 20  # runs left out that are named


def heading(name: str) -> str:
    return COSTS.get(name, f"{name} %" if is_share(name) else name)


def shown(name: str, value: float | None) -> str:
    """An accuracy in percent, tenths of seconds, whole megabytes; other numbers in four digits."""
    if value is None:
        return ABSENT
    if is_share(name):
        return f"{100 * value:.2f}"
    if name in COSTS:
        return f"{value:.1f}" if name.endswith("seconds") else f"{value:.0f}"
    return f"{value:.4g}"


def spread(name: str, summary: Summary | None, n: int) -> str:
    """Mean ± sd; (n=...) where other than `n` runs have it."""
    if summary is None:
        return ABSENT
    sd = "" if summary.sd is None else f" ± {shown(name, summary.sd)}"
    return shown(name, summary.mean) + sd + (f" (n={summary.n})" if summary.n != n else "")


def interval(name: str, mean: float, half: float) -> tuple[float, float]:
    """Its ends; of an accuracy within 0 and 1, which the t interval of few seeds doesn't know."""
    low, high = mean - half, mean + half
    return (max(low, 0.0), min(high, 1.0)) if is_share(name) else (low, high)


def cost(name: str, group: Group) -> float | None:
    """Of time the mean over seeds, of memory the largest."""
    if name.endswith("_mb"):
        return max(group.numbers(name).values(), default=None)
    summary = group.summary(name)
    return summary.mean if summary else None


def group_table(
    comparison: Comparison, metrics: Sequence[str], baseline: Mapping[str, str] | None = None
) -> Table:
    """A row for each group: its keys, metrics over seeds, time and memory.

    The first metric also gets its 95 % interval, and is compared with the baseline's.
    """
    groups, first = comparison.groups, metrics[0]
    notes = [f"mean ± standard deviation over n seeds; 95 % interval of the mean of {first} (t)"]
    columns, intervals = [], []
    for name in metrics:
        values, interval = _metric_columns(name, groups)
        columns.append(values)
        intervals += [interval] if name == first else []
        if baseline and name == first:
            others = comparison.baselines(baseline)
            columns += _baseline_columns(name, groups, others)
            pairs = sum(o not in (None, g) for g, o in zip(groups, others, strict=True))
            notes.append(
                "difference from the baseline, and p of a two-sided paired t-test over common "
                f"seeds (not corrected for {plural(pairs, 'comparison')})"
            )
    columns.append(Column("n", ["n"]))
    for group in groups:
        columns[-1].add(str(len(group.runs)), len(group.runs))
    columns += _key_columns(comparison.columns, [group.values for group in groups])
    columns += intervals
    for name in COSTS:
        if any(group.numbers(name) for group in groups):
            columns.append(Column(heading(name), [name], is_spare=True))
            for group in groups:
                columns[-1].add(shown(name, cost(name, group)), cost(name, group))
    if comparison.along:
        notes.append(f"keys that differ along with these: {len(comparison.along)}, see --keys")
    return Table(columns, notes=[*notes, *left_out(comparison)])


def _key_columns(keys: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[Column]:
    columns = [Column(key, [key], is_key=True) for key in keys]
    for column in columns:
        for values in rows:
            column.add(*[values.get(column.heading, ABSENT)] * 2)
    return columns


def _metric_columns(name: str, groups: Sequence[Group]) -> tuple[Column, Column]:
    names = [f"{name} {what}" for what in ("mean", "sd", "low", "high")]
    values, intervals = Column(heading(name), names), Column("95 % interval", is_spare=True)
    for group in groups:
        summary = group.summary(name)
        text = spread(name, summary, len(group.runs))
        if summary is None or summary.half is None:
            values.add(text, *((summary.mean, None, None, None) if summary else ()))
            intervals.add(ABSENT)
        else:
            low, high = interval(name, summary.mean, summary.half)
            values.add(text, summary.mean, summary.sd, low, high)
            intervals.add(f"[{shown(name, low)}, {shown(name, high)}]")
    return values, intervals


def _baseline_columns(
    name: str, groups: Sequence[Group], others: Sequence[Group | None]
) -> list[Column]:
    differences = Column("difference", [f"{name} difference"])
    significances = Column("p", ["p"])
    for group, other in zip(groups, others, strict=True):
        result = paired(group.numbers(name), other.numbers(name)) if other is not None else None
        if other is None or result is None or other is group:
            differences.add("baseline" if other is group else ABSENT)
            significances.add(ABSENT)
            continue
        sign = "+" if result.difference >= 0 else ""
        differences.add(sign + shown(name, result.difference), result.difference)
        few = result.n < max(len(group.runs), len(other.runs))
        p = ABSENT if result.p is None else "<0.001" if result.p < 0.001 else f"{result.p:.3f}"
        significances.add(p + (f" (n={result.n})" if few else ""), result.p)
    return [differences, significances]


def pivot_tables(
    comparison: Comparison, row_key: str, column_key: str, metrics: Sequence[str]
) -> list[Table]:
    """One key down, another across: a table of each metric, and one of time and memory.

    Raises:
        ValueError: a cell would hold runs that also differ otherwise.
    """
    cells: dict[tuple[str, str], Group] = {}
    for group in comparison.groups:
        at = group.values.get(row_key, ABSENT), group.values.get(column_key, ABSENT)
        if at in cells:
            keys = [k for k in comparison.columns if cells[at].values.get(k) != group.values.get(k)]
            raise ValueError(
                f"pivot: runs of {row_key}={at[0]}, {column_key}={at[1]} also differ in "
                f"{', '.join(keys)}: choose with --where {keys[0]}=VALUE"
            )
        cells[at] = group
    n = max((len(group.runs) for group in cells.values()), default=0)
    recorded = [name for name in COSTS if name != "seconds"]
    recorded = [name for name in recorded if any(g.numbers(name) for g in comparison.groups)]

    def table(title: str, show: Callable[[Group], str]) -> Table:
        columns = [Column(f"{row_key} \\ {column_key}")]
        columns[0].texts = comparison.levels(row_key)
        for level in comparison.levels(column_key):
            at_level = {row: group for (row, at), group in cells.items() if at == level}
            columns.append(Column(_level_name(column_key, level, at_level.values())))
            for row in columns[0].texts:
                columns[-1].add(show(at_level[row]) if row in at_level else ABSENT)
        return Table(columns, title)

    over = f"mean ± standard deviation over {n} seeds" if n > 1 else "one seed"
    tables = [
        table(f"{heading(metric)}: {over}", partial(_spread_of, metric, n)) for metric in metrics
    ]
    if recorded:
        title = f"{', '.join(map(heading, recorded))}: mean time of the fits, largest memory"
        tables.append(table(title, lambda g: ", ".join(shown(c, cost(c, g)) for c in recorded)))
    tables[-1].notes = left_out(comparison)
    return tables


def _spread_of(metric: str, n: int, group: Group) -> str:
    return spread(metric, group.summary(metric), n)


def _level_name(key: str, level: str, groups: Iterable[Group]) -> str:
    """A subset of the labels is named by its size too."""
    sizes = {group.values.get("train_images", ABSENT) for group in groups}
    size = sizes.pop() if len(sizes) == 1 else ABSENT
    if key not in ("data.train_fraction", "data.shots_per_class") or not size.isdigit():
        return level
    return f"{level} ({plural(int(size), 'image')})"


def left_out(comparison: Comparison) -> list[str]:
    """What the numbers of a table do not contain: runs by what became of them, a line each."""
    lines = []
    if comparison.left_out:
        runs = sorted(comparison.left_out, key=lambda run: run.path)
        statuses = [run.status for run in runs]
        counts = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)]
        lines.append(f"left out: {', '.join(counts)}")
        listed: dict[str, list[Run]] = {}
        for run in runs[:LISTED]:
            listed.setdefault(f"- {run.status}: {run.error}".removesuffix(": "), []).append(run)
        for reason, alike in listed.items():
            lines += [reason, *(f"  - {run.path}" for run in alike)]
        if len(statuses) > LISTED:
            lines.append(f"- and {len(statuses) - LISTED} more: see --each")
    if comparison.repeats:
        older = plural(len(comparison.repeats), "older run")
        lines.append(f"left out: {older} of a config and seed that ran again")
    return lines


def key_table(comparison: Comparison) -> Table:
    """Every config key that differs, with its values."""
    table = Table([Column("key", ["key"]), Column("values", ["values"])])
    for key in (*comparison.columns, *comparison.along):
        for column, text in zip(
            table.columns, (key, ", ".join(comparison.levels(key))), strict=True
        ):
            column.add(text, text)
    return table


def run_table(runs: Sequence[Run], keys: Sequence[str]) -> Table:
    """A row for each run, whatever became of it."""
    names = [*dict.fromkeys(name for run in runs for name in run.metrics)]
    names.sort(key=lambda name: (not is_share(name), name))  # accuracies first
    columns: list[Column] = []
    costs: list[Column] = []
    for name in (*names, *COSTS):
        numbers = [run.number(name) for run in runs]
        if any(number is not None for number in numbers):
            column = Column(heading(name), [name], is_spare=not is_share(name))
            (costs if name in COSTS else columns).append(column)
            for number in numbers:
                column.add(shown(name, number), number)
    values = [run.values for run in runs]
    columns += _key_columns([*keys, "seed", "status"], values)
    columns += [*costs, *_key_columns(["train_images"], values)]
    for key, texts in (("run", [str(r.path) for r in runs]), ("error", [r.error for r in runs])):
        columns.append(Column(key, [key]))
        for text in texts:
            columns[-1].add(text, text)
    return Table(columns)


def metric_names(comparison: Comparison, asked: Sequence[str] = ()) -> list[str]:
    """Those asked for, or what the runs went by, or any.

    Raises:
        ValueError: no run has one of them.
    """
    there = comparison.metrics()
    if asked:
        return [known(name, [*there, *COSTS], "metric") for name in asked]
    runs = [run for group in comparison.groups for run in group.runs.values()]
    monitors = {objective(run.config)[0] for run in runs}
    usual = sorted(name for name in there if name.replace("test/", "val/") in monitors)
    # Where there is a target, its accuracy is what counts; an oracle's has the last column.
    order = ["test_target/acc", *usual, "oracle/acc"]
    if not there:
        raise ValueError("these runs have no metrics")
    return [name for name in order if name in there] or there[:2]
