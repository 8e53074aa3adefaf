"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C: save what a run can be resumed from, then stop.

Lightning's own handlers save nothing, and call collectives from inside the handler, which hangs
under DDP (Lightning#20806).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from graft.config.words import plural
from graft.training.watch import PARENT, Watch

if TYPE_CHECKING:
    import lightning as L

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
LOST_SECONDS = 5  # from the end of a connection to that of the process which had it
# What collectives say when another rank is gone.
LOST = re.compile(r"gloo|NCCL|TCPStore|DistNetworkError|DistStoreError|Connection (closed|reset)")


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
        super().__init__(f"pruned after {plural(epoch + 1, 'epoch')}")
        self.best = best


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[list[signal.Signals]]:
    """Has `handler` called on any of SIGNALS; yields which, and puts back what there was before.

    What is ignored stays so: SIGHUP under nohup, SIGINT in ranks that Ctrl-C would reach too.
    """
    heard = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, handler) for signum in heard}
    try:
        yield heard
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


class StopSignals:
    """Remembers a signal while a stage trains; raises `Preempted` at once at any other time.

    A second signal ends the process there and then. `received` is the first one, or 0.

    Args:
        record: called with a status and a reason if the process is ended from outside of the main
            thread, which waits for what may never come; see `Watch`. None: for a sweep, whose jobs
            look after themselves.
        embedded: the process goes on after the run, and others than the run are at home in it: it
            is never ended. A second signal raises `Preempted` at once.
    """

    def __init__(
        self, record: Callable[[str, str], Any] | None = None, *, embedded: bool = False
    ) -> None:
        self.embedded = embedded
        self.received = 0
        self.training = False  # whoever sets it looks at `received` after each batch
        self.ending = False  # the main thread knows why
        self.record = record
        self.pid = os.getpid()
        self.launchers: list[Any] = []  # of the further ranks, where this one started them

    @contextmanager
    def handled(self) -> Iterator[StopSignals]:
        if not self._in_main_thread():
            yield self  # only the main thread may set handlers
            return
        self.terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        if self.embedded:
            with handled_by(self._handle) as self.heard:
                yield self
            return
        watch = Watch(self)
        with handled_by(self._handle) as self.heard:
            watch.start()
            try:
                yield self
            finally:
                watch.finish()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a worker
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return  # SLURM warns all processes, as does a terminal; the run is what stops
        if self.received and self.embedded:
            raise Preempted(signum)
        if self.received:
            return  # see `Watch`
        self.received = signum
        if signum == signal.SIGHUP:  # to print to a closed terminal is an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in self.terminals:
                os.dup2(nowhere, terminal)
            os.close(nowhere)
        if not self.training:
            raise Preempted(signum)

    def take_over(self, trainer: L.Trainer) -> None:
        """Keep Lightning from setting handlers, from asking the first rank in every batch whether
        one of them was called, and from killing the first rank when another one ends.
        """
        from lightning.pytorch.strategies.launchers import subprocess_script as lightning_launcher

        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        lightning_launcher._launch_process_observer = lambda _: None  # type: ignore
        launcher: Any = trainer.strategy.launcher
        if launcher is not None:
            start = launcher._call_children_scripts
            launcher._call_children_scripts = lambda: self._start_ranks(start)
            self.launchers.append(launcher)

    def _start_ranks(self, start: Callable[[], None]) -> None:
        """Ranks that end with this one, and leave Ctrl-C to it: they may still be importing."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if self._in_main_thread() else None
        os.environ[PARENT] = str(os.getpid())
        try:
            start()
        finally:
            del os.environ[PARENT]
            if before is not None:
                signal.signal(signal.SIGINT, before)

    @contextmanager
    def explaining_lost_ranks(self) -> Iterator[None]:
        """Turns the error of a collective into what is behind it: another rank that ended.

        Raises:
            Preempted: all of them were to stop, and that one did so first.
            ChildProcessError: it was killed or failed.
        """
        try:
            yield
        except RuntimeError as error:
            if self.received:
                raise Preempted(self.received) from error
            if self.lost_rank() or LOST.search(f"{type(error).__name__} {error}"):
                raise ChildProcessError(self._wait_for_lost_rank()) from error
            raise

    def _wait_for_lost_rank(self) -> str:
        for _ in range(10 * LOST_SECONDS if self.ranks() else 0):
            if lost := self.lost_rank():
                return lost
            time.sleep(0.1)
        return "lost the connection to another rank: see what that one printed"

    def lost_rank(self) -> str | None:
        """What became of a rank that this one started, if one has ended and should not have."""
        for process in self.ranks():
            code = process.poll()
            if code is not None and code > 0:
                name = self.name(process.pid)
                return f"{name} ended with exit code {code}: see what it printed"
            if code is not None and code < 0:
                name = signal.Signals(-code).name
                hint = ", as the system does when memory is full" if name == "SIGKILL" else ""
                return f"{self.name(process.pid)} was ended by {name}{hint}"
        return None

    def end_ranks(self, *, kill: bool) -> None:
        """Leave none behind; `kill`: they may wait in a collective for this rank, for ever."""
        for process in self.ranks():
            if kill:
                process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()

    def ranks(self) -> list[subprocess.Popen[bytes]]:
        """The further ones that this rank has started."""
        return [process for launcher in self.launchers for process in launcher.procs]

    def name(self, pid: int) -> str:
        """Of a process that this one has started."""
        pids = [process.pid for process in self.ranks()]
        return f"rank {pids.index(pid) + 1}" if pid in pids else "a worker"

    @staticmethod
    def _in_main_thread() -> bool:
        return threading.current_thread() is threading.main_thread()


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
