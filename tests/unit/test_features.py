"""Frozen features on disk: never stale, never torn, computed once by all who need them."""

from __future__ import annotations

import errno
import inspect
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graft.data.datamodule import TransferDataModule
from graft.data.datasets import ImageDataset
from graft.data.sources.folder import ImageFolder
from graft.features.prefix import Extractor, FrozenPrefix
from graft.features.store import FeatureStore
from graft.models.backbone import Backbone
from graft.models.torchvision import torchvision_backbone
from graft.storage import shards
from graft.storage.digests import module_digest
from graft.storage.npy import locked
from graft.storage.shards import ShardedRows
from graft.storage.stored import StoredFeatures
from graft.training.build import build, build_stages
from graft.training.module import TransferModule
from graft.transforms.draws import uniform
from graft.transforms.prepare import Prepare
from graft.transforms.preprocessing import Preprocessing
from tests.conftest import TINY, Graft, Train, compose

ROWS, SHAPE = 100, (3, 2)


def expected(positions: np.ndarray) -> np.ndarray:
    return (positions[:, None, None] * 10 + np.arange(6).reshape(SHAPE)).astype(np.float32)


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardedRows:
    monkeypatch.setattr(shards, "SHARD_BYTES", 240)  # ten rows
    return ShardedRows(tmp_path / "features-x", ROWS, SHAPE)


def content(entry: ShardedRows) -> np.ndarray:
    return np.concatenate(list(entry.blocks()))


