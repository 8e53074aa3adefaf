"""Ridge and L-BFGS: the solutions of their problems, through the real command as well."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge

from graft.models.heads import LinearHead, Standardize
from graft.training.build import build
from graft.training.checkpoint import load_checkpoint
from graft.training.solvers import lbfgs, ridge
from tests.conftest import TINY, Graft, Train, compose

Data = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def data() -> tuple[Data, Data]:
    """Overlapping classes, features of unlike scale and far from zero."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (900,), generator=generator)
    centres = torch.randn(4, 12, generator=generator)
    features = centres[labels] + 1.5 * torch.randn(900, 12, generator=generator)
    features = features * torch.logspace(-1, 1, 12) + 20
    return (features[:600], labels[:600]), (features[600:], labels[600:])


def measured_head(features: torch.Tensor) -> LinearHead:
    head = LinearHead(12, 4, norm="standardize")
    assert isinstance(head.norm, Standardize)
    head.norm.measure(features)
    return head


@pytest.mark.parametrize("rows", [600, 9], ids=["more rows than features", "fewer"])
@pytest.mark.parametrize("strength", [1e-3, 10.0, 1e4])
def test_ridge_is_that_of_scikit_learn(data: tuple[Data, Data], strength: float, rows: int) -> None:
    (features, labels), val = data
    features, labels = features[:rows], labels[:rows]
    head = LinearHead(12, 4)
    chosen, weight, bias = ridge(head, (features, labels), val, [strength])
    reference = Ridge(alpha=strength).fit(features.double(), F.one_hot(labels, 4))
    assert chosen == strength
    assert np.allclose(weight, reference.coef_, atol=1e-8)
    assert np.allclose(bias, reference.intercept_, atol=1e-7)


def test_ridge_takes_the_strength_that_is_best_on_val(data: tuple[Data, Data]) -> None:
    train, (features, labels) = data
    head = measured_head(train[0])
    strengths = [1e-3, 1.0, 1e2, 1e3, 1e5, 1e7]

    def accuracy(strength: float) -> float:
        _, weight, bias = ridge(head, train, (features, labels), [strength])
        rows = head.norm(features).double().detach()
        return float((F.linear(rows, weight, bias).argmax(1) == labels).double().mean())

    chosen, _, _ = ridge(head, train, (features, labels), strengths)
    scores = {strength: accuracy(strength) for strength in strengths}
    best = max(scores.values())
    assert chosen == max(s for s, score in scores.items() if score == best)
    assert len(set(scores.values())) > 1
    automatic, _, _ = ridge(head, train, (features, labels))
    assert accuracy(automatic) >= best - 0.01


def test_lbfgs_is_logistic_regression_of_scikit_learn(data: tuple[Data, Data]) -> None:
    (features, labels), _ = data
    head, strength = measured_head(features), 0.01
    steps = lbfgs(head, features, labels, strength=strength)
    rows = head.norm(features).detach()
    reference = LogisticRegression(C=1 / (strength * len(rows)), max_iter=1000, tol=1e-8)
    reference.fit(rows.double(), labels)
    expected = -np.log(reference.predict_proba(rows.double())[range(600), labels]).mean()
    logits = head(features)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(expected, abs=1e-3)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(reference.score(rows.double(), labels), abs=1e-3)
    assert np.allclose(head.linear.weight.detach(), reference.coef_, atol=5e-3)
    assert 0 < steps < 200


@pytest.mark.parametrize("plan", ["ridge_probe", "lbfgs_probe"])
def test_solvers_run_through_the_command(graft: Graft, tmp_path: Path, plan: str) -> None:
    overrides = [*TINY, "data.source.per_class=40", f"transfer={plan}", "head.norm=standardize"]
    done = graft("train", *overrides)
    assert done.returncode == 0, done.stderr
    assert "chosen    solver" in done.stdout
    (folder,) = (tmp_path / "logs").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert set(record["metrics"]) == {"val/acc", "test/acc", "test/f1", "test/loss"}
    assert record["metrics"]["test/acc"] > 0.5  # chance is 0.25
    assert record["head"]["solver"] == plan.removesuffix("_probe")
    assert record["head"]["strength"] > 0
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    assert {"val/acc", "val/loss"} <= set(header.split(","))
    assert rows
    module, _ = build(compose(*overrides))
    for name in ("best", "last"):
        path = folder / "checkpoints" / "probe" / f"{name}.ckpt"
        load_checkpoint(module, path)
        assert torch.load(path, weights_only=True)["graft"]["stage"] == "probe"
    assert module.head.state_dict()["linear.weight"].any()


def test_fine_tuning_goes_on_from_a_solved_head(train_tiny: Train) -> None:
    solved = ["transfer=ridge_probe", "data.source.per_class=20"]
    second = "{trainable: all, augment: false, epochs: 1, lr: 1e-12}"
    one = train_tiny(*solved).state()
    two = train_tiny(*solved, f"+transfer.stages.second={second}").state()
    assert torch.allclose(one["head.linear.weight"], two["head.linear.weight"], atol=1e-6)


def test_a_stage_without_stored_features_cannot_be_solved(train_tiny: Train) -> None:
    with pytest.raises(ValueError, match=r"solver=ridge: needs stored features"):
        train_tiny("transfer=ridge_probe", "transfer.stages.probe.augment=true")
