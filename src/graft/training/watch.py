"""Ends a process whose main thread waits for others that may never answer.

Python runs the handler of a signal in the main thread, between two of its instructions: not while
that waits in a collective for a rank that is stopped, has died or has not come. This thread sees
signals by the pipe that `signal.set_wakeup_fd` writes to, looks after the processes that the run
depends on, and always ends within a bounded time.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

PARENT = "GRAFT_PARENT"  # the process that a job or a rank ends with
SAME_SECONDS = 0.5  # `timeout`, for one, sends each signal twice
ANSWER_SECONDS = 10  # for the main thread, to see a signal or that a rank has ended
STOPPED_SECONDS = 300
EXIT_SECONDS = 5  # for what is done on the way out

pipe: int | None = None  # that of this process which signals are written to


class Watched(Protocol):
    """What a `Watch` asks the run: see `StopSignals`."""

    heard: list[signal.Signals]
    received: int
    training: bool
    ending: bool
    record: Callable[[str, str], Any] | None

    def ranks(self) -> list[subprocess.Popen[bytes]]: ...
    def lost_rank(self) -> str | None: ...
    def name(self, pid: int) -> str: ...


def _forget_pipe() -> None:
    global pipe
    if pipe is not None:
        pipe = None
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_pipe)  # or a worker's signals were the run's


class Watch(threading.Thread):
    """Runs from `start` to `finish`; counts the seconds it has looked, so that a laptop that was
    asleep, or a run that was stopped as a whole, has lost none.
    """

    def __init__(self, stop: Watched) -> None:
        super().__init__(daemon=True, name="graft-watch")
        self.stop = stop
        self.parent = int(os.environ.pop(PARENT, 0))
        self.signum = 0
        self.since = 0  # the first signal came
        self.first = 0.0  # at this time
        self.stopped = (0, 0)  # a process, and for how long
        self.lost = 0  # since a rank ended

    def start(self) -> None:
        global pipe
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        self.before, pipe = (signal.set_wakeup_fd(self.writing), pipe), self.writing
        super().start()

    def finish(self) -> None:
        global pipe
        fd, pipe = self.before
        signal.set_wakeup_fd(fd)
        os.write(self.writing, b"\0")
        self.join()
        os.close(self.reading)
        os.close(self.writing)

    def run(self) -> None:
        ready = select.poll()
        ready.register(self.reading, select.POLLIN)
        while True:
            if not ready.poll(1000):
                self.look()
                continue
            for signum in os.read(self.reading, 1000):
                if signum == 0:
                    return
                if signum in self.stop.heard:  # a data loader has SIGCHLD handled
                    self.signalled(signum)

    def signalled(self, signum: int) -> None:
        now = time.monotonic()
        if self.signum == 0:
            self.signum, self.first = signum, now
        elif signum != self.signum or now - self.first > SAME_SECONDS:
            self.signum = signum
            self.end("at once, by a second signal")

    def look(self) -> None:
        """Once a second."""
        if self.parent and os.getppid() != self.parent:
            self.parent = 0
            os.kill(os.getpid(), signal.SIGTERM)
        pid = 0 if self.stop.record is None else stopped_child()
        self.stopped = (pid, self.stopped[1] + 1 if pid == self.stopped[0] else 0)
        self.lost += self.stop.lost_rank() is not None
        self.since += self.signum != 0
        name = f"{self.stop.name(pid)} (process {pid})"
        if pid and self.signum:
            with suppress(OSError):
                os.kill(pid, signal.SIGCONT)  # to save with the others
        if pid and self.stopped[1] == ANSWER_SECONDS:
            say(f"note: {name} is stopped, and this run waits for it: kill -CONT {pid}")
        if self.stop.ending:
            return  # the main thread has seen it
        waited, limit = self.stopped[1], STOPPED_SECONDS
        if self.signum:  # from then on: it has just been continued
            waited, limit = min(self.since, waited), ANSWER_SECONDS
        if pid and waited >= limit:
            self.end(f"{name} was stopped, and this run waited {self.stopped[1]} s for it")
        elif self.lost >= ANSWER_SECONDS:
            self.end(str(self.stop.lost_rank()))
        elif self.since >= ANSWER_SECONDS and not (pid or self.stop.received or self.stop.training):
            self.end("it was waiting for other processes")

    def end(self, reason: str) -> None:
        """End the process and what it has started; on a signal it is preempted, else failed."""
        code, status = 1, "failed"
        if self.signum:
            code, status = 128 + self.signum, "preempted"
            reason = f"stopped by {signal.Signals(self.signum).name}: {reason}"
        threading.Timer(EXIT_SECONDS, os._exit, [code]).start()  # should anything here wait, too
        for process in [*self.stop.ranks(), *multiprocessing.active_children()]:
            process.kill()  # type: ignore[attr-defined]  # of either kind
        if self.stop.record is not None:
            with suppress(Exception):  # a full disk, say
                self.stop.record(status, reason)
        sys.stdout.flush()
        say(f"graft: error: {reason}")
        os._exit(code)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def stopped_child() -> int:
    """A child of this process that is stopped (SIGSTOP), or 0."""
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return 0
    try:
        found = os.waitid(os.P_ALL, 0, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return 0 if found is None else found.si_pid
