"""`graft.finetune`: what `graft train` does, called from Python."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graft.config.job import Job, compose_job, data_overrides
from graft.config.overrides import config_dir as searching
from graft.config.overrides import quoted, typed

if TYPE_CHECKING:
    from graft.deploy.model import Deployed


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        path: its folder, as `graft train` leaves it.
        metrics: the monitored one of the best checkpoint, and those of its test.
    """

    path: Path
    metrics: dict[str, float]

    def load(self, ckpt: str = "best", *, device: str | None = None) -> Deployed:
        """Its model: see `graft.load`."""
        from graft.deploy.model import load

        return load(self.path, ckpt, device=device)


def finetune(
    data: str | Path,
    *,
    backbone: str,
    plan: str = "finetune",
    head: str | None = None,
    task: str | None = None,
    epochs: int | None = None,
    overrides: Sequence[str] = (),
    logs: str | Path | None = None,
    config_dir: str | Path | None = None,
) -> Run:
    """Train a model as `graft train` does, with the defaults of the configs, in a run folder.

    Works in a notebook, without a `__main__` guard, any number of times. Ctrl-C saves what
    `graft resume` goes on from, and raises KeyboardInterrupt; a second one does not wait for that.

    Args:
        data: a folder of class folders, or the name of a config of data, "cifar10" say.
        backbone: the name of a config: "resnet50".
        plan: what learns when: "finetune", "linear_probe", "lp_ft", ...; configs/transfer.
        head, task: names of configs.
        epochs: of stages that do not set their own.
        overrides: anything else, as `graft train` takes it: "optimizer.lr=0.01".
        logs: where the run folder is made.
        config_dir: a folder with configs of your own.

    Raises:
        ValueError: as the command says it: a wrong name or value, data that cannot be used.
        OSError: a folder that cannot be read or written.
    """
    own = searching("" if config_dir is None else str(config_dir), option="config_dir=")
    command = [
        *data_overrides(data, own),
        f"backbone={backbone}",
        f"transfer={plan}",
        *(f"{group}={name}" for group, name in (("head", head), ("task", task)) if name),
        *([] if epochs is None else [f"trainer.max_epochs={epochs}"]),
        *([] if logs is None else [quoted("paths.logs", str(logs))]),
        *overrides,
        *own,
    ]
    job = compose_job(command)
    _require_one_device(job)

    import torch  # noqa: F401  # before `import_libraries`, whose haste is for a process of its own

    from graft.runs.run import run_with_folder
    from graft.runs.startup import import_libraries
    from graft.training.signals import Preempted

    import_libraries()
    try:
        with _as_before():
            metrics, path = run_with_folder(job.config, job.overrides, job.choices, embedded=True)
    except Preempted as error:
        signal.raise_signal(error.signum)  # now for those who were there before the run
        raise KeyboardInterrupt(str(error)) from error
    assert path is not None  # of the only process
    return Run(path, metrics)


def _require_one_device(job: Job) -> None:
    """Further devices are further processes, each of which would run the user's whole script."""
    trainer = job.config["trainer"]
    devices = trainer["devices"]
    count = len(devices) if isinstance(devices, list) else devices
    if count not in (1, "1") or trainer["num_nodes"] != 1:
        raise ValueError(
            f"trainer.devices={devices}, num_nodes={trainer['num_nodes']}: from Python a run takes "
            f"one device; on several, type: graft train {' '.join(map(typed, job.overrides))}"
        )


@contextmanager
def _as_before() -> Iterator[None]:
    """Leaves what belongs to the whole process as a run found it: random states, levels of
    loggers, filters of warnings, environment, settings of torch.
    """
    import numpy as np
    import torch

    named = logging.root.manager.loggerDict.values()
    levels = [(log, log.level) for log in named if isinstance(log, logging.Logger)]
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002 (what Lightning seeds)
    environment, hook = dict(os.environ), threading.excepthook
    precision = torch.get_float32_matmul_precision()
    exact = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        for logger, level in levels:
            logger.setLevel(level)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ |= environment
        threading.excepthook = hook
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(exact)
        torch.backends.cudnn.benchmark = benchmark
