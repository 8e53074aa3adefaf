"""Whatever road an image takes, the network gets what the weights' own transform gives it.

The judges are the transforms that torchvision and timm publish with their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.models import get_model_weights
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import InterpolationMode

from graft.data.datamodule import TransferDataModule
from graft.data.sources.base import Source
from graft.data.sources.decode import decode
from graft.data.sources.folder import EvalFolder, ImageFolder
from graft.models.timm import timm_backbone
from graft.models.torchvision import torchvision_backbone
from graft.transforms import prepare
from graft.transforms.images import ImageInputs
from graft.transforms.prepare import Prepare
from graft.transforms.preprocessing import Preprocessing
from tests.unit.source_files import save

Transform = Callable[[Image.Image], Tensor]
MIXED = ((83, 61), (61, 83), (150, 101), (64, 64), (37, 53), (341, 97), (40, 40))  # (width, height)
SQUARE = ((40, 40),) * 4
GEOMETRIES = (  # resize, crop: with and without margin, odd and even ones
    (36, 32), (37, 32), (38, 33), (40, 37), (44, 44), (73, 64),
)  # fmt: skip


def photo(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth shading, sharp edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]]
    shading = 128 + 60 * np.sin(x / 17 + seed) + 40 * np.cos(y / 11)
    edges = 60.0 * ((x // 9 + y // 13) % 2)
    noise = rng.normal(0, 25, (*x.shape, 3))
    values = (shading + edges)[:, :, None] + noise
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def class_folders(root: Path, sizes: tuple[tuple[int, int], ...]) -> Path:
    for split in ("train", "test"):
        for n, size in enumerate(sizes * 2):
            save(root / split / "ab"[n % 2] / f"{n:02}.png", photo(size, n))
    return root


def given_to_the_network(source: Source, p: Preprocessing, **options: Any) -> Tensor:
    """The test images, as a run prepares them."""
    data = TransferDataModule(source, ImageInputs(p, **options), batch_size=1)
    data.prepare_data()
    data.setup()
    rows = torch.arange(len(data.splits["test"])).numpy()
    return data.prepared("test", rows, torch.device("cpu"))


def compare(found: Tensor, expected: Tensor, p: Preprocessing, *, exact: bool) -> None:
    """To a grey level before the normalisation; `exact` where Pillow resized both.

    On the device, of values that lie half-way between two levels in both passes of a bicubic
    resize, one in a hundred thousand comes out two levels away.
    """
    assert found.shape == expected.shape
    off = (found - expected).abs() * torch.tensor(p.std)[:, None, None] * 255
    assert float(off.max()) <= (0.01 if exact else 2.01)
    assert float((off > 1.01).float().mean()) <= 2e-5


def references(root: Path, transform: Transform) -> Tensor:
    paths = sorted(root.glob("test/*/*.png"), key=lambda path: (path.parent.name, path.name))
    return torch.stack([transform(Image.open(path)) for path in paths])


def torchvisions(p: Preprocessing) -> Transform:
    return ImageClassification(
        crop_size=p.crop_size,
        resize_size=p.resize_size,
        mean=p.mean,
        std=p.std,
        interpolation=InterpolationMode(p.interpolation),
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sizes", [MIXED, SQUARE], ids=["mixed", "square"])
@pytest.mark.parametrize("source", [ImageFolder, EvalFolder])
def test_folders_give_what_torchvisions_transform_gives(
    source: type[ImageFolder],
    sizes: tuple[tuple[int, int], ...],
    interpolation: str,
    tmp_path: Path,
) -> None:
    """Of mixed sizes (resized when stored) and of one small one (resized on the device)."""
    root = class_folders(tmp_path / "data", sizes)
    for resize, crop in GEOMETRIES:
        p = Preprocessing(resize, crop, interpolation=interpolation)  # type: ignore[arg-type]
        found = given_to_the_network(source(root, tmp_path / "cache"), p)
        compare(found, references(root, torchvisions(p)), p, exact=sizes is MIXED)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_sizes_of_ones_own_are_the_transform_with_these_sizes(
    interpolation: str, tmp_path: Path
) -> None:
    root = class_folders(tmp_path / "data", MIXED)
    weights = Preprocessing(64, 56, interpolation=interpolation)  # type: ignore[arg-type]
    for image_size, resize_size in ((31, None), (31, 36), (80, None)):
        p = weights.at(image_size, resize_size)
        found = given_to_the_network(
            ImageFolder(root, tmp_path / "cache"),
            weights,
            image_size=image_size,
            resize_size=resize_size,
        )
        compare(found, references(root, torchvisions(p)), p, exact=True)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 0.9, 1.0])
def test_folders_give_what_timms_transform_gives(
    crop_pct: float, crop_mode: str, interpolation: str, tmp_path: Path
) -> None:
    p = Preprocessing(int(48 / crop_pct), 48, interpolation=interpolation, crop_mode=crop_mode)  # type: ignore[arg-type]
    reference = create_transform(
        input_size=(3, 48, 48),
        is_training=False,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=interpolation,
        mean=p.mean,
        std=p.std,
    )
    for name, sizes in (("mixed", MIXED), ("square", SQUARE)):
        root = class_folders(tmp_path / name, sizes)
        found = given_to_the_network(ImageFolder(root, tmp_path / "cache"), p)
        compare(found, references(root, reference), p, exact=sizes is MIXED)


@pytest.mark.parametrize(
    ("model", "entry"),
    [("swin_t", "IMAGENET1K_V1"), ("resnet50", "IMAGENET1K_V2"), ("efficientnet_b0", "DEFAULT")],
)
def test_published_weights_of_torchvision_get_their_own_transform(
    model: str, entry: str, tmp_path: Path
) -> None:
    root = class_folders(tmp_path / "data", ((500, 375), (251, 333)))
    with torch.device("meta"):
        p = torchvision_backbone(model=model, weights=entry, pretrained=False).preprocessing
    reference = get_model_weights(model)[entry].transforms()
    found = given_to_the_network(ImageFolder(root, tmp_path / "cache"), p)
    compare(found, references(root, reference), p, exact=True)


@pytest.mark.parametrize("model", ["resnet18.a1_in1k", "tf_efficientnet_lite0.in1k"])
def test_published_weights_of_timm_get_their_own_transform(model: str, tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data", ((500, 375), (251, 333)))
    p = timm_backbone(model=model, pretrained=False).preprocessing
    config = resolve_data_config(pretrained_cfg=vars(timm.get_pretrained_cfg(model)))
    found = given_to_the_network(ImageFolder(root, tmp_path / "cache"), p)
    compare(found, references(root, create_transform(**config)), p, exact=True)


def test_large_jpegs_are_read_whole(tmp_path: Path) -> None:
    """A decoder's own reduction to an eighth is quick, and four grey levels off."""
    path = tmp_path / "test/a/0.jpg"
    save(path, photo((1600, 1200), 0), quality=95)
    p = Preprocessing(64, 56)
    expected = torchvisions(p)(Image.open(path))
    stored = torch.from_numpy(decode(path, 64, p).copy())[None]
    compare(Prepare(p)(stored)[0], expected, p, exact=True)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_matrix_products_of_gpus_are_pillows_resize_too(
    interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_as_bytes", lambda images, mode: False)
    p = Preprocessing(73, 64, interpolation=interpolation)  # type: ignore[arg-type]
    for size in ((32, 32), (90, 120), (200, 131)):
        image = photo(size, 0)
        batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        compare(Prepare(p)(batch)[0], torchvisions(p)(image), p, exact=False)


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"crop_mode": "border"}, "want crop_mode border, which is not among center, squash"),
        ({"interpolation": "lanczos"}, "want interpolation lanczos, which is not among bilinear"),
        ({"input_size": (3, 64, 48)}, "not square"),
    ],
)
def test_what_we_cannot_do_to_images_is_refused(overlay: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_backbone(model="test_resnet", weights=None, pretrained_cfg_overlay=overlay)
