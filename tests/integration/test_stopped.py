"""Runs that wait for a process which never answers, lose one, or lose their terminal: each ends
within a bounded time, says why, leaves no process behind, and goes on when it is resumed.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY
from tests.integration.conftest import record

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LONG = [*TINY, "trainer.max_epochs=100000"]
RANKS = [*LONG, "trainer=ddp_cpu", "+callbacks.stop._target_=tests.stopping.SignalAt"]
PYTHON = sys.executable.encode()
PATIENCE = 180  # seconds, on a machine that does much else


class Started:
    """`graft ARGUMENTS` in a session of its own, with the processes that come of it.

    By -P, as with the installed script, it imports nothing from the current folder.
    """

    def __init__(self, folder: Path, *arguments: str, **options: Any) -> None:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", **options.pop("env", {})}
        self.mark = f"GRAFT_LOGS={folder / 'logs'}".encode()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "graft", *arguments], cwd=folder, env=env,
            start_new_session=True, text=True, **options,
        )  # fmt: skip
        self.logs = folder / "logs"

    def others(self) -> list[int]:
        """Further processes: ranks, jobs, workers; not git, which is asked for the commit."""
        found = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ")
                 if self.mark in read(path).split(b"\0")
                 and read(path.with_name("cmdline")).startswith(PYTHON)]  # fmt: skip
        return sorted(pid for pid in found if pid not in (self.process.pid, os.getpid()))

    def ranks(self) -> list[int]:
        """Of the others, those with a rank of their own: a process that is about to become git
        still looks like the one which started it.
        """
        return [pid for pid in self.others()
                if b"LOCAL_RANK=1" in read(Path(f"/proc/{pid}/environ")).split(b"\0")]  # fmt: skip

    def workers(self) -> list[int]:
        """Of the others, those of a data loader."""
        return [p for p in self.others() if b"pt_data_worker" in read(Path(f"/proc/{p}/comm"))]

    def ended(self, code: int) -> str:
        """What it printed to stderr, of a process that ends with this code and leaves no other."""
        out, err = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == code, f"{out}\n{err}"
        wait(lambda: not self.others())
        return err

    def record(self) -> dict[str, Any]:
        (folder,) = self.logs.iterdir()
        return record(folder)

    @property
    def status(self) -> str:
        folders = [p for p in self.logs.glob("*/run.json") if p.exists()]
        return record(folders[0].parent)["status"] if folders else ""


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # another user's, or it has ended
        return b""


def state(pid: int) -> str:
    """R, S, T (stopped), Z; empty without such a process."""
    text = read(Path(f"/proc/{pid}/stat")).decode()
    return text.rpartition(")")[2].split()[0] if text else ""


def wait(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.1)
    return found


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes = []

    def call(*arguments: str, **options: Any) -> Started:
        processes.append(Started(tmp_path, *arguments, **options))
        return processes[-1]

    yield call
    for started in processes:
        for pid in [*started.others(), started.process.pid]:
            if state(pid) not in ("", "Z"):
                os.kill(pid, signal.SIGKILL)
        started.process.wait()


def test_a_stopped_rank_saves_with_the_others_on_sigterm(start: Start) -> None:
    """Rank 0 is in a collective with it, where no handler of Python's runs."""
    run = start("train", *RANKS, env={"GRAFT_TEST_STOP": f"1 8 {int(signal.SIGSTOP)}"})
    wait(lambda: [pid for pid in run.others() if state(pid) == "T"])
    time.sleep(1)
    run.process.terminate()
    run.ended(143)
    assert run.record()["status"] == "preempted"
    (folder,) = run.logs.iterdir()
    assert (folder / "checkpoints" / "finetune" / "last.ckpt").exists()


def test_a_stopped_rank_is_named_and_a_second_signal_ends_the_run(start: Start) -> None:
    run = start("train", *RANKS, env={"GRAFT_TEST_STOP": f"1 8 {int(signal.SIGSTOP)}"})
    (rank,) = wait(lambda: [pid for pid in run.others() if state(pid) == "T"])
    assert run.process.stderr is not None
    note = run.process.stderr.readline()
    assert note == (
        f"note: rank 1 (process {rank}) is stopped, and this run waits for it: kill -CONT {rank}\n"
    )
    run.process.terminate()
    time.sleep(0.05)
    run.process.send_signal(signal.SIGUSR1)
    assert run.ended(138) == "graft: error: stopped by SIGUSR1: at once, by a second signal\n"
    assert run.record()["status"] == "preempted"


def test_a_stopped_worker_of_the_loader_is_named(start: Start) -> None:
    run = start("train", *LONG, "data.num_workers=1", "data.source.per_class=5000")
    worker = wait(lambda: run.status == "running" and run.workers())[-1]
    time.sleep(2)
    os.kill(worker, signal.SIGSTOP)
    assert run.process.stderr is not None
    note = run.process.stderr.readline()
    assert note.startswith(f"note: a worker (process {worker}) is stopped")
    run.process.terminate()
    run.ended(143)


