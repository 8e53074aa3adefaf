"""What each key of the config may be: kinds of values, and a table of the kind of each key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

Check = tuple[str, Callable[[Any], bool]]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


POSITIVE_INT: Check = ("a whole number above 0", lambda v: _integer(v) and v > 0)
NATURAL: Check = ("a whole number, 0 or more", lambda v: _integer(v) and v >= 0)
NUMBER: Check = ("a number", _number)
POSITIVE: Check = ("a number above 0", lambda v: _number(v) and v > 0)
NOT_NEGATIVE: Check = ("a number, 0 or more", lambda v: _number(v) and v >= 0)
FRACTION: Check = ("a number above 0 and below 1", lambda v: _number(v) and 0 < v < 1)
PART: Check = ("a number above 0 and at most 1", lambda v: _number(v) and 0 < v <= 1)
BELOW_ONE: Check = ("a number of at least 0 and below 1", lambda v: _number(v) and 0 <= v < 1)
PROBABILITY: Check = ("a probability from 0 to 1", lambda v: _number(v) and 0 <= v <= 1)
TEXT: Check = ("a name in letters", lambda v: isinstance(v, str) and bool(v.strip()))
FOLDER: Check = ("the name of a folder", TEXT[1])
TAGS: Check = (
    "a list of words, like [baseline,cats]",
    lambda v: isinstance(v, list) and all(isinstance(word, str | int) for word in v),
)
BOOL: Check = ("true or false", lambda v: isinstance(v, bool))
MAPPING: Check = ("a group of keys", lambda v: isinstance(v, dict))
CLASS: Check = ("the name of a class, like package.module.Class", lambda v: _is_dotted(v))
OBJECT: Check = (
    "a group of keys with a _target_",
    lambda v: isinstance(v, dict) and v.get("_target_") is not None,
)


def _is_dotted(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", value) is not None


def _is_monitor(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"val/[\w-]+", value) is not None


def _or_null(check: Check) -> Check:
    return f"{check[0]}, or null", lambda v: v is None or check[1](v)


def _up_to(low: int, high: int) -> Check:
    return f"a whole number from {low} to {high}", lambda v: _integer(v) and low <= v <= high


def _one_of(*options: str) -> Check:
    return f"one of {', '.join(options)}", lambda v: isinstance(v, str) and v in options


def _pair(wanted: str, check: Check) -> Check:
    return wanted, lambda v: isinstance(v, list) and len(v) == 2 and all(map(check[1], v))


def _three(wanted: str, check: Check) -> Check:
    return wanted, lambda v: isinstance(v, list) and len(v) == 3 and all(map(check[1], v))


def _range(wanted: str, largest: float) -> Check:
    pair = _pair(wanted, POSITIVE)
    return wanted, lambda v: pair[1](v) and v[0] <= v[1] <= largest


def _list_of(check: Check) -> Check:
    def accepts(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(check[1](v) for v in value)

    return f"a list of values, each {check[0]}", accepts


def _either(wanted: str, *checks: Check) -> Check:
    return wanted, lambda v: any(accepts(v) for _, accepts in checks)


SEED = _up_to(0, 2**32 - 1)
SIDE = _up_to(1, 10_000)  # px
BATCHES = _either("a number of batches, or a part of them above 0 and up to 1", POSITIVE_INT, PART)
WARMUP: Check = (
    "a part of the stage below 1, or a whole number of steps",
    lambda v: _number(v) and (0 <= v < 1 or (v >= 1 and v == int(v) and v < 1e9)),
)

# What a stage of a plan can set, and nothing else.
STAGE: dict[str, Check] = {
    "epochs": POSITIVE_INT,
    "lr": _or_null(POSITIVE),
    "weight_decay": _or_null(NOT_NEGATIVE),
    "optimizer": _or_null(MAPPING),
    "scheduler": _or_null(MAPPING),
    "trainable": _either(
        "head, all, a number of top blocks, or a list of blocks, norms, biases and patterns",
        TEXT,
        POSITIVE_INT,
        _list_of(TEXT),
    ),
    "train_head": BOOL,
    "norm": _one_of("train", "stats", "affine", "frozen"),
    "layer_decay": POSITIVE,
    "head_lr_scale": POSITIVE,
    "decay_norm_and_bias": BOOL,
    "lora": _or_null(("a rank and an alpha", MAPPING[1])),
    "lora.rank": _up_to(1, 100_000),
    "lora.alpha": POSITIVE,
    "l2_sp": NOT_NEGATIVE,
    "ema": BELOW_ONE,
    "label_smoothing": _or_null(BELOW_ONE),
    "augment": _either("true, false, or what differs from data.augment", BOOL, MAPPING),
    "image_size": _or_null(SIDE),
    "solver": _one_of("sgd", "ridge", "lbfgs"),
    "strengths": _or_null(_list_of(POSITIVE)),
    "cache": _one_of("auto", "on", "off"),
    "cache_limit_gb": POSITIVE,
    "cache_dtype": _one_of("float32", "float16"),
    "views": (
        "none, flip or a whole number above 1",
        lambda v: v in ("none", "flip") or (_integer(v) and v > 1),
    ),
}
AUGMENT: dict[str, Check] = {
    "shift": BELOW_ONE,
    "flip": PROBABILITY,
    "scale": _or_null(_range("two areas above 0 and up to 1, like [0.08, 1]", 1.0)),
    "ratio": _range("two numbers above 0, like [0.75, 1.33]", float("inf")),
    "erase": PROBABILITY,
    "mixup": NOT_NEGATIVE,
    "cutmix": NOT_NEGATIVE,
}
# `trainer.KEY`: the first are in configs/trainer, the rest may be added with `+`. Lightning's other
# arguments would be replaced by ours, or stop a run at its end.
TRAINER: dict[str, Check] = {
    "max_epochs": POSITIVE_INT,
    "accelerator": _one_of("auto", "cpu", "gpu", "mps"),
    "devices": _either(
        "auto, a whole number above 0, or a list of numbers of devices",
        _one_of("auto", "-1"),
        POSITIVE_INT,
        _list_of(NATURAL),
        ("", lambda v: _integer(v) and v == -1),
    ),
    "num_nodes": POSITIVE_INT,
    "strategy": _one_of("auto", "ddp", "fsdp"),
    "precision": (
        "one of auto, 32-true, bf16-mixed, 16-mixed",
        lambda v: (
            isinstance(v, str | int)
            and str(v) in ("auto", "32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")
        ),
    ),
    "compile": _either(
        "true, false, default, reduce-overhead or max-autotune",
        BOOL,
        _one_of("default", "reduce-overhead", "max-autotune"),
    ),
    "sync_batchnorm": BOOL,
    "gradient_clip_val": _or_null(POSITIVE),
    "accumulate_grad_batches": POSITIVE_INT,
    "log_every_n_steps": POSITIVE_INT,
    "checkpoint_every_n_steps": _or_null(POSITIVE_INT),
    "checkpoint_every_n_minutes": _or_null(POSITIVE),
    "deterministic": _either("true, false or warn", BOOL, _one_of("warn")),
    "limit_train_batches": BATCHES,
    "limit_val_batches": BATCHES,
    "limit_test_batches": BATCHES,
}
MORE_TRAINER: dict[str, Check] = {
    "benchmark": BOOL,
    "detect_anomaly": BOOL,
    "gradient_clip_algorithm": _one_of("norm", "value"),
    "profiler": _one_of("simple", "advanced", "pytorch"),
}

# Values by key; `*` stands for the name of a stage, a callback or a logger.
CHECKS: dict[str, Check] = {
    "name": _or_null(("text", lambda v: _integer(v) or TEXT[1](v))),
    "tags": TAGS,
    "seed": SEED,
    "mirror": BOOL,
    "paths": MAPPING,
    "paths.logs": FOLDER,
    "paths.data": FOLDER,
    "paths.cache": FOLDER,
    "data": OBJECT,
    "data.root": FOLDER,
    "data.batch_size": _or_null(POSITIVE_INT),
    "data.eval_batch_size": POSITIVE_INT,
    "data.image_size": _or_null(SIDE),
    "data.resize_size": _or_null(SIDE),
    "data.augment": _or_null(OBJECT),
    **{f"data.augment.{key}": check for key, check in AUGMENT.items()},
    "data.sample_transform": _or_null(OBJECT),
    "data.resident": _one_of("auto", "on", "off"),
    "data.val_fraction": FRACTION,
    "data.test_fraction": FRACTION,
    "data.split_seed": SEED,
    "data.train_fraction": PART,
    "data.shots_per_class": _or_null(POSITIVE_INT),
    "data.epoch_images": _or_null(POSITIVE_INT),
    "data.drop_last": BOOL,
    "data.reshuffle": BOOL,
    "data.sampling": _one_of("shuffled", "balanced"),
    "data.num_workers": _up_to(0, 256),
    "data.pin_memory": BOOL,
    "data.source": OBJECT,
    "backbone": OBJECT,
    "backbone.preprocessing": MAPPING,
    "backbone.preprocessing.resize_size": _or_null(SIDE),
    "backbone.preprocessing.crop_size": _or_null(SIDE),
    "backbone.preprocessing.mean": _or_null(_three("three numbers", NUMBER)),
    "backbone.preprocessing.std": _or_null(_three("three numbers above 0", POSITIVE)),
    "backbone.preprocessing.interpolation": _or_null(_one_of("bilinear", "bicubic")),
    "backbone.preprocessing.crop_mode": _or_null(_one_of("center", "squash")),
    "head": OBJECT,
    "head.dropout": BELOW_ONE,
    "head.norm": _one_of("none", "standardize", "batchnorm"),
    "head.num_classes": _or_null(POSITIVE_INT),
    "head.seed": _or_null(SEED),
    "head.grid": _or_null(("lists of lr, weight_decay and seed", MAPPING[1])),
    "head.grid.lr": _or_null(_list_of(POSITIVE)),
    "head.grid.weight_decay": _or_null(_list_of(NOT_NEGATIVE)),
    "head.grid.seed": _or_null(_list_of(SEED)),
    "optimizer": OBJECT,
    "optimizer.lr": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "scheduler": OBJECT,
    "trainer": MAPPING,
    **{f"trainer.{key}": check for key, check in {**TRAINER, **MORE_TRAINER}.items()},
    "task": OBJECT,
    "task.monitor": ("the name of a metric of validation, like val/acc", _is_monitor),
    "task.mode": _one_of("max", "min"),
    "task.metrics": MAPPING,
    "task.metrics.*": OBJECT,
    "transfer": MAPPING,
    "transfer.stages": MAPPING,
    "transfer.stages.*": MAPPING,
    **{f"transfer.stages.*.{key}": check for key, check in STAGE.items()},
    **{f"transfer.stages.*.augment.{key}": check for key, check in AUGMENT.items()},
    "transfer.stages.*.optimizer.lr": POSITIVE,
    "transfer.stages.*.optimizer.weight_decay": NOT_NEGATIVE,
    "callbacks": _or_null(MAPPING),
    "callbacks.*": _or_null(OBJECT),
    "logger": _or_null(MAPPING),
    "logger.*": _or_null(OBJECT),
}
# A run cannot do without these; old runs have them too.
NEEDED = (
    *(
        "seed",
        "task",
        "task.monitor",
        "task.mode",
        "mirror",
        "data",
        "data.source",
        "data.batch_size",
        "backbone",
    ),
    *("head", "optimizer", "optimizer.lr", "optimizer.weight_decay", "scheduler", "callbacks"),
    *("transfer", "transfer.stages", "logger", "paths", "paths.logs", "paths.data", "paths.cache"),
    *("trainer", *(f"trainer.{key}" for key in TRAINER)),
)
# Groups of keys that hold nothing else.
CLOSED: dict[str, dict[str, Check]] = {
    "trainer": {**TRAINER, **MORE_TRAINER},
    "transfer.stages.*": STAGE,
    "transfer.stages.*.lora": {"rank": POSITIVE_INT, "alpha": POSITIVE},
    "head.grid": {"lr": POSITIVE, "weight_decay": NOT_NEGATIVE, "seed": SEED},
}
INSTEAD = {
    "trainer.overfit_batches": "debug=overfit",
    "trainer.fast_dev_run": "debug=fdr",
    "trainer.max_steps": "trainer.max_epochs=N",
    "trainer.check_val_every_n_epoch": "data.epoch_images=N for longer epochs: each is validated",
    "trainer.callbacks": "+callbacks.NAME._target_=CLASS",
    "trainer.logger": "+logger.NAME._target_=CLASS",
}

# Arguments of the classes that our configs name. Those of other classes are their own affair.
_FOLDER = {"root": FOLDER, "cache": FOLDER, "on_error": _one_of("fail", "skip")}
_IMAGES = {
    **_FOLDER,
    "background": _or_null(TEXT),
    "value_range": _or_null(_pair("two numbers, like [0, 4095]", NUMBER)),
    "max_megapixels": POSITIVE,
}
_ADAM = {"betas": _pair("two numbers of at least 0 and below 1", BELOW_ONE), "eps": POSITIVE}
_WEIGHTS = {
    "model": TEXT,
    "weights": _or_null(("the name of an entry, a file or a run folder", TEXT[1])),
    "taps": _or_null(_either("all, or a list of names of blocks", TEXT, _list_of(TEXT))),
    "pretrained": BOOL,
}
ARGUMENTS: dict[str, dict[str, Check]] = {
    "graft.models.resnet_cifar.resnet_cifar": {
        **_WEIGHTS,
        "depth": _up_to(8, 2000),
        "width": _up_to(1, 10_000),
    },
    "graft.models.timm.timm_backbone": {**_WEIGHTS, "drop_path_rate": _or_null(BELOW_ONE)},
    "graft.models.torchvision.torchvision_backbone": {
        **_WEIGHTS,
        "stochastic_depth_prob": BELOW_ONE,
    },
    "graft.data.sources.cifar.Cifar10": {**_FOLDER, "download": BOOL},
    "graft.data.sources.folder.ImageFolder": _IMAGES,
    "graft.data.sources.table.ImageTable": {
        **_IMAGES,
        "table": TEXT,
        "columns": _or_null(_list_of(TEXT)),
    },
    "graft.data.sources.synthetic.Synthetic": {
        "classes": _up_to(2, 100_000),
        "per_class": POSITIVE_INT,
        "test_per_class": POSITIVE_INT,
        "image_size": SIDE,
        "seed": SEED,
    },
    "graft.tasks.classification.Classification": {
        "loss": _one_of("cross_entropy", "focal"),
        "gamma": NOT_NEGATIVE,
        "class_weights": _or_null(
            _either("balanced, or a number for each class", _one_of("balanced"), _list_of(POSITIVE))
        ),
        "label_smoothing": BELOW_ONE,
    },
    "graft.tasks.multilabel.MultiLabel": {
        "pos_weight": _or_null(
            _either("balanced, or a number for each label", _one_of("balanced"), _list_of(POSITIVE))
        ),
    },
    "graft.tasks.regression.Regression": {"loss": _one_of("mse", "l1", "huber")},
    "graft.models.heads.CosineHead": {"scale": POSITIVE},
    "graft.models.heads.MLPHead": {"hidden": _up_to(1, 1_000_000), "layers": _up_to(0, 1000)},
    "graft.reporting.loggers.TensorBoard": {"images": BOOL},
    "graft.reporting.trackers.MLFlow": {"experiment_name": TEXT},
    "graft.reporting.trackers.WandB": {"project": TEXT},
    "graft.plan.schedules.constant": {"warmup": WARMUP},
    "graft.plan.schedules.cosine": {"warmup": WARMUP, "final": NOT_NEGATIVE},
    "graft.plan.schedules.one_cycle": {
        "warmup": WARMUP,
        "initial": NOT_NEGATIVE,
        "final": NOT_NEGATIVE,
    },
    "lightning.pytorch.callbacks.EarlyStopping": {
        "monitor": TEXT,
        "mode": _one_of("min", "max"),
        "patience": NATURAL,
        "min_delta": NUMBER,
    },
    "torch.optim.AdamW": _ADAM,
    "torch.optim.SGD": {"momentum": BELOW_ONE, "nesterov": BOOL},
    "torchvision.transforms.v2.RandAugment": {"num_ops": NATURAL, "magnitude": _up_to(0, 30)},
}
_NAMED = re.compile(r"^(transfer\.stages|callbacks|logger|task\.metrics)\.[^.]+")
_ORDER = {key: place for place, key in enumerate(CHECKS)}


def nodes(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in plain dicts, the dicts too."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        yield key, value
        if isinstance(value, dict):
            yield from nodes(value, f"{key}.")


def wrong_value(plain: dict[str, Any]) -> str | None:
    """The first key of a resolved config that is missing, unknown or of a wrong value.

    First in the order of the table: a key that a user sets comes before those that point to it.
    """
    keys = dict(nodes(plain))
    found = [(_ORDER[key], f"no value for {key}") for key in NEEDED if key not in keys]
    for key, value in keys.items():
        name = _NAMED.sub(r"\1.*", key)
        place = _ORDER.get(name, len(_ORDER))
        checked = [(key, value, CHECKS[name])] if name in CHECKS else []
        if name.endswith("._target_"):
            checked.append((key, value, CLASS))
        if isinstance(value, dict):
            arguments = ARGUMENTS.get(str(_target(name, value, plain)), {})
            checked += [(f"{key}.{a}", value[a], c) for a, c in arguments.items() if a in value]
            if name == "transfer.stages.*" and "epochs" not in value:
                found.append((place, f"no value for {key}.epochs"))
        found += [(place, _problem(k, v, check)) for k, v, check in checked if not check[1](v)]
        parent, _, last = name.rpartition(".")
        if parent in CLOSED and last not in CLOSED[parent]:
            it_has = f"it has {', '.join(key for key in CLOSED[parent] if '.' not in key)}"
            hint = f"use {INSTEAD[name]}" if name in INSTEAD else it_has
            found.append((place, f"no config key {key}: {hint}"))
    return min(found)[1] if found else None


def _target(name: str, node: dict[str, Any], plain: dict[str, Any]) -> Any:
    """What takes the arguments: a stage may set some of the run's own optimizer or scheduler."""
    place, _, part = name.rpartition(".")
    if place == "transfer.stages.*" and part in ("optimizer", "scheduler"):
        run = plain.get(part)
        node = {**(run if isinstance(run, dict) else {}), **node}
    return node.get("_target_")


def _problem(key: str, value: Any, check: Check) -> str:
    wanted, accepts = check
    if isinstance(value, dict) and accepts({"_target_": "a.Class"}):
        return f"no value for {key}._target_"
    text = str(value)
    return f"{key}={text if len(text) < 100 else text[:100] + '...'}: must be {wanted}"
