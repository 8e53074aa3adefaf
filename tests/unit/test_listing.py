"""What people's folders look like: names of splits and classes, junk, links, pipes, leftovers."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.data.sources.folder import EvalFolder, ImageFolder
from graft.data.sources.listing import list_images
from tests.unit.source_files import RED, class_folders, corner, read, save


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "data")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Val", "Test"),
        ("TRAINING", "validation", "testing"),
        ("train_set", "dev", "eval"),
        ("training_set", "valid-set", "holdout"),
        ("train", "Dev", "test images"),
    ],
)
def test_names_of_splits(
    root: Path, cache: Path, train: str, val: str, test: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for old, new in (("train", train), ("valid", val), ("test", test)):
        (root / old).rename(root / new)
    splits = read(ImageFolder(root, cache))
    assert splits.val is not None
    assert splits.test is not None
    sizes = [len(split.labels) for split in (splits.train, splits.val, splits.test)]
    assert sizes == [6, 2, 4]
    assert f"val from {val}, test from {test}" in said(caplog)
    assert "unused" not in caplog.text


def test_class_folders_at_the_root(
    root: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cat", "dog"):
        (root / "train" / name).rename(root / name)
    (root / "train").rmdir()
    shutil.rmtree(root / "valid")
    shutil.rmtree(root / "test")
    save(root / "test" / "0.png", RED)  # unlabelled
    save(root / "train" / "0.png", RED)  # a class: steam engines
    (root / "labels.csv").write_text("x")
    splits = read(ImageFolder(root, cache))
    assert splits.classes == ["cat", "dog", "train"]
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert (splits.val, splits.test) == (None, None)
    assert "left unused: test/ (no class folders in it), labels.csv" in said(caplog)
    paths = [path for path, _ in list_images(root).images["train"]]
    assert paths[:2] == ["cat/0.png", "cat/1.png"]


def test_what_is_left_unused_is_named(
    root: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(root / "test")
    save(root / "test/unknown/0.png", RED)
    (root / "train/labels.csv").write_text("x")
    (root / "extra").mkdir()
    splits = read(ImageFolder(root, cache))
    assert splits.test is None
    assert (
        "left unused: train/labels.csv, test/ (none of its folders is a class of train), extra/"
        in said(caplog)
    )


def test_a_class_of_val_or_test_may_be_empty(
    root: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "test/cat/0.png").unlink()
    (root / "test/cat/1.png").unlink()
    splits = read(ImageFolder(root, cache))
    assert splits.test is not None
    assert splits.test.labels.tolist() == [1, 1]
    assert "left unused: test/cat/ (no images in it)" in said(caplog)
    (root / "train/emu").mkdir()
    with pytest.raises(ValueError, match=r"train/emu: no images"):
        list_images(root)


def test_what_is_evaluated_on_has_the_classes_it_has_images_of(
    root: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty folder was a class of the entry in the cache, for ever."""
    other = root.parent / "other"
    save(other / "dog" / "0.png", RED)
    (other / "ape").mkdir()
    (other / "zebra").mkdir()
    splits = read(EvalFolder(other, cache))
    assert splits.classes == ["dog"]
    assert splits.train.labels.tolist() == [0]
    assert "left unused: ape/ (no images in it), zebra/ (no images in it)" in said(caplog)


def test_a_class_that_is_there_later_is_not_that_of_an_earlier_entry(
    root: Path, cache: Path
) -> None:
    before = read(ImageFolder(root, cache)).classes
    (root / "train/cat").rename(root / "train/lynx")
    (root / "test/cat").rename(root / "test/lynx")
    (root / "valid/cat").rename(root / "valid/lynx")
    assert (before, read(ImageFolder(root, cache)).classes) == (["cat", "dog"], ["dog", "lynx"])


JUNK = (
    *("@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"),
    *("__pycache__", ".ipynb_checkpoints", "#recycle"),
)


