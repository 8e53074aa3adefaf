"""The fifteen corruptions of CIFAR-10-C, with its parameters: images away from home.

After Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", whose CIFAR variant this follows step by step, for batches of tensors of any size.
What they drew at random is drawn from an image's number alone. One corruption is not theirs: their
frost is made of photographs, ours of generated ice.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from graft.transforms import distortions

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images: Tensor, index: Tensor, name: str, severity: int) -> Tensor:
    """(N, 3, H, W) uint8 images on the CPU -> the same shape and type.

    Args:
        index: (N,) number of each image, on which what is random in it depends, and on nothing
            else: it is drawn alike at all severities.
        severity: 1 to 5.
    """
    how, parameters = CORRUPTIONS[name]
    values = parameters[severity - 1]
    values = values if isinstance(values, tuple) else (values,)
    return distortions.as_bytes(how(images.float() / 255, index, *values))


Parameters = float | tuple[float, ...]
CORRUPTIONS: dict[str, tuple[Callable[..., Tensor], tuple[Parameters, ...]]] = {
    "gaussian_noise": (distortions.gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (distortions.shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (distortions.impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (
        distortions.defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": (
        distortions.glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": (distortions.motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (distortions.zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        distortions.snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (distortions.frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (distortions.fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (distortions.brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (distortions.contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        distortions.elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (distortions.pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (distortions.jpeg_compression, (80, 65, 58, 50, 40)),
}
"""Name, as the files of CIFAR-10-C are called -> how, and its parameters at severities 1 to 5."""
