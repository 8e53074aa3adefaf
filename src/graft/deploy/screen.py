"""What a person sees of predictions: a table of a few, and how far many have come."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from graft.config.words import plural
from graft.deploy.predict import Row
from graft.deploy.writers import Columns, CsvWriter, Sink

FEW = 20  # images in a table
NUMBERS = 8  # columns of predicted numbers in it
EVERY = 0.2  # seconds between two looks at the clock
SELDOM = 30  # where nobody sees a line change


class Screen:
    """A table of up to `FEW` images; CSV if there are more."""

    def __init__(self, file: Sink, columns: Columns) -> None:
        self.file, self.columns = file, columns
        self.rows: list[Row] = []
        self.csv: CsvWriter | None = None

    def write(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        if self.csv is None and (len(self.rows) > FEW or self.columns.features):
            self.csv = CsvWriter(self.file, self.columns)
        if self.csv is not None:
            self.csv.write(self.rows)
            self.rows = []

    def close(self) -> None:
        if self.rows:
            self._print_table()

    def _print_table(self) -> None:
        from rich.table import Table

        from graft.reporting.console import console

        names = self.columns.names[: self.columns.wide]
        if self.columns.spec.output_kind == "numbers":
            names = self.columns.names[: self.columns.wide + NUMBERS]
        hidden = {"prediction", "confidence"} if self.columns.top else set()  # top1 says it
        if not any(row.error for row in self.rows):
            hidden.add("error")
        shown = [name not in hidden for name in names]
        table = Table()
        for name, is_shown in zip(names, shown, strict=True):
            if is_shown:
                table.add_column(name, overflow="fold", no_wrap=name not in ("path", "error"))
        for row in self.rows:
            cells = self.columns.cells(row)
            numbers = [] if row.values is None else [*row.values]
            cells += [*numbers, *[None] * len(names)][: len(names) - len(cells)]
            kept = zip(cells, shown, strict=True)
            table.add_row(*(self._text(cell) for cell, is_shown in kept if is_shown))
        console.print(table)

    def _text(self, cell: Any) -> str:
        if isinstance(cell, np.float32) and self.columns.spec.output_kind != "numbers":
            return f"{100 * cell:.2f} %"
        if isinstance(cell, np.float32):
            return f"{cell:.6g}"
        return ", ".join(cell) if isinstance(cell, list) else cell or ""


class Progress:
    """Images and images a second on standard error: a line that changes on a terminal, else one
    every half minute.
    """

    def __init__(self, silent: bool = False) -> None:
        self.done = 0
        self.silent = silent
        self.live = sys.stderr.isatty()
        self.started = self.told = time.perf_counter()

    @property
    def rate(self) -> str:
        seconds = time.perf_counter() - self.started
        return f"{self.done / max(seconds, 1e-9):,.0f} images/s"

    def add(self, images: int) -> None:
        self.done += images
        now = time.perf_counter()
        if not self.silent and now - self.told > (EVERY if self.live else SELDOM):
            self.told = now
            ends = ("\r\033[K", "") if self.live else ("", "\n")
            self._print(f"{ends[0]}{plural(self.done, 'image')}, {self.rate}{ends[1]}")

    def finish(self, more: str = "") -> None:
        seconds = time.perf_counter() - self.started
        if self.live and not self.silent:
            self._print("\r\033[K")
        self._print(f"{plural(self.done, 'image')} in {seconds:.1f} s, {self.rate}{more}\n")

    def clear(self) -> None:
        if self.live and not self.silent:
            self._print("\r\033[K")

    def _print(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
