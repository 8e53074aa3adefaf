"""What tasks, data and backbones may look like beyond labelled images: the smallest of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.data.datasets import Batch
from graft.data.items import SplitRecord
from graft.data.sources.base import Source, Split, Splits
from graft.models.resnet_cifar import resnet_cifar
from graft.runs.folder import RunFolder
from graft.runs.startup import quiet_libraries
from graft.runs.train import train
from graft.tasks.base import Model, Tally, Task
from graft.tasks.classification import Classification
from graft.transforms.preprocessing import Preprocessing
from tests.conftest import TINY, Trained, compose, same


class Denoising(Task):
    """Images from their noisy selves, by a decoder of the task's own: no labels anywhere."""

    def __init__(self, *, monitor: str, mode: str, channels: int) -> None:
        super().__init__(monitor=monitor, mode=mode)
        self.decoder = nn.Conv2d(channels, 3, 1)

    def restored(self, model: Model, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = model.backbone.maps(images + 0.1 * torch.randn_like(images))
        wanted = F.adaptive_avg_pool2d(images, maps.shape[-1])
        return self.decoder(maps), wanted

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return F.mse_loss(*self.restored(model, batch["input"]))

    def evaluate(self, model: Model, batch: Batch, tally: Tally) -> Tensor:
        restored, wanted = self.restored(model, batch["input"])
        tally.add(loss=F.mse_loss(restored, wanted).double() * len(wanted), images=len(wanted))
        return restored

    def metrics(self, sums: Any) -> dict[str, Tensor]:
        return {"loss": sums["loss"] / sums["images"]}


class TwoStreams(Classification):
    """Classification of one split, with the mean features of another drawn to its own."""

    streams = ("train", "target")
    seen: list[dict[str, Batch]]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen = []

    def loss(self, model: Model, batch: Any) -> Tensor:
        self.seen.append(batch)
        features = [model.backbone(batch[name]["input"]).mean(0) for name in self.streams]
        return super().loss(model, batch["train"]) + F.mse_loss(*features)


class Domains(Source):
    """Images with splits, so that labels draw none, and 12 brighter ones as another split."""

    def __init__(self, labels: int = 0, target: int = -1) -> None:
        self.first, self.target = labels, target

    def load(self, preprocessing: Preprocessing) -> Splits:
        rng = np.random.default_rng(0)
        labels = (np.arange(48) + self.first) % 2
        images = rng.integers(0, 200, (48, 3, 16, 16)).astype(np.uint8)
        parts = [Split(images[at], labels[at]) for at in (slice(32), slice(32, 40), slice(40, 48))]
        other = rng.integers(100, 250, (12, 3, 16, 16)).astype(np.uint8)
        target = Split(other, np.full(12, self.target))
        train, val, test = parts
        return Splits(["a", "b"], train, val, test, more={"target": target})


def run(
    tmp_path: Path, kind: type[Task], task: dict[str, Any], *overrides: str, **source: int
) -> Trained:
    quiet_libraries()
    config = compose(*TINY, "data.batch_size=8", *overrides)
    config["task"] = {"_target_": f"{__name__}.{kind.__name__}", **task}
    config["data"]["source"] = {"_target_": f"{__name__}.Domains", **source}
    folder = RunFolder.create(tmp_path, "run", config, overrides)
    folder.start()
    metrics, module = train(config, folder)
    return Trained(metrics, module, folder.path)


DENOISING = {"monitor": "val/loss", "mode": "min", "channels": 16}
TWO_STREAMS = {"monitor": "val/acc", "mode": "max"}


def test_a_self_supervised_task_learns_without_labels(tmp_path: Path) -> None:
    """Its decoder learns too; other labels leave every weight as it is, to the bit (rule 21)."""
    first, other = (
        run(tmp_path, Denoising, DENOISING, "trainer.max_epochs=3", labels=labels)
        for labels in (0, 1)
    )
    assert same(first.state(), other.state())
    rows = (first.folder / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/loss")
    losses = [float(cell) for row in rows[1:] if (cell := row.split(",")[column])]
    assert losses[-1] < losses[0]
    groups = first.module.stage_groups()
    assert [g["name"] for g in groups][-2:] == ["task", "task/norm_bias"]
    state = torch.load(first.folder / "checkpoints/finetune/best.ckpt", weights_only=True)
    assert "task.decoder.weight" in state["state_dict"]
    assert set(first.metrics) == {"val/loss", "test/loss"}


def test_two_streams_are_drawn_side_by_side(tmp_path: Path) -> None:
    """32 training images make 4 batches; 12 of the other split come again and again for them."""
    first, other = (
        run(tmp_path, TwoStreams, TWO_STREAMS, "trainer.max_epochs=2", target=target)
        for target in (-1, 1)
    )
    assert same(first.state(), other.state()), "labels of the target must not matter"
    task = first.module.task
    assert isinstance(task, TwoStreams)
    assert len(task.seen) == 2 * 4
    for name, size in (("train", 32), ("target", 12)):
        index = torch.cat([batch[name]["index"] for batch in task.seen[:4]])
        assert len(index) == 32
        counts = torch.bincount(index % size, minlength=size)
        assert counts.max() - counts.min() <= 1, name
    orders = [[b["target"]["index"].tolist() for b in task.seen[i : i + 4]] for i in (0, 4)]
    assert orders[0] != orders[1]
    record = SplitRecord.read(first.folder)
    assert record is not None
    assert len(record.splits["target"]) == 12
    found, changes = record.find(Domains().load(Preprocessing(16, 16)))
    assert changes == {}, "unknown labels are those they were"
    assert len(found["target"]) == 12


def test_a_stream_that_the_data_does_not_have(tmp_path: Path) -> None:
    config = compose(*TINY)
    config["task"] = {"_target_": f"{__name__}.TwoStreams", **TWO_STREAMS}
    with pytest.raises(ValueError, match="trains on 'target', which this data does not have"):
        train(config, None)


@pytest.mark.parametrize("size", [32, 64])
def test_maps_are_the_last_output_before_pooling(size: int) -> None:
    backbone = resnet_cifar(depth=8, width=4, weights=None).eval()
    images = torch.randn(2, 3, size, size)
    maps = backbone.maps(images)
    assert maps.shape == (2, 16, size // 4, size // 4)
    assert torch.allclose(maps.mean((2, 3)), backbone(images), atol=1e-6)
