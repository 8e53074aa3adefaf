"""The block of metadata at the start of a model card, which model hubs read."""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]

from graft.config.names import visible
from graft.deploy.card_facts import HUB_DATASETS, Facts

TASKS = {  # of an output kind: type and name in the metadata, the task of a hub's widget
    "classes": ("image-classification", "Image classification", "image-classification"),
    "labels": ("image-classification", "Multi-label image classification", "image-classification"),
    "numbers": ("image-regression", "Image regression", None),
}
# Name in an evaluation -> (metric of a hub, name). Not the loss, which no hub compares.
METRICS = {
    "acc": ("accuracy", "Accuracy"),
    "macro_f1": ("f1", "Macro F1"),
    "f1": ("f1", "Macro F1"),
    "exact": ("exact_match", "Exact match"),
    "mae": ("mae", "Mean absolute error"),
    "rmse": ("rmse", "Root mean squared error"),
    "r2": ("r_squared", "R squared"),
}


def front_matter(facts: Facts, title: str, license: str | None) -> str:
    """With its fences. A hub marks results as verified itself, so nothing here says so."""
    kind, task, widget = TASKS[facts.kind]
    found = facts.result["metrics"]
    metrics = [
        {"type": METRICS[name][0], "value": float(value), "name": f"{METRICS[name][1]} (test)"}
        for name, value in found.items()
        if name in METRICS and float(value) == float(value)
    ]
    choice = facts.choice("data")
    known = HUB_DATASETS.get(str(choice))
    dataset = {"name": visible(facts.dataset), "type": known or visible(facts.dataset)}
    tags = [kind, "transfer-learning", "pytorch", visible(facts.backbone)]
    tags += ["multi-label"] if facts.kind == "labels" else []
    tags += [visible(str(tag)) for tag in facts.config.get("tags") or []]
    data: dict[str, Any] = {
        "library_name": "graft",
        "license": license,
        "pipeline_tag": widget,
        "tags": [*dict.fromkeys(tags)],
        "base_model": facts.base_model,
        "datasets": [known] if known else None,
        "metrics": [*dict.fromkeys(str(metric["type"]) for metric in metrics)] or None,
        "model-index": [
            {
                "name": title,
                "results": [
                    {
                        "task": {"type": kind, "name": task},
                        "dataset": {**dataset, "split": "test"},
                        "metrics": metrics,
                    }
                ],
            }
        ]
        if metrics
        else None,
    }
    present = {key: value for key, value in data.items() if value is not None}
    return f"---\n{yaml.safe_dump(present, sort_keys=False, allow_unicode=True)}---\n"