class Slow:
    """Computes rows slowly and writes down which."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        with self.notes.open("a") as file:
            file.write(f"{positions[0]}\n")
        time.sleep(0.05)
        return expected(positions)

    def shards(self) -> list[str]:
        return self.notes.read_text().split()


def test_rows_come_back_in_any_order(entry: ShardedRows) -> None:
    assert len(entry.shards) == 10
    entry.fill(expected)
    assert np.array_equal(content(entry), expected(np.arange(ROWS)))
    index = np.array([99, 0, 10, 9, 10])
    assert np.array_equal(entry.gather(index), expected(index))


def test_a_build_that_was_killed_goes_on_with_what_is_missing(
    entry: ShardedRows, tmp_path: Path
) -> None:
    slow = Slow(tmp_path / "notes")
    process = multiprocessing.get_context("fork").Process(target=entry.fill, args=(slow,))
    process.start()
    while not slow.notes.exists() or len(slow.shards()) < 4:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    before = slow.shards()
    entry.fill(slow)
    assert np.array_equal(content(entry), expected(np.arange(ROWS)))
    repeated = len(slow.shards()) - len(entry.shards)
    assert len(before) >= 4
    assert repeated <= 1  # the one that was being computed
    assert not list(entry.path.glob("*.partial"))


def test_two_builders_share_the_work(entry: ShardedRows, tmp_path: Path) -> None:
    slow = Slow(tmp_path / "notes")
    context = multiprocessing.get_context("fork")
    builders = [context.Process(target=entry.fill, args=(slow,)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    assert sorted(slow.shards()) == sorted(str(i * 10) for i in range(10))
    assert np.array_equal(content(entry), expected(np.arange(ROWS)))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [flip_a_byte, cut_the_end, Path.unlink])
def test_a_damaged_shard_is_computed_again_and_no_other(
    entry: ShardedRows, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    entry.fill(expected)
    damage(next(entry.path.glob("00003-*.npy")))
    again, slow = ShardedRows(entry.path, ROWS, SHAPE), Slow(tmp_path / "notes")
    assert again.missing() == [3]
    again.fill(slow)
    assert slow.shards() == ["30"]
    assert np.array_equal(content(again), expected(np.arange(ROWS)))


def test_two_builders_repair_a_damaged_entry_together(entry: ShardedRows, tmp_path: Path) -> None:
    entry.fill(expected)
    for path in entry.path.glob("*.npy"):
        flip_a_byte(path)
    slow = Slow(tmp_path / "notes")
    again = ShardedRows(entry.path, ROWS, SHAPE)
    context = multiprocessing.get_context("fork")
    builders = [context.Process(target=again.fill, args=(slow,)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    assert np.array_equal(content(again), expected(np.arange(ROWS)))


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    entry = ShardedRows(tmp_path / "features-y", 4, (2,), "float16")
    with pytest.raises(ValueError, match=r"up to 1e\+05 don't fit float16: .*cache_dtype=float32"):
        entry.fill(lambda positions: np.full((len(positions), 2), 1e5, np.float32))


def test_an_attribute_that_no_weight_shows_is_part_of_the_key() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

    assert module_digest(Scaled(1.0)) == module_digest(Scaled(1.0))
    assert module_digest(Scaled(1.0)) != module_digest(Scaled(2.0))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(
    entry: ShardedRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    slow = Slow(tmp_path / "notes")
    with pytest.raises(OSError, match=r"need 2\.4 kB in .* are free: set paths\.cache"):
        entry.fill(slow)
    assert not slow.notes.exists()


def test_what_does_not_fit_in_memory_is_read_row_by_row(
    entry: ShardedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry.fill(expected)
    index = torch.tensor([5, 3, 77])
    inside = StoredFeatures(entry)
    monkeypatch.setattr("graft.storage.stored.IN_MEMORY_BYTES", 0)
    outside = StoredFeatures(entry)
    assert inside.tensor is not None
    assert outside.tensor is None
    assert torch.equal(inside[index], outside[index])


PROBE = ["transfer=linear_probe", "transfer.stages.probe.cache=on", "paths.cache=features"]


def store(tmp_path: Path, *overrides: str) -> FeatureStore:
    config = compose(*TINY, *PROBE, *overrides)
    torch.manual_seed(int(config["seed"]))
    module, datamodule = build(config)
    stage = build_stages(config)[0]
    module.start_stage(stage)
    datamodule.start_stage(0, augment=stage.augment, image_size=stage.image_size)
    return FeatureStore(
        module.backbone,
        module.cut,
        datamodule,
        stage,
        tmp_path / "cache",
        device=module.device,
    )


def entries(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").glob("features-*")}


@pytest.mark.parametrize(
    "change",
    [
        "data.source.seed=1",
        "data.image_size=40",
        "seed=1",  # other random weights
        "backbone.taps=all",
        "mirror=true",
        "transfer.stages.probe.trainable=1",  # another block
        "transfer.stages.probe.cache_dtype=float16",
        "transfer.stages.probe.views=flip",
        "transfer.stages.probe.views=3",
    ],
)
def test_features_of_anything_else_are_another_entry(tmp_path: Path, change: str) -> None:
    """Rule 11: other images, transform, weights, taps, block, dtype or views."""
    store(tmp_path).features(["train"])
    one = entries(tmp_path)
    store(tmp_path).features(["train"])
    assert entries(tmp_path) == one
    store(tmp_path, change).features(["train"])
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("trainable", ["head", "1"])
def test_what_is_too_large_is_known_before_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: str
) -> None:
    limit = ["transfer.stages.probe.cache=auto", "transfer.stages.probe.cache_limit_gb=0.0000001"]
    made = store(tmp_path, *limit, f"transfer.stages.probe.trainable={trainable}")
    said: list[str] = []
    made.tell = said.append

    def forbidden(*arguments: Any) -> None:
        raise AssertionError("all images were read")

    monkeypatch.setattr(TransferDataModule, "digest", forbidden)
    assert made.features(["train", "val"]) == {}
    assert "its features would take" in said[0]


def test_the_record_of_a_source_stands_for_the_pixels(
    image_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same rows, files and decoding, without a look at them."""
    monkeypatch.delattr("graft.data.datasets.rows_digest")

    def digest(rows: range = range(9), **arguments: Any) -> str:
        source, form = ImageFolder(image_folders, tmp_path, **arguments), Preprocessing(32, 32)
        source.prepare(form)
        return ImageDataset(source.load(form).train, np.array(rows)).digest()

    first = digest()
    assert digest(range(1, 10)) != first
    assert digest(background="black") != first
    dark, light = (image_folders / "train" / name for name in ("dark", "light"))
    (light / "0.jpg").unlink()
    assert digest() == first  # the first nine are dark
    (dark / "0.jpg").write_bytes((light / "1.jpg").read_bytes())
    assert digest() != first


