"""Data with columns in place of classes, and the two tasks for it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score
from torchmetrics.classification import MultilabelAccuracy, MultilabelF1Score

from graft.data.datasets import Batch
from graft.data.items import SplitRecord
from graft.data.sources.table import ImageTable
from graft.evaluation.bootstrap import intervals
from graft.models.resnet_cifar import resnet_cifar
from graft.tasks.base import Tally, Task
from graft.tasks.multilabel import MultiLabel
from graft.tasks.regression import Regression
from graft.transforms.mixing import mix
from tests.conftest import Graft
from tests.unit.asked import Asked
from tests.unit.source_files import read, save

BACKBONE = resnet_cifar(depth=8, width=4, weights=None)
NAMES = ["red", "large", "third"]


def table(root: Path, *, splits: bool = False, count: int = 40) -> Path:
    """Images whose brightness is a number of the table, and two labels that it decides."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        level = int(rng.integers(20, 235))
        save(root / "pictures" / f"{i}.png", Image.new("RGB", (16, 16), (level, level, 90)))
        split = ["train", "train", "val", "test"][i % 4]
        row = [f"pictures/{i}.png", level, 300 - level, int(level > 120), int(level < 60)]
        rows.append([*row, split] if splits else row)
    for name, columns in (("numbers", (1, 2)), ("labels", (3, 4))):
        with (root / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            names = ["file", "level", "dark", "bright", "black"]
            writer.writerow(["file", *(names[c] for c in columns), *["split"] * splits])
            writer.writerows([r[0], *(r[c] for c in columns), *r[5:]] for r in rows)
    return root


def source(root: Path, **options: Any) -> ImageTable:
    return ImageTable(root, root.parent / "cache", **{"table": "numbers.csv", **options})


def run_with(graft: Graft, root: Path, *overrides: str) -> str:
    done = graft(
        "train", "data=image_table", f"data.root={root}", "trainer=cpu", "trainer.max_epochs=2",
        "data.batch_size=8", "backbone.weights=null", "backbone.depth=8", "backbone.width=4",
        *overrides,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_table_gives_targets_and_splits(tmp_path: Path) -> None:
    loaded = read(source(table(tmp_path / "data", splits=True)), 16)
    assert loaded.classes == ["level", "dark"]
    assert loaded.val is not None
    assert loaded.test is not None
    assert [len(s.labels) for s in (loaded.train, loaded.val, loaded.test)] == [20, 10, 10]
    for split in (loaded.train, loaded.val, loaded.test):
        assert split.targets is not None
        assert np.abs(split.images[:, 0, 8, 8] - split.targets[:, 0]).max() <= 1
        assert (split.targets.sum(1) == 300).all()
        assert not split.labels.any()


def test_one_column_alone_and_another_target_is_another_example(tmp_path: Path) -> None:
    root = table(tmp_path / "data")
    before = read(source(root, columns=["dark"]), 16)
    assert before.classes == ["dark"]
    text = (root / "numbers.csv").read_text().splitlines()
    file, level, _ = text[1].split(",")
    (root / "numbers.csv").write_text("\n".join([text[0], f"{file},{level},7", *text[2:]]))
    after = read(source(root, columns=["dark"]), 16)
    assert after.train.targets is not None
    assert after.train.targets[0] == 7
    assert before.train.digests is not None
    assert after.train.digests is not None
    changed = before.train.digests != after.train.digests
    assert changed.tolist() == [True] + [False] * 39


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pictures/1.png,nan,2", "line 42: level=nan: must be a number"),
        ("pictures/1.png,2", "line 42: 2 cells under 3 columns"),
        ("pictures/none.png,1,2", "1 of 41 images cannot be read, first: .*none.png: no such file"),
        ("../data/pictures/../../x.png,1,2", "it lies outside of the table's folder"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str, message: str) -> None:
    root = table(tmp_path / "data")
    with (root / "numbers.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        read(source(root), 16)


def test_most_images_unreadable_is_an_error_also_when_they_are_skipped(tmp_path: Path) -> None:
    root = table(tmp_path / "data", count=4)
    for i in range(3):
        (root / f"pictures/{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 4 are left in .*numbers\.csv"):
        read(source(root, on_error="skip"), 16)


def evaluated(task: Task, *batches: Batch) -> dict[str, float]:
    tally = Tally()
    for batch in batches:
        task.evaluate(Asked(), batch, tally)
    return {name: float(value) for name, value in task.metrics(tally.take()).items()}


def parts(outputs: Tensor, target: Tensor) -> list[Batch]:
    cuts = [slice(0, 1), slice(1, 20), slice(20, None)]
    return [{"outputs": outputs[cut], "target": target[cut]} for cut in cuts]


def test_multilabel_metrics_are_those_of_torchmetrics() -> None:
    torch.manual_seed(0)
    outputs, target = torch.randn(50, 3), (torch.rand(50, 3) > 0.7).float()
    found = evaluated(MultiLabel(), *parts(outputs, target))
    predicted = outputs.sigmoid()
    for name, metric in (
        ("f1", MultilabelF1Score(3)),
        ("acc", MultilabelAccuracy(3, average="micro")),
    ):
        assert found[name] == pytest.approx(float(metric(predicted, target.int()))), name
    exact = ((outputs > 0) == target.bool()).all(1).double().mean()
    assert found["exact"] == pytest.approx(float(exact))


def test_regression_metrics_are_those_of_torchmetrics_in_the_units_of_the_data() -> None:
    torch.manual_seed(0)
    target = torch.randn(50, 2) * torch.tensor([1.0, 1000.0]) + torch.tensor([5.0, 1e5])
    task = Regression()
    task.build(2, BACKBONE)
    task.prepare(target.numpy(), NAMES[:2])
    outputs = (target - task.mean) / task.std + torch.randn(50, 2)
    found = evaluated(task, *parts(outputs, target))
    predicted = task.predicted(outputs)
    mae = np.mean([float(MeanAbsoluteError()(predicted[:, i], target[:, i])) for i in (0, 1)])
    rmse = [float(MeanSquaredError(squared=False)(predicted[:, i], target[:, i])) for i in (0, 1)]
    r2 = np.mean([float(R2Score()(predicted[:, i], target[:, i])) for i in (0, 1)])
    assert found["mae"] == pytest.approx(mae, rel=1e-4)
    assert found["rmse"] == pytest.approx(np.mean(rmse), rel=1e-4)
    assert found["r2"] == pytest.approx(r2, abs=1e-3)


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_many_heads_have_the_losses_and_metrics_of_each(kind: str) -> None:
    torch.manual_seed(0)
    outputs, target = torch.randn(20, 3, 2), (torch.rand(20, 2) > 0.5).float()
    task: Task = MultiLabel() if kind == "multilabel" else Regression()
    task.build(2, BACKBONE)
    task.prepare(target.numpy(), NAMES[:2])
    together = {"outputs": outputs, "target": target}
    losses, tally = task.loss(Asked(), together), Tally()
    task.evaluate(Asked(), together, tally)
    metrics = task.metrics(tally.take())
    for k in range(3):
        alone = {"outputs": outputs[:, k], "target": target}
        assert losses[k] == pytest.approx(float(task.loss(Asked(), alone)))
        for name, value in evaluated(task, alone).items():
            assert float(metrics[name][k]) == pytest.approx(value), name


def test_targets_that_a_task_cannot_learn() -> None:
    columns = np.array([[0.0, 1.0], [2.0, 1.0]], np.float32)
    with pytest.raises(ValueError, match="red has the value 2: labels are from 0 to 1"):
        MultiLabel().prepare(columns, NAMES[:2])
    task = Regression()
    task.build(2, BACKBONE)
    with pytest.raises(ValueError, match="large is the same for every training image"):
        task.prepare(columns, NAMES[:2])
    with pytest.raises(ValueError, match="no training image shows red"):
        MultiLabel(pos_weight="balanced").prepare(columns * np.array([0, 1], np.float32), NAMES[:2])
    for one in (MultiLabel(), task):
        with pytest.raises(ValueError, match="needs columns of"):
            one.prepare(np.zeros(3, np.int64), NAMES)


def test_mixed_images_have_mixed_targets() -> None:
    target = torch.tensor([[1.0, 20.0], [3.0, 40.0]])
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    mixed, found = mix(images, target, torch.arange(2), 2, mixup=1.0, cutmix=0.0, seed=0, epoch=0)
    share = mixed[:, 0, 0, 0]
    expected = target[0] + share[:, None] * (target[1] - target[0])
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "table_name", "metric"),
    [("multilabel", "labels", "f1"), ("regression", "numbers", "rmse")],
)
def test_a_run_is_trained_evaluated_and_compared(
    graft: Graft, tmp_path: Path, task: str, table_name: str, metric: str
) -> None:
    root = table(tmp_path / "data")
    out = run_with(graft, root, f"task={task}", f"data.source.table={table_name}.csv")
    assert f"val/{metric}" in out
    assert f"test/{metric}" in out
    (run,) = (tmp_path / "logs").glob("*task*")
    done = graft("eval", str(run))
    assert done.returncode == 0, done.stderr
    assert metric in done.stdout
    assert "95 % interval" in done.stdout
    kept = np.load(run / "eval" / "test.npz")
    assert kept["output"].shape == kept["target"].shape == (8, 2)
    assert SplitRecord.read(run) is not None
    done = graft("compare", str(run))
    assert f"test/{metric}" in done.stdout
    assert "test/acc" not in done.stdout


@pytest.mark.parametrize("grid", [[], ["head.grid={lr:[0.01,0.1]}"]])
def test_a_probe_from_stored_features_is_the_one_from_images(
    graft: Graft, tmp_path: Path, grid: list[str]
) -> None:
    root = table(tmp_path / "data")
    scores = []
    for cache in ("on", "off"):
        out = run_with(
            graft, root, "task=regression", "data.source.table=numbers.csv", *grid,
            "transfer=linear_probe", f"transfer.stages.probe.cache={cache}",
        )  # fmt: skip
        scores.append(next(line for line in out.splitlines() if line.startswith("test/rmse")))
    assert scores[0] == scores[1]


def test_intervals_hold_the_value_and_narrow_with_more_examples() -> None:
    torch.manual_seed(0)
    task = Regression()
    task.build(1, BACKBONE)

    def width(n: int) -> float:
        target = torch.randn(n, 1)
        outputs = target + torch.randn(n, 1)
        low, high = intervals(task, outputs, target, samples=200)["mae"]
        assert low < task.scores(outputs, target)["mae"] < high
        return high - low

    assert width(1000) < 0.6 * width(100)


def test_data_without_classes_refuses_what_needs_them(graft: Graft, tmp_path: Path) -> None:
    root = table(tmp_path / "data")
    for overrides, message in (
        (["task=classification"], "use task=multilabel or task=regression"),
        (["task=regression", "data.shots_per_class=3"], "this data has no classes"),
        (["task=regression", "data.sampling=balanced"], "needs classes, and this data has none"),
        (["task=regression", "data.source.table=x.csv"], "x.csv: no such file; data.root="),
        (["task=multilabel"], "level has the value"),
    ):
        done = graft(
            "train", "data=image_table", f"data.root={root}", "data.source.table=numbers.csv",
            "trainer=cpu", *overrides,
        )  # fmt: skip
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
