"""Class folders: what is read, how it is stored, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from graft.data.datamodule import TransferDataModule
from graft.data.notes import notes
from graft.data.sources.folder import ImageFolder
from graft.transforms.images import Augment, ImageInputs
from graft.transforms.preprocessing import Preprocessing
from tests.unit.source_files import (
    BLUE,
    GREEN,
    RED,
    class_folders,
    corner,
    px,
    read,
    save,
    truncate,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "data")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_class_folders(root: Path, cache: Path) -> None:
    splits = read(ImageFolder(root, cache))
    assert splits.classes == ["cat", "dog"]
    assert splits.val is not None
    assert splits.test is not None
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.train.labels.dtype == np.int64
    assert corner(splits.train.images) == [(200 + n, 10, 20) for n in range(3)] + [
        (n, 220, 40) for n in range(3)
    ]
    assert splits.val.images.shape == (2, 3, 24, 24)
    assert corner(splits.test.images)[2:] == [(0, 220, 40), (1, 220, 40)]
    assert isinstance(splits.train.images, np.memmap)
    assert not splits.train.images.flags.writeable


def test_only_train(root: Path, cache: Path) -> None:
    (root / "valid").rename(root / "unused")
    (root / "test").rename(root / "unused2")
    splits = read(ImageFolder(root, cache))
    assert splits.val is None
    assert splits.test is None


def test_many_rounds_keep_the_order(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.data.sources.folder.BATCH", 3)
    for n in range(50):
        size = (100, 80 + n)  # mixed sizes, so that several threads decode
        save(tmp_path / "d/train/a" / f"{n:02}.png", Image.new("RGB", size, (n, 0, 0)))
        save(tmp_path / "d/train/b/deep" / f"{n:02}.png", Image.new("RGB", size, (n, 255, 0)))
    train = read(ImageFolder(tmp_path / "d", cache)).train
    assert corner(train.images) == [(n, g, 0) for g in (0, 255) for n in range(50)]
    assert train.labels.tolist() == [0] * 50 + [1] * 50


def test_formats(tmp_path: Path, cache: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    grey = image.convert("L")
    palette = image.quantize(16)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    see_through = np.array(palette.convert("RGB"))
    see_through[np.asarray(palette) == 3] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # stored on its side: turn clockwise to see it
    a = tmp_path / "d/train/a"
    flat = Image.new("RGB", (24, 24), BLUE)
    expected: dict[str, NDArray[np.uint8]] = {}
    cases: list[tuple[str, Image.Image, dict[str, Any], NDArray[np.uint8]]] = [
        ("0.png", image, {}, pixels),
        ("1.BMP", image, {}, pixels),
        ("2.webp", image, {"lossless": True}, pixels),
        ("3.png", grey, {}, np.asarray(grey.convert("RGB"))),
        ("4.png", palette, {}, np.asarray(palette.convert("RGB"))),
        ("5.png", palette, {"transparency": 3}, see_through),
        ("6.png", image.convert("RGBA"), {}, pixels),
        ("7.png", deep, {}, np.asarray(grey.convert("RGB"))),
        ("8.png", image, {"exif": turned}, np.rot90(pixels, k=-1)),
        ("9.JPG", flat, {"quality": 95}, np.asarray(flat)),
        ("9_.jpeg", flat.convert("CMYK"), {"quality": 95}, np.asarray(flat)),
    ]
    for name, saved, options, shown in cases:
        save(a / name, saved, **options)
        expected[name] = shown
    save(tmp_path / "d/train/b/0.png", RED)

    images = read(ImageFolder(tmp_path / "d", cache)).train.images
    for stored, (name, shown) in zip(images[:-1], sorted(expected.items()), strict=True):
        tolerance = 4 if name.lower().endswith("g") and "j" in name.lower() else 0
        difference = np.abs(stored.transpose(1, 2, 0).astype(int) - shown)
        assert difference.max() <= tolerance, name


def test_mixed_sizes_keep_the_central_square(tmp_path: Path, cache: Path) -> None:
    wide = np.zeros((48, 144, 3), np.uint8)
    wide[:, :48], wide[:, 48:96], wide[:, 96:] = RED, GREEN, BLUE
    save(tmp_path / "d/train/a/0.png", Image.fromarray(wide))
    save(tmp_path / "d/train/a/1.png", Image.fromarray(wide.transpose(1, 0, 2)))
    chess = np.indices((96, 96)).sum(0) % 2 * 255
    save(tmp_path / "d/train/b/0.png", Image.fromarray(chess.astype(np.uint8)))
    save(tmp_path / "d/train/b/1.png", Image.new("RGB", (5, 9), BLUE))  # smaller: enlarged

    images = read(ImageFolder(tmp_path / "d", cache), 16).train.images
    assert images.shape == (4, 3, 16, 16)
    for row, colour in ((0, GREEN), (1, GREEN), (3, BLUE)):
        assert (images[row, :, 1:-1, 1:-1] == np.array(colour).reshape(3, 1, 1)).all()
    whole = Image.fromarray(wide).resize((48, 16), Image.Resampling.BILINEAR)
    reference = np.asarray(whole)[:, 16:32].transpose(2, 0, 1)  # resize, then crop
    assert np.abs(images[0].astype(int) - reference).max() <= 1
    assert np.abs(images[2].astype(int) - 127).max() < 8  # averaged, not sampled


@pytest.mark.parametrize("augment", [True, False, {"scale": [0.1, 1]}])
def test_crops_that_cannot_leave_the_central_square_are_said(
    root: Path, cache: Path, augment: bool | dict[str, Any]
) -> None:
    for name, size in (("wide", (48, 24)), ("large", (48, 48))):
        Image.new("RGB", size).save(root / "train" / "cat" / f"{name}.png")
    scale = None if isinstance(augment, dict) else [0.2, 1]
    data = TransferDataModule(
        ImageFolder(root, cache), ImageInputs(Preprocessing(24, 24), augment=Augment(scale=scale))
    )
    data.prepare_data()
    data.setup()
    said = [note for note in notes(data, steps=False, augments=[augment]) if "crops" in note]
    assert said == (augment is not False) * [
        "data.augment.scale crops from the central square of an image: of 1 that are longer one "
        "way the ends are never seen"
    ]


def test_one_different_image_at_the_end_resizes_all(root: Path, cache: Path) -> None:
    save(root / "test/dog/9.png", Image.new("RGB", (24, 30), BLUE))
    splits = read(ImageFolder(root, cache), 32)
    assert splits.test is not None
    assert splits.train.images.shape == (6, 3, 32, 32)
    assert splits.test.images.shape == (5, 3, 32, 32)
    assert not list(cache.glob("*native*"))


def test_storage_size(root: Path, cache: Path) -> None:
    source = ImageFolder(root, cache)
    assert read(source, 32).train.images.shape[2:] == (24, 24)
    assert read(source, 64).train.images.shape[2:] == (24, 24)
    assert len(list(cache.glob("*/entry.json"))) == 1  # one copy for both
    assert read(source, 16).train.images.shape[2:] == (16, 16)
    assert source.load(px(24)).train.images.shape[2:] == (24, 24)


def _only_class(root: Path) -> None:
    for split in ("train", "valid", "test"):
        (root / split / "dog").rename(root / f"gone-{split}")


def _flatten(root: Path) -> None:
    for name in ("cat", "dog"):
        for path in (root / "train" / name).iterdir():
            path.rename(root / "train" / f"{name}{path.name}")
        (root / "train" / name).rmdir()


def _nest(root: Path) -> None:
    root.rename(root.with_name("in"))
    root.mkdir()
    root.with_name("in").rename(root / "in")


ERRORS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing", lambda r: r.rename(r.with_name("x")), r"data: no such folder"),
    (
        "no train",
        lambda r: (r / "train").rename(r.with_name("x")),
        r"data: no train folder; expected .*data/train/<class>/<image> or .*data/<class>/<image>$",
    ),
    (
        "flat train",
        _flatten,
        r"data: no class folders in train; expected",
    ),
    (
        "a folder too deep",
        _nest,
        r"data: only one class, in; 2 are needed; .*data/in has a train folder: data\.root=.*in$",
    ),
    ("one class", _only_class, r"data/train: only one class, cat"),
    (
        "unknown class",
        lambda r: save(r / "test/cow/0.png", RED),
        r"data/test/cow: no such class in .*data/train$",
    ),
    ("empty class", lambda r: (r / "train/emu").mkdir(), r"data/train/emu: no images"),
    (
        "only unknown extensions",
        lambda r: [p.rename(p.with_suffix(".heic")) for p in (r / "valid/cat").iterdir()],
        r"data/valid/cat: 1 of 1 files are no images that can be read \(\.heic 1\): convert them",
    ),
    (
        "most of a class has unknown extensions",
        lambda r: [(r / "train/cat" / n).write_text("x") for n in ("a.dcm", "b.dcm", "c", "d")],
        r"data/train/cat: 4 of 7 files are no .* \(\.dcm 2, no extension 2\)",
    ),
    ("two val", lambda r: (r / "val/cat").mkdir(parents=True), r"data: both val.* and val"),
    (
        "truncated",
        lambda r: [truncate(r / "train/cat/1.png"), (r / "test/dog/0.png").write_bytes(b"")],
        r"^2 of 12 images cannot be read, first: .*data/train/cat/1\.png: .*truncated.*; "
        r"data\.source\.on_error=skip leaves them out$",
    ),
    (
        "not an image",
        lambda r: (r / "train/dog/2.png").write_text("hello"),
        r"^1 of 12 images .*dog/2\.png: not an image",
    ),
]


@pytest.mark.parametrize(
    ("damage", "message"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS]
)
def test_errors_are_one_line_naming_the_path(
    root: Path, cache: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(root)
    for _ in range(2):  # the second time from what the first may have left in the cache
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            ImageFolder(root, cache).prepare(px(32))
        assert "\n" not in str(caught.value)


def test_skip_leaves_unreadable_images_out(
    root: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truncate(root / "train/cat/1.png")
    (root / "train/dog/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2 of 12"):
        ImageFolder(root, cache).prepare(px(32))
    train = read(ImageFolder(root, cache, on_error="skip")).train
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert corner(train.images) == [(200, 10, 20), (202, 10, 20), (1, 220, 40), (2, 220, 40)]
    assert "2 of 12 images cannot be read" in caplog.text
    assert "they are left out" in caplog.text

    with pytest.raises(ValueError, match="2 of 12"):
        ImageFolder(root, cache).load(px(32))
    with pytest.raises(ValueError, match="on_error is fail or skip, not 'ignore'"):
        ImageFolder(root, cache, on_error="ignore")  # type: ignore[arg-type]


def test_skip_does_not_empty_a_class(root: Path, cache: Path) -> None:
    for path in (root / "valid/dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none is left in .*data/valid/dog$"):
        ImageFolder(root, cache, on_error="skip").prepare(px(32))


def test_permissions_are_not_the_image_s_fault(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("graft.data.sources.decode.open_image", denied)
        with pytest.raises(PermissionError, match=r"0\.png"):
            ImageFolder(root, cache, on_error="skip").prepare(px(32))
    assert len(read(ImageFolder(root, cache)).train.labels) == 6


def test_unknown_extensions_are_counted(
    root: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.svg", "b.svg", "notes.txt", ".hidden.png"):
        (root / "train/cat" / name).write_text("x")
    ImageFolder(root, cache).prepare(px(32))
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "3 files left out" in record.getMessage()
    assert ".svg 2, .txt 1" in record.getMessage()
    assert "train/cat/a.svg" in record.getMessage()