def test_another_library_version_or_other_code_is_another_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path).features(["val"])
    monkeypatch.setattr(torch, "__version__", "0.0")
    store(tmp_path).features(["val"])
    assert len(entries(tmp_path)) == 2
    source, count = inspect.getsource, 2
    for edited in (Backbone, sys.modules[Prepare.__module__], sys.modules[uniform.__module__]):
        monkeypatch.setattr(inspect, "getsource", lambda w, e=edited: "" if w is e else source(w))
        store(tmp_path).features(["val"])
        count += 1
        assert len(entries(tmp_path)) == count, edited


def test_views_are_stored_side_by_side_and_drawn_anew_each_epoch(tmp_path: Path) -> None:
    made = store(tmp_path, "transfer.stages.probe.views=flip")
    features = made.features(["train"])["train"]
    backbone = made.backbone.eval()
    images = made.datamodule.prepared("train", range(5), torch.device("cpu"))
    with torch.no_grad():
        plain, mirrored = backbone(images), backbone(images.flip(3))
    rows = torch.arange(5) * 2
    assert torch.allclose(features[rows], plain, atol=1e-5)
    assert torch.allclose(features[rows + 1], mirrored, atol=1e-5)
    data = made.datamodule
    data.start_stage(0, augment=False)
    data.features = {"train": features}
    drawn = []
    for epoch in range(8):
        data._epoch = lambda epoch=epoch: epoch  # type: ignore[method-assign, misc]
        batch = data.loader("train", train=False).dataset[[0, 1, 2, 3, 4]]
        drawn.append(torch.isclose(batch["features"], plain, atol=1e-5).all(1))
    assert 10 < torch.stack(drawn).sum() < 30  # about half of 40 are the mirror images


def test_mirror_is_the_mean_over_an_image_and_its_mirror_image(tmp_path: Path) -> None:
    made = store(tmp_path, "mirror=true")
    backbone = made.backbone.eval()
    images = made.datamodule.prepared("val", range(4), torch.device("cpu"))
    backbone.mirror = False
    with torch.no_grad():
        mean = (backbone(images) + backbone(images.flip(3))) / 2
        backbone.mirror = True
        assert torch.allclose(made.features(["val"])["val"][torch.arange(4)], mean, atol=1e-5)
        backbone.train()
        assert torch.equal(backbone.eval()(images), mean)


@pytest.mark.parametrize("model", ["resnet18", "densenet121", "mobilenet_v3_small"])
def test_folding_batchnorm_changes_neither_features_nor_the_backbone(model: str) -> None:
    torch.manual_seed(0)
    backbone = torchvision_backbone(model=model)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    prefix = FrozenPrefix(backbone, len(backbone.blocks))
    images = torch.randn(2, 3, 64, 64)
    prefix.ready(images)
    assert prefix.module is not None
    if model == "resnet18":
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in prefix.module.modules())
    with torch.no_grad():
        plain = backbone.eval()(images)
    assert torch.allclose(prefix(images), plain, atol=1e-4 * float(plain.abs().max()))
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())


def test_rows_do_not_depend_on_how_they_are_spread_over_the_cores() -> None:
    backbone = torchvision_backbone(model="squeezenet1_1").eval()
    images = torch.randn(150, 3, 32, 32)
    torch.set_num_threads(2)
    extractor = Extractor(FrozenPrefix(backbone, len(backbone.blocks)), lambda rows: images[rows])
    found = {}
    for workers in (1, 2):
        extractor.workers = workers
        found[workers] = extractor.rows(np.arange(150))
        assert torch.get_num_threads() == 2
    with torch.no_grad():
        assert np.allclose(found[1], backbone(images).numpy(), atol=1e-4)
    assert np.allclose(found[1], found[2], atol=1e-5)


