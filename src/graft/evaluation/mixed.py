"""Several sets of images as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graft.data.datasets import Batch, ImageDataset
from graft.data.order import Positions


class MixedImages(ImageDataset):
    """Sets of equally many images, one after the other; whoever reads them shuffles."""

    def __init__(self, parts: Sequence[ImageDataset]) -> None:
        self.parts, self.split, self.images = parts, parts[0].split, parts[0].images
        self.labels = np.concatenate([part.labels for part in parts])
        self.rows = np.arange(len(self.labels))

    def __getitem__(self, positions: Positions) -> Batch:
        index = torch.as_tensor(positions)
        which, where = np.divmod(np.asarray(positions) % len(self), len(self.parts[0]))
        rows = torch.stack(
            [self.parts[i][[at]]["input"][0] for i, at in zip(which, where, strict=True)]
        )
        labels = torch.from_numpy(self.labels[np.asarray(positions) % len(self)])
        return {"input": rows, "label": labels, "index": index}
