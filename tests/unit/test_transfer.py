"""Freezing, parameter groups, schedules."""

from __future__ import annotations

import pytest
import torch

from graft.config.stage import NormPolicy
from graft.models.backbone import Backbone
from graft.models.heads import LinearHead
from graft.models.resnet_cifar import resnet_cifar
from graft.models.torchvision import torchvision_backbone
from graft.plan import schedules
from graft.plan.freeze import (
    batch_norms,
    freeze_for_stage,
    learning_parameters,
    norm_mode,
    prefix_length,
    set_modes,
)
from graft.plan.param_groups import describe_groups, param_groups


@pytest.fixture
def backbone() -> Backbone:
    return resnet_cifar(depth=8, width=4, weights=None)


BLOCKS = ["stem", "stage1_1", "stage2_1", "stage3_1"]


@pytest.mark.parametrize(
    ("trainable", "blocks"),
    [
        ("head", []),
        ("all", BLOCKS),
        (1, ["stage3_1"]),
        (2, ["stage2_1", "stage3_1"]),
        ("stem", ["stem"]),
        (["stage3_1", "stem"], ["stem", "stage3_1"]),
        (["stage[12]_*"], ["stage1_1", "stage2_1"]),
    ],
)
def test_which_blocks_learn(
    backbone: Backbone, trainable: str | int | list[str], blocks: list[str]
) -> None:
    names = learning_parameters(backbone, trainable)
    assert freeze_for_stage(backbone, names, "train") == blocks
    expected = [p for b in blocks for p in backbone.blocks.get_submodule(b).parameters()]
    assert {id(p) for p in backbone.parameters() if p.requires_grad} == set(map(id, expected))


def test_kinds_and_patterns_choose_single_parameters(backbone: Backbone) -> None:
    norms = learning_parameters(backbone, "norms")
    assert len(norms) == 2 * len(batch_norms(backbone.blocks)) == 18
    assert all(backbone.blocks.get_parameter(name).ndim == 1 for name in norms)
    biases = learning_parameters(backbone, "biases")  # its convolutions have none
    assert biases == [name for name in norms if name.endswith(".bias")]
    assert learning_parameters(backbone, ["stem", "*_1.conv2.weight"]) == [
        *(n for n, _ in backbone.blocks.named_parameters() if n.startswith("stem.")),
        "stage1_1.conv2.weight", "stage2_1.conv2.weight", "stage3_1.conv2.weight",
    ]  # fmt: skip


def test_norms_of_any_family_are_found() -> None:
    """LayerNorm2d of ConvNeXt and LayerNorm of its blocks, not layer scale."""
    convnext = torchvision_backbone(model="convnext_tiny")
    chosen = {convnext.blocks.get_submodule(name.rpartition(".")[0])
              for name in learning_parameters(convnext, "norms")}  # fmt: skip
    assert {type(m).__name__ for m in chosen} == {"LayerNorm2d", "LayerNorm"}


@pytest.mark.parametrize(
    "trainable", ["layer9", ["stem", "layer9"], ["stem", "*.conv9.*"], "pool", 0, 9, []]
)
def test_a_part_that_matches_nothing_is_an_error(
    backbone: Backbone, trainable: str | int | list[str]
) -> None:
    with pytest.raises(ValueError, match=r"trainable"):
        learning_parameters(backbone, trainable)


def test_a_policy_that_freezes_all_that_would_learn_is_an_error(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="norm=frozen freezes all"):
        freeze_for_stage(backbone, learning_parameters(backbone, "norms"), "frozen")


def test_the_frozen_prefix_ends_at_the_lowest_learning_block(backbone: Backbone) -> None:
    assert prefix_length(backbone, []) == 5
    assert prefix_length(backbone, ["stage3_1"]) == 3
    assert prefix_length(backbone, ["stem", "stage3_1"]) == 0


@pytest.mark.parametrize(
    ("norm", "statistics_move", "affine_learns"),
    [
        ("train", True, True),
        ("stats", True, False),
        ("affine", False, True),
        ("frozen", False, False),
    ],
)
def test_batchnorm_policies(
    backbone: Backbone, norm: NormPolicy, statistics_move: bool, affine_learns: bool
) -> None:
    learning = freeze_for_stage(backbone, learning_parameters(backbone, "stage3_1"), norm)
    backbone.train()
    set_modes(backbone, learning, norm)
    before = {k: v.clone() for k, v in backbone.named_buffers() if v.is_floating_point()}
    backbone(torch.randn(8, 3, 32, 32))
    moved = {
        k.split(".")[1]
        for k, v in backbone.named_buffers()
        if k in before and not torch.equal(v, before[k])
    }
    assert moved == ({"stage3_1"} if statistics_move else set())
    block = backbone.blocks.get_submodule("stage3_1")
    for module in batch_norms(block):
        assert module.weight.requires_grad is affine_learns
    assert block.get_parameter("conv1.weight").requires_grad
    assert norm_mode(block) == norm
    assert norm_mode(backbone.blocks.get_submodule("stem")) == "frozen"


