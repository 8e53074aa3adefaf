"""The race: runs in one folder, each a normal run, and what the budget still allows."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from graft.choose.costs import NotAtHand, measure
from graft.choose.entrants import FEATURES, Entrants
from graft.choose.halving import (
    Arm,
    Cost,
    Result,
    first_part,
    halved,
    learns,
    next_round,
    shortened,
    work,
)
from graft.config.job import Job, compose_job
from graft.config.names import file_word
from graft.config.resolved import explain
from graft.config.words import plural
from graft.runs.folder import FINAL, RunFolder
from graft.runs.records import Run, read_run, run_folders
from graft.runs.resume import resume_run
from graft.storage.disk import readable, write_atomically
from graft.storage.reading import read_json

STATE = "race.json"
CLASSIFICATION = "graft.tasks.classification.Classification"
OVERHEAD = 1.0  # seconds of a run beside its stages, until one has been measured

Tell = Callable[[str], None]


def race_folder(logs: Path, entrants: Entrants) -> Path:
    """The same for the same command, whatever its budget: a second call goes on with the first."""
    said = json.dumps([entrants.data, entrants.own, entrants.candidates, entrants.plans])
    name = file_word(entrants.data[-1].strip("'").rpartition("/")[2].rpartition("=")[2])
    return logs / f"choose_{name}_{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def common_config(entrants: Entrants) -> dict[str, Any]:
    """The config of a run with the data and the overrides that all runs have.

    Raises:
        ValueError: it is wrong for whoever races.
    """
    config = compose_job([*entrants.data, *entrants.own]).config
    task, trainer = config["task"], config["trainer"]
    if task["_target_"] != CLASSIFICATION or task["monitor"] != "val/acc":
        raise ValueError(
            f"{task['_target_'].rpartition('.')[2]}, task.monitor={task['monitor']}: graft choose "
            "compares classifiers by val/acc"
        )
    if trainer["devices"] not in (1, "1") or trainer["num_nodes"] != 1:
        raise ValueError(
            f"trainer.devices={trainer['devices']}, num_nodes={trainer['num_nodes']}: a race takes "
            "one device"
        )
    return config


@dataclass
class Race:
    """Runs within a budget of seconds, in a folder that holds nothing else.

    Attributes:
        config: of a run with the overrides that all have in common.
        costs: by candidate.
        results: of each arm, the latest; those of the first stage have FEATURES for a plan.
        minutes: that the runs of each arm took.
        left_out: who does not run (any more), and why.
        finalists: arms that were never left out.
    """

    entrants: Entrants
    config: dict[str, Any]
    budget: float
    folder: Path
    tell: Tell
    download: bool = False
    costs: dict[str, Cost] = field(default_factory=dict)
    results: dict[Arm, Result] = field(default_factory=dict)
    minutes: dict[Arm, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    finalists: list[Arm] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    jobs: dict[tuple[Arm, float], Job] = field(default_factory=dict)
    overhead: float = OVERHEAD
    units: dict[tuple[str, bool], float] = field(default_factory=dict)

    def run(self) -> None:
        """All rounds; what an earlier call has finished is read.

        Raises:
            ValueError: nothing can run, or another process is at it.
            OSError: the disk does not hold the features.
        """
        with self._locked():
            path = self.folder / STATE
            self.state = {"spent": 0.0, "costs": {}, "part": None, "rounds": []}
            if path.is_file():
                self.state |= read_json(path)
            self.started = time.monotonic() - self.state["spent"]
            self.runs = [read_run(found) for found in sorted(run_folders(self.folder))]
            self._measure()
            self._features()
            self._rounds()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"another process is running the race in {self.folder}") from error
        try:
            yield
        finally:
            lock.release()

    @property
    def left(self) -> float:
        return self.budget - self.spent

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    def _save(self) -> None:
        self.state["spent"] = self.spent
        write_atomically(self.folder / STATE, json.dumps(self.state, indent=1) + "\n")

    def _measure(self) -> None:
        """The costs of all candidates; those that cannot be built are left out."""
        absent: list[str] = []
        for name in self.entrants.candidates:
            if name in self.state["costs"]:
                self.costs[name] = Cost(**self.state["costs"][name])
                continue
            if self.state["rounds"]:
                self.left_out[name] = "it was not there when the race began"
                continue
            try:
                config = self.job(Arm(name, FEATURES)).config
                self.costs[name] = measure(config, download=self.download)
            except NotAtHand:
                absent.append(name)
                continue
            except (OSError, ValueError) as error:
                self.left_out[name] = explain(error)
                continue
            self.state["costs"][name] = asdict(self.costs[name])
            self._save()
        if absent:
            self.left_out[", ".join(absent)] = "weights not at hand (--download fetches them)"
        if not self.costs:
            if len(reasons := {*self.left_out.values()}) == 1:  # the data, or an override
                raise ValueError(reasons.pop())
            each = "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items())
            raise ValueError(f"no candidate can be built: {each}")

    def _features(self) -> None:
        """Ridge and nearest neighbours on features of a stratified part, for each candidate."""
        if self.state["part"] is None:
            self.state["part"], slow = first_part(self.costs, self.budget, self.overhead)
            self.state["slow"] = slow
            self._require_disk()
            self._save()
        self.left_out |= self.state["slow"]
        part = self.state["part"]
        for name, cost in self.costs.items():
            if name not in self.left_out:
                self.tell(f"features  {name}: {part * cost.train:.0f} of {cost.train} images")
                self._one(Arm(name, FEATURES), 1.0)
        if not self.results:
            raise ValueError(f"no candidate has features; the reasons are in {self.folder}")

    def _require_disk(self) -> None:
        racing = [c for name, c in self.costs.items() if name not in self.state["slow"]]
        rows = [4 * c.features * (self.state["part"] * c.train + c.val) for c in racing]
        cache = Path(self.job(Arm(next(iter(self.costs)), FEATURES)).config["paths"]["cache"])
        there = next(p for p in (cache, *cache.parents) if p.exists())
        if sum(rows) > (free := shutil.disk_usage(there).free):
            raise OSError(
                f"paths.cache={cache}: the features of {len(rows)} candidates take "
                f"{readable(sum(rows))}, and the disk has {readable(free)} free: make room, or set "
                "paths.cache to another disk"
            )

    def _rounds(self) -> None:
        scores = {a.candidate: (r.score, r.knn or 0.0) for a, r in self.results.items()}
        best = sorted(scores, key=lambda name: scores[name], reverse=True)[
            : math.ceil(len(scores) / 2)
        ]
        arms = [Arm(name, plan) for name in best for plan in self.entrants.plans]
        configs = {arm: self.job(arm).config for arm in arms}
        heads = [arm for arm in arms if not learns(configs[arm])]
        arms = [arm for arm in arms if arm not in heads]
        self.finalists = [Arm(name, FEATURES) for name in best[:1]]
        rounds = max(1, math.ceil(math.log2(len(arms) or 1)))
        done: list[Arm] = []
        for number in range(rounds):
            if number == len(self.state["rounds"]):
                share, running = next_round(
                    [*heads, *arms], self.left / (rounds - number), self._predicted
                )
                pairs = [[arm.candidate, arm.plan] for arm in running]
                self.state["rounds"].append({"share": share, "arms": pairs})
                self._save()
            planned = self.state["rounds"][number]
            running = [Arm(*pair) for pair in planned["arms"]]
            if not running:
                break
            long = f"{100 * planned['share']:.3g} % of a full training"
            self.tell(f"round {number + 1}   {plural(len(running), 'run')}, {long}")
            for arm in running:
                self._one(arm, planned["share"] if learns(configs[arm]) else 1.0)
            done += [arm for arm in heads if arm in self.results]
            heads = []
            ran = [arm for arm in arms if arm in running and arm in self.results]
            arms = halved(ran, self.results)
            if planned["share"] == 1:
                arms = ran
                break
        if done or arms:
            self.finalists = [*done, *arms]

    def job(self, arm: Arm, share: float = 1.0) -> Job:
        """The run of an arm, without a test."""
        if (arm, share) in self.jobs:
            return self.jobs[arm, share]
        overrides = ["logger=csv", *self.entrants.overrides(arm.candidate, arm.plan)]
        overrides += [f"name={arm.candidate}", "trainer.limit_test_batches=0"]
        cost, part = self.costs.get(arm.candidate), self.state["part"]
        if arm.plan == FEATURES:
            overrides.append("+callbacks.neighbours._target_=graft.choose.neighbours.Neighbours")
            overrides += self._part_of_images(part or 1.0)
        elif cost is not None and share < 1:
            overrides += shortened(share, self.job(arm).config, cost)
        job = compose_job(overrides)
        if arm.plan != FEATURES or part is not None:
            self.jobs[arm, share] = job
        return job

    def _part_of_images(self, part: float) -> list[str]:
        data = self.config["data"]
        if part == 1:
            return []
        if shots := data["shots_per_class"]:
            return [f"data.shots_per_class={max(1, round(part * shots))}"]
        return [f"data.train_fraction={part * data['train_fraction']:.6f}"]

    def _one(self, arm: Arm, share: float) -> None:
        """Run an arm, unless it has been, or the time is over."""
        job = self.job(arm, share)
        earlier = next((run for run in self.runs if run.config == job.config), None)
        if earlier is None or earlier.status not in FINAL:
            if self.left <= 0:
                return
            earlier = self._train(arm, job, earlier)
        if earlier.status not in FINAL:
            self.left_out[str(arm)] = f"its run failed: {earlier.error} ({earlier.path})"
            return
        self._count(arm, job, earlier, share)

    def _train(self, arm: Arm, job: Job, earlier: Run | None) -> Run:
        if earlier is None:
            name = f"{len(self.runs) + 1:03d}_{arm.candidate}_{arm.plan}"
            folder = RunFolder.create(
                self.folder, name, job.config, job.overrides, job.choices, job=len(self.runs)
            ).path
        else:
            folder = earlier.path
            self.runs.remove(earlier)
        try:
            with (folder / "output.log").open("a") as log, redirect_stdout(log):
                resume_run(folder, trusted=True)
        except Exception as error:  # whatever it is, the next run is another one
            self.tell(f"failed    {arm}: {explain(error)}")
        finally:
            self._save()
        self.runs.append(read_run(folder))
        return self.runs[-1]

    def _count(self, arm: Arm, job: Job, run: Run, share: float) -> None:
        cost = self.costs[arm.candidate]
        part = self.state["part"]
        first = arm.plan == FEATURES
        passes = work(
            self.job(arm).config,
            cost,
            share=share,
            part=part if first else 1.0,
            stored=part == 1 and not first,
        )
        stages = run.record["stages"]
        fit, seconds = sum(s["seconds"] for s in stages), run.record["seconds"]
        memory = run.record.get("gpu_memory_mb") or run.record["memory_mb"]
        monitor = job.config["task"]["monitor"]
        knn = (run.record.get("head") or {}).get("val/knn")
        result = Result(run.metrics[monitor], share, passes, fit, seconds, memory, knn)
        self.results[arm] = result
        self.minutes[arm] = self.minutes.get(arm, 0.0) + seconds / 60
        self.overhead = max(0.2, seconds - fit)
        if passes:
            self.units[arm.candidate, learns(job.config)] = fit / passes
        self.tell(f"  {arm!s:<44} val/acc {100 * result.score:6.2f} %  {seconds:6.1f} s")

    def _predicted(self, arm: Arm, share: float) -> float:
        """Seconds of a run that is to come."""
        config, cost = self.job(arm).config, self.costs[arm.candidate]
        unit = self.units.get((arm.candidate, learns(config)), cost.seconds)
        stored = self.state["part"] == 1
        return self.overhead + unit * work(config, cost, share=share, stored=stored)

    def full_seconds(self, arm: Arm) -> float:
        """Seconds of a full run, with its test and features of its own, by what was measured."""
        result, cost = self.results[arm], self.costs[arm.candidate]
        passes = work(self.job(arm).config, cost) + cost.test - result.work
        unit = self.units.get((arm.candidate, learns(self.job(arm).config)), cost.seconds)
        return result.seconds + unit * max(0.0, passes)
