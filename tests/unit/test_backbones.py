"""Backbones against the models they were taken from."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import group_parameters
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import StochasticDepth

from graft.config.objects import make
from graft.models.backbone import Backbone
from graft.models.heads import LinearHead
from graft.models.resnet_cifar import EMBEDDED, resnet_cifar
from graft.models.timm import timm_backbone
from graft.models.torchvision import FAMILIES, Embed, torchvision_backbone
from graft.plan.freeze import set_modes
from graft.plan.param_groups import describe_groups, param_groups
from tests.conftest import compose

FAMILY_MODULES = (
    models.resnet, models.convnext, models.efficientnet, models.mobilenetv2, models.mobilenetv3,
    models.squeezenet, models.densenet, models.vgg, models.regnet, models.swin_transformer,
    models.vision_transformer,
)  # fmt: skip
FAMILY_FILES = {module.__name__ for module in FAMILY_MODULES}
ALL_MODELS = [
    name
    for name in models.list_models(module=models)
    if models.get_model_builder(name).__module__ in FAMILY_FILES
]
SMALL = {
    "resnet18": 64, "resnext50_32x4d": 64, "convnext_tiny": 64, "efficientnet_b0": 64,
    "efficientnet_v2_s": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "squeezenet1_1": 64,
    "squeezenet1_0": 64, "densenet121": 64, "vgg11_bn": 64, "regnet_y_400mf": 64, "swin_t": 64,
    "swin_v2_t": 64, "vit_b_32": 224,
}  # fmt: skip
LARGE = ("vgg11_bn", "vit_b_32")  # weights files of half a GB


def penultimate(model: nn.Module, images: Tensor) -> Tensor:
    """What the original classifier is given: caught at its last layer, dropout being off."""
    caught: list[Tensor] = []
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    last = model.classifier[1] if isinstance(model, models.SqueezeNet) else linears[-1]
    last.register_forward_hook(lambda module, inputs, output: caught.append(inputs[0]))
    model(images)
    return caught[0].mean((2, 3)) if caught[0].ndim == 4 else caught[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in SMALL],
)
@torch.no_grad()
def test_features_equal_what_the_original_classifier_is_given(name: str, tmp_path: Path) -> None:
    """Through a weights file in torchvision's own layout, so that loading is tried too."""
    torch.manual_seed(0)
    original = models.get_model(name, weights=None).eval()
    for module in original.modules():  # statistics that leave a mark if they are lost
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    backbone = torchvision_backbone(model=name, weights=str(tmp_path / "weights.pth")).eval()
    images = torch.randn(2, 3, SMALL[name], SMALL[name])
    expected = penultimate(original, images)
    features = backbone(images)
    assert features.shape == (2, backbone.num_features)
    assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    for cut in range(1, len(backbone.blocks)):
        x = backbone.blocks[:cut](images)
        stored = x.clone()
        assert torch.allclose(backbone.forward_from(cut, x), features, rtol=1e-4, atol=1e-5)
        assert torch.equal(x, stored), "an in-place first layer would spoil stored activations"


@pytest.mark.parametrize("name", ALL_MODELS)
def test_every_model_of_the_families_builds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device: shapes without memory or arithmetic."""
    widths = models.regnet.BlockParams.from_init_params

    def with_numbers(*args: object, **kwargs: object) -> object:
        with torch.device("cpu"):  # RegNet computes its widths with tensors
            return widths(*args, **kwargs)

    monkeypatch.setattr(models.regnet.BlockParams, "from_init_params", with_numbers)
    with torch.device("meta"):
        backbone = torchvision_backbone(model=name)
        original = models.get_model(name)
    p = backbone.preprocessing
    features = backbone.eval()(torch.empty(1, 3, p.crop_size, p.crop_size, device="meta"))
    linears = [m for m in original.modules() if isinstance(m, nn.Linear)]
    width = linears[-1].in_features if linears else 512
    assert features.shape == (1, width)
    assert backbone.num_features == width
    assert len(backbone.blocks) >= 5
    # Nothing but the classifier has been left behind.
    lost = sum(p.numel() for p in original.parameters()) - sum(
        p.numel() for p in backbone.parameters()
    )
    assert lost == 1000 * (width + 1)


def test_every_family_is_tried_for_real() -> None:
    tried = {models.get_model_builder(name).__module__.rpartition(".")[2] for name in SMALL}
    assert tried == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "weights"),
    [("resnet50", "IMAGENET1K_V1"), ("resnet50", "IMAGENET1K_V2"), ("efficientnet_b0", "DEFAULT")],
)
def test_preprocessing_is_that_of_the_weights(
    name: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V1 and V2 of ResNet-50 differ in their resize: the entry asked for decides."""
    entry = models.get_model_weights(name)[weights]
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    file = tmp_path / "checkpoints" / entry.url.rpartition("/")[2]
    file.parent.mkdir()
    torch.save(models.get_model(name, weights=None).state_dict(), file)
    backbone = torchvision_backbone(model=name, weights=weights)
    p = backbone.preprocessing
    expected = entry.transforms()
    assert (p.resize_size, p.crop_size) == (expected.resize_size[0], expected.crop_size[0])
    assert (list(p.mean), list(p.std)) == (expected.mean, expected.std)
    assert p.interpolation == expected.interpolation.value
    assert backbone.description.endswith("...)"), "not the file that torchvision publishes"
    file.write_bytes(b"")  # an error if it is read
    bare = torchvision_backbone(model=name, weights=weights, pretrained=False)
    assert bare.preprocessing == p
    assert p.origin == f"as {entry.name} expects"
    assert [(k, v.shape) for k, v in bare.state_dict().items()] == [
        (k, v.shape) for k, v in backbone.state_dict().items()
    ]


