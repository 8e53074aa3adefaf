"""Finding, checking and explaining configs: everything that can be said before heavy imports."""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graft.config.checks import CHECKS, wrong_value
from graft.config.conflicts import conflict
from graft.config.names import visible
from graft.config.overrides import config_dir, is_path, place, search_path, to_type, unreadable
from graft.config.words import did_you_mean

_PACKAGED = Path(__file__).parents[1] / "configs"  # in a wheel; a checkout has them at its top
CONFIGS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "configs"


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of plain dicts; lists are leaves."""
    if not isinstance(node, dict):
        yield prefix, node
        return
    for key, value in node.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def set_leaf(config: dict[str, Any], key: str, value: Any) -> None:
    """Set what `leaves` calls `key`."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = value


def from_root(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its paths as they are recorded."""
    for key, value in list(leaves(config)):
        if is_path(key, value):
            try:
                set_leaf(config, key, str(place(value)))
            except ValueError as error:
                raise ValueError(f"{key}={error}") from error
    return config


def moved(config: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    """The config of a run with `paths.NAME` or `data.root` at another place, and all that is below
    it.

    Raises:
        ValueError: the run has no such place, or the path is of no known home folder.
    """
    values = dict(leaves(config))
    if not is_path(key, values.get(key)):
        raise ValueError(f"{key}={path}: the config of this run has no such place")
    old, new = Path(values[key]), place(path)
    changed = copy.deepcopy(config)
    for name, value in values.items():
        if is_path(name, value) and Path(value).is_relative_to(old):
            set_leaf(changed, name, str(new / Path(value).relative_to(old)))
    return changed


def chosen_options(choices: Mapping[str, str | None]) -> dict[str, str | None]:
    """The option of each config group, of what Hydra tells of them: not of `a/b@c`."""
    return {group: option for group, option in choices.items() if group.isidentifier()}


def check(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain values, with paths from the root.

    Raises:
        ValueError: a missing value, an interpolation that fails, or a value of the wrong kind.
    """
    if missing := OmegaConf.missing_keys(config):
        raise ValueError(f"no value for {', '.join(sorted(missing))}: give one as KEY=VALUE")
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    if not isinstance(plain, dict):
        raise ValueError("the config is not a mapping")
    return check_values({str(key): value for key, value in plain.items()})


def check_values(plain: dict[str, Any]) -> dict[str, Any]:
    """A resolved config, if a run can be made of it, with paths from the root.

    Raises:
        ValueError: a key is missing, unknown or of a wrong value, or two do not go together.
    """
    if problem := wrong_value(plain):
        raise ValueError(problem)
    from_root(plain)
    if not plain["transfer"]["stages"]:
        raise ValueError("transfer.stages is empty: a plan needs at least one stage")
    for name in plain["transfer"]["stages"]:
        if not re.fullmatch(r"\w[\w .+-]*", str(name)):
            raise ValueError(
                f"transfer.stages.{visible(str(name))}: a stage's name is also a folder's: "
                "letters, digits, space, _ . + -"
            )
    if problem := conflict(plain):
        raise ValueError(problem)
    return plain


def explain(error: BaseException, command: Sequence[str] | None = None) -> str:
    """One line for an error of Hydra or of ours, with close matches for a mistyped name.

    Args:
        command: the overrides that led to it; None: those of this process.
    """
    command = sys.argv[1:] if command is None else command
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__  # what the class itself said
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if match := re.search(r"Could not override '([^']+)'", text):
        key, hint = match[1], did_you_mean(match[1], _known_keys(command))
        group = key.partition(".")[0]
        if group in ("callbacks", "logger") and f" {group}." not in hint:
            hint = f": to add one, write +{key}=VALUE"
        elif key in CHECKS:
            hint = f": to add it, write +{key}=VALUE"
        return f"no config key {key}{hint}"
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        available = re.findall(r"^\t(\w\S*)$", text.partition("search path")[0], flags=re.MULTILINE)
        return (
            f"no config {group}={option}{did_you_mean(option, available)} "
            f"(available: {', '.join(available)})"
        )
    if match := re.search(r"Could not override '?([\w/@]+)'?\. No match in the defaults", text):
        return f"no config group {match[1]}"
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"no value for {match[1]}: give one as {match[1]}=VALUE"
    if match := re.search(r"You must specify '([^']+)'", text):
        return f"nothing chosen for {match[1]}: give one as {match[1]}=NAME"
    if match := re.search(r"Error merging override (.+)", text):
        return f"{match[1]}: the value is of another kind than what is there"
    if "Config group override must be" in text:
        groups = " ".join(_given_groups(command))
        return f"{groups}: a config group takes the name of an option"
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    if match := re.search(r"Ambiguous value for argument '(.+)'\n", text):
        key, _, value = match[1].partition("=")
        return f"{match[1]}: to try each in a sweep add -m; as one text type {to_type(key, value)}"
    name = type(error).__name__
    line = (
        lines[0] if isinstance(error, ValueError | OSError | ArithmeticError) else " ".join(lines)
    )
    if isinstance(error, ValueError | ArithmeticError) or name.startswith(("Config", "Hydra")):
        return line
    if isinstance(error, OSError):
        return text.replace("\n", " ")
    return f"{name}: {' '.join(lines[:3])}"


def _given_groups(command: Sequence[str]) -> list[str]:
    """What a command chooses in config groups."""
    return [a for a in command if (CONFIGS / a.lstrip("+").partition("=")[0]).is_dir()]


def _known_keys(command: Sequence[str]) -> list[str]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    # Of the plan, the data, ... that this command chooses.
    given = [a for a in _given_groups(command) if "=" in a and "," not in a]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", default="")
    own = config_dir(parser.parse_known_args(command)[0].config_dir)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            config = compose("train", [*search_path(command), *own, *given])
        except HydraException:
            config = compose("train")
    plain = OmegaConf.to_container(config, resolve=False)
    keys = [key for key, _ in leaves(plain)]
    return sorted({*keys, *(key.split(".")[0] for key in keys), "experiment", "debug"})
