"""Where Hydra looks for launchers and sweepers. Every command imports this: nothing heavy here."""

from __future__ import annotations

from graft.runs import processes
from graft.runs.launch import SweepLauncher


class InProcess(SweepLauncher):
    def __init__(self) -> None:
        super().__init__(processes.InProcess())


class Processes(SweepLauncher):
    def __init__(self, devices: str | list[int], jobs_per_device: int, n_jobs: int) -> None:
        super().__init__(processes.Processes(devices, jobs_per_device, n_jobs))
