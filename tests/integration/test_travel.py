"""Runs know their images, wherever run folder, images and configs lie by now."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graft.storage.reading import read_yaml_texts
from graft.training.module import TransferModule
from tests.conftest import TINY, Graft, compose
from tests.integration.conftest import Break, assert_equal, record

BASE = [
    *TINY[3:], "data=image_folder", "data.batch_size=4", "data.test_fraction=0.3",
    "trainer.max_epochs=2",
]  # fmt: skip


def make_photos(root: Path) -> Path:
    """Ten images of each of three classes, without a split."""
    rng = np.random.default_rng(0)
    for c, name in enumerate(("cat", "dog", "owl")):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for i in range(10):
            pixels = rng.normal(60 + 60 * c, 30, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ and a run on them, in logs/."""
    from graft.runs.run import run

    root = tmp_path_factory.mktemp("travel")
    make_photos(root / "photos")
    paths = [f"data.root={root}/photos", f"paths.logs={root}/logs", f"paths.cache={root}/cache"]
    torch.set_num_threads(1)  # as in each test: two would give other weights
    run(compose(*BASE, *paths), [])
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it, whose run knows the photos where they were."""
    copy = shutil.copytree(made, tmp_path / "copy")
    shutil.rmtree(copy / "cache", ignore_errors=True)
    return copy


def run_in(folder: Path) -> Path:
    (run,) = (folder / "logs").iterdir()
    return run


def evaluated(graft: Graft, run: Path, *arguments: str) -> tuple[dict, str]:
    done = graft("eval", str(run), *arguments)
    assert done.returncode == 0, done.stderr
    (file,) = re.findall(r"^kept in +(.+)$", done.stdout, flags=re.MULTILINE)
    return json.loads(Path(file).read_text()), done.stdout


def error(graft: Graft, *arguments: str) -> str:
    done = graft(*arguments)
    assert done.returncode == 1, done.stdout
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("graft: error: ")


def test_run_and_images_elsewhere_and_renamed_give_the_recorded_accuracy(
    graft: Graft, place: Path
) -> None:
    run, photos = run_in(place), place / "photos"
    expected = record(run)["metrics"]
    for name in ("cat", "dog"):  # drawn anew, the test split would be another
        (photos / "train" / name / "0.png").rename(photos / "train" / name / "other.png")
        shutil.copy(photos / "train" / name / "5.png", photos / "train" / name / "00.png")
    places = [f"data.root={photos}", f"paths.cache={place}/cache2"]
    result, text = evaluated(graft, run, *places)
    assert result["metrics"]["acc"] == expected["test/acc"]
    assert result["metrics"]["nll"] == pytest.approx(expected["test/loss"], abs=1e-6)
    assert result["images"] == 9
    assert "note" not in text
    assert (place / "cache2").is_dir()


def test_what_is_left_of_the_test_images_is_evaluated_and_said(graft: Graft, place: Path) -> None:
    run, photos = run_in(place), place / "photos"
    with np.load(run / "splits.npz") as file:
        names = [name.decode() for name in file["test-names"]]
    (photos / names[0]).unlink()
    result, text = evaluated(graft, run, f"data.root={photos}")
    assert result["images"] == 8
    assert f"of 9 test images, 1 missing (first: {names[0]})" in text
    for name in names[1:]:
        Image.new("RGB", (16, 16)).save(photos / name)
    assert "1 missing" in (message := error(graft, "eval", str(run), f"data.root={photos}"))
    assert "8 with another content" in message


def test_a_place_that_is_none_of_this_run_and_keys_that_are_no_places(
    graft: Graft, place: Path
) -> None:
    run = str(run_in(place))
    nothing = f"data.root={place}/nothing"
    assert f"{place}/nothing: no such folder; data.root= " in error(graft, "eval", run, nothing)
    assert "graft eval takes data.root=" in error(graft, "eval", run, "seed=1")
    (place / "file").touch()
    own = [f"data.root={place}/photos", f"paths.cache={place}/file/cache"]
    assert "Not a directory): paths.cache=FOLDER keeps" in error(graft, "eval", run, *own)


def test_images_the_run_was_trained_on_are_said_to_be(graft: Graft, place: Path) -> None:
    _, text = evaluated(graft, run_in(place), "--data", str(place / "photos/train"))
    assert "note      this run was trained on 18 of these images" in text


def test_a_part_of_the_classes_one_class_and_an_empty_class(graft: Graft, place: Path) -> None:
    run = run_in(place)
    classes = place / "photos/train"
    shutil.rmtree(classes / "owl")
    result, text = evaluated(graft, run, "--data", str(classes))
    assert result["images"] == 20
    assert result["per_class"]["owl"]["acc"] is None
    assert "note      no images of 1 of 3 classes: owl" in text
    (classes / "zebra").mkdir()
    Image.new("RGB", (16, 16)).save(classes / "zebra" / "0.png")
    message = error(graft, "eval", str(run), "--data", str(classes))
    assert "classes that the run does not know: zebra" in message


def test_an_old_run_without_a_record_evaluates_and_says_so(graft: Graft, place: Path) -> None:
    run = run_in(place)
    (run / "splits.npz").unlink()
    result, text = evaluated(graft, run, f"data.root={place}/photos")
    assert result["metrics"]["acc"] == record(run)["metrics"]["test/acc"]
    assert "this run did not record its images" in text


def test_resuming_elsewhere_is_exact_and_refuses_other_images(
    graft: Graft, made: Path, tmp_path: Path, break_at: Break
) -> None:
    photos = make_photos(tmp_path / "photos")
    break_at(TransferModule, "loss", 7)
    logs = tmp_path / "logs"
    own = [f"data.root={photos}", f"paths.logs={logs}", f"paths.cache={tmp_path}/cache"]
    assert graft("train", *BASE, *own).returncode == 1
    run = run_in(tmp_path).rename(tmp_path / "moved")
    kept = photos.rename(tmp_path / "elsewhere")
    assert f"{photos}: no such folder" in error(graft, "resume", str(run))
    (kept / "train/cat/0.png").rename(kept / "train/cat/other.png")
    whole = next((kept / "train/dog").iterdir())
    content = whole.read_bytes()
    Image.new("RGB", (16, 16)).save(whole)
    arguments = ("resume", str(run), f"data.root={kept}")
    message = error(graft, *arguments)
    assert "the data is not what this run has trained on" in message
    assert f"1 with another content (first: train/dog/{whole.name})" in message
    whole.write_bytes(content)
    done = graft(*arguments)
    assert done.returncode == 0, done.stderr
    assert_equal(run, run_in(made))
    assert record(run)["config"]["data"]["source"]["root"] == str(kept)


def test_paths_are_recorded_from_the_root_and_expanded(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GRAFT_CACHE", "~/cache")
    done = graft("train", *BASE, "trainer.max_epochs=1", "data.root=photos", "paths.logs=~/logs")
    assert done.returncode == 0, done.stderr
    config = record(run_in(tmp_path / "home"))["config"]
    assert config["paths"]["logs"] == f"{tmp_path}/home/logs"
    assert config["paths"]["cache"] == config["data"]["source"]["cache"] == f"{tmp_path}/home/cache"
    assert config["data"]["root"] == config["data"]["source"]["root"] == f"{tmp_path}/photos"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "photos"]
    monkeypatch.chdir("/")  # a copied run evaluates from anywhere
    evaluated(graft, run_in(tmp_path / "home"))
    assert "there is no such home folder" in error(graft, "train", *BASE, "data.root=~nobody-9/x")


def test_configs_of_ones_own_are_remembered(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_at: Break
) -> None:
    """By resume with overrides, by eval --data, and by a sweep that goes on in another folder; they
    are used if they are typed again."""
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    (tmp_path / "lab/data").mkdir(parents=True)
    text = f"defaults: [image_folder, _self_]\nroot: {tmp_path}/photos\n"
    (tmp_path / "lab/data/mine.yaml").write_text(text)
    lab = ["--config-dir", "lab", *TINY[3:], "data=mine", "data.batch_size=4"]
    break_at(TransferModule, "loss", 7)
    assert graft("train", *lab, "trainer.max_epochs=2", "paths.logs=logs").returncode == 1
    run = run_in(tmp_path)
    assert "did you mean mine?" in error(graft, "train", *lab, "data=mien")
    assert "did you mean data.source.on_error or" in error(
        graft, "train", *lab, "data.source.on_eror=skip"
    )
    monkeypatch.chdir("/")
    refused = error(graft, "resume", str(run), "trainer.max_epochs=3")
    folder = shlex.split(refused.rpartition(" graft resume ")[2])[1]  # as a shell reads it
    assert folder == f"hydra.searchpath=['file://{tmp_path}/lab']"
    assert "--config-dir no: no such folder" in error(
        graft, "resume", str(run), "--config-dir", "no", "seed=1"
    )
    done = graft("resume", str(run), "trainer.max_epochs=3", "--config-dir", f"{tmp_path}/lab")
    assert done.returncode == 0, done.stderr
    noted = read_yaml_texts(run / "overrides.yaml")
    assert noted[-2:] == ["trainer.max_epochs=3", folder]
    assert noted.count(folder) == 1
    assert folder in shlex.split(error(graft, "eval", str(run), "--data", "mine"))
    result, _ = evaluated(graft, run, "--data", "mine", folder)
    assert result["metrics"]["acc"] == record(run)["metrics"]["test/acc"]
    again, _ = evaluated(graft, run, "--data", "mine", "--config-dir", f"{tmp_path}/lab")
    assert again["metrics"] == result["metrics"]

    monkeypatch.chdir(tmp_path)
    done = graft("train", "-m", *lab, "data.root=photos", "hydra.sweep.dir=sweep", "seed=0,1")
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir("/")
    refused = error(graft, "resume", str(tmp_path / "sweep"), "seed=0,1,2")
    folder = shlex.split(refused.rpartition(" graft resume ")[2])[1]
    assert folder == f"hydra.searchpath=['file://{tmp_path}/lab']"
    lab = ["--config-dir", f"{tmp_path}/lab"]
    done = graft("resume", str(tmp_path / "sweep"), *lab, "seed=0,1,2")
    assert done.returncode == 0, done.stderr
    assert "3 of 3 runs done" in done.stdout
    assert len([*(tmp_path / "sweep").glob("*/run.json")]) == 3


@pytest.mark.parametrize(
    "plan",
    [
        ["transfer=lora", "transfer.stages.finetune.lora.rank=2"],
        ["transfer=linear_probe", "head.grid={lr:[0.001,0.1],weight_decay:[0,0.1]}"],
        ["transfer=l2_sp"],
    ],
)
def test_a_checkpoint_of_a_stage_that_has_not_ended_is_evaluated_as_it_would_end(
    graft: Graft, tmp_path: Path, plan: list[str]
) -> None:
    """After one epoch the last state is the best one, without what the end of a stage does."""
    done = graft("train", *TINY, *plan, f"paths.logs={tmp_path}/logs")
    assert done.returncode == 0, done.stderr
    run = run_in(tmp_path)
    best, _ = evaluated(graft, run)
    last, _ = evaluated(graft, run, "--ckpt", "last")
    assert best["metrics"]["acc"] == record(run)["metrics"]["test/acc"]
    assert last["metrics"] == pytest.approx(best["metrics"], abs=1e-6)
