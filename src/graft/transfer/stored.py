"""Stored features of a stage: whether it can train from them, and having them computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchvision
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor

import graft
from graft.data.features import StoredFeatures, entry_path, module_digest
from graft.data.shards import ShardedRows
from graft.heads import Standardize
from graft.transfer.prefix import Extractor, FrozenPrefix

if TYPE_CHECKING:
    from graft.data.datamodule import TransferDataModule
    from graft.module import TransferModule
    from graft.transfer.stages import Stage

Tell = Callable[[str], None]


def why_not(module: TransferModule, datamodule: TransferDataModule, stage: Stage) -> str | None:
    """Why a stage can't train from stored features; None if it can."""
    if module.cut == 0:
        return "its first block learns"
    if stage.augment and (datamodule.augment or datamodule.sample_transform) is not None:
        return "it augments the images (transfer.stages.STAGE.views stores augmented ones)"
    if module.cut < len(module.backbone.blocks):
        if module.backbone.taps is not None:
            return "taps need the earlier blocks"
        if module.backbone.mirror:
            return "the mirror image needs all blocks"
    return None


class FeatureStore:
    """Features of one stage, per split, in the folder `cache`.

    Args:
        precision: the trainer's: features are those the stage would compute itself.
        tell: prints a line; `progress` is called with (shards done, all shards).
    """

    def __init__(
        self,
        module: TransferModule,
        datamodule: TransferDataModule,
        stage: Stage,
        cache: Path,
        *,
        precision: Precision | None = None,
        tell: Tell = lambda text: None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.module, self.datamodule, self.stage = module, datamodule, stage
        self.cache, self.tell, self.progress = cache, tell, progress
        self.precision = precision or Precision()
        self.prefix: FrozenPrefix | None = None
        self.digest = ""

    def features(self, splits: Sequence[str]) -> Mapping[str, StoredFeatures]:
        """Features of the splits; empty where the stage computes them itself.

        Raises:
            ValueError: cache=on where it can't be.
            OSError: the disk does not hold them.
        """
        stage = self.stage
        if stage.cache == "off":
            return {}
        reason = why_not(self.module, self.datamodule, stage)
        if reason is None:
            entries = {split: self._entry(split) for split in splits}
            gigabytes = sum(entry.bytes for entry in entries.values()) / 1e9
            if gigabytes > stage.cache_limit_gb:
                reason = (
                    f"its features would take {gigabytes:.1f} GB (cache_limit_gb is "
                    f"{stage.cache_limit_gb:g})"
                )
        if reason is not None:
            if stage.cache == "on":
                raise ValueError(f"stage {stage.name}: cache=on is not possible: {reason}")
            if self.module.cut > 0:
                self.tell(f"features  not stored, computed in every epoch: {reason}")
            return {}
        return {split: self._filled(split, entry) for split, entry in entries.items()}

    def backbone_features(self, split: str) -> Iterator[Tensor]:
        """Features of all images of a split in order, in parts, stored nowhere."""
        backbone, device = self.module.backbone, self.module.device
        whole = FrozenPrefix(backbone, len(backbone.blocks), self.precision.forward_context)
        extractor = Extractor(whole, lambda rows: self.datamodule.prepared(split, rows, device))
        yield from extractor.parts(np.arange(len(self.datamodule.splits[split])))

    def _views(self, split: str) -> int:
        views = self.stage.views if split == "train" else "none"
        return {"none": 1, "flip": 2}.get(str(views)) or int(views)

    def _prefix(self) -> FrozenPrefix:
        if self.prefix is None:
            self.prefix = FrozenPrefix(
                self.module.backbone, self.module.cut, self.precision.forward_context
            )
            self.prefix.check(self.datamodule.prepared("train", range(2), self.module.device))
        return self.prefix

    def _extractor(self, split: str) -> Extractor:
        views = self.stage.views if split == "train" else "none"
        device = self.module.device
        return Extractor(
            self._prefix(), lambda rows: self.datamodule.prepared(split, rows, device, views)
        )

    def _entry(self, split: str) -> ShardedRows:
        """Where a split's features are or will be: a name made of all that decides them."""
        module, data, stage = self.module, self.datamodule, self.stage
        prefix = self._prefix()
        self.digest = self.digest or module_digest(prefix.plain)
        views = self._views(split)
        augmented = views > 1 and stage.views != "flip"
        parts = {
            "images": data.digest(split),
            "transform": data.preprocessing,
            "prefix": self.digest,
            "taps": module.backbone.taps if module.cut == len(module.backbone.blocks) else None,
            "mirror": module.backbone.mirror,
            "block": module.cut,
            "views": f"{stage.views} {data.augment}" if augmented else views,
            "dtype": stage.cache_dtype,
            "precision": f"{self.precision.precision} {torch.get_float32_matmul_precision()}",
            "device": module.device.type,
            "versions": (graft.__version__, torch.__version__, torchvision.__version__),
        }
        shape = tuple(prefix(data.prepared(split, range(1), module.device)).shape[1:])
        about = {
            "backbone": module.backbone.description or "a backbone",
            "blocks": f"{module.cut} of {len(module.backbone.blocks)}",
            "rows": f"{len(data.splits[split])} images of {split}, {views} views",
            "input": f"{data.preprocessing.crop_size} px",
        }
        rows = len(data.splits[split]) * views
        return ShardedRows(
            entry_path(self.cache, parts), rows, shape, stage.cache_dtype, about=about
        )

    def _filled(self, split: str, entry: ShardedRows) -> StoredFeatures:
        if missing := len(entry.missing()):
            self.tell(
                f"features  {split}: computing {missing} of {len(entry.shards)} parts, "
                f"{entry.bytes / 1e9:.2f} GB in {entry.path}"
            )
            started = time.perf_counter()
            entry.fill(self._extractor(split).rows, self.progress)
            seconds = time.perf_counter() - started
            images = missing / len(entry.shards) * entry.rows
            self.tell(f"features  {split}: {seconds:.1f} s, {images / seconds:.0f} images/s")
        else:
            self.tell(f"features  {split}: stored already, {entry.bytes / 1e9:.2f} GB")
        return StoredFeatures(entry, self._views(split), self.module.device)


def measure_head(
    module: TransferModule, store: FeatureStore, stored: StoredFeatures | None
) -> None:
    """Fix the head's feature statistics on the training images, once in a plan."""
    norm = module.head.norm
    if not isinstance(norm, Standardize) or norm.measured:
        return
    if stored is None:
        norm.measure(store.backbone_features("train"))
        return
    was_training = module.training
    module.eval()
    with torch.no_grad():
        norm.measure(
            module.backbone.forward_from(module.cut, part.to(module.device))
            for part in stored.blocks()
        )
    module.train(was_training)
