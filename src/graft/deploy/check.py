"""An exported model beside the one it was made from: differences, accuracy, speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graft.data.datasets import ImageDataset
from graft.data.subset import stratified_fraction
from graft.deploy.spec import Model, Spec

IMAGES = 256  # for the comparison, and for an int8 model's calibration
SCORED = 1000  # for accuracies
TOLERANCE = 1e-4  # of an output, relative to the largest one
SIZES = {64: IMAGES, 7: 35, 1: 8}  # of batches, each with how many images


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        outputs, features: largest difference, relative to the largest value. Of probabilities it is
            that of their logarithms, which are logits but for a constant.
        agreeing, clear: of the images whose first two classes differ by more than the tolerance
            (`clear`), how many have the same first class; of labels, how many of them.
    """

    images: int
    outputs: float
    features: float
    agreeing: int
    clear: int

    @property
    def passed(self) -> bool:
        worst = max(self.outputs, self.features)
        return worst <= TOLERANCE and self.agreeing == self.clear  # not a number: neither

    def line(self, spec: Spec) -> str:
        kind = {"classes": "top-1 agrees", "labels": "labels agree"}.get(spec.output_kind)
        agree = f", {kind} {self.agreeing:,} of {self.clear:,} times" if kind else ""
        return (
            f"largest relative difference {self.outputs:.1e} (features {self.features:.1e}){agree}"
        )


def compare(reference: Model, model: Model, images: NDArray[np.uint8]) -> Comparison:
    """In batches of several sizes; and a part of the images at another size, not square."""
    found: list[Comparison] = []
    for size, count in SIZES.items():
        found += [_compared(reference, model, b) for b in batches(images[:count], size)]
    if reference.spec.input_size is None:
        height, width = images.shape[2:]
        part = images[:16, :, : max(1, height * 3 // 4), : max(1, width - 1)]
        found.append(_compared(reference, model, np.ascontiguousarray(part)))
    return Comparison(
        len(images),
        max(one.outputs for one in found),
        max(one.features for one in found),
        sum(one.agreeing for one in found),
        sum(one.clear for one in found),
    )


def _compared(reference: Model, model: Model, images: NDArray[np.uint8]) -> Comparison:
    a, b = reference.predict_rows(images), model.predict_rows(images)
    features = _difference(reference.embed_rows(images), model.embed_rows(images))
    clear, same = decisions(a, b, reference.spec)
    agreeing = int((clear & same).sum())
    if reference.spec.output_kind != "numbers":
        a, b = (np.log(np.maximum(p, 1e-30)) for p in (a, b))
    return Comparison(len(images), _difference(a, b), features, agreeing, int(clear.sum()))


def _difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.inf
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12))


def decisions(
    a: NDArray[np.float32], b: NDArray[np.float32], spec: Spec
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(which of a's decisions are clear, which of them b takes too); none of numbers."""
    if spec.output_kind == "numbers":
        return np.zeros(0, bool), np.zeros(0, bool)
    if spec.output_kind == "labels":
        return np.abs(a - 0.5) > TOLERANCE, (a > 0.5) == (b > 0.5)
    first = np.sort(a, axis=1)[:, ::-1]
    margin = first[:, 0] - first[:, 1] if a.shape[1] > 1 else np.ones(len(a))
    return margin > TOLERANCE, a.argmax(1) == b.argmax(1)


def batches(images: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    return (images[start : start + size] for start in range(0, len(images), size))


def some(dataset: ImageDataset, count: int) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """About `count` images of a split, the same part of each class, and what is true of them."""
    at = np.arange(len(dataset))
    if count < len(dataset):
        at = stratified_fraction(dataset.labels, count / len(dataset), 0)
    true = dataset.labels if dataset.targets is None else dataset.targets
    return dataset[at]["input"].numpy(), true[at]


def score(outputs: NDArray[np.float32], true: NDArray[Any], spec: Spec) -> tuple[str, float]:
    """Accuracy, or of numbers the mean absolute error."""
    if spec.output_kind == "numbers":
        return "mae", float(np.abs(outputs - true).mean())
    right = (
        (outputs > 0.5) == (true > 0.5)
        if spec.output_kind == "labels"
        else (outputs.argmax(1) == true)
    )
    return "acc", float(right.mean())


def measure(
    models: Sequence[Model], images: NDArray[np.uint8], true: NDArray[Any], size: int = 64
) -> list[dict[str, float]]:
    """Score and images/s of each model, which take turns batch by batch: what else the machine
    does then slows all of them down.
    """
    seconds = [0.0 for _ in models]
    outputs: list[list[NDArray[np.float32]]] = [[] for _ in models]
    for model in models:
        model.predict_rows(images[:size])  # the first batch is slow
    for batch in batches(images, size):
        for i, model in enumerate(models):
            started = time.perf_counter()
            outputs[i].append(model.predict_rows(batch))
            seconds[i] += time.perf_counter() - started
    results = []
    for model, own, spent in zip(models, outputs, seconds, strict=True):
        name, value = score(np.concatenate(own), true, model.spec)
        results.append({name: value, "images_per_second": len(images) / spent})
    return results
