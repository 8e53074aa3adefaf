"""Names that have moved: run folders of earlier versions keep opening."""

from __future__ import annotations

import re
from typing import Any

# What a config can name, as it was called in run folders of format 2.
MOVED = {
    "graft.backbones": "graft.models",
    "graft.data.batch_transforms": "graft.transforms.images",
    "graft.data.cifar": "graft.data.sources.cifar",
    "graft.data.digits": "graft.data.sources.digits",
    "graft.data.folder": "graft.data.sources.folder",
    "graft.data.synthetic": "graft.data.sources.synthetic",
    "graft.heads": "graft.models.heads",
    "graft.loggers": "graft.reporting.loggers",
    "graft.runs.study": "graft.sweeps.study",
    "graft.trackers": "graft.reporting.trackers",
    "graft.transfer.ema": "graft.training.ema",
    "graft.transfer.schedules": "graft.plan.schedules",
}
_OLD = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, MOVED)) + r")(?=\.)")


def current_name(text: str) -> str:
    """A dotted name, or an override with one, as it is called today."""
    return _OLD.sub(lambda found: MOVED[found[1]], text)


def with_current_names(node: Any) -> Any:
    """A config with each `_target_` as it is called today."""
    if isinstance(node, list):
        return [with_current_names(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: current_name(value)
        if key == "_target_" and isinstance(value, str)
        else with_current_names(value)
        for key, value in node.items()
    }
