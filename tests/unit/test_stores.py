"""Stores that are damaged, or were made by somebody else, are built again: nothing of them runs."""

from __future__ import annotations

import json
import pickle
import random
import zlib
from pathlib import Path

import numpy as np
import pytest

from graft.data.sources.base import open_entry, read_entry, save_items, seal
from graft.storage.shards import ShardedRows, is_whole
from tests.unit.test_reading import COUNTS, damaged


class Touch:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, ...]:
        return Path(self.mark).__class__.touch, (Path(self.mark),)


def rows(path: Path) -> ShardedRows:
    return ShardedRows(path, 10, (3,), about={"backbone": "x"})


def compute(positions: np.ndarray) -> np.ndarray:
    return np.repeat(positions[:, None], 3, 1).astype(np.float32)


def sealed(folder: Path, content: bytes) -> Path:
    """A shard with the right checksum of any content."""
    path = folder / f"00000-{zlib.crc32(content):08x}.npy"
    path.write_bytes(content)
    return path


def test_a_shard_with_the_right_checksum_of_something_else_is_computed_again(
    tmp_path: Path,
) -> None:
    mark = tmp_path / "MARK"
    other = tmp_path / "other.npy"
    np.save(other, np.zeros((10, 4), np.float32))
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"
    objects = np.lib.format.magic(1, 0) + bytes([len(header), 0]) + header
    objects += pickle.dumps(Touch(mark))
    for content in (pickle.dumps(Touch(mark)), other.read_bytes(), b"", objects):
        folder = tmp_path / "store"
        folder.mkdir(exist_ok=True)
        path = sealed(folder, content)
        rows(folder).fill(compute)
        assert not path.exists()
        assert np.array_equal(next(rows(folder).blocks()), compute(np.arange(10)))
        assert not mark.exists()
        for file in folder.glob("*.npy"):
            file.unlink()
    assert not is_whole(sealed(tmp_path / "store", pickle.dumps(Touch(mark))))


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"row_shape": 3}', '{"row_shape": [3, "x"]}', '{"row_shape": [-1]}', "{", ""],
)
def test_an_about_json_of_another_form_is_written_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "about.json").write_text(text)
    assert ShardedRows.known_shape(tmp_path) is None
    rows(tmp_path).fill(compute)
    assert ShardedRows.known_shape(tmp_path) == (3,)


def entry(path: Path) -> Path:
    path.mkdir()
    images = np.zeros((4, 3, 2, 2), np.uint8)
    np.save(path / "train-images.npy", images)
    save_items(path, "train", [0, 1, 0, 1], [1, 2, 3, 4])
    seal(path, ["a", "b"])
    return path


def test_an_entry_that_holds_something_else_is_not_used(tmp_path: Path) -> None:
    whole = entry(tmp_path / "whole")
    assert len(open_entry(whole).train.labels) == 4
    info = json.loads((whole / "entry.json").read_text())
    changes: list[object] = [
        [], None, {}, {**info, "files": []}, {**info, "files": {"train-images.npy": "x"}},
        {**info, "classes": 3}, {**info, "classes": [1, 2]}, {**info, "files": {"../x": 1}},
    ]  # fmt: skip
    for change in changes:
        (whole / "entry.json").write_text(json.dumps(change))
        assert read_entry(whole) is None
    arrays: dict[str, np.ndarray] = {
        "train-images": np.zeros((4, 3, 2, 2), np.float32),
        "train-labels": np.zeros(3, np.int64),
        "train-digests": np.zeros((), np.uint64),
    }
    for name, array in arrays.items():
        other = entry(tmp_path / f"other {name}")
        np.save(other / f"{name}.npy", array)
        seal(other, ["a", "b"])
        assert read_entry(other) is None
    other = entry(tmp_path / "pickle")
    (other / "train-labels.npy").write_bytes(pickle.dumps(Touch(tmp_path / "MARK")))
    seal(other, ["a", "b"])
    assert read_entry(other) is None
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_stores_are_noticed(tmp_path: Path, count: int) -> None:
    draw = random.Random(0)
    whole = entry(tmp_path / "whole")
    rows(tmp_path / "rows").fill(compute)
    (shard,) = (tmp_path / "rows").glob("*.npy")
    files = {path: path.read_bytes() for path in [*whole.iterdir(), shard]}
    for _ in range(count):
        path = draw.choice(list(files))
        path.write_bytes(damaged(files[path], draw))
        if path == shard:
            assert is_whole(path) == (path.read_bytes() == files[path])
            sealed(tmp_path / "rows", path.read_bytes())
            assert len(rows(tmp_path / "rows").missing()) <= 1
        else:
            read_entry(whole)
        path.write_bytes(files[path])
        for extra in (tmp_path / "rows").glob("*.npy"):
            if extra != shard:
                extra.unlink()
