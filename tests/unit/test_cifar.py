"""CIFAR-10 from tiny archives in the real format, served over HTTP by the test."""

from __future__ import annotations

import http.server
import os
import pickle
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

from graft.data.sources.cifar import Cifar10
from tests.unit.source_files import class_folders, corner, px, read, together, truncate

NAMES = ["airplane", "automobile", "bird"]
# Neither the members of the official archive nor these are in the batches' order.
MEMBERS = ["data_batch_4", "test_batch", "data_batch_3", "data_batch_5", "data_batch_1"]


class Archive:
    """`source` is Cifar10 for an archive of five batches of 4 images and a test batch of 4."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.path = folder / str(seed) / CIFAR10.filename
        self.pixels: dict[str, NDArray[np.uint8]] = {}
        self.labels: dict[str, list[int]] = {}
        content: dict[str, dict[str, Any]] = {"batches.meta": {"label_names": NAMES}}
        for name in [*MEMBERS, "data_batch_2"]:
            self.pixels[name] = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            self.labels[name] = rng.integers(0, 3, 4).tolist()
            content[name] = {
                "batch_label": name,
                "labels": self.labels[name],
                "data": self.pixels[name],
                "filenames": ["x.png"] * 4,
            }
        unpacked = folder / str(seed) / "unpacked"
        unpacked.mkdir(parents=True)
        with tarfile.open(self.path, "w:gz") as tar:
            for name, value in content.items():
                (unpacked / name).write_bytes(pickle.dumps(value, protocol=2))
                tar.add(unpacked / name, f"{CIFAR10.base_folder}/{name}")
        md5s = {name: calculate_md5(unpacked / name) for name in content}
        official = type(
            "TinyCIFAR10",
            (CIFAR10,),
            {
                "url": "http://127.0.0.1:9/nobody-listens-here",
                "tgz_md5": calculate_md5(self.path),
                "train_list": [[f"data_batch_{n}", md5s[f"data_batch_{n}"]] for n in range(1, 6)],
                "test_list": [["test_batch", md5s["test_batch"]]],
                "meta": {**CIFAR10.meta, "md5": md5s["batches.meta"]},
            },
        )
        self.source: type[Cifar10] = type("TinyCifar10", (Cifar10,), {"official": official})

    def put(self, root: Path) -> Path:
        root.mkdir(exist_ok=True)
        copy = root / self.path.name
        copy.write_bytes(self.path.read_bytes())
        return copy


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def requests(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve the folder of `archive`, slowly; yields the paths asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(archive.path.parent))

        def do_GET(self) -> None:
            asked.append(self.path)
            time.sleep(0.3)
            super().do_GET()

        def log_message(self, *args: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{archive.path.name}"
        monkeypatch.setattr(archive.source.official, "url", url)
        yield asked
        server.shutdown()


def check(source: Cifar10, archive: Archive) -> None:
    splits = read(source, 224)
    assert splits.classes == NAMES
    assert splits.val is None
    assert splits.test is not None
    for split, batches in (
        (splits.train, [f"data_batch_{n}" for n in range(1, 6)]),
        (splits.test, ["test_batch"]),
    ):
        assert isinstance(split.images, np.memmap)
        assert split.images.dtype == np.uint8
        assert split.images.shape == (4 * len(batches), 3, 32, 32)
        assert split.labels.dtype == np.int64
        assert split.labels.tolist() == [x for name in batches for x in archive.labels[name]]
        pixels = np.concatenate([archive.pixels[name] for name in batches])
        # A row of the archive is 1,024 red values, then green, then blue, line by line.
        for n, channel, y, x in np.ndindex(len(pixels), 3, 32, 32):
            assert split.images[n, channel, y, x] == pixels[n, 1024 * channel + 32 * y + x]


@pytest.mark.parametrize("unpacked", [False, True])
def test_every_pixel_and_label(archive: Archive, root: Path, cache: Path, unpacked: bool) -> None:
    copy = archive.put(root)
    if unpacked:
        with tarfile.open(copy) as tar:
            tar.extractall(root, filter="data")
        copy.unlink()
    check(archive.source(root, cache, download=False), archive)
    # As torchvision reads it.
    if unpacked:
        theirs = archive.source.official(root, train=False)
        test = archive.source(root, cache).load(px(224)).test
        assert test is not None
        np.testing.assert_array_equal(test.images.transpose(0, 2, 3, 1), theirs.data)


def test_two_processes_download_once(
    archive: Archive, root: Path, cache: Path, requests: list[str]
) -> None:
    source = archive.source(root, cache)
    assert together(lambda: source.prepare(px(224)), 3) == [0, 0, 0]
    assert requests == [f"/{archive.path.name}"]
    check(source, archive)
    assert not list(root.glob("*.part"))


def test_two_caches_download_once(
    archive: Archive, root: Path, cache: Path, requests: list[str]
) -> None:
    def work() -> None:
        check(archive.source(root, cache / str(os.getpid())), archive)

    assert together(work) == [0, 0]
    assert len(requests) == 1


def test_a_corrupt_archive_is_kept_and_downloaded_again(
    archive: Archive,
    root: Path,
    cache: Path,
    requests: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    copy = archive.put(root)
    truncate(copy)
    torn = copy.read_bytes()
    check(archive.source(root, cache), archive)
    assert copy.with_name(f"{copy.name}.corrupt").read_bytes() == torn
    assert "wrong checksum" in caplog.text
    assert len(requests) == 1


def test_a_server_with_another_archive(
    archive: Archive, root: Path, cache: Path, requests: list[str]
) -> None:
    archive.path.write_bytes(b"something else")
    with pytest.raises(OSError, match=r"wrong checksum, twice; .*data=digits") as caught:
        archive.source(root, cache).prepare(px(224))
    assert "\n" not in str(caught.value)
    assert len(requests) == 2
    assert [path.suffix for path in root.glob("cifar*")] == [".corrupt"]


def test_a_damaged_batch_file_is_replaced_by_the_archive(
    archive: Archive, root: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(archive.put(root)) as tar:
        tar.extractall(root, filter="data")
    truncate(root / CIFAR10.base_folder / "data_batch_3")
    check(archive.source(root, cache), archive)
    assert "data_batch_3 missing or damaged" in caplog.text


@pytest.mark.parametrize(
    ("download", "damaged", "message"),
    [
        (True, False, r"127\.0\.0\.1:9/\S*: download failed \(.*refused\); put cifar-10-python"),
        (False, False, r"not found and download=false; put cifar-10-python\.tar\.gz, or class"),
        (False, True, r"has a wrong checksum and download=false; put "),
    ],
)
def test_no_data(
    archive: Archive, root: Path, cache: Path, download: bool, damaged: bool, message: str
) -> None:
    if damaged:
        truncate(archive.put(root))
    with pytest.raises(FileNotFoundError, match=message) as caught:
        archive.source(root, cache, download=download).prepare(px(224))
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)
    assert "data=digits needs no download" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="prepare"):
        archive.source(root, cache).load(px(224))


def test_other_content_is_not_mixed_up(tmp_path: Path, cache: Path) -> None:
    first, second = Archive(tmp_path, 1), Archive(tmp_path, 2)
    for archive in (first, second, first):
        check(archive.source(archive.path.parent, cache, download=False), archive)
    assert len(list(cache.glob("*/entry.json"))) == 2


def test_class_folders(tmp_path: Path, cache: Path) -> None:
    root = class_folders(tmp_path / "folders")
    splits = read(Cifar10(root, cache, download=False), 224)
    assert splits.classes == ["cat", "dog"]
    assert corner(splits.train.images)[:2] == [(200, 10, 20), (201, 10, 20)]
    truncate(root / "train/cat/1.png")
    with pytest.raises(ValueError, match="1 of 12 images cannot be read"):
        Cifar10(root, cache).prepare(px(224))
    assert len(read(Cifar10(root, cache, on_error="skip")).train.labels) == 5
