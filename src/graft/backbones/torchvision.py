"""torchvision's classification models as backbones, adapted by family.

A family's function takes the original model apart into ordered blocks whose composition is the
input of the original classifier. It knows the family's attributes, not its models.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from graft.backbones.base import (
    Backbone,
    FixedSize,
    Preprocessing,
    pool_nchw,
    pool_nhwc,
    pool_tokens,
)
from graft.backbones.weights import is_file_name, load_state, read_weights

Blocks = dict[str, nn.Module]


def _pool() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _sequence(*modules: nn.Module) -> nn.Module:
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def resnet(m: Any) -> Blocks:
    stem = nn.Sequential(m.conv1, m.bn1, m.relu, m.maxpool)
    stages = {f"layer{i}": getattr(m, f"layer{i}") for i in range(1, 5)}
    return {"stem": stem, **stages, "pool": _pool()}


def convnext(m: Any) -> Blocks:
    blocks: Blocks = {"stem": m.features[0], "stage1": m.features[1]}
    for i in range(2, len(m.features), 2):  # downsampling, then its stage
        blocks[f"stage{i // 2 + 1}"] = nn.Sequential(m.features[i], m.features[i + 1])
    return {**blocks, "pool": nn.Sequential(m.avgpool, m.classifier[0], nn.Flatten())}


def efficientnet(m: Any) -> Blocks:
    stages = {f"stage{i}": stage for i, stage in enumerate(m.features[1:], 1)}
    return {"stem": m.features[0], **stages, "pool": _pool()}


def mobilenet_v3(m: Any) -> Blocks:
    hidden = nn.Sequential(*m.classifier[:2])  # the last Linear and the dropout before it go
    return {**efficientnet(m), "hidden": hidden}


def squeezenet(m: Any) -> Blocks:
    blocks: Blocks = {}
    pending: list[nn.Module] = []  # a pooling layer belongs to the fire module after it
    for layer in m.features:
        pending.append(layer)
        if isinstance(layer, nn.ReLU):
            blocks["stem"] = _sequence(*pending)
        elif hasattr(layer, "squeeze"):
            blocks[f"fire{len(blocks)}"] = _sequence(*pending)
        else:
            continue
        pending = []
    return {**blocks, "pool": _pool()}


def densenet(m: Any) -> Blocks:
    f = m.features
    blocks: Blocks = {"stem": nn.Sequential(f.conv0, f.norm0, f.relu0, f.pool0)}
    blocks["block1"] = f.denseblock1
    for i in range(2, 5):
        parts = [getattr(f, f"transition{i - 1}"), getattr(f, f"denseblock{i}")]
        blocks[f"block{i}"] = nn.Sequential(*parts, *([f.norm5, nn.ReLU()] if i == 4 else []))
    return {**blocks, "pool": _pool()}


def vgg(m: Any) -> Blocks:
    blocks: Blocks = {}
    layers: list[nn.Module] = []
    for layer in m.features:
        layers.append(layer)
        if isinstance(layer, nn.MaxPool2d):
            blocks[f"block{len(blocks) + 1}"] = nn.Sequential(*layers)
            layers = []
    blocks["fc6"] = nn.Sequential(m.avgpool, nn.Flatten(), *m.classifier[:2])
    blocks["fc7"] = nn.Sequential(*m.classifier[2:5])
    return blocks


def regnet(m: Any) -> Blocks:
    stages = dict(m.trunk_output.named_children())
    return {"stem": m.stem, **stages, "pool": _pool()}


def swin(m: Any) -> Blocks:
    blocks: Blocks = {"embed": m.features[0], "stage1": m.features[1]}
    for i in range(2, len(m.features), 2):  # patch merging, then its stage
        blocks[f"stage{i // 2 + 1}"] = nn.Sequential(m.features[i], m.features[i + 1])
    return {**blocks, "pool": nn.Sequential(m.norm, m.permute, m.avgpool, nn.Flatten())}


class Embed(nn.Module):
    """Patches to tokens (N, T, D): projection, class token, position."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.conv_proj = vit.conv_proj
        self.class_token = vit.class_token
        self.pos_embedding = vit.encoder.pos_embedding
        self.dropout = vit.encoder.dropout

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        return self.dropout(tokens + self.pos_embedding)


