"""A new run: what a resolved config describes, in a run folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from graft.runs.folder import RunFolder, run_name
from graft.runs.resume import resume_run, run_of_this_job
from graft.runs.startup import import_libraries, is_first_process
from graft.runs.train import run_in_folder
from graft.storage.reading import read_yaml_mapping


def run(
    config: dict[str, Any],
    overrides: list[str],
    choices: Mapping[str, str | None] | None = None,
) -> dict[str, float]:
    """Train what a resolved config describes, in a run folder of its own.

    A SLURM job that was requeued goes on with the run it had begun.

    Args:
        choices: the option of each config group; that of `experiment` names the folder.

    Returns the metrics of the run: the monitored one of the best checkpoint, and those of its test.
    """
    return run_with_folder(config, overrides, choices)[0]


def run_with_folder(
    config: dict[str, Any],
    overrides: list[str],
    choices: Mapping[str, str | None] | None = None,
    *,
    embedded: bool = False,
) -> tuple[dict[str, float], Path | None]:
    """`run`, and its folder: None on ranks that write nothing.

    Args:
        embedded: in a process that goes on, a notebook's say: see `StopSignals`.
    """
    import_libraries()
    logs = Path(config["paths"]["logs"])
    if begun := run_of_this_job(logs, overrides):
        own = read_yaml_mapping(begun / "config.yaml") == config
        return resume_run(begun, trusted=own), begun
    folder = None
    if is_first_process():
        name = run_name(config, (choices or {}).get("experiment"), overrides)
        folder = RunFolder.create(logs, name, config, overrides, choices)
    with folder.locked() if folder is not None else nullcontext():
        metrics = run_in_folder(config, folder, embedded=embedded)
    return metrics, None if folder is None else folder.path
