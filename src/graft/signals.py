"""SIGTERM, SIGUSR1 and Ctrl-C: save what a run can be resumed from, then stop.

Lightning's own handlers save nothing, and call collectives from inside the handler, which hangs
under DDP (Lightning#20806).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning as L

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preempted(BaseException):
    """A signal asked this run to stop, and it can be resumed.

    Args:
        agreed: every rank stops, at the same batch.
    """

    def __init__(self, signum: int, *, agreed: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.agreed = agreed


class Pruned(Exception):
    """The pruner of a sweep gave this run up; every rank knows."""

    def __init__(self, epoch: int, best: float) -> None:
        super().__init__(f"pruned after {epoch + 1} epochs")
        self.best = best


class StopSignals:
    """Remembers a signal while a stage trains; raises `Preempted` at once at any other time.

    A second signal ends the process there and then. `received` is the first one, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self.training = False  # whoever sets it looks at `received` after each batch
        self.pid = os.getpid()
        self.launchers: list[Any] = []  # of the further ranks, where this one started them

    @contextmanager
    def handled(self) -> Iterator[StopSignals]:
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may set handlers
            return
        before = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        in_worker = os.getpid() != self.pid
        if in_worker and signum != signal.SIGTERM:
            return  # SLURM warns all processes, as does a terminal; the run is what stops
        if in_worker or self.received:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        self.received = signum
        if not self.training:
            raise Preempted(signum)

    def take_over(self, trainer: L.Trainer) -> None:
        """Keep Lightning from setting handlers, and from asking the first rank in every batch
        whether one of them was called.
        """
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if trainer.strategy.launcher is not None:
            self.launchers.append(trainer.strategy.launcher)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Turns the error of a collective into what is behind it: another rank that ended.

        Raises:
            Preempted: all of them were to stop, and that one did so first.
            ChildProcessError: it was killed or failed; where this rank started the others.
        """
        try:
            yield
        except RuntimeError as error:
            if self.received:
                raise Preempted(self.received) from error
            if lost := self._lost_rank():
                raise ChildProcessError(lost) from error
            raise

    def _lost_rank(self) -> str | None:
        for rank, process in enumerate(self._ranks(), start=1):
            with suppress(subprocess.TimeoutExpired):  # the connection ends just before the process
                code = process.wait(timeout=0.2)
                if code > 0:
                    return f"rank {rank} ended with exit code {code}: see what it printed"
                if code < 0:
                    name = signal.Signals(-code).name
                    hint = ", as the system does when memory is full" if name == "SIGKILL" else ""
                    return f"rank {rank} was ended by {name}{hint}"
        return None

    def end_ranks(self, *, kill: bool) -> None:
        """Leave none behind; `kill`: they may wait in a collective for this rank, for ever."""
        for process in self._ranks():
            if kill:
                process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)

    def _ranks(self) -> list[subprocess.Popen[bytes]]:
        """The further ones that this rank has started."""
        return [process for launcher in self.launchers for process in launcher.procs]


def slurm_job() -> str | None:
    """The SLURM job of this process; it stays the same when the job is requeued."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def requeue(signum: int) -> str | None:
    """Have SLURM start this job again; says what came of it, or None where there is no SLURM.

    On SIGUSR1 alone, the warning before the time limit (`sbatch --signal=USR1@120`): SIGTERM comes
    from `scancel`, or from a preemption after which SLURM requeues the job itself.
    """
    job = slurm_job()
    if signum != signal.SIGUSR1 or job is None:
        return None
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:  # a job submitted with --no-requeue, say
        return f"SLURM does not requeue job {job}: {error.stderr.strip()}"
    except OSError as error:
        return f"job {job} is not requeued: {error.strerror}: scontrol"
    return f"SLURM requeues job {job}"
