"""Two CPU processes: equal ranks, exact metrics, the same result as one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch

from graft.training.build import build
from graft.training.checkpoint import load_checkpoint
from tests.conftest import TINY, Graft, compose, same
from tests.rank_states import State, read_states

ROOT = Path(__file__).parents[2]
Launch = Callable[[list[str], Path], "list[subprocess.Popen[str]]"]

# A normalisation over the batch would see half of it on each rank: BatchNorm of what learns is
# frozen. The probe trains from stored features, the stage after it from images.
EQUAL = [
    "transfer=linear_probe", "transfer.stages.probe.epochs=3", "head.norm=standardize",
    "+transfer.stages.finetune={trainable:2,norm:frozen,epochs:2,augment:false,cache:off}",
    "optimizer.lr=0.02", "scheduler=constant", "data.source.test_per_class=13",
]  # fmt: skip

# Rates at which ranks that train on their own are far apart after a step.
GRADUAL = [
    "transfer=linear_probe", "transfer.stages.probe.epochs=2",
    "+transfer.stages.top1={trainable:1,epochs:2}",
    "+transfer.stages.top2={trainable:2,epochs:2}",
    "+transfer.stages.all={trainable:all,epochs:2}",
    "optimizer=adamw", "optimizer.lr=0.02", "optimizer.weight_decay=0.5", "scheduler=constant",
    "data.source.test_per_class=13", "data.batch_size=4", "data.eval_batch_size=5",
]  # fmt: skip
LEARNING = {
    "probe": set(), "top1": {"stage3_1"}, "top2": {"stage2_1", "stage3_1"},
    "all": {"stem", "stage1_1", "stage2_1", "stage3_1"},
}  # fmt: skip


def run(graft: Graft, tmp_path: Path, name: str, *overrides: str) -> tuple[dict, State]:
    done = graft("train", *TINY, f"paths.logs={tmp_path / name}", *overrides)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / name).iterdir()  # ranks share one folder
    last = max(folder.glob("checkpoints/*/best.ckpt"), key=lambda path: path.stat().st_mtime)
    state = torch.load(last, weights_only=True)["state_dict"]
    return json.loads((folder / "run.json").read_text())["metrics"], state


def test_two_ranks_run_a_plan_like_one_process(
    graft: Graft, graft_process: Graft, tmp_path: Path
) -> None:
    """Rules 8 and 9. Batch 4 on two ranks is batch 8 on one; padding would count some of the 52
    test images twice, over ranks and batches of 5. Stored features and what is measured on them
    are the same on every rank.
    """
    metrics, state = run(graft, tmp_path, "one", *EQUAL, "data.batch_size=8")
    metrics2, state2 = run(
        graft_process, tmp_path, "two", *EQUAL, "trainer=ddp_cpu", "data.batch_size=4",
        "data.eval_batch_size=5",
    )  # fmt: skip
    assert metrics2 == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    for key, value in state.items():
        assert torch.allclose(value.float(), state2[key].float(), atol=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("task", ["denoising", "masked"])
def test_two_ranks_pretrain_like_one_process(
    graft: Graft, graft_process: Graft, tmp_path: Path, task: str
) -> None:
    """Without BatchNorms that learn; noise and masks follow the image, not the rank."""
    own = [
        f"task={task}", "head=features", "transfer.stages.finetune.norm=frozen", "optimizer=adamw",
        "scheduler=constant", "trainer.max_epochs=2", "data.eval_batch_size=5", "task.probe=1",
    ]  # fmt: skip
    metrics, state = run(graft, tmp_path, "one", *own, "data.batch_size=8")
    two = (*own, "trainer=ddp_cpu", "data.batch_size=4")
    metrics2, state2 = run(graft_process, tmp_path, "two", *two)
    assert metrics2 == pytest.approx(metrics, rel=1e-4)
    for key, value in state.items():
        assert torch.allclose(value.float(), state2[key].float(), atol=1e-3), key


@pytest.mark.slow
def test_barlow_twins_correlates_over_ranks(
    graft: Graft, graft_process: Graft, tmp_path: Path
) -> None:
    """One linear layer as the projector has no BatchNorm: halves of a batch are as good as it."""
    own = [
        "task=barlow", "task.layers=1", "task.width=8", "head=features", "optimizer=adamw",
        "transfer.stages.finetune.norm=frozen", "scheduler=constant", "data.augment.color=0.3",
    ]  # fmt: skip
    metrics, state = run(graft, tmp_path, "one", *own, "data.batch_size=16")
    two = (*own, "trainer=ddp_cpu", "data.batch_size=8")
    metrics2, state2 = run(graft_process, tmp_path, "two", *two)
    assert metrics2 == pytest.approx(metrics, rel=1e-3)
    for key, value in state.items():
        assert torch.allclose(value.float(), state2[key].float(), atol=1e-3), key


@pytest.mark.slow
def test_ranks_stay_equal_through_gradual_unfreezing(
    graft_process: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules 1, 2, 8 and 12, with BatchNorm in train mode, the statistics of each rank its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    overrides = [
        *GRADUAL,
        "+callbacks.states._target_=tests.rank_states.WriteStates",
        f"+callbacks.states.folder={tmp_path / 'states'}",
    ]
    done = graft_process("train", *TINY, *overrides, "trainer=ddp_cpu")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "logs").iterdir()
    best = {
        stage: torch.load(folder / f"checkpoints/{stage}/best.ckpt", weights_only=True)
        for stage in LEARNING
    }
    previous = None
    for stage, learning in LEARNING.items():
        starts, ends = (read_states(tmp_path / "states", stage, m) for m in ("start", "end"))
        assert len(starts) == len(ends) == 2
        assert same(*starts), stage
        assert same(*ends), stage
        for key, before in starts[0].items():
            part = key.split(".")
            if part[0] not in ("backbone", "head"):
                continue  # metrics
            learns = part[0] == "head" or part[2] in learning
            assert learns is not torch.equal(before, ends[0][key]), f"{stage}: {key}"
        if previous is not None:  # the head too is the one that the stage before ended with
            assert same(starts[0], best[previous]["state_dict"])
        previous = stage
    tested = read_states(tmp_path / "states", "all", "test")
    assert same(*tested)
    assert same(tested[0], best["all"]["state_dict"])

    # The checkpoint loads in a plain process, and gives the metrics of the two ranks there.
    module, datamodule = build(compose(*TINY, *GRADUAL))
    load_checkpoint(module, folder / "checkpoints/all/best.ckpt")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (metrics,) = trainer.test(module, datamodule=datamodule, verbose=False)
    recorded = json.loads((folder / "run.json").read_text())["metrics"]
    assert metrics["test/acc"] == recorded["test/acc"]
    assert metrics["test/loss"] == pytest.approx(recorded["test/loss"], rel=1e-5)


@pytest.mark.slow
def test_a_grid_of_heads_on_two_ranks_has_the_winner_of_one(
    graft: Graft, graft_process: Graft, tmp_path: Path
) -> None:
    """Scores are summed over ranks, so both ranks keep the same head."""
    grid = [
        "transfer=linear_probe", "head=mlp", "head.hidden=8", "trainer.max_epochs=2",
        "head.grid={lr:[0.001,0.1],weight_decay:[0,0.1],seed:[0,1]}",
    ]  # fmt: skip
    metrics, state = run(graft, tmp_path, "one", *grid, "data.batch_size=8")
    metrics2, state2 = run(
        graft_process, tmp_path, "two", *grid, "trainer=ddp_cpu", "data.batch_size=4"
    )
    assert metrics2 == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    for key, value in state.items():
        assert torch.allclose(value.float(), state2[key].float(), atol=1e-5), key


@pytest.mark.slow
def test_a_solved_head_on_two_ranks_is_that_on_one(
    graft: Graft, graft_process: Graft, tmp_path: Path
) -> None:
    metrics, state = run(graft, tmp_path, "one", "transfer=ridge_probe", "data.batch_size=8")
    metrics2, state2 = run(
        graft_process, tmp_path, "two", "transfer=ridge_probe", "trainer=ddp_cpu",
        "data.batch_size=4",
    )  # fmt: skip
    assert metrics2 == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    for key, value in state.items():
        assert torch.allclose(value.float(), state2[key].float(), atol=1e-5), key


def torchrun(command: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [start([*launcher, *command], folder)]


def slurm(command: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """What `srun --ntasks-per-node=2` gives its two processes, on one node."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    variables = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "graft", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NNODES": "1", "SLURM_NODEID": "0", "MASTER_PORT": str(port),
    }  # fmt: skip
    return [
        start(command, folder, **variables, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in range(2)
    ]


def start(command: list[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("launch", [torchrun, slurm], ids=["torchrun", "slurm"])
def test_processes_started_by_others_share_a_run_and_stay_equal(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    overrides = [
        "trainer=ddp_cpu", "transfer=linear_probe", "optimizer.lr=0.1", "data.batch_size=4",
        "+transfer.stages.finetune={trainable:all,epochs:1}",
        "+callbacks.states._target_=tests.rank_states.WriteStates",
        f"+callbacks.states.folder={tmp_path / 'states'}",
    ]  # fmt: skip
    processes = launch(["-m", "graft", "train", *TINY, *overrides], tmp_path)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    (folder,) = (tmp_path / "logs").iterdir()
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    assert "".join(outputs).count("test/acc") == 1  # the others are silent
    for stage in ("probe", "finetune"):
        starts, ends = (read_states(tmp_path / "states", stage, m) for m in ("start", "end"))
        assert len(ends) == 2
        assert same(*ends)
        assert not same(starts[0], ends[0])
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "cache", "states"}
