"""What a run guarantees: frozen is frozen, splits are honest, the best is tested, seeds decide."""

from __future__ import annotations

import csv
import gc
import json
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from torch.optim import Optimizer

from graft.data.datamodule import TransferDataModule
from graft.plan import schedules
from graft.runs.startup import import_libraries
from graft.training.build import build, build_stages
from graft.training.checkpoint import load_checkpoint
from graft.training.module import TransferModule
from tests.conftest import TINY, Train, compose, same


def initial(*overrides: str) -> dict[str, torch.Tensor]:
    config = compose(*TINY, *overrides)
    L.seed_everything(config["seed"], verbose=False)
    return {k: v.clone() for k, v in build(config)[0].state_dict().items()}


@pytest.mark.parametrize("cache", ["cache=auto", "cache=off", "cache_limit_gb=1e-9"])
def test_a_probe_leaves_every_parameter_and_buffer_of_the_backbone_as_loaded(
    train_tiny: Train, cache: str
) -> None:
    """Rule 1. BatchNorm statistics too: `requires_grad=False` alone lets them drift."""
    before = initial("transfer=linear_probe")
    after = train_tiny(
        "transfer=linear_probe", f"transfer.stages.probe.{cache}", "optimizer.lr=1.0"
    ).state()
    assert same(
        *({k: v for k, v in s.items() if k.startswith("backbone")} for s in (before, after))
    )
    assert not torch.equal(before["head.linear.weight"], after["head.linear.weight"])


def test_frozen_parts_are_in_eval_whoever_calls_train() -> None:
    """Rule 1: dropout and BatchNorm of a frozen block never train."""
    config = compose(*TINY, "transfer=finetune", "transfer.stages.finetune.trainable=1")
    module, _ = build(config)
    module.start_stage(build_stages(config)[0])
    module.train()
    modes = {name: block.training for name, block in module.backbone.blocks.named_children()}
    assert modes == {
        "stem": False, "stage1_1": False, "stage2_1": False, "stage3_1": True, "pool": False
    }  # fmt: skip
    assert not any(m.training for m in module.backbone.blocks.get_submodule("stem").modules())


def test_what_learns_moves_and_what_does_not_stays(train_tiny: Train) -> None:
    overrides = ["transfer.stages.finetune.trainable=[stem,stage3_1]", "optimizer=adamw"]
    before, after = (
        initial(*overrides),
        train_tiny(*overrides, "optimizer.weight_decay=0.5").state(),
    )
    moved = {
        k.split(".")[2]
        for k in before
        if k.startswith("backbone") and not torch.equal(before[k], after[k])
    }
    assert moved == {"stem", "stage3_1"}


class StepSizes(L.Callback):
    """The rate each block really moved at: |change| / |gradient| in every step of plain SGD."""

    seen: ClassVar[list[dict[str, float]]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.clear()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        self.before = {
            name: (p.detach().clone(), p.grad.clone())
            for name, p in pl_module.named_parameters()
            if p.grad is not None
        }

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any
    ) -> None:
        moved: dict[str, float] = defaultdict(float)
        slopes: dict[str, float] = defaultdict(float)
        for name, (value, gradient) in self.before.items():
            part = "head" if name.startswith("head") else name.split(".")[2]
            change = value - pl_module.get_parameter(name).detach()
            moved[part] += float(change.double().pow(2).sum())
            slopes[part] += float(gradient.double().pow(2).sum())
        self.seen.append({part: (moved[part] / slopes[part]) ** 0.5 for part in moved})


