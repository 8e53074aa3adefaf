"""`trainer=fsdp` on two CPU processes: the run of trainer=ddp, with half of the weights on each."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from graft.training.build import build
from graft.training.checkpoint import load_checkpoint
from tests.conftest import TINY, Graft, compose, same
from tests.rank_states import State

ROOT = Path(__file__).parents[2]
FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
# The probe trains from stored features and is not sharded. `all` starts from what `top` had in
# parts, frozen blocks and adapters among it.
PLAN = [
    "transfer=linear_probe", "transfer.stages.probe.epochs=1", "head.norm=standardize",
    "+transfer.stages.top={trainable:[stage2_1,norms],epochs:2,lora:{rank:2}}",
    "+transfer.stages.all={trainable:all,epochs:2,layer_decay:0.5,norm:frozen}",
    "optimizer.lr=0.05", "scheduler=constant", "trainer.gradient_clip_val=0.5",
    "data.source.test_per_class=13", "data.batch_size=4", "data.eval_batch_size=5",
]  # fmt: skip
STAGES = ("probe", "top", "all")


def checkpoint(run: Path, stage: str, name: str = "best") -> State:
    return torch.load(run / f"checkpoints/{stage}/{name}.ckpt", weights_only=True)["state_dict"]


def close(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


@pytest.mark.slow
def test_sharded_training_is_that_of_whole_models_also_resumed(
    graft_process: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)

    def run(name: str, *overrides: str, code: int = 0) -> Path:
        logs = tmp_path / name
        done = graft_process("train", *TINY, *PLAN, *overrides, f"paths.logs={logs}")
        assert done.returncode == code, done.stderr
        (folder,) = logs.iterdir()
        return folder

    whole = run("whole", "trainer=ddp_cpu")
    sharded = run(
        "sharded", *FSDP, "+callbacks.share._target_=tests.rank_states.WriteShare",
        f"+callbacks.share.folder={tmp_path}",
    )  # fmt: skip
    records = [json.loads((r / "run.json").read_text())["metrics"] for r in (whole, sharded)]
    assert records[1] == pytest.approx(records[0], abs=1e-4)
    for stage in STAGES:
        assert close(checkpoint(whole, stage), checkpoint(sharded, stage)), stage
        shares = [float((tmp_path / f"{stage}-share-{rank}").read_text()) for rank in (0, 1)]
        assert (shares == [1, 1]) is (stage == "probe")
        assert stage == "probe" or max(shares) < 0.6

    module, _ = build(compose(*TINY, *PLAN))  # in a single process
    load_checkpoint(module, sharded / "checkpoints/all/best.ckpt")
    assert same(dict(module.state_dict()), checkpoint(sharded, "all"))

    stopped = run(
        "stopped", *FSDP, "+callbacks.stop._target_=tests.rank_states.StopOnce",
        f"+callbacks.stop.folder={tmp_path}", "+callbacks.stop.stage=all", code=128 + 15,
    )  # fmt: skip
    done = graft_process("resume", str(stopped))
    assert done.returncode == 0, done.stderr
    for name in ("best", "last"):
        assert same(checkpoint(stopped, "all", name), checkpoint(sharded, "all", name))
