"""Predictions as CSV, JSONL, Parquet, or a table to read: the same columns in each.

Imports no torch: an exported model answers without it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from graft.deploy.predict import Row
from graft.deploy.spec import Spec

if TYPE_CHECKING:
    from graft.deploy.texts import TextSpec

THRESHOLD = 0.5  # of the labels that are predicted
BETWEEN_LABELS = "|"  # in CSV
ROW_GROUP = 1 << 20  # numbers in memory before a part of a Parquet file is written


class Columns:
    """The columns of a row: `path` (or `text`), what is predicted, `error`, and all numbers.

    Attributes:
        names: of all; those from `wide` on are the numbers: `p_CLASS`, `predicted_NUMBER` or `f0`,
            `f1`, ...
    """

    def __init__(
        self, spec: Spec | TextSpec, top: int = 0, features: int = 0, first: str = "path"
    ) -> None:
        self.spec, self.features = spec, features
        self.top = 0 if features or spec.output_kind == "numbers" else min(top, len(spec.classes))
        self.names = [first, *self._summary(), "error"]
        for place in range(1, self.top + 1):
            self.names += [f"top{place}", f"top{place}_p"]
        self.wide = len(self.names)
        if features:
            self.names += [f"f{i}" for i in range(features)]
        else:
            prefix = "predicted" if spec.output_kind == "numbers" else "p"
            self.names += [f"{prefix}_{name}" for name in spec.classes]

    def _summary(self) -> list[str]:
        if self.features or self.spec.output_kind == "numbers":
            return []
        one_of_them = self.spec.output_kind == "classes"
        return ["prediction", "confidence"] if one_of_them else ["prediction"]

    def cells(self, row: Row) -> list[Any]:
        """Those before the numbers: texts, numbers, a list of labels, None for what there is not.

        Raises:
            ValueError: the model gives another number of outputs than it has classes.
        """
        values = row.values
        if values is None:
            top = [None] * (2 * self.top)
            return [row.path, *(None for _ in self._summary()), row.error, *top]
        if len(values) != len(self.names) - self.wide:
            raise ValueError(
                f"the model gave {len(values)} numbers for an image, not "
                f"{len(self.names) - self.wide}"
            )
        names = self.spec.classes
        cells: list[Any] = [row.path]
        if self._summary() == ["prediction"]:
            cells.append([names[i] for i in np.flatnonzero(values > THRESHOLD)])
        elif self._summary():
            best = int(values.argmax())
            cells += [names[best], values[best]]
        cells.append(None)
        for i in np.argsort(-values, kind="stable")[: self.top]:
            cells += [names[i], values[i]]
        return cells


class Sink(Protocol):
    def write(self, data: bytes, /) -> int: ...


class Writer(Protocol):
    def write(self, rows: Sequence[Row]) -> None: ...

    def close(self) -> None:
        """Write what is left. The file stays open."""


class CsvWriter:
    """Names of files are written as the file system has them, UTF-8 or not."""

    def __init__(self, file: Sink, columns: Columns) -> None:
        self.file, self.columns = file, columns
        self.buffer = io.StringIO(newline="")
        self.csv = csv.writer(self.buffer, lineterminator="\n")
        self.csv.writerow(columns.names)

    def write(self, rows: Sequence[Row]) -> None:
        empty = [""] * (len(self.columns.names) - self.columns.wide)
        for row in rows:
            cells = (
                BETWEEN_LABELS.join(cell) if isinstance(cell, list) else cell
                for cell in self.columns.cells(row)
            )
            self.csv.writerow([*cells, *(empty if row.values is None else row.values)])
        self.close()

    def close(self) -> None:
        if text := self.buffer.getvalue():
            self.file.write(text.encode("utf-8", "surrogateescape"))
            self.buffer.seek(0)
            self.buffer.truncate()


class JsonWriter:
    """An object a line. A byte of a file's name that is not UTF-8 is `\\udc80` and on, as Python
    reads names.
    """

    def __init__(self, file: Sink, columns: Columns) -> None:
        self.file, self.columns = file, columns

    def write(self, rows: Sequence[Row]) -> None:
        lines = []
        for row in rows:
            numbers = [None] * (len(self.columns.names) - self.columns.wide)
            cells = [*self.columns.cells(row), *(numbers if row.values is None else row.values)]
            named = zip(self.columns.names, map(_plain, cells), strict=True)
            lines.append(f"{json.dumps(dict(named))}\n")
        self.file.write("".join(lines).encode())

    def close(self) -> None:
        pass


def _plain(cell: Any) -> Any:
    """JSON has no NaN; a float32 is as short as one, 0.1 and not 0.10000000149."""
    if not isinstance(cell, np.float32):
        return cell
    return float(str(cell)) if math.isfinite(cell) else None


class ParquetWriter:
    """Features are one column, `features`, of lists. Bytes of a file's name that are not UTF-8
    are escaped: Parquet has no other texts.
    """

    def __init__(self, file: Sink, columns: Columns) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import parquet

        self.pa, self.columns = pa, columns
        text, number = pa.string(), pa.float32()
        kinds = {"path": text, "prediction": text, "confidence": number, "error": text}
        if columns.spec.output_kind == "labels":
            kinds["prediction"] = pa.list_(text)
        fields = []
        for i, name in enumerate(columns.names[: columns.wide]):
            kind = kinds.get(name, number if name.endswith("_p") else text)
            fields.append(pa.field(name, kind, nullable=i > 0))
        if columns.features:
            fields.append(pa.field("features", pa.list_(number, columns.features)))
        else:
            fields += [pa.field(name, number) for name in columns.names[columns.wide :]]
        self.schema = pa.schema(fields)
        self.parquet = parquet.ParquetWriter(file, self.schema)
        self.rows: list[Row] = []

    def write(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        if len(self.rows) * len(self.columns.names) >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self.parquet.close()

    def _flush(self) -> None:
        rows, self.rows = self.rows, []
        if not rows:
            return
        columns = [*zip(*map(self.columns.cells, rows), strict=True)]
        columns[0] = tuple(os.fsencode(c).decode("utf-8", "backslashreplace") for c in columns[0])
        arrays = [
            self.pa.array(column, field.type)
            for column, field in zip(columns, self.schema, strict=False)
        ]
        width = len(self.columns.names) - self.columns.wide
        absent = np.array([row.values is None for row in rows])
        blank = np.zeros(width, np.float32)
        numbers = np.stack([blank if row.values is None else row.values for row in rows])
        if self.columns.features:
            flat = self.pa.array(numbers.ravel(), self.pa.float32())
            mask = self.pa.array(absent)
            arrays.append(self.pa.FixedSizeListArray.from_arrays(flat, width, mask=mask))
        else:
            arrays += [self.pa.array(column, mask=absent) for column in numbers.T]
        self.parquet.write_table(self.pa.Table.from_arrays(arrays, schema=self.schema))


WRITERS: dict[str, Callable[[Sink, Columns], Writer]] = {
    ".csv": CsvWriter,
    ".jsonl": JsonWriter,
    ".parquet": ParquetWriter,
}
