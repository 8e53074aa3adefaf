"""A Lightning Trainer for one stage, with a device and a precision that is fast on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    LearningRateMonitor,
    RichProgressBar,
)
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from graft.config.objects import make
from graft.config.words import plural
from graft.models.backbone import Backbone
from graft.plan.stage import Stage
from graft.reporting.report import EpochLines, say
from graft.reporting.tensorboard import LogInputs
from graft.training.build import processes
from graft.training.checkpoint import AtomicCheckpointIO
from graft.training.last_checkpoint import LastCheckpoint
from graft.training.sharded import ShardedStrategy
from graft.training.signals import StopSignals
from graft.training.sync_norm import SyncBatchNorms

SHORT_PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
CPU_INSTRUCTIONS = {
    "bf16-mixed": ("amx_bf16", "avx512_bf16", "bf16"),  # the last of each is Arm's
    "16-mixed": ("amx_fp16", "avx512_fp16", "fp16_arith"),
}
"""Any of these, and a CPU computes in that precision about as fast as in float32, or faster."""
MOST_STEPS = 32  # a signal, and a checkpoint that is due, wait for the end of so many steps
CALLBACK_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_train_batch_end",
    "on_before_optimizer_step",
)
MODULE_HOOKS = (
    *CALLBACK_HOOKS[:-2],  # the last two are there: one is of l2_sp, one looks at the last batch
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "backward",
)
# Callbacks that will do with batches of several steps, whatever hooks they have.
KNOWN = (LastCheckpoint, LogInputs, LearningRateMonitor, RichProgressBar, EarlyStopping)


def trainer_options(config: dict[str, Any]) -> dict[str, Any]:
    """Resolve `auto` to a device and a precision.

    Raises:
        ValueError: a device that is not there, or processes that were started for one device.
    """
    ours = ("max_epochs", "compile", "checkpoint_every_n_steps", "checkpoint_every_n_minutes")
    options = {k: v for k, v in config.items() if k not in ours}
    if not torch.cuda.is_available():
        # Lightning's "1" has torch look for NVML's library whenever an Adam steps.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    if options["accelerator"] == "auto":
        options["accelerator"] = "gpu" if torch.cuda.is_available() else "cpu"
    if options["accelerator"] == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer: no GPU found by torch; use trainer=cpu or trainer=auto")
    on_cpu = options["accelerator"] == "cpu"
    if on_cpu and isinstance(options["devices"], list):
        raise ValueError(
            f"trainer.devices={options['devices']}: a list names GPUs, and this run is on the CPU: "
            "say how many processes"
        )
    if options["strategy"] == "auto" and processes(options) > 1:
        options["strategy"] = "ddp"  # ours: see make_trainer
    if options["strategy"] == "auto" and (count := started_processes()) > 1:
        raise ValueError(
            f"{count} processes were started for trainer.devices={options['devices']}, and none "
            "would know of the others: set trainer=ddp (or ddp_cpu), trainer.devices "
            "to the processes of a node and trainer.num_nodes"
        )
    if options["num_nodes"] > 1 and started_processes() == 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"trainer.num_nodes={options['num_nodes']}: nothing says where the nodes meet; start "
            "the run on each with torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    if on_cpu and options["sync_batchnorm"]:
        raise ValueError(
            "trainer.sync_batchnorm=true needs GPUs: torch's SyncBatchNorm trains on nothing else"
        )
    precision = str(options["precision"])
    precision = SHORT_PRECISIONS.get(precision, precision)
    if precision == "auto":
        fast = not on_cpu and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16-mixed" if fast else "32-true"
    if on_cpu and (needed := CPU_INSTRUCTIONS.get(precision)):
        has = torch.cpu.get_capabilities()  # not a stopwatch: the same machine gives the same bits
        if not any(has.get(name) for name in needed):
            say(
                f"note: this CPU has no instructions for trainer.precision={precision}, so it "
                "takes ten to hundreds of times as long as 32-true"
            )
    options["precision"] = precision
    return options


def describe_device(options: dict[str, Any]) -> str:
    where, devices = options["accelerator"], options["devices"]
    if where == "gpu":
        first = devices[0] if isinstance(devices, list) and devices else 0
        if first < torch.cuda.device_count():  # Lightning says it of one that is not there
            where = torch.cuda.get_device_name(first)
    elif where == "cpu":
        where = f"CPU, {plural(torch.get_num_threads(), 'thread')}"
    return f"{where}, devices={devices}, precision {options['precision']}"


def started_processes() -> int:
    """How many processes torchrun or srun started for this run; 1 without either."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))  # SLURM_NTASKS may count the whole job's


