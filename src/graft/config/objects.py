"""From a config to objects: what its `_target_` names, called with what stands beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

KEYS = ("_target_", "_args_", "_partial_", "_convert_")  # Hydra's; lists and dicts are always plain


def bind(config: dict[str, Any], **keywords: Any) -> Callable[..., Any]:
    """The `_target_` of a config with its arguments, to be called.

    Not Hydra's `instantiate`: each call of its partial costs a millisecond of checks, a schedule is
    called in every step, and it would resolve interpolations once more.
    """
    if unknown := [key for key in config if re.fullmatch("_.*_", key) and key not in KEYS]:
        raise ValueError(f"{config['_target_']}: {unknown[0]} is not supported")
    arguments = {key: built(value) for key, value in config.items() if key not in KEYS}
    positional = built(config.get("_args_", []))
    return partial(find(config["_target_"]), *positional, **arguments, **keywords)


def find(name: str) -> Any:
    """What a dotted name leads to: modules, then attributes.

    Raises:
        ValueError: nothing.
    """
    first, *others = name.split(".")
    try:
        found: Any = import_module(first)
        for i, part in enumerate(others):
            if not hasattr(found, part):
                import_module(".".join([first, *others[: i + 1]]))
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_={name}: {error}") from error
    return found


def make(config: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
    """The object a config describes. `keywords` are passed as they are."""
    return bind(config, **keywords)(*arguments)


def built(value: Any) -> Any:
    if isinstance(value, list):
        return [built(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "_target_" not in value:
        return {key: built(item) for key, item in value.items()}
    return bind(value) if value.get("_partial_") else make(value)
