"""A grid of heads: each is what it would be alone, and the best becomes the head."""

from __future__ import annotations

import csv
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graft.models.heads import (
    CosineHead,
    Head,
    HeadGrid,
    LinearHead,
    MLPHead,
    Standardize,
    seeded_head,
)
from graft.models.resnet_cifar import resnet_cifar
from graft.plan.grid import GridPoint, GridRecord
from graft.plan.param_groups import param_groups
from graft.reporting.pictures import heads
from graft.tasks.base import Tally
from graft.tasks.classification import Classification, cross_entropy
from graft.training.build import build
from graft.training.checkpoint import load_checkpoint
from graft.training.grid import GridFit
from graft.training.per_head import PerHead, grid_groups
from tests.conftest import TINY, Train, Trained, compose
from tests.unit.asked import Asked

RATES, DECAYS = [0.3, 0.001, 0.05], [0.0, 0.1, 0.5]


def make_heads(kind: type[Head], norm: str = "none") -> list[Head]:
    torch.manual_seed(0)
    heads = [kind(6, 4, norm=norm) for _ in RATES]  # type: ignore[misc, arg-type]
    for head in heads:
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return heads


@pytest.mark.parametrize("kind", [LinearHead, MLPHead, CosineHead])
@pytest.mark.parametrize("norm", ["none", "standardize", "batchnorm"])
def test_a_grid_gives_the_logits_of_its_heads_and_gives_them_back(
    kind: type[Head], norm: str
) -> None:
    heads, features = make_heads(kind, norm), torch.randn(20, 6) * 3 + 1
    for head in heads:
        if isinstance(head.norm, Standardize):
            head.norm.measure(features)
    grid = HeadGrid(heads)
    assert len(grid) == 3
    logits = grid(features)
    for k, head in enumerate(heads):
        assert torch.allclose(logits[:, k], head(features), atol=1e-6)
        back = grid.head(k)
        assert type(back) is kind
        assert back.state_dict().keys() == head.state_dict().keys()
        assert all(
            torch.equal(a, b) for a, b in zip(back.parameters(), head.parameters(), strict=True)
        )
        assert torch.equal(back.eval()(features), head.eval()(features))
        head.train()


def test_a_subclass_of_the_linear_head_keeps_what_it_adds() -> None:
    class Doubled(LinearHead):
        def classify(self, features: torch.Tensor) -> torch.Tensor:
            return 2 * super().classify(features)

    heads, features = make_heads(Doubled), torch.randn(5, 6)
    assert torch.allclose(HeadGrid(heads)(features)[:, 1], heads[1](features), atol=1e-6)