def test_a_second_run_does_not_touch_the_backbone(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_tiny("transfer=linear_probe")

    def forbidden(*arguments: Any) -> None:
        raise AssertionError("images went through the backbone")

    monkeypatch.setattr(TransferModule, "forward", forbidden)
    monkeypatch.setattr(FrozenPrefix, "__call__", forbidden)
    again = train_tiny("transfer=linear_probe")
    assert again.metrics == first.metrics


def test_the_cache_command_lists_verifies_and_prunes(graft: Graft, tmp_path: Path) -> None:
    assert graft("train", *TINY, "transfer=linear_probe").returncode == 0
    assert "weights; blocks 5 of 5; 44 images of train, 1 view; 32 px" in graft("cache").stdout
    assert graft("cache", "verify").stdout.count("whole") == 3
    flip_a_byte(next((tmp_path / "cache").glob("features-*/00000-*.npy")))
    done = graft("cache", "verify")
    assert done.returncode == 1
    assert done.stdout.count("damaged") == 1
    assert graft("cache", "prune").returncode != 0  # prune what?
    assert "3 entries" in graft("cache", "prune", "--days", "1").stdout
    assert len(entries(tmp_path)) == 3
    graft("cache", "prune", "--all")
    assert entries(tmp_path) == set()


def test_the_cache_command_goes_by_the_last_use_and_not_by_the_last_look(
    graft: Graft, entry: ShardedRows, image_folders: Path, tmp_path: Path
) -> None:
    """Many disks note no times of access; here all were read just now."""
    form = Preprocessing(32, 32)
    images = ImageFolder(image_folders, tmp_path / "cache")
    images.prepare(form)
    entry.fill(expected)
    features = shutil.copytree(entry.path, tmp_path / "cache" / "features-x")
    old = time.time() - 40 * 86400
    for file in (tmp_path / "cache").rglob("*"):
        os.utime(file, (time.time(), old))
    images.load(form)
    assert "\n1 entry, " in graft("cache", "prune", "--days", "30").stdout
    assert not features.exists()


@pytest.mark.parametrize("action", ["--all", "--days=0"])
def test_features_that_are_being_computed_are_not_pruned(
    graft: Graft, entry: ShardedRows, tmp_path: Path, action: str
) -> None:
    """Neither during the work on a part nor between two parts."""
    told = []

    def prune(*progress: int) -> None:
        told.append(graft("cache", "prune", action, "--cache", str(tmp_path)).stdout)

    def compute(positions: np.ndarray) -> np.ndarray:
        prune()
        return expected(positions)

    entry.fill(compute, prune)
    assert len(told) == 2 * len(entry.shards) + 1
    assert all("features-x  unfinished: a run is filling it\n1 entry, " in t for t in told[:-1])
    assert told[-1].startswith("deleted")  # all is done


def test_the_cache_command_beside_a_run_that_fills_the_cache(
    graft: Graft, entry: ShardedRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to nothing is what a file that was listed and is gone looks like."""
    entry.fill(expected)
    cache = tmp_path / "cache"
    shutil.copytree(entry.path, cache / "features-x")
    (cache / "folder-x-native.partial").mkdir()
    for gone in ("features-x/00001-7.partial", "features-x/00002-00000000.npy", "features-y"):
        (cache / gone).symlink_to("nowhere")
    for action in ("list", "verify"):
        done = graft("cache", action)
        assert (done.returncode, done.stderr) == (0, "")
        assert "2 entries" in done.stdout

    with locked(cache / "folder-x.lock"):
        done = graft("cache", "prune", "--all")
    assert "\n1 entry, " in done.stdout
    assert "folder-x-native.partial  unfinished: a run is filling it" in done.stdout
    assert not (cache / "features-x").exists()
    shutil.copytree(entry.path, cache / "features-x")

    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", busy)
    done = graft("cache", "prune", "--all")
    assert done.returncode == 0
    assert done.stdout.count(": Directory not empty") == 2