def test_without_its_weights_a_backbone_keeps_what_they_decide() -> None:
    """The size of a ViT's position embedding, timm's preprocessing; a file may be gone."""
    with torch.device("meta"):
        vit = torchvision_backbone(
            model="vit_b_16", weights="IMAGENET1K_SWAG_E2E_V1", pretrained=False
        )
    assert vit.preprocessing.crop_size == 384
    assert vit.get_parameter("blocks.embed.1.pos_embedding").shape == (1, 24 * 24 + 1, 768)
    tagged = timm_backbone(model="resnet18", weights="a1_in1k", pretrained=False)
    assert tagged.preprocessing.resize_size == 235
    assert tagged.description == "timm resnet18, weights a1_in1k"
    for build in (
        partial(torchvision_backbone, model="squeezenet1_1"),
        partial(timm_backbone, model="test_resnet"),
        resnet_cifar,
    ):
        build(weights="gone.pth", pretrained=False)


def test_stochastic_depth_is_a_key_where_the_backbone_has_it() -> None:
    """Growing with depth, and off in blocks that a stage freezes."""
    config = compose(
        "backbone=convnext_tiny", "backbone.weights=null", "backbone.stochastic_depth_prob=0.4"
    )
    backbone = make(config["backbone"])
    layers = [m for m in backbone.modules() if isinstance(m, StochasticDepth)]
    assert [layers[0].p, layers[-1].p] == [0.0, pytest.approx(0.4)]
    set_modes(backbone.train(), ["stage4"], "train")
    frozen = sum(
        m.training for m in backbone.blocks[:4].modules() if isinstance(m, StochasticDepth)
    )
    assert (frozen, layers[-1].training) == (0, True)


