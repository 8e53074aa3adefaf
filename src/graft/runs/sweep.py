"""A sweep's folder: what it takes to start it again, and tables of its runs."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from graft.config import CONFIGS, leaves
from graft.disk import create_exclusively, write_atomically
from graft.names import visible
from graft.reading import read_yaml_texts

SWEEP = "sweep.yaml"

# What a sweep's own file may set of Hydra, which runs what its other keys name before we see it:
# KEY=VALUE, with no new line in a script of SLURM's.
OF_HYDRA = re.compile(
    r"(hydra/launcher=(in_process|processes|slurm)"
    r"|hydra/sweeper=(grid|optuna)"
    r"|(hydra\.sweeper\.(n_trials|seed|max_batch_size|(sampler|pruner)(\.\w+)*"
    r"|params\.(?!.*(\bhydra\b|\b_[a-z]+_\b))[\w./@+-]+)"
    r"|hydra\.launcher\.(n_jobs|devices|jobs_per_device|timeout_min|cpus_per_task|mem_gb|cluster"
    r"|options\.slurm_(account|constraint|partition|qos)))=[\w.,:@+\-\[\] ]*)"
)

read_from: Path | None = None  # the file that this process has the sweep's overrides from
failures: list[str] = []  # of the jobs of this process: a job that fails does not end a sweep


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


def start_again(sweep: Path, overrides: Sequence[str]) -> None:
    """The same command line, with `overrides` in place of earlier ones: what is done stays."""
    from graft.overrides import key_of, quoted
    from graft.runs.open import require_closed
    from graft.train import main

    asked = {key_of(override) for override in overrides}
    require_closed(sweep)
    noted = read_yaml_texts(sweep / SWEEP)  # ${...} as it was written
    before = [o for o in noted if key_of(o) not in asked]
    require_harmless(before, sweep / SWEEP)
    global read_from
    read_from = sweep / SWEEP
    folder = quoted("hydra.sweep.dir", str(sweep.resolve()))
    sys.argv[1:] = ["--multirun", *before, *overrides, folder]
    try:
        main()
    finally:
        read_from = None


def require_harmless(overrides: Sequence[str], source: Path) -> None:
    """Overrides that a file holds set values of a run, and of Hydra little.

    What else they name is looked at in the configs that they lead to: see `require_trusted`.

    Raises:
        ValueError: one of them would do more.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from graft.overrides import SEARCHPATH

    parser = OverridesParser.create()
    for text in overrides:
        reason = "it is an option" if text.startswith("-") else ""
        allowed = f"to allow it: graft resume {source.parent} {shlex.quote(text[:1000])}"
        if not reason:
            override = parser.parse_override(text)
            key, package = override.key_or_group, override.package or ""
            value = override.value()
            if key == SEARCHPATH:
                reason = f"Hydra runs what configs name before it can be looked at; {allowed}"
            elif "${" in text + str(value):  # a few lines of them unfold to gigabytes
                reason = f"${{...}} of a file is not resolved; {allowed}"
            elif any(re.match(r"hydra(\W|$)", part) for part in (key, package)):
                pairs = [f"{k}={getattr(v, 'text', v)}" for k, v in leaves(value, key)]
                known = not package and all(map(OF_HYDRA.fullmatch, pairs))
                reason = "" if known else "it sets more of Hydra than a sweep needs"
            elif (CONFIGS / key).is_dir() and re.search(r"\.\.|^/", text.partition("=")[2]):
                reason = "it chooses a file outside of the configs"
        if reason:
            raise ValueError(visible(f"{source}: {text[:200]} is not used: {reason}"))


def summarise(sweep: Path) -> str:
    """Write the tables of a sweep's folder; returns what to show of them.

    `summary.csv` has a row for each run in the order of the jobs, `summary.md` one for each group
    of seeds. Where exactly two keys were swept, `table.md` has one down and the other across;
    `table.csv` its numbers, a row for each cell.
    """
    from graft.runs.compare import metric_names
    from graft.runs.groups import grouped
    from graft.runs.records import read_run, run_folders
    from graft.runs.table import terminal_width
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
    lines += [table.plain(terminal_width()) for table in tables]
    return "\n".join([*lines, f"written   {written}; more: graft compare {sweep}"]) + "\n"
