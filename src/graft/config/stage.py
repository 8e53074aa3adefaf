"""The options of a stage of a plan, each once: what it takes, what it is if a plan says nothing.

Their names and defaults in words a user reads stand in `configs/stage/base.yaml`. Imports no torch:
a wrong value is found before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from graft.config.kinds import (
    BELOW_ONE,
    BOOL,
    MAPPING,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INT,
    SIDE,
    TEXT,
    Check,
    either,
    is_integer,
    list_of,
    one_of,
    or_null,
    up_to,
)

Trainable = str | int | Sequence[str]
NormPolicy = Literal["train", "stats", "affine", "frozen"]
Solver = Literal["sgd", "ridge", "lbfgs"]
TRAINABLE = either(
    "head, all, a number of top blocks, or a list of blocks, norms, biases and patterns",
    TEXT,
    POSITIVE_INT,
    list_of(TEXT),
)
AUGMENTED = either("true, false, or what differs from data.augment", BOOL, MAPPING)
VIEWS: Check = (
    "none, flip or a whole number above 1",
    lambda v: v in ("none", "flip") or (is_integer(v) and v > 1),
)


@dataclass(kw_only=True)
class StageOptions:
    """What a stage takes from its config as it stands there.

    Args:
        trainable: the part of the backbone that learns; see `learning_parameters`.
        train_head: whether the head learns too.
        norm: BatchNorm of the learning blocks: "train", "stats" (statistics move, affine fixed),
            "affine" (the reverse) or "frozen" (both fixed).
        layer_decay, head_lr_scale, decay_norm_and_bias: see `param_groups`.
        lora: low-rank adapters in place of the weights that `trainable` chooses.
        l2_sp: strength of the penalty towards the pretrained backbone, l2_sp / 2 * |w - w0|^2, in
            place of its weight decay (Li et al. 2018).
        ema: decay of a moving average of the weights, which is what is validated and kept; 0: none.
        adabn: whether the stage's best weights end with the BatchNorm statistics of images of
            `data.target`: at most 2,000, without their labels (Li et al. 2016).
        label_smoothing: if other than the run's.
        augment: whether training images are augmented, or how: what differs from `data.augment`.
        image_size: side in px of this stage's images, in training and evaluation; None is the
            data's own.
        solver: "sgd" (a fit with an optimizer), or "ridge" or "lbfgs" for a linear head on stored
            features. lbfgs: `epochs` is its largest number of iterations, the weight decay its
            strength; learning rate, optimizer and schedule say nothing.
        strengths: those that ridge tries; None for 30 around the scale of the features.
        cache: compute what is frozen once. "auto": where the stage does not augment and the
            outputs fit `cache_limit_gb`; "on": or else refuse; "off": recompute every epoch.
        cache_dtype: "float32", or "float16" for half the size.
        views: of each training image: "none" (the image), "flip" (its mirror image too) or a
            number of random augmentations, all of which can be stored; each epoch draws one.
    """

    epochs: Annotated[int, POSITIVE_INT]
    trainable: Annotated[Trainable, TRAINABLE] = "all"
    train_head: bool = True
    norm: NormPolicy = "train"
    layer_decay: Annotated[float, POSITIVE] = 1.0
    head_lr_scale: Annotated[float, POSITIVE] = 1.0
    decay_norm_and_bias: bool = False
    lora: Annotated[Any, or_null(("a rank and an alpha", MAPPING[1]))] = None
    l2_sp: Annotated[float, NOT_NEGATIVE] = 0.0
    ema: Annotated[float, BELOW_ONE] = 0.0
    adabn: bool = False
    label_smoothing: Annotated[float | None, or_null(BELOW_ONE)] = None
    augment: Annotated[bool | Mapping[str, Any], AUGMENTED] = True
    image_size: Annotated[int | None, or_null(SIDE)] = None
    solver: Solver = "sgd"
    strengths: Annotated[Sequence[float] | None, or_null(list_of(POSITIVE))] = None
    cache: Literal["auto", "on", "off"] = "auto"
    cache_limit_gb: Annotated[float, POSITIVE] = 4.0
    cache_dtype: Literal["float32", "float16"] = "float32"
    views: Annotated[str | int, VIEWS] = "none"


def _check(annotation: Any) -> Check:
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[1]
    return BOOL if annotation is bool else one_of(*get_args(annotation))


_HINTS = get_type_hints(StageOptions, include_extras=True)
STAGE: dict[str, Check] = {
    **{field.name: _check(_HINTS[field.name]) for field in fields(StageOptions)},
    # What these come to, the run's own decide too: see `build_stages`.
    "lr": or_null(POSITIVE),
    "weight_decay": or_null(NOT_NEGATIVE),
    "optimizer": or_null(MAPPING),
    "scheduler": or_null(MAPPING),
    "lora.rank": up_to(1, 100_000),
    "lora.alpha": POSITIVE,
}
