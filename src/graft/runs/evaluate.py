"""`graft eval`: test metrics of a run, on its own test images, on others, or on corrupted ones."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graft.config import CONFIGS, check, explain
from graft.runs.folder import write_atomically
from graft.runs.open import checkpoint_path, read_checkpoint, read_run

if TYPE_CHECKING:
    from graft.scores import Predictions


@dataclass(frozen=True)
class Settings:
    """What `graft eval` was asked for.

    Args:
        ckpt: "best" or "last" of the run's last stage, or a file.
        data: a data group's name and overrides of it, or a folder and such overrides; empty: the
            run's own.
        mirror: evaluate the mean features of an image and its mirror image.
        corruptions: corrupt the images, in each way and severity.
        limit: evaluate about this many images, the same part of each class.
        batch_size: if other than the run's; it changes no result, only what fits into memory.
    """

    ckpt: str = "best"
    data: Sequence[str] = ()
    mirror: bool = False
    corruptions: bool = False
    limit: int | None = None
    batch_size: int | None = None

    @property
    def name(self) -> str:
        """Of the result's files: other settings have other names, other folders of one name too."""
        words = ["corruptions" if self.corruptions else "data" if self.data else "test"]
        words += [word.rpartition("=")[2].rstrip("/").rpartition("/")[2] for word in self.data]
        words += [Path(self.ckpt).stem] if self.ckpt != "best" else []
        words += ["mirror"] if self.mirror else []
        words += [f"limit{self.limit}"] if self.limit else []
        name = re.sub(r"[^\w.-]+", "-", "_".join(words))
        given = [*self.data, *([self.ckpt] if self.ckpt not in ("best", "last") else [])]
        exact = [_with_whole_path(word) for word in given]
        if len(exact) > 1 or any("/" in word for word in exact):
            name += f"-{hashlib.sha256(chr(0).join(exact).encode()).hexdigest()[:6]}"
        return name


def _with_whole_path(word: str) -> str:
    """Of what there is in the file system, as `word` or as the value of an override."""
    key, equals, value = word.rpartition("=")
    path = Path(value).expanduser()
    return f"{key}{equals}{path.resolve()}" if path.exists() else word


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="graft eval",
        description="Test metrics of a run, kept in RUN/eval/ as JSON, with predictions as .npz.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    option = parser.add_argument
    option(
        "--data",
        nargs="+",
        default=[],
        metavar=("OTHER", "OVERRIDE"),
        help="other images of the same classes: a data group and overrides of it (cifar10 "
        "data.root=FOLDER), or a folder of class folders, with or without test/ around them",
    )
    option("--ckpt", default="best", help="best (default) or last of the last stage, or a file")
    option(
        "--corruptions",
        action="store_true",
        help="noise, blur, contrast, brightness and JPEG, at severities 1 to 5",
    )
    option("--mirror", action="store_true", help="mean features of an image and its mirror image")
    option("--limit", type=_positive, metavar="N", help="about N images, stratified")
    option("--batch-size", type=_positive, metavar="N", help="default: the run's")
    settings = vars(parser.parse_args(arguments))
    try:
        evaluate(settings.pop("run"), Settings(**settings))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"graft: error: {explain(error)}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number above 0")
    return int(text)


