"""Tasks: losses, metrics over unequal parts, class weights, the balanced order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassF1Score

from graft.data.datasets import Batch
from graft.data.order import BatchOrder, balanced
from graft.tasks.base import Tally
from graft.tasks.classification import Classification
from tests.conftest import Graft, Train, compose
from tests.unit.asked import Asked

CLASSES = ["a", "b", "c"]


def batch(n: int = 13, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, len(CLASSES), generator=draw)
    return {"outputs": logits, "label": torch.randint(0, 2, (n,), generator=draw)}


def prepared(labels: Tensor, **options: Any) -> Classification:
    task = Classification(**options)
    task.prepare(labels.numpy(), CLASSES)
    return task


def evaluated(task: Classification, *batches: Batch) -> dict[str, float]:
    tally = Tally()
    for part in batches:
        task.evaluate(Asked(), part, tally)
    return {name: float(value) for name, value in task.metrics(tally.take()).items()}


def test_metrics_are_those_of_the_whole_set_however_it_is_cut() -> None:
    """The third class neither occurs nor, in the second set, is predicted: it counts for no F1."""
    whole = batch(100)
    parts = [{k: v[a:b] for k, v in whole.items()} for a, b in ((0, 1), (1, 64), (64, 100))]
    found = evaluated(Classification(), *parts)
    assert found == pytest.approx(evaluated(Classification(), whole), abs=1e-12)
    logits, label = whole["outputs"], whole["label"]
    assert found["acc"] == pytest.approx((logits.argmax(1) == label).double().mean())
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, label)), rel=1e-6)
    f1 = MulticlassF1Score(3, average="macro")
    assert found["f1"] == pytest.approx(float(f1(logits, label)), rel=1e-6)
    whole["outputs"][:, 2] = -100
    assert evaluated(Classification(), whole)["f1"] == pytest.approx(float(f1(logits, label)))


def test_a_tally_over_ranks_is_one_reduction_and_starts_anew() -> None:
    tally, reductions = Tally(), []

    def two_ranks(sums: Tensor) -> Tensor:
        reductions.append(sums)
        return 2 * sums

    tally.add(loss=torch.ones(3), count=2)
    tally.add(loss=torch.ones(3), count=3)
    taken = tally.take(two_ranks)
    assert len(reductions) == 1
    assert taken["loss"].tolist() == [4.0] * 3
    assert taken["count"] == 10
    assert taken["count"].dtype == torch.float64
    assert tally.take(two_ranks) == {}


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}])
@pytest.mark.parametrize("heads", [1, 3])
def test_equal_class_weights_and_a_gamma_of_0_are_plain_cross_entropy(
    options: dict[str, Any], heads: int
) -> None:
    one = batch()
    if heads > 1:
        one["outputs"] = torch.stack([one["outputs"] * (k + 1) for k in range(heads)], 1)
    plain = Classification(**options).loss(Asked(), one)
    focal = Classification(loss="focal", gamma=0.0, **options)
    labels = torch.arange(3)
    weighted = prepared(labels, class_weights=[2, 2, 2], **options)
    for other in (focal, weighted, prepared(labels, class_weights="balanced", **options)):
        assert torch.allclose(other.loss(Asked(), one), plain, atol=1e-6)
    assert plain.shape == (() if heads == 1 else (3,))


def test_balanced_weights_give_every_class_the_same_sum() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = prepared(labels, class_weights="balanced").weights
    assert weights is not None
    assert torch.allclose(weights[labels].mean(), torch.tensor(1.0))
    assert torch.allclose(torch.bincount(labels) * weights, torch.full((3,), 10 / 3))


def test_weighted_batches_add_up_to_the_large_batch() -> None:
    """torch's own weighted mean divides by the weights of each batch: ranks would not add up."""
    task = prepared(torch.tensor([0, 0, 0, 1, 2]), class_weights=[1, 2, 4], loss="focal")
    whole = batch(16)
    halves = [{k: v[a : a + 8] for k, v in whole.items()} for a in (0, 8)]
    parts = torch.stack([task.loss(Asked(), half) for half in halves])
    assert torch.allclose(parts.mean(), task.loss(Asked(), whole))


