"""`graft export`: a run's model as one file that takes raw images, its backbone's weights alone, or
its model card.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from graft.commands import Parser, errors_in_one_line
from graft.config.overrides import place
from graft.runs.trust import add_trust

FORMATS = ("onnx", "pt2", "safetensors")


def main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="graft export",
        description="A run's model as one file: raw uint8 images (N, 3, H, W) in, probabilities "
        "and features out, classes and origin in its metadata. It is compared with the run's "
        "model on images of its test split before it is kept.",
    )
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="a run folder")
    option(
        "--format",
        choices=FORMATS,
        help="onnx (default): for onnxruntime, without torch; pt2: for torch.export.load; "
        "safetensors: weights, for graft alone",
    )
    option("--out", metavar="FILE", help="default: RUN/export/model.FORMAT")
    option("--force", action="store_true", help="replace a file that exists")
    option("--ckpt", default="best", help="best (default) or last of the last stage, or a file")
    option("--mirror", action="store_true", help="mean features of an image and its mirror image")
    reduced = parser.add_mutually_exclusive_group()
    reduced.add_argument("--half", action="store_true", help="16-bit weights: half the file")
    reduced.add_argument(
        "--int8",
        action="store_true",
        help="8-bit weights and activations, for onnx; calibrated on training images of the run",
    )
    option(
        "--backbone",
        metavar="FILE.safetensors",
        help="the backbone's weights alone, for backbone.weights=FILE of a next run",
    )
    option(
        "--card",
        metavar="FOLDER",
        help="a model card: README.md with the metadata that model hubs read, and its pictures",
    )
    option("--license", metavar="NAME", help="of the model, for --card: apache-2.0, mit, ...")
    add_trust(parser)
    given = parser.parse_args(arguments)
    with errors_in_one_line():
        _export(given)


def _export(given: argparse.Namespace) -> None:
    alone = "card" if given.card else "backbone" if given.backbone else None
    for name in ("format", "out", "mirror", "half", "int8", "backbone"):
        if alone and name != alone and getattr(given, name):
            raise ValueError(f"--{name} and --{alone} are two things: one command for each")
    if given.license and not given.card:
        raise ValueError("--license is for --card")
    if given.card and given.ckpt != "best":
        raise ValueError("--card is of the checkpoint that was tested: leave --ckpt out")
    if given.card:
        from graft.deploy.card import write_card
        from graft.runs.startup import quiet_libraries

        quiet_libraries()
        path = write_card(given.run, place(given.card), license=given.license, force=given.force)
        print(f"wrote     {path}")
        return
    if given.backbone:
        out = _new_file(place(given.backbone), ".safetensors", force=given.force)
    else:
        suffix = Path(given.out).suffix.removeprefix(".") if given.out else "onnx"
        kind = given.format or suffix
        if kind not in FORMATS:
            raise ValueError(f"--out {given.out}: must end in {_listed(FORMATS)}, or give --format")
        if given.int8 and kind != "onnx":
            raise ValueError("--int8 is for --format onnx")
        precision = "half" if given.half else "int8" if given.int8 else "float"
        words = ["model", *([precision] if precision != "float" else [])]
        words += ["mirror"] if given.mirror else []
        default = given.run / "export" / f"{'_'.join(words)}.{kind}"
        out = place(given.out) if given.out else default
        if not given.out and (given.run / "run.json").is_file():
            default.parent.mkdir(exist_ok=True)
        out = _new_file(out, f".{kind}", force=given.force)

    from graft.runs.startup import import_libraries, quiet_libraries

    import_libraries()
    quiet_libraries()
    from graft.deploy.export import Settings, export, export_backbone

    if given.backbone:
        export_backbone(given.run, out, given.ckpt)
    else:
        export(given.run, out, Settings(kind, given.ckpt, given.mirror, precision))


def _new_file(path: Path, suffix: str, *, force: bool) -> Path:
    """Before the work, not after it."""
    if path.suffix != suffix:
        raise ValueError(f"{path}: must end in {suffix}, by which it is opened")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    if path.exists() and not force:
        raise ValueError(f"{path} exists: add --force to replace it")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written to: no permission")
    return path


def _listed(formats: Sequence[str]) -> str:
    return ", ".join(f".{name}" for name in formats)
