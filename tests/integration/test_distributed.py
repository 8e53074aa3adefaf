"""Two CPU processes: equal ranks, exact metrics, the same result as one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, Graft

# No BatchNorm in a normalisation that depends on the batch: it would see half of it on each rank.
EQUAL = [
    "data.augment=null", "transfer.stages.finetune.norm=frozen", "optimizer.lr=0.2",
    "trainer.max_epochs=2", "scheduler=constant", "data.source.test_per_class=13",
]  # fmt: skip


def run(graft: Graft, tmp_path: Path, name: str, *overrides: str) -> tuple[dict, dict]:
    done = graft("train", *TINY, f"paths.logs={tmp_path / name}", *overrides)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / name).iterdir()  # ranks share one folder
    (best,) = folder.glob("checkpoints/*/best.ckpt")
    state = torch.load(best, weights_only=True)["state_dict"]
    return json.loads((folder / "run.json").read_text())["metrics"], state


def test_two_ranks_train_and_test_like_one_process(
    graft: Graft, graft_process: Graft, tmp_path: Path
) -> None:
    """Batch 4 on two ranks is batch 8 on one; 52 test images over ranks and batches of 5 and
    padding would count some twice."""
    metrics, state = run(graft, tmp_path, "one", *EQUAL, "data.batch_size=8")
    metrics2, state2 = run(
        graft_process, tmp_path, "two", *EQUAL, "trainer=ddp_cpu", "data.batch_size=4",
        "data.eval_batch_size=5",
    )  # fmt: skip
    assert metrics2 == pytest.approx(metrics, abs=1e-5)
    for key, value in state.items():
        assert torch.allclose(value.float(), state2[key].float(), atol=1e-4), key


def test_a_probe_on_two_ranks_is_a_probe_on_one(
    graft: Graft, graft_process: Graft, tmp_path: Path
) -> None:
    """Stored features and their measured statistics are the same on every rank."""
    probe = ["transfer=linear_probe", "head.norm=standardize", "trainer.max_epochs=3"]
    metrics, state = run(graft, tmp_path, "one", *probe, "data.batch_size=8")
    metrics2, state2 = run(
        graft_process, tmp_path, "two", *probe, "trainer=ddp_cpu", "data.batch_size=4"
    )
    assert metrics2 == pytest.approx(metrics, abs=1e-5)
    for key, value in state.items():
        assert torch.allclose(value.float(), state2[key].float(), atol=1e-5), key


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
    assert metrics2 == pytest.approx(metrics, abs=1e-5)
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
    assert metrics2 == pytest.approx(metrics, abs=1e-5)
    for key, value in state.items():
        assert torch.allclose(value.float(), state2[key].float(), atol=1e-5), key
