"""timm's models as backbones (an extra: `pip install 'graft[timm]'`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch
from torch import Tensor, nn

from graft.config.overrides import is_weights_path
from graft.config.words import did_you_mean
from graft.models.backbone import (
    RESERVED_NAMES,
    Backbone,
    FixedSize,
    blank_image,
    pool_nchw,
    pool_nhwc,
    pool_tokens,
)
from graft.models.hub import hub
from graft.models.weights import WeightsFile, describe_origin, load_file_into, unknown_weights
from graft.transforms.preprocessing import CropMode, Interpolation, Preprocessing

Blocks = dict[str, nn.Module]


class TokenPool(nn.Module):
    """(N, T, D) tokens to (N, D), as timm's own `global_pool` says."""

    def __init__(self, pool_type: str, prefix_tokens: int) -> None:
        super().__init__()
        self.pool_type = pool_type
        self.prefix_tokens = prefix_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        from timm.layers.pool1d import global_pool_nlc

        return global_pool_nlc(tokens, self.pool_type, num_prefix_tokens=self.prefix_tokens)


class Embed(nn.Module):
    """What a ViT does before its first layer: the model itself, with everything after taken out."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features(images)


def _layers_in_order(model: Any) -> list[tuple[str, nn.Module]]:
    """Children and, where they are a plain `nn.Sequential`, theirs: (path, module), no Identity."""
    layers = []
    for name, child in model.named_children():
        if type(child).forward is nn.Sequential.forward:
            layers += [(f"{name}.{key}", layer) for key, layer in child.named_children()]
        else:
            layers.append((name, child))
    return [(path, layer) for path, layer in layers if not isinstance(layer, nn.Identity)]


def _convnet(model: Any) -> Blocks:
    """Layers joined into the groups of timm's `group_matcher`: stem, stages, what follows them."""
    from timm.models import group_parameters

    group_of = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    if hasattr(model, "group_matcher"):
        group_of = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    blocks: list[tuple[int, Blocks]] = []
    for path, layer in _layers_in_order(model):
        groups = {g for name, g in group_of.items() if f"{name}.".startswith(f"{path}.")}
        if not blocks or (groups and blocks[-1][0] not in groups):
            blocks.append((min(groups, default=0), {}))
        blocks[-1][1][path] = layer  # what has no parameters goes with what it follows
    _, end = blocks[-1]
    if len(end) > 1 and next([*end.values()][-1].parameters(), None) is None:
        blocks.append((-1, {"pool": end.popitem()[1]}))
    named: Blocks = {}
    for _, layers in blocks:
        first = next(iter(layers))
        parent = first.partition(".")[0]
        whole = {
            f"{parent}.{key}" for key, _ in getattr(model, parent, nn.Module()).named_children()
        }
        name = parent if layers.keys() == whole else first.replace(".", "_")
        name = f"{name}_layers" if name in RESERVED_NAMES else name  # ConvNeXt's head is a norm
        named[name if named else "stem"] = nn.Sequential(*layers.values())
    return named


def _vision_transformer(model: Any) -> Blocks:
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    layers = {f"layer{i}": layer for i, layer in enumerate(model.blocks, 1)}
    pool = TokenPool(model.global_pool, model.num_prefix_tokens)
    last = nn.Sequential(model.norm, pool, model.fc_norm)
    model.blocks, model.norm, model.fc_norm = nn.Sequential(), nn.Identity(), nn.Identity()
    return {"embed": Embed(model), **layers, "pool": last}


@torch.no_grad()
def _take_apart(model: nn.Module, size: int) -> Blocks:
    """Blocks whose composition equals the model, checked on an image; or one block, `body`."""
    model.eval()
    image = torch.rand(1, 3, size, size)
    expected = model(image)
    ways: tuple[Callable[[Any], Blocks], ...] = (_vision_transformer, _convnet)
    for way in ways:
        try:
            blocks = way(model)
            x = image
            for block in blocks.values():
                x = block(x)
                if not isinstance(x, Tensor):
                    raise TypeError("blocks that pass several tensors can't be stored between them")
        except Exception:  # not this kind of model: timm has a thousand, each fails its own way
            continue
        if x.shape == expected.shape and torch.allclose(x, expected, atol=1e-4, rtol=1e-4):
            return blocks
    return {"body": model}


