"""Augmentation and geometry of a whole batch, against torchvision on the same images."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from graft.transforms.draws import uniform
from graft.transforms.images import Augment
from graft.transforms.prepare import Prepare
from graft.transforms.preprocessing import Preprocessing


def images(n: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def test_images_that_are_not_square_are_resized_by_their_shorter_side() -> None:
    batch = images(2, 60)[:, :, :40]  # 40 x 60
    p = Preprocessing(32, 28, mean=(0, 0, 0), std=(1, 1, 1))
    expected = TF.center_crop(TF.resize(batch.float(), [32], antialias=True), [28]) / 255
    assert torch.allclose(Prepare(p)(batch), expected, atol=1e-5)


def test_shift_of_the_margin_is_a_random_crop() -> None:
    """Training from 64 px stored, evaluated by resize 64 crop 56: every result is a true crop."""
    p = Preprocessing(64, 56, mean=(0, 0, 0), std=(1, 1, 1))
    batch = images(20, 64)
    moved = Augment(shift=4 / 64, flip=0.0)(batch, torch.arange(20), seed=1, epoch=0)
    crops = (Prepare(p)(moved) * 255).round().to(torch.uint8)
    offsets = set()
    for original, crop in zip(batch, crops, strict=True):
        found = [
            (y, x)
            for y in range(9)
            for x in range(9)
            if torch.equal(original[:, y : y + 56, x : x + 56], crop)
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) > 10


def test_flip_mirrors_the_stated_share_and_nothing_else() -> None:
    batch = images(1, 8).expand(4000, 3, 8, 8)
    out = Augment(shift=0.0, flip=0.3)(batch, torch.arange(4000), seed=0, epoch=0)
    flipped = (out == batch.flip(3)).flatten(1).all(1)
    same = (out == batch).flatten(1).all(1)
    assert (flipped | same).all()
    assert abs(flipped.float().mean().item() - 0.3) < 0.03


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    """Not on the batch an image is in; so workers and ranks can't repeat or change a stream."""
    batch, index = images(16, 32), torch.arange(100, 116)
    augment = Augment(shift=0.2, flip=0.5)
    whole = augment(batch, index, seed=3, epoch=5)
    torch.rand(7)  # the global generator plays no part
    order = torch.randperm(16)
    assert torch.equal(augment(batch[order], index[order], seed=3, epoch=5), whole[order])
    for other in ({"seed": 4, "epoch": 5}, {"seed": 3, "epoch": 6}):
        changed = (augment(batch, index, **other) != whole).flatten(1).any(1)
        assert changed.float().mean() > 0.8


def test_draws_are_uniform_and_uncorrelated() -> None:
    u = uniform(0, 0, torch.arange(20_000), 3)
    later = uniform(0, 1, torch.arange(20_000), 3)
    assert u.min() >= 0
    assert u.max() < 1
    histogram = torch.histc(u[:, 0], bins=10, min=0, max=1) / 2000
    assert (histogram - 1).abs().max() < 0.1
    together = torch.cat([u, later, u.roll(1, 0)], dim=1)
    correlation = torch.corrcoef(together.T) - torch.eye(9)
    assert correlation.abs().max() < 0.03


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="shift"):
        Augment(shift=1.5)
    with pytest.raises(ValueError, match="must fit"):
        Prepare(Preprocessing(32, 64))(images(1, 32))
