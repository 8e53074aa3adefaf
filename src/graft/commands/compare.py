"""`graft compare`: what differs between runs, and what came of it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from graft.commands import Parser
from graft.compare.groups import ABSENT, Comparison, grouped
from graft.compare.table import Table, terminal_width
from graft.compare.tables import (
    COSTS,
    cost,
    group_table,
    key_table,
    left_out,
    metric_names,
    pivot_tables,
    run_table,
)
from graft.config.overrides import place
from graft.reporting.console import is_share
from graft.runs.folder import STATUSES
from graft.runs.records import Run, as_number, find_runs, known, text


def main(arguments: Sequence[str]) -> None:
    try:
        _compare(_parser().parse_args(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"graft: error: {error}")


def _parser() -> argparse.ArgumentParser:
    logs = place(os.environ.get("GRAFT_LOGS") or "logs")
    parser = Parser(
        prog="graft compare",
        description="Runs grouped by everything but the seed: what differs, what came of it. "
        "KEY is a config key (name and tags too), a config group, seed, status, host, device, "
        "train_images, data.digest or backbone.weights.digest.",
    )
    add = parser.add_argument
    add("places", nargs="*", type=Path, default=[logs], metavar="RUN_OR_FOLDER",
        help=f"run folders, or folders with runs somewhere below (default: {logs})")  # fmt: skip
    add("--where", action="append", default=[], metavar="KEY=VALUE[,VALUE]", help="only these runs")
    add("--status", choices=(*STATUSES, "unreadable"))
    add("--metric", action="append", default=[], help="default: test/acc and val/acc")
    add("--sort", metavar="KEY", help=f"a metric, a config key or one of {', '.join(COSTS)}; "
        "accuracies fall, all else rises")  # fmt: skip
    add("--reverse", action="store_true", help="the other way round")
    add("--baseline", action="append", default=[], metavar="KEY=VALUE", help="paired t-test of "
        "the first metric against these runs, within equal other keys")  # fmt: skip
    add("--pivot", nargs=2, metavar=("ROW_KEY", "COLUMN_KEY"), help="one key down, another across")
    add("--each", action="store_true", help="a row for each run, finished or not")
    add("--keys", action="store_true", help="the config keys that differ, with their values")
    add("--csv", type=Path, metavar="FILE", help="all rows and columns in plain numbers")
    add("--md", type=Path, metavar="FILE", help="the tables as Markdown")
    add("--plot", type=Path, metavar="FILE", help="learning curves, and bars with intervals")
    return parser


def _compare(options: argparse.Namespace) -> None:
    runs = find_runs(options.places)
    keys = [*dict.fromkeys(key for run in runs for key in run.values)]
    for condition in options.where:
        key, wanted = _condition("--where", condition, keys, runs)
        there = [*dict.fromkeys(run.values.get(key, ABSENT) for run in runs if not run.problem)]
        runs = _chosen(runs, key, wanted)
        if not runs:
            more = ", ..." if len(there) > 8 else ""
            raise ValueError(f"--where {condition}: no run; there is {', '.join(there[:8])}{more}")
    if options.status:
        there = [*dict.fromkeys(run.status for run in runs)]
        runs = [run for run in runs if run.status == options.status]
        if not runs:
            raise ValueError(f"--status {options.status}: no run; they are {', '.join(there)}")
    comparison = grouped(runs)
    if options.each or options.keys or not comparison.groups:
        table = run_table(runs, comparison.columns)
        if options.keys:
            table = key_table(comparison)
        elif not options.each:
            table = Table([], "none of these runs is finished", left_out(comparison))
        _put([table], options.md)
        if options.csv:
            options.csv.write_text(table.csv(), encoding="utf-8")
        return
    metrics = metric_names(comparison, options.metric)
    comparison = _sorted(comparison, options.sort, options.reverse)
    baseline = {}
    for condition in options.baseline:
        key, (baseline[key], *_) = _condition("--baseline", condition, keys, runs)
    table = group_table(comparison, metrics, baseline)
    tables = [table]
    if options.pivot:
        row, column = (known(key, keys, "config key") for key in options.pivot)
        tables = pivot_tables(comparison, row, column, options.metric or metrics[:1])
    _put(tables, options.md)
    if options.csv:
        options.csv.write_text(table.csv(), encoding="utf-8")
    if options.plot:
        from graft.compare.plots import draw

        draw(comparison, metrics[0], options.plot)
        print(f"wrote {options.plot}")


def _put(tables: Sequence[Table], file: Path | None) -> None:
    print("\n".join(table.plain(terminal_width()) for table in tables), end="")
    if file:
        file.write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")


def _condition(
    option: str, condition: str, keys: Sequence[str], runs: Sequence[Run]
) -> tuple[str, list[str]]:
    """KEY=VALUE[,VALUE] taken apart; commas in brackets belong to a value. A number that no run
    has as it was typed (1e-3) is the number.
    """
    key, equals, values = condition.partition("=")
    if not equals:
        raise ValueError(f"{option} {condition}: write KEY=VALUE")
    key = known(key, keys, "config key")
    there = {run.values.get(key, ABSENT) for run in runs}

    def meant(value: str) -> str:
        number = as_number(value)
        return value if value in there or number is None else text(number)

    return key, [meant(value) for value in re.split(r",(?![^\[]*\])", values)]


def _chosen(runs: Sequence[Run], key: str, values: Sequence[str]) -> list[Run]:
    """What can't be read stays, to be listed."""
    return [run for run in runs if run.problem or run.has(key, values)]


def _sorted(comparison: Comparison, key: str | None, reverse: bool) -> Comparison:
    groups = list(comparison.groups)
    if key in (*comparison.metrics(), *COSTS):
        found = [(cost(key, group), group) for group in groups]
        have = [(number, group) for number, group in found if number is not None]
        have.sort(key=lambda pair: pair[0], reverse=is_share(key) != reverse)
        groups = [g for _, g in have] + [g for number, g in found if number is None]
    elif key is not None:
        known(key, [*comparison.metrics(), *COSTS, *comparison.columns], "metric or differing key")
        levels = comparison.levels(key)
        groups.sort(key=lambda g: levels.index(g.values.get(key, ABSENT)), reverse=reverse)
    elif reverse:
        groups.reverse()
    return replace(comparison, groups=groups)