def test_a_head_that_the_grid_cannot_share_is_refused() -> None:
    class Normed(LinearHead):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.inner = torch.nn.BatchNorm1d(4)

    with pytest.raises(ValueError, match=r"Normed keeps inner\..* outside its norm"):
        HeadGrid([Normed(), Normed()])
    with pytest.raises(ValueError, match=r"set head\.dropout=0"):
        HeadGrid([MLPHead(6, 4, dropout=0.1)])


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.99)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", [LinearHead, MLPHead, CosineHead])
def test_steps_equal_those_of_torchs_optimizer_on_each_head_alone(
    name: str, kind: type[Head]
) -> None:
    """Rates, schedule, weight decay on matrices alone; half-way the state goes through a file."""
    heads = [head.double() for head in make_heads(kind)]  # Adam blows up the noise of float32
    features, labels = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 4
    grid = HeadGrid(heads)

    def optimizer() -> tuple[PerHead, torch.optim.lr_scheduler.LambdaLR]:
        together = PerHead(OPTIMIZERS[name](grid_groups(grid, RATES, DECAYS)))
        return together, torch.optim.lr_scheduler.LambdaLR(together, lambda step: 0.9**step)

    together, schedule = optimizer()
    for step in range(30):
        if step == 15:
            saved = together.state_dict(), schedule.state_dict()
            together, schedule = optimizer()
            together.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        together.zero_grad()
        together.step(lambda: backward(cross_entropy(grid(features), labels).mean(0).sum()))
        schedule.step()
    frozen = resnet_cifar(depth=8, width=4, weights=None).requires_grad_(False)
    for k, head in enumerate(heads):
        groups = param_groups(frozen, head, lr=RATES[k], weight_decay=DECAYS[k])
        alone = OPTIMIZERS[name](groups)
        falling = torch.optim.lr_scheduler.LambdaLR(alone, lambda step: 0.9**step)
        for _ in range(30):
            alone.zero_grad()
            F.cross_entropy(head(features), labels).backward()
            alone.step()
            falling.step()
        for a, b in zip(grid.head(k).parameters(), head.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def backward(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss


def test_an_optimizer_whose_step_is_not_proportional_is_refused() -> None:
    groups = grid_groups(HeadGrid(make_heads(LinearHead)), RATES, DECAYS)
    with pytest.raises(ValueError, match="not with Adagrad"):
        PerHead(torch.optim.Adagrad(groups))


def alone(train: Train, winner: dict[str, Any], *overrides: str) -> Trained:
    return train(
        *overrides, "head.grid=null", f"optimizer.lr={winner['lr']}",
        f"optimizer.weight_decay={winner['weight_decay']}", f"head.seed={winner['seed']}",
    )  # fmt: skip


PROBE = [
    "transfer=linear_probe", "trainer.max_epochs=4", "data.source.per_class=40",
    "head.norm=standardize", "scheduler=cosine",
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=adamw", "head.grid={lr:[0.0001,0.003,0.1],weight_decay:[0,0.5]}"],
        ["optimizer=sgd", "head.grid={lr:[0.0001,0.01],weight_decay:[0.1,0.0]}"],
        ["head=mlp", "head.hidden=16", "optimizer=adamw", "head.grid={lr:[0.001],seed:[3,4,5]}"],
        ["head=mlp", "head.hidden=16", "head.norm=batchnorm", "head.grid={seed:[1,2]}"],
        ["head=cosine", "optimizer=adamw", "head.grid={lr:[0.001,0.01],seed:[1,2]}"],
    ],
    ids=["linear-adamw", "linear-sgd", "mlp-seeds", "mlp-batchnorm", "cosine"],
)
def test_the_winner_equals_that_head_trained_alone(train_tiny: Train, overrides: list[str]) -> None:
    """Rule 13."""
    run = train_tiny(*PROBE, *overrides)
    winner = json.loads((run.folder / "run.json").read_text())["head"]
    lone = alone(train_tiny, winner, *PROBE, *overrides)
    expected, state = lone.state(), run.state()
    assert expected.keys() == state.keys()
    for key, value in expected.items():
        assert torch.allclose(value.float(), state[key].float(), atol=1e-5), key
    assert run.metrics["val/acc"] == lone.metrics["val/acc"] == winner["val/acc"]
    assert run.metrics["test/acc"] == lone.metrics["test/acc"]
    assert run.metrics["test/loss"] == pytest.approx(lone.metrics["test/loss"], rel=1e-4)


def test_the_seed_of_a_head_decides_its_initial_weights_and_nothing_else() -> None:
    def state(*overrides: str) -> dict[str, torch.Tensor]:
        import lightning as L

        config = compose(*TINY, "head=mlp", *overrides)
        L.seed_everything(config["seed"], verbose=False)
        module, datamodule = build(config)
        assert datamodule.seed == config["seed"]
        return module.state_dict()

    base, other = state(), state("head.seed=1")
    key = "head.mlp.0.weight"
    assert not torch.equal(base[key], other[key])
    assert all(torch.equal(v, other[k]) for k, v in base.items() if k.startswith("backbone"))
    assert torch.equal(state("seed=1")[key], other[key])
    assert torch.equal(state("backbone.depth=14", "head.seed=1")[key], other[key])


def test_drawing_a_head_leaves_the_random_state_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    seeded_head(MLPHead, (6, 4), 1)
    assert torch.equal(torch.rand(1), expected)


def test_a_head_that_diverges_disturbs_nobody_and_does_not_win(train_tiny: Train) -> None:
    calm = train_tiny(*PROBE, "head.grid={lr:[0.01]}")
    run = train_tiny(*PROBE, "head.grid={lr:[1e38,0.01]}")
    for key, value in calm.state().items():
        assert torch.allclose(value.float(), run.state()[key].float(), atol=1e-5), key
    with (run.folder / "grid.csv").open() as file:
        best, worst = csv.DictReader(file)
    assert float(best["lr"]) == 0.01
    assert worst["val/loss"] == "inf"
    assert (float(worst["val/acc"]), int(worst["epoch"])) == (-math.inf, 0)


def test_only_when_every_head_diverges_the_run_stops(train_tiny: Train) -> None:
    with pytest.raises(FloatingPointError, match=r"validation loss is .* lower optimizer\.lr"):
        train_tiny(*PROBE, "head.grid={lr:[1e38,2e38]}")


def test_checkpoints_hold_the_winner_alone_and_the_next_stage_goes_on_from_it(
    train_tiny: Train,
) -> None:
    """With averaged weights, whose checkpoints hold two states."""
    grid = "head.grid={lr:[0.001,0.1],seed:[0,1]}"
    run = train_tiny(*PROBE, "head=mlp", grid, "transfer.stages.probe.ema=0.99")
    module, _ = build(compose(*TINY, *PROBE, "head=mlp"))
    best = run.folder / "checkpoints" / "probe" / "best.ckpt"
    load_checkpoint(module, best)
    assert all(torch.equal(v, run.state()[k]) for k, v in module.state_dict().items())
    note = torch.load(best, weights_only=True)["graft"]
    assert note["stage"] == "probe"
    assert note["head"] == json.loads((run.folder / "run.json").read_text())["head"]
    assert {path.name for path in best.parent.iterdir()} == {"best.ckpt", "last.ckpt"}

    second = "{trainable: all, augment: false, epochs: 1, lr: 1e-12}"
    two = train_tiny(*PROBE, "head=mlp", grid, f"+transfer.stages.second={second}")
    one = train_tiny(*PROBE, "head=mlp", grid)
    for key, value in one.state().items():
        if key.startswith("head."):
            assert torch.allclose(value.float(), two.state()[key].float(), atol=1e-6), key


def test_losses_and_accuracies_per_head_are_those_of_the_examples() -> None:
    torch.manual_seed(0)
    fit = GridFit([GridPoint(0.1, 0.0, seed) for seed in range(3)], "val/acc", "max")
    logits, labels = torch.randn(11, 3, 4), torch.arange(11) % 4
    logits[:, 2] = torch.nan
    task, tally = Classification(), Tally()
    for part in (slice(0, 8), slice(8, 11)):
        task.evaluate(Asked(), {"outputs": logits[part], "label": labels[part]}, tally)
    metrics = {f"val/{name}": values for name, values in task.metrics(tally.take()).items()}
    shown = fit.end_epoch(metrics, 1)
    for k in (0, 1):
        assert fit.record.loss[k] == pytest.approx(F.cross_entropy(logits[:, k], labels).item())
        hits = (logits[:, k].argmax(1) == labels).float().mean().item()
        assert fit.record.score[k] == pytest.approx(hits)
    assert fit.record.epoch == [1, 1, 0]
    winner = fit.record.ranked()[0]
    assert float(shown["val/acc"]) == fit.record.score[winner]
    assert float(shown["val/loss"]) == fit.record.loss[winner]


def test_the_record_breaks_ties_by_the_lower_loss_as_checkpoints_do() -> None:
    record = GridRecord([GridPoint(0.1, 0.0, seed) for seed in range(3)], "val/acc", "max")
    record.update([0.5, 0.6, 0.7], [1.0, 1.0, 1.0], 1)
    record.update([0.8, 0.8, 0.7], [0.5, 0.4, 0.1], 2)
    record.update([0.8, 0.7, 0.8], [0.1, 0.1, 0.1], 3)
    record.update([0.8, 0.7, 0.8], [0.1, 0.1, 0.1], 4)
    assert record.epoch == [3, 2, 3]
    assert record.ranked() == [0, 2, 1]
    assert record.restored(json.loads(json.dumps(record.state()))) == record


def test_a_record_of_format_2_is_read() -> None:
    record = GridRecord([GridPoint(0.1, 0.0, 0)], "val/acc", "max")
    assert record.restored({"acc": [0.5], "loss": [1.0], "epoch": [2]}).score == [0.5]


def test_the_heat_map_has_a_cell_for_each_pair() -> None:
    points = [GridPoint(lr, wd, s) for lr in (0.1, 1.0) for wd in (0.0, 0.1) for s in (0, 1)]
    record = GridRecord(points, "val/acc", "max")
    record.update([0.5, 0.6, 0.7, 0.8, 0.9, 0.91, -math.inf, -math.inf], [1.0] * 8, 1)
    image = heads(record)
    colours = {colour for _, colour in image.getcolors(100_000) or []}
    assert {(190, 190, 190), (8, 64, 129), (247, 251, 255)} <= colours  # diverged, best, worst
