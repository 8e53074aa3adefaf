"""A run's trained model as a plain module: raw uint8 images in, probabilities out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graft.data.items import SplitRecord
from graft.data.sources.decode import Reading, as_range
from graft.deploy.predictions import PythonModel
from graft.deploy.spec import Spec, Threads
from graft.evaluation.evaluator import restore
from graft.features.prefix import FrozenPrefix, single_thread
from graft.models.backbone import Backbone
from graft.plan.stage import Stage
from graft.runs.open import checkpoint_path, read_checkpoint, read_run
from graft.storage.run_json import read_record
from graft.tasks.base import Task
from graft.tasks.pretraining import require_outputs
from graft.training.build import build_backbone, build_module
from graft.training.module import TransferModule
from graft.transforms.prepare import Prepare
from graft.transforms.preprocessing import Preprocessing, stored_form


class Deployed(nn.Module, PythonModel):
    """Preprocessing, backbone, head and the task's last step in one module, in evaluation mode."""

    def __init__(self, spec: Spec, backbone: Backbone, head: nn.Module, task: Task) -> None:
        super().__init__()
        self.spec = spec
        self.backbone, self.head, self.task = backbone, head, task
        self.prepare = Prepare(spec.preprocessing)
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 RGB -> (N, outputs) float32: see `Spec.output_kind`."""
        return self.task.predicted(self.head(self.features(images)))

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 RGB -> (N, num_features)."""
        return self.backbone(self.preprocess(images))

    def preprocess(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 RGB -> what the backbone takes: resized, cropped, normalised.

        A call of the model does this itself.

        Raises:
            ValueError: images of another type or shape, preprocessed ones say.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}: the model takes (N, 3, H, W) "
                "uint8 RGB as images are stored, and preprocesses them itself"
            )
        return self.prepare(images)

    @torch.inference_mode()
    def predict_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self(torch.tensor(images).to(self.device)).cpu().numpy()

    @torch.inference_mode()
    def embed_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.features(torch.tensor(images).to(self.device)).float().cpu().numpy()

    @contextmanager
    def for_many(self, images: NDArray[np.uint8]) -> Iterator[Threads | None]:
        """Predict faster meanwhile, as features are extracted: BatchNorm is folded unless that
        changes the features of `images`, and on a CPU each core takes a batch.
        """
        own, threads = self.backbone, torch.get_num_threads()
        prefix = FrozenPrefix(own, len(own.blocks))
        prefix.ready(self.prepare(torch.tensor(images).to(self.device)))
        assert isinstance(prefix.module, Backbone)  # the whole of one
        self.backbone = prefix.module
        try:
            yield Threads(threads, single_thread) if self.device.type == "cpu" else None
        finally:
            self.backbone = own
            torch.set_num_threads(threads)  # part of the setting is the whole process's


@dataclass(frozen=True)
class OpenedRun:
    """A run's module with the weights of a checkpoint, and what that says of itself."""

    module: TransferModule
    config: dict[str, Any]
    stage: Stage
    path: Path
    note: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        return self.note["classes"]


def open_run(run: Path, ckpt: str) -> OpenedRun:
    """See `load`."""
    config, status = read_run(run)
    path = checkpoint_path(run, config, status, ckpt)
    checkpoint = read_checkpoint(path)
    note = checkpoint["graft"]
    backbone = build_backbone(
        config["backbone"], pretrained=False, recorded=note.get("preprocessing")
    )
    module = build_module(config, backbone, len(note["classes"]))
    stage, _ = restore(module, config, checkpoint, path)
    return OpenedRun(module, config, stage, path, note)


def load(
    run: str | Path, ckpt: str = "best", *, mirror: bool = False, device: str | None = None
) -> Deployed:
    """The model of a run folder. Neither its data nor pretrained weights are needed.

    Args:
        ckpt: "best" or "last" of the last stage, or a file.
        mirror: predict from the mean features of an image and its mirror image, whatever the run
            did.
        device: "cpu", "cuda", ...; None: a GPU where there is one.

    Raises:
        ValueError: no run folder, one that names code of others (see `graft eval --trust`), or an
            unusable checkpoint.
    """
    opened = open_run(Path(run), ckpt)
    module, config, stage = opened.module, opened.config, opened.stage
    backbone = module.backbone
    if not isinstance(backbone.preprocessing, Preprocessing):
        raise ValueError(f"{run} was trained on texts: only graft predict {run} --text knows them")
    require_outputs(module.task, Path(run))
    backbone.mirror |= mirror
    data = config["data"]
    own = backbone.preprocessing.at(data.get("image_size"), data.get("resize_size"))
    sizes = [s["image_size"] for s in config["transfer"]["stages"].values() if s.get("image_size")]
    stored = stored_form(own, sizes)
    recorded = SplitRecord.read(Path(run))
    # Where a stage resizes again what was stored resized, a small image has to go both ways.
    native = recorded is None or max(recorded.splits["train"].side) < stored.resize_size
    spec = Spec(
        classes=opened.classes,
        output_kind=module.task.output_kind,
        stored=stored,
        preprocessing=own.at(stage.image_size),
        keeps_small=native or own.at(stage.image_size).resize_size == stored.resize_size,
        reading=_reading(data["source"], opened.note.get("value_range")),
        provenance=_provenance(Path(run), opened.path, opened.note["stage"]),
    )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Deployed(spec, module.backbone, module.head, module.task).to(device)


def _reading(source: dict[str, Any], value_range: Any) -> Reading:
    """How the run's own source read files."""
    return Reading(
        source.get("background") or "white",
        as_range(source.get("value_range") or value_range),
        source.get("max_megapixels") or Reading.max_megapixels,
    )


def _provenance(run: Path, checkpoint: Path, stage: str) -> dict[str, Any]:
    record = read_record(run)
    return {
        "run": run.resolve().name,
        "checkpoint": checkpoint.name,
        "stage": stage,
        **{key: record.get(key) for key in ("git_commit", "versions", "data", "metrics")},
    }