def test_every_trainable_parameter_is_in_exactly_one_group(backbone: Backbone) -> None:
    head = LinearHead(16, 3)
    for layer_decay in (1.0, 0.5):
        groups = param_groups(backbone, head, lr=0.1, weight_decay=0.01, layer_decay=layer_decay)
        grouped = [id(p) for g in groups for p in g["params"]]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == {id(p) for m in (backbone, head) for p in m.parameters()}


def test_equal_tensors_are_all_kept() -> None:
    """Compared by identity: all BatchNorm weights start as ones (BaseFinetuning drops them)."""
    backbone = resnet_cifar(depth=8, width=4, weights=None)
    head = LinearHead(16, 3)
    groups = param_groups(backbone, head, lr=0.1, weight_decay=0.0)
    rows = describe_groups(groups, backbone, head)
    assert (
        sum(row["parameters"] for row in rows) == sum(p.numel() for p in backbone.parameters()) + 51
    )


def test_no_weight_decay_on_norms_and_biases_unless_asked(backbone: Backbone) -> None:
    head = LinearHead(16, 3)
    for group in param_groups(backbone, head, lr=0.1, weight_decay=0.01):
        one_dimensional = {p.ndim == 1 for p in group["params"]}
        assert one_dimensional == {group["weight_decay"] == 0.0}
    groups = param_groups(backbone, head, lr=0.1, weight_decay=0.01, decay_norm_and_bias=True)
    assert {g["weight_decay"] for g in groups} == {0.01}


def test_layer_decay_changes_the_step_itself(backbone: Backbone) -> None:
    """With equal gradients, updates have the ratios asked for (an `lr_scale` key has no effect)."""
    head = LinearHead(16, 3)
    groups = param_groups(
        backbone, head, lr=0.1, weight_decay=0.0, layer_decay=0.5, head_lr_scale=4.0
    )
    optimizer = torch.optim.SGD(groups)
    before = {n: p.detach().clone() for n, p in backbone.named_parameters()}
    for p in [*backbone.parameters(), *head.parameters()]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    step = {
        block: (before[f"blocks.{block}.{name}"] - backbone.get_parameter(f"blocks.{block}.{name}"))
        .mean()
        .item()
        for block, name in (
            ("stem", "conv.weight"),
            ("stage1_1", "conv1.weight"),
            ("stage2_1", "conv1.weight"),
            ("stage3_1", "conv1.weight"),
        )
    }
    expected = {"stem": 0.1 / 16, "stage1_1": 0.1 / 8, "stage2_1": 0.1 / 4, "stage3_1": 0.1 / 2}
    assert step == pytest.approx(expected, rel=1e-4)
    assert head.linear.weight.mean().item() == pytest.approx(-0.4)


def test_weight_decay_moves_weights_alone(backbone: Backbone) -> None:
    """Rule 4 in the step itself: without a gradient, decay is all that moves. What is frozen has no
    part in it, even where it is in the optimizer.
    """
    head = LinearHead(16, 3)
    torch.nn.init.ones_(head.linear.weight)
    torch.nn.init.ones_(head.linear.bias)
    groups = param_groups(backbone, head, lr=0.1, weight_decay=0.5)
    optimizer = torch.optim.AdamW(groups)
    freeze_for_stage(backbone, learning_parameters(backbone, ["stage2_1", "stage3_1"]), "train")
    before = {n: p.detach().clone() for n, p in backbone.named_parameters()}
    for p in [*backbone.parameters(), *head.parameters()]:
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, parameter in backbone.named_parameters():
        decays = parameter.ndim > 1 and parameter.requires_grad
        assert torch.allclose(parameter, before[name] * (0.95 if decays else 1.0)), name
        assert decays or torch.equal(parameter, before[name]), name
    assert head.linear.weight.mean().item() == pytest.approx(0.95)
    assert head.linear.bias.eq(1).all()


def test_nothing_trainable_is_an_error(backbone: Backbone) -> None:
    head = LinearHead(16, 3).requires_grad_(False)
    backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is trainable"):
        param_groups(backbone, head, lr=0.1, weight_decay=0.0)


def test_schedules_at_their_landmarks() -> None:
    total = 100
    one_cycle = [schedules.one_cycle(s, total, warmup=0.3) for s in range(total)]
    assert one_cycle[0] == pytest.approx(0.04)
    assert one_cycle[30] == pytest.approx(1.0)
    assert max(range(total), key=one_cycle.__getitem__) == 30
    assert one_cycle[-1] == pytest.approx(4e-6)
    cosine = [schedules.cosine(s, total, warmup=10, final=0.1) for s in range(total + 1)]
    assert cosine[:10] == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert cosine[10] == pytest.approx(1.0)
    assert cosine[55] == pytest.approx(0.55)
    assert cosine[100] == pytest.approx(0.1)
    assert schedules.constant(0, total) == 1.0
    assert schedules.constant(0, total, warmup=4) == pytest.approx(0.2)
    assert schedules.constant(4, total, warmup=4) == 1.0


def test_one_cycle_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=50, pct_start=0.3, cycle_momentum=False
    )
    for step in range(50):
        rate = optimizer.param_groups[0]["lr"]
        # torch places the peak at 0.3 * total - 1; ours is the same curve, one step later.
        assert schedules.one_cycle(step, 50, warmup=14) == pytest.approx(rate, abs=1e-6)
        optimizer.step()
        reference.step()
