"""`graft train`: compose, build, run the stages, test the best checkpoint, record."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from graft.config import CONFIGS, check, chosen_options, explain
from graft.conflicts import without_effect
from graft.names import visible
from graft.objects import make
from graft.overrides import quote_paths, whole_command
from graft.reading import read_yaml_mapping
from graft.runs.sweep import failures
from graft.signals import Preempted, Pruned, StopSignals, requeue
from graft.startup import import_libraries, is_first_process, quiet_libraries

if TYPE_CHECKING:
    from graft.module import TransferModule
    from graft.runs.folder import RunFolder
    from graft.transfer.results import Resumed, StageResult
    from graft.transfer.stages import Stage


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(config: DictConfig) -> float:
    """One run; the jobs of a sweep are started by our launchers."""
    try:
        return job(config)
    except Exception as error:
        if "GRAFT_SHORT_ERRORS" not in os.environ:
            raise
        failures.append(explain(error))
        print(f"graft: error: {visible(failures[-1])}", file=sys.stderr)
        return float("nan")


def job(config: DictConfig) -> float:
    plain = check(config)  # before torch is imported
    hydra_config = HydraConfig.get()
    overrides = whole_command(hydra_config, hydra_config.overrides.task)
    if problem := without_effect(plain, overrides):
        raise ValueError(problem)
    if hydra_config.mode == RunMode.MULTIRUN:
        raise ValueError(
            f"hydra/launcher={hydra_config.runtime.choices['hydra/launcher']}: sweeps run with "
            "hydra/launcher=in_process, processes or slurm"
        )
    return run(plain, overrides, chosen_options(hydra_config.runtime.choices))["val/acc"]


def run(
    config: dict[str, Any],
    overrides: list[str],
    choices: Mapping[str, str | None] | None = None,
) -> dict[str, float]:
    """Train what a resolved config describes, in a run folder of its own.

    A SLURM job that was requeued goes on with the run it had begun.

    Args:
        choices: the option of each config group; that of `experiment` names the folder.

    Returns the metrics of the run: val/acc of the best checkpoint, test/acc and test/loss of it.
    """
    import_libraries()
    from graft.runs.folder import RunFolder, run_name
    from graft.runs.resume import go_on, run_of_this_job

    logs = Path(config["paths"]["logs"])
    if begun := run_of_this_job(logs, overrides):
        own = read_yaml_mapping(begun / "config.yaml") == config
        return go_on(begun, trusted=own)
    folder = None
    if is_first_process():
        name = run_name(config, (choices or {}).get("experiment"), overrides)
        folder = RunFolder.create(logs, name, config, overrides, choices)
    with folder.locked() if folder is not None else nullcontext():
        return recorded(config, folder)


def recorded(
    config: dict[str, Any], folder: RunFolder | None, resumed: Resumed | None = None
) -> dict[str, float]:
    """`train`, with what comes of it in the run folder."""
    from graft import report

    quiet_libraries()
    if folder is not None:
        folder.start()
    started = time.perf_counter()
    before = folder.record.get("seconds", 0.0) if folder is not None else 0.0

    def seconds() -> float:
        return round(before + time.perf_counter() - started, 1)

    def end(status: str, reason: str) -> None:
        """What is left to do where the process is ended; see `StopSignals`."""
        if folder is not None:
            folder.finish(status, error=reason, seconds=seconds())

    with StopSignals(end).handled() as stop:
        try:
            with stop.blamed():
                metrics, _ = train(config, folder, resumed, stop)
        except Preempted as error:
            stop.ending = True
            if folder is None and error.agreed:
                # To Lightning, another rank's code above 0 is a crash, after which it kills the
                # first one, which may not be done yet.
                sys.exit(0)
            if folder is not None:
                with suppress(OSError):
                    end("preempted", str(error))
                report.say(f"{error}; to go on: graft resume {folder.path}")
                if outcome := requeue(error.signum):
                    report.say(outcome)
            stop.end_ranks(kill=not error.agreed)
            raise
        except Pruned as error:
            if folder is None:
                sys.exit(0)  # as above
            folder.finish(
                "pruned", error=str(error), metrics={"val/acc": error.best}, seconds=seconds()
            )
            return folder.record["metrics"]
        except BaseException as error:
            stop.ending = True
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            with suppress(OSError):  # the error itself matters more
                end("preempted" if interrupted else "failed", explain(error))
            if folder is not None:
                text = traceback.format_exc().encode(errors="backslashreplace")
                with suppress(OSError):
                    (folder.path / "error.log").write_bytes(text)
            stop.end_ranks(kill=True)
            raise
    if folder is not None:
        folder.finish("done", metrics=metrics, seconds=seconds())
        report.print_result(folder.record, folder.path)
    return metrics


def train(
    config: dict[str, Any],
    folder: RunFolder | None,
    resumed: Resumed | None = None,
    stop: StopSignals | None = None,
) -> tuple[dict[str, float], TransferModule]:
    """Build the objects, run the plan's stages, test the weights with the best val/acc.

    Args:
        folder: where everything is written; None on the ranks that write nothing.
        resumed: how far an interrupted run had come.
        stop: signals that are being listened to.
    """
    import lightning as L
    import torch

    from graft import media, report
    from graft.build import build, build_stages, check_arguments, check_optimizers
    from graft.collect import Collect
    from graft.data.features import weights_digest
    from graft.data.items import FILE as SPLITS_FILE
    from graft.disk import write_atomically
    from graft.loggers import advance, flush, rewind
    from graft.scores import Predictions, lowest_recall
    from graft.trainer import compile_blocks, describe_device, make_trainer, trainer_options
    from graft.transfer.checkpoint import PREVIOUS
    from graft.transfer.last_checkpoint import LastCheckpoint
    from graft.transfer.stages import StartStage, run_stages
    from graft.transfer.stored import FeatureStore

    L.seed_everything(config["seed"], workers=True, verbose=False)
    options = trainer_options(config["trainer"])
    torch.set_float32_matmul_precision("high")  # TF32 where there is one
    check_arguments(config)
    stages = build_stages(config)
    check_optimizers(stages)
    module, datamodule = build(config, recorded=resumed.splits if resumed else None)
    if datamodule.changes:
        raise ValueError(
            "the data is not what this run has trained on: "
            f"{'; '.join(datamodule.changes.values())}: put it back, or start a new run"
        )
    if config["trainer"]["compile"]:
        compile_blocks(module.backbone, config["trainer"]["compile"])
    path = folder.path if folder is not None else Path("unused-on-other-ranks")
    module.checkpoint_note = {
        "config": config,
        "classes": datamodule.classes,
        "value_range": datamodule.value_range,
        "preprocessing": dataclasses.asdict(module.backbone.preprocessing),
    }
    loggers = []
    if folder is not None and folder.record.get("weights") is None:
        source = module.backbone.weights
        digest = weights_digest(module.backbone) if source else None  # random ones follow the seed
        folder.update(weights={"source": source or "random", "digest": digest})
    if folder is not None:
        loggers = [make(c, save_dir=path) for c in (config["logger"] or {}).values() if c]
    if resumed is not None:
        advance(loggers, sum(result.steps for result in resumed.done))
        rewind(loggers, resumed.step)
    new_trainer = partial(
        make_trainer,
        options=options,
        callbacks=config["callbacks"] or {},
        loggers=loggers,
        stop=stop,
    )

    groups: dict[str, list[dict[str, Any]]] = {}

    def announce(stage: Stage) -> None:
        module.checkpoint_note["stage"] = stage.name
        report.print_stage(module, stage)
        if folder is not None:
            groups[stage.name] = report.stage_table(module)
            folder.update(stage=stage.name, groups=groups)
            media.log_groups(groups[stage.name], stage.name, loggers)

    if folder is not None:
        device = describe_device(options)
        record = datamodule.record()
        write_atomically(path / SPLITS_FILE, record.packed())
        train_images = len(datamodule.splits["train"])
        folder.update(device=device, train_images=train_images, data=record.summary())
        report.print_start(module, datamodule, device, path)
        for note in datamodule.notes(steps=any(stage.solver == "sgd" for stage in stages)):
            report.say(f"note: {note}")
        params = media.hyperparameters(config, folder.record["choices"], stages, datamodule)
        media.log_start(config, params, folder.record["overrides"], loggers)

    def conclude(result: StageResult) -> None:
        report.print_chosen(result)
        if folder is not None and result.head:
            folder.update(head=result.head)
        if folder is not None and result.grid is not None:
            result.grid.write(path / "grid.csv")
            media.log_grid(result.grid, loggers)
        if folder is not None:
            flush(loggers)
            (path / "checkpoints" / result.name / PREVIOUS).unlink(missing_ok=True)
            # Last: from here on, resuming skips this stage.
            folder.update(stages=[*folder.record["stages"], result.record()])

    new_store = partial(
        FeatureStore,
        cache=Path(config["paths"]["cache"]),
        tell=report.say,
        progress=report.PartsBar(),
    )
    results = run_stages(
        module,
        datamodule,
        stages,
        new_trainer,
        path / "checkpoints",
        new_store=new_store,
        new_last=partial(
            LastCheckpoint,
            stop=stop,
            every_n_steps=config["trainer"]["checkpoint_every_n_steps"],
            every_n_minutes=config["trainer"]["checkpoint_every_n_minutes"],
        ),
        resumed=resumed,
        on_stage=announce,
        on_result=conclude,
    )
    start = StartStage(stages[-1], len(stages) - 1, datamodule, new_store)
    collect = Collect(media.EMBEDDED if media.shows_images(config["logger"]) else 0)
    trainer = new_trainer(stages[-1], [start, collect])
    tested = trainer.test(module, datamodule=datamodule, verbose=False)[0]
    tested = {key: float(value) for key, value in tested.items()}
    if folder is not None:
        recall = lowest_recall(Predictions.joined(collect.parts), datamodule.classes)
        folder.update(recall=recall)
    media.log_end(loggers, datamodule, [collect], results)
    return {"val/acc": results[-1].best_score, **tested}, module


def entry(command: Callable[[], Any] = main) -> None:
    """Run a command, with errors in one line and an exit code that is not zero."""
    if os.environ.get("HYDRA_FULL_ERROR") != "1":  # the user's own 1 shows all of a traceback
        os.environ |= {"HYDRA_FULL_ERROR": "1", "GRAFT_SHORT_ERRORS": "1"}  # Hydra then raises
    if str(Path.cwd()) not in sys.path:  # ranks and jobs import from where this process does:
        os.environ["PYTHONSAFEPATH"] = "1"  # not a `copy.py` that lies in the current folder
    failures.clear()
    try:
        sys.argv[1:] = quote_paths(sys.argv[1:])
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if "GRAFT_SHORT_ERRORS" not in os.environ:
            raise
        sys.exit(f"graft: error: {explain(error)}")
    except Preempted as error:
        sys.exit(128 + error.signum)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    entry()
