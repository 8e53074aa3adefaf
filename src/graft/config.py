"""Finding, checking and explaining configs: everything that can be said before heavy imports."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graft.conflicts import conflict

_PACKAGED = Path(__file__).parent / "configs"  # in a wheel; a checkout has them at its top
CONFIGS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "configs"

Check = tuple[str, Callable[[Any], bool]]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


POSITIVE_INT: Check = ("a whole number above 0", lambda v: _integer(v) and v > 0)
NATURAL: Check = ("a whole number, 0 or more", lambda v: _integer(v) and v >= 0)
POSITIVE: Check = ("a number above 0", lambda v: _number(v) and v > 0)
NOT_NEGATIVE: Check = ("a number, 0 or more", lambda v: _number(v) and v >= 0)
FRACTION: Check = ("a number above 0 and below 1", lambda v: _number(v) and 0 < v < 1)
PART: Check = ("a number above 0 and at most 1", lambda v: _number(v) and 0 < v <= 1)
BELOW_ONE: Check = ("a number of at least 0 and below 1", lambda v: _number(v) and 0 <= v < 1)
PROBABILITY: Check = ("a probability from 0 to 1", lambda v: _number(v) and 0 <= v <= 1)
FOLDER: Check = ("the name of a folder", lambda v: isinstance(v, str) and bool(v.strip()))
BOOL: Check = ("true or false", lambda v: isinstance(v, bool))


def _or_null(check: Check) -> Check:
    return f"{check[0]}, or null", lambda v: v is None or check[1](v)


def _one_of(*options: str) -> Check:
    return f"one of {', '.join(options)}", lambda v: v in options


def _range(wanted: str, largest: float) -> Check:
    def accepts(v: Any) -> bool:
        pair = isinstance(v, list) and len(v) == 2 and all(_number(end) for end in v)
        return pair and 0 < v[0] <= v[1] <= largest

    return wanted, accepts


def _list_of(check: Check) -> Check:
    def accepts(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(check[1](v) for v in value)

    return f"a list of values, each {check[0]}", accepts


# Values by key; `*` stands for one name. What is not listed is checked by whoever takes it.
CHECKS: dict[str, Check] = {
    "seed": NATURAL,
    "paths.logs": FOLDER,
    "paths.data": FOLDER,
    "paths.cache": FOLDER,
    "label_smoothing": BELOW_ONE,
    "mirror": BOOL,
    "data.batch_size": POSITIVE_INT,
    "data.eval_batch_size": POSITIVE_INT,
    "data.image_size": _or_null(POSITIVE_INT),
    "data.resize_size": _or_null(POSITIVE_INT),
    "data.val_fraction": FRACTION,
    "data.test_fraction": FRACTION,
    "data.split_seed": NATURAL,
    "data.train_fraction": PART,
    "data.shots_per_class": _or_null(POSITIVE_INT),
    "data.epoch_images": _or_null(POSITIVE_INT),
    "data.drop_last": BOOL,
    "data.reshuffle": BOOL,
    "data.num_workers": NATURAL,
    "data.pin_memory": BOOL,
    "data.augment.shift": BELOW_ONE,
    "data.resident": _one_of("auto", "on", "off"),
    "data.augment.flip": PROBABILITY,
    "data.augment.scale": _or_null(_range("two areas above 0 and up to 1, like [0.08, 1]", 1.0)),
    "data.augment.ratio": _range("two numbers above 0, like [0.75, 1.33]", float("inf")),
    "data.augment.erase": PROBABILITY,
    "data.augment.mixup": NOT_NEGATIVE,
    "data.augment.cutmix": NOT_NEGATIVE,
    "head.dropout": BELOW_ONE,
    "head.norm": _one_of("none", "standardize", "batchnorm"),
    "head.num_classes": _or_null(POSITIVE_INT),
    "head.seed": _or_null(NATURAL),
    "head.grid": ("null, or lists of lr, weight_decay and seed", lambda v: v is None),
    "head.grid.lr": _or_null(_list_of(POSITIVE)),
    "head.grid.weight_decay": _or_null(_list_of(NOT_NEGATIVE)),
    "head.grid.seed": _or_null(_list_of(NATURAL)),
    "optimizer.lr": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.momentum": BELOW_ONE,
    "scheduler.warmup": NOT_NEGATIVE,
    "trainer.max_epochs": POSITIVE_INT,
    "trainer.compile": (
        "true, false, default, reduce-overhead or max-autotune",
        lambda v: isinstance(v, bool) or v in ("default", "reduce-overhead", "max-autotune"),
    ),
    "trainer.sync_batchnorm": BOOL,
    "trainer.gradient_clip_val": _or_null(POSITIVE),
    "trainer.accumulate_grad_batches": POSITIVE_INT,
    "trainer.num_nodes": POSITIVE_INT,
    "trainer.limit_train_batches": POSITIVE,
    "trainer.limit_val_batches": POSITIVE,
    "trainer.limit_test_batches": POSITIVE,
    "trainer.log_every_n_steps": POSITIVE_INT,
    "trainer.checkpoint_every_n_steps": _or_null(POSITIVE_INT),
    "trainer.checkpoint_every_n_minutes": _or_null(POSITIVE),
    "transfer.stages.*.epochs": POSITIVE_INT,
    "transfer.stages.*.norm": _one_of("train", "stats", "affine", "frozen"),
    "transfer.stages.*.augment": ("true, false, or what differs from data.augment", BOOL[1]),
    "transfer.stages.*.train_head": BOOL,
    "transfer.stages.*.image_size": _or_null(POSITIVE_INT),
    "transfer.stages.*.label_smoothing": _or_null(BELOW_ONE),
    "transfer.stages.*.lora": ("null, or a rank and an alpha", lambda v: v is None),
    "transfer.stages.*.lora.rank": POSITIVE_INT,
    "transfer.stages.*.lora.alpha": POSITIVE,
    "transfer.stages.*.l2_sp": NOT_NEGATIVE,
    "transfer.stages.*.ema": BELOW_ONE,
    "transfer.stages.*.lr": POSITIVE,
    "transfer.stages.*.weight_decay": NOT_NEGATIVE,
    "transfer.stages.*.layer_decay": POSITIVE,
    "transfer.stages.*.head_lr_scale": POSITIVE,
    "transfer.stages.*.decay_norm_and_bias": BOOL,
    "transfer.stages.*.cache": _one_of("auto", "on", "off"),
    "transfer.stages.*.cache_limit_gb": POSITIVE,
    "transfer.stages.*.cache_dtype": _one_of("float32", "float16"),
    "transfer.stages.*.views": (
        "none, flip or a whole number above 1",
        lambda v: v in ("none", "flip") or (_integer(v) and v > 1),
    ),
    "transfer.stages.*.solver": _one_of("sgd", "ridge", "lbfgs"),
    "transfer.stages.*.strengths": _or_null(_list_of(POSITIVE)),
}
AUGMENT = {key.rpartition(".")[2]: c for key, c in CHECKS.items() if "data.augment." in key}
CHECKS |= {f"transfer.stages.*.augment.{key}": check for key, check in AUGMENT.items()}


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of plain dicts; lists are leaves."""
    if not isinstance(node, dict):
        yield prefix, node
        return
    for key, value in node.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def chosen_options(choices: Mapping[str, str | None]) -> dict[str, str | None]:
    """The option of each config group, of what Hydra tells of them: not of `a/b@c`."""
    return {group: option for group, option in choices.items() if group.isidentifier()}


