"""trainer.sync_batchnorm: which layers are converted, and that nothing is lost either way.

torch's SyncBatchNorm trains on GPUs alone; in one process it is a BatchNorm, which is what these
tests compare.
"""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn

from graft.config.stage import NormPolicy
from graft.models.backbone import Backbone
from graft.models.resnet_cifar import resnet_cifar
from graft.plan.freeze import (
    batch_norms,
    freeze_for_stage,
    learning_parameters,
    set_modes,
)
from graft.training.sync_norm import SyncBatchNorms
from graft.training.trainer import make_trainer, trainer_options
from tests.conftest import compose, same


def backbone_in(norm: NormPolicy) -> Backbone:
    backbone = resnet_cifar(depth=8, width=4, weights=None).train()
    names = learning_parameters(backbone, ["stage2_1", "stage3_1"])
    set_modes(backbone, freeze_for_stage(backbone, names, norm), norm)
    return backbone


def synced(model: nn.Module) -> set[str]:
    return {
        name.split(".")[1] for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)
    }


@pytest.mark.parametrize("norm", ["train", "stats", "frozen"])
def test_only_layers_whose_statistics_move_are_converted(norm: NormPolicy) -> None:
    backbone = backbone_in(norm)
    before = {name: id(p) for name, p in backbone.named_parameters()}
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    modes = {name: m.training for name, m in backbone.named_modules()}
    learns = {name for name, p in backbone.named_parameters() if p.requires_grad}
    SyncBatchNorms().apply(backbone)
    assert synced(backbone) == (set() if norm == "frozen" else {"stage2_1", "stage3_1"})
    # An optimizer made before or after holds the same tensors; checkpoints have the same keys.
    assert before == {name: id(p) for name, p in backbone.named_parameters()}
    assert same(state, dict(backbone.state_dict()))
    assert modes == {name: m.training for name, m in backbone.named_modules()}
    assert learns == {name for name, p in backbone.named_parameters() if p.requires_grad}


def test_the_layers_come_back_with_the_values_of_the_fit() -> None:
    backbone = backbone_in("train")
    plain = copy.deepcopy(backbone)
    layers = batch_norms(backbone)
    sync = SyncBatchNorms()
    sync.apply(backbone)
    images = torch.randn(4, 3, 32, 32)
    for model in (backbone, plain):
        model(images).sum().backward()
        model.double()  # as a move to another device: buffers become other tensors
        model.eval()
    sync.revert(backbone)
    assert all(a is b for a, b in zip(batch_norms(backbone), layers, strict=True))
    assert same(dict(plain.state_dict()), dict(backbone.state_dict()))
    assert {m.training for m in backbone.modules()} == {False}
    for name, parameter in backbone.named_parameters():
        theirs, ours = plain.get_parameter(name).grad, parameter.grad
        assert (theirs is None) == (ours is None) == (not parameter.requires_grad), name
        if theirs is not None and ours is not None:
            assert torch.equal(theirs, ours), name


def test_timms_layers_keep_their_activation() -> None:
    """torch's conversion would give the normalisation alone."""
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8)).train()
    images = torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(model)(images)
    SyncBatchNorms().apply(model)
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert torch.equal(model(images), expected)
    assert expected.min() == 0


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    class Scaled(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match=r"sync_batchnorm: 0 is a Scaled, for which there is no"):
        SyncBatchNorms().apply(nn.Sequential(Scaled(4)))


def test_sync_batchnorm_on_a_cpu_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"trainer\.sync_batchnorm=true needs GPUs"):
        trainer_options(compose("trainer=ddp_cpu", "trainer.sync_batchnorm=true")["trainer"])


def test_the_switch_reaches_the_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs; here the options of a CPU, past the check."""
    from graft.training.build import build_stages

    config = compose("trainer=ddp_cpu")
    options = {**trainer_options(config["trainer"]), "sync_batchnorm": True}
    trainer = make_trainer(build_stages(config)[0], [], options=options, callbacks={}, loggers=[])
    assert isinstance(trainer, L.Trainer)
    assert isinstance(trainer.strategy._layer_sync, SyncBatchNorms)  # type: ignore[attr-defined]