def evaluate(run: Path, settings: Settings = Settings()) -> dict[str, Any]:
    """Evaluate a run; keep the result as `RUN/eval/NAME.json`, predictions on images that are not
    corrupted as `NAME.npz`.

    Raises:
        ValueError: no run folder, an unusable checkpoint, or data of other classes.
        OSError: the data can't be read, or the run folder not be written to.
    """
    config, status = read_run(run)
    path = checkpoint_path(run, config, status, settings.ckpt)
    if settings.data:
        config = with_data(config, settings.data)
    file = run / "eval" / f"{settings.name}.json"
    file.parent.mkdir(exist_ok=True)  # before the work, not after it

    from graft import report
    from graft.evaluator import Evaluator
    from graft.scores import scores
    from graft.startup import quiet_libraries
    from graft.trainer import describe_device

    quiet_libraries()
    started = time.perf_counter()
    checkpoint = read_checkpoint(path)
    evaluator = Evaluator.build(config, checkpoint, path)
    evaluator.module.backbone.mirror |= settings.mirror
    datamodule = evaluator.datamodule
    datamodule.eval_batch_size = settings.batch_size or datamodule.eval_batch_size
    test, positions = evaluator.test_images(settings.limit)
    stage = checkpoint["graft"]["stage"]
    # Not its "epoch", which counts differently within an epoch and at its end; 0 of a solver.
    epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]["started"]
    device = describe_device(evaluator.options)
    where = settings.data[0] if settings.data else "the run's own test split"
    report.say(f"run       {run}" + (f" (status {status})" if status != "done" else ""))
    report.say(f"weights   {path.name} of stage {stage}, epoch {epoch}")
    report.say(f"data      {where}: {len(test):,} images")
    report.say(f"device    {device}")

    predictions = evaluator.predictions(test)
    result = {
        "settings": {**vars(settings), "data": list(settings.data)},
        "checkpoint": str(path.relative_to(run) if path.is_relative_to(run) else path),
        "stage": stage,
        "epoch": epoch,
        "source": config["data"]["source"],
        "images": len(test),
        "classes": datamodule.classes,
        "device": device,
        "metrics": scores(predictions, datamodule.num_classes),
    }
    if settings.corruptions:
        found = evaluator.corruptions(test)
        accuracies = [values["acc"] for severities in found.values() for values in severities]
        result |= {"corruptions": found, "mean_acc": float(np.mean(accuracies))}
    else:
        result |= details(predictions, datamodule.classes)
        write_atomically(file.with_suffix(".npz"), compressed(predictions, positions))
    result["seconds"] = round(time.perf_counter() - started, 1)
    write_atomically(file, json.dumps(result, indent=1) + "\n")
    (report.print_corruptions if settings.corruptions else report.print_scores)(result)
    report.say(f"kept in   {file}")
    return result


def with_data(config: dict[str, Any], data: Sequence[str]) -> dict[str, Any]:
    """A run's config with another source of images: their size and batches stay the run's.

    Args:
        data: see `Settings`.
    """
    from hydra import compose, initialize_config_dir

    name, *overrides = data
    groups = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml") if path.stem != "base")
    if name in groups:
        overrides.insert(0, f"data={name}")
    elif Path(name).expanduser().is_dir():
        overrides = ["data=image_folder", "data.root=below", *overrides]
    else:
        raise ValueError(f"--data {name}: neither a folder nor one of {', '.join(groups)}")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = check(compose("train", overrides))
    source = composed["data"]["source"]
    if name not in groups:
        source |= {
            "_target_": "graft.data.folder.EvalFolder",
            "root": str(Path(name).expanduser().absolute()),
        }
    keys = [override.lstrip("+").partition("=")[0].split(".") for override in overrides]
    changed = {key[1]: composed["data"][key[1]] for key in keys if key[0] == "data" and key[1:]}
    # Its training images are not used: they need not be as many as the run's.
    any_number = {"batch_size": 1, "train_fraction": 1.0, "shots_per_class": None}
    own = {**config["data"], **changed, **any_number, "source": source}
    return {**config, "data": own, "paths": composed["paths"]}


def details(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """95 % intervals of the metrics, accuracy of each class, confusion matrix: plain values."""
    from graft.scores import confusion_matrix, intervals

    matrix = confusion_matrix(predictions, len(classes))
    bounds = intervals(predictions, len(classes))
    per_class = {}
    for i, name in enumerate(classes):
        images = int(matrix[i].sum())
        acc = float(matrix[i, i] / images) if images else None
        interval = bounds["per_class"][i].tolist() if images else None
        per_class[name] = {"acc": acc, "interval": interval, "images": images}
    return {
        "intervals": {name: bounds[name].tolist() for name in ("acc", "macro_f1", "nll")},
        "per_class": per_class,
        "confusion": matrix.tolist(),
    }


def compressed(predictions: Predictions, positions: np.ndarray) -> bytes:
    """Predictions as an .npz file; `index` is an image's position in the whole test split."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        index=positions[predictions.index.numpy()],
        label=predictions.label.numpy().astype(np.int32),
        prediction=predictions.prediction.numpy().astype(np.int32),
        confidence=predictions.confidence.numpy(),
    )
    return buffer.getvalue()