def test_a_forward_makes_no_new_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a slice of blocks would in every step."""
    backbone = resnet_cifar(depth=8, weights=None).eval()
    stored = backbone.blocks[:2](torch.randn(2, 3, 32, 32))
    expected = backbone.blocks[2:](stored)
    made: list[nn.Module] = []
    monkeypatch.setattr(nn.Sequential, "__init__", lambda self, *layers: made.append(self))
    assert torch.equal(backbone.forward_from(2, stored), expected)
    assert not made


def test_taps_are_the_pooled_outputs_of_blocks_in_order() -> None:
    plain = torchvision_backbone(model="squeezenet1_1").eval()
    tapped = torchvision_backbone(model="squeezenet1_1", taps=["fire8", "fire1"]).eval()
    tapped.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        early = plain.blocks[:2](images).mean((2, 3))
        last = plain.blocks[:9](images).mean((2, 3))
        assert torch.allclose(tapped(images), torch.cat([early, last], dim=1), atol=1e-6)
    assert tapped.num_features == 128 + 512
    assert tapped.taps == ["fire1", "fire8"]
    everything = torchvision_backbone(model="squeezenet1_1", taps="all")
    assert everything.taps == everything.learnable_blocks


@pytest.mark.parametrize("name", ["swin_t", "vit_b_32"])
def test_taps_of_transformers_pool_over_positions(name: str) -> None:
    size = SMALL[name]
    backbone = torchvision_backbone(model=name, taps="all").eval()
    widths = []
    x = torch.zeros(2, 3, size, size)
    with torch.no_grad():
        for block in backbone.blocks:
            x = block(x)
            widths.append(x.shape[-1] if len(list(block.parameters())) else 0)
        assert backbone(torch.zeros(2, 3, size, size)).shape == (2, sum(widths))


def test_our_layout_makes_the_round_trip(tmp_path: Path) -> None:
    for build in (
        lambda w: torchvision_backbone(model="squeezenet1_1", weights=w),
        lambda w: resnet_cifar(depth=8, weights=w),
    ):
        one = build(None)
        save_file(one.state_dict(), tmp_path / "weights.safetensors")
        other = build(str(tmp_path / "weights.safetensors"))
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


def test_a_classifier_of_another_number_of_classes_does_not_matter(tmp_path: Path) -> None:
    original = models.resnet18(num_classes=37)
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    backbone = torchvision_backbone(model="resnet18", weights=str(tmp_path / "weights.pth"))
    stem = backbone.blocks.get_parameter("stem.0.weight")
    assert torch.equal(stem, original.conv1.weight)


@pytest.mark.parametrize(
    ("name", "kept"),
    [("mobilenet_v3_small", "classifier.0"), ("convnext_tiny", "classifier.0")],
)
def test_only_the_last_layer_of_a_classifier_may_be_missing(
    name: str, kept: str, tmp_path: Path
) -> None:
    """MobileNetV3, ConvNeXt and VGG keep layers that give features in `classifier` too."""
    state = models.get_model(name).state_dict()
    path = tmp_path / "weights.pth"
    torch.save({k: v for k, v in state.items() if not k.startswith(kept)}, path)
    with pytest.raises(ValueError, match=rf"2 missing \({kept}\.weight, {kept}\.bias\)"):
        torchvision_backbone(model=name, weights=str(path))


def test_the_names_in_published_densenet_files_are_understood(tmp_path: Path) -> None:
    """torchvision's own files say denselayer1.norm.1 and know no num_batches_tracked."""
    original = models.densenet121()
    state = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): value
        for key, value in original.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "weights.pth")
    backbone = torchvision_backbone(model="densenet121", weights=str(tmp_path / "weights.pth"))
    loaded = backbone.blocks.get_parameter("block1.denselayer2.conv1.weight")
    assert torch.equal(loaded, original.features.denseblock1.denselayer2.conv1.weight)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(models.resnet34().state_dict(), path)
    with pytest.raises(ValueError, match=r"does not fit .* resnet18.*unexpected \(layer1\.2"):
        torchvision_backbone(model="resnet18", weights=str(path))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        torchvision_backbone(model="resnet18", weights=str(path))
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.pth"):
        torchvision_backbone(model="resnet18", weights="missing.pth")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": "resnet5"}, "no model resnet5: did you mean resnet50"),
        ({"model": "inception_v3"}, "no adapter for its family"),
        ({"model": "RESNET18"}, r"no model RESNET18: did you mean resnet18\?"),
        ({"model": "resnet18", "weights": "DEFUALT"}, "resnet18 has IMAGENET1K_V1"),
        (
            {"model": "resnet50", "weights": "imagenet1k_v1"},
            r"weights=imagenet1k_v1: did you mean IMAGENET1K_V1\? resnet50 has IMAGENET1K_V1, IMAG",
        ),
        ({"model": "squeezenet1_1", "taps": ["fire9"]}, "no block named fire9; the blocks are"),
    ],
)
def test_wrong_names_are_refused_with_the_right_ones(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchvision_backbone(**kwargs)


def test_a_vit_says_which_size_it_takes() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"set data\.image_size=224"):
        torchvision_backbone(model="vit_b_32")(torch.empty(1, 3, 96, 96))


def test_weights_that_cannot_be_downloaded_say_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(OSError, match=rf"resnet18-\w+\.pth into {tmp_path}"):
        torchvision_backbone(model="resnet18", weights="IMAGENET1K_V1")
    torn = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    torn.parent.mkdir(exist_ok=True)
    torn.write_bytes(b"torn")
    with pytest.raises(OSError, match=rf"read .* put {torn.name} into {tmp_path}"):
        torchvision_backbone(model="resnet18", weights="IMAGENET1K_V1")


def test_resnet20_has_the_parameters_of_the_paper() -> None:
    """0.27 M (He et al. 2016, table 6); with 1x1 shortcuts where the shape changes."""
    backbone = resnet_cifar(weights=None)
    assert sum(p.numel() for p in backbone.parameters()) == 271_824
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 64)
    with pytest.raises(ValueError, match="6n"):
        resnet_cifar(depth=21, weights=None)


