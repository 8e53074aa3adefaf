"""Small and skewed sets, and sources of one's own: right, or refused in a line that says why."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from graft.data.datamodule import TransferDataModule
from graft.data.notes import notes
from graft.data.order import BatchOrder, batch_size_for
from graft.data.sources.base import Source, Split, Splits
from graft.training.build import processes
from graft.transforms.images import ImageInputs
from graft.transforms.preprocessing import Preprocessing
from tests.conftest import compose
from tests.unit.source_files import px

IMAGES = np.zeros((9, 3, 4, 4), np.uint8)
LABELS = np.repeat([0, 1, 2], 3)


class Own(Source):
    def __init__(self, loaded: Splits) -> None:
        self.loaded = loaded

    def load(self, preprocessing: Preprocessing) -> Splits:
        return self.loaded


def set_up(loaded: Splits, **options: Any) -> TransferDataModule:
    data = TransferDataModule(Own(loaded), ImageInputs(px(4)), **options)
    data.setup()
    return data


def source_of(*counts: int) -> Splits:
    """So many images of each class, and no splits of its own."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.zeros((len(labels), 3, 4, 4), np.uint8)
    return Splits([f"c{i}" for i in range(len(counts))], Split(images, labels), None, None)


GOOD = Split(IMAGES, LABELS)


def bad(**arrays: Any) -> Split:
    return replace(GOOD, **arrays)


floats = np.zeros((9, 3, 4, 4), np.float32)
WRONG = [
    (bad(images=floats), "must be uint8 from 0 to 255, not float32: for 0..1, (images"),
    (bad(images=IMAGES.astype(np.uint16)), "must be uint8 from 0 to 255, not uint16"),
    (bad(images=IMAGES[:, 0]), "not (9, 4, 4): repeat a grey channel"),
    (bad(images=IMAGES[:, :1]), "not (9, 1, 4, 4): repeat a grey channel"),
    (bad(images=np.zeros((9, 4, 4, 4), np.uint8)), "choose three channels"),
    (bad(images=np.zeros((9, 5, 4, 4), np.uint8)), "choose three channels"),
    (bad(images=IMAGES.transpose(0, 2, 3, 1)), "channels come first"),
    (Split(IMAGES[:0], LABELS[:0]), "not empty, not (0, 3, 4, 4)"),
    (bad(images=torch.zeros(9, 3, 4, 4)), "images must be a numpy array, not Tensor"),
    (bad(labels=LABELS.tolist()), "labels must be a numpy array, not list"),
    (bad(labels=LABELS[:8]), "9 images, but 8 labels"),
    (bad(names=np.array([b"a"])), "9 images, but 1 names"),
    (bad(labels=np.eye(3, dtype=np.int64)[LABELS]), "not (9, 3), labels.argmax(1)"),
    (bad(labels=LABELS * np.nan), "labels must be int64, not float64"),
    (bad(labels=LABELS.astype(np.int32)), "labels must be int64, not int32"),
    (bad(labels=LABELS - 1), "labels must be 0 to 2 for 3 classes; number 0 is -1"),
    (bad(labels=LABELS + 1), "labels must be 0 to 2 for 3 classes; number 6 is 3"),
]


@pytest.mark.parametrize("name", ["train", "val", "test"])
@pytest.mark.parametrize(("split", "message"), WRONG, ids=[m for _, m in WRONG])
def test_what_a_source_loads_is_checked(name: str, split: Split, message: str) -> None:
    splits: dict[str, Any] = {"train": GOOD, "val": GOOD, "test": GOOD, name: split}
    loaded = Splits(list("abc"), **splits)
    with pytest.raises(ValueError, match=f"^Own, {name} split: .*{re.escape(message)}"):
        set_up(loaded)


@pytest.mark.parametrize(
    ("classes", "message"),
    [(["a", "b", "b"], "two classes have the name b"), ([0, 1, 2], "a list of names")],
)
def test_names_of_classes_are_checked(classes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^Own: .*{message}"):
        set_up(Splits(classes, GOOD, GOOD, GOOD))


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ((9, 2), {}, "class c1 has 2 images: too few for train and val and test, which are drawn"),
        ((1, 9, 2), {}, "class c0 has 1 image (1 more classes have too few): too few for train"),
        (
            (20, 5),
            {"shots_per_class": 4},
            "data.shots_per_class=4: class c1 has 3 images to train on: set data.shots_per_class=3 "
            "or less",
        ),
    ],
)
def test_a_class_with_too_few_images_is_named(
    counts: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        set_up(source_of(*counts), **options)


def test_three_images_of_a_class_are_enough() -> None:
    splits = set_up(source_of(30, 3)).splits
    assert [int((splits[name].labels == 1).sum()) for name in ("train", "val", "test")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("images", "size"),
    [(50_000, 128), (1024, 128), (1023, 64), (171, 16), (128, 16), (127, 8), (40, 8), (5, 5)],
)
def test_the_default_batch_gives_a_small_epoch_its_steps(images: int, size: int) -> None:
    assert batch_size_for(images) == size
    assert images // batch_size_for(images) >= 8 or size <= 8
    assert compose()["data"]["batch_size"] is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"batch_size": 128},
            ["an epoch has 1 step and leaves out 43 of 171 images; data.batch_size=16 has 10"],
        ),
        (
            {"batch_size": 128, "drop_last": False},
            ["an epoch has 2 steps; data.batch_size=16 has 10"],
        ),
        ({}, []),
        ({"epoch_images": 20}, ["an epoch has 2 steps and leaves out 4 of 20 images"]),
    ],
)
def test_few_steps_are_said(options: dict[str, Any], expected: list[str]) -> None:
    loaded = replace(source_of(100, 71), val=GOOD, test=GOOD, classes=["a", "b", "c"])
    data = set_up(loaded, **options)
    absent = "no training images of 1 of 3 classes: c"
    assert list(notes(data, steps=True)) == [absent, *expected]
    assert list(notes(data, steps=False)) == [absent]


def test_the_default_batch_is_of_one_process_of_several() -> None:
    """60 images on 8 devices: batches of 8 would be 64 images at once."""
    data = TransferDataModule(
        Own(replace(source_of(30, 30), val=GOOD, test=GOOD, classes=["a", "b", "c"])),
        ImageInputs(px(4)),
    )
    data.processes = 8
    data.setup()
    assert data.batch_size == 7
    assert processes({"devices": [0, 1], "accelerator": "gpu", "num_nodes": 2}) == 4
    assert processes({"devices": "auto", "accelerator": "cpu", "num_nodes": 1}) == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_last_single_image_joins_the_batch_before(world_size: int) -> None:
    """Ranks have equally many batches; one process of twice the size has one more, of two."""
    orders = [
        BatchOrder(9 * world_size, 4, shuffle=True, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert [[len(batch) for batch in order] for order in orders] == [[4, 5]] * world_size
    assert [len(order) for order in orders] == [2] * world_size
    seen = np.concatenate([batch for order in orders for batch in order])
    assert sorted(seen.tolist()) == list(range(9 * world_size))
    assert [len(b) for b in BatchOrder(18, 8, shuffle=True)] == [8, 8, 2]
    assert [len(b) for b in BatchOrder(9, 4, shuffle=True, drop_last=True)] == [4, 4]
    assert [len(b) for b in BatchOrder(9, 4)] == [4, 4, 1]  # evaluation: in eval mode one is fine
