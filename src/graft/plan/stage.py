"""One stage of a transfer plan, as a value: what learns, for how long, with what optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer

from graft.plan.freeze import NormPolicy, Trainable
from graft.plan.grid import Grid
from graft.plan.lora import LoRA
from graft.plan.schedules import Schedule


@dataclass
class Stage:
    """One fit: what learns, for how long, with what optimizer.

    Args:
        trainable: the part of the backbone that learns; see `learning_parameters`.
        train_head: whether the head learns too.
        norm: BatchNorm of the learning blocks: "train", "stats" (statistics move, affine fixed),
            "affine" (the reverse) or "frozen" (both fixed).
        augment: whether training images are augmented, or how: what differs from `data.augment`.
        image_size: side in px of this stage's images, in training and evaluation; None is the
            data's own.
        label_smoothing: if other than the run's.
        cache: compute what is frozen once. "auto": where the stage does not augment and the
            outputs fit `cache_limit_gb`; "on": or else refuse; "off": recompute every epoch.
        cache_dtype: "float32", or "float16" for half the size.
        views: of each training image: "none" (the image), "flip" (its mirror image too) or a
            number of random augmentations, all of which can be stored; each epoch draws one.
        optimizer: called with (parameter groups, lr=...).
        solver: "sgd" (a fit with `optimizer`), or "ridge" or "lbfgs" for a linear head on stored
            features. lbfgs: `epochs` is its largest number of iterations, `weight_decay` its
            strength, and `lr`, `optimizer` and `schedule` say nothing.
        strengths: those that ridge tries; None for 30 around the scale of the features.
        grid: heads that train together in place of the module's own; the best becomes its head.
        layer_decay, head_lr_scale, decay_norm_and_bias: see `param_groups`.
        lora: low-rank adapters in place of the weights that `trainable` chooses.
        l2_sp: strength of the penalty towards the pretrained backbone, l2_sp / 2 * |w - w0|^2, in
            place of its weight decay (Li et al. 2018).
        ema: decay of a moving average of the weights, which is what is validated and kept; 0: none.
    """

    name: str
    epochs: int
    optimizer: Callable[..., Optimizer]
    schedule: Schedule
    lr: float
    trainable: Trainable = "all"
    train_head: bool = True
    norm: NormPolicy = "train"
    augment: bool | Mapping[str, Any] = True
    image_size: int | None = None
    label_smoothing: float | None = None
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    head_lr_scale: float = 1.0
    decay_norm_and_bias: bool = False
    lora: LoRA | None = None
    l2_sp: float = 0.0
    ema: float = 0.0
    cache: str = "auto"
    cache_limit_gb: float = 4.0
    cache_dtype: str = "float32"
    views: str | int = "none"
    solver: Solver = "sgd"
    strengths: Sequence[float] | None = None
    grid: Grid | None = None


Solver = Literal["sgd", "ridge", "lbfgs"]
