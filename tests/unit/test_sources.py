"""Sources of images: the embedded ones, and a cache that survives changes, kills and races."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from graft.data.sources.base import Source
from graft.data.sources.cifar import Cifar10
from graft.data.sources.decode import decode_batch
from graft.data.sources.digits import FILE, Digits
from graft.data.sources.folder import ImageFolder
from graft.data.sources.synthetic import Synthetic
from tests.unit.source_files import (
    BLUE,
    GREEN,
    RED,
    class_folders,
    corner,
    px,
    read,
    save,
    together,
    truncate,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "data")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_replaced_file_is_read_again(root: Path, cache: Path) -> None:
    source = ImageFolder(root, cache)
    path = root / "train/cat/1.bmp"
    save(path, (1, 2, 3))
    assert corner(read(source).train.images)[1] == (1, 2, 3)
    before = path.stat()
    save(path, (4, 5, 6))
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(FileNotFoundError, match="changed since"):
        ImageFolder(root, cache).load(px(32))
    assert corner(read(source).train.images)[1] == (4, 5, 6)
    (root / "train/cat/0.png").unlink()
    assert len(read(source).train.labels) == 6


def test_same_names_in_another_root(root: Path, cache: Path, tmp_path: Path) -> None:
    """Same names, sizes and mtimes: only the root tells the two data sets apart."""
    other = tmp_path / "other"
    for name, colour in (("train/a/0.bmp", RED), ("train/b/0.bmp", GREEN)):
        for base, saved in ((tmp_path / "one", colour), (other, BLUE)):
            os.utime(save(base / name, saved), ns=(0, 0))
    assert corner(read(ImageFolder(tmp_path / "one", cache)).train.images) == [RED, GREEN]
    assert corner(read(ImageFolder(other, cache)).train.images) == [BLUE, BLUE]


def test_a_torn_cache_is_built_again(
    root: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = ImageFolder(root, cache)
    expected = np.array(read(source).train.images)
    [images] = cache.glob("*/train-images.npy")
    text = (images.parent / "entry.json").read_text()
    wrong = ("{", "[]", "5", '{"classes": 1, "files": []}', text.replace("24", "25"))
    rewritten = [lambda p, t=t: (p.parent / "entry.json").write_text(t) for t in wrong]
    header = [lambda p: p.write_bytes(p.read_bytes().replace(b"|u1", b"|i1"))]
    damages: list[Callable[[Path], Any]] = [truncate, Path.unlink, *rewritten, *header]
    for damage in damages:
        damage(images)
        with pytest.raises(FileNotFoundError):
            source.load(px(32))
        np.testing.assert_array_equal(read(source).train.images, expected)


def test_a_killed_build_leaves_nothing(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ImageFolder(root, cache)

    def die(*args: Any, **kwargs: Any) -> Any:
        if "valid" in args[1][0][0]:  # train is written by now
            os.kill(os.getpid(), signal.SIGKILL)
        return decode_batch(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("graft.data.sources.folder.decode_batch", die)
        assert together(lambda: source.prepare(px(32)), 1) == [-signal.SIGKILL]
    assert list(cache.glob("*.partial/train-images.npy"))
    with pytest.raises(FileNotFoundError, match="not decoded"):
        source.load(px(32))
    assert len(read(source).train.labels) == 6
    assert not list(cache.glob("*.partial"))


def test_two_processes_build_one_cache(
    root: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ImageFolder(root, cache)

    def counted(*args: Any, **kwargs: Any) -> Any:
        with (tmp_path / "decoded").open("a") as file:
            file.write("x" * len(args[1]))
        return decode_batch(*args, **kwargs)

    def work() -> None:
        assert corner(read(source).train.images)[0] == (200, 10, 20)

    monkeypatch.setattr("graft.data.sources.folder.decode_batch", counted)
    assert together(work, 3) == [0, 0, 0]
    assert len((tmp_path / "decoded").read_text()) == 12  # each image once


@pytest.mark.parametrize(
    "source",
    [
        Digits(),
        Synthetic(),
        Synthetic(classes=3, per_class=20, test_per_class=5, image_size=9, seed=4),
    ],
    ids=["digits", "synthetic", "synthetic small"],
)
def test_embedded_sources(source: Source) -> None:
    splits, again = read(source), read(source)
    assert splits.val is None
    assert splits.test is not None
    assert again.test is not None
    for split, same in ((splits.train, again.train), (splits.test, again.test)):
        assert split.images.dtype == np.uint8
        assert split.images.ndim == 4
        assert split.labels.dtype == np.int64
        assert len(split.images) == len(split.labels)
        assert set(split.labels.tolist()) == set(range(len(splits.classes)))
        np.testing.assert_array_equal(split.images, same.images)
        np.testing.assert_array_equal(split.labels, same.labels)
    train = {image.tobytes() for image in splits.train.images}
    assert not train & {image.tobytes() for image in splits.test.images}
    # Learnable: the nearest class mean is right far more often than chance.
    means = np.stack(
        [splits.train.images[splits.train.labels == c].mean(0) for c in range(len(splits.classes))]
    )
    distances = ((splits.test.images[:, None] - means[None]) ** 2).sum((2, 3, 4))
    assert (distances.argmin(1) == splits.test.labels).mean() > 0.85


def test_digits_show_what_scikit_learn_has() -> None:
    from sklearn.datasets import load_digits

    theirs, ours = load_digits(), np.loadtxt(FILE, delimiter=",")
    np.testing.assert_array_equal(ours[:, :64], theirs.data)
    np.testing.assert_array_equal(ours[:, 64], theirs.target)
    splits = Digits().load(px(32))
    assert splits.test is not None
    assert splits.classes == [str(name) for name in theirs.target_names]
    assert (len(splits.train.labels), len(splits.test.labels)) == (1198, 599)
    assert splits.train.images.shape[1:] == (3, 32, 32)
    assert splits.train.images.max() == 255
    assert (splits.train.images[:, 0] == splits.train.images[:, 2]).all()


def test_synthetic_seed_and_arguments() -> None:
    one, two = Synthetic(seed=0).load(px(1)).train, Synthetic(seed=1).load(px(1)).train
    assert not np.array_equal(one.images, two.images)
    with pytest.raises(ValueError, match="2 classes or more"):
        Synthetic(classes=1)


@pytest.mark.real_data
@pytest.mark.skipif(
    "GRAFT_REAL_CIFAR" not in os.environ, reason="GRAFT_REAL_CIFAR names no folder of real images"
)
def test_real_cifar_class_folders(cache: Path) -> None:
    root = Path(os.environ["GRAFT_REAL_CIFAR"])
    splits = read(Cifar10(root, cache, download=False), 224)
    assert splits.test is not None
    assert len(splits.classes) == 10
    for name, split, count in (("train", splits.train, 5000), ("test", splits.test, 1000)):
        assert split.images.shape == (10 * count, 3, 32, 32)
        assert np.bincount(split.labels).tolist() == [count] * 10
        for label in (0, 3, 9):
            path = sorted((root / name / splits.classes[label]).iterdir())[17]
            shown = np.asarray(Image.open(path).convert("RGB"))
            row = split.images[np.flatnonzero(split.labels == label)[17]]
            np.testing.assert_array_equal(row.transpose(1, 2, 0), shown)
    # Means per channel of CIFAR-10, as published for the official training set.
    means = splits.train.images.mean((0, 2, 3)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=2e-3)
