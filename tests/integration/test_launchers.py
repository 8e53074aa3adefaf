"""Jobs of a sweep as processes, on this machine and through submitit; stopped, started again."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import graft.runs.train as graft_train
from graft.runs.folder import RunFolder
from graft.sweeps import launch
from graft.sweeps.processes import Processes, environment_without_ranks
from graft.training.signals import SIGNALS
from tests.conftest import TINY, Graft

LONG = ["data.source.per_class=100", "trainer.max_epochs=30"]  # seconds


def records(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in folder.glob("*/run.json")]
    return sorted(found, key=lambda record: record["job"])


def statuses(folder: Path) -> list[str]:
    return [record["status"] for record in records(folder)]


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    given = ["-m", *TINY, f"hydra.sweep.dir={folder}", *arguments]
    return subprocess.Popen(
        [sys.executable, "-m", "graft", "train", *given],
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], Any]) -> None:
    for _ in range(1800):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited for 180 seconds")


# ---------------------------------------------------------------- started again


def test_ctrl_c_that_a_library_catches_ends_the_sweep_all_the_same(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves no handler behind, in a notebook say."""
    ours = {signum: signal.getsignal(signum) for signum in SIGNALS if signum != signal.SIGINT}
    started: list[Path] = []

    def resume_run(path: Path, trusted: bool) -> None:
        started.append(path)
        try:
            if len(started) == 1:
                os.kill(os.getpid(), signal.SIGINT)
        except BaseException:  # as a bare `except` around an optional import does
            raise RecursionError("half imported") from None

    monkeypatch.setattr("graft.runs.resume.resume_run", resume_run)
    folder = tmp_path / "sweep"
    done = graft("train", "-m", *TINY, "seed=0,1", f"hydra.sweep.dir={folder}")
    assert len(started) == 1
    assert done.returncode == 130
    assert f"stopped by SIGINT; to go on: graft resume {folder}" in done.stdout
    assert statuses(folder) == ["failed", "queued"]
    assert {signum: signal.getsignal(signum) for signum in ours} == ours