def timm_backbone(
    *,
    model: str,
    weights: str | bool | None = "DEFAULT",
    pretrained: bool = True,
    taps: Sequence[str] | str | None = None,
    **kwargs: Any,
) -> Backbone:
    """A timm model without its classifier.

    Convnets and ViTs come apart into blocks; anything whose blocks, put together again, don't
    give the model's own features becomes a single block, which can only be frozen as a whole.
    Preprocessing is timm's own; what few models of it want and we lack is refused by name.

    Args:
        model: timm's name, with a tag if wanted ("vit_small_patch16_224.augreg_in21k").
        weights: "DEFAULT" or true (those of the tag in `model`, or timm's first), a tag, a file
            (timm's layout or ours), a run folder of ours, or None for random weights.
        pretrained: False takes architecture and preprocessing from `weights`, and neither
            downloads nor reads them: for a checkpoint that is loaded next.
        taps: see `Backbone`.
        kwargs: passed on to `timm.create_model`.

    Raises:
        ValueError: timm is not installed, an unknown model or tag, or a file of another
            architecture.
        OSError: the weights can't be downloaded.
    """
    try:
        import timm
        from timm.data.config import resolve_model_data_config
    except ImportError as error:
        raise ValueError("backbone=timm needs timm: pip install 'graft[timm]'") from error
    name, _, tag = model.partition(".")
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise ValueError(f"backbone.model: timm has no model {name}{hint}")
    if (channels := kwargs.get("in_chans", 3)) != 3:
        raise ValueError(
            f"backbone.in_chans={channels}: images here have 3 channels, grey ones three equal ones"
        )
    tags = [
        n.partition(".")[2] for n in timm.list_pretrained(f"{name}*") if n.split(".")[0] == name
    ]
    file = None
    own_name = isinstance(weights, str) and weights not in ("DEFAULT", *tags)
    is_file = isinstance(weights, str) and own_name and is_weights_path(weights)
    if isinstance(weights, str) and is_file:
        file = WeightsFile.read(weights) if pretrained else None
    elif isinstance(weights, str) and weights != "DEFAULT":
        tag = weights
    published = bool(weights) and not is_file
    if (tag and tag not in tags) or (published and not tags):
        raise unknown_weights(str(tag or weights), name, [*tags, "DEFAULT"] if tags else [])
    full_name = f"{name}.{tag}" if tag else name
    load = published and pretrained
    with hub(f"timm's {full_name}", load=load):
        built: Any = timm.create_model(full_name, pretrained=load, num_classes=0, **kwargs)
    data = resolve_model_data_config(built)
    for key, known in (("interpolation", Interpolation), ("crop_mode", CropMode)):
        if data[key] not in get_args(known):
            raise ValueError(
                f"backbone.model={model}: its images want {key} {data[key]}, which is not among "
                f"{', '.join(get_args(known))}"
            )
    if len({*data["input_size"][1:]}) > 1:
        raise ValueError(f"backbone.model={model}: its images are not square: {data['input_size']}")
    embed = getattr(built, "patch_embed", None)
    fixed = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", False) else None
    size = fixed[0] if fixed else data["input_size"][-1]
    blocks = _take_apart(built, size)
    if fixed:
        first = next(iter(blocks))
        blocks[first] = nn.Sequential(FixedSize(size), blocks[first])
    nhwc = getattr(built, "output_fmt", "NCHW") == "NHWC"
    default = built.pretrained_cfg.get("tag") or "DEFAULT"
    used = default if published else weights
    origin = describe_origin(
        f"{name}.{default}", str(weights) if weights else None, known=published
    )
    backbone = Backbone(
        blocks,
        (file.preprocessing if file else None)
        or Preprocessing(
            resize_size=math.floor(size / data["crop_pct"]),  # as timm's own transform rounds
            crop_size=size,
            mean=data["mean"],
            std=data["std"],
            interpolation=data["interpolation"],
            crop_mode=data["crop_mode"],
            origin=origin,
        ),
        taps=taps,
        pool=_pool_channels_last if nhwc else _pool,
        channels_last=any(isinstance(m, nn.BatchNorm2d) for m in built.modules()),
        example=blank_image(size),
        description=f"timm {name}, {f'weights {used}' if used else 'random weights'}",
        weights=f"timm {name} {used}" if published else str(weights or ""),
        no_weight_decay=_no_weight_decay(built),
    )
    if file is not None:
        classifier = built.pretrained_cfg.get("classifier") or ()
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        layouts = [(built, tuple(f"{n}." for n in names)), (backbone, backbone.unused_keys)]
        backbone.taken = load_file_into(file, layouts, label=full_name)
    return backbone


def _no_weight_decay(model: Any) -> list[nn.Parameter]:
    """What the model itself names, in patterns."""
    patterns = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    named = model.named_parameters()
    return [p for name, p in named if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _pool(x: Tensor) -> Tensor:
    return pool_tokens(pool_nchw(x))


def _pool_channels_last(x: Tensor) -> Tensor:
    return pool_tokens(pool_nhwc(x))
