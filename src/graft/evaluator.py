"""A trained model, made anew from its config and a checkpoint, and what it predicts."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graft import report
from graft.backbones.weights import load_state
from graft.build import build, build_stages
from graft.collect import Collect
from graft.data.corruptions import CORRUPTIONS, SEVERITIES, CorruptedImages
from graft.data.datamodule import TransferDataModule
from graft.data.datasets import ImageDataset
from graft.data.subset import stratified_fraction
from graft.module import TransferModule
from graft.scores import Predictions, scores
from graft.trainer import make_trainer, trainer_options
from graft.transfer.stages import Stage, StartStage
from graft.transfer.stored import FeatureStore


@dataclass
class Evaluator:
    """A trained model, and how its run tests: the same stored features, precision and batches.

    Args:
        stage, index: the run's last one.
        options: of the trainer.
    """

    module: TransferModule
    datamodule: TransferDataModule
    stage: Stage
    index: int
    cache: Path
    options: dict[str, Any]

    @classmethod
    def build(cls, config: dict[str, Any], checkpoint: dict[str, Any], source: Path) -> Evaluator:
        """The model of `config` with the weights of `checkpoint`, on the data of `config`.

        Pretrained weights are not needed: the checkpoint holds all.

        Args:
            source: where the checkpoint comes from, for error messages.

        Raises:
            ValueError: the data has other classes, or the checkpoint other weights.
        """
        torch.set_float32_matmul_precision("high")  # as in training
        head = {**config["head"], "num_classes": None}
        module, datamodule = build({**config, "head": head}, pretrained=False)
        align_classes(datamodule, checkpoint["graft"]["classes"])
        load_state(module, checkpoint["state_dict"], source=source, label="of the run")
        stages = config["transfer"]["stages"]
        *_, last = stages
        # What acts in training alone: by now adapters are part of the weights.
        kept = {key: value for key, value in stages[last].items() if key not in ("lora", "l2_sp")}
        stage = build_stages({**config, "transfer": {"stages": {**stages, last: kept}}})[-1]
        module.start_stage(stage)
        return cls(
            module,
            datamodule,
            stage,
            len(stages) - 1,
            Path(config["paths"]["cache"]).expanduser(),
            one_device(config["trainer"]),
        )

    def test_images(self, limit: int | None = None) -> tuple[ImageDataset, np.ndarray]:
        """The test split, or about `limit` images of it, and their positions in the whole."""
        test = self.datamodule.splits["test"]
        positions = np.arange(len(test))
        if limit is not None and limit < len(test):
            positions = stratified_fraction(test.labels, limit / len(test), 0)
            test = copy.copy(test)
            test.rows, test.labels = test.rows[positions], test.labels[positions]
        return test, positions

    def predictions(self, dataset: ImageDataset, *, store: bool = True) -> Predictions:
        """store: whether frozen features may be kept, where the run's last stage keeps them."""
        self.datamodule.replace_test(dataset)
        stores = store and self.stage.cache != "off"
        stage = replace(self.stage, cache="auto" if stores else "off")
        new_store = partial(FeatureStore, cache=self.cache, progress=report.PartsBar())
        start, collect = StartStage(stage, self.index, self.datamodule, new_store), Collect()
        trainer = make_trainer(
            stage, [start, collect], options=self.options, callbacks={}, loggers=[]
        )
        trainer.test(self.module, datamodule=self.datamodule, verbose=False)
        if trainer.interrupted:
            raise KeyboardInterrupt
        return Predictions.joined(collect.parts)

    def corruptions(self, test: ImageDataset) -> dict[str, list[dict[str, float]]]:
        """Name of a corruption -> scores at severities 1 to 5."""
        found = {}
        for name in CORRUPTIONS:
            started = time.perf_counter()
            found[name] = [
                scores(
                    self.predictions(CorruptedImages(test, name, severity), store=False),
                    self.datamodule.num_classes,
                )
                for severity in SEVERITIES
            ]
            report.say(f"          {name}: {time.perf_counter() - started:.1f} s")
        return found


def align_classes(datamodule: TransferDataModule, names: Sequence[str]) -> None:
    """Number the classes of the test images as the run did.

    Args:
        names: the run's classes, in its order.

    Raises:
        ValueError: they are not the same; it says which.
    """
    found = datamodule.classes
    lacking = [name for name in names if name not in found]
    unknown = [name for name in found if name not in names]
    if lacking or unknown:
        sides = (("the run", lacking), ("the data", unknown))
        only = ", ".join(f"only {side} has {_few(names)}" for side, names in sides if names)
        raise ValueError(f"the data has other classes than the run: {only}")
    test = copy.copy(datamodule.splits["test"])
    test.labels = np.array([names.index(name) for name in found])[test.labels]
    datamodule.classes = list(names)
    datamodule.replace_test(test)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def one_device(config: dict[str, Any]) -> dict[str, Any]:
    """Options of a trainer that tests, wherever the run was trained: a GPU's on a CPU too."""
    options = {**config, "devices": 1, "num_nodes": 1, "strategy": "auto"}
    options |= {f"limit_{split}_batches": 1.0 for split in ("train", "val", "test")}
    if options["accelerator"] in ("auto", "gpu") and not torch.cuda.is_available():
        options |= {"accelerator": "cpu", "precision": "auto"}
    return trainer_options(options)
