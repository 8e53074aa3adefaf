"""A sweep's folder: what it takes to start it again, and tables of its runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

SWEEP = "sweep.yaml"

failures: list[str] = []  # of the jobs of this process: a job that fails does not end a sweep


def make_folder(sweep: Path) -> None:
    with _told(sweep):
        sweep.mkdir(parents=True, exist_ok=True)


def note_command(sweep: Path, overrides: Sequence[str]) -> None:
    from graft.runs.folder import write_atomically

    with _told(sweep):
        write_atomically(sweep / SWEEP, OmegaConf.to_yaml(OmegaConf.create(list(overrides))))


@contextmanager
def _told(sweep: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write to the sweep's folder {sweep} ({error.strerror}): set hydra.sweep.dir "
            "to one you may write to"
        ) from error


def start_again(sweep: Path, overrides: Sequence[str]) -> None:
    """The same command line, with `overrides` in place of earlier ones: what is done stays."""
    from graft.train import main

    def key(override: str) -> str:
        return override.lstrip("+~").partition("=")[0]

    asked = {key(override) for override in overrides}
    noted: Any = OmegaConf.to_container(OmegaConf.load(sweep / SWEEP))  # ${...} as it was written
    before = [str(o) for o in noted if key(str(o)) not in asked]
    folder = str(sweep.resolve()).replace("'", r"\'")
    sys.argv[1:] = ["--multirun", *before, *overrides, f"hydra.sweep.dir='{folder}'"]
    main()


def summarise(sweep: Path) -> str:
    """Write the tables of a sweep's folder; returns what to show of them.

    `summary.csv` has a row for each run in the order of the jobs, `summary.md` one for each group
    of seeds. Where exactly two keys were swept, `table.md` has one down and the other across;
    `table.csv` its numbers, a row for each cell.
    """
    from graft.runs.compare import metric_names
    from graft.runs.folder import write_atomically
    from graft.runs.groups import grouped
    from graft.runs.records import read_run, run_folders
    from graft.runs.tables import group_table, left_out, pivot_tables, run_table

    runs = [read_run(path) for path in run_folders(sweep)]
    runs.sort(key=lambda run: (run.record.get("job", 0), run.path))
    if not runs:
        return ""
    comparison = grouped(runs)
    write_atomically(sweep / "summary.csv", run_table(runs, comparison.columns).csv())
    done = sum(len(group.runs) for group in comparison.groups)
    lines = [f"\nsweep     {done} of {len(runs)} runs done in {sweep}"]
    if not done:
        text = "\n".join([*lines, *left_out(comparison)]) + "\n"
        write_atomically(sweep / "summary.md", text)
        return text
    metrics = metric_names(comparison)
    table = group_table(comparison, metrics)
    write_atomically(sweep / "summary.md", table.markdown())
    tables, written = [table], "summary.md, summary.csv"
    if len(comparison.columns) == 2:
        down, across = comparison.columns
        tables = pivot_tables(comparison, down, across, metrics[:1])
        text = "\n".join(table.markdown() for table in tables)
        write_atomically(sweep / "table.md", text)
        write_atomically(sweep / "table.csv", table.csv())
        written += ", table.md, table.csv"
    lines += [table.plain() for table in tables]
    return "\n".join([*lines, f"written   {written}; more: graft compare {sweep}"]) + "\n"
