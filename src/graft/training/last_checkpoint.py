"""`last.ckpt`: what a run is resumed from as if it had never stopped.

Lightning's own checkpoints leave out the random states and what metrics have seen of the epoch, and
one saved after the last batch of an epoch skips its validation (Lightning#19617).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import WeightAveraging

from graft.config.words import plural
from graft.plan.results import LAST
from graft.reporting.loggers import flush
from graft.training.best import state_of_format_2
from graft.training.signals import LOST, Preempted, StopSignals

if TYPE_CHECKING:
    from graft.training.module import TransferModule


class LastCheckpoint(L.Callback):
    """Keeps `last.ckpt` in a stage's folder: after every epoch, and within them if asked.

    It is saved between batches: at the start of the next one or of the next epoch, when everything
    about the last one is done, its logging and an epoch's validation included. The counters of
    that start are taken back in what is saved. Goes before all other callbacks.

    Args:
        stop: what signals arrived; any rank's makes all of them save and raise `Preempted`.
        every_n_steps, every_n_minutes: also within an epoch, after so many optimizer steps or so
            much time since the last one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stop: StopSignals | None = None,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
    ) -> None:
        self.folder = folder
        self.stop = stop or StopSignals()
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.saved_step = 0
        self.saved_time = time.monotonic()
        self.saving = False
        self.started: str | None = None  # the loop whose start is taken back in what is saved
        self.resumed: dict[str, Any] | None = None  # this rank's state, until the first batch
        self.group: Any = None

    # ------------------------------------------------------------ when

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)  # the first rank knows it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop.training = True
        self.saved_time = time.monotonic()
        if trainer.world_size > 1 and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")  # a host's number needs no device to wait
        if self.resumed is not None:  # other epochs than before: at once the new schedule's rate
            with restoring(trainer.ckpt_path):
                for config in trainer.lr_scheduler_configs:
                    _apply_schedule(config.scheduler)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > 0:
            self._between(trainer, "epoch_progress", due=True)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.resumed is not None:  # not earlier: Lightning's own start must not draw from it
            with restoring(trainer.ckpt_path):
                set_random_states(self.resumed["random"])
                restore_trained(pl_module, self.resumed)
                own = _own_statistics(trainer, pl_module)
                for buffer, saved in zip(own, self.resumed["statistics"], strict=True):
                    buffer.copy_(saved)
            self.resumed = None
        # With accumulated gradients a step is not done, and they are not saved.
        if batch_idx > 0 and batch_idx % trainer.accumulate_grad_batches == 0:
            n = self.every_n_steps
            due = n is not None and trainer.global_step - self.saved_step >= n
            self._between(trainer, "epoch_loop.batch_progress", due=due)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._between(trainer, None, due=True)
        self.stop.training = False
        if self.stop.received:  # since then
            raise Preempted(self.stop.received)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.stop.training = False

    def _between(self, trainer: L.Trainer, started: str | None, *, due: bool) -> None:
        signum, late = self._agreed(trainer)
        if (due or late or signum) and trainer.global_step != self.saved_step:
            flush(trainer.loggers)  # what comes before a checkpoint is never logged again
            self.saving, self.started = True, started
            trainer.save_checkpoint(self.folder / LAST)
            self.saving = False
            self.saved_step, self.saved_time = trainer.global_step, time.monotonic()
        if signum:
            raise Preempted(signum, agreed=True)

    def _agreed(self, trainer: L.Trainer) -> list[int]:
        """The highest signal of all ranks, or 0; and whether it is time to save for any of them."""
        minutes = self.every_n_minutes
        late = minutes is not None and time.monotonic() - self.saved_time > 60 * minutes
        wishes = [self.stop.received, int(late)]
        if trainer.world_size == 1:
            return wishes
        agreed = torch.tensor(wishes)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.group)
        return agreed.tolist()

    # ------------------------------------------------------------ what

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self.saving:  # of another callback, not to be resumed from
            return
        own = {
            "random": random_states(),
            "trained": move_data_to_device(cast("TransferModule", pl_module).trained.sums, "cpu"),
            "statistics": [buffer.cpu() for buffer in _own_statistics(trainer, pl_module)],
        }
        ranks = [own] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(ranks, own, group=self.group)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["resume"] = {
            "ranks": ranks,
            "should_stop": trainer.should_stop,
            "steps_per_batch": data.steps_per_batch,
        }
        if self.started is not None:
            progress = checkpoint["loops"]["fit_loop"][self.started]
            for counts in (progress["total"], progress["current"]):
                counts["ready"] = counts["completed"]

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["resume"]
        if len(state["ranks"]) != trainer.world_size:
            raise ValueError(
                f"the checkpoint is of {plural(len(state['ranks']), 'process', 'processes')} and "
                f"this run has {trainer.world_size}: batches would be others; set "
                "trainer.devices and num_nodes"
            )
        self.resumed = state["ranks"][trainer.global_rank]
        self.saved_step = checkpoint["global_step"]
        trainer.should_stop = state["should_stop"]
        # Lightning does this after `configure_optimizers`, which asks for the number of steps,
        # which starts the loader's workers: they would fetch from the start of the first epoch.
        trainer.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])
        if (best := state_of_format_2(checkpoint)) and "Best" not in checkpoint["callbacks"]:
            checkpoint["callbacks"]["Best"] = best


@contextmanager
def restoring(checkpoint: Any) -> Iterator[None]:
    """Errors of a state that does not fit, as one line with the file.

    Not of a rank that is gone, which is nothing of the file's.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if LOST.search(text):
            raise
        raise ValueError(f"{checkpoint} cannot be resumed from ({text})") from error


def explain_restoring(trainer: L.Trainer, checkpoint: Path) -> None:
    """The same for what Lightning restores, and for that alone: between its two parts the loaders
    start, whose errors are their own.
    """
    connector = trainer._checkpoint_connector
    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        setattr(connector, name, restoring(checkpoint)(getattr(connector, name)))


def _own_statistics(trainer: L.Trainer, pl_module: L.LightningModule) -> list[torch.Tensor]:
    """What ranks differ in, of the module and of its average: a checkpoint has the first's."""
    if trainer.world_size == 1:
        return []
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averages = [c._average_model for c in callbacks if isinstance(c, WeightAveraging)]
    modules = [pl_module, *(average.module for average in averages if average is not None)]
    return [b for module in modules for b in cast("TransferModule", module).moving_statistics()]


def _apply_schedule(scheduler: Any) -> None:
    groups = scheduler.optimizer.param_groups
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)


def random_states() -> dict[str, Any]:
    """Of torch, numpy and Python in this process, as values that load under `weights_only`."""
    name, keys, *numpy_rest = np.random.get_state(legacy=True)  # noqa: NPY002 (the one others use)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *numpy_rest],
        "python": [version, list(words), gauss],
    }


def set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    name, keys, *numpy_rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *numpy_rest))  # noqa: NPY002
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))


def restore_trained(module: L.LightningModule, state: dict[str, Any]) -> None:
    """What an unfinished epoch's training loss is made of. In format 2 it was a mean of batches."""
    trained = state.get("trained")
    if trained is None:
        old = state["metrics"].get("train_loss", {}).get("state", {})
        trained = {"loss": old["mean_value"], "images": old["weight"]} if old else {}
    sums = {name: value.double() for name, value in trained.items()}
    cast("TransferModule", module).trained.sums = move_data_to_device(sums, module.device)
