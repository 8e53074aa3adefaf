"""What is in the event files, read as TensorBoard reads them."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import metadata

from graft.commands.board import Links
from graft.reporting import pictures
from graft.reporting.fonts import drawable
from graft.runs.folder import RunFolder
from graft.runs.records import find_runs
from graft.tasks.scores import BINS, Predictions, reliability, scores
from graft.training.build import build
from graft.training.module import TransferModule
from tests.conftest import TINY, Graft, Train, compose

SHOWN = [*TINY[:-1], "logger=default"]
PICTURES = {"test/confusion", "test/calibration", "test/mistakes"}


def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run), size_guidance={"images": 0, "tensors": 0})
    return found.Reload()


def hyper_parameters(run: Path) -> dict[str, Any]:
    """The one row that the run has in the HPARAMS tab, and its columns of metrics."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(run)).Reload()
    assert list(runs.Runs()) == ["."], "no extra run for hyper-parameters"
    content = runs.SummaryMetadata(".", metadata.SESSION_START_INFO_TAG).plugin_data.content
    session = metadata.parse_session_start_info_plugin_data(content)
    content = runs.SummaryMetadata(".", metadata.EXPERIMENT_TAG).plugin_data.content
    experiment = metadata.parse_experiment_plugin_data(content)
    return {
        "row": {k: v.string_value or v.number_value for k, v in session.hparams.items()},
        "metrics": [info.name.tag for info in experiment.metric_infos],
        "first": {info.name for info in experiment.hparam_infos if info.differs},
    }


def test_a_run_of_two_stages_is_one_curve_with_pictures_text_and_one_row_of_hparams(
    train_tiny: Train,
) -> None:
    run = train_tiny(
        "logger=default", "transfer=lp_ft", "transfer.stages.probe.epochs=2", "optimizer.lr=0.03",
        "data.train_fraction=0.5",
    )  # fmt: skip
    found = events(run.folder)
    tags = found.Tags()
    assert [event.step for event in found.Scalars("val/acc")] == [2, 5, 8]
    assert set(tags["scalars"]) >= {"val/loss", "train/loss", "test/acc", "test/loss"}
    assert set(tags["images"]) == {"inputs/probe", "inputs/finetune", *PICTURES}
    assert {"config/text_summary", "groups/probe/text_summary"} <= set(tags["tensors"])
    hparams = hyper_parameters(run.folder)
    assert hparams["row"] == {
        "backbone": "resnet_cifar", "weights": "none", "head": "LinearHead",
        "transfer": "probe+finetune", "optimizer": "SGD", "lr": 0.03, "weight_decay": 0.0005,
        "batch_size": 8, "image_size": 32, "epochs": 3, "train_images": 24, "seed": 0,
    }  # fmt: skip
    assert {"lr", "train_images"} <= hparams["first"]
    assert "seed" not in hparams["first"]
    assert set(hparams["metrics"]) <= set(tags["scalars"]), "metrics that have values"
    assert "hp_metric" not in tags["scalars"]
    best = found.Scalars("val/best_acc")[0].value
    assert best == pytest.approx(run.metrics["val/acc"])


