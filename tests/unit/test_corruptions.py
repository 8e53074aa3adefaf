"""Corruptions: the same for an image whatever surrounds it, stronger with severity, real JPEG."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from graft.data.datamodule import TransferDataModule
from graft.data.datasets import ImageDataset
from graft.data.sources.base import Split
from graft.data.sources.synthetic import Synthetic
from graft.evaluation.corruptions import CORRUPTIONS, SEVERITIES, CorruptedImages, corrupt
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


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_further_from_the_original_at_each_severity(name: str) -> None:
    images = photographs()
    index = torch.arange(len(images))
    distances = [torch.zeros(len(images))]
    for severity in SEVERITIES:
        corrupted = corrupt(images, index, name, severity)
        assert corrupted.dtype == torch.uint8
        assert corrupted.shape == images.shape
        distances.append((corrupted.float() - images.float()).square().mean((1, 2, 3)))
    assert (torch.stack(distances).diff(dim=0) > 0).all(), torch.stack(distances)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_alone_in_another_batch_and_again(name: str) -> None:
    images, index = photographs(), torch.tensor([7, 3, 900, 0, 12, 5])
    whole = corrupt(images, index, name, 3)
    torch.rand(3)  # what others draw is no part of it
    one = corrupt(images[2:3], index[2:3], name, 3)
    assert torch.equal(whole[2], one[0])
    assert torch.equal(images, photographs()), "the images given are left alone"


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
    corrupted = corrupt(image, torch.tensor([0]), "jpeg", 5)[0]
    assert torch.equal(corrupted, decoded)


def test_blur_is_torchvisions_and_grows_with_the_image() -> None:
    small, large = photographs(2, 32), photographs(2, 64)
    index = torch.arange(2)
    expected = TF.gaussian_blur(small, [9, 9], [1.0, 1.0])
    assert (corrupt(small, index, "gaussian_blur", 5).int() - expected.int()).abs().max() <= 1
    expected = TF.gaussian_blur(large, [17, 17], [2.0, 2.0])
    assert (corrupt(large, index, "gaussian_blur", 5).int() - expected.int()).abs().max() <= 1


def test_a_corrupted_subset_holds_the_images_of_the_whole_set() -> None:
    """Noise goes by an image's place in the stored set, not by its place in a batch or subset."""
    split = Split(photographs().numpy(), np.arange(6))
    whole = CorruptedImages(ImageDataset(split), "gaussian_noise", 2)[[4, 5]]
    part = CorruptedImages(ImageDataset(split, np.array([1, 4, 5])), "gaussian_noise", 2)[[1, 2]]
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
