"""Overrides as people type them, before Hydra's grammar reads them."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

# Keys whose values are paths, or names that nothing but a file may have.
PATHS = re.compile(
    r"\+{0,2}(paths\.\w+|data\.((target\.)?source\.)?(root|cache)|data\.target"
    r"|backbone\.(weights|model|tokenizer)|hydra\.sweep\.dir)"
)
TEXTS = re.compile(rf"\+{{0,2}}name|{PATHS.pattern}")  # Hydra is to read them as text

WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar")

SEARCHPATH = "hydra.searchpath"
PLACES = re.compile(r"paths\.\w+|data\.root")  # where the data of a run may lie another time


def place(path: str | Path) -> Path:
    """Where a path leads that somebody has typed: from the root, `~` and `~user` expanded."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such home folder") from error


def is_weights_path(weights: str) -> bool:
    """Whether `weights` means a file or a run folder. A bare name without a suffix is a library's,
    unless there is a run of that name.
    """
    if "/" in weights or weights.startswith("~"):
        return True
    path = Path(weights)
    file = path.suffix in WEIGHTS or (bool(path.suffix) and path.is_file())
    return file or (path / "run.json").is_file()


def own_cache() -> str:
    """As configs/paths/default.yaml says, whatever a run folder does."""
    return os.environ.get("GRAFT_CACHE") or "~/.cache/graft"


def is_path(key: str, value: Any) -> bool:
    """Whether a value is one: of `backbone.weights`, names of a library are not."""
    if not isinstance(value, str) or not value or "${" in value or not PATHS.fullmatch(key):
        return False
    if key == "backbone.model":  # a name, unless a model has been saved in such a folder
        return (Path(value).expanduser() / "config.json").is_file()
    return key != "backbone.weights" or is_weights_path(value)


def quoted(key: str, text: str) -> str:
    """An override of `key` by `text`, whatever characters that has."""
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def to_type(key: str, text: str) -> str:
    """The same, as it is typed in a shell."""
    return shlex.quote(f"{key}={QuotedString(text, Quote.double).with_quotes()}")


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def whole_command(hydra: Any, overrides: Sequence[str]) -> list[str]:
    """Overrides that mean the same in any folder: `--config-dir` and `hydra.searchpath` as one more
    of them, and paths from the root.

    Args:
        hydra: Hydra's own config.
    """
    own = ("hydra", "main", "schema")
    places = [
        f"{s.schema}://{place(s.path) if s.schema == 'file' else s.path}"
        for s in hydra.runtime.config_sources
        if s.provider not in own
    ]
    kept = [_from_root(o) for o in overrides if key_of(o) != SEARCHPATH]
    return [*kept, *([_searching(places)] if places else [])]


def _searching(places: Sequence[str]) -> str:
    """The override by which Hydra looks for configs in these places too."""
    return f"{SEARCHPATH}=[{','.join(QuotedString(p, Quote.single).with_quotes() for p in places)}]"


def search_path(overrides: Sequence[str]) -> list[str]:
    """Which overrides add folders with configs."""
    return [override for override in overrides if key_of(override) == SEARCHPATH]


def config_dir(folder: str, option: str = "--config-dir ") -> list[str]:
    """What Hydra's option `--config-dir` means as overrides, for commands that are not Hydra's.

    Args:
        option: how a message begins.

    Raises:
        ValueError: there is no such folder.
    """
    if folder and not place(folder).is_dir():
        raise ValueError(f"{option}{folder}: no such folder")
    return [_searching([f"file://{place(folder)}"])] if folder else []


def config_folders(overrides: Sequence[str]) -> list[Path]:
    """The folders with configs that a command names beside our own."""
    parser = OverridesParser.create()
    values: list[Any] = [parser.parse_override(o).value() for o in search_path(overrides)]
    places = [v.text if isinstance(v, QuotedString) else str(v) for value in values for v in value]
    return [place(p.removeprefix("file://")) for p in places if p.startswith("file://")]