def test_a_resumed_run_shows_everything_once(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = 0, TransferModule.loss

    def broken(self: TransferModule, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:  # in the second of two epochs
            raise RuntimeError("a crash")
        return original(self, *arguments)

    monkeypatch.setattr(TransferModule, "loss", broken)
    assert graft("train", *SHOWN, "trainer.max_epochs=2").returncode == 1
    (run,) = (path.parent for path in (tmp_path / "logs").glob("*/run.json"))
    assert graft("resume", str(run)).returncode == 0
    found = events(run)
    for tag in found.Tags()["scalars"]:
        steps = [event.step for event in found.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
    assert [len(found.Images(tag)) for tag in ("inputs/finetune", *PICTURES)] == [1] * 4
    for tag in ("config/text_summary", "groups/finetune/text_summary"):
        assert len(found.Tensors(tag)) == 1, tag
    assert hyper_parameters(run)["row"]["epochs"] == 2
    assert (run / "projector_config.pbtxt").read_text().count("tensor_name") == 1


@pytest.mark.parametrize("transfer", ["finetune", "linear_probe", "ridge_probe"])
def test_inputs_are_the_training_images_as_the_network_gets_them(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch, transfer: str
) -> None:
    """Without augmentation: the images of the set, exactly, also where features stand for them."""
    drawn: list[torch.Tensor] = []
    original = pictures.tiles

    def tiles(images: torch.Tensor, captions: Any, columns: int = 5) -> Image.Image:
        drawn.append(images)
        return original(images, captions, columns)

    monkeypatch.setattr(pictures, "tiles", tiles)
    train_tiny("logger=default", "data.augment=null", f"transfer={transfer}")
    _, data = build(compose(*TINY))
    known = {image.numpy().tobytes() for image in data.splits["train"][list(range(40))]["input"]}
    assert len(drawn[0]) >= 8
    assert {image.numpy().tobytes() for image in drawn[0]} <= known


def test_without_images_there_are_curves_and_hyper_parameters_alone(train_tiny: Train) -> None:
    run = train_tiny("logger=default", "logger.tensorboard.images=false")
    assert events(run.folder).Tags()["images"] == []
    assert not (run.folder / "projector_config.pbtxt").exists()
    assert hyper_parameters(run.folder)["row"]["head"] == "LinearHead"


def test_bins_of_confidence_give_the_calibration_error() -> None:
    torch.manual_seed(0)
    p = Predictions.of(3 * torch.randn(500, 6), torch.randint(6, (500,)), torch.arange(500))
    images, confidence, accuracy = reliability(p)
    assert images.sum() == 500
    filled = images > 0
    gaps = np.abs(confidence - accuracy)[filled] * images[filled] / 500
    assert gaps.sum() == pytest.approx(scores(p, 6)["ece"], abs=1e-6)
    edges = np.arange(BINS) / BINS
    assert ((edges <= confidence + 1e-6) & (confidence <= edges + 1 / BINS + 1e-6))[filled].all()


@pytest.mark.parametrize("classes", [2, 10, 100, 320, 5000])
def test_a_confusion_matrix_of_any_size_is_a_picture_of_a_screen(classes: int) -> None:
    label = torch.arange(classes).repeat(10)
    prediction = torch.where(torch.arange(10 * classes) < classes, (label + 1) % classes, label)
    p = Predictions(torch.arange(len(label)), label, prediction, label * 0.0, label * 0.0)
    tracemalloc.start()
    image = pictures.confusion(p, [f"a long name of class {i}" for i in range(classes)])
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert min(image.size) > 60
    assert max(image.size) < 2200
    assert len(buffer.getvalue()) < 500_000


@pytest.mark.parametrize(
    "name", ["[b]", ":x:", "naïve", "кот", "猫", "🐈", "हिन्दी", "\x1b[1m\n", "\udce9"]
)
def test_every_name_can_be_drawn(name: str) -> None:
    """With a font that has its letters, or escaped: two names that differ look different."""
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    drawn = [
        pictures.tiles(images, [[(shown, "black")]] * 2).tobytes()
        for shown in (name, name[::-1] + "x")
    ]
    assert drawn[0] != drawn[1]
    text, file = drawable(name)
    text.encode()
    assert text.isprintable() or "\u200d" in text
    assert text.isascii() or file is not None


def test_links_have_short_names_that_stay_when_runs_come(tmp_path: Path) -> None:
    def run(name: str, *overrides: str, seed: int = 0) -> Path:
        choices = {"experiment": "quickstart"}
        folder = RunFolder.create(tmp_path / "logs", name, {"seed": seed}, overrides, choices)
        (folder.path / "events.out.tfevents.1").touch()
        return folder.path

    run("a", "trainer.max_epochs=2", "optimizer.lr=0.1")
    run("b", "trainer.max_epochs=2", "optimizer.lr=0.2", seed=1)
    (tmp_path / "links").mkdir()
    links = Links(tmp_path / "logs", tmp_path / "links", find_runs([tmp_path / "logs"]))

    def names() -> list[str]:
        return sorted(path.name for path in (tmp_path / "links").iterdir())

    assert names() == ["lr-0.1_seed0", "lr-0.2_seed1"]
    again = run("c", "trainer.max_epochs=2", "optimizer.lr=0.1")
    run("d", "trainer.max_epochs=9")
    links.update()
    assert names() == ["lr-0.1_seed0", "lr-0.1_seed0 (2)", "lr-0.2_seed1", "max_epochs-9_seed0"]
    assert (tmp_path / "links" / "lr-0.1_seed0 (2)").resolve() == again


def test_links_stay_in_their_folder_whatever_a_record_says(tmp_path: Path) -> None:
    """Its seed was pasted into a path; a link into a run's own folder would write there."""
    logs, links = tmp_path / "logs", tmp_path / "links"
    odd = ["/" * 120 + str(tmp_path / "MARK"), "a/b", "../../MARK", "", {"a": 1}, "\x1b[31m", 7]
    for i, seed in enumerate(odd):
        run = RunFolder.create(logs, f"run{i}", {"seed": seed}, [])
        (run.path / "events.out.tfevents.1").touch()
    links.mkdir()
    before = {*tmp_path.rglob("*")}
    shown = Links(logs, links, find_runs([logs]))
    inner = RunFolder.create(logs / "default_seed7", "run", {"seed": 0}, [])
    (inner.path / "events.out.tfevents.1").touch()
    before |= {*logs.rglob("*")}
    shown.update()
    made = {*tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(links) for path in made)
    assert sum(path.is_symlink() for path in links.rglob("*")) == len(odd) + 1
    assert (links / "default_seed7 (folder)" / "default_seed0").resolve() == inner.path
