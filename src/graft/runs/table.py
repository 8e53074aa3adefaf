"""A table with the same rows for a terminal, for Markdown and, in plain numbers, for CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Column:
    """`texts` for people; for CSV, plain numbers under each of `names`."""

    heading: str
    names: Sequence[str] = ()
    texts: list[str] = field(default_factory=list)
    numbers: list[Sequence[Any]] = field(default_factory=list)

    def add(self, text: str, *numbers: Any) -> None:
        self.texts.append(text)
        self.numbers.append(numbers or [""] * len(self.names))

    @property
    def numeric(self) -> bool:
        return all(text[:1].isdigit() or text[:1] in "[+-<" for text in self.texts)


@dataclass
class Table:
    columns: Sequence[Column]
    title: str = ""
    notes: Sequence[str] = ()

    def _rows(self) -> list[tuple[str, ...]]:
        return [*zip(*([c.heading, *c.texts] for c in self.columns), strict=True)]

    def plain(self) -> str:
        widths = [max(map(len, [c.heading, *c.texts])) for c in self.columns]
        lines = []
        for row in self._rows():
            aligned = [
                cell.rjust(width) if column.numeric else cell.ljust(width)
                for cell, width, column in zip(row, widths, self.columns, strict=True)
            ]
            lines.append("  ".join(aligned).rstrip())
        return "\n".join([*([self.title] if self.title else []), *lines, *self.notes]) + "\n"

    def markdown(self) -> str:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in self._rows()]
        if rows:
            rows.insert(1, ["---:" if column.numeric else "---" for column in self.columns])
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return "\n\n".join(p for p in (self.title, lines, "\n".join(self.notes)) if p) + "\n"

    def csv(self) -> str:
        columns = [c for c in self.columns if c.names]
        out = io.StringIO()
        write = csv.writer(out, lineterminator="\n").writerow
        write([name for column in columns for name in column.names])
        for row in zip(*(column.numbers for column in columns), strict=True):
            numbers = [number for cell in row for number in cell]
            write([f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in numbers])
        return out.getvalue()
