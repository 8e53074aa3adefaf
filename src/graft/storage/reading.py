"""Small files that somebody else may have written: bounded and of the type they should have, or a
ValueError of one line that names the file. What is read is plain data: nothing in it is resolved.
"""

from __future__ import annotations

import csv
import json
import re
import stat
from io import StringIO
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]

MOST_BYTES = 16 << 20  # of JSON; YAML is read ten times more slowly
DEEPEST = 64  # levels of lists and mappings within each other
FLOAT, TIMESTAMP = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"


class _Loader(yaml.CSafeLoader):
    """Reads scalars as OmegaConf does: 1e-3 is a number, a date is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own name)
        first: [(tag, pattern) for tag, pattern in known if tag not in (FLOAT, TIMESTAMP)]
        for first, known in yaml.CSafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$"
               r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)  # fmt: skip


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most so many bytes: a pipe would be waited for.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else, or larger.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} is larger than {most >> 20} MB, which no such file is")
    return content


def read_json(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or holds something else.
    """
    content = read_bytes(path, most)
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {_line(error)}") from error
    return _object(path, value)


def read_yaml(path: Path, most: int = 1 << 20) -> Any:
    """Plain values of a YAML file, without anchors: a kilobyte of them unfolds to gigabytes.

    `${...}` stays text: what a run records is resolved, and a file must not read the environment.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or holds something else than plain values.
    """
    content = read_bytes(path, most)
    try:
        depth = 0
        for event in yaml.parse(content, _Loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has an anchor (&name, *name): write the value out")
            if getattr(event, "tag", None) not in (None, "!"):  # not those that are plain either
                raise ValueError(f"it has a tag ({event.tag}): only plain values are read")
            if depth > DEEPEST:  # before libyaml's parser recurses
                raise ValueError("it is nested too deeply")
        value = yaml.load(content, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {_line(error)}") from error
    _require_plain(path, value)
    return value


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """As `read_yaml`, of a file that holds a mapping."""
    return _object(path, read_yaml(path))


def read_yaml_texts(path: Path) -> list[str]:
    """As `read_yaml`, of a file that holds a list of texts: overrides, for instance."""
    value = read_yaml(path)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{path} is damaged: it holds no list of texts")
    return value


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file by column, without a last line that was cut off.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    content = read_bytes(path, 1 << 30)
    try:
        text = content[: content.rfind(b"\n") + 1].decode()
        rows = list(csv.DictReader(StringIO(text, newline=""), strict=True))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} is damaged: {_line(error)}") from error
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{path} is damaged: not all rows have the columns of its first line")
    return rows


def _object(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds {_kind(value)} in place of a mapping")
    _require_plain(path, value)
    return cast("dict[str, Any]", value)


def _require_plain(path: Path, value: Any) -> None:
    """Not a loop over recursion: what comes next may recurse, so depth is bounded here."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if not all(isinstance(key, str | int) for key in item):
                    raise ValueError(f"{path} is damaged: a key in it is not text")
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif not isinstance(item, str | int | float | None):
                raise ValueError(f"{path} is damaged: it holds {_kind(item)}")
        if not inner:
            return
        level = inner
    raise ValueError(f"{path} is damaged: it is nested too deeply")


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
