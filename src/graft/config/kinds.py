"""Kinds of values that config keys take: each says in words what it accepts, and accepts it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

Check = tuple[str, Callable[[Any], bool]]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


POSITIVE_INT: Check = ("a whole number above 0", lambda v: is_integer(v) and v > 0)
NATURAL: Check = ("a whole number, 0 or more", lambda v: is_integer(v) and v >= 0)
NUMBER: Check = ("a number", is_number)
POSITIVE: Check = ("a number above 0", lambda v: is_number(v) and v > 0)
NOT_NEGATIVE: Check = ("a number, 0 or more", lambda v: is_number(v) and v >= 0)
FRACTION: Check = ("a number above 0 and below 1", lambda v: is_number(v) and 0 < v < 1)
PART: Check = ("a number above 0 and at most 1", lambda v: is_number(v) and 0 < v <= 1)
BELOW_ONE: Check = ("a number of at least 0 and below 1", lambda v: is_number(v) and 0 <= v < 1)
PROBABILITY: Check = ("a probability from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1)
TEXT: Check = ("a name in letters", lambda v: isinstance(v, str) and bool(v.strip()))
FOLDER: Check = ("the name of a folder", TEXT[1])
TAGS: Check = (
    "a list of words, like [baseline,cats]",
    lambda v: isinstance(v, list) and all(isinstance(word, str | int) for word in v),
)
BOOL: Check = ("true or false", lambda v: isinstance(v, bool))
MAPPING: Check = ("a group of keys", lambda v: isinstance(v, dict))
CLASS: Check = ("the name of a class, like package.module.Class", lambda v: _is_dotted(v))
OBJECT: Check = (
    "a group of keys with a _target_",
    lambda v: isinstance(v, dict) and v.get("_target_") is not None,
)


def _is_dotted(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", value) is not None


def or_null(check: Check) -> Check:
    return f"{check[0]}, or null", lambda v: v is None or check[1](v)


def up_to(low: int, high: int) -> Check:
    return f"a whole number from {low} to {high}", lambda v: is_integer(v) and low <= v <= high


def one_of(*options: str) -> Check:
    return f"one of {', '.join(options)}", lambda v: isinstance(v, str) and v in options


def pair_of(wanted: str, check: Check) -> Check:
    return wanted, lambda v: isinstance(v, list) and len(v) == 2 and all(map(check[1], v))


def three_of(wanted: str, check: Check) -> Check:
    return wanted, lambda v: isinstance(v, list) and len(v) == 3 and all(map(check[1], v))


def range_of(wanted: str, largest: float) -> Check:
    pair = pair_of(wanted, POSITIVE)
    return wanted, lambda v: pair[1](v) and v[0] <= v[1] <= largest


def list_of(check: Check) -> Check:
    def accepts(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(check[1](v) for v in value)

    return f"a list of values, each {check[0]}", accepts


def either(wanted: str, *checks: Check) -> Check:
    return wanted, lambda v: any(accepts(v) for _, accepts in checks)


SEED = up_to(0, 2**32 - 1)
SIDE = up_to(1, 10_000)  # px
BATCHES = either("a number of batches, or a part of them above 0 and up to 1", POSITIVE_INT, PART)
WARMUP: Check = (
    "a part of the stage below 1, or a whole number of steps",
    lambda v: is_number(v) and (0 <= v < 1 or (v >= 1 and v == int(v) and v < 1e9)),
)
# The corruptions of CIFAR-10-C; what they do is in `transforms.corruptions`, which imports torch.
SHIFTS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)  # fmt: skip
SEVERITY = up_to(1, 5)
