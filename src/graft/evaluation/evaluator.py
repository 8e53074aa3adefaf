"""A trained model, made anew from its config and a checkpoint, and what it predicts."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graft.data.datamodule import TransferDataModule
from graft.data.datasets import Batch, ImageDataset
from graft.data.items import SplitRecord
from graft.data.sources.shifted import corrupted
from graft.data.subset import stratified_fraction
from graft.evaluation.adapt import Tent, kept
from graft.evaluation.mixed import MixedImages
from graft.features.store import FeatureStore
from graft.models.weights import check_finite, load_state
from graft.plan.stage import Stage
from graft.reporting import report
from graft.reporting.collect import Collect, Outputs
from graft.tasks.scores import Predictions, scores
from graft.training.adabn import estimate_statistics, require_batch_norms
from graft.training.build import build, build_stages
from graft.training.module import TransferModule
from graft.training.run_stages import StartStage
from graft.training.trainer import make_trainer, trainer_options


@dataclass
class Evaluator:
    """A trained model, and how its run tests: the same stored features, precision and batches.

    Args:
        stage, index: the run's last one.
        options: of the trainer.
        adapt: to the images that are predicted, without their labels: "adabn" or "tent".
        continual: Tent goes on from one set of images to the next, in place of starting anew.
    """

    module: TransferModule
    datamodule: TransferDataModule
    stage: Stage
    index: int
    cache: Path
    options: dict[str, Any]
    adapt: str | None = None
    continual: bool = False
    tent: Tent | None = None

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        checkpoint: dict[str, Any],
        source: Path,
        recorded: SplitRecord | None = None,
    ) -> Evaluator:
        """The model of `config` with the weights of `checkpoint`, on the data of `config`.

        Pretrained weights are not needed: the checkpoint holds all.

        Args:
            source: where the checkpoint comes from, for error messages.
            recorded: the run's splits, if they are what it is tested on.

        Raises:
            ValueError: the data has other classes or none of the run's test images, or the
                checkpoint other weights.
        """
        torch.set_float32_matmul_precision("high")  # as in training
        head = {**config["head"], "num_classes": None}
        module, datamodule = build(
            {**config, "head": head, "data": {**config["data"], "target": None, "oracle": False}},
            pretrained=False,
            recorded=recorded,
            classes=checkpoint["graft"]["classes"],
            preprocessing=checkpoint["graft"].get("preprocessing"),
        )
        if not len(datamodule.splits["test"]):
            raise ValueError(
                f"{datamodule.changes['test']}: give data.root=FOLDER if they have moved, or "
                "--data OTHER for other images"
            )
        stage, index = restore(module, config, checkpoint, source)
        return cls(
            module,
            datamodule,
            stage,
            index,
            Path(config["paths"]["cache"]),
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
        return Predictions.joined(self._collected(dataset, store=store).parts)

    def adapted_predictions(self, dataset: ImageDataset) -> Predictions:
        """After, or while, the model adapts to these very images; afterwards it is as before,
        except in continual adaptation.

        Raises:
            ValueError: it has no BatchNorm to adapt.
        """
        require_batch_norms(self.module.backbone, f"--adapt {self.adapt}")
        gpu = self.options["accelerator"] != "cpu" and torch.cuda.is_available()
        module = self.module.to("cuda" if gpu else "cpu").eval()
        self.datamodule.start_stage(self.index, augment=False, image_size=self.stage.image_size)
        # Class folders come class by class; an adaptation is to meet them mixed.
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        parts = order.tensor_split(-(-len(order) // self.datamodule.eval_batch_size))

        def batches() -> Iterator[Batch]:
            for part in parts:
                batch = {k: v.to(module.device) for k, v in dataset[part.tolist()].items()}
                yield self.datamodule.transform(batch, augment=False)

        with nullcontext() if self.continual else kept(module):
            model: Any = module
            if self.adapt == "adabn":
                inputs = [batch["input"] for batch in batches()]
                estimate_statistics(module.backbone, inputs, module.head)
            else:
                model = self.tent = (self.tent if self.continual else None) or Tent(module)
            with torch.no_grad():
                found = [
                    Predictions.of(model(batch["input"]), batch["label"], batch["index"])
                    for batch in batches()
                ]
        return Predictions.joined(found)

    def outputs(self, dataset: ImageDataset) -> Outputs:
        """Of a task without classes."""
        return Outputs.joined(self._collected(dataset, store=True).outputs)

    def _collected(self, dataset: ImageDataset, *, store: bool) -> Collect:
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
        return collect

    def corruptions(
        self,
        test: ImageDataset,
        names: Sequence[str],
        severities: Sequence[int],
        *,
        mixed: bool = False,
    ) -> dict[str, dict[int, dict[str, float]]]:
        """Scores by name of the corruption and severity; the corrupted images stay in the cache.

        Args:
            mixed: all corruptions of a severity as one shuffled set of images, in place of each.
        """
        found: dict[str, dict[int, dict[str, float]]] = {}
        for name in ["mixed"] if mixed else names:
            started, found[name] = time.perf_counter(), {}
            for severity in severities:
                parts = [
                    corrupted(test, one, severity, self.cache)
                    for one in (names if mixed else [name])
                ]
                images = MixedImages(parts) if mixed else parts[0]
                predictions = (
                    self.adapted_predictions(images)
                    if self.adapt
                    else self.predictions(images, store=False)
                )
                found[name][severity] = scores(predictions, self.datamodule.num_classes)
            report.say(f"          {name}: {time.perf_counter() - started:.1f} s")
        return found


def restore(
    module: TransferModule, config: dict[str, Any], checkpoint: dict[str, Any], source: Path
) -> tuple[Stage, int]:
    """Load a run's checkpoint into its module; returns the stage it is of, and its number.

    Raises:
        ValueError: it has other weights.
    """
    stages = [*config["transfer"]["stages"]]
    name = checkpoint["graft"].get("stage")
    index = stages.index(name) if name in stages else len(stages) - 1
    stage = build_stages(config)[index]
    load_stage(module, replace(stage, l2_sp=0.0), checkpoint, source)
    return stage, index


def load_stage(
    module: TransferModule, stage: Stage, checkpoint: dict[str, Any], source: Path
) -> None:
    """The weights of a stage's checkpoint, in the module as that stage ends with it: while it
    trains, weights have adapters, and the head may be a grid of which the best one counts.
    """
    note = checkpoint["graft"]
    grid = note.get("grid")
    adapted = any(".parametrizations." in key for key in checkpoint["state_dict"])
    module.start_stage(stage if adapted else replace(stage, lora=None))
    if stage.grid is not None and grid is not None:
        module.start_grid(stage.grid, len(note["classes"]))
    # Runs of earlier versions kept the blocks above the highest tap.
    unused = tuple(f"backbone.{prefix}" for prefix in module.backbone.unused_keys)
    state = checkpoint["state_dict"]
    if grid is None:  # of which heads may have diverged
        check_finite(state, source)
    load_state(module, state, source=source, optional=unused, label="of the run")
    if module.grid is not None:
        module.on_load_checkpoint(checkpoint)
        module.finish_grid()
    module.finish_stage()
    module.start_stage(replace(stage, lora=None))


def one_device(config: dict[str, Any]) -> dict[str, Any]:
    """Options of a trainer that tests, wherever the run was trained: a GPU's on a CPU too."""
    options = {**config, "devices": 1, "num_nodes": 1, "strategy": "auto"}
    options |= {f"limit_{split}_batches": 1.0 for split in ("train", "val", "test")}
    if options["accelerator"] in ("auto", "gpu") and not torch.cuda.is_available():
        options |= {"accelerator": "cpu", "precision": "auto"}
    return trainer_options(options)
