"""What is said of a classifier's predictions on a set of images, and how sure one can be of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_accuracy,
)

from graft.config.words import plural

BINS = 15  # of confidence, for the calibration error: Guo et al. 2017
CHUNK = 4_000_000  # images drawn at a time: 32 MB


@dataclass(frozen=True)
class Predictions:
    """One entry for each image.

    Attributes:
        index: its number in the set.
        confidence: probability of the predicted class.
        loss: negative log-likelihood of the true class, in nats.
    """

    index: Tensor
    label: Tensor
    prediction: Tensor
    confidence: Tensor
    loss: Tensor

    @classmethod
    def of(cls, logits: Tensor, label: Tensor, index: Tensor) -> Predictions:
        """From (N, num_classes) logits; on the CPU afterwards."""
        log_p = F.log_softmax(logits.float(), dim=1)
        prediction = logits.argmax(1)
        confidence = log_p.gather(1, prediction[:, None])[:, 0].exp()
        loss = -log_p.gather(1, label[:, None])[:, 0]
        return cls(*(value.cpu() for value in (index, label, prediction, confidence, loss)))

    @classmethod
    def joined(cls, parts: list[Predictions]) -> Predictions:
        """Batches in the order of their index."""
        joined = {name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])}
        order = joined["index"].argsort()
        return cls(**{name: values[order] for name, values in joined.items()})

    def __len__(self) -> int:
        return len(self.label)


def scores(p: Predictions, num_classes: int) -> dict[str, float]:
    """acc: accuracy. macro_f1: mean F1 of the classes that occur. nll: mean negative
    log-likelihood. ece: expected calibration error, the mean distance of confidence and accuracy
    over 15 bins of confidence.
    """
    hit = (p.prediction == p.label).int()
    images, right, predicted = class_counts(p, num_classes)
    occurs = images + predicted > 0
    values = {
        "acc": multiclass_accuracy(p.prediction, p.label, num_classes, average="micro"),
        "macro_f1": (2 * right[occurs] / (images + predicted)[occurs]).mean(),
        "nll": p.loss.double().mean(),
        "ece": binary_calibration_error(p.confidence, hit, n_bins=BINS, norm="l1"),
    }
    return {name: float(value) for name, value in values.items()}


def class_counts(p: Predictions, num_classes: int) -> tuple[NDArray[np.int64], ...]:
    """(images, those of them predicted rightly, predictions) of each class."""
    label, prediction = p.label.numpy(), p.prediction.numpy()
    counted = (label, label[label == prediction], prediction)
    return tuple(np.bincount(values, minlength=num_classes) for values in counted)


def most_taken_for(p: Predictions) -> dict[int, tuple[int, int]]:
    """Class -> (class that its images are most often taken for, how many of them); no entry where
    all are right.
    """
    wrong = p.label != p.prediction
    pairs = torch.stack([p.label[wrong], p.prediction[wrong]], 1).numpy()
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.lexsort((-found[:, 1], counts))  # the last one stays
    return {
        int(t): (int(other), int(n))
        for (t, other), n in zip(found[order], counts[order], strict=True)
    }


def lowest_recall(p: Predictions, classes: Sequence[str]) -> str:
    """What accuracy does not say: the classes of which nothing was recognised, or the worst one."""
    images, right, _ = class_counts(p, len(classes))
    there = np.flatnonzero(images)
    none = there[right[there] == 0]

    def named(i: int) -> str:
        return f"{classes[i]} ({plural(int(images[i]), 'image')})"

    if len(none):
        names = ", ".join(map(named, none[:5])) + (", ..." if len(none) > 5 else "")
        return f"0 % for {len(none):,} of {len(there):,} classes: {names}"
    worst = there[(right[there] / images[there]).argmin()]
    if right[worst] == images[worst]:
        return "100 % for every class"
    return f"lowest {100 * right[worst] / images[worst]:.2f} % for {named(worst)}"


def merged(p: Predictions, num_classes: int, most: int) -> tuple[Predictions, list[int]]:
    """The predictions with all classes merged into one but the `most` with the most mistakes; and
    which those are. Mistakes within the merged class are none.
    """
    images, right, _ = class_counts(p, num_classes)
    kept = np.argsort(right - images, kind="stable")[:most]
    number = torch.full((num_classes,), len(kept))
    number[torch.from_numpy(kept)] = torch.arange(len(kept))
    return replace(p, label=number[p.label], prediction=number[p.prediction]), kept.tolist()


def reliability(
    p: Predictions,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Of the 15 bins of confidence: images, mean confidence and accuracy; nan in empty ones."""
    edges = torch.linspace(0, 1, BINS + 1)
    where = (torch.bucketize(p.confidence, edges, right=True) - 1).clamp(0, BINS - 1).numpy()
    images = np.bincount(where, minlength=BINS)
    hit = (p.prediction == p.label).double().numpy()
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(where, p.confidence.double().numpy(), BINS) / images
        return images, confidence, np.bincount(where, hit, BINS) / images