def path_of(override: str) -> str:
    """The text of an override that sets a path."""
    value = OverridesParser.create().parse_override(override).value()
    return value.text if isinstance(value, QuotedString) else str(value)


def typed(override: str) -> str:
    """An override as it is typed in a shell; the command quotes paths for Hydra itself."""
    key, _, value = override.partition("=")
    is_text = PATHS.fullmatch(key) and value != "null" and value[:1] != "{"
    return shlex.quote(f"{key}={path_of(override)}" if is_text else override)


def _from_root(override: str) -> str:
    key = override.partition("=")[0]
    if not PATHS.fullmatch(key):
        return override
    value = OverridesParser.create().parse_override(override).value()
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    texts = [v.text if isinstance(v, QuotedString) else v for v in values]
    paths = [is_path(key_of(override), text) for text in texts]
    if not any(paths):
        return override
    parts = [
        quoted("", str(place(str(text))))[1:] if is_one else _as_typed(value)
        for value, text, is_one in zip(values, texts, paths, strict=True)
    ]
    return f"{key}={','.join(parts)}"


def _as_typed(value: Any) -> str:
    """A value of a sweep over paths that is none: a name, a number or null."""
    if isinstance(value, QuotedString):
        return value.with_quotes()
    return "null" if value is None else str(value)


def unreadable(override: str) -> str:
    """What is wrong with an override that Hydra cannot parse."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: an override has the form KEY=VALUE"
    if not re.fullmatch(r"[+~]{0,2}[\w/@:$-]+(\.[\w@:$-]+)*", key):
        return f"{override}: {key or 'nothing'} is not the name of a key"
    return f"{override}: Hydra's grammar cannot read the value; as text, type {to_type(key, value)}"


def require_values(overrides: Sequence[Override]) -> None:
    """Raises a ValueError if a sweep over these overrides would have no jobs, or a job twice."""
    for override in overrides:
        if override.is_discrete_sweep():
            values = list(override.sweep_string_iterator())
            if len(values) != len(set(values)):
                raise ValueError(f"{override.input_line}: a value is there twice")
            if not values:
                raise ValueError(f"{override.input_line}: there is no value in it")


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """Quote paths for Hydra, whose grammar gives a meaning to most characters that names of files
    have: ~ ( ) [ ] { } = : , & # ; ! ' and all beyond ASCII.

    A value is a path if there is such a file or folder; or if its key takes nothing else, and the
    grammar reads it as a number or not at all. A comma separates the values of a sweep, unless
    there is a path with that comma. What is quoted already stays as it is.

    Raises:
        ValueError: a folder that Hydra would make, and nothing be written to.
    """
    for argument in arguments:
        started = "LOCAL_RANK" in os.environ  # Lightning gives this to the ranks it starts
        if argument.lstrip("+").startswith("hydra.run.dir=") and not started:
            raise ValueError("hydra.run.dir: a run's folder is made in paths.logs=FOLDER")
    parser = OverridesParser.create()
    return [
        _quote_path(parser, argument) if "=" in argument[1:] and argument[0] != "-" else argument
        for argument in arguments
    ]


def _quote_path(parser: OverridesParser, argument: str) -> str:
    key, _, text = argument.partition("=")
    takes_path = TEXTS.fullmatch(key) is not None
    try:
        value = parser.parse_override(argument).value()
    except HydraException:
        readable = False
    else:
        readable = True
        if not takes_path or value is None or isinstance(value, str | bool | dict | QuotedString):
            return argument
        if isinstance(value, ChoiceSweep) and not value.simple_form:
            return argument
        if isinstance(value, int | float):
            return quoted(key, text)
    if _exists(text):
        return quoted(key, text)
    parts = text.split(",")
    if len(parts) > 1 and (readable or any(map(_exists, parts))):
        values = [_quote_path(parser, f"{key}={part}").partition("=")[2] for part in parts]
        return f"{key}={','.join(values)}"
    return argument if readable or not takes_path else quoted(key, text)


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # no name that a file could have
        return False
