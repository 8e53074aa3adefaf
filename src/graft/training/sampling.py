"""How often a run shows each training image: weights from a linear probe on frozen features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from graft.config.words import plural
from graft.models.heads import LinearHead
from graft.storage.stored import StoredFeatures
from graft.training.solvers import lbfgs

if TYPE_CHECKING:
    from graft.data.datamodule import TransferDataModule
    from graft.plan.stage import Stage
    from graft.training.module import TransferModule
    from graft.training.run_stages import NewStore

STRENGTH = 1e-2  # of the probe's weight decay: what it knows is to hold for images it has not seen
MOST = 10.0  # times the mean: no image comes more often than that
EVEN = 0.5  # part of the weight of hard-example sampling that all images share


def weigh(
    module: TransferModule,
    datamodule: TransferDataModule,
    stage: Stage,
    new_store: NewStore,
    device: torch.device,
) -> np.ndarray:
    """Weights of a run's training images, by the features of its backbone before it trains.

    Args:
        stage: the first one, whose inputs the features are of.
    """
    kind = datamodule.sampling
    datamodule.start_stage(0, augment=False, image_size=stage.image_size)
    backbone = module.to(device).backbone
    plain = replace(stage, cache="on", views="none")
    store = new_store(backbone, len(backbone.blocks), datamodule, plain, device=device)
    features = store.features(("train", "target") if kind == "importance" else ("train",))
    return sampling_weights(kind, features, datamodule.splits["train"].labels)


def sampling_weights(
    kind: str, features: Mapping[str, StoredFeatures], labels: np.ndarray
) -> np.ndarray:
    """(N,) weights of the training images, with a mean of 1.

    Args:
        kind: "importance": the odds that an image is one of the target, by a classifier of the two
            domains, which are their ratio of densities (Bickel et al. 2009). "hard": half of it
            alike for all, half by what a classifier of the labels lacks of certainty.
        features: of "train", and of "target" for importance.
        labels: (N,) of the training images.
    """
    rows = [_all(features["train"])]
    wanted = torch.from_numpy(labels)
    if kind == "importance":
        rows.append(_all(features["target"]))
        wanted = torch.cat([torch.full((len(part),), i) for i, part in enumerate(rows)])
    whole = torch.cat(rows)
    head = LinearHead(whole.shape[1], int(wanted.max()) + 1, norm="standardize")
    head.norm.measure([whole])  # type: ignore[operator]
    lbfgs(head, whole, wanted, strength=STRENGTH)
    with torch.no_grad():
        p = head(rows[0]).double().softmax(1)
    if kind == "importance":
        weights = (p[:, 1] / p[:, 0]) * (len(rows[0]) / len(rows[1]))
    else:
        missing = 1 - p.gather(1, wanted[:, None])[:, 0]
        weights = EVEN + (1 - EVEN) * missing / missing.mean()
    for _ in range(50):  # what is cut off raises the others
        weights = (weights / weights.mean()).clamp(max=MOST)
    # Rounded: ranks may have computed them with other numbers of threads.
    return np.round((weights / weights.mean()).numpy(), 3)


def _all(features: StoredFeatures) -> Tensor:
    return torch.cat([*features.blocks()])


def describe_weights(kind: str, weights: np.ndarray) -> str:
    """What a user should know of them: how many images weigh as much as all (Kish 1965)."""
    effective = int(weights.sum() ** 2 / np.square(weights).sum())
    return (
        f"data.sampling={kind}: weights from {weights.min():.2f} to {weights.max():.2f} of the "
        f"mean, as many as {plural(effective, 'equal image')} of {len(weights):,}"
    )
