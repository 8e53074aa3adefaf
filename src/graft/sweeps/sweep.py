"""A sweep's folder: what it takes to start it again, and tables of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from graft.config.words import plural
from graft.runs.folder import SWEEP
from graft.storage.disk import create_exclusively, write_atomically

read_from: Path | None = None  # the file that this process has the sweep's overrides from


def make_folder(sweep: Path, *, exclusively: bool) -> Path:
    """The folder of a sweep; a new one, `sweep-2` say, where it must be."""
    with _told(sweep):
        if exclusively:
            sweep.parent.mkdir(parents=True, exist_ok=True)
            return create_exclusively(sweep.parent, sweep.name)
        sweep.mkdir(parents=True, exist_ok=True)
        return sweep


def note_command(sweep: Path, overrides: Sequence[str]) -> None:
    with _told(sweep):
        write_atomically(sweep / SWEEP, OmegaConf.to_yaml(OmegaConf.create(list(overrides))))


@contextmanager
def _told(sweep: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write to the sweep's folder {sweep} ({error.strerror or error}): set "
            "hydra.sweep.dir to one you may write to"
        ) from error


def summarise(sweep: Path) -> str:
    """Write the tables of a sweep's folder; returns what to show of them.

    `summary.csv` has a row for each run in the order of the jobs, `summary.md` one for each group
    of seeds. Where exactly two keys were swept, `table.md` has one down and the other across;
    `table.csv` its numbers, a row for each cell.
    """
    from graft.compare.groups import grouped
    from graft.compare.table import folded, terminal_width
    from graft.compare.tables import group_table, left_out, metric_names, pivot_tables, run_table
    from graft.runs.records import read_run, run_folders

    runs = [read_run(path) for path in run_folders(sweep)]
    runs.sort(key=lambda run: (run.record.get("job", 0), run.path))
    if not runs:
        return ""
    comparison = grouped(runs)
    write_atomically(sweep / "summary.csv", run_table(runs, comparison.columns).csv())
    done = sum(len(group.runs) for group in comparison.groups)
    lines = [f"\nsweep     {done} of {plural(len(runs), 'run')} done in {sweep}"]
    if not done:
        notes = left_out(comparison)
        write_atomically(sweep / "summary.md", "\n".join([*lines, *notes]) + "\n")
        return "\n".join([*lines, *(folded(note, terminal_width()) for note in notes)]) + "\n"
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
    lines += [table.plain(terminal_width()) for table in tables]
    return "\n".join([*lines, f"written   {written}; more: graft compare {sweep}"]) + "\n"
