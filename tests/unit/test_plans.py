"""What a stage of a plan can set for itself: adapters, penalties, averages, optimizer, images."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from graft.config.conflicts import reaching_some
from graft.config.resolved import CONFIGS
from graft.config.stage import StageOptions
from graft.models.heads import LinearHead
from graft.models.resnet_cifar import resnet_cifar
from graft.plan.lora import LoRA, LowRank, add_adapters, merge_adapters
from graft.tasks.classification import Classification
from graft.training.build import build, build_stages, check_optimizers
from graft.training.ema import EMA
from graft.training.module import TransferModule
from graft.transforms.images import ImageInputs
from tests.conftest import TINY, Train, compose, same

STAGE = "transfer.stages.finetune"


def module_of(*overrides: str) -> TransferModule:
    config = compose(*TINY, *overrides)
    module, _ = build(config)
    module.start_stage(build_stages(config)[0])
    return module


# ---------------------------------------------------------------- adapters
class Layers(nn.Module):
    """One of each kind of weight an adapter can sit on."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.grouped(x).flatten(2).transpose(1, 2)
        return self.linear(self.attention(tokens, tokens, tokens)[0].mean(1))


def test_merged_and_unmerged_logits_are_equal_and_the_layers_ordinary_again() -> None:
    layers, x = Layers().eval(), torch.randn(2, 4, 6, 6)
    before, keys = layers(x), layers.state_dict().keys()
    names = [name for name, _ in layers.named_parameters()]
    assert add_adapters(layers, names, LoRA(rank=2, alpha=4.0)) == 4  # out_proj too
    assert torch.equal(layers(x), before), "B starts at zero"
    for module in layers.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.up)
            assert torch.linalg.matrix_rank(module.up @ module.down) == 2
    adapted = layers(x)
    assert (adapted - before).abs().max() > 0.1
    merge_adapters(layers)
    assert torch.equal(layers(x), adapted)
    assert layers.state_dict().keys() == keys
    assert type(layers.linear) is nn.Linear
    assert type(layers.grouped) is nn.Conv2d


def test_with_adapters_nothing_else_of_the_backbone_learns() -> None:
    module = module_of("transfer=lora", f"{STAGE}.trainable=1", f"{STAGE}.lora.rank=3")
    learning = [n for n, p in module.backbone.named_parameters() if p.requires_grad]
    assert learning == [
        f"blocks.stage3_1.{layer}.parametrizations.weight.0.{part}"
        for layer in ("conv1", "conv2", "shortcut.0")
        for part in ("up", "down")
    ]
    assert module.cut == 3
    assert all(p.requires_grad for p in module.head.parameters())


def test_a_lora_stage_ends_in_an_ordinary_checkpoint(train_tiny: Train) -> None:
    overrides = ["transfer=lora", "scheduler=constant", "optimizer.lr=0.5", f"{STAGE}.lora.rank=1"]
    run, plain = train_tiny(*overrides), build(compose(*TINY, *overrides))[0]
    best = run.folder / "checkpoints" / "finetune" / "best.ckpt"
    state = torch.load(best, weights_only=True)["state_dict"]
    assert state.keys() == plain.state_dict().keys()
    assert same(state, run.state())
    key = "backbone.blocks.stage3_1.conv1.weight"
    update = (state[key] - initial(*overrides)[key]).flatten(1)
    assert torch.linalg.matrix_rank(update, rtol=1e-3) == 1
    for key, value in initial(*overrides).items():
        if key.startswith("backbone") and value.ndim < 2:
            assert torch.equal(value, state[key]), key  # norms and their statistics


def initial(*overrides: str) -> dict[str, torch.Tensor]:
    import lightning as L

    config = compose(*TINY, *overrides)
    L.seed_everything(config["seed"], verbose=False)
    return {k: v.clone() for k, v in build(config)[0].state_dict().items()}


