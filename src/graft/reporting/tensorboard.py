"""What TensorBoard shows besides curves: hyper-parameters, text, pictures, the projector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import OmegaConf
from PIL import Image

from graft.config.names import visible
from graft.config.resolved import leaves
from graft.data.datamodule import TransferDataModule
from graft.data.datasets import Batch
from graft.data.loaders import Steps
from graft.plan.grid import GridRecord
from graft.plan.results import StageResult
from graft.plan.stage import Stage
from graft.reporting import pictures
from graft.reporting.collect import Collect
from graft.reporting.loggers import CSV, TensorBoard
from graft.tasks.scores import Predictions, scores
from graft.transforms.images import ImageInputs

METRICS = ("test/acc", "test/loss", "time/fit_seconds")  # of the HPARAMS tab, and the best one
CHANGED_BY = {
    "epochs": ("max_epochs", "epochs"),
    "train_images": ("train_fraction", "shots_per_class"),
}
INPUTS, MISTAKES = 25, 25  # images of a picture
EMBEDDED = 1000  # test images in the projector
DIMENSIONS = 32  # of a feature there, its first principal components: the browser reads text
SPRITE = 32  # px


def shows_images(config: Mapping[str, Any] | None) -> bool:
    """Whether a config of loggers asks for pictures: the same answer on all ranks."""
    return any(logger and logger.get("images") for logger in (config or {}).values())


def boards(loggers: Sequence[Logger], *, images: bool = False) -> Iterator[TensorBoard]:
    """Those that take text; or pictures too."""
    for logger in loggers:
        if isinstance(logger, TensorBoard) and (logger.images or not images):
            yield logger


def hyperparameters(
    config: Mapping[str, Any],
    choices: Mapping[str, str | None],
    stages: Sequence[Stage],
    datamodule: TransferDataModule,
) -> dict[str, str | float]:
    """The dozen that runs are compared by: of every run the same keys, each of one type.

    lr and weight decay are the last stage's, epochs those of all stages.

    Args:
        choices: the option of each config group.
    """

    def chosen(group: str) -> str:
        node = config[group] or {}
        target = str(node.get("_target_", "")).rpartition(".")[2]
        stages = "+".join(node.get("stages", {}))
        return str(node.get("model") or choices.get(group) or target or stages)

    weights = config["backbone"].get("weights")
    return {
        "backbone": chosen("backbone"),
        "weights": "none" if weights is None else visible(Path(str(weights)).name),
        "head": chosen("head"),
        "transfer": chosen("transfer"),
        "optimizer": chosen("optimizer"),
        "lr": float(stages[-1].lr),
        "weight_decay": float(stages[-1].weight_decay),
        "batch_size": float(datamodule.batch_size),
        "image_size": float(datamodule.run_inputs.size),
        "epochs": float(sum(stage.epochs for stage in stages)),
        "train_images": float(len(datamodule.splits["train"])),
        "seed": float(config["seed"]),
    }


def log_start(
    config: dict[str, Any],
    params: Mapping[str, str | float],
    overrides: Sequence[str],
    loggers: Sequence[Logger],
) -> None:
    keys = {override.lstrip("+~").partition("=")[0].rpartition(".")[2] for override in overrides}
    changed = {name for name in params if keys.intersection(CHANGED_BY.get(name, (name,)))}
    text = "```yaml\n" + OmegaConf.to_yaml(OmegaConf.create(config)) + "```"
    for board in boards(loggers):
        if board.is_new(0):
            metrics = (best_of(config["task"]["monitor"]), *METRICS)
            board.start(params, changed, metrics)
            board.experiment.add_text("config", text, 0)
            board.flush()
    for logger in loggers:
        if not isinstance(logger, TensorBoard):
            logger.log_hyperparams({**dict(leaves(config)), **params})


def log_groups(rows: Sequence[dict[str, Any]], name: str, loggers: Sequence[Logger]) -> None:
    """A stage's table of parameter groups."""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    text = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in cells)
    for board in boards(loggers):
        if board.is_new(board.step_offset):
            board.experiment.add_text(visible(f"groups/{name}"), text, board.step_offset)


def log_grid(record: GridRecord, loggers: Sequence[Logger]) -> None:
    """The accuracies of a grid of heads, at the last step of its stage."""
    for board in boards(loggers, images=True):
        _show(board, "head_grid/val_acc", pictures.heads(record), board.step_offset - 1)


def _show(board: TensorBoard, tag: str, image: Image.Image, step: int) -> None:
    board.experiment.add_image(visible(tag), np.asarray(image), step, dataformats="HWC")