def confusion_matrix(p: Predictions, num_classes: int) -> NDArray[np.int64]:
    """(num_classes, num_classes) images: truth down, prediction across."""
    cells = (p.label * num_classes + p.prediction).numpy()
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def intervals(
    p: Predictions, num_classes: int, *, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Bootstrap percentile intervals over images (Efron 1979): what other images of the same kind
    would have given. They know nothing of other seeds of the training.

    Returns:
        acc, macro_f1, nll: (low, high); per_class: (num_classes, 2) of the accuracy of each class,
        nan where it has no images. Where all images are right, or none is, resampling knows no
        spread, and accuracies have the exact interval (Clopper and Pearson 1934). None for ece: a
        sample of the sample is never better calibrated than its bins are noisy, so that its
        interval would lie too high.
    """
    rng = np.random.default_rng(seed)
    label, prediction, loss = (v.numpy() for v in (p.label, p.prediction, p.loss.double()))
    hit = prediction == label
    found: dict[str, list[NDArray[np.float64]]] = {}
    step = max(1, CHUNK // max(len(p), num_classes))
    for start in range(0, samples, step):
        rows = rng.integers(len(p), size=(min(step, samples - start), len(p)))
        true = _counts(label[rows], num_classes)
        both = _counts(label[rows], num_classes, hit[rows])
        either = true + _counts(prediction[rows], num_classes)
        with np.errstate(invalid="ignore"):  # a class without images
            drawn = {
                "acc": hit[rows].mean(1),
                "macro_f1": np.nanmean(2 * both / either, axis=1),
                "nll": loss[rows].mean(1),
                "per_class": both / true,
            }
        for name, values in drawn.items():
            found.setdefault(name, []).append(values)
    ends = [(1 - level) / 2, (1 + level) / 2]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        bounds = {
            name: np.nanquantile(np.concatenate(values), ends, axis=0).T
            for name, values in found.items()
        }
    images, right, _ = class_counts(p, num_classes)
    bounds["acc"] = _unless_extreme(bounds["acc"], right.sum(), images.sum(), level)
    pairs = zip(bounds["per_class"], right, images, strict=True)
    bounds["per_class"] = np.array([_unless_extreme(b, r, n, level) for b, r, n in pairs])
    return bounds


def _unless_extreme(
    pair: NDArray[np.float64], right: int, images: int, level: float
) -> NDArray[np.float64]:
    """Of an accuracy of 0 or 1, which no resampling changes, Clopper and Pearson's interval."""
    if images == 0 or 0 < right < images:
        return pair
    end = ((1 - level) / 2) ** (1 / images)
    return np.array([end, 1.0]) if right else np.array([0.0, 1 - end])


def _counts(
    values: NDArray[np.int64], num_classes: int, weights: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """(B, N) classes -> (B, num_classes): how often each is in a row, or the sum of its weights."""
    cells = values + num_classes * np.arange(len(values))[:, None]
    flat = None if weights is None else weights.ravel()
    counts = np.bincount(cells.ravel(), flat, minlength=num_classes * len(values))
    return counts.reshape(len(values), num_classes).astype(np.float64)