def check(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain values.

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
    values = list(leaves(plain))
    # In the order of the checks: the key a user sets comes before those that point to it.
    for name, (wanted, accepts) in CHECKS.items():
        pattern = re.compile(re.escape(name).replace(r"\*", "[^.]+"))
        for key, value in values:
            if pattern.fullmatch(key) and not accepts(value):
                raise ValueError(f"{key}={value}: must be {wanted}")
    if not plain["transfer"].get("stages"):
        raise ValueError("transfer.stages is empty: a plan needs at least one stage")
    named = {str(key): value for key, value in plain.items()}
    if problem := conflict(named):
        raise ValueError(problem)
    return named


def bind(config: dict[str, Any], **keywords: Any) -> Callable[..., Any]:
    """The `_target_` of a config with its arguments, to be called.

    Not Hydra's own `_partial_`: each call of one costs a millisecond of checks, and a schedule is
    called in every step.
    """
    from hydra.utils import get_object, instantiate

    arguments = {key: value for key, value in config.items() if key != "_target_"}
    arguments = instantiate(arguments, _convert_="all")  # what is nested in them
    return partial(get_object(config["_target_"]), **arguments, **keywords)


def make(config: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
    """The object a config describes. `keywords` are passed as they are: Hydra's own `instantiate`
    would turn a dataclass among them into a config.
    """
    return bind(config, **keywords)(*arguments)


def explain(error: BaseException) -> str:
    """One line for an error of Hydra or of ours, with close matches for a mistyped name."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__  # what the class itself said
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if match := re.search(r"Could not override '([^']+)'", text):
        key, hint = match[1], _suggest(match[1], _known_keys())
        group = key.partition(".")[0]
        if group in ("callbacks", "logger") and f" {group}." not in hint:
            hint = f": to add one, write +{key}=VALUE"
        return f"no config key {key}{hint}"
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        available = sorted(p.stem for p in (CONFIGS / group).glob("*.yaml"))
        return (
            f"no config {group}={option}{_suggest(option, available)} "
            f"(available: {', '.join(available)})"
        )
    if match := re.search(r"Could not override '?([\w/@]+)'?\. No match in the defaults", text):
        return f"no config group {match[1]}"
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"no value for {match[1]}: give one as {match[1]}=VALUE"
    if match := re.search(r"You must specify '([^']+)'", text):
        return f"nothing chosen for {match[1]}: give one as {match[1]}=NAME"
    name = type(error).__name__
    line = (
        lines[0] if isinstance(error, ValueError | OSError | ArithmeticError) else " ".join(lines)
    )
    if isinstance(error, ValueError | ArithmeticError) or name.startswith(("Config", "Hydra")):
        return line if not name.startswith("Override") else " ".join(lines[:2])
    if isinstance(error, OSError):
        return text.replace("\n", " ")
    return f"{name}: {' '.join(lines[:3])}"


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else ""


def _known_keys() -> list[str]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    # Of the plan, the data, ... that this command chooses.
    given = [a for a in sys.argv[1:] if (CONFIGS / a.lstrip("+").partition("=")[0]).is_dir()]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            config = compose("train", [a for a in given if "=" in a and "," not in a])
        except HydraException:
            config = compose("train")
    plain = OmegaConf.to_container(config, resolve=False)
    keys = [key for key, _ in leaves(plain)]
    return sorted({*keys, *(key.split(".")[0] for key in keys), "experiment", "debug"})
