"""`graft eval`: what a run says of its test split, from the run folder alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from graft.data.sources.synthetic import Synthetic
from graft.runs.evaluate import Settings
from graft.transforms.corruptions import CORRUPTIONS
from graft.transforms.preprocessing import Preprocessing
from tests.conftest import TINY, Graft, compose

MORE = ["data.source.per_class=40", "data.source.test_per_class=13", "trainer.max_epochs=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fine-tuned run and a probe. Tests that change one work on a copy: see `run_of`."""
    from graft.runs.run import run

    root = tmp_path_factory.mktemp("trained")
    for name, plan in (("finetune", []), ("probe", ["transfer=linear_probe"])):
        paths = [f"paths.logs={root / name}", f"paths.cache={root / 'cache'}"]
        run(compose(*TINY, *MORE, *paths, *plan), [])
    return {name: next((root / name).iterdir()) for name in ("finetune", "probe")}


@pytest.fixture
def tuned(trained: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the fine-tuned run."""
    return shutil.copytree(trained["finetune"], tmp_path / "run")


def evaluated(graft: Graft, run: Path, *arguments: str, name: str = "test") -> dict[str, Any]:
    """The result, whose file is `name.json`, or `name-<hash>.json` of what has a path."""
    done = graft("eval", str(run), *arguments)
    assert done.returncode == 0, done.stderr
    (file,) = re.findall(r"^kept in +(.+)$", done.stdout, flags=re.MULTILINE)
    assert re.fullmatch(rf"{name}(-[0-9a-f]{{6}})?\.json", Path(file).name)
    assert Path(file).parent == run / "eval"
    return json.loads(Path(file).read_text())


def error(graft: Graft, run: Path, *arguments: str) -> str:
    """The one line that `graft eval` ends with."""
    done = graft("eval", str(run), *arguments)
    assert done.returncode == 1, done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("graft: error: ")
    return done.stderr.removeprefix("graft: error: ")


def edit(run: Path, **groups: dict[str, Any]) -> None:
    """Change the config that a run is found with."""
    config = OmegaConf.merge(OmegaConf.load(run / "config.yaml"), groups)
    OmegaConf.save(config, run / "config.yaml")


def class_folders(root: Path, split: str = "test") -> Path:
    """The test images of the runs here as files."""
    found = getattr(
        Synthetic(classes=4, per_class=40, test_per_class=13).load(Preprocessing(32, 32)), split
    )
    for i, (pixels, label) in enumerate(zip(found.images, found.labels, strict=True)):
        folder = root / f"class_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize("name", ["finetune", "probe"])
def test_the_runs_own_test_split_gives_exactly_what_the_run_recorded(
    graft: Graft, trained: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Whatever the size of a batch; the files hold what was computed."""
    run = shutil.copytree(trained[name], tmp_path / "run")
    recorded = json.loads((run / "run.json").read_text())["metrics"]
    result = evaluated(graft, run)
    assert result["metrics"]["acc"] == recorded["test/acc"]
    assert result["metrics"]["nll"] == pytest.approx(recorded["test/loss"], abs=1e-6)
    assert result["checkpoint"] == f"checkpoints/{name}/best.ckpt"
    assert evaluated(graft, run, "--batch-size", "7")["metrics"] == pytest.approx(result["metrics"])
    with np.load(run / "eval" / "test.npz") as file:
        arrays = dict(file)
    assert arrays["index"].tolist() == list(range(52))
    assert (arrays["label"] == arrays["prediction"]).mean() == pytest.approx(recorded["test/acc"])
    matrix = np.zeros((4, 4), dtype=int)
    np.add.at(matrix, (arrays["label"], arrays["prediction"]), 1)
    assert (matrix == result["confusion"]).all()
    assert [row["images"] for row in result["per_class"].values()] == [13] * 4
    low, high = result["intervals"]["acc"]
    assert low <= recorded["test/acc"] <= high


@pytest.mark.parametrize("inner", ["", "test"])
def test_class_folders_of_the_same_images_give_the_same_accuracy(
    graft: Graft, trained: dict[str, Path], tuned: Path, tmp_path: Path, inner: str
) -> None:
    images = tmp_path / "photos"
    class_folders(images / inner)
    if inner:
        (images / "train" / "anything").mkdir(parents=True)  # is not looked at
    own = evaluated(graft, tuned)
    other = evaluated(graft, tuned, "--data", str(images), name="data_photos")
    assert other["images"] == 52
    assert other["metrics"] == pytest.approx(own["metrics"], abs=1e-6)
    assert other["confusion"] == own["confusion"]


def test_a_data_group_with_overrides_and_classes_in_another_order(
    graft: Graft, tuned: Path, tmp_path: Path
) -> None:
    """Labels go by the names of classes, and a few training images are enough."""
    own = evaluated(graft, tuned)
    same = ["data.source.classes=4", "data.source.test_per_class=13", "data.source.per_class=3"]
    other = evaluated(graft, tuned, "--data", "synthetic", *same, name="data_synthetic_4_13_3")
    assert other["metrics"] == own["metrics"]
    path = tuned / "checkpoints" / "finetune" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    order = [2, 0, 3, 1]  # a run that numbered its classes in another way
    state = checkpoint["state_dict"]
    for key in ("head.linear.weight", "head.linear.bias"):
        state[key] = state[key][order]
    checkpoint["graft"]["classes"] = [checkpoint["graft"]["classes"][i] for i in order]
    torch.save(checkpoint, tmp_path / "shuffled.ckpt")
    shuffled = evaluated(
        graft, tuned, "--ckpt", str(tmp_path / "shuffled.ckpt"), name="test_shuffled"
    )
    assert shuffled["metrics"] == pytest.approx(own["metrics"])
    assert [*shuffled["per_class"]] == checkpoint["graft"]["classes"]
    assert shuffled["per_class"] == own["per_class"]


def test_results_of_folders_with_the_same_name_are_all_kept(
    graft: Graft, tuned: Path, tmp_path: Path
) -> None:
    """However the folder is written; overrides of equal value too."""
    for site in ("a", "b"):
        class_folders(tmp_path / site / "photos")
    for path in ("a/photos", "b/photos/", str(tmp_path / "a" / "photos")):
        evaluated(graft, tuned, "--data", path, "--limit", "8", name="data_photos_limit8")
    assert len([*(tuned / "eval").glob("data_photos*.json")]) == 2
    sources = {json.loads(p.read_text())["source"]["root"] for p in (tuned / "eval").glob("*.json")}
    assert sources == {str(tmp_path / site / "photos") for site in ("a", "b")}
    names = {
        Settings(data=["synthetic", f"data.source.{key}=4"]).name
        for key in ("classes", "per_class")
    }
    assert len(names) == 2
    assert Settings(data=["cifar10"]).name == "data_cifar10"
    assert Settings(ckpt="last").name == "test_last"


def test_last_mirror_and_limit(graft: Graft, tuned: Path) -> None:
    last = evaluated(graft, tuned, "--ckpt", "last", name="test_last")
    assert last["checkpoint"] == "checkpoints/finetune/last.ckpt"
    assert last["epoch"] == 2
    own, mirrored = evaluated(graft, tuned), evaluated(graft, tuned, "--mirror", name="test_mirror")
    assert mirrored["metrics"]["nll"] != own["metrics"]["nll"]
    few = evaluated(graft, tuned, "--limit", "8", name="test_limit8")
    assert few["images"] == 8
    assert [row["images"] for row in few["per_class"].values()] == [2] * 4
    whole, part = (dict(np.load(tuned / "eval" / f"{n}.npz")) for n in ("test", "test_limit8"))
    assert (whole["prediction"][part["index"]] == part["prediction"]).all()


def test_corruptions_are_a_table_that_gets_worse(graft: Graft, tuned: Path) -> None:
    chosen = ["--corruptions", "gaussian_noise", "contrast", "--severities", "1", "5"]
    done = graft("eval", str(tuned), *chosen)
    assert done.returncode == 0, done.stderr
    (file,) = (tuned / "eval").glob("corruptions*.json")
    result = json.loads(file.read_text())
    recorded = json.loads((tuned / "run.json").read_text())["metrics"]
    assert result["metrics"]["acc"] == recorded["test/acc"]
    assert [*result["corruptions"]] == ["gaussian_noise", "contrast"]
    accuracies = [s["acc"] for rows in result["corruptions"].values() for s in rows.values()]
    assert len(accuracies) == 4
    assert result["mean_acc"] == pytest.approx(np.mean(accuracies))
    assert result["mean_acc"] < recorded["test/acc"]
    assert "gaussian_noise" in done.stdout


def test_other_settings_are_kept_in_other_files() -> None:
    several = [
        Settings(), Settings(corruptions=[]), Settings(corruptions=["fog"]),
        Settings(corruptions=["snow"]), Settings(corruptions=[], severities=[3]),
        Settings(adapt="tent"), Settings(adapt="tent", batch_size=200), Settings(adapt="adabn"),
    ]  # fmt: skip
    assert len({settings.name for settings in several}) == len(several)
    assert Settings(batch_size=7).name == Settings().name, "no result depends on it"


def test_all_corruptions_are_the_fifteen_of_cifar_10_c() -> None:
    assert len(CORRUPTIONS) == 15
    assert all(len(parameters) == 5 for _, parameters in CORRUPTIONS.values())


def test_adaptation_helps_under_a_shift_and_leaves_the_run_as_it_was(
    graft: Graft, tuned: Path
) -> None:
    def contrast(*adapt: str) -> dict[str, Any]:
        done = graft("eval", str(tuned), "--corruptions", "contrast", "--severities", "5", *adapt)
        assert done.returncode == 0, done.stderr
        file = Path(done.stdout.split("kept in")[1].strip())
        return json.loads(file.read_text())

    plain, adabn, tent = contrast(), contrast("--adapt", "adabn"), contrast("--adapt", "tent")
    assert adabn["mean_acc"] > plain["mean_acc"]
    assert tent["mean_acc"] > plain["mean_acc"]
    assert adabn["metrics"] == plain["metrics"], "clean images are predicted without it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corruptions", "fogg"], "--corruptions fogg: unknown: did you mean fog?"),
        (["--corruptions", "fog", "--severities", "6"], "invalid choice: 6"),
        (["--adapt", "tents"], "invalid choice: 'tents'"),
        (["--severities", "3"], "--severities is for --corruptions"),
    ],
)
def test_a_shift_or_method_that_there_is_not_is_one_line(
    graft: Graft, tuned: Path, arguments: list[str], message: str
) -> None:
    done = graft("eval", str(tuned), *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stderr.startswith("graft: error: ")
    assert done.stderr.count("\n") == 1


def test_a_run_of_several_gpus_is_evaluated_where_there_is_none(graft: Graft, tuned: Path) -> None:
    own = evaluated(graft, tuned)
    edit(
        tuned,
        trainer={
            "accelerator": "gpu", "devices": 8, "num_nodes": 2, "strategy": "ddp",
            "precision": "16-mixed", "compile": True, "limit_test_batches": 1,
        },
    )  # fmt: skip
    assert evaluated(graft, tuned)["metrics"] == own["metrics"]


def test_pretrained_weights_are_not_loaded_again(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint holds all; of the weights that a run names, only the preprocessing counts,
    which it holds too: the run that the weights came from may be gone."""
    net = ["backbone=squeezenet1_1", "data.image_size=48", "backbone.weights=null"]
    net += ["backbone.preprocessing.mean=[0.9,0.1,0.5]"]
    tiny = [word for word in TINY if not word.startswith("backbone.")]
    done = graft("train", *tiny, *net, "transfer=linear_probe", "data.source.per_class=4")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "logs").iterdir()
    own = evaluated(graft, run)

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr("graft.models.weights.read_file", refuse)
    for weights in ("IMAGENET1K_V1", str(tmp_path / "gone.pth")):
        edit(run, backbone={"weights": weights, "preprocessing": {"mean": None}})
        assert evaluated(graft, run)["metrics"] == own["metrics"]


def test_data_of_other_classes_says_which(graft: Graft, tuned: Path, tmp_path: Path) -> None:
    images = class_folders(tmp_path / "images")
    (images / "class_3").rename(images / "frog")
    message = "the data has classes that the run does not know: frog; it knows class_0, class_1,"
    assert message in error(graft, tuned, "--data", str(images))


def test_what_is_not_there_or_not_whole(graft: Graft, tuned: Path, tmp_path: Path) -> None:
    assert "is not a run folder" in error(graft, tmp_path / "nowhere")
    assert "is not a run folder" in error(graft, tuned / "checkpoints")
    assert "neither a folder nor one of cifar10, digits" in error(graft, tuned, "--data", "cifr10")
    wrong = error(graft, tuned, "--data", "synthetic", "data.source.clases=3")
    assert wrong.startswith("no config key data.source.clases")
    assert "no such file; or give best or last" in error(graft, tuned, "--ckpt", "worst")

    best, last = ((tuned / "checkpoints" / "finetune" / f"{n}.ckpt") for n in ("best", "last"))
    checkpoint = torch.load(best, weights_only=True)
    del checkpoint["state_dict"]["head.linear.bias"]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    assert "1 missing (head.linear.bias)" in error(
        graft, tuned, "--ckpt", str(tmp_path / "other.ckpt")
    )
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    assert "does not name its classes" in error(
        graft, tuned, "--ckpt", str(tmp_path / "plain.ckpt")
    )
    best.write_bytes(best.read_bytes()[:5000])
    assert "best.ckpt is torn" in error(graft, tuned)
    best.write_bytes(b"")
    assert "best.ckpt is torn" in error(graft, tuned)

    record = json.loads((tuned / "run.json").read_text())
    best.unlink()
    (tuned / "run.json").write_text(json.dumps({**record, "status": "preempted"}))
    message = error(graft, tuned)
    assert "(status preempted) has no checkpoints/finetune/best.ckpt" in message
    assert f"--ckpt {last}" in message
    (tuned / "run.json").write_text(json.dumps({**record, "format": 99}))
    assert "written by a newer graft" in error(graft, tuned)
    (tuned / "run.json").write_text("{")
    assert "run.json is damaged" in error(graft, tuned)
    assert not (tuned / "eval" / "test.json").exists()


@pytest.mark.slow
def test_a_run_of_two_ranks_is_evaluated_by_one_process(
    graft: Graft, graft_process: Graft, tmp_path: Path
) -> None:
    done = graft_process("train", *TINY, "trainer=ddp_cpu", "data.batch_size=4")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "logs").iterdir()
    recorded = json.loads((run / "run.json").read_text())["metrics"]
    assert evaluated(graft, run)["metrics"]["acc"] == recorded["test/acc"]
