"""Optuna proposes the jobs of a sweep; its study is a file in the sweep's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import optuna
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from graft.config.objects import make
from graft.config.words import plural
from graft.reporting.console import console, measured
from graft.runs.entry import failures
from graft.runs.records import objective
from graft.runs.trust import require_trusted
from graft.storage.disk import write_atomically
from graft.storage.reading import read_bytes
from graft.sweeps import sweep
from graft.sweeps.launch import Job, SweepLauncher
from graft.training.best import Best
from graft.training.signals import Pruned

FILE = "optuna.log"


def open_study(sweep: Path, **keywords: Any) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = JournalStorage(JournalFileBackend(str(sweep / FILE)))
        return optuna.create_study(
            storage=storage,
            study_name="graft",
            load_if_exists=True,  # whose direction stays
            **keywords,
        )
    except Exception as error:  # of a damaged file, Optuna raises almost any
        raise ValueError(
            f"{sweep / FILE} is damaged ({' '.join(str(error).split())}): move it away, and "
            "the runs of the sweep stay"
        ) from error


def mend(path: Path) -> None:
    """Leave out lines that a process could not finish: Optuna reads nothing after such a one."""
    if not path.exists():
        return
    lines = read_bytes(path, 1 << 30).splitlines(keepends=True)
    whole = [line for line in lines if _is_record(line)]
    if whole != lines:
        console.print(f"note: {plural(len(lines) - len(whole), 'torn line')} left out of {path}")
        write_atomically(path, b"".join(whole))


def _is_record(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def search(
    launcher: SweepLauncher,
    overrides: Sequence[Override],
    n_trials: int,
    sampler: dict[str, Any],
    seed: int | None,
    pruner: dict[str, Any] | None,
) -> None:
    """Run trials until the study has `n_trials`.

    Trials that did not end, and those that failed, stay open in the study: they come first.
    """
    space: dict[str, BaseDistribution] = {}
    fixed: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element()
        space.pop(key, None)
        if override.is_sweep_override():
            space[key] = distribution(override)
        else:
            fixed[key] = override.get_value_element_as_str()
    with launcher.locked():
        config, *_ = launcher.compose([f"{key}={value}" for key, value in fixed.items()])
        monitor, mode = objective(config)
        launcher.note_command()
        mend(launcher.path / FILE)
        study = open_study(launcher.path, direction=f"{mode}imize")
        if seed is not None:  # or a study that goes on would draw what it drew before
            seed += len(study.trials)
        if sweep.read_from is not None:
            require_trusted({"sampler": sampler}, sweep.read_from)
        study.sampler = make(sampler, seed=seed)
        ended = sum(trial.state.is_finished() for trial in study.trials)

        def job(trial: Trial | FrozenTrial) -> Job:
            values = {**fixed, **trial.params}
            given = [f"{key}={value}" for key, value in values.items()]
            config, names, choices = launcher.compose(given)
            if pruner is not None:
                config["callbacks"] = {
                    **(config["callbacks"] or {}),
                    "prune": {
                        "_target_": f"{__name__}.{Prune.__name__}",
                        "trial": trial.number,
                        "pruner": pruner,
                    },
                }
            return launcher.queue(trial.number, config, names, choices)

        def jobs() -> Iterator[Job]:
            unended = study.get_trials(states=[TrialState.RUNNING])
            while unended or len(study.trials) < n_trials:
                trial = unended.pop(0) if unended else study.ask(space)
                try:
                    found = job(trial)
                except Exception as error:
                    # Else it would come first whenever the sweep is started again.
                    study.tell(trial.number, state=TrialState.FAIL)
                    if not isinstance(error, ValueError):
                        raise
                    failures.append(f"trial {trial.number}: {error}")
                    console.print(f"failed    {failures[-1]}")
                else:
                    yield found

        def tell(job: Job) -> None:
            if job.status == "done":
                study.tell(job.number, job.score)
            elif job.status == "pruned":
                study.tell(job.number, state=TrialState.PRUNED)

        launcher.run(jobs(), n_trials, tell, skipped=ended)
        if study.get_trials(states=[TrialState.COMPLETE]):
            best = study.best_trial
            values = " ".join(f"{key}={value}" for key, value in best.params.items())
            console.print(f"best      {monitor} {measured(monitor, study.best_value)}: {values}")


def distribution(override: Override) -> BaseDistribution:
    """What a sweep in Hydra's grammar means to Optuna."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        kind = IntDistribution if isinstance(sweep.start, int) else FloatDistribution
        return kind(sweep.start, sweep.end, log="log" in sweep.tags)  # type: ignore[arg-type]
    if isinstance(sweep, RangeSweep) and isinstance(numbers := sweep.range(), range):
        return IntDistribution(numbers[0], numbers[-1], step=numbers.step)
    return CategoricalDistribution(list(override.sweep_string_iterator()))


class Prune(L.Callback):
    """Tells the study of each validation, and ends the run if its pruner gives it up.

    Args:
        trial: number of the run's trial. The study is in the folder above the run's.
    """

    def __init__(self, trial: int, pruner: BasePruner) -> None:
        self.number = trial
        self.pruner = pruner

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        note: Any = pl_module.checkpoint_note
        epoch = trainer.current_epoch
        for name, stage in note["config"]["transfer"]["stages"].items():
            if name == note["stage"]:
                break
            epoch += stage["epochs"]
        best = None
        if trainer.is_global_zero:
            callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            run = next(c.path.parents[2] for c in callbacks if isinstance(c, Best))
            if (run.parent / FILE).exists():  # or the run was moved: nothing is made beside it
                study = open_study(run.parent, pruner=self.pruner)
                trial = Trial(study, study.trials[self.number]._trial_id)
                task: Any = pl_module.task
                trial.report(float(trainer.callback_metrics[task.monitor]), epoch)
                if trial.should_prune():
                    values = study.trials[self.number].intermediate_values.values()
                    best = max(values) if task.mode == "max" else min(values)
        best = trainer.strategy.broadcast(best)
        if best is not None:
            raise Pruned(epoch, best)
