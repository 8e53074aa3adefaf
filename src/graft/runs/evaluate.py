"""The evaluation of a run, kept in its folder: on its own test images, on others, or on corrupted
ones.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graft.config.names import file_word, shortened
from graft.config.overrides import PLACES, key_of, path_of, place, quote_paths
from graft.config.resolved import moved
from graft.config.words import did_you_mean, plural
from graft.runs.open import checkpoint_path, read_checkpoint, read_overrides, read_run
from graft.runs.other_data import read_alike, with_data
from graft.storage.disk import write_atomically

if TYPE_CHECKING:
    from graft.data.datamodule import TransferDataModule
    from graft.data.datasets import ImageDataset
    from graft.data.items import SplitRecord
    from graft.evaluation.evaluator import Evaluator


@dataclass(frozen=True)
class Settings:
    """What `graft eval` was asked for.

    Args:
        ckpt: "best" or "last" of the run's last stage, or a file.
        places: overrides that say where the run's own data lies now: data.root, paths.*.
        data: a data group's name and overrides of it, or a folder and such overrides; empty: the
            run's own.
        mirror: evaluate the mean features of an image and its mirror image.
        corruptions: names of those to corrupt the images by; empty: all; None: none.
        severities: of these.
        mixed: all corruptions of a severity as one shuffled set of images to adapt to.
        adapt: to the images, without their labels: "adabn", "tent", or "tent-continual", which
            goes on from one corruption to the next. The batch size then counts.
        limit: evaluate about this many images, the same part of each class.
        batch_size: if other than the run's; it changes no result, only what fits into memory.
    """

    ckpt: str = "best"
    places: Sequence[str] = ()
    data: Sequence[str] = ()
    mirror: bool = False
    corruptions: Sequence[str] | None = None
    severities: Sequence[int] = (1, 2, 3, 4, 5)
    mixed: bool = False
    adapt: str | None = None
    limit: int | None = None
    batch_size: int | None = None

    @property
    def name(self) -> str:
        """Of the result's files: other settings have other names, other folders of one name too."""
        words = ["corruptions" if self.corruptions is not None else "data" if self.data else "test"]
        words += [word.rpartition("=")[2].rstrip("/").rpartition("/")[2] for word in self.data]
        words += [Path(self.ckpt).stem] if self.ckpt != "best" else []
        words += [self.adapt] if self.adapt else []
        words += ["mixed"] if self.mixed else []
        words += ["mirror"] if self.mirror else []
        words += [f"limit{self.limit}"] if self.limit else []
        name = shortened("_".join(map(file_word, words)))
        given = [*self.data, *([self.ckpt] if self.ckpt not in ("best", "last") else [])]
        narrowed = [*(self.corruptions or ())]
        if tuple(self.severities) != Settings.severities:
            narrowed += map(str, self.severities)
        if self.adapt and self.batch_size:  # on which Tent's result depends
            narrowed.append(f"batch_size={self.batch_size}")
        exact = [*map(_with_whole_path, given), *narrowed]
        if narrowed or len(exact) > 1 or any("/" in word for word in exact):
            name += f"-{hashlib.sha256(chr(0).join(exact).encode()).hexdigest()[:6]}"
        return name


def _with_whole_path(word: str) -> str:
    """Of what there is in the file system, as `word` or as the value of an override."""
    key, equals, value = word.rpartition("=")
    path = place(value)
    return f"{key}{equals}{path.resolve()}" if path.exists() else word


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
    from graft.evaluation.details import details
    from graft.evaluation.evaluator import Evaluator
    from graft.reporting import report
    from graft.runs.startup import quiet_libraries
    from graft.tasks.pretraining import require_outputs
    from graft.tasks.scores import scores
    from graft.training.adabn import require_batch_norms
    from graft.training.trainer import describe_device
    from graft.transforms.corruptions import CORRUPTIONS

    for name in settings.corruptions or ():
        if name not in CORRUPTIONS:
            known = did_you_mean(name, CORRUPTIONS) or f": there are {', '.join(CORRUPTIONS)}"
            raise ValueError(f"--corruptions {name}: unknown{known}")
    quiet_libraries()
    started = time.perf_counter()
    checkpoint = read_checkpoint(path)
    if settings.data:
        read_alike(config["data"]["source"], own_source, checkpoint["graft"].get("value_range"))
    record = SplitRecord.read(run)
    evaluator = Evaluator.build(config, checkpoint, path, None if settings.data else record)
    require_outputs(evaluator.module.task, run)
    evaluator.module.backbone.mirror |= settings.mirror
    if settings.adapt:
        require_batch_norms(evaluator.module.backbone, f"--adapt {settings.adapt}")
        evaluator.adapt, _, continual = settings.adapt.partition("-")
        evaluator.continual = bool(continual)
    datamodule = evaluator.datamodule
    datamodule.eval_batch_size = settings.batch_size or datamodule.eval_batch_size
    test, positions = evaluator.test_images(settings.limit)
    stage, epoch = stage_and_epoch(checkpoint)
    device = describe_device(evaluator.options)
    where = settings.data[0] if settings.data else "the run's own test split"
    report.say(f"run       {run}" + (f" (status {status})" if status != "done" else ""))
    report.say(f"weights   {path.name} of stage {stage}, epoch {epoch}")
    report.say(f"data      {where}: {plural(len(test), datamodule.run_inputs.rows[:-1])}")
    said = [*notes(datamodule, record, other=bool(settings.data))]
    for note in said:
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
        "notes": said,
    }
    if test.targets is not None:
        result |= measured_outputs(evaluator, test, positions, file, settings)
    elif settings.corruptions is not None:
        result["metrics"] = scores(evaluator.predictions(test), datamodule.num_classes)
        found = evaluator.corruptions(
            test,
            settings.corruptions or [*CORRUPTIONS],
            settings.severities,
            mixed=settings.mixed,
        )
        accuracies = [values["acc"] for rows in found.values() for values in rows.values()]
        result |= {"corruptions": found, "mean_acc": float(np.mean(accuracies))}
    else:
        predict = evaluator.adapted_predictions if settings.adapt else evaluator.predictions
        predictions = predict(test)
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
    (report.print_corruptions if settings.corruptions is not None else report.print_scores)(result)
    report.say(f"kept in   {file}")
    return result


def stage_and_epoch(checkpoint: dict[str, Any]) -> tuple[str, int]:
    """Which stage's, and after how many epochs: 0 of a solver."""
    # Not its "epoch", which counts differently within an epoch and at its end.
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]["started"]
    return checkpoint["graft"]["stage"], progress


def measured_outputs(
    evaluator: Evaluator,
    test: ImageDataset,
    positions: np.ndarray,
    file: Path,
    settings: Settings,
) -> dict[str, Any]:
    """Metrics of a task without classes, with intervals; its outputs are kept beside `file`."""
    if settings.corruptions is not None or settings.adapt:
        option = "--corruptions" if settings.corruptions is not None else "--adapt"
        raise ValueError(f"{option} is for classes, and this run has none")
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


def compressed(index: np.ndarray, **values: np.ndarray) -> bytes:
    """An .npz file with a row for each image; `index`: its position in the whole test split."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, index=index, **values)  # type: ignore[arg-type]
    return buffer.getvalue()