def test_the_embedded_weights_are_small_and_pretrained() -> None:
    assert EMBEDDED.stat().st_size < 1_500_000
    random, pretrained = resnet_cifar(weights=None), resnet_cifar()
    key = "blocks.stem.conv.weight"
    assert not torch.equal(random.get_parameter(key), pretrained.get_parameter(key))
    assert pretrained.get_buffer("blocks.stem.bn.running_var").std() > 0
    with pytest.raises(ValueError, match=r"cifar10: did you mean CIFAR10\? ResNet-20 has CIFAR10;"):
        resnet_cifar(weights="cifar10")


TIMM_BLOCKS = {
    "resnet18": 6,
    "convnext_atto": 6,
    "efficientnet_b0": 9,
    "vit_tiny_patch16_224": 14,
    "swin_tiny_patch4_window7_224": 7,
    "hrnet_w18_small": 1,  # its branches exchange lists of tensors
}


@pytest.mark.parametrize("name", TIMM_BLOCKS)
@torch.no_grad()
def test_timm_models_come_apart_and_equal_themselves(name: str, tmp_path: Path) -> None:
    """Through a file in timm's own layout; random statistics, so that nothing is near identity.

    Of what the file carries: Swin's attention mask is not in it, and would differ afterwards.
    """
    torch.manual_seed(0)
    original: Any = timm.create_model(name).eval()
    for tensor in original.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand_like(tensor))
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    backbone = timm_backbone(model=name, weights=str(tmp_path / "weights.pth")).eval()
    image = torch.randn(1, 3, 224, 224)
    expected = original.forward_head(original.forward_features(image), pre_logits=True)
    scale = float(expected.abs().max())
    assert torch.allclose(backbone(image), expected, rtol=1e-3, atol=1e-4 * scale)
    assert backbone.num_features == original.head_hidden_size
    assert len(backbone.blocks) == TIMM_BLOCKS[name]
    if len(backbone.blocks) > 1:
        stored = backbone.blocks[:2](image)
        before = stored.clone()
        features = backbone.forward_from(2, stored)
        assert torch.allclose(features, expected, rtol=1e-3, atol=1e-4 * scale)
        assert torch.equal(stored, before)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "densenet121"])
def test_timm_blocks_follow_the_order_of_its_group_matcher(name: str) -> None:
    original: Any = timm.create_model(name, num_classes=0)
    groups = group_parameters(original, original.group_matcher(coarse=True), reverse=True)
    sizes = [0] * (max(groups.values()) + 1)
    for key, parameter in original.named_parameters():
        sizes[groups[key]] += parameter.numel()
    blocks = timm_backbone(model=name, weights=None).blocks
    assert [n for b in blocks if (n := sum(p.numel() for p in b.parameters()))] == sizes


def test_a_block_is_never_named_as_another_part_of_a_run() -> None:
    """The norm that ends timm's ConvNeXt is its `head`: `trainable=[head]` was ambiguous."""
    backbone = timm_backbone(model="convnext_atto", weights=None)
    stages = [f"stages_{i}" for i in range(4)]
    assert backbone.block_names == ["stem", *stages, "head_layers"]
    head = LinearHead(backbone.num_features, 3)
    groups = param_groups(backbone, head, lr=0.1, weight_decay=0.1, layer_decay=0.5)
    norm = {id(p) for p in backbone.blocks.get_submodule("head_layers").parameters()}
    (found,) = (g for g in groups if g["name"] == "head_layers/norm_bias")
    assert {id(p) for p in found["params"]} == norm
    rows = {row["group"] for row in describe_groups(groups, backbone, head)}
    assert {"head_layers/norm_bias", "head", "head/norm_bias"} <= rows
    blocks = {"stem": nn.Conv2d(3, 4, 3), "head": nn.Flatten()}
    with pytest.raises(ValueError, match="no block can be named head"):
        Backbone(blocks, backbone.preprocessing)


SPARED = {  # by the last part of their names
    "vit_b_16": {"class_token", "pos_embedding"},
    "swin_t": {"relative_position_bias_table"},
    "swin_v2_t": {"logit_scale", "weight"},  # of cpb_mlp, which makes the table
    "convnext_tiny": {"layer_scale"},
    "resnet18": set(),
}
SPARED_BY_TIMM = {
    "test_vit": {"cls_token", "pos_embed"},
    "swin_tiny_patch4_window7_224": {"relative_position_bias_table"},
    "xcit_nano_12_p16_224": {"cls_token", "weight"},  # of pos_embed
    "convnext_atto": set(),  # its layer scale has one dimension
}


