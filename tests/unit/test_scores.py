"""Metrics against scikit-learn and numbers worked out by hand; intervals that cover the truth."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss

from graft.evaluation.details import details
from graft.tasks import scores
from graft.tasks.scores import Predictions


def made_up(n: int = 500, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right more often than not, and labels."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), label] += 1
    return logits, label


def test_metrics_are_those_of_scikit_learn() -> None:
    logits, label = made_up()
    p = Predictions.of(logits, label, torch.arange(500))
    found = scores.scores(p, 4)
    guess = logits.argmax(1)
    assert found["acc"] == pytest.approx(accuracy_score(label, guess), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(f1_score(label, guess, average="macro"), abs=1e-6)
    assert found["nll"] == pytest.approx(log_loss(label, logits.double().softmax(1)), abs=1e-6)
    assert (scores.confusion_matrix(p, 4) == confusion_matrix(label, guess)).all()


def test_calibration_error_by_hand() -> None:
    """Two bins: 3 images at 0.9 of which 2 are right, 1 at 0.6 that is wrong:
    3/4 * |2/3 - 0.9| + 1/4 * |0 - 0.6|."""
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.6])
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    label = torch.tensor([0, 0, 1, 1])
    p = Predictions.of(logits, label, torch.arange(4))
    assert p.confidence.tolist() == pytest.approx(confidence.tolist())
    assert scores.scores(p, 2)["ece"] == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.6, abs=1e-6)


def test_classes_without_images_do_not_count() -> None:
    logits, label = made_up(classes=3)
    wide = torch.cat([logits, torch.full((500, 2), -9.0)], 1)
    p, q = (Predictions.of(x, label, torch.arange(500)) for x in (logits, wide))
    assert scores.scores(q, 5)["macro_f1"] == pytest.approx(scores.scores(p, 3)["macro_f1"])
    bounds = scores.intervals(q, 5)
    assert bounds["macro_f1"] == pytest.approx(scores.intervals(p, 3)["macro_f1"])
    assert np.isnan(bounds["per_class"][3:]).all()
    assert np.isfinite(bounds["per_class"][:3]).all()


def test_batches_join_to_the_same_whatever_their_size_and_order() -> None:
    logits, label = made_up()
    index = torch.arange(500)
    whole = Predictions.of(logits, label, index)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1)).split(37)
    joined = Predictions.joined([Predictions.of(logits[i], label[i], index[i]) for i in order])
    for name, values in vars(whole).items():
        assert torch.equal(values, vars(joined)[name]), name


def test_bootstrap_of_accuracy_is_that_of_a_binomial() -> None:
    """Resampling n images of which a share is right draws binomial counts."""
    logits, label = made_up(2000)
    p = Predictions.of(logits, label, torch.arange(2000))
    acc = scores.scores(p, 4)["acc"]
    low, high = scores.intervals(p, 4, samples=4000)["acc"]
    half = 1.96 * (acc * (1 - acc) / 2000) ** 0.5
    assert [low, high] == pytest.approx([acc - half, acc + half], abs=0.1 * half)


def test_of_8_of_8_one_cannot_be_certain() -> None:
    """Resampling would say 100 % to 100 %; scipy.stats.binomtest says 63.06 % to 100 %."""
    right = torch.zeros(8, dtype=torch.long)
    label = torch.tensor([0] * 8 + [1] * 4)
    p = Predictions(
        torch.arange(12), label, torch.zeros_like(label), torch.ones(12), torch.ones(12)
    )
    found = scores.intervals(p, 2)
    assert found["per_class"][0] == pytest.approx([0.630583, 1], abs=1e-6)
    assert found["per_class"][1] == pytest.approx([0, 0.602365], abs=1e-6)
    whole = Predictions(torch.arange(8), right, right, torch.ones(8), torch.ones(8))
    assert scores.intervals(whole, 2)["acc"] == pytest.approx([0.630583, 1], abs=1e-6)


def test_each_bootstrap_sample_is_scored_like_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that happens to be the set itself has the set's own metrics, in parts or at once."""

    class Everything:
        def integers(self, n: int, size: tuple[int, int]) -> np.ndarray:
            return np.tile(np.arange(n), (size[0], 1))

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Everything())
    monkeypatch.setattr(scores, "CHUNK", 1200)  # two samples at a time
    logits, label = made_up()
    p = Predictions.of(logits, label, torch.arange(500))
    found, bounds = scores.scores(p, 4), scores.intervals(p, 4, samples=5)
    for name in ("acc", "macro_f1", "nll"):
        assert bounds[name] == pytest.approx([found[name]] * 2, abs=1e-6), name
    matrix = scores.confusion_matrix(p, 4)
    per_class = matrix.diagonal() / matrix.sum(1)
    assert bounds["per_class"] == pytest.approx(np.stack([per_class, per_class], 1))


def test_the_same_seed_gives_the_same_interval_and_more_images_a_narrower_one() -> None:
    logits, label = made_up(2000)
    p = Predictions.of(logits, label, torch.arange(2000))
    few = Predictions.of(logits[:200], label[:200], torch.arange(200))
    assert (scores.intervals(p, 4)["nll"] == scores.intervals(p, 4)["nll"]).all()
    assert np.diff(scores.intervals(few, 4)["nll"]) > 2 * np.diff(scores.intervals(p, 4)["nll"])


def made_of(label: list[int], prediction: list[int]) -> Predictions:
    t, q = torch.tensor(label), torch.tensor(prediction)
    return Predictions(torch.arange(len(t)), t, q, torch.full((len(t),), 0.5), torch.ones(len(t)))


def test_a_class_of_which_nothing_is_recognised_is_named() -> None:
    """95 % right, and the rare class never."""
    p = made_of([0] * 19 + [1], [0] * 20)
    assert scores.lowest_recall(p, ["often", "rare"]) == "0 % for 1 of 2 classes: rare (1 image)"
    p = made_of([0, 0, 0, 1, 1], [0, 0, 0, 0, 1])
    assert scores.lowest_recall(p, ["a", "b", "none"]) == "lowest 50.00 % for b (2 images)"
    assert scores.lowest_recall(made_of([0, 1], [0, 1]), ["a", "b"]) == "100 % for every class"


def test_what_a_class_is_most_often_taken_for() -> None:
    p = made_of([0, 0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 0, 2, 2])
    assert scores.most_taken_for(p) == {0: (2, 2), 1: (0, 1)}


def test_of_many_classes_those_with_mistakes_stay_and_the_rest_is_one() -> None:
    p = made_of([0, 1, 2, 3, 3, 3], [0, 0, 2, 0, 1, 3])
    few, kept = scores.merged(p, 4, 2)
    assert kept == [3, 1]
    assert scores.confusion_matrix(few, 3).tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 2]]


def test_five_thousand_classes_cost_no_square_of_them() -> None:
    label = torch.randint(0, 5000, (2000,), generator=torch.Generator().manual_seed(0))
    p = made_of(label.tolist(), label.roll(1).tolist())
    tracemalloc.start()
    scores.scores(p, 5000)
    found = details(p, [f"class {i}" for i in range(5000)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500e6
    assert found["confusion"] is None
    assert len(json.dumps(found, indent=1)) < 2e6
