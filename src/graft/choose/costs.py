"""What each candidate costs, measured on a few images before anything is trained."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from graft.choose.halving import Cost
from graft.features.prefix import Extractor, FrozenPrefix
from graft.training.build import build, build_backbone
from graft.training.trainer import trainer_options


class NotAtHand(OSError):
    """Weights that would have to be downloaded, or cannot be."""


def measure(config: dict[str, Any], *, download: bool = False) -> Cost:
    """Build a candidate's model and data, and time the model on a few images.

    Raises:
        NotAtHand: its weights.
        ValueError: the data has no images to validate on, or the config cannot be built.
    """
    options = trainer_options(config["trainer"])
    device = torch.device("cuda" if options["accelerator"] == "gpu" else options["accelerator"])
    with _downloads(allowed=download):
        try:
            build_backbone(config["backbone"])
        except OSError as error:
            raise NotAtHand(str(error)) from error
        module, data = build(config)
    backbone = module.backbone.to(device).eval()
    short = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(options["precision"])
    prefix = FrozenPrefix(
        backbone,
        len(backbone.blocks),
        lambda: torch.autocast(device.type, dtype=short, enabled=short is not None),
    )
    extractor = Extractor(prefix, lambda rows: data.prepared("train", rows, device))
    count = len(data.splits["train"])
    rows = np.arange(2 * extractor.batch * extractor.threads) % count
    extractor.workers = extractor.choose(rows)
    extractor.rows(rows[: extractor.batch])  # kernels are chosen, memory is there
    started = time.perf_counter()
    extractor.rows(rows)
    seconds = (time.perf_counter() - started) / len(rows)
    image = data.prepared("train", [0], device)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        backbone(image)
    return Cost(
        seconds,
        flops.get_total_flops() // 2,
        sum(p.numel() for p in backbone.parameters()),
        backbone.num_features,
        count,
        len(data.splits["val"]),
        len(data.splits["test"]),
        data.epoch_images or count,
        data.batch_size,
    )


@contextmanager
def _downloads(*, allowed: bool) -> Iterator[None]:
    """Weights that are not at hand are an error, where their libraries would fetch them."""
    if allowed:
        yield
        return

    def refuse(url: str, *_: Any, **__: Any) -> None:
        raise OSError("not at hand, and --download is not set")

    hub: Any = torch.hub
    try:
        from huggingface_hub import constants
    except ImportError:  # of timm alone
        face: Any = None
    else:
        face = constants
    fetch, offline = hub.download_url_to_file, getattr(face, "HF_HUB_OFFLINE", True)
    hub.download_url_to_file = refuse
    if face is not None:
        face.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.download_url_to_file = fetch
        if face is not None:
            face.HF_HUB_OFFLINE = offline
