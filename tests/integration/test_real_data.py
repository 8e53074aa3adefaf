"""The main job on real CIFAR-10 images with real ImageNet weights, where they are at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Graft

Accuracy = Callable[..., float]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_data,
    pytest.mark.skipif(
        not {"GRAFT_REAL_CIFAR", "GRAFT_REAL_TORCH_HOME"} <= os.environ.keys(),
        reason="no real images and weights at hand",
    ),
]


@pytest.fixture
def accuracy(graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Accuracy:
    monkeypatch.setenv("TORCH_HOME", os.environ.get("GRAFT_REAL_TORCH_HOME", ""))

    def call(root: str | Path, *overrides: str) -> float:
        done = graft("train", "backbone=squeezenet1_1", f"data.root={root}", *overrides)
        assert done.returncode == 0, done.stderr
        newest = max((tmp_path / "logs").glob("*/run.json"), key=lambda p: p.stat().st_mtime)
        return json.loads(newest.read_text())["metrics"]["test/acc"]

    return call


def test_a_probe_of_a_tenth_of_cifar10_and_what_taps_add(accuracy: Accuracy) -> None:
    probe = [
        os.environ["GRAFT_REAL_CIFAR"],
        "experiment=cifar10_linear_probe",
        "data.image_size=96",
        "data.train_fraction=0.1",
        "trainer.max_epochs=60",
    ]
    last = accuracy(*probe)
    assert last > 0.65
    assert accuracy(*probe, "backbone.taps=all") > last + 0.03


@pytest.fixture
def few_images(tmp_path: Path) -> Path:
    """100 training and 30 test images of each class: at 224 px a CPU takes long for more."""
    for split, count in (("train", 100), ("test", 30)):
        for folder in sorted((Path(os.environ["GRAFT_REAL_CIFAR"]) / split).iterdir()):
            target = tmp_path / "few" / split / folder.name
            target.mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                (target / file.name).symlink_to(file)
    return tmp_path / "few"


@pytest.mark.parametrize(("transfer", "expected"), [("linear_probe", 0.45), ("finetune", 0.5)])
def test_the_reference_recipe_on_few_images(
    accuracy: Accuracy, few_images: Path, transfer: str, expected: float
) -> None:
    found = accuracy(
        few_images,
        "experiment=cifar10_reference",
        f"transfer={transfer}",
        "trainer.max_epochs=4",
    )
    assert found > expected
