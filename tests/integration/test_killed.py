"""Runs in processes of their own that are killed, or get a signal on two ranks; SLURM's part."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY, Graft, same
from tests.integration.conftest import assert_equal, curves, record
from tests.rank_states import read_states

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

KILLED = [
    "data=digits", "data.train_fraction=0.1", "data.batch_size=32", "data.eval_batch_size=64",
    "backbone.depth=8", "backbone.width=4", "backbone.weights=null", "trainer=cpu",
    "trainer.log_every_n_steps=1", "trainer.checkpoint_every_n_steps=2",
    "transfer=lp_ft", "transfer.stages.probe.epochs=2", "transfer.stages.finetune.epochs=2",
]  # fmt: skip

# BatchNorm statistics of each rank's own, in the weights and in their average; random states too.
RANKS = [
    *TINY, "logger=default", "trainer=ddp_cpu", "data.batch_size=4", "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1", "trainer.checkpoint_every_n_steps=2", "optimizer.lr=0.05",
    "head=mlp", "head.hidden=16", "head.dropout=0.3", "transfer=ema",
    "+callbacks.stop._target_=tests.stopping.SignalAt",
    "+callbacks.states._target_=tests.rank_states.WriteStates", "+callbacks.states.folder=states",
]  # fmt: skip

SRUN = """#!/bin/bash
# Starts the tasks of a step, as SLURM does on one node; ends with the largest of their exit codes.
[ "$1" = --kill-on-bad-exit=1 ] && shift
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NUM_TASKS=$SLURM_NTASKS "$@" & tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; ((code > worst)) && worst=$code; done
exit "$worst"
"""


@pytest.fixture(autouse=True)
def _tests_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'src'}")


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    """Twelve runs, each killed at a moment of its own, most of them once more when they go on."""
    subprocess.run(
        [sys.executable, "-m", "tests.killing", str(tmp_path / "k"), "0", "12", *KILLED], check=True
    )
    folders = {path.name: [*(path / "logs").iterdir()] for path in (tmp_path / "k").glob("*/")}
    assert len(folders) == 14
    assert {name: len(found) for name, found in folders.items()} == dict.fromkeys(folders, 1)
    (whole,) = folders.pop("whole")
    for name, (folder,) in folders.items():
        assert_equal(folder, whole)
        assert curves(folder) == curves(whole), name
    stacks = json.loads((tmp_path / "k" / "stacks.json").read_text())
    assert len(stacks) >= 18
    # If calls become more or fewer, another seed may be needed.
    for place in ("write_checkpoint", "_EvaluationLoop.run", "_TrainingEpochLoop.advance",
                  "StartStage.setup", "_keep_best"):  # fmt: skip
        assert any(place in stack.split() for stack in stacks), place


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run that never stopped, and what its ranks held."""
    root = tmp_path_factory.mktemp("whole")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "GRAFT_LOGS": str(root / "logs")}
    command = [sys.executable, "-m", "graft", "train", *RANKS]
    subprocess.run(command, cwd=root, env=env, check=True)
    return root


def assert_as_whole(folder: Path, whole: Path) -> None:
    """The run, and both ranks."""
    (run,) = (whole / "logs").iterdir()
    assert [*folder.parent.iterdir()] == [folder]
    assert_equal(folder, run)
    assert curves(folder) == curves(run)
    for moment in ("end", "test"):
        states = [read_states(root / "states", "finetune", moment) for root in (Path(), whole)]
        assert len(states[0]) == 2
        assert all(map(same, *states))
        assert same(*states[0]), moment


@pytest.mark.parametrize(
    ("signum", "status", "code"), [("SIGTERM", "preempted", 143), ("SIGKILL", "failed", 1)]
)
def test_two_ranks_stop_together_and_go_on(
    graft_process: Graft, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    signum: str, status: str, code: int,
) -> None:  # fmt: skip
    """Where one of them gets the signal (all: the job of SLURM below). Lightning's own handlers
    hang here; a timeout fails the test, and nothing waits for one.
    """
    monkeypatch.chdir(tmp_path)
    number = signal.Signals[signum]
    monkeypatch.setenv("GRAFT_TEST_STOP", f"1 8 {number.value}")
    done = graft_process("train", *RANKS)
    assert done.returncode == code, done.stderr
    monkeypatch.delenv("GRAFT_TEST_STOP")
    (folder,) = (tmp_path / "logs").iterdir()
    assert record(folder)["status"] == status
    assert signum in record(folder)["error"]
    for process in Path("/proc").glob("[0-9]*/environ"):
        assert f"GRAFT_LOGS={tmp_path}".encode() not in _read(process), "it outlived its run"
    assert graft_process("resume", str(folder)).returncode == 0
    assert_as_whole(folder, whole)


def _read(process: Path) -> bytes:
    try:
        return process.read_bytes() if process.parent.name != str(os.getpid()) else b""
    except OSError:  # another user's, or it has ended
        return b""


def test_a_slurm_job_is_requeued_and_goes_on_with_its_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the script that is shipped; a run of other overrides in the same folder is not its run."""
    monkeypatch.chdir(tmp_path)
    commands = {
        "srun": SRUN,
        "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n',
        "graft": f'#!/bin/sh\nexec {sys.executable} -m graft "$@"\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    job = {"JOB_ID": "4711", "JOB_NAME": "graft", "NODELIST": "127.0.0.1", "NTASKS": "2",
           "NTASKS_PER_NODE": "2", "NNODES": "1", "NODEID": "0"}  # fmt: skip
    for key, value in job.items():
        monkeypatch.setenv(f"SLURM_{key}", value)

    def start() -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "scripts" / "slurm.sh"), *RANKS]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)

    monkeypatch.setenv("GRAFT_TEST_STOP", f"all 8 {signal.SIGUSR1.value}")
    warned = start()
    assert warned.returncode == 138, warned.stderr
    assert "SLURM requeues job 4711" in warned.stdout
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    (folder,) = (tmp_path / "logs").iterdir()
    assert record(folder)["status"] == "preempted"
    monkeypatch.delenv("GRAFT_TEST_STOP")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert start().returncode == 0
    assert_as_whole(folder, whole)
    again = start()
    assert again.returncode == 0
    assert again.stdout == f"{folder} is finished: nothing to resume\n"
