"""Predictions for texts, by the model of a run that was trained on texts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from graft.data.sources.texts import MOST_BYTES, decoded, lines_of
from graft.deploy.listing import LIST
from graft.deploy.model import open_run
from graft.deploy.predict import NOT_FINITE, Row
from graft.models.backbone import Backbone
from graft.storage.reading import read_bytes
from graft.tasks.base import OutputKind, Task
from graft.transforms.text import PrepareTokens, TextPreprocessing

BATCH = 64  # texts


@dataclass(frozen=True)
class TextSpec:
    """What a model's outputs are: see `Spec`."""

    classes: list[str]
    output_kind: OutputKind


class TextModel:
    """Tokenizer, encoder, head and the task's last step, in evaluation mode.

    Args:
        run: a run folder. Neither its data nor the encoder's own folder are needed.
        ckpt: "best" or "last" of the last stage, or a file.
        device: "cpu", "cuda", ...; None: a GPU where there is one.

    Raises:
        ValueError: as `model.load`.
    """

    def __init__(self, run: Path, ckpt: str = "best", device: str | None = None) -> None:
        opened = open_run(run, ckpt)
        module, preprocessing = opened.module, opened.module.backbone.preprocessing
        if not isinstance(preprocessing, TextPreprocessing):
            raise ValueError(f"--text is for runs on texts, and {run} was trained on images")
        self.spec = TextSpec(opened.classes, module.task.output_kind)
        self.preprocessing = preprocessing.at(opened.config["data"].get("length"))
        self.prepare = PrepareTokens(preprocessing.pad, preprocessing.sep)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        module.requires_grad_(False).eval().to(self.device)
        self.backbone: Backbone = module.backbone
        self.head: nn.Module = module.head
        self.task: Task = module.task
        self.cut = 0  # texts that were longer than the model takes

    @torch.inference_mode()
    def rows(
        self, texts: Iterable[str], *, embeddings: bool = False, batch_size: int | None = None
    ) -> Iterator[list[Row]]:
        """A row for each text, in their order: outputs, or the features."""
        texts = iter(texts)
        while batch := [*islice(texts, batch_size or BATCH)]:
            encoded = self.preprocessing.encode(batch)
            self.cut += sum(was_cut for _, was_cut in encoded)
            ids = self.preprocessing.rows(
                [ids for ids, _ in encoded], max(len(ids) for ids, _ in encoded)
            )
            features = self.backbone(self.prepare(torch.from_numpy(ids).to(self.device)))
            found = features if embeddings else self.task.predicted(self.head(features))
            yield [
                Row(text, values) if np.isfinite(values).all() else Row(text, None, NOT_FINITE)
                for text, values in zip(batch, found.float().cpu().numpy(), strict=True)
            ]


def read_texts(paths: Sequence[str], texts: Sequence[str]) -> Iterator[str]:
    """The texts, then those of files, one a line; of `-`, of standard input. Empty lines are none.

    Raises:
        ValueError: a file that is not UTF-8.
        OSError: one that cannot be read.
    """
    yield from texts
    for path in paths:
        content = sys.stdin.buffer.read() if path == LIST else read_bytes(Path(path), MOST_BYTES)
        for line in lines_of(decoded(Path(path), content)):
            if line.strip():
                yield line.strip()
