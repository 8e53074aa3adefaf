"""Corruptions: the same for an image whatever surrounds it, stronger with severity, real JPEG."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from graft.data.datamodule import TransferDataModule
from graft.data.datasets import ImageDataset
from graft.data.sources.base import Split
from graft.data.sources.shifted import corrupted
from graft.data.sources.synthetic import Synthetic
from graft.transforms.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from graft.transforms.images import ImageInputs
from graft.transforms.preprocessing import Preprocessing


def photographs(count: int = 6, side: int = 32) -> torch.Tensor:
    """Smooth colours with edges and some detail, unlike noise, which blur and JPEG only shrink."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(30, 220, (count, 3, 4, 4))).float()
    smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic")
    smooth[:, :, side // 3 : side // 2, side // 4 : side // 2] += 60
    detail = torch.from_numpy(rng.normal(0, 6, smooth.shape)).float()
    return (smooth + detail).clamp(0, 255).to(torch.uint8)


# Of the others, parameters do not grow with the severity, or what is drawn outweighs them.
GROWING = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "zoom_blur", "fog",
    "brightness", "contrast", "jpeg_compression",
)  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_are_further_from_the_originals_at_each_severity(name: str) -> None:
    images = photographs(32)
    index = torch.arange(len(images))
    distances = [torch.tensor(0.0)]
    for severity in SEVERITIES:
        corrupted = corrupt(images, index, name, severity)
        assert corrupted.dtype == torch.uint8
        assert corrupted.shape == images.shape
        distances.append((corrupted.float() - images.float()).square().mean())
    assert distances[1] > 0
    if name in GROWING:
        assert (torch.stack(distances).diff() > 0).all(), distances


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_alone_in_another_batch_and_again(name: str) -> None:
    images, index = photographs(), torch.tensor([7, 3, 900, 0, 12, 5])
    whole = corrupt(images, index, name, 3)
    torch.rand(3)  # what others draw is no part of it
    one = corrupt(images[2:3], index[2:3], name, 3)
    assert torch.equal(whole[2], one[0])
    assert torch.equal(images, photographs()), "the images given are left alone"


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(40, 60), (9, 5), (1, 1)])
def test_images_of_any_shape_are_corrupted(name: str, shape: tuple[int, int]) -> None:
    images = torch.full((2, 3, *shape), 90, dtype=torch.uint8)
    for severity in (1, 5):
        assert corrupt(images, torch.arange(2), name, severity).shape == images.shape


def test_noise_differs_between_images() -> None:
    grey = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    one, other = corrupt(grey, torch.tensor([0, 1]), "gaussian_noise", 1).float()
    assert not torch.equal(one, other)
    assert (one - 128).std() == pytest.approx(0.04 * 255, rel=0.05)


def test_jpeg_is_what_a_jpeg_file_of_that_quality_holds() -> None:
    image = photographs(1)
    buffer = io.BytesIO()
    pixels = image[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=40)
    decoded = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
    corrupted = corrupt(image, torch.tensor([0]), "jpeg_compression", 5)[0]
    assert torch.equal(corrupted, decoded)


def test_motion_leaves_a_trail_of_one_side_at_an_angle_within_45_degrees() -> None:
    image = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    image[:, :, 16, 16] = 255
    trails = corrupt(image, torch.arange(40), "motion_blur", 5)
    rows, columns = (trails[:, 0] > 0).nonzero()[:, 1:].unbind(1)
    assert (columns <= 16).all(), "a pixel takes from those to its right"
    assert ((rows - 16).abs() <= 16 - columns).all()
    assert len({tuple(trail.flatten().tolist()) for trail in trails}) > 10, "each its own angle"


def test_zoom_is_the_mean_of_enlarged_middles() -> None:
    """As scipy enlarges, which made the published images."""
    image = photographs(1).double() / 255
    total, factors = image[0].clone(), np.arange(1, 1.06, 0.01)
    for factor in factors:
        part = int(np.ceil(32 / factor))
        top = (32 - part) // 2
        middle = image[0, :, top : top + part, top : top + part].numpy()
        large = ndimage.zoom(middle, (1, factor, factor), order=1)
        cut = (large.shape[1] - 32) // 2
        total += torch.from_numpy(large[:, cut : cut + 32, cut : cut + 32])
    expected = 255 * total / (len(factors) + 1)
    corrupted = corrupt(photographs(1), torch.tensor([0]), "zoom_blur", 1)[0]
    assert (corrupted - expected).abs().max() <= 1.01  # rounded down


def test_brightness_keeps_hue_and_saturation() -> None:
    image = torch.tensor([[120, 60, 0], [0, 0, 0]], dtype=torch.uint8)[..., None, None]
    bright = corrupt(image, torch.arange(2), "brightness", 5)[..., 0, 0]
    assert bright.tolist() == [[196, 98, 0], [76, 76, 76]]  # 0.3 * 255 = 76.5 added to the value


def test_contrast_keeps_each_channel_s_mean() -> None:
    image = torch.tensor([[[0, 100]], [[50, 150]], [[200, 200]]], dtype=torch.uint8)[None]
    flat = corrupt(image, torch.arange(1), "contrast", 5)[0, :, 0]
    assert flat.tolist() == [[42, 57], [92, 107], [200, 200]]


def test_blur_grows_with_the_image() -> None:
    small = photographs(2, 32)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    index = torch.arange(2)
    blurred = corrupt(large, index, "defocus_blur", 5).float()
    halved = torch.nn.functional.avg_pool2d(blurred, 2)
    away = (halved - corrupt(small, index, "defocus_blur", 5).float()).abs().mean()
    assert away < 4
    assert (small.float() - halved).abs().mean() > 2 * away


def test_a_corrupted_subset_holds_the_images_of_the_whole_set(tmp_path: Path) -> None:
    """Noise goes by an image's place in the stored set, not by its place in a batch or subset."""
    split = Split(photographs().numpy(), np.arange(6))
    whole = corrupted(ImageDataset(split), "gaussian_noise", 2, tmp_path)[[4, 5]]
    some = ImageDataset(split, np.array([1, 4, 5]))
    part = corrupted(some, "gaussian_noise", 2, tmp_path)[[1, 2]]
    assert torch.equal(whole["input"], part["input"])
    assert part["label"].tolist() == [4, 5]
    assert part["index"].tolist() == [1, 2]


def test_nothing_of_the_old_test_split_outlives_its_replacement() -> None:
    """Its digest names stored features; a copy on a GPU would be tested in place of the new one."""
    data = TransferDataModule(
        Synthetic(classes=2, per_class=9), ImageInputs(Preprocessing(32, 32)), batch_size=2
    )
    data.setup()
    before = data.digest("test"), data.digest("val")
    data.replace_test(ImageDataset(Split(photographs().numpy(), np.zeros(6, dtype=np.int64))))
    assert data.digest("test") != before[0]
    assert data.digest("val") == before[1]
    (batch,) = data.loader("test", train=False)
    assert len(batch["input"]) == 6