# ---------------------------------------------------------------- L2-SP
def test_l2_sp_adds_the_gradient_of_its_penalty() -> None:
    config = compose(*TINY, "transfer=l2_sp", f"{STAGE}.l2_sp=0.3", "optimizer.weight_decay=0.1")
    module, _ = build(config)
    (stage,) = build_stages(config)
    module.remember_pretrained()
    module.start_stage(stage)
    start = {n: p.detach().clone() for n, p in module.backbone.named_parameters()}
    with torch.no_grad():
        for parameter in module.backbone.parameters():
            parameter.add_(torch.randn_like(parameter))
    away = [(p - start[n]).square().sum() for n, p in module.backbone.named_parameters()]
    penalty = 0.15 * torch.stack(away).sum()
    expected = torch.autograd.grad(penalty, list(module.backbone.parameters()))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
    for parameter, gradient in zip(module.backbone.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad - 1, gradient, atol=1e-6, rtol=1e-5)
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in module.head.parameters())
    decays = {g["name"]: g["weight_decay"] for g in module.stage_groups()}
    assert decays == {
        "backbone": 0.0,
        "backbone/norm_bias": 0.0,
        "head": 0.1,
        "head/norm_bias": 0.0,
    }


def test_l2_sp_holds_the_weights_near_where_they_started(train_tiny: Train) -> None:
    """Also in a later stage: the pull is towards what was loaded, not towards the stage's start."""
    distances = []
    for strength in (0.0, 2.0):
        run = train_tiny(
            f"+transfer.stages.again={{epochs: 15, lr: 0.1, l2_sp: {strength}}}",
            "optimizer.lr=0.1", "scheduler=constant", "trainer.max_epochs=3",
        )  # fmt: skip
        key = "backbone.blocks.stage2_1.conv1.weight"
        distances.append(float((run.state()[key] - initial()[key]).norm()))
    assert distances[1] < 0.3 * distances[0]


# ---------------------------------------------------------------- averages
def test_the_average_forgets_its_start_within_a_short_stage() -> None:
    """A fixed decay of 0.999 would keep 0.999^50 = 95 % of where it started."""
    callback = EMA(0.999)
    averaged, current = [torch.zeros(1)], [torch.ones(1)]
    expected = 0.0
    for step in range(50):
        assert callback.should_update(step_idx=step)
        callback._average(averaged, current, torch.tensor(step))
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + 1 - decay
    assert float(averaged[0]) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.99
    assert not callback.should_update(epoch_idx=1)


# ---------------------------------------------------------------- each stage its own
def test_stages_have_their_own_optimizer_schedule_and_smoothing() -> None:
    """A stage's other optimizer takes none of the run's arguments: AdamW knows no momentum."""
    config = compose("transfer=lp_ft", "transfer.stages.probe.label_smoothing=0.2")
    probe, finetune = build_stages(config)
    head = [nn.Parameter(torch.zeros(1))]
    first, second = (s.optimizer([{"params": head}], lr=s.lr) for s in (probe, finetune))
    assert type(first) is torch.optim.AdamW
    assert first.defaults["lr"] == 1e-3
    assert type(second) is torch.optim.SGD
    assert second.defaults["momentum"] == 0.9
    assert probe.schedule(0, 100) != finetune.schedule(0, 100)
    task = Classification()
    module = TransferModule(resnet_cifar(depth=8, width=4, weights=None), LinearHead(16, 3), task)
    module.start_stage(probe)
    assert task.smoothing == 0.2
    module.start_stage(finetune)
    assert task.smoothing == 0.0


