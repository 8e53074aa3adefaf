"""Handlers of SIGTERM and SIGUSR1, in processes that may die of them; requeueing under SLURM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graft.training.last_checkpoint import restoring
from graft.training.signals import requeue
from graft.training.watch import Watch

START = """
import os, signal, time
from graft.training.signals import StopSignals
with StopSignals().handled() as stop:
    stop.training = True
"""


def run(*lines: str) -> subprocess.CompletedProcess[str]:
    """The exit of a process that runs `lines` while a stage trains."""
    script = START + "".join(f"    {line}\n" for line in lines)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_the_first_signal_is_remembered_and_a_second_one_ends_the_process() -> None:
    first = "os.kill(os.getpid(), signal.SIGUSR1); print(int(stop.received), flush=True)"
    once = run(first)
    assert (once.returncode, once.stdout) == (0, f"{int(signal.SIGUSR1)}\n")
    twice = run(
        first, "os.kill(os.getpid(), signal.SIGTERM)", "time.sleep(60); print('still here')"
    )
    assert (twice.returncode, twice.stdout) == (143, f"{int(signal.SIGUSR1)}\n")
    assert twice.stderr == "graft: error: stopped by SIGTERM: at once, by a second signal\n"


def test_one_signal_that_arrives_twice_is_one() -> None:
    """`timeout` sends it to the process and to its group."""
    send = "os.kill(os.getpid(), signal.SIGTERM)"
    done = run(send, send, "time.sleep(2); print('still here')")
    assert (done.returncode, done.stdout) == (0, "still here\n")


def test_signals_that_others_handle_stop_nothing() -> None:
    """torch's DataLoader looks after its workers by SIGCHLD."""
    send = "os.kill(os.getpid(), signal.SIGCHLD)"
    ignore = "signal.signal(signal.SIGCHLD, lambda *_: None)"
    done = run(ignore, send, "time.sleep(1)", send, "time.sleep(1); print(int(stop.received))")
    assert (done.returncode, done.stdout) == (0, "0\n")


WAIT_FOR_EVER = """
import ctypes, os, signal, subprocess, sys
from types import SimpleNamespace
from graft.training import watch
from graft.training.signals import StopSignals
kill = os.kill
watch.ANSWER_SECONDS = 2
watch.os = SimpleNamespace(**{**vars(os), "kill": lambda *of: of[1] == signal.SIGCONT or kill(*of)})
stop = StopSignals(lambda status, reason: print(status, reason, flush=True))
rank, signum = sys.argv[1:]
with stop.handled():
    if rank:
        process = subprocess.Popen(["sh", "-c", rank])
        stop.launchers.append(SimpleNamespace(procs=[process]))
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -{signum} {os.getpid()}"])
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    for _ in range(2):  # the second time in vain, as a collective: in C, also when a signal comes
        libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(("rank", "signum", "code", "end"), [
    ("", "TERM", 143, "preempted stopped by SIGTERM: it was waiting for other processes\n"),
    ("exit 3", "0", 1, "failed rank 1 ended with exit code 3: see what it printed\n"),
    ("exit 3", "INT", 130, "preempted stopped by SIGINT: rank 1 ended with exit code 3: see wh"),
    ("kill -STOP $$", "TERM", 143, "preempted stopped by SIGTERM: rank 1 (process N) was stopped"),
])  # fmt: skip
def test_a_main_thread_that_waits_for_ever(rank: str, signum: str, code: int, end: str) -> None:
    """The watch records why, and ends the process and its ranks."""
    command = [sys.executable, "-c", WAIT_FOR_EVER, rank, signum]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert re.sub(r"process \d+", "process N", done.stdout).startswith(end)


def test_a_rank_that_was_stopped_for_long_has_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is continued when the signal comes; that it was stopped before does not count."""
    stop: Any = SimpleNamespace(
        record=print, lost_rank=lambda: None, name=lambda pid: "rank 1", ending=False, received=15,
        training=True,
    )  # fmt: skip
    ended: list[str] = []
    continued: list[int] = []
    looker = Watch(stop)
    monkeypatch.setattr(looker, "end", ended.append)
    monkeypatch.setattr("graft.training.watch.stopped_child", lambda: 4711)
    monkeypatch.setattr("graft.training.watch.os.kill", lambda pid, signum: continued.append(pid))
    for _ in range(60):
        looker.look()
    assert not continued
    looker.signum = signal.SIGTERM
    while not ended:
        looker.look()
    assert continued == [4711] * 10
    assert ended == ["rank 1 (process 4711) was stopped, and this run waited 69 s for it"]


@pytest.mark.parametrize(("signum", "status"), [("SIGUSR1", 0), ("SIGTERM", -signal.SIGTERM)])
def test_a_forked_worker_ignores_the_warning_and_can_be_terminated(
    signum: str, status: int
) -> None:
    """A pool ends its workers by SIGTERM: to ignore that would leave it waiting for ever."""
    done = run(
        "pid = os.fork()",
        f"if pid == 0: os.kill(os.getpid(), signal.{signum}); os._exit(0)",
        "code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])",
        "print(code, int(stop.received))",
    )
    assert done.stdout == f"{status} 0\n", done.stderr


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM that writes down what it is asked for."""
    asked = tmp_path / "asked"
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return asked


def test_the_warning_requeues_the_job_and_a_cancellation_does_not(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a cancelled job would come back."""
    assert requeue(signal.SIGTERM) is None
    assert not scontrol.exists()
    assert requeue(signal.SIGUSR1) == "SLURM requeues job 17"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue(signal.SIGUSR1) == "SLURM requeues job 16_3"
    assert scontrol.read_text() == "requeue 17\nrequeue 16_3\n"
    for key in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(key)
    assert requeue(signal.SIGUSR1) is None


def test_a_job_that_may_not_be_requeued_is_reported(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = scontrol.with_name("scontrol")
    command.write_text("#!/bin/sh\necho Job is not requeueable >&2; exit 1\n")
    assert requeue(signal.SIGUSR1) == "SLURM does not requeue job 17: Job is not requeueable"
    monkeypatch.setenv("PATH", str(scontrol.parent / "nowhere"))
    assert "is not requeued" in str(requeue(signal.SIGUSR1))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("gloo: Connection closed by peer"), "^gloo: Connection closed by peer$"),
        (KeyError("random"), r"^last\.ckpt cannot be resumed from \(KeyError: 'random'\)$"),
    ],
)
def test_a_rank_lost_while_a_run_is_restored_is_no_fault_of_its_checkpoint(
    error: Exception, message: str
) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message), restoring("last.ckpt"):
        raise error
