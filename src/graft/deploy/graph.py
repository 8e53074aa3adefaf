"""A trained model as one graph without branches, for images of any number and size.

`Prepare` chooses among several ways to compute the same resize, by the shape of a batch. Here the
geometry is written once, in operations on tensors that hold the shape.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from graft.deploy.model import Deployed
from graft.transforms.boxes import kernel
from graft.transforms.prepare import SMALL
from graft.transforms.preprocessing import Interpolation, Preprocessing


class Geometry(nn.Module):
    """`Prepare` on a CPU: resize, central crop, normalisation, as two products with matrices.

    Where `Prepare` resizes bytes (images of more than SMALL px, and bicubic), torch multiplies them
    by weights of 16 bits and rounds after each axis. The same is done here, so that a model gives
    what it gave in the run.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        mean, std = (
            torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std)
        )
        self.register_buffer("offset", 255 * mean)
        self.register_buffer("scale", 1 / (255 * std))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, 3, crop_size, crop_size) float32."""
        p = self.preprocessing
        height, width = (torch.arange(n, device=images.device).double() for n in images.shape[2:])
        sides = height.max() + 1, width.max() + 1
        if p.crop_mode == "squash":
            resized = [torch.full_like(side, p.resize_size) for side in sides]
        else:
            resized = [(p.resize_size * side / torch.minimum(*sides)).floor() for side in sides]
        as_bytes = torch.maximum(*sides) > (0 if p.interpolation == "bicubic" else SMALL)
        rows, columns = (
            axis_matrix(pixels, side, p.crop_size, p.interpolation, as_bytes)
            for pixels, side in zip((height, width), resized, strict=True)
        )
        x = _rounded(images.float() @ columns.mT, as_bytes)
        x = _rounded(rows @ x, as_bytes)
        return (x - self.offset) * self.scale


def _rounded(x: Tensor, as_bytes: Tensor) -> Tensor:
    return torch.where(as_bytes, (x + 0.5).floor().clamp(0, 255), x)


def axis_matrix(
    pixels: Tensor, resized: Tensor, crop: int, mode: Interpolation, as_bytes: Tensor
) -> Tensor:
    """(crop, size) float32: resizes an axis and keeps its centre.

    Args:
        pixels: 0, 1, ... size - 1, float64.
        resized: () what the whole axis is resized to, float64.
        as_bytes: () whether weights are rounded to 16 bits.
    """
    start = ((resized - crop) / 2).round()  # to even, as Python does
    # The first of all rows has the largest weight, which the precision depends on.
    row = torch.arange(-1, crop, device=pixels.device).double()
    row = torch.where(row < 0, 0, row + start)
    scale = (pixels.max() + 1) / resized
    centre = scale * (row + 0.5)
    x = ((pixels + 0.5)[None] - centre[:, None]) / scale.clamp(min=1)
    weights = kernel(x.abs(), mode)
    weights = weights / weights.sum(1, keepdim=True)
    # Torch takes the most bits with which the largest weight is below 2 ** 15, and at most 22.
    bits = torch.floor(torch.log2((2**15 - 0.5) / weights.max())).clamp(max=22)
    one = torch.exp2(bits)
    whole = torch.where(weights < 0, -1, 1) * torch.floor(weights.abs() * one + 0.5) / one
    return torch.where(as_bytes, whole, weights)[1:].float()


class Graph(nn.Module):
    """What is exported: (N, 3, H, W) uint8 -> predictions (N, outputs), features (N, F), float32.

    Args:
        dtype: of backbone and head; resize, normalisation and the task's last step are float32.
        channels_last: whether the backbone computes in that layout, where it is the fast one.
            ONNX has none, and would rearrange what lies in memory by operations of its own.
    """

    def __init__(
        self, model: Deployed, dtype: torch.dtype = torch.float32, *, channels_last: bool = False
    ) -> None:
        super().__init__()
        self.geometry = Geometry(model.spec.preprocessing)
        last = channels_last and model.backbone.channels_last
        self.layout = torch.channels_last if last else torch.contiguous_format
        backbone, head = (copy.deepcopy(m).to(dtype) for m in (model.backbone, model.head))
        self.backbone, self.head, self.task = (
            backbone.to(memory_format=self.layout),
            head,
            model.task,
        )
        self.dtype = dtype
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.geometry(images).to(self.dtype).contiguous(memory_format=self.layout)
        features = self.backbone(x)
        return self.task.predicted(self.head(features).float()), features.float()
