"""`graft train`: compose, build, run the stages, test the best checkpoint, record."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from graft.config import CONFIGS, bind, check, explain, make

if TYPE_CHECKING:
    from graft.data.datamodule import TransferDataModule
    from graft.heads import Head
    from graft.module import TransferModule
    from graft.runs.folder import RunFolder
    from graft.transfer.stages import Stage, StageResult

failures: list[str] = []  # of the jobs of this process: a job that fails does not end a sweep


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(config: DictConfig) -> float:
    """One job. Returns the best validation accuracy, which is what a sweep optimises."""
    overrides = list(HydraConfig.get().overrides.task)
    try:
        return job(config, overrides)
    except Exception as error:
        if "GRAFT_SHORT_ERRORS" not in os.environ:
            raise
        failures.append(explain(error))
        print(f"graft: error: {failures[-1]}", file=sys.stderr)
        return float("nan")


def job(config: DictConfig, overrides: list[str]) -> float:
    plain = check(config)  # before torch is imported
    hydra_config = HydraConfig.get()
    parent = Path(plain["paths"]["logs"])
    if hydra_config.mode == RunMode.MULTIRUN:
        parent = Path(hydra_config.sweep.dir)
    experiment = hydra_config.runtime.choices.get("experiment")
    return run(plain, overrides, experiment, parent=parent)["val/acc"]


def run(
    config: dict[str, Any],
    overrides: list[str],
    experiment: str | None = None,
    *,
    parent: Path | None = None,
) -> dict[str, float]:
    """Train what a resolved config describes, in a run folder of its own.

    Returns the metrics of the run: val/acc of the best checkpoint, test/acc and test/loss of it.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from graft import report
    from graft.runs.folder import RunFolder, run_name

    quiet_libraries()
    folder = None
    parent = parent or Path(config["paths"]["logs"])
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        name = run_name(experiment, overrides, config["seed"])
        folder = RunFolder.create(parent, name, config, overrides)
    started = time.perf_counter()
    try:
        metrics, _ = train(config, folder)
    except BaseException as error:
        if folder is not None:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            (folder.path / "error.log").write_text(traceback.format_exc())
            folder.finish(
                "preempted" if interrupted else "failed",
                error=explain(error),
                seconds=round(time.perf_counter() - started, 1),
            )
        raise
    if folder is not None:
        seconds = time.perf_counter() - started
        folder.finish("done", metrics=metrics, seconds=round(seconds, 1))
        report.print_result(metrics, seconds, folder.path, parent)
    return metrics


def train(
    config: dict[str, Any], folder: RunFolder | None
) -> tuple[dict[str, float], TransferModule]:
    """Build the objects, run the plan's stages, test the weights with the best val/acc.

    Args:
        folder: where everything is written; None on the ranks that write nothing.
    """
    import lightning as L
    import torch

    from graft import heat_map, report
    from graft.trainer import compile_blocks, make_trainer, trainer_options
    from graft.transfer.stages import StartStage, run_stages
    from graft.transfer.stored import FeatureStore

    L.seed_everything(config["seed"], workers=True, verbose=False)
    options = trainer_options(config["trainer"])
    torch.set_float32_matmul_precision("high")  # TF32 where there is one
    module, datamodule = build(config)
    if config["trainer"]["compile"]:
        compile_blocks(module.backbone, config["trainer"]["compile"])
    path = folder.path if folder is not None else Path("unused-on-other-ranks")
    module.checkpoint_note = {"config": config}
    loggers = []
    if folder is not None:
        loggers = [make(c, save_dir=path) for c in (config["logger"] or {}).values() if c]
    new_trainer = partial(
        make_trainer, options=options, callbacks=config["callbacks"] or {}, loggers=loggers
    )

    def announce(stage: Stage) -> None:
        module.checkpoint_note["stage"] = stage.name
        report.print_stage(module, stage)
        if folder is not None:
            folder.update(stage=stage.name)

    if folder is not None:
        report.print_start(module, datamodule, describe_device(options), path)

    def conclude(result: StageResult) -> None:
        report.print_chosen(result)
        if folder is not None and result.head:
            folder.update(head=result.head)
        if folder is not None and result.grid is not None:
            result.grid.write(path / "grid.csv")
            heat_map.log(result.grid, loggers)

    stages = build_stages(config)
    new_store = partial(
        FeatureStore,
        cache=Path(config["paths"]["cache"]).expanduser(),
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
        on_stage=announce,
        on_result=conclude,
    )
    start = StartStage(stages[-1], len(stages) - 1, datamodule, new_store)
    trainer = new_trainer(stages[-1], [start])
    tested = trainer.test(module, datamodule=datamodule, verbose=False)[0]
    tested = {key: float(value) for key, value in tested.items()}
    return {"val/acc": results[-1].best_score, **tested}, module