@pytest.mark.parametrize(
    ("overrides", "rates"),
    [
        (["transfer=surgical"], {"finetune": (0.05, 5e-4)}),
        (["transfer=surgical", f"+optimizer@{STAGE}.optimizer=adamw"], {"finetune": (1e-3, 0.05)}),
        (["transfer=surgical", f"+optimizer@{STAGE}.optimizer=adamw", f"{STAGE}.weight_decay=0"],
         {"finetune": (1e-3, 0)}),
        ([f"{STAGE}.optimizer={{momentum: 0.5, lr: 0.3}}"], {"finetune": (0.3, 5e-4)}),
        ([f"{STAGE}.optimizer={{_target_: torch.optim.Adam}}"], {"finetune": (0.05, 5e-4)}),
        ([f"{STAGE}.optimizer={{lr: 0.3}}", f"{STAGE}.lr=0.2"], {"finetune": (0.2, 5e-4)}),
        (["transfer=lp_ft"], {"probe": (1e-3, 0.01), "finetune": (0.05, 5e-4)}),
        (["transfer=lp_ft", "transfer.stages.probe.optimizer.lr=3e-4"],
         {"probe": (3e-4, 0.01), "finetune": (0.05, 5e-4)}),
        (["transfer=lp_ft", "transfer.stages.probe.lr=3e-4", "optimizer.lr=0.1"],
         {"probe": (3e-4, 0.01), "finetune": (0.1, 5e-4)}),
    ],
)  # fmt: skip
def test_a_rate_is_the_stages_or_its_optimizers_or_the_runs(
    overrides: list[str], rates: dict[str, tuple[float, float]]
) -> None:
    stages = build_stages(compose(*overrides))
    assert {stage.name: (stage.lr, stage.weight_decay) for stage in stages} == rates


def test_a_stage_may_change_a_part_of_the_runs_scheduler() -> None:
    config = compose(f"{STAGE}.scheduler={{warmup: 0.1}}")  # of one_cycle
    (stage,) = build_stages(config)
    check_optimizers([stage])
    assert [stage.schedule(step, 100) for step in (0, 10)] == pytest.approx([0.04, 1.0])
    with pytest.raises(ValueError, match=r"finetune\.scheduler\.warmup=-1: must be a part"):
        compose(f"{STAGE}.scheduler={{warmup: -1}}")
    with pytest.raises(ValueError, match=r"scheduler of transfer\.stages\.finetune: .*'warm'"):
        check_optimizers(build_stages(compose(f"{STAGE}.scheduler={{warm: 1}}")))


def test_stages_have_their_own_image_size_and_augmentation() -> None:
    config = compose(
        *TINY, "transfer=lp_ft", "data.image_size=24", "transfer.stages.finetune.image_size=40",
        "transfer.stages.finetune.augment={cutmix:1.0,shift:0}",
    )  # fmt: skip
    _, data = build(config)
    index = torch.arange(6)
    images = torch.as_tensor(data.splits["train"].images[:6])
    batch = {"input": images, "index": index, "label": index % 4}
    for i, (stage, size) in enumerate(zip(build_stages(config), (24, 40), strict=True)):
        data.start_stage(i, augment=stage.augment, image_size=stage.image_size)
        for augment in (True, False):
            assert data.transform(batch, augment=augment)["input"].shape[-2:] == (size, size)
        assert ("target" in data.transform(batch, augment=True)) is (i == 1)
    data.start_stage(0)
    assert data.inputs.size == 24
    assert isinstance(data.inputs, ImageInputs)
    assert data.inputs.stage_augmentation == data.inputs.augmentation


def test_images_are_kept_large_enough_for_every_stage() -> None:
    config = compose(*TINY, "data.image_size=24", f"{STAGE}.image_size=40")
    assert build(config)[1].stored_as.resize_size == 40


def test_features_of_another_size_are_other_features(train_tiny: Train) -> None:
    sizes = [24, 40]
    overrides = [f"transfer.stages.probe.{k}" for k in ("cache=on", "epochs=1")]
    runs = [
        train_tiny("transfer=linear_probe", *overrides, f"transfer.stages.probe.image_size={size}")
        for size in sizes
    ]
    entries = list((runs[0].folder.parents[1] / "cache").glob("**/about.json"))
    inputs = {json.loads(path.read_text())["input"] for path in entries}
    assert inputs == {"24 px", "40 px"}


