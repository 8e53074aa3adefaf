"""The backbone contract: an ordered list of named blocks that turns inputs into features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

RESERVED_NAMES = ("backbone", "head", "task", "all", "norms", "biases")
"""What a block can't be called: `trainable` and the table of groups mean something else by them."""


def pool_nchw(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C); anything already flat passes through."""
    return x.mean((2, 3)) if x.ndim == 4 else x


def pool_nhwc(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C); anything already flat passes through."""
    return x.mean((1, 2)) if x.ndim == 4 else x


def pool_tokens(x: Tensor) -> Tensor:
    """(N, T, C) -> (N, C), over all tokens: a class token says little in the first layers."""
    return x.mean(1) if x.ndim == 3 else x


def blank_image(side: int) -> Tensor:
    return torch.zeros(1, 3, side, side)


class FixedSize(nn.Module):
    """Passes images through, of one size only: position embeddings are made for it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != (self.size, self.size):
            height, width = images.shape[2:]
            raise ValueError(
                f"this backbone takes {self.size} x {self.size} px images, not {height} x {width}: "
                f"set data.image_size={self.size}"
            )
        return images


class Backbone(nn.Module):
    """Blocks in order, input to output; `forward` is their composition.

    Args:
        blocks: name -> module; no name is among `RESERVED_NAMES`. What one returns the next one
            is called with: a tensor, or a tuple of them. The last one ends in pooled features
            (N, F).
        preprocessing: what inputs must look like: a dataclass of plain values with a method
            `with_own`; of images, `Preprocessing`.
        taps: names of blocks whose pooled outputs are concatenated into the features, or "all"
            that hold parameters (a bare pooling would repeat the block before it); None takes the
            last block's output alone. Taps give a linear probe the earlier blocks too, for the
            same forward pass. Blocks above the highest tap are left out: no output needs them.
        pool: turns a block's output into (N, C); differs for token and channels-last families,
            and takes a tuple where a block passes one on.
        channels_last: whether that memory format is the fast one here (convolutions).
        example: an input that measures `num_features`; None: a blank image.
        description: architecture and weights, for the start-up summary.
        weights: where they come from; "" for random ones.
        no_weight_decay: parameters that weight decay spares as it does norms and biases: position
            embeddings, class tokens, ...

    Attributes:
        no_weight_decay: their names within `blocks`.
        taken: what was taken of a weights file, in a line.
        unused: names of the blocks above the highest tap.
        mirror: in eval mode, features are the mean over an image and its mirror image, at twice
            the cost. Set it before anything is computed; off by default.
        blocks: `nn.Sequential`, so `blocks[:k]` is a prefix and `blocks[k:]` a suffix.
        num_features: F, width of the features (summed over taps).
        passes_tuples: whether a block hands more than one tensor to the next.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        preprocessing: Any,
        *,
        taps: Sequence[str] | str | None = None,
        pool: Callable[[Any], Tensor] = pool_nchw,
        channels_last: bool = True,
        example: Any = None,
        description: str = "",
        weights: str = "",
        no_weight_decay: Sequence[nn.Parameter] = (),
    ) -> None:
        super().__init__()
        if taken := [name for name in blocks if name in RESERVED_NAMES]:
            raise ValueError(f"no block can be named {taken[0]}: in a plan that is something else")
        self.blocks = nn.Sequential()
        for name, block in blocks.items():
            self.blocks.add_module(name, block)
        self.preprocessing = preprocessing
        self.pool = pool
        self.channels_last = channels_last
        self.description = description
        self.weights = weights
        self.taken = ""
        self.mirror = False
        self.taps = self._check_taps(taps)
        highest = self.block_names.index(self.taps[-1]) if self.taps else len(self.blocks) - 1
        self.unused = self.block_names[highest + 1 :]
        self.blocks = self.blocks[: highest + 1]
        spared = {id(parameter) for parameter in no_weight_decay}
        named = self.blocks.named_parameters()
        self.no_weight_decay = {name for name, parameter in named if id(parameter) in spared}
        self.num_features = self._measure_features(example)

    @property
    def block_names(self) -> list[str]:
        return [name for name, _ in self.blocks.named_children()]

    @property
    def unused_keys(self) -> tuple[str, ...]:
        """Prefixes of what a state dict may hold of the blocks above the highest tap."""
        return tuple(f"blocks.{name}." for name in self.unused)

    @property
    def learnable_blocks(self) -> list[str]:
        """Names of the blocks that hold parameters."""
        return [
            name
            for name, block in self.blocks.named_children()
            if next(block.parameters(), None) is not None
        ]

    def _check_taps(self, taps: Sequence[str] | str | None) -> list[str] | None:
        if taps is None:
            return None
        if isinstance(taps, str):
            taps = self.learnable_blocks if taps == "all" else [taps]
        unknown = [name for name in taps if name not in self.block_names]
        if unknown or not taps:
            raise ValueError(
                f"backbone.taps: no block named {', '.join(unknown) or '(empty list)'}; "
                f"the blocks are {', '.join(self.block_names)}"
            )
        return [name for name in self.block_names if name in taps]

    @torch.no_grad()
    def _measure_features(self, example: Any) -> int:
        """Width of the features, by one forward of an example: right for any family."""
        training = self.training
        self.eval()
        if example is None:
            example = blank_image(self.preprocessing.crop_size)
        states: list[bool] = []
        hooks = [
            block.register_forward_hook(lambda *call: states.append(isinstance(call[2], tuple)))
            for block in self.blocks
        ]
        width = self(example).shape[1]
        for hook in hooks:
            hook.remove()
        self.passes_tuples = any(states)
        self.train(training)
        return width

    def forward(self, inputs: Any) -> Tensor:
        """Inputs, images (N, 3, H, W) or what else the first block takes -> (N, num_features)."""
        features = self.forward_from(0, inputs)
        if self.mirror and not self.training:
            features = (features + self.forward_from(0, inputs.flip(3))) / 2
        return features

    def maps(self, inputs: Any) -> Tensor:
        """The last output that is not pooled, (N, C, h, w) or (N, tokens, C): for decoders."""
        if self.taps is not None:
            raise ValueError("backbone.taps: features of several blocks have no common map")
        found, x = None, inputs
        for block in self.blocks:
            x = block(x)
            first = x[0] if isinstance(x, tuple) else x
            found = first if first.ndim > 2 else found
        if found is None:
            raise ValueError(f"{self.description or 'this backbone'} has no output before pooling")
        return found

    def forward_from(self, start: int, x: Any) -> Tensor:
        """Features from the input of block `start` (the inputs or activations).

        `start` after the last block returns x itself: x already holds the features.
        """
        if start >= len(self.blocks):
            return x
        if self.taps is None:
            for block in islice(self.blocks, start, None):  # a slice would be a new module
                x = block(x)
            return x
        if start > 0:
            raise ValueError("taps need the earlier blocks too: start at 0 or after the last one")
        pooled = []
        for name, block in self.blocks.named_children():
            x = block(x)
            if name in self.taps:
                pooled.append(self.pool(x))
        return torch.cat(pooled, dim=1)
