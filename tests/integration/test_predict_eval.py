"""`graft predict` says of a file what `graft eval` says of it in a class folder."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from graft.deploy.model import Deployed, load
from graft.deploy.predict import Row, predict
from graft.deploy.spec import Threads
from tests.conftest import TINY, Graft, compose
from tests.unit.test_depth import png16

CLASSES = ("bright", "dark", "mixed")
EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned by a quarter


def photo(rng: np.random.Generator, size: tuple[int, int] = (24, 40)) -> Image.Image:
    """Smooth, so that a resize matters, and nowhere like its mirror image."""
    small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def all_kinds(root: Path) -> Path:
    """Class folders with images of every kind."""
    rng = np.random.default_rng(1)
    for name in CLASSES:
        folder = root / name
        folder.mkdir(parents=True)
        image = photo(rng)
        for extension in ("jpg", "png", "webp"):
            image.save(folder / f"plain.{extension}")
            photo(rng).save(folder / f"turned.{extension}", exif=EXIF)
            photo(rng).convert("L").save(folder / f"grey.{extension}")
        photo(rng).convert("CMYK").save(folder / "cmyk.jpg")
        photo(rng).convert("P").save(folder / "palette.png")
        photo(rng).convert("1").save(folder / "bits.png")
        photo(rng, (24, 24)).save(folder / "square.png")
        photo(rng, (3, 11)).save(folder / "smaller.png")
        photo(rng, (300, 4)).save(folder / "wide.png")
        photo(rng, (1, 1)).save(folder / "pixel.png")
        alpha = photo(rng).convert("L")
        for extension in ("png", "webp"):
            transparent = photo(rng)
            transparent.putalpha(alpha)
            transparent.save(folder / f"alpha.{extension}", lossless=True)
        photo(rng).convert("LA").save(folder / "grey-alpha.png")
        first, *others = [photo(rng) for _ in range(3)]
        first.save(folder / "animated.gif", save_all=True, append_images=others)
        deep = rng.integers(0, 4096, (24, 40, 3), dtype=np.uint16)
        png16(folder / "deep.png", deep, 2)
        png16(folder / "deep-grey.png", deep[..., 0], 0)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_kinds(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module", params=["finetune", "probe"])
def trained(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run on such images; its folder is written to by nobody else."""
    from graft.runs.run import run

    root = tmp_path_factory.mktemp("trained")
    tiny = [word for word in TINY if not word.startswith("data.source") and "data=" not in word]
    plan = ["transfer=linear_probe"] if request.param == "probe" else []
    overrides = [
        *tiny, "data=image_folder", f"data.root={data}", "data.image_size=20",
        "data.resize_size=22", "data.source.background=orange", "data.val_fraction=0.2",
        "data.source.value_range=[100,3000]", "optimizer.lr=0.01", "trainer.max_epochs=3",
        f"paths.logs={root / 'logs'}", f"paths.cache={root / 'cache'}", *plan,
    ]  # fmt: skip
    run(compose(*overrides), [])
    return next((root / "logs").iterdir())


def evaluated(graft: Graft, run: Path, folder: Path, *options: str) -> dict[str, np.ndarray]:
    done = graft("eval", str(run), "--data", str(folder), *options)
    assert done.returncode == 0, done.stderr
    (file,) = re.findall(r"^kept in +(.+)$", done.stdout, flags=re.MULTILINE)
    with np.load(Path(file).with_suffix(".npz")) as arrays:
        return dict(arrays)


def predicted(graft: Graft, run: Path, folder: Path, *options: str) -> list[dict[str, str]]:
    done = graft("predict", str(run), str(folder), *options)
    assert done.returncode == 0, done.stderr
    return [*csv.DictReader(io.StringIO(done.stdout))]


def numbers(row: Row) -> NDArray[np.float32]:
    assert row.values is not None, row.error
    return row.values