def test_a_head_can_be_kept_as_it_is(train_tiny: Train) -> None:
    before = initial("head=mlp")
    after = train_tiny(
        "head=mlp", f"{STAGE}.train_head=false", "optimizer.weight_decay=0.5"
    ).state()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("head."))
    key = "backbone.blocks.stem.conv.weight"
    assert not torch.equal(before[key], after[key])


def test_the_table_of_groups_tells_what_the_layers_do(train_tiny: Train) -> None:
    run = train_tiny(
        f"{STAGE}.trainable=[stage3_1]", f"{STAGE}.norm=stats", f"{STAGE}.layer_decay=0.5"
    )
    rows = json.loads((run.folder / "run.json").read_text())["groups"]["finetune"]
    table = {row["group"]: (row["trainable"], row["norm"], row["lr"]) for row in rows[:-1]}
    assert table == {
        "stage3_1": ("yes", "stats", 0.025),
        "head": ("yes", "", 0.05),
        "head/norm_bias": ("yes", "", 0.05),
        "stem": ("no", "frozen", 0.0),
        "stage1_1": ("no", "frozen", 0.0),
        "stage2_1": ("no", "frozen", 0.0),
    }
    assert (rows[-1]["group"], rows[-1]["trainable"]) == ("stage3_1", "no")  # its norms
    total = sum(p.numel() for p in run.module.parameters())
    assert sum(row["parameters"] for row in rows) == total


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["transfer=linear_probe", "transfer.stages.probe.l2_sp=1"], "l2_sp is about the backbone"),
        (
            ["transfer=linear_probe", "transfer.stages.probe.train_head=false"],
            "nothing would learn",
        ),
        (["transfer=lora", f"{STAGE}.l2_sp=1"], "leave the pretrained weights as they are"),
        ([f"{STAGE}.augment={{flop:1}}"], "no key flop in .*: shift, flip"),
        ([f"{STAGE}.augment={{flip:2}}"], "augment.flip=2: must be a probability"),
        ([f"{STAGE}.lora={{rank:0}}"], "lora.rank=0: must be a whole number from 1"),
        ([f"{STAGE}.ema=1"], "ema=1: must be a number of at least 0 and below 1"),
        (
            ["task=regression", f"{STAGE}.label_smoothing=0.1"],
            "label_smoothing: this task has none",
        ),
    ],
)
def test_what_contradicts_itself_is_said_before_anything_starts(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compose(*TINY, *overrides)


def test_adapters_need_a_weight_to_sit_on() -> None:
    with pytest.raises(ValueError, match="lora: no linear layer or convolution in norms"):
        module_of("transfer=lora", f"{STAGE}.trainable=norms", f"{STAGE}.norm=train")


def test_a_stage_s_defaults_are_those_that_users_read() -> None:
    base = OmegaConf.load(CONFIGS / "stage" / "base.yaml")
    written = OmegaConf.to_container(OmegaConf.merge(base, {"epochs": 1}))
    of_the_run = dict.fromkeys(("lr", "weight_decay", "optimizer", "scheduler"))
    assert {**of_the_run, **vars(StageOptions(epochs=1))} == written


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (["transfer=lp_ft", "optimizer.lr=0.01"], ["probe"]),
        (["transfer=lp_ft", "head=linear_grid", "optimizer.lr=0.01"], ["probe"]),
        (
            ["transfer=lp_ft", "transfer.stages.finetune.lr=0.1", "optimizer.weight_decay=0"],
            ["probe"],
        ),
        (["transfer=finetune", "optimizer.lr=0.01"], []),
        (["transfer=lp_ft", "optimizer=adamw"], []),
    ],
)
def test_what_reaches_some_stages_alone_is_said(overrides: list[str], stages: list[str]) -> None:
    notes = [*reaching_some(compose(*overrides), overrides)]
    expected = f"{overrides[-1]} does not reach {', '.join(stages)}: a value of its own comes first"
    assert notes == ([expected] if stages else [])
