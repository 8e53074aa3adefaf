"""ResNet for 32x32 images (He et al. 2016, section 4.2): the embedded default, 0.27 M weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from graft.config.overrides import is_weights_path
from graft.models.backbone import Backbone
from graft.models.weights import WeightsFile, load_file_into, unknown_weights
from graft.transforms.preprocessing import Preprocessing

# Mean and standard deviation of the CIFAR-10 training images.
CIFAR10_PREPROCESSING = Preprocessing(
    resize_size=32,
    crop_size=32,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    origin="with mean and deviation of CIFAR-10",
)
EMBEDDED = Path(__file__).parent / "pretrained" / "resnet20_cifar10.safetensors"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        # Sliced instead of a strided 1x1 convolution, which is the same function: with fewer
        # channels than a vector register holds, oneDNN's backward of that one writes past its
        # memory (oneDNN issue 6035, seen with torch 2.15 on AVX-512).
        skipped = x[:, :, :: self.stride, :: self.stride]
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(skipped), inplace=True)


def resnet_cifar(
    *,
    depth: int = 20,
    width: int = 16,
    weights: str | None = "CIFAR10",
    pretrained: bool = True,
    taps: Sequence[str] | str | None = None,
) -> Backbone:
    """ResNet of `depth` = 6n + 2 layers with `width`, 2 `width`, 4 `width` channels.

    Args:
        weights: "CIFAR10" for the weights in this package (ResNet-20 only), a file, a run folder
            of ours, or None.
        pretrained: False doesn't read them: for a checkpoint that is loaded next.

    Raises:
        ValueError: impossible depth, or weights of another architecture.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"backbone.depth={depth}: must be 6n + 2 (8, 14, 20, 32, 44, 56, 110)")
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    blocks["stem"] = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, width, 3, padding=1, bias=False),
            bn=nn.BatchNorm2d(width),
            relu=nn.ReLU(inplace=True),
        )
    )
    channels_in = width
    for stage in range(3):
        channels = width * 2**stage
        for i in range((depth - 2) // 6):
            stride = 2 if stage > 0 and i == 0 else 1
            blocks[f"stage{stage + 1}_{i + 1}"] = BasicBlock(channels_in, channels, stride)
            channels_in = channels
    blocks["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in nn.ModuleList(blocks.values()).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    made_of = f"weights {weights}" if weights is not None else "random weights"
    file = None
    if weights is not None and pretrained:
        if weights != "CIFAR10" and not is_weights_path(weights) and not Path(weights).exists():
            names = ["CIFAR10"] if depth == 20 else []
            raise unknown_weights(weights, f"ResNet-{depth}", names)
        file = WeightsFile.read(EMBEDDED if weights == "CIFAR10" else weights)
    backbone = Backbone(
        blocks,
        (file.preprocessing if file else None) or CIFAR10_PREPROCESSING,
        taps=taps,
        description=f"ResNet-{depth} for 32 px, {made_of}",
        weights=weights or "",
    )
    if file is not None:
        label = f"ResNet-{depth}"
        taken = load_file_into(file, [(backbone, backbone.unused_keys)], label=label)
        backbone.taken = taken if weights != "CIFAR10" else ""
    return backbone