@pytest.mark.parametrize("signum", ["SIGTERM", "SIGINT"])
def test_a_signal_while_another_node_is_awaited(start: Start, signum: str) -> None:
    run = start(
        "train", *LONG, "trainer.num_nodes=2",
        env={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871", "NODE_RANK": "0"},
    )  # fmt: skip
    assert run.process.stdout is not None
    assert any(line.startswith("nodes ") for line in run.process.stdout)
    time.sleep(5)
    number = signal.Signals[signum]
    run.process.send_signal(number)
    err = run.ended(128 + number)
    assert f"stopped by {signum}: it was waiting for other processes" in err
    assert run.record()["status"] == "preempted"


def test_two_nodes_without_a_meeting_point_are_refused(start: Start) -> None:
    assert "MASTER_ADDR" in start("train", *LONG, "trainer.num_nodes=2").ended(1)


@pytest.mark.parametrize(("signum", "code", "status"), [
    ("SIGKILL", 1, "failed"), ("SIGTERM", 1, "failed"), ("SIGINT", 130, "preempted"),
])  # fmt: skip
def test_a_rank_that_ends_while_it_imports(
    start: Start, signum: str, code: int, status: str
) -> None:
    """Ctrl-C goes to all processes of a terminal, and ranks leave it to the first one."""
    run = start("train", *RANKS)
    (rank,) = wait(run.ranks)
    if signum == "SIGINT":
        os.killpg(run.process.pid, signal.SIGINT)
    else:
        os.kill(rank, signal.Signals[signum])
    err = run.ended(code)
    assert run.record()["status"] == status
    reason = f"stopped by {signum}" if code == 130 else "rank 1 was ended by"
    assert reason in run.record()["error"]
    assert "Traceback" not in err


def test_a_closed_terminal_saves_the_run(start: Start) -> None:
    """What is printed from then on goes nowhere, rather than being an error."""
    ours, theirs = pty.openpty()
    run = start(
        "train", *LONG, stdin=theirs, stdout=theirs, stderr=theirs,
        preexec_fn=lambda: _take_terminal(theirs),
    )  # fmt: skip
    os.close(theirs)
    wait(lambda: run.status == "running" and b"epoch" in os.read(ours, 10000))
    os.close(ours)
    assert run.process.wait(PATIENCE) == 129
    assert run.record()["status"] == "preempted"
    assert run.record()["error"] == "stopped by SIGHUP"


def _take_terminal(fd: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


def test_nohup_is_respected(start: Start) -> None:
    run = start("train", *LONG, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait(lambda: run.status == "running")
    run.process.send_signal(signal.SIGHUP)
    time.sleep(3)
    assert run.process.poll() is None
    run.process.terminate()
    run.ended(143)
    assert run.record()["error"] == "stopped by SIGTERM"


@pytest.mark.parametrize(("trainer", "running"), [("cpu", 2), ("ddp_cpu", 1)])
def test_jobs_end_with_a_sweep_that_is_killed(start: Start, trainer: str, running: int) -> None:
    """Two ranks take both places of the queue: the other job has not started."""
    run = start("train", "-m", *LONG, "hydra/launcher=processes", "seed=0,1", f"trainer={trainer}")
    wait(lambda: len([*run.logs.glob("sweeps/*/*/metrics.csv")]) == running)
    files = [*run.logs.glob("sweeps/*/*/run.json")]
    run.process.kill()
    run.process.wait()
    wait(lambda: not run.others())
    statuses = sorted(record(file.parent)["status"] for file in files)
    assert statuses == ["preempted", "preempted" if running == 2 else "queued"]


def test_a_stopped_job_saves_when_its_sweep_is_stopped(start: Start) -> None:
    run = start("train", "-m", *LONG, "hydra/launcher=processes", "seed=0,1")
    wait(lambda: len([*run.logs.glob("sweeps/*/*/metrics.csv")]) == 2)
    os.kill(run.others()[0], signal.SIGSTOP)
    run.process.terminate()
    run.ended(143)
    for file in run.logs.glob("sweeps/*/*/run.json"):
        assert record(file.parent)["status"] == "preempted"


def test_modules_of_the_current_folder_are_not_imported_by_ranks_and_jobs(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # graft sets it for them
    for name in ("rich", "copy", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not this one')\n")
    short = [*TINY, "trainer=ddp_cpu"]
    src = {"PYTHONPATH": str(ROOT / "src")}
    start("train", *short, env=src).ended(0)
    start("train", "-m", "hydra/launcher=processes", *TINY, "seed=0,1", env=src).ended(0)


def test_a_run_whose_output_is_cut_off_trains_on(tmp_path: Path) -> None:
    """`graft train | head`: Rich would end it, recorded as preempted."""
    started = Started(tmp_path, "train", *TINY, "trainer.max_epochs=30")
    assert started.process.stdout is not None
    started.process.stdout.readline()
    started.process.stdout.close()
    assert started.process.stderr is not None
    said = started.process.stderr.read()
    assert started.process.wait(PATIENCE) == 0, said
    assert started.record()["status"] == "done"