def compile_blocks(backbone: Backbone, mode: str | bool) -> None:
    """torch.compile each block, in place: the keys of checkpoints stay as they are, and a stage
    that starts behind a frozen prefix is compiled too.
    """
    for block in backbone.blocks:
        if next(block.parameters(), None) is not None:
            block.compile(mode=None if mode is True else mode)


def make_trainer(
    stage: Stage,
    needed: Sequence[L.Callback],
    *,
    options: dict[str, Any],
    callbacks: dict[str, Any],
    monitor: str = "val/acc",
    loggers: list[Logger],
    stop: StopSignals | None = None,
) -> L.Trainer:
    """The Trainer of one stage: `needed` callbacks first, then those of the config.

    Args:
        monitor: the metric that is printed.
        stop: takes the place of Lightning's own handling of signals.
    """
    terminal = sys.stdout.isatty()
    chosen = [*needed, *(make(c) for c in callbacks.values() if c)]
    chosen.append(RichProgressBar(leave=True) if terminal else EpochLines(monitor))
    if loggers:
        chosen += [LearningRateMonitor(logging_interval="step"), LogInputs(stage.name)]
    strategy = options["strategy"]
    if strategy == "fsdp" and stage.trainable != "head":
        strategy = ShardedStrategy()
    elif strategy in ("ddp", "fsdp"):  # there is nothing to shard in the training of a head
        # Buffers: see TransferModule.sync_batch_norms.
        strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if options["sync_batchnorm"]:
        plugins.append(SyncBatchNorms())
    options = {**options, "strategy": strategy, "sync_batchnorm": False}
    if options["accelerator"] == "cpu" and options["precision"] == "16-mixed":
        # Named rather than made, Lightning takes bfloat16 instead.
        plugins.append(MixedPrecision(options.pop("precision"), "cpu"))
    trainer = L.Trainer(
        **options,
        plugins=plugins,
        max_epochs=stage.epochs,
        callbacks=chosen,
        logger=loggers or False,
        enable_progress_bar=terminal,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in chosen),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the datamodule's order already knows the ranks
    )
    if options["num_nodes"] > 1 and not torch.distributed.is_initialized():
        place: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        if place.local_rank() == 0:
            where = f"{place.main_address}:{place.main_port}"
            print(f"nodes     waiting for {options['num_nodes']} at {where}", flush=True)
    if stop is not None:
        stop.take_over(trainer)
    return trainer


def steps_per_batch(trainer: Any) -> int:
    """How many steps Lightning may take for one batch: 1 where anything looks at each."""
    module, precision = trainer.lightning_module, trainer.precision_plugin
    plain = (
        type(trainer.strategy) is SingleDeviceStrategy
        and type(precision) in (Precision, MixedPrecision)
        and getattr(precision, "scaler", None) is None
        and type(trainer.profiler) is PassThroughProfiler
        and trainer.accumulate_grad_batches == 1
        and not trainer.gradient_clip_val
        and isinstance(trainer.limit_train_batches, float)  # 1 is one batch
        and trainer.limit_train_batches == 1
        and not module.stage.l2_sp
        and module.task.streams == ("train",)
        and not any(is_overridden(hook, module) for hook in MODULE_HOOKS)
        and all(map(_epochs_only, trainer.callbacks))
    )
    if not plain:
        return 1
    every = next(c.every_n_steps for c in trainer.callbacks if isinstance(c, LastCheckpoint))
    return max(n for n in range(1, MOST_STEPS + 1) if (every or MOST_STEPS) % n == 0)


def _epochs_only(callback: L.Callback) -> bool:
    """Whether it will do with batches of several steps, and leaves the trainer as it is: ours, or
    one that says `epochs_only = True`.
    """
    kind = type(callback)
    ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    said = ours or getattr(callback, "epochs_only", False)
    return kind in KNOWN or (said and not any(is_overridden(h, callback) for h in CALLBACK_HOOKS))
