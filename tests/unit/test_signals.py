"""Handlers of SIGTERM and SIGUSR1, in processes that may die of them; requeueing under SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from graft.signals import requeue

START = """
import os, signal
from graft.signals import StopSignals
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
    twice = run(first, "os.kill(os.getpid(), signal.SIGTERM)", "print('still here')")
    assert (twice.returncode, twice.stdout) == (-signal.SIGTERM, f"{int(signal.SIGUSR1)}\n")


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