@pytest.mark.parametrize("scheduler", ["cosine", "one_cycle"])
def test_layer_decay_is_the_ratio_of_steps_through_warm_up_and_after_it(
    train_tiny: Train, scheduler: str
) -> None:
    """Rule 3, in a real fit: a schedule that writes one rate into all groups would undo it."""
    train_tiny(
        "transfer.stages.finetune.layer_decay=0.5", "transfer.stages.finetune.head_lr_scale=2",
        f"scheduler={scheduler}", "scheduler.warmup=3", "scheduler.final=0.1",
        "head=mlp", "trainer.max_epochs=2", "optimizer.momentum=0", "optimizer.nesterov=false",
        "optimizer.weight_decay=0", "optimizer.lr=0.1",
        "+callbacks.steps._target_=tests.unit.test_training.StepSizes",
    )  # fmt: skip
    total = len(StepSizes.seen)
    assert total >= 8
    schedule = getattr(schedules, scheduler)
    factors = {"stem": 1 / 16, "stage1_1": 1 / 8, "stage2_1": 1 / 4, "stage3_1": 1 / 2, "head": 2}
    for step, rates in enumerate(StepSizes.seen):
        base = 0.1 * schedule(step, total, warmup=3, final=0.1)
        expected = {part: base * factor for part, factor in factors.items()}
        assert rates == pytest.approx(expected, rel=1e-3), step


@pytest.mark.parametrize(
    "option",
    [
        "head.norm=none",
        "head.norm=standardize",
        "mirror=true",
        "transfer.stages.probe.views=flip",
        "transfer.stages.probe.views=3",
    ],
)
def test_cached_features_give_the_same_result_as_recomputing(
    train_tiny: Train, option: str
) -> None:
    """Rule 11, also with a normalisation that is measured first, and with views."""
    overrides = ["transfer=linear_probe", option, "trainer.max_epochs=3"]
    cached = train_tiny(*overrides, "transfer.stages.probe.cache=on")
    plain = train_tiny(*overrides, "transfer.stages.probe.cache=off")
    for key, value in cached.state().items():
        assert torch.allclose(value.float(), plain.state()[key].float(), atol=1e-5), key
    assert cached.metrics == pytest.approx(plain.metrics, abs=1e-5)


