"""Runs the jobs of a sweep on this machine: here, or in processes with a queue of devices."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from graft.config.kinds import POSITIVE_INT
from graft.config.resolved import explain
from graft.config.words import plural
from graft.reporting.console import console
from graft.runs.allowed import EVERYTHING, TRUST
from graft.sweeps.launch import Job
from graft.training.signals import handled_by
from graft.training.watch import PARENT

# What tells a process that it is a rank, or a task of SLURM: of whoever started the sweep.
RANK = re.compile(
    r"((LOCAL|NODE|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(TORCHELASTIC|SLURM|PL)_.*"
)


class Processes:
    """As many jobs at once as there are free devices, in the order of the sweep.

    A job is `graft resume FOLDER` in a session of its own, so that Ctrl-C comes to us alone; what
    it prints is in `output.log` of its folder.

    Args:
        devices: GPUs by number, or "auto" for all that are visible.
        jobs_per_device: how many share one.
        n_jobs: jobs at once, where they run on the CPU; they share its cores.
    """

    quiet = True

    def __init__(self, devices: str | Sequence[int], jobs_per_device: int, n_jobs: int) -> None:
        for key, value in (("jobs_per_device", jobs_per_device), ("n_jobs", n_jobs)):
            if not POSITIVE_INT[1](value):
                raise ValueError(f"hydra.launcher.{key}={value}: must be {POSITIVE_INT[0]}")
        if isinstance(devices, str) and devices != "auto":
            raise ValueError(f"hydra.launcher.devices={devices}: must be auto or a list like [0,1]")
        self.devices = devices
        self.jobs_per_device = jobs_per_device
        self.n_jobs = n_jobs
        self.on_gpus = False
        self.slots: list[str] = []  # a device for each job that it can take
        self.free: list[str] = []
        self.taken: dict[int, list[str]] = {}  # by number of the job
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def check(self, trainer: dict[str, Any]) -> None:
        if trainer["num_nodes"] != 1:
            raise ValueError(
                f"trainer.num_nodes={trainer['num_nodes']}: a sweep over several nodes needs "
                "hydra/launcher=slurm"
            )
        gpus = visible_gpus() if trainer["accelerator"] != "cpu" else []
        if self.devices != "auto":
            gpus = [str(device) for device in self.devices]
        if not self.slots:
            self.on_gpus = bool(gpus)
            self.slots = gpus * self.jobs_per_device or [f"cpu {i}" for i in range(self.n_jobs)]
            self.free = list(self.slots)
        if bool(gpus) != self.on_gpus:
            raise ValueError(
                f"trainer.accelerator={trainer['accelerator']}: the jobs of a sweep go to GPUs or "
                "to the CPU, not to both"
            )
        if self.on_gpus and isinstance(trainer["devices"], list):
            raise ValueError(
                f"trainer.devices={trainer['devices']}: a sweep chooses which GPUs; say how many"
            )
        if self.on_gpus and self.wanted(trainer) > (there := len(set(self.slots))):
            raise ValueError(
                f"trainer.devices={trainer['devices']}: the sweep's queue has "
                f"{plural(there, 'device')}"
            )

    def wanted(self, trainer: dict[str, Any]) -> int:
        """How many slots a job takes."""
        count = ranks(trainer)
        if not self.on_gpus:  # where more ranks than slots share the CPU, too
            return min(count or 1, len(self.slots))
        return count or len(set(self.slots))

    def is_free(self) -> bool:
        return bool(self.free) or not self.slots  # which the first job decides

    def start(self, job: Job) -> bool:
        wanted = self.wanted(job.trainer)
        chosen = [device for device, _ in Counter(self.free).most_common(wanted)]
        if len(chosen) < wanted:
            return False
        for device in chosen:
            self.free.remove(device)
        self.taken[job.number] = chosen
        self.spawn(job, self.environment(chosen))
        return True

    def environment(self, chosen: Sequence[str]) -> dict[str, str]:
        mine = {"CUDA_VISIBLE_DEVICES": ",".join(sorted(chosen))} if self.on_gpus else {}
        threads = max(1, cores() // len(self.slots))
        return {"OMP_NUM_THREADS": str(threads), **environment_without_ranks(), **mine}

    def spawn(self, job: Job, environment: dict[str, str]) -> None:
        path = job.folder.path
        trust = {TRUST: EVERYTHING} if job.trusted else {}
        with (path / "output.log").open("ab") as log:
            self.processes[job.number] = subprocess.Popen(
                [sys.executable, "-m", "graft.commands.resume", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, **trust, "PYTHONUNBUFFERED": "1", PARENT: str(os.getpid())},
                start_new_session=True,
            )

    def has_ended(self, job: Job) -> bool:
        process = self.processes[job.number]
        code = process.poll()
        if code is None:
            return False
        del self.processes[job.number]
        self.free += self.taken.pop(job.number, [])
        with suppress(ProcessLookupError):  # ranks that outlive the first one
            os.killpg(process.pid, signal.SIGKILL)
        job.record_end(_reason(job, code) if code else "ended without a result")
        return True

    def stop(self, jobs: Sequence[Job]) -> None:
        # Not those whose end was just seen.
        processes = [(j, self.processes[j.number]) for j in jobs if j.number in self.processes]

        def kill(*_: Any) -> None:
            for _job, process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

        if processes:
            count = plural(len(processes), "job")
            console.print(f"stopping  {count}, after a save; again to stop at once")
        with handled_by(kill):
            for _, process in processes:
                process.terminate()
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGCONT)  # one that is stopped could not save
            for job, process in processes:
                process.wait()
                job.record_end("stopped with the sweep, before it could save", "preempted")


class InProcess(Processes):
    """One after another, here; a job of several ranks as processes, so that what tells each of them
    its rank does not stay for the jobs that follow.
    """

    quiet = False

    def __init__(self) -> None:
        super().__init__("auto", 1, 1)
        self.busy = False

    def check(self, trainer: dict[str, Any]) -> None:
        if trainer["num_nodes"] != 1:
            super().check(trainer)

    def is_free(self) -> bool:
        return not self.busy

    def start(self, job: Job) -> bool:
        from graft.runs.resume import resume_run

        self.busy = True
        console.print()
        console.print(f"job {job.number + 1}: {job.label}")
        if job.trainer["strategy"] != "auto" or ranks(job.trainer) != 1:
            console.print(f"its own processes; see {job.folder.path}/output.log")
            self.spawn(job, environment_without_ranks())
            return True
        try:
            resume_run(job.folder.path, trusted=job.trusted)
            reason = ""
        except Exception as error:  # whatever it is, the next job is another one
            reason = explain(error)
        job.record_end(reason)
        return True

    def has_ended(self, job: Job) -> bool:
        self.busy = job.number in self.processes and not super().has_ended(job)
        return not self.busy


def ranks(trainer: dict[str, Any]) -> int | None:
    """Processes of a job on one node; None: as many as there are devices."""
    devices = trainer["devices"]
    if isinstance(devices, list):
        return len(devices)
    return None if devices in ("auto", -1, "-1") else int(devices)


def visible_gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment_without_ranks() -> dict[str, str]:
    """Ours, without what makes a process a rank of something else."""
    return {key: value for key, value in os.environ.items() if not RANK.fullmatch(key)}


def _reason(job: Job, code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = (job.folder.path / "output.log").read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("graft: error: ") if lines else f"exit code {code}"
