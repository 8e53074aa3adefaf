"""Mixed precision on the CPU, so that a GPU is never the first to try it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from graft.training.trainer import trainer_options
from tests.conftest import TINY, Graft, Train, compose
from tests.integration.conftest import MLP
from tests.integration.test_configs import PLANS

CLIP = "trainer.gradient_clip_val=0.5"
MIXED = ("bf16-mixed", "16-mixed")
OTHER = ["~optimizer.momentum", "~optimizer.nesterov", "optimizer.lr=0.001"]

TARGET = "data.target={shift: contrast}"

# What trains, as a plan or beside it. Each with clipping; torch's fused step is the default of SGD,
# Adam and AdamW.
KINDS: dict[str, list[str]] = {
    **{plan: [f"transfer={plan}", "trainer.accumulate_grad_batches=2"] for plan in PLANS},
    "adabn": ["transfer=adabn", TARGET],
    "dann": ["task=dann", TARGET],
    "coral": ["task=coral", TARGET],
    "adamw": ["optimizer=adamw"],
    "fused": ["+optimizer.fused=true"],
    "not fused": ["+optimizer.foreach=false"],
    "cosine head": ["head=cosine"],
    "mlp head": ["head=mlp", "head.dropout=0.2", "head.norm=batchnorm"],
    "soft labels": ["data.augment.mixup=0.2", "data.augment.cutmix=1", "task.label_smoothing=0.1"],
    "nothing stored": ["transfer=linear_probe", "transfer.stages.probe.cache=off"],
    "taps": ["backbone.taps=all", "head.norm=standardize", "transfer=linear_probe"],
    "mirror": ["mirror=true", "transfer=linear_probe"],
    **{
        name: [f"optimizer._target_=torch.optim.{name}", *OTHER]
        for name in (
            "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam",
            "RMSprop",
        )
    },
    "fused Adagrad": ["optimizer._target_=torch.optim.Adagrad", *OTHER, "+optimizer.fused=true"],
}  # fmt: skip
GRIDS: dict[str, list[str]] = {  # not in 16-mixed, and without clipping: both are refused
    "linear grid": ["transfer=linear_probe", "head=linear_grid", "optimizer=adamw"],
    "mlp grid": ["transfer=linear_probe", *MLP[:2], "head.grid={lr:[0.01,0.1],seed:[0,1]}"],
}


def losses(run: Path) -> list[float]:
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    columns = [i for i, name in enumerate(rows[0]) if name in ("train/loss", "val/loss")]
    return [float(row[i]) for row in rows[1:] for i in columns if row[i]]


def few_steps_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale losses by less than usual in float16, which would leave out the first steps."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=64.0))


@pytest.mark.parametrize("kind", ["finetune", "linear_probe", "l2_sp", "adamw", "soft labels"])
@pytest.mark.parametrize("precision", MIXED)
def test_losses_are_those_of_float32(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
) -> None:
    """Within 2 %: bfloat16 has 8 bits, and five steps add up. A scale of the loss that is left in
    gradients, by clipping or by the penalty of l2_sp, shows as training that stands still."""
    few_steps_lost(monkeypatch)
    overrides = [*KINDS[kind], CLIP, "head.norm=standardize"]
    exact = train_tiny(*overrides)
    mixed = train_tiny(*overrides, f"trainer.precision={precision}")
    assert losses(mixed.folder) == pytest.approx(losses(exact.folder), rel=0.02)
    assert losses(mixed.folder) != losses(exact.folder)


@pytest.mark.slow
@pytest.mark.parametrize("precision", MIXED)
def test_every_kind_of_run_trains(train_tiny: Train, precision: str) -> None:
    grids = GRIDS if precision == "bf16-mixed" else {}
    kinds = {k: [*overrides, CLIP] for k, overrides in KINDS.items()} | grids
    for kind, overrides in kinds.items():
        overrides = [*overrides, f"trainer.precision={precision}", "trainer.limit_val_batches=2"]
        run = train_tiny(*overrides)
        assert set(run.metrics) >= {"val/acc", "test/acc", "test/f1", "test/loss"}, kind


@pytest.mark.slow
@pytest.mark.parametrize("precision", MIXED)
def test_compiled_blocks_train(train_tiny: Train, precision: str) -> None:
    overrides = [CLIP, f"trainer.precision={precision}"]
    plain, compiled = (train_tiny(*overrides, f"trainer.compile={c}") for c in ("false", "true"))
    assert losses(compiled.folder) == pytest.approx(losses(plain.folder), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "strategy"),
    [("bf16-mixed", "ddp"), ("16-mixed", "ddp"), ("bf16-mixed", "fsdp")],
)
def test_two_processes_train_as_one_does(
    train_tiny: Train, graft_process: Graft, tmp_path: Path, precision: str, strategy: str
) -> None:
    overrides = [
        *TINY, CLIP, "trainer.accumulate_grad_batches=2", "head.norm=standardize",
        "transfer.stages.finetune.norm=frozen", f"trainer.precision={precision}",
    ]  # fmt: skip
    one = train_tiny(*overrides).metrics
    done = graft_process(
        "train", *overrides, "trainer.devices=2", f"trainer.strategy={strategy}",
        "data.batch_size=4", f"paths.logs={tmp_path / 'two'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "two").glob("*/run.json")
    two = json.loads(record.read_text())["metrics"]
    assert two["test/loss"] == pytest.approx(one["test/loss"], rel=0.02)


def test_auto_is_float32_on_a_cpu_and_a_chosen_precision_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the instructions of the CPU: a stopwatch would decide otherwise on a busy machine."""

    def resolved(precision: str) -> tuple[str, str]:
        options = trainer_options(
            compose("trainer=cpu", f"trainer.precision={precision}")["trainer"]
        )
        return options["precision"], capsys.readouterr().out

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolved("auto") == ("32-true", "")
    assert resolved("bf16-mixed") == resolved("bf16") == ("bf16-mixed", "")
    precision, out = resolved("16-mixed")
    assert precision == "16-mixed"
    assert out.count("\n") == 1
    assert "this CPU has no instructions for trainer.precision=16-mixed" in out
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"fp16_arith": True})
    assert resolved("16") == ("16-mixed", "")
    assert "no instructions for trainer.precision=bf16-mixed" in resolved("bf16-mixed")[1]
    assert resolved("32") == ("32-true", "")
