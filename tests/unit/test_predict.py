"""`graft predict`: rows for image files, whatever they are and wherever they are listed."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image
from pyarrow import parquet  # type: ignore[import-untyped]

from graft.data.sources.decode import Reading
from graft.deploy.files import KEY
from graft.deploy.images import read_image
from graft.deploy.listing import Paths
from graft.deploy.predict import Given, Row, predict
from graft.deploy.predictions import PythonModel
from graft.deploy.screen import Screen
from graft.deploy.spec import Spec
from graft.deploy.writers import WRITERS, Columns
from graft.transforms.preprocessing import Preprocessing
from tests.conftest import Graft

CLASSES = ["red", "green", "blue"]
ODD = 'new\nline, "quoted"\x1b[31m\udcff.png'  # and a byte that is no UTF-8


def spec(kind: str = "classes", classes: list[str] = CLASSES) -> Spec:
    form = Preprocessing(8, 8)
    return Spec(classes, kind, form, form, Reading(max_megapixels=1))  # type: ignore[arg-type]


class Means(PythonModel):
    """A model whose outputs are the means of the channels, as shares of their sum."""

    def __init__(self) -> None:
        self.spec = spec()
        self.shapes: list[tuple[int, ...]] = []

    def predict_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.shapes.append(images.shape)
        means = images.mean((2, 3)) + 1e-6
        return (means / means.sum(1, keepdims=True)).astype(np.float32)

    def embed_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.repeat(self.predict_rows(images), 2, axis=1)


@pytest.fixture(scope="module")
def means_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an exported model."""
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("Add", ["means", "little"], ["y"]),
        helper.make_node("ReduceSum", ["y", "axis"], ["sum"], keepdims=1),
        helper.make_node("Div", ["y", "sum"], ["probabilities"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, "H", "W"])
    shares = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 3])
    constants = [
        helper.make_tensor("little", TensorProto.FLOAT, [], [1e-6]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
    ]
    graph = helper.make_graph(nodes, "means", [images], [shares], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {KEY: spec().to_json()})
    path = tmp_path_factory.mktemp("model") / "means.onnx"
    onnx.save(model, path)
    return path


def paint(path: Path, colour: str = "red", size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images in two folders, and what is none."""
    root = tmp_path / "photos"
    for name, colour in (
        ("b.png", "blue"),
        ("a/z.JPG", "red"),
        ("a/y.png", "lime"),
        ("c.gif", "red"),
    ):
        paint(root / name, colour, (12, 9))
    paint(root / ".hidden.png")
    paint(root / "__MACOSX" / "b.png")
    (root / "notes.txt").write_text("none of them")
    return root


def listed(*arguments: str | Path, standard_input: bytes = b"") -> list[str]:
    return [path for path, _ in Paths([*map(str, arguments)], io.BytesIO(standard_input))]


def rows_of(paths: list[str] | list[Path], **options: Any) -> list[Row]:
    given = [(str(path), "") for path in paths]
    return [row for rows in predict(Means(), given, **options) for row in rows]


# ---------------------------------------------------------------- which images


def test_the_order_is_the_one_given_and_folders_are_sorted(photos: Path) -> None:
    inside = [f"{photos}/{name}" for name in ("a/y.png", "a/z.JPG", "b.png", "c.gif")]
    last = paint(photos.parent / "first.png")
    assert listed(last, f"{photos}/") == [str(last), *inside]
    assert listed(f"{photos}/**") == listed(f"{photos}/**/*.*") == inside
    assert listed(f"{photos}/*.[pg]*") == inside[2:]
    assert listed(f"{photos}/?") == inside[:2]


def test_files_of_folders_that_are_no_images_are_counted(photos: Path) -> None:
    paths = Paths([str(photos), str(photos / "notes.txt")])
    assert [path for path, _ in paths][-1] == f"{photos}/notes.txt"  # named: taken at one's word
    assert paths.left_out == 1
    pattern = Paths([str(photos.parent / "photo*")])
    assert len([*pattern]) == 4
    assert pattern.left_out == 1


def test_a_list_on_standard_input(photos: Path) -> None:
    odd = os.fsencode(paint(photos / "odd\udcff.png"))
    lines = b"\n".join([b"gone.png", b"", odd, f"{photos}/b.png\r".encode(), bytes(photos / "a")])
    assert listed("-", standard_input=lines) == [
        "gone.png", os.fsdecode(odd), f"{photos}/b.png", f"{photos}/a/y.png", f"{photos}/a/z.JPG",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["gone.png", "*.tiff"])
def test_an_argument_that_leads_to_nothing_is_refused(photos: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"no such file or folder|matches no image"):
        Paths([str(photos), str(photos / name)])


def test_a_name_with_letters_of_patterns_is_a_file(tmp_path: Path) -> None:
    paint(tmp_path / "1.png")
    assert listed(paint(tmp_path / "[1].png")) == [f"{tmp_path}/[1].png"]


# ---------------------------------------------------------------- rows


def test_what_cannot_be_read_is_a_row_with_its_reason(tmp_path: Path) -> None:
    good = paint(tmp_path / "good.jpg")
    (tmp_path / "truncated.png").write_bytes(
        paint(tmp_path / "x.png", size=(99, 99)).read_bytes()[:-60]
    )
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("nowhere")
    reasons = {
        "truncated.png": "truncated|broken",
        "empty.png": "not an image",
        "text.jpg": "not an image",
        "pipe.png": "a named pipe",
        "link.png": "leads nowhere",
        "huge.png": "20000 x 1000 are 20 megapixels",
    }
    paint(tmp_path / "huge.png", size=(20_000, 1000))
    paint(tmp_path / "wide.png", "blue", size=(20_000, 2))
    good.rename(tmp_path / "jpeg.png")
    rows = {
        Path(r.path).name: r for batch in predict(Means(), Paths([str(tmp_path)])) for r in batch
    }
    for name, why in reasons.items():
        assert rows[name].values is None
        assert re.search(why, rows[name].error), rows[name]
    read = {name for name, row in rows.items() if not row.error}
    assert read == {"x.png", "wide.png", "jpeg.png"}
    (missing,) = rows_of([tmp_path / "missing.png"])
    assert missing.error == "No such file or directory"


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_row_depends_on_its_own_image_alone(tmp_path: Path, batch_size: int) -> None:
    """Images of other shapes between them, and ones that cannot be read."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(40):
        path = tmp_path / f"{i}.png"
        size = [(1, 1), (5, 5), (30, 11), (8, 8)][i % 4]
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    (tmp_path / "7.png").write_bytes(b"")
    found = rows_of(paths, batch_size=batch_size)
    assert [row.path for row in found] == [*map(str, paths)]
    for row in found:
        (alone,) = rows_of([row.path])
        assert (row.values is None) == (alone.values is None) == row.path.endswith("/7.png")
        if row.values is not None:
            np.testing.assert_array_equal(row.values, alone.values)


def test_outputs_that_are_no_numbers_name_no_class(tmp_path: Path) -> None:
    class Broken(Means):
        def predict_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
            rows = super().predict_rows(images)
            rows[images.mean((1, 2, 3)) == 85] = np.nan  # of red
            return rows

    red, white = (str(paint(tmp_path / f"{name}.png", name)) for name in ("red", "white"))
    first, second = next(predict(Broken(), [(red, ""), (white, "")]))
    assert first.values is None
    assert "not finite" in first.error
    assert second.values is not None
    with pytest.raises(ValueError, match="not finite"):
        Broken().predict([white, red])


def test_what_is_queued_is_not_computed_after_an_end(tmp_path: Path) -> None:
    model, path = Means(), str(paint(tmp_path / "a.png"))
    rows = predict(model, ((path, "") for _ in range(1000)), batch_size=2)
    next(rows)
    next(rows)
    rows.close()
    assert len(model.shapes) < 50


def test_a_small_square_goes_the_way_that_the_run_s_images_went(tmp_path: Path) -> None:
    """Where what was stored is resized again: a small image is not resized once alone."""
    path = paint(tmp_path / "a.png", size=(5, 5))
    assert read_image(path, spec()).shape == (3, 5, 5)
    assert read_image(path, replace(spec(), keeps_small=False)).shape == (3, 8, 8)


def test_images_of_a_shape_are_one_call(tmp_path: Path) -> None:
    paths = [paint(tmp_path / f"{i}.png", size=(4 + i % 2,) * 2) for i in range(16)]
    model = Means()
    list(predict(model, [(str(path), "") for path in paths]))
    assert sorted(model.shapes) == [(8, 3, 4, 4), (8, 3, 5, 5)]


def test_few_paths_are_taken_ahead_of_the_rows(tmp_path: Path) -> None:
    path = str(paint(tmp_path / "1.png"))
    taken = 0

    def endless() -> Iterator[Given]:
        nonlocal taken
        while True:
            taken += 1
            yield path, ""

    rows = predict(Means(), endless(), batch_size=4)
    ahead = []
    for done in range(1, 60):
        next(rows)
        ahead.append(taken - 4 * done)
    rows.close()
    assert max(ahead) <= 4 * 2 * 8
    assert max(ahead[20:]) <= max(ahead[:20])


# ---------------------------------------------------------------- columns and files


def written(suffix: str, columns: Columns, rows: list[Row]) -> list[dict[str, Any]]:
    """What is read from a file with these rows."""
    file = io.BytesIO()
    writer = WRITERS[suffix](file, columns)
    writer.write(rows[:1])
    writer.write(rows[1:])
    writer.close()
    if suffix == ".parquet":
        return parquet.read_table(io.BytesIO(file.getvalue())).to_pylist()
    text = file.getvalue().decode("utf-8", "surrogateescape")
    if suffix == ".csv":
        return [*csv.DictReader(io.StringIO(text, newline=""))]
    return [json.loads(line) for line in text.splitlines()]


OUTPUTS = [
    Row(ODD, np.array([0.1, 0.7, 0.2], np.float32)),
    Row("bad.png", None, 'it is, in short, "bad"'),
    Row("c.png", np.array([0.6, 0.5, 0.55], np.float32)),
]


@pytest.mark.parametrize("suffix", [*WRITERS])
def test_classes_and_their_probabilities(suffix: str) -> None:
    first, bad, last = written(suffix, Columns(spec(), top=2), OUTPUTS)
    assert [*first] == [
        *("path", "prediction", "confidence", "error", "top1", "top1_p", "top2", "top2_p"),
        *("p_red", "p_green", "p_blue"),
    ]
    assert first["path"] == (ODD.replace("\udcff", "\\xff") if suffix == ".parquet" else ODD)
    assert (first["prediction"], first["top1"], first["top2"]) == ("green", "green", "blue")
    numbers = [np.float32(first[key]) for key in ("confidence", "top2_p", "p_red")]
    assert numbers == [np.float32(0.7), np.float32(0.2), np.float32(0.1)]
    assert first["error"] in (None, "")
    assert bad["error"] == OUTPUTS[1].error
    assert {bad[key] for key in bad} - {"bad.png", bad["error"]} in ({None}, {""})
    assert last["prediction"] == "red"


@pytest.mark.parametrize(
    ("suffix", "two"),
    [(".csv", "red|blue"), (".jsonl", ["red", "blue"]), (".parquet", ["red", "blue"])],
)
def test_labels_are_those_above_one_half(suffix: str, two: Any) -> None:
    first, _, last = written(suffix, Columns(spec("labels"), top=9), OUTPUTS)
    assert last["prediction"] == two
    assert first["prediction"] in ("green", ["green"])
    assert "confidence" not in first
    assert (last["top3"], np.float32(last["top3_p"])) == ("green", np.float32(0.5))


@pytest.mark.parametrize("suffix", [*WRITERS])
def test_numbers_are_columns(suffix: str) -> None:
    first, bad, _ = written(suffix, Columns(spec("numbers", ["age", "error", "path"])), OUTPUTS)
    assert [*first] == ["path", "error", "predicted_age", "predicted_error", "predicted_path"]
    assert np.float32(first["predicted_age"]) == np.float32(0.1)
    assert bad["predicted_age"] in (None, "")


@pytest.mark.parametrize("suffix", [*WRITERS])
def test_features_are_columns_or_a_list(suffix: str) -> None:
    first, bad, _ = written(suffix, Columns(spec(), features=3), OUTPUTS)
    if suffix == ".parquet":
        assert [*first] == ["path", "error", "features"]
        assert np.float32(first["features"]).tolist() == [np.float32(v) for v in (0.1, 0.7, 0.2)]
        assert bad["features"] is None
    else:
        assert [*first] == ["path", "error", "f0", "f1", "f2"]
        assert np.float32(first["f1"]) == np.float32(0.7)


def test_what_json_has_no_number_for_is_null() -> None:
    (row,) = written(
        ".jsonl", Columns(spec()), [Row("a", np.array([np.nan, 1, np.inf], np.float32))]
    )
    assert (row["p_red"], row["p_green"], row["p_blue"]) == (None, 1.0, None)


def test_a_few_rows_are_a_table_on_a_terminal_and_many_are_csv(
    capfd: pytest.CaptureFixture[str],
) -> None:
    few, many = io.BytesIO(), io.BytesIO()
    screen = Screen(few, Columns(spec()))
    screen.write(OUTPUTS)
    screen.close()
    printed = capfd.readouterr().out
    assert few.getvalue() == b""
    assert "70.00 %" in printed
    assert "p_red" not in printed
    assert "\x1b[31m" not in printed
    screen = Screen(many, Columns(spec()))
    for _ in range(7):
        screen.write(OUTPUTS)
    screen.close()
    assert many.getvalue().decode(errors="replace").startswith("path,prediction,")
    assert many.getvalue().count(b"bad.png") == 7
    assert capfd.readouterr().out == ""


# ---------------------------------------------------------------- the command


def error(graft: Graft, *arguments: str | Path) -> str:
    """The one line that the command ends with."""
    done = graft("predict", *map(str, arguments))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("graft: error: ").strip()


def test_an_exported_model_says_what_images_are(
    graft: Graft, means_onnx: Path, photos: Path
) -> None:
    done = graft("predict", str(means_onnx), str(photos), "--top", "1")
    assert done.returncode == 0
    rows = [*csv.DictReader(io.StringIO(done.stdout))]
    assert [Path(row["path"]).name for row in rows] == ["y.png", "z.JPG", "b.png", "c.gif"]
    assert [row["prediction"] for row in rows] == ["green", "red", "blue", "red"]
    assert "4 images in" in done.stderr
    assert "1 file left out" in done.stderr


def test_images_that_cannot_be_read_are_counted_at_the_end(
    graft: Graft, means_onnx: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "a" / "a\n.png").write_text("none")
    out = tmp_path / "out.csv"
    done = graft("predict", str(means_onnx), str(photos), "--out", str(out))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    name = f"{photos}/a/a\\n.png"
    assert f"1 of 5 images could not be read, first: {name}: not an image" in last
    with out.open(newline="") as file:
        assert [bool(row["error"]) for row in csv.DictReader(file)] == [True, *[False] * 4]


def test_a_file_that_is_there_is_replaced_only_if_told(
    graft: Graft, means_onnx: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    assert "--force" in error(graft, means_onnx, photos, "--out", out)
    assert out.read_text() == "mine"
    assert (
        graft("predict", str(means_onnx), str(photos), "--out", str(out), "--force").returncode == 0
    )
    assert len(out.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "out.xlsx"], "must end in .csv, .jsonl, .parquet"),
        (["--out", "gone/out.csv"], "there is no folder gone"),
        (["--out", "photos.csv"], "not a file"),
        (["--embeddings"], "exported without features"),
        (["--mirror"], "--mirror is for run folders"),
        (["--embeddings", "--top", "2"], "--top is for predictions"),
        (["--batch-size", "0"], "must be a whole number above 0"),
        (["--force"], "--force is for --out"),
    ],
)
def test_wrong_arguments_are_a_line_and_leave_nothing(
    graft: Graft,
    means_onnx: Path,
    photos: Path,
    tmp_path: Path,
    arguments: list[str],
    expected: str,
) -> None:
    (tmp_path / "photos.csv").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert expected in error(graft, means_onnx, photos, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_image_is_an_error(graft: Graft, means_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images in" in error(graft, means_onnx, tmp_path / "empty", "--out", "out.csv")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("suffix", [*WRITERS])
def test_a_full_disk_leaves_nothing_half_written(
    graft: Graft, means_onnx: Path, photos: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"out{suffix}"
    temporary = tmp_path / f".{out.name}.graft-{os.getpid()}"
    temporary.symlink_to("/dev/full")
    assert f"cannot write {out}: the disk is full" in error(graft, means_onnx, photos, "--out", out)
    assert not out.exists()
    assert not temporary.is_symlink()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_half_written(
    means_onnx: Path, photos: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    command = [sys.executable, "-m", "graft", "predict", str(means_onnx), "-", "--out", "o.csv"]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(f"{photos}/b.png\n".encode() * 2000)
        process.stdin.flush()
        while not [*tmp_path.glob(".o.csv.graft-*")]:
            assert process.poll() is None
        process.send_signal(signum)
        said = process.stderr.read().decode()
        assert process.wait() == 128 + signum
    assert said == ("graft: interrupted\n" if signum == signal.SIGINT else "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_an_onnx_model_answers_without_torch_and_a_closed_pipe_ends_it_quietly(
    means_onnx: Path, photos: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from graft.cli import main; sys.argv = ['graft', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print({'torch', 'lightning', 'hydra'} & {*sys.modules}, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "predict", str(means_onnx)]
    done = subprocess.run([*command, str(photos)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "set()"
    assert done.stdout.count("\n") == 5
    reading, writing = os.pipe()
    os.close(reading)
    pipes = {"stdout": writing, "stderr": subprocess.PIPE}
    broken = subprocess.run([*command, str(photos)], text=True, cwd=tmp_path, **pipes)  # type: ignore[call-overload]
    os.close(writing)
    assert (broken.returncode, broken.stderr) == (141, "set()\n")
