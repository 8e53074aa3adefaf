"""Colour distortion of a whole uint8 batch, each image by its own draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COLOR_DRAWS = 6
JITTERED = 0.8  # of the images, as in SimCLR (Chen et al. 2020)
HUE = 0.25  # of the other three strengths, as there
LUMA = (0.299, 0.587, 0.114)
TO_YIQ = (LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def recolored(images: Tensor, u: Tensor, strength: float, grayscale: float) -> Tensor:
    """(N, 3, H, W) uint8 -> the same: brightness, contrast, saturation and hue, all of which are
    affine in the colours, so that an image takes one product with a matrix.

    Args:
        u: (N, COLOR_DRAWS) uniform draws.
        strength: brightness, contrast and saturation are multiplied by 1 - strength to
            1 + strength; hue turns by up to strength / 4 of the circle (in YIQ). One image in five
            stays as it is.
        grayscale: probability that an image loses its colours.
    """
    size, device = len(images), u.device
    amount = strength * (u[:, 0] < JITTERED)
    brightness, contrast, saturation = (1 + amount[:, None] * (2 * u[:, 1:4] - 1)).T
    saturation = saturation * (u[:, 5] >= grayscale)
    angle = 2 * math.pi * HUE * amount * (2 * u[:, 4] - 1)
    to_yiq = torch.tensor(TO_YIQ, device=device)
    turned = torch.zeros(size, 3, 3, device=device)
    turned[:, 0, 0] = 1.0  # the grey value stays
    turned[:, 1, 1] = turned[:, 2, 2] = saturation * angle.cos()
    turned[:, 1, 2] = -saturation * angle.sin()
    turned[:, 2, 1] = saturation * angle.sin()
    matrix = torch.linalg.inv(to_yiq) @ turned @ to_yiq * brightness[:, None, None]
    flat = images.flatten(2).float()
    grey = (to_yiq[0][:, None] * flat).sum(1).mean(1) * brightness  # the mean of the image
    flat = torch.baddbmm(
        ((1 - contrast) * grey)[:, None, None], contrast[:, None, None] * matrix, flat
    )
    return flat.round_().clamp_(0, 255).byte().view_as(images)