def build(config: dict[str, Any]) -> tuple[TransferModule, TransferDataModule]:
    """Module and data of a config; the data is prepared, so sizes and classes are known."""
    from graft.heads import seeded_head
    from graft.module import TransferModule

    backbone = make(config["backbone"])
    backbone.mirror = config["mirror"]
    # `root` is in the group for the command line; only the source takes it.
    data = {key: value for key, value in config["data"].items() if key != "root"}
    datamodule = make(data, preprocessing=backbone.preprocessing, seed=config["seed"])
    datamodule.prepare_data()
    datamodule.setup()
    wanted = config["head"].get("num_classes")
    if wanted not in (None, datamodule.num_classes):
        raise ValueError(
            f"head.num_classes={wanted}, but the data has {datamodule.num_classes} classes "
            f"({', '.join(datamodule.classes[:5])}, ...): leave it null to follow the data"
        )
    head = seeded_head(
        bind_head(config), (backbone.num_features, datamodule.num_classes), head_seed(config)
    )
    module = TransferModule(
        backbone, head, datamodule.num_classes, label_smoothing=config["label_smoothing"]
    )
    return module, datamodule


def bind_head(config: dict[str, Any]) -> Callable[[int, int], Head]:
    """The config's head, to be called with (num_features, num_classes)."""
    ours = ("num_classes", "seed", "grid")
    return bind({key: value for key, value in config["head"].items() if key not in ours})


def head_seed(config: dict[str, Any]) -> int:
    seed = config["head"].get("seed")
    return config["seed"] if seed is None else seed


def build_stages(config: dict[str, Any]) -> list[Stage]:
    """The plan's stages in order; what a stage leaves null comes from the optimizer's config."""
    from graft.transfer.grid import Grid
    from graft.transfer.stages import Stage

    lists = config["head"].get("grid")
    stages: list[Stage] = []
    for name, values in config["transfer"]["stages"].items():
        values = dict(values)
        optimizer = {**config["optimizer"], **(values.pop("optimizer", None) or {})}
        for key in ("lr", "weight_decay"):
            if values.get(key) is None:
                values[key] = optimizer[key]
            optimizer.pop(key, None)
        schedule = values.pop("scheduler", None) or config["scheduler"]
        if lists is not None and not stages:  # the winner is the head of the stages that follow
            given = {"lr": values["lr"], "weight_decay": values["weight_decay"]}
            given["seed"] = head_seed(config)
            values["grid"] = Grid(
                bind_head(config), **{key: lists.get(key) or [own] for key, own in given.items()}
            )
        try:
            stages.append(
                Stage(
                    name=name,
                    optimizer=bind(optimizer),
                    schedule=bind(schedule),
                    **values,
                )
            )
        except TypeError as error:
            raise ValueError(f"transfer.stages.{name}: {error}") from error
    return stages


def describe_device(options: dict[str, Any]) -> str:
    import torch

    where = options["accelerator"]
    if where == "gpu":
        where = torch.cuda.get_device_name()
    elif where == "cpu":
        where = f"CPU, {torch.get_num_threads()} threads"
    return f"{where}, devices={options['devices']}, precision {options['precision']}"


def quiet_libraries() -> None:
    """Silence what a user can do nothing about; everything else stays."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",  # batches are one indexing call: workers cost time here
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*`broadcast_buffers` is deprecated.*",  # its replacement is not in torch 2.11
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*module.s. in eval mode at the start of training.*",  # frozen blocks are meant to be
    ):
        warnings.filterwarnings("ignore", message)


def entry() -> None:
    """The Hydra app, with errors in one line and an exit code that is not zero."""
    if os.environ.get("HYDRA_FULL_ERROR") != "1":  # the user's own 1 shows all of a traceback
        os.environ |= {"HYDRA_FULL_ERROR": "1", "GRAFT_SHORT_ERRORS": "1"}  # Hydra then raises
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if "GRAFT_SHORT_ERRORS" not in os.environ:
            raise
        sys.exit(f"graft: error: {explain(error)}")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    entry()
