"""What has moved: run folders of earlier versions keep opening."""

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
CLASSIFICATION = {  # what every run of format 2 did
    "_target_": "graft.tasks.classification.Classification",
    "monitor": "val/acc",
    "mode": "max",
    "loss": "cross_entropy",
    "gamma": 2.0,
    "class_weights": None,
    "label_smoothing": 0.0,
    "metrics": {},
}
_OLD = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, MOVED)) + r")(?=\.)")


def current_override(text: str) -> str:
    """An override as it is written today."""
    return re.sub(r"^label_smoothing=", "task.label_smoothing=", current_name(text))


def current_name(text: str) -> str:
    """A dotted name as it is called today."""
    return _OLD.sub(lambda found: MOVED[found[1]], text)


def as_current(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a run as one of today says the same."""
    config = _with_current_names(config)
    if "label_smoothing" in config and "task" not in config:
        smoothing = config.pop("label_smoothing")
        config["task"] = {**CLASSIFICATION, "label_smoothing": smoothing}
    if isinstance(config.get("data"), dict):
        config["data"].setdefault("sampling", "shuffled")
    return config


def _with_current_names(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_current_names(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: current_name(value)
        if key == "_target_" and isinstance(value, str)
        else _with_current_names(value)
        for key, value in node.items()
    }
