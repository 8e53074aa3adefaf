"""The jobs of a sweep: composed and checked together, queued as run folders, run, resumed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from graft.config.overrides import key_of, place, quoted, whole_command
from graft.config.resolved import check, chosen_options, leaves
from graft.config.words import plural
from graft.reporting.console import console
from graft.runs.entry import failures
from graft.runs.folder import FINAL, RunFolder, run_name
from graft.runs.records import objective, read_run, run_folders
from graft.runs.trust import require_trusted
from graft.storage.disk import remove_leftovers
from graft.storage.reading import read_yaml_mapping
from graft.sweeps import sweep
from graft.sweeps.compose import Composer
from graft.sweeps.progress import Progress
from graft.sweeps.sweep import make_folder, note_command, summarise
from graft.training.signals import Preempted, StopSignals, requeue

UNENDED = ("queued", "running")  # what a process leaves that could not record its end
POLL_SECONDS = 0.2


@dataclass
class Job:
    """One run of a sweep.

    `label` is what was swept over; `trusted`: its config is that of one's own command line.
    """

    number: int
    label: str
    folder: RunFolder
    trusted: bool = False

    @property
    def status(self) -> str:
        return str(self.folder.record["status"])

    @property
    def trainer(self) -> dict[str, Any]:
        return self.folder.record["config"]["trainer"]

    @property
    def score(self) -> float:
        """The best of the monitored metric, which is what a sweep optimises."""
        monitor, _ = objective(self.folder.record["config"])
        return float(self.folder.record["metrics"].get(monitor, "nan"))

    def record_end(self, reason: str, status: str = "failed") -> None:
        """Read what came of it, or note the reason where its process could not."""
        self.folder = RunFolder.open(self.folder.path)
        if self.status not in UNENDED:
            return
        with suppress(ValueError), self.folder.locked():  # or another process is at it
            self.folder = RunFolder.open(self.folder.path)  # or has ended it by now
            if self.status in UNENDED:
                self.folder.update(status=status, error=reason)


class Runner(Protocol):
    """Where jobs run. `quiet`: what they print goes to a file of theirs."""

    quiet: bool

    def check(self, trainer: dict[str, Any]) -> None:
        """Raises a ValueError if a job with this `trainer` cannot run there."""

    def is_free(self) -> bool: ...

    def start(self, job: Job) -> bool:
        """False: there are not enough free devices for it yet."""

    def has_ended(self, job: Job) -> bool:
        """And if so, it is settled."""

    def stop(self, jobs: Sequence[Job]) -> None:
        """Have them save what they can be resumed from, and wait for that."""


class SweepLauncher(Launcher):
    """Base of our launchers, which differ by their runner."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
        if "TORCHELASTIC_RUN_ID" in os.environ or tasks > 1:
            raise ValueError("a sweep is one process, which starts those of its jobs: run it alone")
        self.config = config
        self.common = {*whole_command(config.hydra, config.hydra.overrides.task)}
        self.composer = Composer(hydra_context.config_loader, config)
        by_time = "${now:" in OmegaConf.to_container(config.hydra.sweep, resolve=False)["dir"]  # type: ignore[index, call-overload]
        self.path = make_folder(place(config.hydra.sweep.dir), exclusively=by_time)
        with read_write(config):
            config.hydra.sweep.dir = str(self.path)
        self.lock = FileLock(self.path / ".lock")
        self.earlier: dict[str, list[Path]] | None = None

    def note_command(self) -> None:
        """What `graft resume` starts again; of a sweep that is locked, whose jobs are possible."""
        overrides = self.config.hydra.overrides
        own = ("hydra.sweep.dir", "hydra.mode")
        given = [o for o in (*overrides.task, *overrides.hydra) if key_of(o) not in own]
        command = whole_command(self.config.hydra, given)
        keys = {key_of(override) for override in command}
        for name, path in self.config.paths.items():  # of the environment, which may be another
            if f"paths.{name}" not in keys:
                command.append(quoted(f"paths.{name}", str(place(path))))
        note_command(self.path, command)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        console.print(f"sweep     {plural(len(job_overrides), 'job')} in {self.path}")
        composed = [self.compose(overrides) for overrides in job_overrides]  # or none is run
        with self.locked():
            self.note_command()
            jobs = [self.queue(initial_job_idx + i, *parts) for i, parts in enumerate(composed)]
            left = [job for job in jobs if job.status not in FINAL]
            self.run(left, len(jobs), skipped=len(jobs) - len(left))
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=job.score) for job in jobs]

    def compose(self, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
        """The checked config of a job, its overrides, the options of its config groups."""
        setup_globals()
        config = self.composer.compose(overrides)
        HydraConfig.instance().set_config(config)
        hydra = config.hydra
        with open_dict(config):
            del config["hydra"]
        plain = check(config)
        self.runner.check(plain["trainer"])
        overrides = whole_command(self.config.hydra, hydra.overrides.task)
        return plain, overrides, chosen_options(hydra.runtime.choices)

    def queue(
        self, number: int, config: dict[str, Any], overrides: list[str], choices: dict[str, Any]
    ) -> Job:
        """Its run folder: of an earlier start of this sweep, or a new one."""
        swept = [o for o in overrides if o not in self.common]
        if self.earlier is None:
            self.earlier = {}
            for path in sorted(run_folders(self.path)):
                self.earlier.setdefault(_identity(read_run(path).config), []).append(path)
        source = sweep.read_from
        trusted = source is None
        if source is not None:  # whoever wrote it must not say what is run
            require_trusted(config, source)
        if found := self.earlier.get(_identity(config)):
            folder = RunFolder.open(found.pop(0))
            # Not only the copy in run.json, which it was found by.
            own = read_yaml_mapping(folder.path / "config.yaml")
            trusted = trusted and _identity(own) == _identity(config)
        else:
            name = run_name(config, choices.get("experiment"), swept)
            folder = RunFolder.create(self.path, name, config, overrides, choices, job=number)
        return Job(number, " ".join(swept), folder, trusted)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this process runs the sweep.

        Raises:
            ValueError: another one does.
        """
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"another process is running the sweep in {self.path}") from error
        try:
            remove_leftovers(self.path)
            yield
        finally:
            self.lock.release()

    def run(
        self,
        jobs: Iterable[Job],
        total: int,
        ended: Callable[[Job], Any] = lambda job: None,
        skipped: int = 0,
    ) -> None:
        """Run jobs as devices become free; `jobs` is asked for the next one only then.

        Args:
            total: how many there are, with those `skipped`, which ended earlier.
            ended: called with each of `jobs` that has ended.

        Raises:
            Preempted: a signal, or Ctrl-C. Nothing is started any more, what ran is saved.
        """
        progress = Progress(total, skipped)
        if skipped:
            console.print(f"sweep     {skipped} of {plural(total, 'job')} ended earlier")
        running: list[Job] = []
        try:
            with StopSignals().handled() as stop, progress.shown(live=self.runner.quiet):
                self._run(iter(jobs), running, progress, ended, stop)
        except BaseException as error:
            self.runner.stop(running)  # which a second signal cuts short
            if isinstance(error, Preempted):
                print(summarise(self.path), end="")
                print(f"{error}; to go on: graft resume {self.path}")
                if outcome := requeue(error.signum):
                    print(outcome)
            raise
        print(summarise(self.path), end="")
        if progress.failed:
            failed = plural(len(progress.failed), "job")
            print(f"again     graft resume {self.path} retries {failed}")
        failures.extend(progress.failed)

    def _run(
        self,
        jobs: Iterator[Job],
        running: list[Job],
        progress: Progress,
        ended: Callable[[Job], Any],
        stop: StopSignals,
    ) -> None:
        waiting: Job | None = None
        more = True
        due = 0.0  # of a sweep of thousands the tables take longer to write than jobs to end
        while running or waiting or more:
            if stop.received:  # raised, and caught by somebody: within an import, say
                raise Preempted(stop.received)
            while waiting or (more and self.runner.is_free()):
                waiting = waiting or next(jobs, None)
                if waiting is None:
                    more = False
                elif waiting.status in FINAL:
                    progress.skipped += 1
                    ended(waiting)
                    waiting = None
                elif self.runner.start(waiting):
                    running.append(waiting)
                    waiting = None
                else:
                    break
            progress.update(len(running))
            over = [job for job in running if self.runner.has_ended(job)]
            for job in over:
                running.remove(job)
                ended(job)
                if (began := time.monotonic()) >= due:
                    summarise(self.path)
                    took = time.monotonic() - began
                    due = began + 20 * took if took > 0.5 else 0.0
                progress.end(job.label, job.folder.record, len(running))
            if running and not over:
                time.sleep(POLL_SECONDS)


def _identity(config: dict[str, Any]) -> str:
    """Equal for jobs of the same result, wherever caches lie."""
    values = {key: value for key, value in leaves(config) if not key.startswith("paths.")}
    values.pop("data.source.cache", None)
    values.pop("data.source.download", None)
    return json.dumps(values, sort_keys=True)
