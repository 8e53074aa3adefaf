"""What is frozen is computed once: outputs of a frozen prefix, stored for a stage to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from graft.data.datamodule import Batch


@torch.inference_mode()
def extract(apply: Callable[[Tensor], Tensor], batches: Iterable[Batch], size: int) -> Tensor:
    """`apply` over all images, in the order of their index; float32 on the CPU.

    Args:
        apply: prepared images (N, 3, H, W) -> (N, ...).
        batches: dicts with prepared "image" and "index", each example exactly once.
        size: number of examples.
    """
    stored: Tensor | None = None
    seen = 0
    for batch in batches:
        outputs = apply(batch["image"]).float().cpu()
        if stored is None:
            stored = torch.empty((size, *outputs.shape[1:]))
        stored[batch["index"].cpu()] = outputs
        seen += len(outputs)
    if stored is None or seen != size:
        raise RuntimeError(f"extracted the features of {seen} of {size} images")
    # A copy outside inference mode: autograd refuses to save inference tensors for backward.
    return stored.clone()