def test_partial_fine_tuning_trains_from_the_cached_prefix(train_tiny: Train) -> None:
    overrides = ["transfer.stages.finetune.trainable=1", "data.augment=null"]
    cached = train_tiny(*overrides, "transfer.stages.finetune.cache=on")
    plain = train_tiny(*overrides, "transfer.stages.finetune.cache=off")
    for key, value in cached.state().items():
        assert torch.allclose(value.float(), plain.state()[key].float(), atol=1e-4), key


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["data.augment=null"], "its first block learns"),
        (["transfer.stages.finetune.trainable=1"], "it augments the images"),
    ],
)
def test_a_cache_that_cannot_be_is_refused_with_the_reason(
    train_tiny: Train, overrides: list[str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        train_tiny(*overrides, "transfer.stages.finetune.cache=on")


def data(*overrides: str) -> TransferDataModule:
    return build(compose(*TINY, *overrides))[1]


def rows(datamodule: TransferDataModule) -> dict[str, set[bytes]]:
    return {
        name: {split.images[row].tobytes() for row in split.rows}
        for name, split in datamodule.splits.items()
    }


def test_splits_are_disjoint_and_do_not_move_with_the_seed() -> None:
    """Rule 6, also for the subsets of the training images."""
    one, other = rows(data("seed=1")), rows(data("seed=2"))
    assert one == other
    assert not one["train"] & one["val"]
    assert not one["train"] & one["test"]
    assert not one["val"] & one["test"]
    assert rows(data("data.split_seed=1"))["val"] != one["val"]
    few = rows(data("data.shots_per_class=2"))
    assert few["train"] < one["train"]
    assert few["val"] == one["val"]
    assert len(one["train"]) == 44  # 11 of each class
    assert len(rows(data("data.train_fraction=0.5"))["train"]) == 4 * 6


@pytest.mark.parametrize("stored", ["off", "on"])
def test_epochs_of_a_number_of_images_repeat_a_subset_with_fresh_augmentation(
    train_tiny: Train, stored: str
) -> None:
    """8 images, 40 an epoch: the steps of 40 images; labels stay with their images."""
    datamodule = data("data.shots_per_class=2", "data.epoch_images=40", "data.augment.flip=0")
    few = datamodule.splits["train"]
    batch, again = few[[3, 11]], few[[11]]
    assert torch.equal(batch["input"][0], batch["input"][1])
    assert batch["label"][0] == batch["label"][1]
    augmented = datamodule.transform(dict(batch), augment=True)["input"]
    assert not torch.equal(augmented[0], augmented[1])
    assert torch.equal(augmented[1], datamodule.transform(dict(again), augment=True)["input"][0])
    run = train_tiny(
        "transfer=linear_probe", f"transfer.stages.probe.cache={stored}", "data.shots_per_class=2",
        "data.epoch_images=40", "trainer.max_epochs=3",
    )  # fmt: skip
    checkpoint = run.folder / "checkpoints" / "probe" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3 * 40 // 8


def test_fitting_never_looks_at_the_test_split(train_tiny: Train, monkeypatch: Any) -> None:
    """Rule 6: the test split is opened after the last stage has ended, and not before."""
    events: list[str] = []
    for name in ("loader", "prepared"):
        original = getattr(TransferDataModule, name)

        def recorded(
            self: Any, split: str, *args: Any, original: Any = original, **kwargs: Any
        ) -> Any:
            events.append(split)
            return original(self, split, *args, **kwargs)

        monkeypatch.setattr(TransferDataModule, name, recorded)
    monkeypatch.setattr(TransferModule, "on_fit_end", lambda self: events.append("end of fit"))
    train_tiny("transfer=linear_probe", "trainer.max_epochs=2")
    assert events.index("test") > events.index("end of fit")


def test_training_validation_and_test_see_the_same_normalisation_and_geometry() -> None:
    """Rule 5: one image, through the hook of each phase, gives one result (augmentation off)."""
    datamodule = data("data.image_size=24", "data.augment=null")
    batch = datamodule.splits["train"][[0, 1]]
    results = []
    for phase in ("training", "validating", "testing"):
        trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        setattr(trainer, phase, True)
        datamodule.trainer = trainer
        results.append(datamodule.on_after_batch_transfer(dict(batch), 0)["input"])
    assert results[0].shape == (2, 3, 24, 24)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    p = datamodule.inputs.preprocessing
    white = datamodule.inputs.prepare(torch.full((1, 3, 24, 24), 255, dtype=torch.uint8))
    expected = [(1 - m) / s for m, s in zip(p.mean, p.std, strict=True)]
    assert white.mean((0, 2, 3)).tolist() == pytest.approx(expected, rel=1e-4)


def test_each_epoch_of_a_fit_is_augmented_anew() -> None:
    """Rule 16, in the hook that a fit calls."""
    datamodule = data()
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.training = True
    datamodule.trainer = trainer
    batch = datamodule.splits["train"][list(range(8))]
    drawn = []
    epochs: Any = trainer.fit_loop.epoch_progress.current
    for epoch in (0, 1, 0):
        epochs.processed = epoch
        drawn.append(datamodule.on_after_batch_transfer(dict(batch), 0)["input"])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_the_best_checkpoint_is_tested_and_not_the_last(train_tiny: Train) -> None:
    """Rule 7. The rate explodes after the first epochs: the last weights are no good."""
    run = train_tiny(
        "trainer.max_epochs=6", "scheduler=constant", "optimizer.lr=0.02", "data.augment=null",
        "scheduler._target_=tests.unit.test_training.exploding",
    )  # fmt: skip
    with (run.folder / "metrics.csv").open() as file:
        scores = [float(row["val/acc"]) for row in csv.DictReader(file) if row["val/acc"]]
    assert run.metrics["val/acc"] == pytest.approx(max(scores))
    assert scores[-1] < max(scores)
    folder = run.folder / "checkpoints" / "finetune"
    tested = run.state()
    load_checkpoint(run.module, folder / "best.ckpt")
    assert same(tested, run.state())
    load_checkpoint(run.module, folder / "last.ckpt")
    assert not same(tested, run.state())


def exploding(step: int, total: int, *, warmup: float) -> float:
    return 1.0 if step < total / 2 else 2000.0


def test_same_seed_same_result_other_seed_other_result(train_tiny: Train) -> None:
    """Rule 16, also with workers: neither order nor augmentation depends on them."""
    one = train_tiny("seed=1")
    assert same(one.state(), train_tiny("seed=1").state())
    assert same(one.state(), train_tiny("seed=1", "data.num_workers=2").state())
    assert not same(one.state(), train_tiny("seed=2").state())


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(
    train_tiny: Train, tmp_path: Any
) -> None:
    with pytest.raises(FloatingPointError, match=r"validation loss is .* lower optimizer\.lr"):
        train_tiny("optimizer.lr=1e30")
    assert not list(tmp_path.rglob("best.ckpt"))


def test_checkpoints_hold_plain_values_and_the_config(train_tiny: Train) -> None:
    run = train_tiny("transfer=linear_probe")
    for name in ("best", "last"):
        path = run.folder / "checkpoints" / "probe" / f"{name}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["graft"]["stage"] == "probe"
        assert checkpoint["graft"]["config"]["transfer"]["stages"]["probe"]["trainable"] == "head"


def test_ema_weights_are_what_is_kept(train_tiny: Train) -> None:
    run = train_tiny("scheduler=constant", "trainer.max_epochs=3", "transfer=ema")
    path = run.folder / "checkpoints" / "finetune" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    raw, averaged = checkpoint["current_model_state"], checkpoint["state_dict"]
    key = "backbone.blocks.stem.conv.weight"
    before = initial()[key]
    assert 0 < (averaged[key] - before).norm() < 0.9 * (raw[key] - before).norm()
    best = torch.load(path.with_name("best.ckpt"), weights_only=True)["state_dict"]
    assert same(best, run.state())


def test_accumulation_and_clipping_reach_the_trainer_and_the_schedule(train_tiny: Train) -> None:
    """The schedule ends with the last optimizer step, not with the last batch."""
    run = train_tiny(
        "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.1",
        "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "scheduler.warmup=0",
    )  # fmt: skip
    with (run.folder / "metrics.csv").open() as file:
        rates = [float(row["lr/head"]) for row in csv.DictReader(file) if row.get("lr/head")]
    assert rates[0] == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0.05 * 4e-6, rel=1e-3)


def test_the_garbage_collector_works_again_after_the_imports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if this were the first run of the process.
    monkeypatch.setattr("graft.runs.startup.sys", SimpleNamespace(modules={}))
    try:
        import_libraries()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    monkeypatch.undo()
    import_libraries()
    assert gc.get_freeze_count() == 0, "a later run would set aside the garbage of earlier ones"


def test_the_run_folder_tells_the_whole_story(train_tiny: Train) -> None:
    run = train_tiny("transfer=linear_probe")
    files = {p.name for p in run.folder.iterdir()}
    assert {"config.yaml", "overrides.yaml", "run.json", "metrics.csv", "checkpoints"} <= files
    record = json.loads((run.folder / "run.json").read_text())
    assert record["stage"] == "probe"
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]


def test_predictions_reach_the_label_they_belong_to(train_tiny: Train) -> None:
    """The whole chain learns: a shuffled label or a misplaced feature would show as chance."""
    run = train_tiny(
        "trainer.max_epochs=15",
        "data.source.per_class=40",
        "optimizer.lr=0.05",
        "data.augment=null",
    )
    assert run.metrics["test/acc"] > 0.9
    assert np.isfinite(run.metrics["test/loss"])


@pytest.mark.slow
def test_checkpoints_of_a_compiled_run_are_those_of_any_other(train_tiny: Train) -> None:
    """Rule 12: `torch.compile(module)` would rename every key to `_orig_mod.`."""
    compiled = train_tiny("trainer.compile=true")
    plain = train_tiny()
    assert compiled.state().keys() == plain.state().keys()
    load_checkpoint(plain.module, compiled.folder / "checkpoints" / "finetune" / "best.ckpt")
    assert same(plain.state(), compiled.state())
    assert compiled.metrics == pytest.approx(plain.metrics, abs=0.05)
