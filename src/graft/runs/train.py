"""One run of a config: build, run the stages, test the best checkpoint, record."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.config.conflicts import reaching_some
from graft.config.objects import make
from graft.config.resolved import explain
from graft.runs.startup import quiet_libraries
from graft.training.signals import Preempted, Pruned, StopSignals, requeue

if TYPE_CHECKING:
    from graft.plan.results import Resumed, StageResult
    from graft.plan.stage import Stage
    from graft.runs.folder import RunFolder
    from graft.training.module import TransferModule


def run_in_folder(
    config: dict[str, Any],
    folder: RunFolder | None,
    resumed: Resumed | None = None,
    *,
    embedded: bool = False,
) -> dict[str, float]:
    """`train`, with what comes of it in the run folder.

    Args:
        embedded: see `StopSignals`.
    """
    from graft.reporting import report

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

    with StopSignals(end, embedded=embedded).handled() as stop:
        try:
            with stop.explaining_lost_ranks():
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
                "pruned",
                error=str(error),
                metrics={config["task"]["monitor"]: error.best},
                seconds=seconds(),
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
    """Build the objects, run the plan's stages, test the weights of the best validation.

    Args:
        folder: where everything is written; None on the ranks that write nothing.
        resumed: how far an interrupted run had come.
        stop: signals that are being listened to.
    """
    import lightning as L
    import torch

    from graft.data.items import FILE as SPLITS_FILE
    from graft.data.notes import notes
    from graft.features.store import FeatureStore
    from graft.plan.param_groups import describe_groups
    from graft.plan.results import PREVIOUS
    from graft.reporting import report, tensorboard
    from graft.reporting.collect import Collect
    from graft.reporting.loggers import advance, flush, rewind
    from graft.storage.digests import weights_digest
    from graft.storage.disk import write_atomically
    from graft.tasks.scores import Predictions, lowest_recall
    from graft.training.adabn import require_batch_norms
    from graft.training.build import build, build_stages, check_arguments, check_optimizers
    from graft.training.last_checkpoint import LastCheckpoint
    from graft.training.run_stages import StartStage, run_stages
    from graft.training.sampling import describe_weights, weigh
    from graft.training.trainer import (
        compile_blocks,
        describe_device,
        make_trainer,
        trainer_options,
    )

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
    for stage in stages:
        if stage.adabn:
            require_batch_norms(module.backbone, f"transfer.stages.{stage.name}.adabn")
    train_split = datamodule.splits["train"]
    learnt = train_split.labels if train_split.targets is None else train_split.targets
    module.task.prepare(learnt, datamodule.classes)
    datamodule.streams, datamodule.two_views = module.task.streams, module.task.two_views
    if module.task.classifies and "val_target" in datamodule.splits:
        datamodule.val_splits += ["val_target"]
    if config["data"].get("oracle"):
        datamodule.val_splits += ["test_target"]
    if config["trainer"]["compile"]:
        compile_blocks(module.backbone, config["trainer"]["compile"])
    path = folder.path if folder is not None else Path("unused-on-other-ranks")
    module.checkpoint_note = {
        "config": config,
        "classes": datamodule.classes,
        "value_range": datamodule.loaded.value_range,
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
        monitor=config["task"]["monitor"],
        loggers=loggers,
        stop=stop,
    )

    groups: dict[str, list[dict[str, Any]]] = {}

    def announce(stage: Stage) -> None:
        module.checkpoint_note["stage"] = stage.name
        rows = describe_groups(module.stage_groups(), module.backbone, module.head, module.task)
        report.print_stage(stage, rows, module.head)
        if folder is not None:
            groups[stage.name] = rows
            folder.update(stage=stage.name, groups=groups)
            tensorboard.log_groups(groups[stage.name], stage.name, loggers)

    if folder is not None:
        device = describe_device(options)
        record = datamodule.record()
        write_atomically(path / SPLITS_FILE, record.packed())
        for name, content in datamodule.run_inputs.files().items():
            write_atomically(path / name, content)
        train_images = len(datamodule.splits["train"])
        folder.update(device=device, train_images=train_images, data=record.summary())
        report.print_start(module.backbone, module.head, datamodule, device, path)
        steps = any(stage.solver == "sgd" for stage in stages)
        for note in notes(datamodule, steps=steps, augments=[stage.augment for stage in stages]):
            report.say(f"note: {note}")
        for note in reaching_some(config, folder.record["overrides"]):
            report.say(f"note: {note}")
        params = tensorboard.hyperparameters(config, folder.record["choices"], stages, datamodule)
        tensorboard.log_start(config, params, folder.record["overrides"], loggers)

    def conclude(result: StageResult) -> None:
        report.print_chosen(result)
        if folder is not None and result.head:
            folder.update(head=result.head)
        if folder is not None and result.grid is not None:
            result.grid.write(path / "grid.csv")
            tensorboard.log_grid(result.grid, loggers)
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
    if datamodule.sampling in ("importance", "hard"):
        devices, rank = options["devices"], int(os.environ.get("LOCAL_RANK", "0"))
        gpu = devices[rank] if isinstance(devices, list) else rank
        on_gpu = options["accelerator"] != "cpu" and torch.cuda.is_available()
        where = torch.device("cuda", gpu) if on_gpu else torch.device("cpu")
        datamodule.weights = weigh(module, datamodule, stages[0], new_store, where)
        report.say("note: " + describe_weights(datamodule.sampling, datamodule.weights))
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

    def test(split: str, *callbacks: L.Callback) -> dict[str, float]:
        datamodule.tested = split
        start = StartStage(stages[-1], len(stages) - 1, datamodule, new_store)
        trainer = new_trainer(stages[-1], [start, *callbacks])
        (metrics,) = trainer.test(module, datamodule=datamodule, verbose=False)
        return {key: float(value) for key, value in metrics.items()}

    tested: dict[str, float] = {}
    pictured: list[Collect] = []
    if options["limit_test_batches"] != 0 and not module.task.pretrains:  # the encoder counts
        if "test_target" in datamodule.splits:
            tested |= test("test_target")
        if (oracle := results[-1].oracle) is not None:
            tested["oracle/acc"] = oracle
        collect = Collect(tensorboard.EMBEDDED if tensorboard.shows_images(config["logger"]) else 0)
        tested |= test("test", collect)
        if module.task.classifies:
            pictured.append(collect)
            if folder is not None:
                predictions = Predictions.joined(collect.parts)
                folder.update(recall=lowest_recall(predictions, datamodule.classes))
    tensorboard.log_end(loggers, module.task.monitor, datamodule, pictured, results)
    return {module.task.monitor: results[-1].best_score, **tested}, module
