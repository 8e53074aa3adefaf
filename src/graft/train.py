"""`graft train`: compose, build, run the stages, test the best checkpoint, record."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from graft.config import CONFIGS, check, explain, make

if TYPE_CHECKING:
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
    from graft import report
    from graft.runs.folder import RunFolder, run_name

    quiet_libraries()
    folder = None
    parent = parent or Path(config["paths"]["logs"])
    if is_first_process():
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


def is_first_process() -> bool:
    """Of all nodes; before a Trainer exists, Lightning may know the rank within this node only."""
    from lightning.pytorch.utilities import rank_zero_only

    return rank_zero_only.rank == 0 and int(os.environ.get("NODE_RANK", 0)) == 0  # type: ignore[attr-defined]


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
    from graft.build import build, build_stages
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
