"""Accuracy of nearest neighbours on the features that a stage has stored."""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # validation images whose similarities are in memory at a time
TEMPERATURE = 0.07


class Neighbours(L.Callback):
    """Logs `val/knn`: validation images classified by the training images that are most like them
    (Wu et al. 2018).

    Args:
        k: neighbours that vote, each with exp(cosine / 0.07).
    """

    def __init__(self, k: int = 10) -> None:
        self.k = k

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        parts = []
        for split in ("train", "val"):
            rows = data.features[split][torch.arange(len(data.features[split]))]
            labels = torch.as_tensor(data.splits[split].labels)
            parts.append((rows.to(pl_module.device), labels.to(pl_module.device)))
        (train, labels), (val, truth) = parts
        predicted = vote(train, labels, val, classes=data.num_classes, k=self.k)
        pl_module.log("val/knn", (predicted == truth).double().mean().float())


def vote(train: Tensor, labels: Tensor, val: Tensor, *, classes: int, k: int) -> Tensor:
    """The class of each row of `val` (M, F), by its neighbours among `train` (N, F): (M,).

    Features are centred by the mean of `train`: those behind a ReLU all point the same way.
    """
    mean = train.mean(0)
    train = F.normalize(train - mean)
    predicted = []
    for part in val.split(CHUNK):
        near = (F.normalize(part - mean) @ train.T).topk(min(k, len(train)))
        votes = torch.zeros(len(part), classes, device=train.device)
        votes.scatter_add_(1, labels[near.indices], (near.values / TEMPERATURE).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)
