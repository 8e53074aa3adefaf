"""Markdown of texts that somebody else wrote: they are shown, never obeyed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from graft.config.names import visible

MARKS = re.compile(
    r"([\\`*\[\]<>|~$&]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # within a word it is a letter
    r"|:(?=//)|(?<=www)\."  # what GitHub makes links of
    r"|^[-+=#]|(?<=^\d)[.)])",  # a list, a heading, a rule
    re.IGNORECASE,
)


def escaped(text: str) -> str:
    """`text` within a line or a cell: no markup, link, picture, HTML or line break comes of it."""
    return MARKS.sub(r"\\\1", visible(text).strip())


def code(text: str) -> str:
    """`text` as inline code."""
    text = visible(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def block(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def literal(text: str) -> str:
    """`text` as Python spells it, whatever is in it."""
    return json.dumps(text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Cells are Markdown already; the first `left` columns are aligned to the left."""
    ruler = [":--" if i < left else "--:" for i in range(len(header))]
    # A bar ends a cell, within code too.
    lines = ([re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in cells] for cells in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *lines))
