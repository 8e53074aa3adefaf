"""What each key of the config may be: a table of the kind of each key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from graft.config.kinds import (
    BATCHES,
    BELOW_ONE,
    BOOL,
    CLASS,
    FOLDER,
    FRACTION,
    MAPPING,
    NATURAL,
    NOT_NEGATIVE,
    NUMBER,
    OBJECT,
    PART,
    POSITIVE,
    POSITIVE_INT,
    PROBABILITY,
    SEED,
    SEVERITY,
    SHIFTS,
    SIDE,
    TAGS,
    TEXT,
    WARMUP,
    Check,
    either,
    is_integer,
    list_of,
    one_of,
    or_null,
    pair_of,
    range_of,
    three_of,
    up_to,
)
from graft.config.stage import STAGE


def _is_monitor(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"val/[\w-]+", value) is not None


def _is_watched(value: Any) -> bool:
    """Not oracle/acc, which is of the test labels of another domain."""
    return isinstance(value, str) and value.startswith(("val/", "train/"))


def _is_architecture(value: Any) -> bool:
    plain = (str, int, float, type(None))
    return (
        isinstance(value, dict)
        and isinstance(value.get("model_type"), str)
        and all(isinstance(v, plain) for v in value.values())
    )


AUGMENT: dict[str, Check] = {
    "shift": BELOW_ONE,
    "flip": PROBABILITY,
    "scale": or_null(range_of("two areas above 0 and up to 1, like [0.08, 1]", 1.0)),
    "ratio": range_of("two numbers above 0, like [0.75, 1.33]", float("inf")),
    "color": PROBABILITY,
    "grayscale": PROBABILITY,
    "erase": PROBABILITY,
    "mixup": NOT_NEGATIVE,
    "cutmix": NOT_NEGATIVE,
}
# `trainer.KEY`: the first are in configs/trainer, the rest may be added with `+`. Lightning's other
# arguments would be replaced by ours, or stop a run at its end.
TRAINER: dict[str, Check] = {
    "max_epochs": POSITIVE_INT,
    "accelerator": one_of("auto", "cpu", "gpu", "mps"),
    "devices": either(
        "auto, a whole number above 0, or a list of numbers of devices",
        one_of("auto", "-1"),
        POSITIVE_INT,
        list_of(NATURAL),
        ("", lambda v: is_integer(v) and v == -1),
    ),
    "num_nodes": POSITIVE_INT,
    "strategy": one_of("auto", "ddp", "fsdp"),
    "precision": (
        "one of auto, 32-true, bf16-mixed, 16-mixed",
        lambda v: (
            isinstance(v, str | int)
            and str(v) in ("auto", "32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")
        ),
    ),
    "compile": either(
        "true, false, default, reduce-overhead or max-autotune",
        BOOL,
        one_of("default", "reduce-overhead", "max-autotune"),
    ),
    "sync_batchnorm": BOOL,
    "gradient_clip_val": or_null(POSITIVE),
    "accumulate_grad_batches": POSITIVE_INT,
    "log_every_n_steps": POSITIVE_INT,
    "checkpoint_every_n_steps": or_null(POSITIVE_INT),
    "checkpoint_every_n_minutes": or_null(POSITIVE),
    "deterministic": either("true, false or warn", BOOL, one_of("warn")),
    "limit_train_batches": BATCHES,
    "limit_val_batches": BATCHES,
    "limit_test_batches": either(f"{BATCHES[0]}, or 0 for no test", BATCHES, NATURAL),
}
MORE_TRAINER: dict[str, Check] = {
    "benchmark": BOOL,
    "detect_anomaly": BOOL,
    "gradient_clip_algorithm": one_of("norm", "value"),
    "profiler": one_of("simple", "advanced", "pytorch"),
}

# Values by key; `*` stands for the name of a stage, a callback or a logger.
CHECKS: dict[str, Check] = {
    "name": or_null(("text", lambda v: is_integer(v) or TEXT[1](v))),
    "tags": TAGS,
    "seed": SEED,
    "mirror": BOOL,
    "paths": MAPPING,
    "paths.logs": FOLDER,
    "paths.data": FOLDER,
    "paths.cache": FOLDER,
    "data": OBJECT,
    "data.root": FOLDER,
    "data.batch_size": or_null(POSITIVE_INT),
    "data.eval_batch_size": POSITIVE_INT,
    "data.image_size": or_null(SIDE),
    "data.resize_size": or_null(SIDE),
    "data.length": or_null(POSITIVE_INT),
    "data.mask": FRACTION,
    "data.augment": or_null(OBJECT),
    **{f"data.augment.{key}": check for key, check in AUGMENT.items()},
    "data.sample_transform": or_null(OBJECT),
    "data.resident": one_of("auto", "on", "off"),
    "data.val_fraction": FRACTION,
    "data.test_fraction": FRACTION,
    "data.split_seed": SEED,
    "data.train_fraction": PART,
    "data.shots_per_class": or_null(POSITIVE_INT),
    "data.epoch_images": or_null(POSITIVE_INT),
    "data.drop_last": BOOL,
    "data.reshuffle": BOOL,
    "data.sampling": one_of("shuffled", "balanced", "importance", "hard"),
    "data.shift": or_null(one_of(*SHIFTS)),
    "data.severity": SEVERITY,
    "data.target": or_null(either("a folder, or some of shift, severity, source", TEXT, MAPPING)),
    "data.target.shift": or_null(one_of(*SHIFTS)),
    "data.target.severity": SEVERITY,
    "data.target.source": OBJECT,
    "data.oracle": BOOL,
    "data.num_workers": up_to(0, 256),
    "data.pin_memory": BOOL,
    "data.source": OBJECT,
    "backbone": OBJECT,
    "backbone.preprocessing": MAPPING,
    "backbone.preprocessing.resize_size": or_null(SIDE),
    "backbone.preprocessing.crop_size": or_null(SIDE),
    "backbone.preprocessing.mean": or_null(three_of("three numbers", NUMBER)),
    "backbone.preprocessing.std": or_null(three_of("three numbers above 0", POSITIVE)),
    "backbone.preprocessing.interpolation": or_null(one_of("bilinear", "bicubic")),
    "backbone.preprocessing.crop_mode": or_null(one_of("center", "squash")),
    "head": OBJECT,
    "head.dropout": BELOW_ONE,
    "head.norm": one_of("none", "standardize", "batchnorm"),
    "head.num_classes": or_null(POSITIVE_INT),
    "head.seed": or_null(SEED),
    "head.grid": or_null(("lists of lr, weight_decay and seed", MAPPING[1])),
    "head.grid.lr": or_null(list_of(POSITIVE)),
    "head.grid.weight_decay": or_null(list_of(NOT_NEGATIVE)),
    "head.grid.seed": or_null(list_of(SEED)),
    "optimizer": OBJECT,
    "optimizer.lr": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "scheduler": OBJECT,
    "trainer": MAPPING,
    **{f"trainer.{key}": check for key, check in {**TRAINER, **MORE_TRAINER}.items()},
    "task": OBJECT,
    "task.monitor": ("the name of a metric of validation, like val/acc", _is_monitor),
    "task.mode": one_of("max", "min"),
    "task.metrics": MAPPING,
    "task.metrics.*": OBJECT,
    "transfer": MAPPING,
    "transfer.stages": MAPPING,
    "transfer.stages.*": MAPPING,
    **{f"transfer.stages.*.{key}": check for key, check in STAGE.items()},
    **{f"transfer.stages.*.augment.{key}": check for key, check in AUGMENT.items()},
    "transfer.stages.*.optimizer.lr": POSITIVE,
    "transfer.stages.*.optimizer.weight_decay": NOT_NEGATIVE,
    "callbacks": or_null(MAPPING),
    "callbacks.*": or_null(OBJECT),
    "logger": or_null(MAPPING),
    "logger.*": or_null(OBJECT),
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
    "data.target": {"shift": TEXT, "severity": SEVERITY, "source": OBJECT},
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
_FOLDER = {"root": FOLDER, "cache": FOLDER, "on_error": one_of("fail", "skip")}
_IMAGES = {
    **_FOLDER,
    "background": or_null(TEXT),
    "value_range": or_null(pair_of("two numbers, like [0, 4095]", NUMBER)),
    "max_megapixels": POSITIVE,
}
_ADAM = {"betas": pair_of("two numbers of at least 0 and below 1", BELOW_ONE), "eps": POSITIVE}
_WEIGHTS = {
    "model": TEXT,
    "weights": or_null(("the name of an entry, a file or a run folder", TEXT[1])),
    "taps": or_null(either("all, or a list of names of blocks", TEXT, list_of(TEXT))),
    "pretrained": BOOL,
}
_CLASSIFICATION = {
    "loss": one_of("cross_entropy", "focal"),
    "gamma": NOT_NEGATIVE,
    "class_weights": or_null(
        either("balanced, or a number for each class", one_of("balanced"), list_of(POSITIVE))
    ),
    "label_smoothing": BELOW_ONE,
}
_PRETRAINING = {"probe": NATURAL}
_RESTORING = {**_PRETRAINING, "decoder_width": up_to(0, 10_000)}
ARGUMENTS: dict[str, dict[str, Check]] = {
    "graft.models.huggingface.huggingface_backbone": {
        **_WEIGHTS,
        "model": or_null(TEXT),
        "architecture": ("a config of transformers, with a model_type", _is_architecture),
        "tokenizer": or_null(("a file or a folder", TEXT[1])),
        "pooling": one_of("mean", "cls"),
        "dropout": or_null(BELOW_ONE),
    },
    "graft.data.sources.texts.TextTable": {**_FOLDER, "text": TEXT, "label": TEXT},
    "graft.data.sources.corpus.TextCorpus": {
        **_FOLDER,
        "held_out": FRACTION,
        "copies": POSITIVE_INT,
        "seed": SEED,
    },
    "graft.models.resnet_cifar.resnet_cifar": {
        **_WEIGHTS,
        "depth": up_to(8, 2000),
        "width": up_to(1, 10_000),
    },
    "graft.models.timm.timm_backbone": {**_WEIGHTS, "drop_path_rate": or_null(BELOW_ONE)},
    "graft.models.torchvision.torchvision_backbone": {
        **_WEIGHTS,
        "stochastic_depth_prob": BELOW_ONE,
    },
    "graft.data.sources.cifar.Cifar10": {**_FOLDER, "download": BOOL},
    "graft.data.sources.folder.ImageFolder": _IMAGES,
    "graft.data.sources.folder.UnlabelledFolder": _IMAGES,
    "graft.data.sources.table.ImageTable": {
        **_IMAGES,
        "table": TEXT,
        "columns": or_null(list_of(TEXT)),
    },
    "graft.data.sources.synthetic.Synthetic": {
        "classes": up_to(2, 100_000),
        "per_class": POSITIVE_INT,
        "test_per_class": POSITIVE_INT,
        "image_size": SIDE,
        "seed": SEED,
    },
    "graft.tasks.classification.Classification": _CLASSIFICATION,
    "graft.tasks.coral.Coral": {**_CLASSIFICATION, "weight": NOT_NEGATIVE},
    "graft.tasks.dann.Dann": {
        **_CLASSIFICATION,
        "weight": NOT_NEGATIVE,
        "hidden": up_to(1, 1_000_000),
    },
    "graft.tasks.multilabel.MultiLabel": {
        "pos_weight": or_null(
            either("balanced, or a number for each label", one_of("balanced"), list_of(POSITIVE))
        ),
    },
    "graft.tasks.regression.Regression": {"loss": one_of("mse", "l1", "huber")},
    "graft.tasks.denoising.Denoising": {**_RESTORING, "noise": NOT_NEGATIVE, "blur": NOT_NEGATIVE},
    "graft.tasks.masked.Masked": {
        **_RESTORING,
        "patch": POSITIVE_INT,
        "ratio": FRACTION,
        "normalise": BOOL,
    },
    "graft.tasks.barlow.Barlow": {
        **_PRETRAINING,
        "width": up_to(1, 100_000),
        "layers": up_to(1, 10),
        "redundancy": POSITIVE,
    },
    "graft.models.heads.CosineHead": {"scale": POSITIVE},
    "graft.models.heads.MLPHead": {"hidden": up_to(1, 1_000_000), "layers": up_to(0, 1000)},
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
        "monitor": ("a metric of val/ or train/", _is_watched),
        "mode": one_of("min", "max"),
        "patience": NATURAL,
        "min_delta": NUMBER,
    },
    "torch.optim.AdamW": _ADAM,
    "torch.optim.SGD": {"momentum": BELOW_ONE, "nesterov": BOOL},
    "torchvision.transforms.v2.RandAugment": {"num_ops": NATURAL, "magnitude": up_to(0, 30)},
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