class LogInputs(L.Callback):
    """The first images of a stage as the network gets them, but for the normalisation."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and trainer.current_epoch == 0:
            self._log(trainer, next(iter(batch)) if isinstance(batch, Steps) else batch)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # a solver has no training batches
            train = _datamodule(trainer).splits["train"]
            self._log(trainer, train[list(range(min(INPUTS, len(train))))])

    def _log(self, trainer: L.Trainer, batch: Batch) -> None:
        for board in boards(trainer.loggers, images=True):
            if not board.is_new(board.step_offset):
                continue
            data = _datamodule(trainer)
            if not isinstance(data.inputs, ImageInputs):
                return
            batch = batch.get("train", batch)  # type: ignore[assignment]
            seen = {key: values[:INPUTS].cpu() for key, values in batch.items()}
            if "input" not in batch or batch["input"].dtype == torch.uint8:
                # Of stored features, the images they were computed from.
                images = data.splits["train"][seen["index"].tolist()]
                seen = {**data.transform(images, augment=True), "label": images["label"]}
            pixels = _pixels(seen["input"], data)
            captions = [[(line, "black") for line in lines] for lines in _labels(seen, data)]
            sheet = pictures.tiles(pixels, captions)
            _show(board, f"inputs/{self.stage}", sheet, board.step_offset)


def _pixels(images: torch.Tensor, data: TransferDataModule) -> torch.Tensor:
    """Normalised images -> uint8."""
    p = data.inputs.preprocessing
    mean, std = (torch.tensor(value)[:, None, None] for value in (p.mean, p.std))
    return (255 * (images * std + mean)).round().clamp(0, 255).byte()


def log_restored(
    loggers: Sequence[Logger], data: TransferDataModule, shown: torch.Tensor, step: int
) -> None:
    """A picture of (N, 3, 3, H, W): images, and what a task makes of them."""
    captions = [[(name, "black")] for name in ("image", "corrupted", "restored")] * len(shown)
    for board in boards(loggers, images=True):
        sheet = pictures.tiles(_pixels(shown.flatten(0, 1).float().cpu(), data), captions, 6)
        _show(board, "val/restored", sheet, board.step_offset + step)


def _datamodule(trainer: L.Trainer) -> TransferDataModule:
    return cast("TransferDataModule", trainer.datamodule)  # type: ignore[attr-defined]


def _labels(batch: Batch, data: TransferDataModule) -> list[list[str]]:
    """Lines for each image; of mixed ones, both classes with their weights."""
    classes = data.classes
    if data.splits["train"].targets is not None:
        rows = batch["target"].tolist()
        return [[f"{v:.4g} {n}" for v, n in zip(row[:2], classes, strict=False)] for row in rows]
    if "target" not in batch:
        return [[classes[label]] for label in batch["label"].tolist()]
    weights, labels = batch["target"].topk(2)
    return [
        [f"{weight:.2f} {classes[label]}" for weight, label in zip(*pair, strict=True) if weight]
        for pair in zip(weights.tolist(), labels.tolist(), strict=True)
    ]


def best_of(monitor: str) -> str:
    """The name of the best value of a metric: val/best_acc of val/acc."""
    return monitor.replace("/", "/best_")


def log_end(
    loggers: Sequence[Logger],
    monitor: str,
    datamodule: TransferDataModule,
    collected: Sequence[Collect],
    results: Sequence[StageResult],
) -> None:
    """What the run came to.

    Args:
        collected: of the test, where it is to be shown in pictures.
    """
    seconds = sum(result.seconds for result in results)
    for logger in loggers:
        if not isinstance(logger, CSV):  # it has one row for each step, and run.json has these
            logger.log_metrics(
                {best_of(monitor): results[-1].best_score, "time/fit_seconds": seconds}, 0
            )
    for board in boards(loggers, images=True):
        for collect in collected:
            _show_test(board, datamodule, collect)
    for logger in loggers:
        if isinstance(logger, TensorBoard):
            logger.close()
        else:
            logger.finalize("success")


def _show_test(board: TensorBoard, data: TransferDataModule, collected: Collect) -> None:
    p, step, split = Predictions.joined(collected.parts), board.step_offset, data.splits["test"]
    _show(board, "test/confusion", pictures.confusion(p, data.classes), step)
    ece = scores(p, data.num_classes)["ece"]
    _show(board, "test/calibration", pictures.calibration(p, ece), step)
    wrong = pictures.surest_mistakes(p, MISTAKES)
    if len(wrong) and isinstance(data.inputs, ImageInputs):
        images = split[p.index[wrong].tolist()]["input"]
        _show(board, "test/mistakes", pictures.predicted(images, p, wrong, data.classes), step)
    _show_features(board, data, collected, p)


def _show_features(
    board: TensorBoard, data: TransferDataModule, collected: Collect, p: Predictions
) -> None:
    """The embedding projector: what the head is given, for the first test images."""
    features = torch.cat(collected.features)
    if features.shape[1] > DIMENSIONS:
        with torch.random.fork_rng(devices=[]):
            *_, axes = torch.pca_lowrank(features, min(DIMENSIONS, len(features)))
        features = (features - features.mean(0)) @ axes
    sprites = None
    if isinstance(data.inputs, ImageInputs):
        parts = (data.splits["test"][part.tolist()] for part in collected.index.split(64))
        small = [
            F.interpolate(part["input"].float(), (SPRITE,) * 2, mode="bilinear", antialias=True)
            for part in parts
        ]
        sprites = torch.cat(small) / 255
    at = torch.searchsorted(p.index, collected.index)
    names = [visible(name) for name in data.classes]  # a tab would begin another column
    rows = [
        [names[label], names[prediction], "right" if label == prediction else "wrong"]
        for label, prediction in zip(p.label[at].tolist(), p.prediction[at].tolist(), strict=True)
    ]
    board.experiment.add_embedding(
        features,
        rows,
        sprites,
        board.step_offset,
        "test",
        ["label", "prediction", "outcome"],
    )