def test_focal_loss_is_that_of_the_paper_also_of_soft_targets() -> None:
    task, one = Classification(loss="focal", gamma=2.0), batch()
    p = one["outputs"].softmax(1).gather(1, one["label"][:, None])[:, 0]
    assert torch.allclose(task.loss(Asked(), one), (-((1 - p) ** 2) * p.log()).mean())
    soft = {**one, "target": F.one_hot(one["label"], 3).float()}
    assert torch.allclose(task.loss(Asked(), soft), task.loss(Asked(), one))


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1, 2], "2 numbers, and the data 3 classes"), ("balanced", "no training image shows c")],
)
def test_class_weights_that_do_not_fit_the_data(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(torch.tensor([0, 1]), class_weights=weights)


def test_the_balanced_order_shows_each_class_equally_often() -> None:
    labels = np.repeat([0, 1, 2], [30, 7, 4])
    positions = balanced(labels, np.random.default_rng(0))
    assert len(positions) == len(set(positions.tolist())) == len(labels)
    counts = np.bincount(labels[positions % len(labels)])
    assert counts.sum() == 41
    assert counts.max() - counts.min() <= 1
    rare = positions[labels[positions % 41] == 2]
    times = np.bincount(rare % 41)[37:]
    assert times.max() - times.min() <= 1  # each of a class as often as any other


def test_ranks_share_the_balanced_order_and_epochs_differ() -> None:
    labels = np.repeat([0, 1], [90, 10])

    def order(rank: int, ranks: int, epoch: int, size: int) -> np.ndarray:
        parts = BatchOrder(
            100, size, shuffle=True, labels=labels, epoch_size=200, epoch=lambda: epoch,
            rank=rank, world_size=ranks,
        )  # fmt: skip
        return np.concatenate(list(parts))

    one = order(0, 1, 0, 10)
    two = np.stack([order(rank, 2, 0, 5) for rank in (0, 1)], 1).ravel()
    assert one.tolist() == two.tolist()
    assert len(set(one.tolist())) == 200  # augmentation draws anew for each
    assert np.bincount(labels[one % 100]).tolist() == [100, 100]
    assert order(0, 1, 1, 10).tolist() != one.tolist()


@pytest.mark.parametrize("overrides", [["transfer=linear_probe"], ["transfer=finetune"]])
def test_a_run_goes_by_its_monitor(train_tiny: Train, overrides: list[str]) -> None:
    run = train_tiny(
        *overrides, "task.monitor=val/loss", "task.mode=min", "task.loss=focal",
        "task.class_weights=balanced", "data.sampling=balanced", "trainer.max_epochs=3",
        "+task.metrics.auroc={_target_: torchmetrics.classification.MulticlassAUROC, "
        "num_classes: 4}",
    )  # fmt: skip
    rows = (run.folder / "metrics.csv").read_text().splitlines()
    table = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    losses = [float(row["val/loss"]) for row in table if row["val/loss"]]
    assert run.metrics["val/loss"] == pytest.approx(min(losses))
    assert 0 <= run.metrics["test/auroc"] <= 1
    assert 0 <= run.metrics["test/f1"] <= 1


def test_best_of_equal_scores_is_the_one_with_the_lower_loss(train_tiny: Train) -> None:
    """A rate that changes no prediction: accuracies are equal, and the loss falls."""
    run = train_tiny("transfer=linear_probe", "optimizer.lr=1e-5", "trainer.max_epochs=3")
    stage = next((run.folder / "checkpoints").iterdir())
    best = torch.load(stage / "best.ckpt", weights_only=True)
    assert best["epoch"] == 2
    assert not {"optimizer_states", "callbacks"} & best.keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.monitor=val/loss"], "smaller is better: set task.mode=min"),
        (["task.monitor=acc"], "task.monitor=acc: must be the name of a metric of validation"),
        (["task.monitor=val/nothing"], "there is no such metric; validation gives val/loss"),
        (["task.class_weights=[1,2,3]"], "task.class_weights has 3 numbers, and the data"),
        (["task.loss=hinge"], "task.loss=hinge: must be one of cross_entropy, focal"),
        (["transfer=ridge_probe", "task.loss=focal"], "knows no class weights and no focal loss"),
    ],
)
def test_what_a_task_cannot_do_is_said_in_one_line(
    graft: Graft, overrides: list[str], message: str
) -> None:
    done = graft("train", "debug=fdr", "trainer=cpu", *overrides)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_composed_config_has_its_task() -> None:
    assert compose()["task"]["monitor"] == "val/acc"
