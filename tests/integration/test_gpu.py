"""On one GPU, all together in three minutes: what the CPU's tests show, in each precision.

python -m pytest -m gpu -n 6 tests
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.features.prefix import FrozenPrefix
from graft.training.build import build
from graft.training.module import TransferModule
from tests.conftest import TINY, Graft, Train, compose
from tests.integration.conftest import CLIPPED, MLP, RUNS, Break, Runs
from tests.integration.test_configs import EXPERIMENTS, ON_TEXTS, a_batch
from tests.integration.test_precision import CLIP, GRIDS, KINDS, few_steps_lost, losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
GPU = "trainer=gpu"


def loss_scale(run: Path) -> Any:
    (last,) = run.glob("checkpoints/*/last.ckpt")
    return torch.load(last, weights_only=True).get("MixedPrecision")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ON_TEXTS])
def test_every_experiment_runs_a_batch(
    graft: Graft, name: str, precision: str, image_folders: Path, tmp_path: Path
) -> None:
    overrides = [*a_batch(name, image_folders), GPU, f"trainer.precision={precision}"]
    if name == "domain_shift":
        overrides.append("task=dann")
    done = graft("train", *overrides)
    assert done.returncode == 0, done.stderr
    (record,) = (json.loads(p.read_text()) for p in (tmp_path / "logs").rglob("run.json"))
    assert record["status"] == "done"
    assert precision in record["device"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_kind_of_run_trains(train_tiny: Train, precision: str) -> None:
    grids = {} if precision == "16-mixed" else GRIDS
    kinds = {kind: [*overrides, CLIP] for kind, overrides in KINDS.items()} | grids
    del kinds["fused Adagrad"]  # torch has it for CPUs alone
    failed = {}
    for kind, overrides in kinds.items():
        try:
            run = train_tiny(*overrides, GPU, f"trainer.precision={precision}")
            assert set(run.metrics) >= {"val/acc", "test/acc", "test/f1", "test/loss"}
        except Exception as error:  # all that fail, in one go: time on a GPU is short
            failed[kind] = repr(error)
    assert not failed


@pytest.mark.parametrize("kind", ["finetune", "linear_probe", "l2_sp", "adamw"])
def test_losses_are_those_of_a_cpu(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    few_steps_lost(monkeypatch)
    overrides = [*KINDS[kind], CLIP, "head.norm=standardize"]
    expected = losses(train_tiny(*overrides).folder)
    for precision in PRECISIONS:
        run = train_tiny(*overrides, GPU, f"trainer.precision={precision}")
        assert losses(run.folder) == pytest.approx(expected, rel=0.03), precision


def test_auto_is_bfloat16_and_images_live_on_the_gpu(train_tiny: Train) -> None:
    auto = train_tiny(GPU)
    record = json.loads((auto.folder / "run.json").read_text())
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    assert ("bf16-mixed" in record["device"]) is fast
    found = [losses(train_tiny(GPU, f"data.resident={mode}").folder) for mode in ("on", "off")]
    assert found[0] == pytest.approx(found[1], rel=0.01)


@pytest.mark.parametrize(("mode", "precision"), [("true", "bf16-mixed"), ("true", "16-mixed")])
def test_compiled_blocks_train(train_tiny: Train, mode: str, precision: str) -> None:
    overrides = [CLIP, GPU, f"trainer.precision={precision}"]
    found = [losses(train_tiny(*overrides, f"trainer.compile={c}").folder) for c in (mode, "false")]
    assert found[0] == pytest.approx(found[1], rel=0.03)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_goes_on_where_it_was(
    runs: Runs, break_at: Break, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Not to the bit: a GPU's sums depend on the order in which its threads come."""
    kind = f"gpu {precision}"
    overrides = [*MLP, *CLIPPED, GPU, f"trainer.precision={precision}"]
    monkeypatch.setitem(RUNS, kind, overrides)
    whole = runs.whole(kind)
    break_at(TransferModule, "loss", 9)
    folder, code = runs.start(kind)
    assert code == 1
    runs.resume(folder)
    assert len(losses(folder)) == len(losses(whole))
    assert losses(folder) == pytest.approx(losses(whole), rel=0.05)
    assert loss_scale(folder) == loss_scale(whole)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_features_are_those_of_a_cpu(precision: str) -> None:
    def autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        return (lambda: torch.autocast(device, dtype)) if dtype else nullcontext

    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    module, _ = build(compose("trainer=cpu"))  # the embedded weights
    cut = len(module.backbone.blocks)
    expected = FrozenPrefix(module.backbone, cut)(images)
    found = FrozenPrefix(module.backbone.cuda(), cut, autocast("cuda"))(images.cuda()).cpu()
    tolerance = 0.05 if precision == "bf16-mixed" else 0.01  # of the largest feature
    assert torch.allclose(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [("ddp", "bf16-mixed"), ("ddp", "16-mixed"), ("fsdp", "bf16-mixed"), ("fsdp", "32-true")],
)
def test_strategies_of_several_devices_train_on_one(
    graft_process: Graft, strategy: str, precision: str
) -> None:
    done = graft_process(
        "train", *TINY, f"trainer={strategy}", "trainer.devices=1", CLIP,
        "trainer.accumulate_grad_batches=2", f"trainer.precision={precision}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
