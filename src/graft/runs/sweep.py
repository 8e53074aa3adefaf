"""What a sweep leaves behind: tables in its folder, up to date after each job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig


class Summary(Callback):
    """Hydra tells it of jobs where they run, and of the end of the sweep where it was started."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            summarise(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        print(summarise(Path(config.hydra.sweep.dir)), end="")


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
    runs.sort(key=lambda run: str(run.record.get("started")))  # names tell seconds: jobs share one
    if not runs:
        return ""
    comparison = grouped(runs)
    write_atomically(sweep / "summary.csv", run_table(runs, comparison.columns).csv())
    done = sum(len(group.runs) for group in comparison.groups)
    lines = [f"\nsweep     {done} of {len(runs)} runs done in {sweep}"]
    if not done:
        return "\n".join([*lines, *left_out(comparison)]) + "\n"
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
