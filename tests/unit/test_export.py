"""An exported model gives what the run gives, for images of any number and size; or is not kept."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import graft
from graft.data.sources.decode import Reading
from graft.deploy import export as exports
from graft.deploy.artefact import OnnxModel, open_model
from graft.deploy.check import compare
from graft.deploy.export import Settings, export, export_backbone
from graft.deploy.files import CONFIG, KEY
from graft.deploy.formats import pack_onnx, pack_program, pack_weights, to_onnx, traced
from graft.deploy.graph import Geometry, Graph
from graft.deploy.model import Deployed, load
from graft.deploy.spec import Spec
from graft.deploy.torch_files import ProgramModel
from graft.evaluation.evaluator import Evaluator
from graft.runs.folder import RunFolder
from graft.runs.startup import quiet_libraries
from graft.runs.train import train
from graft.training.build import build_backbone, build_module
from graft.transforms.prepare import SMALL, Prepare
from graft.transforms.preprocessing import CropMode, Interpolation, Preprocessing
from tests.conftest import TINY, Graft, Train, compose
from tests.unit.test_disk import full

TRANSLATED: list[Any] = []  # the ONNX model that `files` was written from
SIDES = [(32, 32), (24, 40), (9, 5), (1, 1), (64, 64), (70, 100), (96, 65), (3, 120)]


def images(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, 3, height, width), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that a small head can tell apart, so that margins are no accident."""
    quiet_libraries()
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LOGS", "CACHE", "DATA"):
            patch.setenv(f"GRAFT_{name}", str(folder / name))
        config = compose(*TINY, "transfer=linear_probe")
        created = RunFolder.create(folder, "run", config, [])
        created.start()
        train(config, created)
        created.finish("done")
    return created.path