def test_started_again_a_sweep_runs_what_is_not_done(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A done job is not touched, a failed one runs in its folder, a new one gets a folder."""
    folder = tmp_path / "sweep"
    train = graft_train.train

    def failing(config: dict[str, Any], *rest: Any) -> Any:
        if config["seed"] == 1:
            raise OSError("the network is down")
        return train(config, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("graft.runs.train.train", failing)
        once = graft("train", "-m", *TINY, "seed=0,1", f"hydra.sweep.dir={folder}")
    assert once.returncode == 1
    assert statuses(folder) == ["done", "failed"]
    assert f"graft resume {folder} retries 1 job\n" in once.stdout
    done = next(folder.glob("*seed0/run.json"))
    before = done.read_bytes()
    again = graft("resume", str(folder), "seed=0,1,2")
    assert again.returncode == 0, again.stderr
    assert done.read_bytes() == before
    assert statuses(folder) == ["done"] * 3
    assert [record["seed"] for record in records(folder)] == [0, 1, 2]
    third = graft("resume", str(folder))
    assert third.returncode == 0
    assert "2 of 2 runs done" not in third.stdout
    assert "stage finetune" not in third.stdout


def test_a_sweep_that_is_running_is_not_started_again(graft: Graft, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"):
        done = graft("train", "-m", *TINY, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert "another process is running the sweep in" in done.stderr
    assert not records(tmp_path)


def test_what_another_process_has_finished_is_not_recorded_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that lost its process and was resumed by hand, while the sweep waited for its lock."""
    folder = RunFolder.create(tmp_path, "job", {"seed": 0}, [])
    job, locked = launch.Job(0, "", RunFolder.open(folder.path)), RunFolder.locked

    @contextmanager
    def finished_first(self: RunFolder) -> Iterator[None]:
        folder.update(status="done", metrics={"val/acc": 0.5})
        with locked(self):
            yield

    monkeypatch.setattr(RunFolder, "locked", finished_first)
    job.record_end("killed by SIGKILL")
    assert (job.status, job.score) == ("done", 0.5)
    assert "error" not in RunFolder.open(folder.path).record


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("no.key=1,2", "no config key no.key"),
        ("optimizer.lr=0.1,-1", "optimizer.lr=-1: must be a number above 0"),
        ("transfer=finetune,finetun", "no config transfer=finetun: did you mean finetune"),
        ("trainer.num_nodes=1,2", "needs hydra/launcher=slurm"),
    ],
)
def test_a_mistake_in_any_job_is_found_before_the_first_one(
    graft: Graft, tmp_path: Path, argument: str, message: str
) -> None:
    done = graft("train", "-m", *TINY, argument, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not records(tmp_path / "sweep")


@pytest.mark.parametrize(
    ("choice", "package"), [("launcher=slurm", "submitit"), ("sweeper=optuna", "optuna")]
)
def test_what_is_not_installed_is_named(
    graft: Graft, monkeypatch: pytest.MonkeyPatch, choice: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "graft.sweeps.study", raising=False)
    done = graft("train", "-m", *TINY, f"hydra/{choice}", "seed=0,1")
    assert done.returncode == 1
    assert f"graft: error: hydra/{choice} needs" in done.stderr
    assert f"pip install {package}\n" in done.stderr


def test_another_launcher_is_refused(graft: Graft, tmp_path: Path) -> None:
    """Hydra's own would start ranks that run the whole sweep."""
    folder = tmp_path / "sweep"
    done = graft("train", "-m", *TINY, "hydra/launcher=basic", f"hydra.sweep.dir={folder}")
    assert done.returncode == 1
    assert "sweeps run with hydra/launcher=in_process, processes or slurm" in done.stderr
    assert not records(folder)


def test_torchrun_does_not_start_sweeps(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    done = graft("train", "-m", *TINY, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.returncode == 1
    assert "a sweep is one process" in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_full_disk_ends_the_sweep_in_one_line(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    done = graft("train", "-m", *TINY, "seed=0,1", f"hydra.sweep.dir={tmp_path / 'file' / 'sweep'}")
    assert done.stderr.startswith("graft: error: cannot write to the sweep's folder")
    assert done.stderr.count("\n") == 1

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "s" / "summary.csv"))

    monkeypatch.setattr(launch, "summarise", full)
    done = graft("train", "-m", *TINY, "seed=0,1", f"hydra.sweep.dir={tmp_path / 's'}")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "summary.csv" in done.stderr
    assert done.stderr.count("\n") == 1
    assert statuses(tmp_path / "s") == ["done", "queued"]


# ---------------------------------------------------------------- processes


class Trial(launch.Job):
    """A job that exists only as its trainer's settings."""

    def __init__(self, number: int, **trainer: Any) -> None:
        self.number = number
        self.settings = {"accelerator": "gpu", "devices": 1, "num_nodes": 1, **trainer}

    @property
    def trainer(self) -> dict[str, Any]:
        return self.settings


def test_a_queue_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job gets GPUs of its own, those with the fewest jobs first, and waits for them."""
    given: dict[int, str] = {}

    def spawn(self: Processes, job: launch.Job, environment: dict[str, str]) -> None:
        given[job.number] = environment["CUDA_VISIBLE_DEVICES"]

    monkeypatch.setattr(Processes, "spawn", spawn)
    runner = Processes([4, 5, 7], jobs_per_device=2, n_jobs=1)
    runner.check(Trial(0).trainer)
    assert [runner.start(Trial(i)) for i in range(3)] == [True] * 3
    assert sorted(given.values()) == ["4", "5", "7"]
    assert runner.start(Trial(3, devices=2))
    assert len(set(given[3].split(","))) == 2
    assert not runner.start(Trial(4, devices=2))  # one slot is free
    assert runner.is_free()
    assert runner.start(Trial(5))
    assert not runner.is_free()
    assert not runner.start(Trial(6))
    with pytest.raises(ValueError, match="the sweep's queue has 3 devices"):
        runner.check(Trial(7, devices=4).trainer)
    with pytest.raises(ValueError, match="say how many"):
        runner.check(Trial(7, devices=[0]).trainer)
    assert runner.wanted(Trial(7, devices="auto").trainer) == 3


def test_what_makes_a_process_a_rank_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID", "PL_GLOBAL_SEED"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("GRAFT_CACHE", "x")
    environment = environment_without_ranks()
    assert environment["GRAFT_CACHE"] == "x"
    assert not {"LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID", "PL_GLOBAL_SEED"} & {
        *environment
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["in_process", "processes"])
def test_jobs_of_two_ranks(graft: Graft, tmp_path: Path, launcher: str) -> None:
    """Two jobs, two folders; both ranks train (as one process at twice the batch would); what the
    first job leaves in the environment does not make the last one a rank.
    """
    folder = tmp_path / "sweep"
    done = graft(
        "train", "-m", *TINY, "trainer.devices=2,1", "seed=0", "data.augment=null",
        "data.batch_size=8", f"hydra/launcher={launcher}", f"hydra.sweep.dir={folder}",
        "optimizer.lr=0.1", "data.drop_last=true", "transfer=linear_probe",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert statuses(folder) == ["done", "done"]
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2
    paired = graft(
        "train", *TINY, "seed=0", "data.augment=null", "data.batch_size=16", "optimizer.lr=0.1",
        "data.drop_last=true", "transfer=linear_probe",
    )  # fmt: skip
    assert paired.returncode == 0
    (alone,) = (tmp_path / "logs").glob("*/checkpoints")

    def head(checkpoints: Path) -> torch.Tensor:
        path = checkpoints / "probe" / "last.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        return state["head.linear.weight"]

    two = next(folder.glob("*devices-2*/checkpoints"))
    one = next(folder.glob("*devices-1*/checkpoints"))
    torch.testing.assert_close(head(two), head(alone))
    assert not torch.allclose(head(one), head(alone), atol=1e-3)


def process_of(text: str) -> int:
    """The process with this in its command line."""
    (found,) = (
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and text in (entry / "cmdline").read_bytes().decode()
    )
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_killed_job_and_ctrl_c(graft: Graft, tmp_path: Path) -> None:
    """Others go on; Ctrl-C saves what runs and starts nothing; started again, all is finished."""
    folder = tmp_path / "sweep"
    sweep = start("hydra/launcher=processes", "seed=0,1,2,3", *LONG, folder=folder)
    wait_for(lambda: len([*folder.glob("*/checkpoints/*/last.ckpt")]) == 2)
    os.kill(process_of(str(next(folder.glob("*seed0")))), signal.SIGKILL)
    wait_for(lambda: "failed" in statuses(folder))
    os.kill(sweep.pid, signal.SIGINT)
    out, _ = sweep.communicate(timeout=180)
    assert sweep.returncode == 130
    assert statuses(folder)[:2] == ["failed", "preempted"]
    assert statuses(folder)[2] in ("queued", "preempted")  # it had the place of the first for long?
    assert statuses(folder)[3] == "queued"
    assert records(folder)[0]["error"] == "killed by SIGKILL"
    assert "killed by SIGKILL" in (folder / "summary.csv").read_text()
    assert f"stopped by SIGINT; to go on: graft resume {folder}" in out
    again = graft("resume", str(folder))
    assert again.returncode == 0
    assert statuses(folder) == ["done"] * 4
    assert "stage finetune after" in (next(folder.glob("*seed1")) / "output.log").read_text()


# ---------------------------------------------------------------- SLURM


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_job_of_slurm_saves_before_its_time_limit_and_is_requeued(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With submitit's own processes in place of SLURM, and a scontrol that notes what it is asked.

    The other job fails, and its reason comes back.
    """
    pytest.importorskip("submitit")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "asked"}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    folder = tmp_path / "sweep"
    slurm = ("hydra/launcher=slurm", "hydra.launcher.cluster=local")
    sweep = start(*slurm, "optimizer.lr=0.01,1e30", *LONG, folder=folder)
    wait_for(lambda: [*folder.glob("*lr-0.01*/checkpoints/*/last.ckpt")])
    run = next(folder.glob("*lr-0.01*"))
    os.kill(process_of(f"_submit\0{run}"), signal.SIGUSR1)
    sweep.communicate(timeout=180)
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert statuses(folder) == ["preempted", "failed"]
    assert "lower optimizer.lr" in records(folder)[1]["error"]
    monkeypatch.delenv("SLURM_JOB_ID")
    assert graft("resume", str(folder), "optimizer.lr=0.01").returncode == 0
    assert statuses(folder) == ["done", "failed"]
    log = max(run.glob("slurm/*.out"), key=lambda path: path.stat().st_mtime)
    assert "stage finetune after" in log.read_text()


# ---------------------------------------------------------------- many jobs


@pytest.mark.slow
def test_forty_jobs_of_which_ten_fail(graft: Graft, tmp_path: Path) -> None:
    """30 results, 10 listed failures; started again, only the 10 run."""
    folder = tmp_path / "sweep"
    rates = ",".join(["1e30", *(str(i / 100) for i in range(1, 4))])
    swept = (f"optimizer.lr={rates}", "seed=range(0,10)", f"hydra.sweep.dir={folder}")
    done = graft("train", "-m", *TINY, *swept)
    assert done.returncode == 1
    assert statuses(folder) == ["failed"] * 10 + ["done"] * 30
    with (folder / "summary.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 40
    assert sum(bool(row["test/acc"]) for row in rows) == 30
    assert sum("lower optimizer.lr" in row["error"] for row in rows) == 10
    assert (folder / "summary.md").read_text().count("\n  - ") == 10
    before = {record["job"]: record["finished"] for record in records(folder)}
    again = graft("resume", str(folder))
    assert again.returncode == 1
    ran = [job for job, ended in before.items() if records(folder)[job]["finished"] != ended]
    assert ran == list(range(10))
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 40
