"""A run's model as one file that takes raw images, checked against the run before it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graft import __version__
from graft.config.resolved import explain
from graft.config.words import plural
from graft.data.datamodule import TransferDataModule
from graft.data.items import SplitRecord
from graft.deploy.artefact import OPEN
from graft.deploy.check import IMAGES, SCORED, TOLERANCE, compare, measure, some
from graft.deploy.formats import (
    Pack,
    pack_backbone,
    pack_onnx,
    pack_program,
    pack_weights,
    to_onnx,
    traced,
)
from graft.deploy.graph import Graph
from graft.deploy.model import Deployed, load
from graft.deploy.quantised import quantised
from graft.deploy.spec import Model, Spec
from graft.deploy.torch_files import ProgramModel
from graft.evaluation.evaluator import Evaluator
from graft.models.weights import WeightsFile
from graft.reporting import report
from graft.runs.open import checkpoint_path, read_checkpoint, read_run
from graft.storage.disk import readable, written_beside

FORMATS = ("onnx", "pt2", "safetensors")


@dataclass(frozen=True)
class Settings:
    """What `graft export` was asked for.

    Args:
        format: of `FORMATS`.
        ckpt, mirror: see `model.load`.
        precision: "float", "half" (16 bits) or "int8".
    """

    format: str = "onnx"
    ckpt: str = "best"
    mirror: bool = False
    precision: str = "float"


def export(run: Path, out: Path, settings: Settings) -> Spec:
    """Write `out`, unless it differs from the run's model; returns the description in it.

    Raises:
        ValueError: no run folder, an unusable checkpoint, a model that cannot be exported or that
            gives something else once it is.
        OSError: the file cannot be written.
    """
    config, status = read_run(run)
    model = load(run, settings.ckpt, mirror=settings.mirror, device="cpu")
    made = {"graft": __version__, "format": settings.format, "precision": settings.precision}
    spec = replace(model.spec, provenance={**model.spec.provenance, "exported": made})
    report.say(f"run       {run} (status {status}), {spec.provenance['checkpoint']}")
    data = own_data(run, config, settings.ckpt)
    if settings.precision == "int8" and isinstance(data, str):
        raise ValueError(f"--int8 is calibrated on training images, and {data}")
    images = check_images(data, spec)
    packs = _packs(model, config, settings, data)
    if settings.precision != "float":
        with TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{i}{out.suffix}" for i in range(2)]
            for path, pack in zip(paths, packs, strict=True):
                path.write_bytes(pack(spec))
            opened = [_open_own(path, out.suffix) for path in paths]
            _check(model, opened[0], images)
            if not np.isfinite(opened[1].predict_rows(images[:64])).all():
                raise ValueError(f"in {settings.precision} its outputs are not finite numbers")
            spec = _scored(opened, spec, settings.precision, data)
    with written_beside(out, packs[-1](spec)) as path:
        exported = _open_own(path, out.suffix)
        if settings.precision == "float":
            _check(model, exported, images)
        size = path.stat().st_size
    report.say(f"wrote     {out} ({readable(size)})")
    return spec


def export_backbone(run: Path, out: Path, ckpt: str = "best") -> None:
    """The backbone's weights alone, for `backbone.weights=OUT` of a next run.

    Raises:
        ValueError: no run folder, or an unusable checkpoint.
        OSError: the file cannot be written.
    """
    backbone = load(run, ckpt, device="cpu").backbone
    with written_beside(out, pack_backbone(backbone)) as path:
        WeightsFile.read(path)
    report.say(f"wrote     {out}: for backbone.weights={out}")


def _packs(
    model: Deployed, config: dict[str, Any], settings: Settings, data: TransferDataModule | str
) -> list[Pack]:
    """The float model, and what it is reduced to."""
    half = settings.precision == "half"
    if settings.format == "safetensors":
        return [pack_weights(model, config, half=h) for h in ((False, True) if half else (False,))]
    last = settings.format == "pt2"
    programs = [traced(Graph(model, channels_last=last))]
    if half:
        programs.append(traced(Graph(model, torch.half, channels_last=last)))
    if last:
        return [pack_program(program) for program in programs]
    graphs = [to_onnx(program, model.spec) for program in programs]
    if settings.precision == "int8" and not isinstance(data, str):
        calibration, _ = some(data.splits["train"], IMAGES)
        report.say(f"int8      scaled by {plural(len(calibration), 'training image')}")
        graphs.append(quantised(graphs[0], calibration))
    return [pack_onnx(graph) for graph in graphs]


def own_data(run: Path, config: dict[str, Any], ckpt: str) -> TransferDataModule | str:
    """The run's images, or why they are not there."""
    path = checkpoint_path(run, config, "", ckpt)
    try:
        record = SplitRecord.read(run)
        return Evaluator.build(config, read_checkpoint(path), path, record).datamodule
    except Exception as error:  # of any kind: a source's own code runs
        return f"the run's data is not at hand: {explain(error)}"


def check_images(data: TransferDataModule | str, spec: Spec) -> NDArray[np.uint8]:
    if not isinstance(data, str):
        images, _ = some(data.splits["test"], IMAGES)
        report.say(f"check     {plural(len(images), 'image')} of the run's test split")
        return images
    report.say(f"check     on random images: {data}")
    side = spec.stored.resize_size
    return np.random.default_rng(0).integers(0, 256, (IMAGES, 3, side, side), np.uint8)


def _check(model: Model, exported: Model, images: NDArray[np.uint8]) -> None:
    comparison = compare(model, exported, images)
    report.say(f"          {comparison.line(model.spec)}")
    if not comparison.passed:
        raise ValueError(
            f"the exported model differs from the run's by more than {TOLERANCE:g}: nothing is kept"
        )


def _scored(
    opened: Sequence[Model], spec: Spec, precision: str, data: TransferDataModule | str
) -> Spec:
    """Print what the reduced model costs, and keep it in the description."""
    if isinstance(data, str):
        report.say(f"accuracy  not measured: {data}")
        return spec
    images, true = some(data.splits["test"], SCORED)
    results = dict(zip(("float", precision), measure(opened, images, true), strict=True))
    for name, values in results.items():
        (metric, value), (_, speed) = values.items()
        shown = f"{value:.4g}" if metric == "mae" else f"{value:.2%}"
        report.say(f"{name:9} {metric} {shown}, {speed:,.0f} images/s in batches of 64")
    measured = {"images": len(images), **results}
    return replace(spec, provenance={**spec.provenance, "measured": measured})


def _open_own(path: Path, suffix: str) -> Model:
    """What this process has written, on the processor that everyone has."""
    if suffix == ".pt2":
        return ProgramModel(path, "cpu", trusted=True)
    return OPEN[suffix](path, "cpu")