@pytest.fixture(scope="module")
def files(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    found = {kind: folder / f"model.{kind}" for kind in exports.FORMATS}

    def kept(*given: Any) -> onnx.ModelProto:
        TRANSLATED.append(to_onnx(*given))
        return TRANSLATED[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "to_onnx", kept)
        for kind, path in found.items():
            export(run, path, Settings(kind))
    return found


# ------------------------------------------------------------------ geometry


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize", "crop"), [(32, 32), (41, 32), (76, 70)])
def test_the_graph_prepares_images_as_training_does(
    mode: Interpolation, crop_mode: CropMode, resize: int, crop: int
) -> None:
    p = Preprocessing(resize, crop, interpolation=mode, crop_mode=crop_mode)
    geometry, prepare = Geometry(p), Prepare(p)
    for height, width in SIDES:
        x = torch.from_numpy(images(2, height, width))
        a, b = geometry(x), prepare(x)
        levels = ((a - b) / geometry.scale).abs()
        if p.resized(height, width) == (height, width):
            assert torch.equal(a, b)
        elif max(height, width) <= SMALL and mode == "bilinear":
            assert levels.max() < 1e-3
        else:  # sums of 16-bit weights, and a half is rounded up or down
            assert levels.max() < 1.01
            assert (levels > 0.01).float().mean() < 1e-3


# ------------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", exports.FORMATS)
def test_a_file_gives_what_the_run_gives(
    run: Path, files: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_TRUST", "tests,torch.export")
    own, model = load(run, device="cpu"), graft.load(files[kind], device="cpu")
    image = tmp_path / "image.png"
    Image.fromarray(images(1)[0].transpose(1, 2, 0)).save(image)
    (expected,), (found,) = own.predict(image), model.predict(str(image))
    assert found.label == expected.label
    assert found.probability == pytest.approx(expected.probability, rel=1e-4)
    assert model.spec.classes == own.classes
    assert replace(model.spec, provenance={}) == replace(own.spec, provenance={})
    assert model.spec.provenance["exported"]["format"] == kind
    assert model.spec.provenance["metrics"] == own.spec.provenance["metrics"]
    for count, height, width in ((1, 32, 32), (7, 20, 45), (64, 32, 32), (2, 80, 70), (3, 1, 1)):
        x = images(count, height, width)
        a, b = own.predict_rows(x), model.predict_rows(x)
        assert b.dtype == np.float32
        assert b.shape == a.shape
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)
        features = own.embed_rows(x)
        np.testing.assert_allclose(
            model.embed_rows(x), features, rtol=0, atol=1e-4 * abs(features).max()
        )


def test_an_onnx_file_answers_without_torch(files: dict[str, Path]) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from graft.deploy.artefact import open_model\n"
        f"model = open_model(Path({str(files['onnx'])!r}))\n"
        "print(model.predict_rows(np.zeros((2, 3, 8, 9), np.uint8)).shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 4) False"


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_file_does_not_name_folders_of_the_machine(files: dict[str, Path], kind: str) -> None:
    source = Path(exports.__file__).parents[1]
    assert str(source).encode() not in files[kind].read_bytes()


VARIANTS = {
    "multilabel": "task=multilabel backbone.taps=all head.norm=standardize mirror=true",
    "regression": "task=regression head=mlp head.hidden=8 head.norm=batchnorm",
    "cosine": "head=cosine",
}


def untrained(*overrides: str, size: int = 32, outputs: int = 3) -> Deployed:
    config = compose(*TINY, *overrides)
    torch.manual_seed(0)
    backbone = build_backbone(config["backbone"], pretrained=False)
    module = build_module(config, backbone, outputs)
    for parameter in module.head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    form = Preprocessing(size, size)
    names = [f"{i}" for i in range(outputs)]
    spec = Spec(names, module.task.output_kind, form, form, Reading())
    return Deployed(spec, module.backbone, module.head, module.task)


@pytest.mark.parametrize(
    "variant", ["multilabel", "regression", pytest.param("cosine", marks=pytest.mark.slow)]
)
def test_every_task_head_and_option_can_be_exported(variant: str, tmp_path: Path) -> None:
    model = untrained(*VARIANTS[variant].split())
    if variant == "regression":
        model.task.mean.copy_(torch.tensor([1.0, 20.0, -3.0]))  # type: ignore[operator]
    path = tmp_path / "model.pt2"
    path.write_bytes(pack_program(traced(Graph(model, channels_last=True)))(model.spec))
    comparison = compare(model, ProgramModel(path, "cpu", trusted=True), images(64))
    assert comparison.passed, comparison
    if model.backbone.mirror:
        model.backbone.mirror = False
        assert not compare(model, ProgramModel(path, "cpu", trusted=True), images(64)).passed


@pytest.mark.parametrize(
    "overrides",
    [
        ["transfer=lora"],
        ["transfer=linear_probe", "head.norm=standardize", "head.grid={lr:[0.01,0.1]}"],
    ],
    ids=["lora", "grid"],
)
def test_adapters_and_grids_are_exported_as_what_they_came_to(
    train_tiny: Train, overrides: list[str], tmp_path: Path
) -> None:
    trained = train_tiny(*overrides)
    out = tmp_path / "model.safetensors"
    export(trained.folder, out, Settings("safetensors"))
    x = images(5)
    expected = load(trained.folder, device="cpu").predict_rows(x)
    assert np.array_equal(open_model(out, device="cpu").predict_rows(x), expected)
    names = {name for name, _ in open_model(out, device="cpu").named_parameters()}  # type: ignore[attr-defined]
    assert not [n for n in names if "parametrizations" in n or "stacked" in n]


# -------------------------------------------------------------- fewer bits


@pytest.mark.parametrize("precision", ["int8", pytest.param("half", marks=pytest.mark.slow)])
def test_fewer_bits_say_what_they_cost(
    run: Path,
    files: dict[str, Path],
    tmp_path: Path,
    graft: Graft,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    out = tmp_path / "model.onnx"
    if precision == "int8":  # without the seconds of another translation
        monkeypatch.setattr(exports, "traced", lambda graph: None)
        monkeypatch.setattr(exports, "to_onnx", lambda program, spec: TRANSLATED[0])
    done = graft("export", str(run), "--out", str(out), f"--{precision}")
    assert done.returncode == 0, done.stderr
    model = OnnxModel(out, "cpu")
    measured = model.spec.provenance["measured"]
    assert measured.keys() == {"images", "float", precision}
    for name in ("float", precision):
        assert f"acc {measured[name]['acc']:.2%}" in done.stdout
    x = images(20)
    outputs = model.predict_rows(x)
    assert outputs.dtype == np.float32
    difference = abs(outputs - OnnxModel(files["onnx"], "cpu").predict_rows(x)).max()
    assert 0 < difference < 0.1
    nodes = onnx.load(out).graph
    if precision == "int8":
        assert any(node.op_type == "DequantizeLinear" for node in nodes.node)
        first = next(node for node in nodes.node if node.op_type == "QuantizeLinear")
        made_by = {o: node.op_type for node in nodes.node for o in node.output}
        assert made_by[first.input[0]] in ("Mul", "Div")  # of the normalisation, not before it
    else:
        assert out.stat().st_size < 0.8 * files["onnx"].stat().st_size


# ------------------------------------------------------------------ refusals


def test_a_file_that_differs_from_the_run_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(model: Deployed, config: dict[str, Any], **options: Any) -> Any:
        packed = pack_weights(model, config, **options)
        with torch.no_grad():
            next(model.backbone.parameters()).mul_(1.01)
        return packed

    monkeypatch.setattr(exports, "pack_weights", other)
    with pytest.raises(ValueError, match=r"differs from the run's by more than 0\.0001"):
        export(run, tmp_path / "model.safetensors", Settings("safetensors"))
    assert not [*tmp_path.glob("*model*")]


def test_what_exists_is_replaced_only_when_told(run: Path, tmp_path: Path, graft: Graft) -> None:
    out = tmp_path / "model.safetensors"
    out.write_text("mine")
    done = graft("export", str(run), "--out", str(out))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "exists: add --force" in done.stderr
    assert out.read_text() == "mine"
    assert graft("export", str(run), "--out", str(out), "--force").returncode == 0
    assert open_model(out, device="cpu").spec.classes


def test_a_full_disk_leaves_what_was_there(run: Path, tmp_path: Path, graft: Graft) -> None:
    out = tmp_path / "model.safetensors"
    out.write_text("mine")
    full(out)
    done = graft("export", str(run), "--out", str(out), "--force")
    assert done.returncode == 1
    assert f"graft: error: cannot write {out}: the disk is full" in done.stderr
    assert out.read_text() == "mine"
    assert [p.name for p in tmp_path.glob("*model*")] == [out.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "model.tflite"], "must end in .onnx, .pt2, .safetensors"),
        (["--out", "none/model.onnx"], "there is no folder"),
        (["--out", "model.pt2", "--int8"], "--int8 is for --format onnx"),
        (["--format", "onnx", "--out", "model.pt2"], "must end in .onnx"),
        (["--backbone", "b.safetensors", "--half"], "--half and --backbone are two things"),
        (["--card", "card", "--format", "onnx"], "--format and --card are two things"),
        (["--license", "mit"], "--license is for --card"),
        (["--half", "--int8"], "not allowed with"),
        (["--ckpt", "none.ckpt"], "no such file"),
    ],
)
def test_wrong_arguments_are_one_line(
    run: Path, graft: Graft, arguments: list[str], message: str
) -> None:
    done = graft("export", str(run), *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("graft: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def foreign_onnx(path: Path, metadata: dict[str, str]) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [value], [other]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=10,
    )
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def test_files_of_others_and_damaged_ones_are_one_clear_line(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opening(name: str, content: bytes | None = None) -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=name.partition(".")[0]) as error:
            open_model(path, device="cpu")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such run folder or file" in opening("none.onnx")
    assert "neither a run folder nor a file of .onnx, " in opening("cat.jpg", b"\xff\xd8")
    for kind, path in files.items():
        content = path.read_bytes()
        assert "is empty" in opening(f"empty.{kind}", b"")
        assert "is damaged" in opening(f"torn.{kind}", content[: len(content) // 2])
        assert "is damaged" in opening(f"text.{kind}", b"hello, this is no model at all")
    foreign_onnx(tmp_path / "foreign.onnx", {})
    assert "was not made by graft export" in opening("foreign.onnx")
    spec = json.loads(OnnxModel(files["onnx"], "cpu").spec.to_json())
    foreign_onnx(tmp_path / "inputs.onnx", {"graft": json.dumps(spec)})
    assert "its inputs and outputs are not those of graft's" in opening("inputs.onnx")
    foreign_onnx(tmp_path / "newer.onnx", {"graft": json.dumps({**spec, "graft_version": 99})})
    assert "written by a newer graft" in opening("newer.onnx")
    assert "can run code" in opening("model.pt2", files["pt2"].read_bytes())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'graft[export]'" in opening("a.onnx", files["onnx"].read_bytes())


def test_a_weights_file_runs_no_code_that_it_names(files: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(files["safetensors"])
    with safe_open(files["safetensors"], "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata[CONFIG])
    config["head"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'ran'}"}
    path = tmp_path / "hostile.safetensors"
    save_file(state, path, {KEY: metadata[KEY], CONFIG: json.dumps(config)})
    with pytest.raises(ValueError, match=r"head._target_=os.system is not run"):
        open_model(path, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_without_its_data_a_model_is_checked_on_random_images(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: Any) -> None:
        raise FileNotFoundError("no folder /photos")

    monkeypatch.setattr(Evaluator, "build", gone)
    export(run, tmp_path / "model.safetensors", Settings("safetensors"))
    assert (
        "on random images: the run's data is not at hand: no folder /photos"
        in capfd.readouterr().out
    )
    with pytest.raises(ValueError, match="--int8 is calibrated on training images"):
        export(run, tmp_path / "model.onnx", Settings("onnx", precision="int8"))


# ------------------------------------------------------------------ backbone


def test_a_backbone_of_its_own_starts_a_next_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "backbone.safetensors"
    export_backbone(run, out)
    expected = load(run, device="cpu").backbone
    for weights in (out, run):
        config = compose(*TINY, f"backbone.weights={weights}")
        backbone = build_backbone(config["backbone"])
        assert backbone.preprocessing == expected.preprocessing
        for name, value in expected.state_dict().items():
            assert torch.equal(backbone.state_dict()[name], value), name


# ------------------------------------------------------------------ families


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("convnext_tiny", 32), ("efficientnet_b0", 32), ("mobilenet_v3_large", 32),
        ("regnet_y_400mf", 32), ("resnet18", 32), ("squeezenet1_1", 32), ("swin_t", 32),
        ("timm backbone.model=vit_tiny_patch16_224", 224),
        ("timm backbone.model=tf_efficientnet_lite0", 32),
    ],
)  # fmt: skip
def test_every_family_exports_to_onnx_and_pt2(name: str, size: int, tmp_path: Path) -> None:
    tiny = [o for o in TINY if not o.startswith("backbone.")]
    words = f"backbone={name} backbone.weights=null".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "TINY", tiny)
        model = untrained(*words, size=size, outputs=4)
    onnx_file, program_file = tmp_path / "model.onnx", tmp_path / "model.pt2"
    onnx_file.write_bytes(pack_onnx(to_onnx(traced(Graph(model)), model.spec))(model.spec))
    program_file.write_bytes(pack_program(traced(Graph(model, channels_last=True)))(model.spec))
    x = images(8 if size > 32 else 64, 40, 40)
    for exported in (OnnxModel(onnx_file, "cpu"), ProgramModel(program_file, "cpu", trusted=True)):
        comparison = compare(model, exported, x)
        print(f"{name} {type(exported).__name__} {comparison}")
        assert comparison.passed, comparison
