"""`graft eval`: test metrics of a run, on its own test images, on others, or on corrupted ones."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graft.commands import Parser
from graft.config.names import file_word, shortened
from graft.config.overrides import (
    PLACES,
    config_dir,
    config_folders,
    key_of,
    path_of,
    place,
    quote_paths,
    search_path,
)
from graft.config.resolved import CONFIGS, check, explain, moved
from graft.config.words import plural
from graft.runs.open import checkpoint_path, read_checkpoint, read_overrides, read_run
from graft.runs.trust import add_trust
from graft.storage.disk import write_atomically

if TYPE_CHECKING:
    from graft.data.datamodule import TransferDataModule
    from graft.data.datasets import ImageDataset
    from graft.data.items import SplitRecord
    from graft.evaluation.evaluator import Evaluator
    from graft.tasks.scores import Predictions


@dataclass(frozen=True)
class Settings:
    """What `graft eval` was asked for.

    Args:
        ckpt: "best" or "last" of the run's last stage, or a file.
        places: overrides that say where the run's own data lies now: data.root, paths.*.
        data: a data group's name and overrides of it, or a folder and such overrides; empty: the
            run's own.
        mirror: evaluate the mean features of an image and its mirror image.
        corruptions: corrupt the images, in each way and severity.
        limit: evaluate about this many images, the same part of each class.
        batch_size: if other than the run's; it changes no result, only what fits into memory.
    """

    ckpt: str = "best"
    places: Sequence[str] = ()
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
        name = shortened("_".join(map(file_word, words)))
        given = [*self.data, *([self.ckpt] if self.ckpt not in ("best", "last") else [])]
        exact = [_with_whole_path(word) for word in given]
        if len(exact) > 1 or any("/" in word for word in exact):
            name += f"-{hashlib.sha256(chr(0).join(exact).encode()).hexdigest()[:6]}"
        return name


def _with_whole_path(word: str) -> str:
    """Of what there is in the file system, as `word` or as the value of an override."""
    key, equals, value = word.rpartition("=")
    path = place(value)
    return f"{key}{equals}{path.resolve()}" if path.exists() else word


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
        action="store_true",
        help="noise, blur, contrast, brightness and JPEG, at severities 1 to 5",
    )
    option("--mirror", action="store_true", help="mean features of an image and its mirror image")
    add_trust(parser)
    option("--limit", type=_positive, metavar="N", help="about N images, stratified")
    option("--batch-size", type=_positive, metavar="N", help="default: the run's")
    settings = vars(parser.parse_intermixed_args(arguments))
    folder = settings.pop("config_dir")
    if folder and not settings["data"]:
        parser.error("--config-dir is for --data")
    try:
        settings["data"] = [*settings["data"], *config_dir(folder)]
        evaluate(settings.pop("run"), Settings(**settings))
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
    own_source = config["data"]["source"]
    if settings.data:
        config = with_data(config, settings.data, read_overrides(run))
    for override in quote_paths(settings.places):
        if not PLACES.fullmatch(key_of(override)):
            raise ValueError(
                f"{override}: graft eval takes data.root=, paths.data= and paths.cache= for the "
                "run's own data, and other data by --data"
            )
        config = moved(config, key_of(override), path_of(override))
    file = run / "eval" / f"{settings.name}.json"
    file.parent.mkdir(exist_ok=True)  # before the work, not after it

    from graft.data.items import SplitRecord
    from graft.evaluation.evaluator import Evaluator
    from graft.reporting import report
    from graft.runs.startup import quiet_libraries
    from graft.tasks.scores import scores
    from graft.training.trainer import describe_device

    quiet_libraries()
    started = time.perf_counter()
    checkpoint = read_checkpoint(path)
    if settings.data:
        read_alike(config["data"]["source"], own_source, checkpoint["graft"].get("value_range"))
    record = SplitRecord.read(run)
    evaluator = Evaluator.build(config, checkpoint, path, None if settings.data else record)
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
    report.say(f"data      {where}: {plural(len(test), 'image')}")
    for note in notes(datamodule, record, other=bool(settings.data)):
        report.say(f"note      {note}")
    report.say(f"device    {device}")

    whole = run.resolve()
    result = {
        "settings": {**vars(settings), "data": list(settings.data)},
        "checkpoint": str(path.relative_to(whole) if path.is_relative_to(whole) else path),
        "stage": stage,
        "epoch": epoch,
        "source": config["data"]["source"],
        "images": len(test),
        "classes": datamodule.classes,
        "device": device,
    }
    if test.targets is not None:
        result |= measured_outputs(evaluator, test, positions, file, settings)
    elif settings.corruptions:
        result["metrics"] = scores(evaluator.predictions(test), datamodule.num_classes)
        found = evaluator.corruptions(test)
        accuracies = [values["acc"] for severities in found.values() for values in severities]
        result |= {"corruptions": found, "mean_acc": float(np.mean(accuracies))}
    else:
        predictions = evaluator.predictions(test)
        result["metrics"] = scores(predictions, datamodule.num_classes)
        result |= details(predictions, datamodule.classes)
        kept = compressed(
            positions[predictions.index.numpy()],
            label=predictions.label.numpy().astype(np.int32),
            prediction=predictions.prediction.numpy().astype(np.int32),
            confidence=predictions.confidence.numpy(),
        )
        write_atomically(file.with_suffix(".npz"), kept)
    result["seconds"] = round(time.perf_counter() - started, 1)
    write_atomically(file, json.dumps(result, indent=1) + "\n")
    (report.print_corruptions if settings.corruptions else report.print_scores)(result)
    report.say(f"kept in   {file}")
    return result


def measured_outputs(
    evaluator: Evaluator,
    test: ImageDataset,
    positions: np.ndarray,
    file: Path,
    settings: Settings,
) -> dict[str, Any]:
    """Metrics of a task without classes, with intervals; its outputs are kept beside `file`."""
    if settings.corruptions:
        raise ValueError("--corruptions knows accuracies alone, and this run has no classes")
    from graft.evaluation.bootstrap import intervals

    found, task = evaluator.outputs(test), evaluator.module.task.cpu()
    index = positions[found.index.numpy()]
    kept = compressed(index, output=found.outputs.numpy(), target=found.target.numpy())
    write_atomically(file.with_suffix(".npz"), kept)
    return {
        "metrics": task.scores(found.outputs, found.target),
        "intervals": intervals(task, found.outputs, found.target),
    }


def notes(
    datamodule: TransferDataModule, record: SplitRecord | None, *, other: bool
) -> Iterator[str]:
    """What the result's reader should know of its images.

    Args:
        record: the run's.
        other: whether they are others than the run's own.
    """
    test = datamodule.splits["test"]
    if changed := datamodule.changes.get("test"):
        yield f"the data has changed since: {changed}"
    if record is None:
        yield "this run did not record its images: if the data has changed since, its test split"
        yield "is another one, and may hold images that it was trained on"
    elif other and (seen := record.trained_on(test)):
        yield f"this run was trained on {seen:,} of these images"
    absent = sorted({*range(datamodule.num_classes)} - {*test.labels.tolist()})
    if absent and test.targets is None:
        from graft.data.splits import few

        names = few([datamodule.classes[label] for label in absent])
        yield f"no images of {len(absent)} of {datamodule.num_classes} classes: {names}"


def with_data(
    config: dict[str, Any], data: Sequence[str], command: Sequence[str] = ()
) -> dict[str, Any]:
    """A run's config with another source of images: their size and batches stay the run's.

    Args:
        data: see `Settings`.
        command: the run's overrides, whose folders of configs are used only if given in `data`.
    """
    from hydra import compose, initialize_config_dir

    name, *given = data
    overrides = quote_paths(given)
    folders = [CONFIGS, *config_folders(overrides)]
    options = {path.stem for folder in folders for path in (folder / "data").glob("*.yaml")}
    groups = sorted(options - {"base"})
    if name in groups:
        overrides.insert(0, f"data={name}")
    elif place(name).is_dir():
        overrides = ["data=image_folder", "data.root=below", *overrides]
    else:
        hint = "".join(
            f"; to look where the run did, add {shlex.quote(o)}" for o in search_path(command)
        )
        raise ValueError(f"--data {name}: neither a folder nor one of {', '.join(groups)}{hint}")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = check(compose("train", overrides))
    source = composed["data"]["source"]
    if name not in groups:
        source |= {
            "_target_": "graft.data.sources.folder.EvalFolder",
            "root": str(place(name)),
        }
    keys = [override.lstrip("+").partition("=")[0].split(".") for override in overrides]
    changed = {key[1]: composed["data"][key[1]] for key in keys if key[0] == "data" and key[1:]}
    # Its training images are not used: they need not be as many as the run's.
    any_number = {"batch_size": 1, "train_fraction": 1.0, "shots_per_class": None}
    own = {**config["data"], **changed, **any_number, "source": source}
    return {**config, "data": own, "paths": composed["paths"]}


def read_alike(
    source: dict[str, Any], own: Mapping[str, Any], value_range: Sequence[float] | None
) -> None:
    """Let other images be read as those that a run was trained on, where nothing else is said.

    Args:
        source, own: arguments of the other images' source, and of the run's.
        value_range: what the run found black and white.
    """
    if source.get("background", ...) is None:
        source["background"] = own.get("background")
    if source.get("value_range", ...) is None and value_range is not None:
        source["value_range"] = list(value_range)


def details(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """95 % intervals of the metrics, accuracy of each class (its recall) and what it is most often
    taken for, confusion matrix: plain values.

    The matrix is null if it has more classes than a picture; the .npz file has all predictions.
    """
    from graft.reporting.pictures import SHOWN
    from graft.tasks.scores import (
        class_counts,
        confusion_matrix,
        intervals,
        lowest_recall,
        most_taken_for,
    )

    bounds = intervals(predictions, len(classes))
    taken = most_taken_for(predictions)
    counts, right, _ = class_counts(predictions, len(classes))
    per_class = {}
    for i, name in enumerate(classes):
        images = int(counts[i])
        other, count = taken.get(i, (0, 0))
        per_class[name] = {
            "acc": float(right[i] / images) if images else None,
            "interval": bounds["per_class"][i].tolist() if images else None,
            "images": images,
            "taken_for": [classes[other], count] if count else None,
        }
    few = len(classes) <= SHOWN
    return {
        "intervals": {name: bounds[name].tolist() for name in ("acc", "macro_f1", "nll")},
        "recall": lowest_recall(predictions, classes),
        "per_class": per_class,
        "confusion": confusion_matrix(predictions, len(classes)).tolist() if few else None,
    }


def compressed(index: np.ndarray, **values: np.ndarray) -> bytes:
    """An .npz file with a row for each image; `index`: its position in the whole test split."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, index=index, **values)  # type: ignore[arg-type]
    return buffer.getvalue()
