"""A run's record of the items of its splits, and finding them again in data that has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graft.data.items import FILE, Items, SplitRecord
from graft.data.sources.base import Split, Splits
from graft.data.sources.folder import ImageFolder
from graft.data.sources.synthetic import Synthetic
from graft.data.splits import draw_splits
from tests.unit.source_files import px

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images of each class, all different."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


def load(photos: Path, on_error: str = "fail") -> Splits:
    source = ImageFolder(photos, photos.parent / "cache", on_error=on_error)  # type: ignore[arg-type]
    source.prepare(px(8))
    return source.load(px(8))


def drawn(loaded: Splits) -> SplitRecord:
    splits = draw_splits(
        loaded,
        val_fraction=0.2, test_fraction=0.3, seed=0, train_fraction=1.0, shots_per_class=None,
    )  # fmt: skip
    return SplitRecord.of(loaded, splits)


def kept(record: SplitRecord, tmp_path: Path) -> SplitRecord:
    """Written to a run folder and read back."""
    (tmp_path / FILE).write_bytes(record.packed())
    found = SplitRecord.read(tmp_path)
    assert found is not None
    return found


def pixels(record: SplitRecord, loaded: Splits) -> dict[str, np.ndarray]:
    splits, _ = record.find(loaded)
    return {name: split.images[split.rows] for name, split in splits.items()}


def rename(photos: Path) -> None:
    (photos / "train/cat/0.png").rename(photos / "train/cat/renamed.png")


def add(photos: Path) -> None:
    shutil.copy(photos / "train/cat/3.png", photos / "train/cat/00.png")
    Image.new("RGB", (8, 8)).save(photos / "train/dog/00.png")


def add_class(photos: Path) -> None:
    shutil.copytree(photos / "train/cat", photos / "train/aardvark")


def move_all(photos: Path) -> None:
    for file in (photos / "train/owl").iterdir():
        (photos / "train/owl/below").mkdir(exist_ok=True)
        if file.is_file():
            file.rename(photos / "train/owl/below" / file.name)


@pytest.mark.parametrize("change", [rename, add, add_class, move_all])
def test_the_splits_stay_those_of_the_run_whatever_happens_to_other_files_and_names(
    photos: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    before = load(photos)
    record = kept(drawn(before), tmp_path)
    expected = pixels(record, before)
    labels = {name: items.labels for name, items in record.splits.items()}
    change(photos)
    after = load(photos)
    splits, changes = record.find(after)
    assert changes == {}
    for name, images in pixels(record, after).items():
        assert (images == expected[name]).all(), name
        assert (splits[name].labels == labels[name]).all()
    # The case is not an empty one: drawn anew, the test split would have been another.
    assert change is move_all or drawn(after).summary() != record.summary()


def test_an_image_that_was_skipped_and_is_repaired_shifts_no_draw(
    photos: Path, tmp_path: Path
) -> None:
    whole = (photos / "train/cat/4.png").read_bytes()
    (photos / "train/cat/4.png").write_bytes(whole[:40])
    before = load(photos, "skip")
    record = kept(drawn(before), tmp_path)
    expected = pixels(record, before)
    (photos / "train/cat/4.png").write_bytes(whole)
    after = load(photos, "skip")
    assert record.find(after)[1] == {}
    assert all((images == expected[n]).all() for n, images in pixels(record, after).items())


def test_what_is_gone_changed_or_relabelled_is_left_out_and_named(
    photos: Path, tmp_path: Path
) -> None:
    record = kept(drawn(load(photos)), tmp_path)
    cats, dogs, owls = (record.splits["test"].names[[0, 3, 6]]).tolist()
    (photos / cats.decode()).unlink()
    Image.new("RGB", (8, 8)).save(photos / dogs.decode())
    (photos / owls.decode()).rename(photos / "train/cat/was_an_owl.png")
    splits, changes = record.find(load(photos))
    assert changes == {
        "test": f"of 9 test images, 1 missing (first: {cats.decode()}), 1 with another content "
        f"(first: {dogs.decode()}), 1 in another class (first: {owls.decode()})"
    }
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 18, "val": 3, "test": 6,
    }  # fmt: skip


def test_images_that_are_stored_at_another_size_are_a_change(photos: Path) -> None:
    record = drawn(load(photos))
    Image.new("RGB", (12, 8)).save(photos / "train/dog/wide.png")  # now all are resized
    source = ImageFolder(photos, photos.parent / "cache")
    source.prepare(px(16))
    _, changes = record.find(source.load(px(16)))
    assert changes["test"] == "test images are stored at 16x16 now, at 8x8 before"


def test_items_of_arrays_go_by_position_and_pixels(tmp_path: Path) -> None:
    before = Synthetic(classes=3, per_class=10, test_per_class=4, image_size=8).load(px(8))
    record = kept(drawn(before), tmp_path)
    assert record.find(before)[1] == {}
    more = Split(before.train.images[1:], before.train.labels[1:])
    _, changes = record.find(Splits(before.classes, more, None, before.test))
    assert sum(len(text) > 0 for text in changes.values()) == 1  # the split that had row 0
    assert "1 missing" in str(changes) or "1 with another content" in str(changes)


def test_the_digest_tells_contents_and_classes_and_nothing_else(
    photos: Path, tmp_path: Path
) -> None:
    def digest(loaded: Splits) -> object:
        whole = Splits(loaded.classes, loaded.train, loaded.train, loaded.train)
        return drawn(whole).summary()["test"]

    first = digest(load(photos))
    rename(photos)
    shutil.move(photos, tmp_path / "elsewhere")
    assert digest(load(tmp_path / "elsewhere")) == first
    (tmp_path / "elsewhere/train/cat").rename(tmp_path / "elsewhere/train/cow")
    assert digest(load(tmp_path / "elsewhere")) != first
    assert first["items"] == 30  # type: ignore[index]


def test_a_record_that_is_damaged_is_named_and_none_is_none(photos: Path, tmp_path: Path) -> None:
    assert SplitRecord.read(tmp_path) is None
    content = drawn(load(photos)).packed()
    rng = np.random.default_rng(0)
    for cut in rng.integers(0, len(content), 40):
        (tmp_path / FILE).write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"splits\.npz is damaged"):
            SplitRecord.read(tmp_path)


def test_a_record_without_one_of_the_three_splits_is_damaged(tmp_path: Path) -> None:
    items = Items("train", np.array([b"0"]), np.array([1], np.uint64), np.array([0]), (8, 8))
    record = SplitRecord(["a", "b"], {"train": items, "test": items})
    (tmp_path / "splits.npz").write_bytes(record.packed())
    with pytest.raises(ValueError, match=r"splits\.npz is damaged"):
        SplitRecord.read(tmp_path)