@pytest.mark.parametrize(
    ("build", "name", "spared"),
    [
        *((torchvision_backbone, name, spared) for name, spared in SPARED.items()),
        *((timm_backbone, name, spared) for name, spared in SPARED_BY_TIMM.items()),
    ],
)
def test_no_weight_decay_on_what_a_models_recipe_spares(
    build: Any, name: str, spared: set[str]
) -> None:
    backbone = build(model=name, weights=None)
    head = LinearHead(backbone.num_features, 3)
    for layer_decay in (1.0, 0.5):
        groups = param_groups(backbone, head, lr=0.1, weight_decay=0.1, layer_decay=layer_decay)
        still = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
        named = {n: p for n, p in backbone.blocks.named_parameters() if id(p) in still}
        assert {n.rpartition(".")[2] for n, p in named.items() if p.ndim > 1} == spared
        assert {id(p) for p in backbone.parameters() if p.ndim == 1} <= still
    groups = param_groups(backbone, head, lr=0.1, weight_decay=0.1, decay_norm_and_bias=True)
    assert {g["weight_decay"] for g in groups} == {0.1}


def test_timm_taps_pool_over_positions_where_channels_come_last() -> None:
    backbone = timm_backbone(model="swin_tiny_patch4_window7_224", weights=None, taps="all")
    # stem, four stages, the norm after them
    assert backbone.num_features == 96 + 96 + 192 + 384 + 768 + 768


def test_timm_preprocessing_is_that_of_timm() -> None:
    p = timm_backbone(model="resnet18.a1_in1k", weights=None).preprocessing
    resize, crop, *_ = create_transform(
        **resolve_data_config({}, model=timm.create_model("resnet18.a1_in1k"))
    ).transforms
    assert (p.resize_size, p.crop_size) == (resize.size, crop.size[0])  # 235, not 236
    assert p.interpolation == resize.interpolation.value == "bicubic"


def test_timm_reads_our_layout_too(tmp_path: Path) -> None:
    one = timm_backbone(model="test_vit", weights=None)
    save_file(one.state_dict(), tmp_path / "weights.safetensors")
    other = timm_backbone(model="test_vit", weights=str(tmp_path / "weights.safetensors"))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": "resnt18", "weights": None}, "no model resnt18: did you mean resnet18"),
        ({"model": "resnet18", "weights": "IMAGENET1K_V1"}, "resnet18 has a1_in1k, a2_in1k"),
        ({"model": "resnet18.nope"}, "resnet18 has a1_in1k, a2_in1k"),
        ({"model": "resnet18", "weights": "A1_IN1K"}, r"did you mean a1_in1k\? resnet18 has a1_"),
        ({"model": "resnet18", "weights": "default"}, r"did you mean DEFAULT\? resnet18 has a1_"),
    ],
)
def test_wrong_timm_names_are_refused_with_the_right_ones(
    kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        timm_backbone(**kwargs)


def test_a_timm_vit_says_which_size_it_takes() -> None:
    with pytest.raises(ValueError, match=r"set data\.image_size=224"):
        timm_backbone(model="vit_tiny_patch16_224", weights=None)(torch.zeros(1, 3, 96, 96))


def test_timm_without_a_network_fails_without_retrying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    # The hub's own client retries for 47 s and then says something else.
    with pytest.raises(OSError, match=r"out of reach.*backbone\.weights=FILE"):
        timm_backbone(model="resnet10t")
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.real_data
@pytest.mark.skipif("GRAFT_REAL_TORCH_HOME" not in os.environ, reason="no real weights at hand")
def test_real_imagenet_weights_load_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", os.environ["GRAFT_REAL_TORCH_HOME"])
    backbone: Backbone = torchvision_backbone(model="squeezenet1_1", weights="IMAGENET1K_V1").eval()
    original = models.get_model("squeezenet1_1", weights="IMAGENET1K_V1").eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.allclose(backbone(images), penultimate(original, images), atol=1e-4)


def test_tokens_of_a_vit_are_traced_for_any_number_of_images() -> None:
    """len() of a tensor would be a constant: the number of images that a trace is shown."""
    vit = models.VisionTransformer(32, 16, 1, 1, 8, 8)
    shown, count = (torch.zeros(2, 3, 32, 32),), torch.export.Dim("count")
    traced = torch.export.export(Embed(vit).eval(), shown, dynamic_shapes={"images": {0: count}})
    assert traced.module()(torch.zeros(5, 3, 32, 32)).shape == (5, 5, 8)
