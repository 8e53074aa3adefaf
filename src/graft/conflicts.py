"""Values of a config that are fine alone and not together; found before torch is imported."""

from __future__ import annotations

from typing import Any


def conflict(plain: dict[str, Any]) -> str | None:
    """The first conflict in a resolved config, in one line."""
    return _grid_problem(plain) or _solver_problem(plain)


def _grid_problem(plain: dict[str, Any]) -> str | None:
    """What keeps a grid of heads from being the same heads, each trained alone."""
    head = plain["head"]
    grid = head.get("grid")
    if grid is None:
        return None
    known = ["lr", "weight_decay", "seed"]
    for key, values in grid.items():
        if key not in known:
            return f"no config key head.grid.{key}: it has {', '.join(known)}"
        if values and len(set(values)) < len(values):
            return f"head.grid.{key}={values}: a value is there twice"
    name, stage = next(iter(plain["transfer"]["stages"].items()))
    if stage.get("trainable", "all") != "head":
        return (
            f"head.grid: the first stage, {name}, trains more than the head, and heads can't share "
            "that: use transfer=linear_probe, or a plan that starts with trainable: head"
        )
    if stage.get("solver", "sgd") != "sgd":
        return f"head.grid: transfer.stages.{name}.solver={stage['solver']} solves for one head"
    if plain["trainer"].get("gradient_clip_val") is not None:
        return "head.grid: trainer.gradient_clip_val takes a norm over all heads: set it to null"
    if str(plain["trainer"].get("precision")).startswith("16"):
        return (
            "head.grid: in trainer.precision=16-mixed one diverging head rescales the loss of all: "
            "use trainer.precision=auto"
        )
    if head.get("dropout"):
        return (
            f"head.dropout={head['dropout']}: heads of a grid would draw other masks than alone: "
            "set it to 0, or head.grid=null"
        )
    return None


def _solver_problem(plain: dict[str, Any]) -> str | None:
    head = plain["head"]
    for name, stage in plain["transfer"]["stages"].items():
        if (solver := stage.get("solver", "sgd")) == "sgd":
            continue
        key = f"transfer.stages.{name}.solver={solver}"
        if stage.get("trainable", "all") != "head":
            return f"{key}: solves for a head alone: set transfer.stages.{name}.trainable=head"
        if head["_target_"] != "graft.heads.LinearHead":
            return f"{key}: solves for a linear head: use head=linear, or solver=sgd"
        if stage.get("cache", "auto") == "off":
            return f"{key}: needs stored features: set transfer.stages.{name}.cache=on"
        if head.get("dropout"):
            return f"{key}: knows no dropout: set head.dropout=0"
        if head.get("norm") == "batchnorm":
            return f"{key}: knows no batches: set head.norm=standardize or none"
    return None
