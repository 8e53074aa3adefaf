"""Runs the jobs of a sweep under SLURM, through submitit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.config.kinds import POSITIVE_INT
from graft.config.words import plural
from graft.reporting.console import console
from graft.sweeps.launch import Job
from graft.sweeps.processes import ranks

DELAY_SECONDS = 120  # between SLURM's warning and its time limit: to save in


class Slurm:
    """A job is `graft resume FOLDER` in each of its tasks; at its time limit, see `requeue`.

    Args:
        n_jobs: how many wait or run at once.
        options: more of submitit's parameters.
        cluster: "slurm", or "local" for submitit's own processes on this machine.
    """

    quiet = True

    def __init__(self, n_jobs: int, options: Mapping[str, Any], cluster: str) -> None:
        if not POSITIVE_INT[1](n_jobs):
            raise ValueError(f"hydra.launcher.n_jobs={n_jobs}: must be {POSITIVE_INT[0]}")
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # the one that runs save at
        try:
            import submitit
        except ImportError as error:
            raise ValueError("hydra/launcher=slurm needs submitit: pip install submitit") from error
        self.new_executor = submitit.AutoExecutor
        self.n_jobs = n_jobs
        self.options = options
        self.cluster = cluster
        self.submitted: dict[int, Any] = {}

    def check(self, trainer: dict[str, Any]) -> None:
        if ranks(trainer) is None:
            raise ValueError(
                f"trainer.devices={trainer['devices']}: say how many, for SLURM to find"
            )

    def is_free(self) -> bool:
        return len(self.submitted) < self.n_jobs

    def start(self, job: Job) -> bool:
        tasks = ranks(job.trainer)
        executor = self.new_executor(folder=job.folder.path / "slurm", cluster=self.cluster)
        executor.update_parameters(
            name="graft",
            nodes=job.trainer["num_nodes"],
            tasks_per_node=tasks,
            gpus_per_node=0 if job.trainer["accelerator"] == "cpu" else tasks,
            slurm_signal_delay_s=DELAY_SECONDS,
            stderr_to_stdout=True,
            **self.options,
        )
        self.submitted[job.number] = executor.submit(resume, str(job.folder.path), job.trusted)
        return True

    def has_ended(self, job: Job) -> bool:
        submitted = self.submitted[job.number]
        if not submitted.done():
            return False
        del self.submitted[job.number]
        job.record_end(f"ended as {submitted.state}; see {submitted.paths.stdout}")
        return True

    def stop(self, jobs: Sequence[Job]) -> None:
        """Leaves them to SLURM: closing a terminal is no reason to lose them."""
        if left := [job for job in jobs if job.number in self.submitted]:
            names = " ".join(self.submitted[job.number].job_id for job in left)
            count = plural(len(left), "job")
            console.print(f"note: SLURM keeps {count}; to cancel: scancel {names}")


def resume(path: str, trusted: bool = False) -> None:
    """In a task of SLURM."""
    from graft.runs.entry import entry
    from graft.runs.resume import resume_run

    entry(lambda: resume_run(Path(path), trusted=trusted))
