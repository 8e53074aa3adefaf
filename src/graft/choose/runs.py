"""The runs of a race: normal runs in one folder, what each came to, and the time that is left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from graft.choose.entrants import FEATURES, Entrants
from graft.choose.halving import Arm, Cost, Result, learns, shortened, work
from graft.config.job import Job, compose_job
from graft.config.resolved import explain
from graft.runs.folder import FINAL, RunFolder
from graft.runs.records import read_run, run_folders
from graft.runs.resume import resume_run
from graft.storage.disk import write_atomically
from graft.storage.reading import read_json

STATE = "race.json"
NEIGHBOURS = "+callbacks.neighbours._target_=graft.choose.neighbours.Neighbours"
OVERHEAD = 1.0  # seconds of a run beside its stages, until one has been measured


class Runs:
    """Runs of a race, each made once; a race that was stopped finds those it has made.

    Attributes:
        state: what was measured and decided, in race.json: costs, rounds, seconds spent.
        costs: of each candidate.
        results: the latest of each arm; those of the first stage have FEATURES for a plan.
        failed: what became of arms whose run failed.
    """

    def __init__(
        self, folder: Path, entrants: Entrants, budget: float, tell: Callable[[str], None]
    ) -> None:
        self.folder, self.entrants, self.budget, self.tell = folder, entrants, budget, tell
        self.state: dict[str, Any] = {"spent": 0.0, "costs": {}, "part": None, "rounds": []}
        self.state["budget"] = budget
        if (folder / STATE).is_file():
            self.state |= read_json(folder / STATE)
        if budget > self.state["budget"]:  # what was decided for less time; runs are found again
            self.state |= {"part": None, "rounds": [], "budget": budget}
        self.started = time.monotonic() - self.state["spent"]
        self.costs = {name: Cost(**values) for name, values in self.state["costs"].items()}
        self.results: dict[Arm, Result] = {}
        self.failed: dict[Arm, str] = {}
        self.runs = [read_run(path) for path in sorted(run_folders(folder))]
        self.jobs: dict[tuple[Arm, float], Job] = {}
        self.overhead = OVERHEAD
        self.units: dict[tuple[str, bool], float] = {}  # seconds of a forward pass

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.budget - self.spent

    def save(self, **values: Any) -> None:
        self.state |= {**values, "spent": self.spent}
        write_atomically(self.folder / STATE, json.dumps(self.state, indent=1) + "\n")

    def full(self, arm: Arm) -> dict[str, Any]:
        """The config of a full run, but for its test."""
        return self.job(arm, 1.0).config

    def job(self, arm: Arm, share: float) -> Job:
        """
        Args:
            share: of a full training, or with FEATURES of the training images.
        """
        if (arm, share) not in self.jobs:
            overrides = [
                "logger=csv",
                *self.entrants.overrides(arm.candidate, arm.plan),
                f"name={arm.candidate}",
                "trainer.limit_test_batches=0",
            ]
            if arm.plan == FEATURES:
                overrides.append(NEIGHBOURS)
            if share < 1 and arm.plan == FEATURES:
                overrides += self._part(self.full(arm)["data"], share)
            elif share < 1:
                overrides += shortened(share, self.full(arm), self.costs[arm.candidate])
            self.jobs[arm, share] = compose_job(overrides)
        return self.jobs[arm, share]

    @staticmethod
    def _part(data: dict[str, Any], part: float) -> list[str]:
        if shots := data["shots_per_class"]:
            fewer = f"data.shots_per_class={max(1, round(part * shots))}"
        else:
            fewer = f"data.train_fraction={part * data['train_fraction']:.6f}"
        return [fewer, "data.batch_size=null"]  # which may be more than there are

    def run(self, arm: Arm, share: float) -> None:
        """Have a result of an arm, unless the time is over or its run fails."""
        job = self.job(arm, share)
        run = next((run for run in self.runs if run.config == job.config), None)
        if run is None or run.status not in FINAL:
            if self.left < (0.0 if arm.plan == FEATURES else self.predicted(arm, share)):
                return
            if run is None:
                name = f"{len(self.runs):03d}_{arm.candidate}_{arm.plan}"
                own = job.config, job.overrides, job.choices
                path = RunFolder.create(self.folder, name, *own, job=len(self.runs)).path
            else:
                path = run.path
                self.runs.remove(run)
            try:
                with (path / "output.log").open("a") as log, redirect_stdout(log):
                    resume_run(path, trusted=True)
            except Exception as error:  # whatever it is, the next run is another one
                self.failed[arm] = f"{explain(error)} ({path})"
            finally:
                self.save()
            run = read_run(path)
            self.runs.append(run)
        if run.status in FINAL:
            self._count(arm, share, run.record)

    def _count(self, arm: Arm, share: float, record: dict[str, Any]) -> None:
        cost, config = self.costs[arm.candidate], self.full(arm)
        fit = sum(stage["seconds"] for stage in record["stages"])
        passes = self._work(arm, share)
        if passes:
            self.units[arm.candidate, learns(config)] = fit / passes
        self.overhead = max(0.2, record["seconds"] - fit)
        before = self.results.get(arm)
        self.results[arm] = result = Result(
            record["metrics"]["val/acc"],
            share,
            record["seconds"],
            record["seconds"] + (before.spent if before else 0.0),
            record["seconds"] + self._unit(arm) * (work(config, cost) + cost.test - passes),
            record.get("gpu_memory_mb") or record["memory_mb"],
            (record.get("head") or {}).get("val/knn"),
        )
        score = f"val/acc {100 * result.score:6.2f} %"
        self.tell(f"          {arm!s:<40} {score}  {result.seconds:6.1f} s")

    def predicted(self, arm: Arm, share: float) -> float:
        """Seconds of a run that is to come."""
        return self.overhead + self._unit(arm) * self._work(arm, share)

    def _unit(self, arm: Arm) -> float:
        key = arm.candidate, learns(self.full(arm))
        return self.units.get(key, self.costs[arm.candidate].seconds)

    def _work(self, arm: Arm, share: float) -> float:
        cost, config = self.costs[arm.candidate], self.full(arm)
        if arm.plan == FEATURES:
            return work(config, cost, part=share)
        return work(config, cost, share=share, stored=self.state["part"] == 1)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While this process runs the race in it.

    Raises:
        ValueError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another process is running the race in {folder}") from error
    try:
        yield
    finally:
        lock.release()
