"""`run.json` as it is read back, whoever wrote it: fields of the types that ours have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from graft.storage.reading import read_json


def _is_number(value: Any) -> bool:
    """Not an integer of thousands of digits either, which no float can hold."""
    return isinstance(value, float) or (_is_whole(value) and abs(value) < 2**63)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


# Each field may be absent, or null: older versions wrote fewer.
SHAPES: dict[str, Callable[[Any], bool]] = {
    "format": _is_whole,
    "status": _is_text,
    "error": _is_text,
    "started": _is_text,
    "job": _is_whole,
    "seed": _is_whole,
    "metrics": _mapping(_is_number),
    "choices": _mapping(lambda option: option is None or _is_text(option)),
    "overrides": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "stages": lambda value: (
        isinstance(value, list)
        and all(isinstance(s, dict) and _is_number(s.get("seconds")) for s in value)
    ),
    "config": lambda value: (
        isinstance(value, dict)
        and all(isinstance(value.get(key, {}), dict) for key in ("paths", "data", "backbone"))
    ),
    "data": _mapping(lambda split: isinstance(split, dict)),
    "weights": lambda value: isinstance(value, dict),
    **dict.fromkeys(("seconds", "memory_mb", "gpu_memory_mb", "train_images"), _is_number),
}


def read_record(run: Path) -> dict[str, Any]:
    """The record of a run folder.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, or that of something else.
    """
    path = run / "run.json"
    record = read_json(path)
    if record.get("format") is None:
        raise ValueError(f"{path} is not that of a run")
    for field, fits in SHAPES.items():
        if record.get(field) is not None and not fits(record[field]):
            raise ValueError(f"{path} is damaged: {field} has the wrong type")
    return record
