"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a batch, with soft targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.transforms.boxes import inside
from graft.transforms.draws import MIX, beta, uniform


def mix(
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    num_classes: int,
    *,
    mixup: float,
    cutmix: float,
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """Mixed images, and their targets (N, num_classes).

    What is drawn belongs to (seed, epoch, index); whom an image meets is another of the same
    batch, so that does depend on the batch (and, with several ranks, on the rank's own share).

    Args:
        labels: (N,) classes, or (N, num_classes) targets of any kind.
        images: (N, 3, H, W) floats. Each keeps its own label's weight and takes the rest from one
            other image.
        mixup, cutmix: alpha of the weight's Beta(alpha, alpha); 0 is off. Where both are on, each
            image draws which of them it gets.
    """
    n, _, height, width = images.shape
    u = uniform(seed, epoch, index, 5, first=MIX)
    own = torch.arange(n, device=images.device)
    partner = (own + 1 + (u[:, 0] * (n - 1)).long()) % n
    others = images[partner]
    cut = u[:, 1] < (0.5 if mixup and cutmix else float(cutmix > 0))
    weight = torch.ones(n, device=images.device)
    if cutmix:
        side = (1 - beta(cutmix, u[:, 2])).sqrt() * cut
        boxes = _clipped(side, u[:, 3], u[:, 4], height, width)
        images = torch.where(inside(boxes, height, width), others, images)
        area = (boxes[:, 2] * boxes[:, 3]).float() / (height * width)
        weight = 1 - area  # of what was cut, not of what was drawn
    if mixup:
        blend = torch.where(cut, 1.0, beta(mixup, u[:, 2]))  # 1 leaves a cut image as it is
        images = others.lerp_(images, blend[:, None, None, None])
        weight = torch.where(cut, weight, blend)
    whole = labels if labels.ndim == 2 else F.one_hot(labels, num_classes).float()
    return images, weight[:, None] * whole + (1 - weight[:, None]) * whole[partner]


def _clipped(side: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """(N, 4) boxes whose centre lies anywhere in the image; what sticks out is lost."""
    edges = []
    for size, centre in ((height, y), (width, x)):
        length = (size * side).long()
        start = (size * centre).long() - length // 2
        edges.append((start.clamp(min=0), (start + length).clamp(max=size)))
    (top, bottom), (left, right) = edges
    return torch.stack([top, left, bottom - top, right - left], dim=1)
