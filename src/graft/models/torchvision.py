"""torchvision's classification models as backbones, adapted by family.

A family's function takes the original model apart into ordered blocks whose composition is the
input of the original classifier. It knows the family's attributes, not its models.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.hub import HASH_REGEX
from torchvision import models

from graft.config.overrides import is_weights_path
from graft.config.words import did_you_mean
from graft.models.backbone import (
    Backbone,
    FixedSize,
    blank_image,
    pool_nchw,
    pool_nhwc,
    pool_tokens,
)
from graft.models.weights import WeightsFile, describe_origin, load_file_into, unknown_weights
from graft.transforms.preprocessing import Preprocessing

Blocks = dict[str, nn.Module]

# Parts of names, as in the recipes of ViT, ConvNeXt, Swin and Swin V2. (In torchvision's ConvNeXt
# layer scale has three dimensions.)
NO_WEIGHT_DECAY = {
    "class_token", "pos_embedding", "layer_scale", "relative_position_bias_table", "cpb_mlp",
    "logit_scale",
}  # fmt: skip


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
        # Not len(images), which an export takes for the number of images that it is shown.
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], dim=1)
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
        weights: name of an entry of its weights enum ("IMAGENET1K_V1", "DEFAULT"), a file
            (torchvision's layout or ours), a run folder of ours, or None for random weights.
        pretrained: False takes architecture and preprocessing from `weights`, and neither
            downloads nor reads them: for a checkpoint that is loaded next.
        taps: see `Backbone`.
        kwargs: passed on to torchvision's builder.

    Raises:
        ValueError: unknown model, family or weights, or a file of another architecture.
        OSError: the weights can't be downloaded.
    """
    if model not in models.list_models(module=models):
        hint = did_you_mean(model, models.list_models(module=models))
        raise ValueError(f"backbone.model: torchvision has no model {model}{hint}")
    family = models.get_model_builder(model).__module__.rpartition(".")[2]
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"backbone.model={model}: no adapter for its family; there are {known}")
    entries = models.get_model_weights(model)
    own_name = weights is not None and weights not in entries.__members__
    is_file = weights is not None and own_name and is_weights_path(weights)
    if weights is not None and not is_file and weights not in entries.__members__:
        raise unknown_weights(weights, model, [*entries.__members__])
    entry = None if weights is None or is_file else entries[weights]
    file, note = None, ""
    if pretrained and entry is not None:
        file, note = _published(model, entry)
    elif pretrained and weights is not None:
        file = WeightsFile.read(weights)
    if entry is not None and family == "vision_transformer":  # as its builder does
        kwargs["image_size"] = entry.meta["min_size"][0]
    original = models.get_model(model, weights=None, **kwargs)

    take_apart, pool = FAMILIES[family]
    size = getattr(original, "image_size", None)  # ViT: of what entry are our weights a stand-in?
    alike = [e for e in entries if size in (None, e.transforms().crop_size[0])]
    stands_for = entry or next(iter(alike), entries["DEFAULT"])
    backbone = Backbone(
        take_apart(original),
        (file.preprocessing if file else None) or _preprocessing(stands_for, weights, entry),
        taps=taps,
        pool=pool,
        channels_last=pool is pool_nchw,
        example=blank_image(size or 64),
        description=f"{model}, "
        + (f"weights {entry.name if entry else weights}{note}" if weights else "random weights"),
        weights=f"torchvision {model} {entry.name}{note}" if entry else weights or "",
        no_weight_decay=[
            p for n, p in original.named_parameters() if NO_WEIGHT_DECAY & {*n.split(".")}
        ],
    )
    if file is not None:
        # Only the last layer may differ: `classifier` of VGG or MobileNetV3 holds features too.
        last = [n for n, m in original.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        taken = load_file_into(
            file,
            [(original, (f"{last}.",)), (backbone, backbone.unused_keys)],
            label=model,
            rename=partial(_DENSENET_OLD.sub, r"\1\2.") if family == "densenet" else str,
        )
        backbone.taken = taken if entry is None else ""
    return backbone


def _preprocessing(
    entry: models.WeightsEnum, weights: str | None, named: models.WeightsEnum | None
) -> Preprocessing:
    transform = entry.transforms()
    return Preprocessing(
        resize_size=transform.resize_size[0],
        crop_size=transform.crop_size[0],
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
        origin=describe_origin(entry.name, weights, known=named is not None),
    )


# The files that torchvision publishes for DenseNet say norm.1 where its modules say norm1.
_DENSENET_OLD = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.")


def _published(model: str, entry: models.WeightsEnum) -> tuple[WeightsFile, str]:
    """The file of an entry, downloaded if it is not there; a note if it is another one.

    Not torchvision's own reader: it unpickles whatever file has the right name.
    """
    name = entry.url.rsplit("/", 1)[-1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    digest = HASH_REGEX.search(name)
    wanted = digest[1] if digest else ""
    note = ""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                entry.url, str(path), wanted or None, progress=sys.stderr.isatty()
            )
        else:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if not found.startswith(wanted):
                note = f" (another file than the published one: its sha256 is {found[:8]}...)"
        return WeightsFile.read(path), note
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"the weights {entry.name} of {model} could not be downloaded or read ({reason}): put "
            f"{name} into {path.parent} (or set TORCH_HOME), or use backbone.weights=FILE or null"
        ) from error
