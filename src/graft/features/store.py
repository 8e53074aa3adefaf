"""Stored features of a stage: whether it can train from them, and having them computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchvision
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor

import graft
from graft.config.words import plural
from graft.features.prefix import Extractor, FrozenPrefix
from graft.storage.digests import entry_path, module_digest, source_of
from graft.storage.disk import mark_used, readable
from graft.storage.shards import ShardedRows
from graft.storage.stored import StoredFeatures
from graft.transforms.inputs import Views, views_count

if TYPE_CHECKING:
    from graft.data.datamodule import TransferDataModule
    from graft.models.backbone import Backbone
    from graft.plan.stage import Stage

Tell = Callable[[str], None]


def reason_not_storable(backbone: Backbone, cut: int, datamodule: TransferDataModule) -> str | None:
    """Why a stage can't train from stored features; None if it can."""
    if cut == 0:
        return "its first block learns"
    if datamodule.inputs.augments:
        return "it augments the images (augment=false and views=8 would store augmented ones)"
    if cut < len(backbone.blocks):
        if backbone.passes_tuples:
            return "its blocks pass several tensors on"
        if backbone.taps is not None:
            return "taps need the earlier blocks"
        if backbone.mirror:
            return "the mirror image needs all blocks"
    return None


class FeatureStore:
    """Features of one stage, per split, in the folder `cache`.

    Args:
        precision: the trainer's: features are those the stage would compute itself.
        limited: whether only some batches are going to run: nothing is worth storing then.
        tell: prints a line; `progress` is called with (shards done, all shards).
    """

    def __init__(
        self,
        backbone: Backbone,
        cut: int,
        datamodule: TransferDataModule,
        stage: Stage,
        cache: Path,
        *,
        device: torch.device,
        precision: Precision | None = None,
        limited: bool = False,
        tell: Tell = lambda text: None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.backbone, self.cut, self.device = backbone, cut, device
        self.datamodule, self.stage = datamodule, stage
        self.cache, self.tell, self.progress = cache, tell, progress
        self.precision = precision or Precision()
        self.limited = limited
        self.digest = ""
        self.workers: int | None = None

    @cached_property
    def prefix(self) -> FrozenPrefix:
        """Made when it is needed: it is a copy, and full fine-tuning stores nothing."""
        return FrozenPrefix(self.backbone, self.cut, self.precision.forward_context)

    def features(self, splits: Sequence[str]) -> Mapping[str, StoredFeatures]:
        """Features of the splits; empty where the stage computes them itself.

        Raises:
            ValueError: cache=on where it can't be.
            OSError: the disk does not hold them.
        """
        stage = self.stage
        if stage.cache == "off":
            return {}
        reason = reason_not_storable(self.backbone, self.cut, self.datamodule)
        if reason is None and self.limited and stage.cache == "auto" and stage.solver == "sgd":
            reason = "few batches are run (limit_..._batches)"
        if reason is None:
            # Before all images are looked at for the names of their features.
            row = np.empty(self._row_shape(splits[0]), stage.cache_dtype)
            needed = row.nbytes * sum(map(self._rows, splits))
            if needed > 1e9 * stage.cache_limit_gb:
                reason = (
                    f"its features would take {readable(needed)} (cache_limit_gb is "
                    f"{stage.cache_limit_gb:g})"
                )
        if reason is not None:
            if stage.cache == "on":
                raise ValueError(f"stage {stage.name}: cache=on is not possible: {reason}")
            if self.cut > 0:
                self.tell(f"features  not stored, computed in every epoch: {reason}")
            return {}
        entries = {split: self._entry(split, row.shape) for split in splits}
        return {split: self._filled(split, entry) for split, entry in entries.items()}

    def backbone_features(self, split: str) -> Iterator[Tensor]:
        """Features of all images of a split in order, in parts, stored nowhere."""
        backbone, device = self.backbone, self.device
        whole = FrozenPrefix(backbone, len(backbone.blocks), self.precision.forward_context)
        extractor = Extractor(whole, lambda rows: self.datamodule.prepared(split, rows, device))
        count = len(self.datamodule.splits[split])
        positions = np.arange(min(count, 256) if self.limited else count)
        extractor.choose(positions)
        yield from extractor.parts(positions)

    def _views(self, split: str) -> Views:
        return self.stage.views if split == "train" else "none"

    def _rows(self, split: str) -> int:
        return len(self.datamodule.splits[split]) * views_count(self._views(split))

    def _row_shape(self, split: str) -> tuple[int, ...]:
        if self.cut == len(self.backbone.blocks):
            return (self.backbone.num_features,)
        return self.prefix.row_shape(self.datamodule.prepared(split, range(1), self.device))

    def _extractor(self, split: str) -> Extractor:
        device, views = self.device, self._views(split)
        extractor = Extractor(
            self.prefix, lambda rows: self.datamodule.prepared(split, rows, device, views)
        )
        if self.workers is None:  # one choice for all splits
            self.workers = extractor.choose(np.arange(len(self.datamodule.splits[split])))
        extractor.workers = self.workers
        return extractor

    def _entry(self, split: str, row_shape: tuple[int, ...]) -> ShardedRows:
        """Where a split's features are or will be: a name made of all that decides them."""
        backbone, data, stage = self.backbone, self.datamodule, self.stage
        self.digest = self.digest or module_digest(self.prefix.plain)
        views = self._views(split)
        inputs = data.inputs.key(views)
        parts = {
            "images": data.digest(split),
            "prefix": self.digest,
            "taps": backbone.taps if self.prefix.whole else None,
            "mirror": backbone.mirror,
            "block": self.cut,
            "code": [source_of(code) for code in (backbone.pool, *inputs.pop("code"))],
            "dtype": stage.cache_dtype,
            "precision": f"{self.precision.precision} {torch.get_float32_matmul_precision()}",
            "device": self.device.type,
            "versions": (graft.__version__, torch.__version__, torchvision.__version__),
        }
        about = {
            "backbone": backbone.description or "a backbone",
            "blocks": f"{self.cut} of {len(backbone.blocks)}",
            "rows": f"{plural(len(data.splits[split]), data.inputs.rows[:-1])} of {split}, "
            f"{plural(views_count(views), 'view')}",
            "input": f"{data.inputs.size} {data.inputs.unit}",
        }
        path = entry_path(self.cache, parts | inputs)
        return ShardedRows(path, self._rows(split), row_shape, stage.cache_dtype, about=about)

    def _filled(self, split: str, entry: ShardedRows) -> StoredFeatures:
        if missing := len(entry.missing()):
            self.tell(
                f"features  {split}: computing {missing} of {plural(len(entry.shards), 'part')}, "
                f"{readable(entry.bytes)} in {entry.path}"
            )
            started = time.perf_counter()
            entry.fill(self._extractor(split).rows, self.progress)
            seconds = time.perf_counter() - started
            images = missing / len(entry.shards) * entry.rows
            rate = f"{images / seconds:.0f} {self.datamodule.inputs.rows}/s"
            self.tell(f"features  {split}: {seconds:.1f} s, {rate}")
        else:
            self.tell(f"features  {split}: stored already, {readable(entry.bytes)}")
            mark_used(entry.path / "about.json")
        return StoredFeatures(entry, views_count(self._views(split)), self.device)
