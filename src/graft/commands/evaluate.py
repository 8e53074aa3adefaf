"""`graft eval`: test metrics of a run, on its own test images, on others, or on corrupted ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from graft.commands import Parser, errors_in_one_line
from graft.config.overrides import config_dir
from graft.runs.allowed import add_trust
from graft.runs.evaluate import Settings, evaluate


def main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="graft eval",
        description="Test metrics of a run, kept in RUN/eval/ as JSON, with predictions as .npz.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    option = parser.add_argument
    option(
        "places",
        nargs="*",
        default=[],
        metavar="OVERRIDE",
        help="where its data lies now: data.root=FOLDER, paths.data=FOLDER, paths.cache=FOLDER",
    )
    option(
        "--data",
        nargs="+",
        default=[],
        metavar=("OTHER", "OVERRIDE"),
        help="other images of the same classes: a data group and overrides of it (cifar10 "
        "data.root=FOLDER), or a folder of class folders, with or without test/ around them",
    )
    option("--config-dir", default="", metavar="DIR", help="configs of your own, for --data")
    option("--ckpt", default="best", help="best (default) or last of the last stage, or a file")
    option(
        "--corruptions",
        nargs="*",
        metavar="NAME",
        help="corrupt the images as CIFAR-10-C does: in these ways (gaussian_noise fog ...), or in "
        "all fifteen",
    )
    option(
        "--severities",
        nargs="+",
        type=int,
        choices=range(1, 6),
        default=Settings.severities,
        metavar="N",
        help="of --corruptions, from 1 to 5; default: all five",
    )
    option(
        "--mixed",
        action="store_true",
        help="--adapt to all --corruptions at once, as one shuffled stream of images",
    )
    option(
        "--adapt",
        choices=("adabn", "tent", "tent-continual"),
        help="to the images, without their labels: their BatchNorm statistics (adabn), or also "
        "steps that make predictions surer (tent: anew for each corruption)",
    )
    option("--mirror", action="store_true", help="mean features of an image and its mirror image")
    add_trust(parser)
    option("--limit", type=_positive, metavar="N", help="about N images, stratified")
    option("--batch-size", type=_positive, metavar="N", help="default: the run's")
    settings = vars(parser.parse_intermixed_args(arguments))
    if settings["corruptions"] is None and settings["severities"] != Settings.severities:
        parser.error("--severities is for --corruptions")
    if settings["mixed"] and (settings["corruptions"] is None or not settings["adapt"]):
        parser.error("--mixed is for --corruptions and --adapt together")
    folder = settings.pop("config_dir")
    if folder and not settings["data"]:
        parser.error("--config-dir is for --data")
    with errors_in_one_line():
        settings["data"] = [*settings["data"], *config_dir(folder)]
        evaluate(settings.pop("run"), Settings(**settings))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number above 0")
    return int(text)
