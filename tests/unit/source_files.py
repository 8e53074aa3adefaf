"""Image files and processes for the tests of the sources."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graft.data.sources.base import Source, Splits
from graft.transforms.preprocessing import Preprocessing

RED, GREEN, BLUE = (250, 10, 20), (30, 240, 40), (50, 60, 230)


def save(path: Path, image: Image.Image | tuple[int, int, int], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, tuple):
        image = Image.new("RGB", (24, 24), image)
    image.save(path, **options)
    return path


def class_folders(root: Path) -> Path:
    """Two classes, three splits, 24 x 24 px, one colour per image."""
    for split, count in (("train", 3), ("valid", 1), ("test", 2)):
        for n in range(count):
            save(root / split / "cat" / f"{n}.png", (200 + n, 10, 20))
            save(root / split / "dog" / f"{n}.png", (n, 220, 40))
    return root


def truncate(path: Path) -> int:
    return path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def px(side: int) -> Preprocessing:
    """The whole image at that size."""
    return Preprocessing(side, side)


def read(source: Source, size: int = 32) -> Splits:
    source.prepare(px(size))
    return source.load(px(size))


def corner(images: NDArray[np.uint8]) -> list[tuple[int, ...]]:
    return [tuple(image[:, 0, 0].tolist()) for image in images]


def together(work: Callable[[], None], count: int = 2) -> list[int | None]:
    """Exit codes of processes that run `work` at the same time."""
    context = multiprocessing.get_context("fork")  # no second import of torch
    barrier = context.Barrier(count)

    def child() -> None:
        barrier.wait(20)
        work()

    processes = [context.Process(target=child) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]
