"""What is kept of a classifier's test beside its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graft.reporting.pictures import SHOWN
from graft.tasks.scores import (
    Predictions,
    class_counts,
    confusion_matrix,
    intervals,
    lowest_recall,
    most_taken_for,
)


def details(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """95 % intervals of the metrics, accuracy of each class (its recall) and what it is most often
    taken for, confusion matrix: plain values.

    The matrix is null if it has more classes than a picture; the .npz file has all predictions.
    """
    bounds = intervals(predictions, len(classes))
    taken = most_taken_for(predictions)
    counts, right, _ = class_counts(predictions, len(classes))
    per_class = {}
    for i, name in enumerate(classes):
        images = int(counts[i])
        other, count = taken.get(i, (0, 0))
        per_class[name] = {
            "acc": float(right[i] / images) if images else None,
            "interval": bounds["per_class"][i].tolist() if images else None,
            "images": images,
            "taken_for": [classes[other], count] if count else None,
        }
    few = len(classes) <= SHOWN
    return {
        "intervals": {name: bounds[name].tolist() for name in ("acc", "macro_f1", "nll")},
        "recall": lowest_recall(predictions, classes),
        "per_class": per_class,
        "confusion": confusion_matrix(predictions, len(classes)).tolist() if few else None,
    }
