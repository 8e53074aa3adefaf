"""timm's models as backbones (an extra: `pip install 'graft[timm]'`)."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.backbones.base import Backbone, Preprocessing
from graft.backbones.weights import load_into

Blocks = dict[str, nn.Module]


class Body(nn.Module):
    """A model that does not come apart: one block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


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


def _children_in_order(model: nn.Module) -> Blocks:
    """Convnets: children applied one after another; containers of stages opened."""
    blocks: Blocks = {}
    for name, child in model.named_children():
        stages = dict(child.named_children()) if name in ("stages", "blocks", "layers") else {}
        if isinstance(child, nn.Sequential) and stages:
            blocks |= {f"{name}{i}": stage for i, stage in enumerate(stages.values(), 1)}
        else:
            blocks[name] = child
    return blocks


def _vision_transformer(model: Any) -> Blocks:
    layers = {f"layer{i}": layer for i, layer in enumerate(model.blocks, 1)}
    pool = TokenPool(model.global_pool, model.num_prefix_tokens)
    last = nn.Sequential(model.norm, pool, model.fc_norm)
    model.blocks, model.norm, model.fc_norm = nn.Sequential(), nn.Identity(), nn.Identity()
    return {"embed": Embed(model), **layers, "pool": last}


def _take_apart(model: nn.Module, size: int) -> Blocks:
    """Blocks whose composition equals the model, checked on an image; or one block, `body`."""
    model.eval()
    image = torch.rand(1, 3, size, size)
    with torch.no_grad():
        expected = model(image)
        ways: tuple[Callable[[Any], Blocks], ...] = (_children_in_order, _vision_transformer)
        for way in ways:
            try:
                blocks = way(copy.deepcopy(model))
                x = image
                for block in blocks.values():
                    x = block(x)
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                continue  # not this kind of model
            if x.shape == expected.shape and torch.allclose(x, expected, atol=1e-4, rtol=1e-4):
                return blocks
    return {"body": Body(model)}


def timm_backbone(
    *,
    model: str,
    weights: str | None = "DEFAULT",
    taps: Sequence[str] | str | None = None,
    **kwargs: Any,
) -> Backbone:
    """A timm model without its classifier.

    Convnets and ViTs come apart into blocks; anything whose blocks, put together again, don't
    give the model's own features becomes a single block, which can only be frozen as a whole.

    Args:
        model: timm's name, with a tag if wanted ("vit_small_patch16_224.augreg_in21k").
        weights: "DEFAULT" (those of the tag), a file, or None for random weights.
        taps: see `Backbone`.
        kwargs: passed on to `timm.create_model`.

    Raises:
        ValueError: timm is not installed, an unknown model, or a file of another architecture.
        OSError: the weights can't be downloaded.
    """
    try:
        import timm
        from timm.data.config import resolve_data_config
    except ImportError as error:
        raise ValueError("backbone=timm needs timm: pip install 'graft[timm]'") from error
    if weights not in (None, "DEFAULT") and not Path(weights).suffix:
        raise ValueError(f"backbone.weights={weights}: must be DEFAULT, a file, or null")
    if not timm.is_model(model):
        raise ValueError(
            f"backbone.model: timm has no model {model} (timm.list_models('*resnet*') lists names)"
        )
    try:
        built = timm.create_model(model, pretrained=weights == "DEFAULT", num_classes=0, **kwargs)
    except (OSError, RuntimeError) as error:
        offline = "" if os.environ.get("HF_HUB_OFFLINE") else " (HF_HUB_OFFLINE=1 fails at once)"
        raise OSError(
            f"timm could not load {model}: {str(error).splitlines()[0]}; without a network use "
            f"backbone.weights=FILE or null{offline}"
        ) from error
    if weights not in (None, "DEFAULT"):
        load_into(built, weights, label=model)

    data = resolve_data_config({}, model=built)
    size = data["input_size"][-1]
    return Backbone(
        _take_apart(built, size),
        Preprocessing(
            resize_size=round(size / data["crop_pct"]),
            crop_size=size,
            mean=data["mean"],
            std=data["std"],
            interpolation="bicubic" if data["interpolation"] == "bicubic" else "bilinear",
        ),
        taps=taps,
        pool=_pool,
        channels_last=any(isinstance(m, nn.BatchNorm2d) for m in built.modules()),
        probe_size=size,
        description=f"timm {model}, {f'weights {weights}' if weights else 'random weights'}",
    )


def _pool(x: Tensor) -> Tensor:
    """A block's output to (N, C): maps over space, tokens over position."""
    return x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x
