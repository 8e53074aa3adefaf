"""What methods share that train on labelled images of a source and unlabelled ones of a target."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graft.data.datasets import Batch
from graft.tasks.base import Model
from graft.tasks.classification import Classification


class TwoDomains(Classification):
    """Classification of the source's images, plus a loss by which the domains' features approach.

    Each domain goes through the backbone by itself: BatchNorm then trains with the statistics of
    either, so that a domain's mean and contrast are not what there is to align.
    """

    streams = ("train", "target")

    def __init__(self, *, weight: float, **options: Any) -> None:
        super().__init__(**options)
        if weight < 0:
            raise ValueError(f"task.weight={weight}: must not be negative")
        self.weight = weight

    def loss(self, model: Model, batch: Mapping[str, Batch]) -> Tensor:  # type: ignore[override]
        source, target = (model.features(batch[name]) for name in self.streams)
        labelled = batch["train"]
        losses = self.losses(model.head(source), labelled.get("target", labelled["label"]))
        return losses.mean(0) + self.domain_loss(source, target, model.progress)

    @abstractmethod
    def domain_loss(self, source: Tensor, target: Tensor, progress: float) -> Tensor:
        """Of features (N, F) and (M, F), a loss ().

        Args:
            progress: which part of the stage is done.
        """
