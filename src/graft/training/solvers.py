"""Linear heads without epochs: ridge regression in closed form, logistic regression by L-BFGS.

Both work on the stored features of a stage that trains nothing but a linear head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from graft.models.heads import LinearHead, Standardize
from graft.storage.stored import StoredFeatures
from graft.tasks.classification import Classification

if TYPE_CHECKING:
    from graft.data.datamodule import TransferDataModule
    from graft.plan.stage import Stage
    from graft.training.module import TransferModule

Features = Tensor | StoredFeatures  # (N, F): has a length, is indexed by a tensor
CHUNK = 4096  # rows that are in float64 at a time


class Solve(L.Callback):
    """Fills the module's head in `setup`; goes after the callback that stores the features."""

    def __init__(self, datamodule: TransferDataModule, stage: Stage) -> None:
        self.datamodule = datamodule
        self.stage = stage
        self.chosen: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = cast("TransferModule", pl_module)
        self.chosen = solve(module, self.datamodule, self.stage)
        # Ranks on unlike processors would differ in the last digits.
        weights = {k: v.cpu() for k, v in module.head.state_dict().items()}
        module.head.load_state_dict(trainer.strategy.broadcast(weights))


def solve(module: TransferModule, datamodule: TransferDataModule, stage: Stage) -> dict[str, Any]:
    """Set the weights of the module's linear head; returns what was chosen.

    Raises:
        ValueError: the head is not linear, more than it would learn, or nothing is stored.
    """
    key, head = f"transfer.stages.{stage.name}.solver={stage.solver}", module.head
    if stage.trainable != "head" or type(head) is not LinearHead:
        raise ValueError(
            f"{key}: solves for one linear head on frozen features; use trainable: head and "
            f"head=linear, or solver: sgd (the head is a {type(head).__name__})"
        )
    if not isinstance(task := module.task, Classification):
        raise ValueError(f"{key}: solves for classes; a {type(task).__name__} needs solver: sgd")
    if not isinstance(head.norm, Standardize | torch.nn.Identity):
        raise ValueError(f"{key}: head.norm must be none or standardize: batches don't exist here")
    if not {"train", "val"} <= datamodule.features.keys():
        raise ValueError(f"{key}: needs stored features; set augment: false and cache: on")

    def stored(split: str) -> tuple[StoredFeatures, Tensor]:
        features = datamodule.features[split]
        labels = torch.as_tensor(datamodule.splits[split].labels).to(module.device)
        return features, labels.repeat_interleave(features.views)

    train, val = stored("train"), stored("val")
    smoothing = task.smoothing
    if stage.solver == "ridge":
        strength, weight, bias = ridge(head, train, val, stage.strengths, smoothing=smoothing)
        with torch.no_grad():
            head.linear.weight.copy_(weight)
            head.linear.bias.copy_(bias)
        return {"solver": "ridge", "strength": strength}
    steps = lbfgs(
        head, *train, strength=stage.weight_decay, iterations=stage.epochs, smoothing=smoothing
    )
    return {"solver": "lbfgs", "strength": stage.weight_decay, "iterations": steps}


def ridge(
    head: LinearHead,
    train: tuple[Features, Tensor],
    val: tuple[Features, Tensor],
    strengths: Sequence[float] | None = None,
    *,
    smoothing: float = 0.0,
) -> tuple[float, Tensor, Tensor]:
    """Least squares on one-hot targets plus `strength` times the squared weights, not the bias.

    One eigendecomposition of the Gram matrix, of features or of fewer rows, serves every strength.

    Args:
        train, val: features (N, F) before the head's norm, and labels.
        strengths: to choose from by accuracy on `val`, the larger one of equals. None: 30 from
            1e-7 to 10 times the trace of the Gram matrix.

    Returns:
        The strength chosen, weight (C, F) and bias (C,), in float64.
    """
    features, labels = train
    classes, size = head.linear.out_features, len(features)
    targets = F.one_hot(labels, classes).double() * (1 - smoothing) + smoothing / classes
    intercept = targets.mean(0)
    mean = sum((rows.sum(0) for _, rows in _chunks(head, features)), torch.tensor(0.0)) / size
    width = head.linear.in_features
    if size < width:  # the rows span fewer directions than there are features
        centred = torch.cat([rows - mean for _, rows in _chunks(head, features)])
        values, left = torch.linalg.eigh(centred @ centred.T)
        spanned = values > 1e-12 * values[-1]
        values, left = values[spanned], left[:, spanned]
        vectors = centred.T @ left / values.sqrt()
        rotated = vectors.T @ (centred.T @ (targets - intercept))
    else:
        gram = torch.zeros((width, width), dtype=torch.float64, device=labels.device)
        cross = torch.zeros((width, classes), dtype=torch.float64, device=labels.device)
        for at, rows in _chunks(head, features):
            centred = rows - mean
            gram.addmm_(centred.T, centred)
            cross.addmm_(centred.T, targets[at] - intercept)
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp_min(0)  # rounding
        rotated = vectors.T @ cross
    if strengths is None:
        exponents = torch.linspace(-7, 1, 30, dtype=torch.float64)
        strengths = (float(values.sum()) * 10**exponents).tolist()

    correct = torch.zeros(len(strengths), dtype=torch.int64)
    for at, rows in _chunks(head, val[0]):
        projected = (rows - mean) @ vectors
        for i, strength in enumerate(strengths):
            predicted = projected @ (rotated / (values + strength)[:, None]) + intercept
            correct[i] += (predicted.argmax(1) == val[1][at]).sum().cpu()
    best = max(zip(correct.tolist(), strengths, strict=True))[1]
    weight = (vectors @ (rotated / (values + best)[:, None])).T
    return best, weight, intercept - weight @ mean


def _chunks(head: LinearHead, features: Features) -> Iterator[tuple[slice, Tensor]]:
    """Normalised rows in float64 on the head's device, with where they are."""
    with torch.no_grad():
        for start in range(0, len(features), CHUNK):
            at = slice(start, min(start + CHUNK, len(features)))
            rows = features[torch.arange(at.start, at.stop)].to(head.linear.weight.device)
            yield at, head.norm(rows.double())


def lbfgs(
    head: LinearHead,
    features: Features,
    labels: Tensor,
    *,
    strength: float,
    iterations: int = 200,
    smoothing: float = 0.0,
) -> int:
    """Fit the head by multinomial logistic regression on all features (N, F) at once.

    The loss is the mean cross-entropy plus strength / 2 times the squared weights, not the bias:
    the objective whose gradient SGD with that weight_decay follows, and scikit-learn's with
    C = 1 / (N strength). Returns the number of iterations.
    """
    with torch.no_grad():
        rows = features[torch.arange(len(features))]
        rows = head.norm(rows.to(head.linear.weight.device))
    optimizer = torch.optim.LBFGS(
        head.linear.parameters(),
        max_iter=iterations,
        max_eval=2 * iterations + 10,
        tolerance_grad=1e-6,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = strength / 2 * head.linear.weight.square().sum()
        value = F.cross_entropy(head.linear(rows), labels, label_smoothing=smoothing) + penalty
        value.backward()
        return value

    optimizer.step(loss)
    optimizer.zero_grad()
    return int(optimizer.state[head.linear.weight]["n_iter"])
