"""A table with the same rows for a terminal, for Markdown and, in plain numbers, for CSV."""

from __future__ import annotations

import csv
import io
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len, chop_cells

from graft.compare.groups import settings
from graft.config.names import visible

GAP = "  "
NARROWEST, EASY = 24, 40  # columns of a terminal that texts are left with, and had better have


def terminal_width() -> int:
    """0 where the output is no terminal and COLUMNS is not set: nothing is fitted to a file."""
    return shutil.get_terminal_size((0, 0)).columns


@dataclass
class Column:
    """`texts` for people; for CSV, plain numbers under each of `names`.

    Attributes:
        is_key: what tells rows apart; such columns become one where there is no room for each.
        is_spare: left out where there is no room for it.
    """

    heading: str
    names: Sequence[str] = ()
    texts: list[str] = field(default_factory=list)
    numbers: list[Sequence[Any]] = field(default_factory=list)
    is_key: bool = False
    is_spare: bool = False

    def add(self, text: str, *numbers: Any) -> None:
        self.texts.append(text)
        self.numbers.append(numbers or [""] * len(self.names))

    @property
    def numeric(self) -> bool:
        return all(text[:1].isdigit() or text[:1] in "[+-<" for text in self.texts)

    @property
    def width(self) -> int:
        return max(cell_len(visible(text)) for text in (self.heading, *self.texts))


@dataclass
class Table:
    columns: Sequence[Column]
    title: str = ""
    notes: Sequence[str] = ()

    def _rows(self) -> list[tuple[str, ...]]:
        columns = ([visible(text) for text in (c.heading, *c.texts)] for c in self.columns)
        return [*zip(*columns, strict=True)]

    def plain(self, width: int = 0) -> str:
        """For a terminal with so many columns, or as wide as it comes."""
        table = self._fitted(width) if width else self
        widths = _cut(table.columns, width) if width else [c.width for c in table.columns]
        lines = []
        for row in table._rows():
            cells = [_wrapped(cell, wide) for cell, wide in zip(row, widths, strict=True)]
            for parts in zip_longest(*cells, fillvalue=""):
                aligned = []
                for part, wide, column in zip(parts, widths, table.columns, strict=True):
                    space = " " * (wide - cell_len(part))
                    aligned.append(space + part if column.numeric else part + space)
                lines.append(GAP.join(aligned).rstrip())
        notes = [folded(visible(note), width) for note in table.notes]
        return "\n".join([*([visible(table.title)] if table.title else []), *lines, *notes]) + "\n"

    def _fitted(self, width: int) -> Table:
        """Keys in one column and without the last of the spare ones, as far as need be."""
        columns, notes = [*self.columns], [*self.notes]

        def too_wide(narrowest: int = 10_000) -> bool:
            wide = [c.width if c.numeric else min(c.width, narrowest) for c in columns]
            return sum(wide) + len(GAP) * (len(wide) - 1) > width

        keys = [column for column in columns if column.is_key]
        if too_wide() and len(keys) > 1:
            names = [column.heading for column in keys]
            rows = [
                dict(zip(names, values, strict=True))
                for values in zip(*(column.texts for column in keys), strict=True)
            ]
            texts, usual = settings(names, rows)
            at = columns.index(keys[0])
            columns = [column for column in columns if not column.is_key]
            columns.insert(at, Column("settings", texts=texts))
            if usual:
                notes.insert(0, f"settings of most rows: {usual}")
        left_out: list[str] = []
        while too_wide(EASY) and any(column.is_spare for column in columns):
            last = max(i for i, column in enumerate(columns) if column.is_spare)
            left_out.insert(0, columns.pop(last).heading)
        if left_out:
            notes.insert(0, f"left out to fit {width} columns: {', '.join(left_out)} (see --csv)")
        return replace(self, columns=columns, notes=notes)

    def markdown(self) -> str:
        rows = [[_literal(cell) for cell in row] for row in self._rows()]
        if rows:
            rows.insert(1, ["---:" if column.numeric else "---" for column in self.columns])
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        title, *notes = (visible(text) for text in (self.title, *self.notes))
        return "\n\n".join(p for p in (title, lines, "\n".join(notes)) if p) + "\n"

    def csv(self) -> str:
        columns = [c for c in self.columns if c.names]
        out = io.StringIO()
        write = csv.writer(out, lineterminator="\n").writerow
        write([name for column in columns for name in column.names])
        for row in zip(*(column.numbers for column in columns), strict=True):
            numbers = [number for cell in row for number in cell]
            write([_plain_number(v) for v in numbers])
        return out.getvalue()


def _plain_number(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value


def _literal(cell: str) -> str:
    """As Markdown shows it, with what it would obey escaped."""
    return re.sub(r"[|<*`]|\\(?=[|<*`])", r"\\\g<0>", cell)


def _cut(columns: Sequence[Column], width: int) -> list[int]:
    """Widths of the columns, the widest texts cut so that all fit, as far as texts can be cut."""
    widths = [column.width for column in columns]
    room = width - len(GAP) * (len(columns) - 1)
    texts = [w for w, column in zip(widths, columns, strict=True) if not column.numeric]
    most = max(texts, default=0)
    while most > NARROWEST and sum(widths) - sum(texts) + sum(min(w, most) for w in texts) > room:
        most -= 1
    return [w if c.numeric else min(w, most) for w, c in zip(widths, columns, strict=True)]


def folded(note: str, width: int) -> str:
    """A note for a terminal with so many columns (0: as wide as it comes), further lines indented
    as its first. Words stay whole: a path is there to be copied.
    """
    if not width:
        return note
    indent = " " * (len(note) - len(note.lstrip(" -")))
    return textwrap.fill(
        note, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken between words where that is possible."""
    if cell_len(text) <= width:
        return [text]
    lines = [""]
    for word in text.split(" "):
        for part in chop_cells(word, width):
            gap = " " if lines[-1] else ""
            if cell_len(lines[-1]) + len(gap) + cell_len(part) <= width:
                lines[-1] += gap + part
            else:
                lines.append(part)
    return lines
