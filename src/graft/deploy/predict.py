"""Predictions for any number of image files: in their order, in bounded memory.

Imports no torch: an exported model answers without it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graft.deploy.images import read_image, reason
from graft.deploy.spec import Hastened, Model, Spec

BATCH = 16  # images: their activations stay in a core's cache
GPU_BATCH = 64
NOT_FINITE = "the model's outputs for it are not finite numbers"
AHEAD = 2  # batches per thread that are begun or waiting to be taken

Given = tuple[str, str]
"""The path of an image, and why it is no file if that is known: see `Paths`."""


@dataclass(frozen=True)
class Row:
    """What a model says of an image: its outputs or features, or why it could not be read."""

    path: str
    values: NDArray[np.float32] | None
    error: str = ""


def predict(
    model: Model, paths: Iterable[Given], *, embeddings: bool = False, batch_size: int | None = None
) -> Generator[list[Row]]:
    """A row for each path, in their order; paths are taken a few batches ahead of the rows.

    An image's row does not depend on the images around it, but for rounding.

    Args:
        embeddings: features in place of predictions.
        batch_size: images that the model takes at once; it changes no result, only what fits into
            memory.
    """
    on_gpu = str(getattr(model, "device", "cpu")) != "cpu"
    batch_size = batch_size or (GPU_BATCH if on_gpu else BATCH)
    compute = model.embed_rows if embeddings else model.predict_rows
    batches = _batches(iter(paths), batch_size)
    first = next(batches, None)
    if first is None:
        return
    readers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(readers) as pool:  # a single batch is soonest there so
        images = list(pool.map(partial(_read, spec=model.spec), first))
    yield _rows(first, images, compute)
    second = next(batches, None)
    if second is None:
        return
    sample = next((image for image in images if not isinstance(image, str)), _noise(model.spec))
    with model.for_many(sample[None]) if isinstance(model, Hastened) else nullcontext() as together:
        one_at_a_time = threading.Lock()

        def alone(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
            with one_at_a_time:
                return compute(rows)

        def work(given: list[Given]) -> list[Row]:
            images = [_read(one, model.spec) for one in given]
            return _rows(given, images, compute if together else alone)

        threads, start = (together.count, together.start) if together else (readers, None)
        pool = ThreadPoolExecutor(threads, initializer=start)
        try:
            ahead: deque[Future[list[Row]]] = deque([pool.submit(work, second)])
            while ahead:
                for batch in islice(batches, AHEAD * threads - len(ahead)):
                    ahead.append(pool.submit(work, batch))
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _noise(spec: Spec) -> NDArray[np.uint8]:
    """An image in place of one that can be read."""
    height, width = spec.input_size or (spec.stored.resize_size,) * 2
    return np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)


def _batches(paths: Iterator[Given], size: int) -> Iterator[list[Given]]:
    while batch := [*islice(paths, size)]:
        yield batch


def _read(given: Given, spec: Spec) -> NDArray[np.uint8] | str:
    """An image, or why it cannot be read."""
    path, why = given
    if why:
        return why
    try:
        return read_image(Path(path), spec)
    except Exception as error:  # Pillow raises a dozen kinds
        return reason(error)


def _rows(
    given: list[Given],
    images: list[NDArray[np.uint8] | str],
    compute: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
) -> list[Row]:
    """One call of the model for all images of a shape."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    rows = []
    for i, ((path, _), image) in enumerate(zip(given, images, strict=True)):
        if isinstance(image, str):
            rows.append(Row(path, None, image))
        else:
            rows.append(Row(path, None))
            shapes.setdefault(image.shape, []).append(i)
    for places in shapes.values():
        values = compute(np.stack([np.asarray(images[i]) for i in places]))
        for i, row in zip(places, values, strict=True):
            fine = bool(np.isfinite(row).all())
            rows[i] = Row(given[i][0], row if fine else None, "" if fine else NOT_FINITE)
    return rows
