"""Words of messages: a count with its noun, and a hint for a mistyped name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def plural(count: int, one: str, many: str = "") -> str:
    """`1 image`, `2,000 images`; `many` is the plural of a noun that takes more than an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`: did you mean A or B?` of the `names` that are close, whatever their case; or nothing."""
    by_lower = {one.lower(): one for one in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3)
    close = [name.lower()] if name.lower() in by_lower else close
    return f": did you mean {' or '.join(by_lower[one] for one in close)}?" if close else ""
