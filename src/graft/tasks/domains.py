"""What methods share that train on labelled images of a source and unlabelled ones of a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graft.data.datasets import Batch
from graft.tasks.base import Model
from graft.tasks.classification import Classification


class TwoDomains(Classification):
    """Classification of the source's images, plus a loss by which the domains' features approach.

    Both domains go through the backbone in one batch, so that BatchNorm trains with statistics of
    the same mixture that a validation normalises by.
    """

    streams = ("train", "target")

    def __init__(self, *, weight: float, **options: Any) -> None:
        super().__init__(**options)
        if weight < 0:
            raise ValueError(f"task.weight={weight}: must not be negative")
        self.weight = weight

    def loss(self, model: Model, batch: Mapping[str, Batch]) -> Tensor:  # type: ignore[override]
        source, target = (batch[name] for name in self.streams)
        key = "features" if "features" in source else "input"
        both = model.features({key: torch.cat([source[key], target[key]])})
        count = len(source["label"])
        logits = model.head(both[:count])
        loss = self.losses(logits, source.get("target", source["label"])).mean(0)
        return loss + self.domain_loss(both[:count], both[count:], model.progress)

    def domain_loss(self, source: Tensor, target: Tensor, progress: float) -> Tensor:
        """Of features (N, F) and (M, F), a loss ().

        Args:
            progress: which part of the stage is done.
        """
        raise NotImplementedError