@pytest.mark.parametrize("options", [(), ("--mirror",)])
def test_a_file_is_predicted_as_it_is_evaluated(
    graft: Graft, trained: Path, data: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    expected = evaluated(graft, run, data, *options)
    rows = predicted(graft, run, data, *options)
    assert len(rows) == len(expected["index"]) == 3 * 22
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    for row, label in zip(rows, expected["label"], strict=True):
        assert Path(row["path"]).parent.name == CLASSES[label]
    assert [CLASSES[i] for i in expected["prediction"]] == [row["prediction"] for row in rows]
    confidence = [float(row["confidence"]) for row in rows]
    np.testing.assert_allclose(confidence, expected["confidence"], rtol=0, atol=1e-5)
    assert len({row["prediction"] for row in rows}) > 1


@pytest.mark.parametrize("side", [7, 22, 30])
def test_squares_of_one_size_that_class_folders_keep_as_they_are(
    graft: Graft, trained: Path, tmp_path: Path, side: int
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    rng = np.random.default_rng(2)
    for name in CLASSES:
        (tmp_path / "squares" / name).mkdir(parents=True)
        for i in range(7):
            photo(rng, (side, side)).save(tmp_path / "squares" / name / f"{i}.png")
    expected = evaluated(graft, run, tmp_path / "squares")
    rows = predicted(graft, run, tmp_path / "squares")
    assert [CLASSES[i] for i in expected["prediction"]] == [row["prediction"] for row in rows]
    confidence = [float(row["confidence"]) for row in rows]
    np.testing.assert_allclose(confidence, expected["confidence"], rtol=0, atol=1e-5)


def test_features_are_what_the_head_was_given(graft: Graft, trained: Path, data: Path) -> None:
    """In the order of the images, folded and side by side or one after the other."""
    model = load(trained, device="cpu")
    done = graft("predict", str(trained), str(data), "--embeddings", "--out", "f.jsonl")
    assert done.returncode == 0
    lines = [json.loads(line) for line in Path("f.jsonl").read_text().splitlines()]
    width = model.backbone.num_features
    features = torch.tensor([[line[f"f{i}"] for i in range(width)] for line in lines])
    probabilities = model.task.predicted(model.head(features))
    rows = predicted(graft, trained, data)
    expected = torch.tensor([[float(row[f"p_{name}"]) for name in CLASSES] for row in rows])
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)


def test_threads_and_folding_change_nothing_and_are_gone_afterwards(
    trained: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    model = load(trained, device="cpu")
    used: list[Threads | None] = []
    own = Deployed.for_many

    def noted(self: Deployed, images: Any) -> Any:
        class Noting:
            def __enter__(self) -> Threads | None:
                used.append(context.__enter__())
                return used[-1]

            def __exit__(self, *error: Any) -> None:
                context.__exit__(*error)

        context = own(self, images)
        return Noting()

    monkeypatch.setattr(Deployed, "for_many", noted)
    paths = [(str(path), "") for path in sorted(data.rglob("*.*"))]
    backbone = model.backbone
    many = [row for rows in predict(model, paths, batch_size=4) for row in rows]
    assert [threads.count for threads in used if threads] == [2]
    assert model.backbone is backbone
    assert torch.get_num_threads() == 2
    assert [row.path for row in many] == [path for path, _ in paths]
    for given, row in [*zip(paths, many, strict=True)][::7]:
        ((alone,),) = predict(model, [given])
        np.testing.assert_allclose(numbers(row), numbers(alone), rtol=0, atol=1e-5)


def test_deep_images_are_refused_by_a_run_that_saw_none(
    graft: Graft, image_folders: Path, tmp_path: Path
) -> None:
    tiny = [word for word in TINY if not word.startswith("data.source") and "data=" not in word]
    places = [f"paths.logs={tmp_path / 'logs'}", f"data.root={image_folders}"]
    assert graft("train", *tiny, "data=image_folder", *places).returncode == 0
    deep = png16(tmp_path / "deep.png", np.full((9, 9), 3000, np.uint16), 0)
    run = next((tmp_path / "logs").iterdir())
    done = graft("predict", str(run), str(deep))
    assert done.returncode == 1
    assert "1 of 1 image could not be read" in done.stderr
    assert "more than 8 bits" in done.stdout