class ClassToken(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def vit(m: Any) -> Blocks:
    layers = {f"layer{i}": layer for i, layer in enumerate(m.encoder.layers, 1)}
    embed = nn.Sequential(FixedSize(m.image_size), Embed(m))
    return {"embed": embed, **layers, "pool": nn.Sequential(m.encoder.ln, ClassToken())}


# torchvision's module -> how to take its models apart, how to pool a block's output for taps.
FAMILIES: dict[str, tuple[Callable[[Any], Blocks], Callable[[Tensor], Tensor]]] = {
    "resnet": (resnet, pool_nchw),
    "convnext": (convnext, pool_nchw),
    "efficientnet": (efficientnet, pool_nchw),
    "mobilenetv2": (efficientnet, pool_nchw),
    "mobilenetv3": (mobilenet_v3, pool_nchw),
    "squeezenet": (squeezenet, pool_nchw),
    "densenet": (densenet, pool_nchw),
    "vgg": (vgg, pool_nchw),
    "regnet": (regnet, pool_nchw),
    "swin_transformer": (swin, pool_nhwc),
    "vision_transformer": (vit, pool_tokens),
}


def torchvision_backbone(
    *,
    model: str,
    weights: str | None = None,
    pretrained: bool = True,
    taps: Sequence[str] | str | None = None,
    **kwargs: Any,
) -> Backbone:
    """A torchvision classification model up to the input of its classifier.

    Args:
        model: torchvision's name, for instance "resnet50".
        weights: name of an entry of its weights enum ("IMAGENET1K_V1", "DEFAULT"), a `.pth` or
            `.safetensors` file (torchvision's layout or ours), or None for random weights.
        pretrained: False takes architecture and preprocessing from `weights`, and neither
            downloads nor reads them: for a checkpoint that is loaded next.
        taps: see `Backbone`.
        kwargs: passed on to torchvision's builder.

    Raises:
        ValueError: unknown model, family or weights, or a file of another architecture.
        OSError: the weights can't be downloaded.
    """
    if model not in models.list_models(module=models):
        close = difflib.get_close_matches(model, models.list_models(module=models), n=3)
        hint = f": did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"backbone.model: torchvision has no model {model}{hint}")
    family = models.get_model_builder(model).__module__.rpartition(".")[2]
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"backbone.model={model}: no adapter for its family; there are {known}")
    entries = models.get_model_weights(model)
    is_file = weights is not None and is_file_name(weights)
    if weights is not None and not is_file and weights not in entries.__members__:
        raise ValueError(
            f"backbone.weights={weights}: {model} has {', '.join(entries.__members__)}; or give "
            "a .pth or .safetensors file, or null"
        )
    entry = None if weights is None or is_file else entries[weights]
    state = read_weights(Path(weights)) if weights is not None and is_file and pretrained else None
    ours = state is not None and all(key.startswith("blocks.") for key in state)
    if pretrained:
        original = _build(model, entry, **kwargs)
    else:
        if entry is not None and family == "vision_transformer":  # as its builder does
            kwargs["image_size"] = entry.meta["min_size"][0]
        original = models.get_model(model, weights=None, **kwargs)
    if state is not None and not ours:
        # Only the last layer may differ: `classifier` of VGG or MobileNetV3 holds features too.
        last = [n for n, m in original.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        state = {_DENSENET_OLD.sub(r"\1\2.", key): value for key, value in state.items()}
        load_state(original, state, source=str(weights), optional=(f"{last}.",), label=model)

    take_apart, pool = FAMILIES[family]
    size = getattr(original, "image_size", None)  # ViT: of what entry are our weights a stand-in?
    alike = [e for e in entries if size in (None, e.transforms().crop_size[0])]
    transform = (entry or next(iter(alike), entries["DEFAULT"])).transforms()
    backbone = Backbone(
        take_apart(original),
        Preprocessing(
            resize_size=transform.resize_size[0],
            crop_size=transform.crop_size[0],
            mean=tuple(transform.mean),
            std=tuple(transform.std),
            interpolation=transform.interpolation.value,
        ),
        taps=taps,
        pool=pool,
        channels_last=pool is pool_nchw,
        probe_size=size or 64,
        description=f"{model}, "
        + (f"weights {entry.name if entry else weights}" if weights else "random weights"),
    )
    if state is not None and ours:
        load_state(backbone, state, source=str(weights), label=model)
    return backbone


# The files that torchvision publishes for DenseNet say norm.1 where its modules say norm1.
_DENSENET_OLD = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.")


def _build(model: str, entry: models.WeightsEnum | None, **kwargs: Any) -> nn.Module:
    if entry is None:
        return models.get_model(model, weights=None, **kwargs)
    try:
        return models.get_model(model, weights=entry, progress=sys.stderr.isatty(), **kwargs)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # the last three: torn file
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"the weights {entry.name} of {model} could not be downloaded or read ({reason}): put "
            f"{entry.url.rsplit('/', 1)[-1]} into {folder} (or set TORCH_HOME), or use "
            "backbone.weights=FILE or null"
        ) from error
