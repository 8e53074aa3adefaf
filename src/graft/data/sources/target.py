"""A second domain beside a source's own images: its labels are not read in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from graft.config.objects import make
from graft.data.datasets import ImageDataset
from graft.data.sources.base import Source, Splits
from graft.data.sources.shifted import Shifted
from graft.data.splits import renumbered


class WithTarget(Source):
    """The splits of one source, and of another one two more: "target", its training split with
    every label hidden, and "test_target", its test split, labels and all, which only tests read.
    """

    def __init__(self, source: Source, target: Source, target_name: str) -> None:
        self.source, self.target, self.target_name = source, target, target_name
        self.inputs = source.inputs  # type: ignore[misc]

    def prepare(self, preprocessing: Any) -> None:
        self.source.prepare(preprocessing)
        self.target.prepare(preprocessing)

    def load(self, preprocessing: Any) -> Splits:
        own, other = self.source.load(preprocessing), self.target.load(preprocessing)
        if problem := _problem(own, other):
            raise ValueError(f"{self.target_name}: {problem}")
        try:
            test = renumbered(ImageDataset(other.test), other.classes, own.classes)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{self.target_name}: {error}") from None
        more = {
            "target": replace(other.train, labels=np.full(len(other.train.labels), -1)),
            "test_target": replace(test.split, labels=test.labels),
        }
        return replace(own, more={**own.more, **more})


def _problem(own: Splits, other: Splits) -> str | None:
    """Why a domain can't be the target of another one."""
    if own.train.targets is not None or other.train.targets is not None:
        return "a target needs classes, and this data has none"
    if other.test is None or not len(other.test.labels):
        return (
            "it has no test split, and what adaptation gains could not be measured: put labelled "
            "images into a folder test beside train"
        )
    if not ((other.test.labels >= 0) & (other.test.labels < len(other.classes))).all():
        return "images of its test split have no label"
    return None


def build_source(data: Mapping[str, Any], cache: str) -> Source:
    """The source of a config's data: shifted, and with a target, where it says so.

    Args:
        data: `source`, and perhaps `shift`, `severity` and `target`.
        cache: where images go that are made of others.

    Raises:
        ValueError: the target is none of the kinds there are.
    """
    source = _shifted(make(data["source"]), data, cache)
    target = data.get("target")
    if target is None:
        return source
    if isinstance(target, str):
        folder = {"_target_": "graft.data.sources.folder.ImageFolder", "cache": cache}
        own = data["source"] if data["source"]["_target_"] == folder["_target_"] else folder
        other = make({**own, "root": target})
        name = f"data.target={target}"
    else:
        other = _shifted(make(target.get("source") or data["source"]), target, cache)
        name = "data.target"
    if other.inputs is not source.inputs:
        raise ValueError(f"{name}: it has rows for {other.inputs.__name__}, unlike data.source")
    return WithTarget(source, other, name)


def _shifted(source: Source, options: Mapping[str, Any], cache: str) -> Source:
    if options.get("shift") is None:
        return source
    return Shifted(source, options["shift"], options.get("severity", 5), cache)