@pytest.mark.parametrize("place", [".", "train", "train/cat", "test"])
def test_junk_is_skipped_and_mentioned(
    root: Path, cache: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name in JUNK:
        save(root / place / name / "0.png", RED)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png"):
        (root / place / name).write_text("x")
    splits = read(ImageFolder(root, cache))
    assert splits.classes == ["cat", "dog"]
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "skipped, no data: " in said(caplog)
    assert "hidden files 2" in said(caplog)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert list_images(root).junk.total() == len(JUNK) + 4


def test_unicode_forms_of_a_name_are_one_class(root: Path, cache: Path) -> None:
    name = "Kaffee-Ä"
    composed, apart = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    save(root / "train" / apart / "0.png", RED)
    save(root / "train" / composed / "1.png", RED)
    save(root / "test" / apart / "0.png", RED)
    splits = read(ImageFolder(root, cache))
    assert splits.classes == [composed, "cat", "dog"]
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert splits.test is not None
    assert splits.test.labels.tolist()[0] == 0


def test_a_name_that_is_not_utf_8_works(root: Path, cache: Path) -> None:
    (root / "train/cat").rename(root / "train" / os.fsdecode(b"caf\xe9"))
    for place in ("valid", "test"):
        (root / place / "cat").rename(root / place / os.fsdecode(b"caf\xe9"))
    broken = root / "train/dog" / os.fsdecode(b"\xff.png")
    broken.write_bytes(b"")
    splits = read(ImageFolder(root, cache, on_error="skip"))
    assert splits.classes == ["caf\\xe9", "dog"]
    json.dumps(splits.classes, ensure_ascii=False).encode()
    with pytest.raises(ValueError, match=r"dog/\\xff\.png: not an image") as caught:
        read(ImageFolder(root, cache))
    str(caught.value).encode()


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "dangling link": (lambda p: p.symlink_to("/nowhere"), "a link that leads nowhere"),
    "link to itself": (lambda p: p.symlink_to(p), "a link that leads nowhere"),
    "link around": (lambda p: p.symlink_to(p.parent), "a link to a folder around it"),
    "link to the root": (lambda p: p.symlink_to(p.parents[2]), "a link to a folder around it"),
    "pipe": (os.mkfifo, "a named pipe, not a file"),
    "socket": (_socket, "a socket, not a file"),
}


@pytest.mark.parametrize(("damage", "why"), BROKEN.values(), ids=list(BROKEN))
def test_what_is_no_file_is_an_unreadable_image(
    root: Path, cache: Path, damage: Callable[[Path], Any], why: str
) -> None:
    damage(root / "train/cat/9.png")
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"1 of 13 .*cat/9\.png: {why}; data\.source\.on_err"):
            read(ImageFolder(root, cache))
    splits = read(ImageFolder(root, cache, on_error="skip"))
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_links_are_followed_and_cycles_end(root: Path, cache: Path, tmp_path: Path) -> None:
    (root / "train/cat").rename(tmp_path / "cats")
    (root / "train/cat").symlink_to(tmp_path / "cats")
    (tmp_path / "cats/back").symlink_to(tmp_path / "other")
    save(tmp_path / "other/5.png", RED)
    (tmp_path / "other/forth").symlink_to(tmp_path / "cats")
    splits = read(ImageFolder(root, cache, on_error="skip"))
    assert corner(splits.train.images)[3] == RED
    assert splits.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert list_images(root).broken == [("train/cat/back/forth", "a link to a folder around it")]


def test_a_class_that_is_a_dangling_link_is_not_passed_over(root: Path, cache: Path) -> None:
    (root / "train/emu").symlink_to("/nowhere")
    (root / "dev").symlink_to("/nowhere")
    with pytest.raises(ValueError, match=r"2 of 14 .* first: .*data/dev: a link that leads nowh"):
        read(ImageFolder(root, cache))


def test_a_class_that_loses_most_images_is_an_error(root: Path, cache: Path) -> None:
    (root / "train/cat/0.png").write_bytes(b"")
    assert len(read(ImageFolder(root, cache, on_error="skip")).train.labels) == 5
    (root / "train/cat/1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 12 .*; 1 of 3 are left in .*data/train/cat$"):
        read(ImageFolder(root, cache, on_error="skip"))


def test_files_that_describe_images_are_not_lost(root: Path, cache: Path) -> None:
    for name in ("0.json", "1.json", "2.json", "0.xml", "1.txt", "a.csv"):
        (root / "train/cat" / name).write_text("x")
    assert len(read(ImageFolder(root, cache)).train.labels) == 6


@pytest.mark.parametrize(
    ("place", "labels"),
    [("Testing", [0, 1]), (".", [0, 1]), ("dev", [0, 1])],
)
def test_images_to_evaluate_on(root: Path, cache: Path, place: str, labels: list[int]) -> None:
    other = root.with_name("other")
    for name in ("cat", "dog"):
        save(other / place / name / "0.png", RED)
    splits = read(EvalFolder(other, cache))
    assert splits.test is not None
    assert splits.test.labels.tolist() == labels
    assert splits.classes == ["cat", "dog"]
    shutil.rmtree(other / place / "dog")
    assert read(EvalFolder(other, cache)).classes == ["cat"]
