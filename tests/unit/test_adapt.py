"""Adaptation at test time: what moves, exactly by how much, and that nothing of it stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graft.evaluation.adapt import Tent, kept
from graft.models.backbone import Backbone
from graft.models.resnet_cifar import resnet_cifar
from graft.models.torchvision import torchvision_backbone
from graft.plan.freeze import batch_norms
from graft.training.adabn import estimate_statistics, require_batch_norms
from tests.conftest import same


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    backbone = resnet_cifar(depth=8, width=4, weights=None)
    for norm in batch_norms(backbone):  # as if trained elsewhere
        norm.running_mean = torch.randn_like(norm.bias)
        norm.running_var = 0.5 + torch.rand_like(norm.bias)
    return backbone.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 + 1


def statistics(backbone: Backbone) -> list[Tensor]:
    return [b.clone() for name, b in backbone.named_buffers() if name.endswith(("mean", "var"))]


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    now = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


def test_adabn_is_one_pass_of_all_images_in_one_batch(backbone: Backbone, images: Tensor) -> None:
    whole = copy.deepcopy(backbone).train()
    for norm in batch_norms(whole):
        norm.momentum = 1.0
    whole(images)
    estimate_statistics(backbone, images.split(7))
    for ours, expected in zip(statistics(backbone), statistics(whole), strict=True):
        # Within that pass a variance is over n, in the statistics that it leaves over n - 1.
        torch.testing.assert_close(ours, expected, rtol=5e-3, atol=5e-3)


def test_adabn_knows_neither_the_order_nor_the_size_of_batches(
    backbone: Backbone, images: Tensor
) -> None:
    other = copy.deepcopy(backbone)
    estimate_statistics(backbone, images.split(7))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
    estimate_statistics(other, images[order].split(5))
    for one, two in zip(statistics(backbone), statistics(other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_adabn_moves_running_statistics_alone(backbone: Backbone, images: Tensor) -> None:
    before = copy.deepcopy(backbone.state_dict())
    estimate_statistics(backbone, [images])
    moved = {
        name
        for name, value in backbone.state_dict().items()
        if not torch.equal(value, before[name])
    }
    norms = {id(norm) for norm in batch_norms(backbone)}
    assert moved == {
        f"{name}.{buffer}"
        for name, part in backbone.named_modules()
        if id(part) in norms
        for buffer in ("running_mean", "running_var")
    }
    assert not any(part.training for part in backbone.modules())


def model_of(backbone: Backbone) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(backbone, nn.Linear(backbone.num_features, 5))


def test_tent_predicts_a_batch_before_it_learns_from_it(backbone: Backbone, images: Tensor) -> None:
    model = model_of(backbone)
    first, second = images.split(12)
    fresh, used = Tent(copy.deepcopy(model), lr=0.1), Tent(copy.deepcopy(model), lr=0.1)
    with torch.no_grad():  # as predictions are made
        expected = fresh(second)  # of a model that has learned from nothing
        # By the statistics of the batch, as in training.
        torch.testing.assert_close(used(first), copy.deepcopy(model).train()(first))
        assert not torch.equal(used(second), expected)


def test_tent_makes_predictions_surer_by_scales_and_shifts_alone(
    backbone: Backbone, images: Tensor
) -> None:
    model = model_of(backbone)
    before = copy.deepcopy(model.state_dict())
    tent = Tent(model, lr=0.01)

    def entropy(logits: Tensor) -> float:
        p = logits.softmax(1)
        return float(-(p * p.log()).sum(1).mean())

    entropies = [entropy(tent(images)) for _ in range(8)]
    assert entropies[-1] < entropies[0]
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    norms = {id(norm) for norm in batch_norms(model)}
    affine = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if id(module) in norms
        for part in ("weight", "bias")
    }
    assert moved == affine


def test_tent_goes_on_from_one_set_of_images_to_the_next(
    backbone: Backbone, images: Tensor
) -> None:
    """Between two sets a test puts the model into evaluation mode."""
    model = model_of(backbone)
    through, stopped = Tent(copy.deepcopy(model)), Tent(copy.deepcopy(model))
    first, second = images.split(12)
    expected = [through(first), through(second)]
    found = [stopped(first)]
    stopped.model.eval()
    found.append(stopped(second))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_tent_without_scales_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="no BatchNorm here has a scale"):
        Tent(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)))


def test_adabn_follows_into_the_head_and_sees_mirror_images(
    backbone: Backbone, images: Tensor
) -> None:
    mirrored = copy.deepcopy(backbone)
    mirrored.mirror = True
    head = nn.BatchNorm1d(backbone.num_features, affine=False)
    estimate_statistics(mirrored, [images], head)
    estimate_statistics(backbone, [images, images.flip(3)])
    for one, two in zip(statistics(mirrored), statistics(backbone), strict=True):
        torch.testing.assert_close(one, two)
    assert head.running_mean is not None
    features = mirrored(images)
    torch.testing.assert_close(head.running_mean, features.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.running_var, features.var(0), rtol=1e-4, atol=1e-5)  # n - 1


def adabn(model: nn.Module, images: Tensor) -> None:
    estimate_statistics(model[0], [images])  # type: ignore[index]


def tent(model: nn.Module, images: Tensor) -> None:
    Tent(model)(images)


@pytest.mark.parametrize("method", [adabn, tent])
def test_a_reset_is_bit_exact(
    method: Callable[[nn.Module, Tensor], None], backbone: Backbone, images: Tensor
) -> None:
    model = model_of(backbone).eval()
    model[1].weight.requires_grad_(False)  # type: ignore[index]
    before, expected = copy.deepcopy(model.state_dict()), model(images)
    learning = [p.requires_grad for p in model.parameters()]
    with kept(model):
        method(model, images)
        assert not torch.equal(model(images), expected)
    assert same(model.state_dict(), before)
    assert torch.equal(model(images), expected)
    assert [p.requires_grad for p in model.parameters()] == learning
    assert all(p.grad is None for p in model.parameters())


def test_a_backbone_without_batchnorm_is_refused_by_name() -> None:
    backbone = torchvision_backbone(model="squeezenet1_1", weights=None)
    with pytest.raises(ValueError, match=r"--adapt tent: .*squeezenet1_1.* has no BatchNorm"):
        require_batch_norms(backbone, "--adapt tent")
