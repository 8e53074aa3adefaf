"""Values of a config that are fine alone and not together; found before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graft.config.overrides import is_path

DANN = "graft.tasks.dann.Dann"
TWO_STREAMS = ("graft.tasks.coral.Coral", DANN)
IMAGE_FOLDER = "graft.data.sources.folder.ImageFolder"
PRETRAIN_BERT = "graft.tasks.pretrain_bert.PretrainBert"
PRETRAINING = {
    f"graft.tasks.{name}.{name.capitalize()}": name for name in ("denoising", "masked", "barlow")
}
UNLABELLED_FOLDER = "graft.data.sources.folder.UnlabelledFolder"
FEATURES = "graft.models.heads.FeaturesHead"
MOVES = ("shift", "flip", "scale", "color", "grayscale", "erase")  # what makes views differ
PACKAGES = {"graft.reporting.trackers.WandB": "wandb", "graft.reporting.trackers.MLFlow": "mlflow"}

# Callbacks of Lightning's that have no place in a run, and what has.
_OWN_PROGRESS = "a run prints its own progress"
REFUSED_CALLBACKS = {
    "ModelCheckpoint": "a run keeps best.ckpt and last.ckpt: see trainer.checkpoint_every_n_steps",
    "OnExceptionCheckpoint": "last.ckpt is there already, for `graft resume`",
    "LearningRateFinder": "sweep it: -m optimizer.lr=0.001,0.01,0.1",
    "BatchSizeFinder": "set data.batch_size",
    "BaseFinetuning": "what learns when is a transfer plan: see transfer=gradual",
    "BackboneFinetuning": "what learns when is a transfer plan: see transfer=gradual",
    "ModelPruning": "it cannot handle convolutions in the memory format that is fast",
    "ProgressBar": _OWN_PROGRESS,
    "RichProgressBar": _OWN_PROGRESS,
    "TQDMProgressBar": _OWN_PROGRESS,
}


def conflict(plain: dict[str, Any]) -> str | None:
    """The first conflict in a resolved config, in one line."""
    return (
        _stage_problem(plain)
        or _grid_problem(plain)
        or _task_problem(plain)
        or _target_problem(plain)
        or _pretraining_problem(plain)
        or _solver_problem(plain)
        or _batchnorm_problem(plain)
        or _augment_problem(plain)
        or _sharding_problem(plain)
        or _logger_problem(plain)
        or _callback_problem(plain)
    )


def missing_path(plain: dict[str, Any]) -> str | None:
    """The first path of a new run that there is not; data that is downloaded need not be there."""
    source, weights = plain["data"]["source"], plain["backbone"].get("weights")
    target = plain["data"].get("target")
    if isinstance(target, str) and not Path(target).is_dir():
        return f"data.target={target}: no such folder; class folders of the other domain go there"
    folders = (IMAGE_FOLDER, UNLABELLED_FOLDER)
    if source["_target_"] in folders and not Path(source["root"]).is_dir():
        return f"{source['root']}: no such folder; data.root= says where the images are"
    if is_path("backbone.weights", weights) and not Path(weights).exists():
        return f"backbone.weights={weights}: neither a file nor a run folder of graft"
    return None


def without_effect(plain: dict[str, Any], overrides: Sequence[str]) -> str | None:
    """The first override of a single run that nothing acts on. (Of a sweep, another job may.)"""
    named = plain["transfer"]["stages"]
    stages = named.values()
    augments = any(
        stage.get("augment", True) is not False or isinstance(stage.get("views"), int)
        for stage in stages
    )
    solved = all(stage.get("solver", "sgd") != "sgd" for stage in stages)
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.startswith("data.augment.") and not augments:
            return (
                f"{override}: no stage of this plan augments its images: set "
                f"transfer.stages.{next(iter(named))}.augment=true"
            )
        if key == "data.severity" and plain["data"].get("shift") is None:
            return f"{override}: there is no data.shift"
        if key == "data.sampling" and solved and not override.endswith("=shuffled"):
            return f"{override}: this plan solves for its head on each image once"
        if key.startswith(("optimizer.lr", "scheduler.")) and solved:
            return f"{override}: this plan solves for its head, without steps"
        match key.split("."):
            case ["optimizer" | "scheduler" as part, option, *_] if len(
                _with_own(plain, part, option)
            ) == len(named):
                return f"{override}: every stage of this plan has its own ({', '.join(named)})"
            case ["transfer", "stages", name, "optimizer", option] if (
                named.get(name, {}).get(option) is not None
            ):
                own = f"transfer.stages.{name}.{option}"
                return f"{override}: {own} is set too and comes first: change that one"
    return None


def reaching_some(plain: dict[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    """What is to be said of overrides that some stages of the plan have their own value for."""
    for override in overrides:
        match override.lstrip("+").partition("=")[0].split("."):
            case ["optimizer" | "scheduler" as part, option] if own := _with_own(
                plain, part, option
            ):
                yield f"{override} does not reach {', '.join(own)}: a value of its own comes first"


def _with_own(plain: dict[str, Any], part: str, option: str) -> list[str]:
    """The stages that take no notice of an option of the run's optimizer or scheduler."""
    stages, grid = plain["transfer"]["stages"], plain["head"].get("grid") or {}
    of_grid = next(iter(stages)) if part == "optimizer" and grid.get(option) else None
    return [n for n, stage in stages.items() if n == of_grid or _has_own(stage, part, option)]


def _has_own(stage: dict[str, Any], part: str, option: str) -> bool:
    """Whether a stage takes no notice of an option of the run's optimizer or scheduler."""
    own = stage.get(part) or {}
    if part == "optimizer" and option in ("lr", "weight_decay"):
        return stage.get(option) is not None or own.get(option) is not None
    return option in own or "_target_" in own


def _stage_problem(plain: dict[str, Any]) -> str | None:
    """What contradicts itself within a stage, or would do nothing."""
    for name, stage in plain["transfer"]["stages"].items():
        key = f"transfer.stages.{name}"
        if stage.get("trainable", "all") != "head":
            if stage.get("lora") and stage.get("l2_sp"):
                return f"{key}.l2_sp: adapters of lora leave the pretrained weights as they are"
            continue
        if not stage.get("train_head", True):
            return f"{key}: trainable=head and train_head=false: nothing would learn"
        for option in ("lora", "l2_sp"):
            if stage.get(option):
                return f"{key}.{option} is about the backbone, and trainable=head freezes that"
    return None


def _augment_problem(plain: dict[str, Any]) -> str | None:
    """What a user set and no stage would act on."""
    stages = plain["transfer"]["stages"]
    known = [key for key in plain["data"].get("augment") or {} if key != "_target_"]
    for name, stage in stages.items():
        own = stage.get("augment", True)
        if known and isinstance(own, dict) and (unknown := own.keys() - known):
            return f"no key {min(unknown)} in transfer.stages.{name}.augment: {', '.join(known)}"
        views = stage.get("views", "none")
        if views != "none" and stage.get("augment", True) is not False:
            return (
                f"transfer.stages.{name}.views={views} takes the place of fresh augmentation: set "
                f"transfer.stages.{name}.augment=false"
            )
        if isinstance(views, int) and plain["data"].get("augment") is None:
            return f"transfer.stages.{name}.views={views}: data.augment is null, all would be equal"
    if plain["data"].get("sample_transform") is not None and not any(
        stage.get("augment", True) is not False for stage in stages.values()
    ):
        return "data.sample_transform: no stage of this plan augments, so it would do nothing"
    return None


def _grid_problem(plain: dict[str, Any]) -> str | None:
    """What keeps a grid of heads from being the same heads, each trained alone."""
    head = plain["head"]
    grid = head.get("grid")
    if grid is None:
        return None
    for key, values in grid.items():
        if values and len(set(values)) < len(values):
            return f"head.grid.{key}={values}: a value is there twice"
    name, stage = next(iter(plain["transfer"]["stages"].items()))
    if stage.get("trainable", "all") != "head":
        return (
            f"head.grid: the first stage, {name}, trains more than the head, and heads can't share "
            "that: use transfer=linear_probe, or a plan that starts with trainable: head"
        )
    if plain["task"]["_target_"] == PRETRAIN_BERT:
        return "head.grid: task=pretrain_bert trains one head: set head.grid=null"
    if stage.get("solver", "sgd") != "sgd":
        return f"head.grid: transfer.stages.{name}.solver={stage['solver']} solves for one head"
    own = stage.get("augment", True)
    augment = {**(plain["data"].get("augment") or {}), **(own if isinstance(own, dict) else {})}
    if own is not False and (augment.get("mixup") or augment.get("cutmix")):
        return "head.grid: knows hard labels: set data.augment.mixup=0 and data.augment.cutmix=0"
    if plain["trainer"].get("gradient_clip_val") is not None:
        return "head.grid: trainer.gradient_clip_val takes a norm over all heads: set it to null"
    if str(plain["trainer"].get("precision")).startswith("16"):
        return (
            "head.grid: in trainer.precision=16-mixed one diverging head rescales the loss of all: "
            "use trainer.precision=auto"
        )
    if head.get("dropout"):
        return (
            f"head.dropout={head['dropout']}: heads of a grid would draw other masks than alone: "
            "set it to 0, or head.grid=null"
        )
    return None


def _task_problem(plain: dict[str, Any]) -> str | None:
    task = plain["task"]
    for name, stage in plain["transfer"]["stages"].items():
        if stage.get("label_smoothing") is not None and "label_smoothing" not in task:
            return f"transfer.stages.{name}.label_smoothing: this task has none"
    measured = task["monitor"].rpartition("/")[2]
    if task["mode"] == "min" and measured in ("acc", "f1", "exact", "r2", "masked_acc", "snd"):
        return f"task.monitor={task['monitor']}: larger is better: set task.mode=max"
    if task["mode"] == "max" and (
        measured in ("mae", "rmse", "entropy") or measured.endswith("loss")
    ):
        return f"task.monitor={task['monitor']}: smaller is better: set task.mode=min"
    return None


def _target_problem(plain: dict[str, Any]) -> str | None:
    """What needs a second domain where there is none, and what makes no use of one."""
    data, task, stages = plain["data"], plain["task"], plain["transfer"]["stages"]
    adapts = task["_target_"] in TWO_STREAMS
    target = data.get("target")
    if target is None:
        wanting = {
            f"task={task['_target_'].rpartition('.')[2].lower()}": adapts,
            f"task.monitor={task['monitor']}": task["monitor"] in ("val/snd", "val/entropy"),
            "data.sampling=importance": data.get("sampling") == "importance",
            "data.oracle=true": data.get("oracle"),
            **{f"transfer.stages.{n}.adabn=true": s.get("adabn") for n, s in stages.items()},
        }
        first = next((option for option, wants in wanting.items() if wants), None)
        return first and f"{first}: there is no second domain: set data.target=FOLDER"
    if isinstance(target, dict) and not (target.get("shift") or target.get("source")):
        return "data.target: neither a shift nor a source: it would be the training data itself"
    if isinstance(target, dict) and "severity" in target and not target.get("shift"):
        return f"data.target.severity={target['severity']}: there is no data.target.shift"
    if not adapts:
        return None
    if all(stage.get("trainable", "all") == "head" for stage in stages.values()):
        return f"task={task['_target_']}: adapts a backbone, and no stage of this plan trains one"
    if plain["head"].get("grid"):
        return f"head.grid: task={task['_target_']} trains one head: set head.grid=null"
    for stage in stages.values():
        own = stage.get("augment", True)
        augment = {**(data.get("augment") or {}), **(own if isinstance(own, dict) else {})}
        if own is not False and (augment.get("mixup") or augment.get("cutmix")):
            return "data.augment.mixup and cutmix mix labels, and images of data.target have none"
    return None


def _pretraining_problem(plain: dict[str, Any]) -> str | None:
    """What a task without labels cannot use, and what the others cannot do without."""
    data, head, task = plain["data"], plain["head"], plain["task"]
    name, own = PRETRAINING.get(task["_target_"]), head["_target_"] == FEATURES
    unlabelled = data["source"]["_target_"] == UNLABELLED_FOLDER
    if name is None and unlabelled:
        return "data=unlabelled_folder: has no classes to learn: use data=image_folder"
    if unlabelled and task.get("probe"):
        return f"task.probe={task['probe']}: these images have no classes: set task.probe=0"
    if name is None:
        return "head=features: gives no outputs: it is for self-supervised tasks" if own else None
    key = f"task={name}"
    if not own:
        return f"{key}: has a decoder or projector of its own: set head=features"
    for option, wants in (
        ("shots_per_class", data.get("shots_per_class") is not None),
        ("sampling", data.get("sampling") in ("balanced", "hard")),
    ):
        if wants:
            return f"data.{option}: {key} sees no classes: use data.train_fraction"
    if data.get("oracle") or any(s.get("adabn") for s in plain["transfer"]["stages"].values()):
        return f"{key}: data.oracle and adabn are for classifiers: leave them out"
    if data.get("target") is not None and data.get("sampling") != "importance":
        return f"{key}: makes no use of data.target: set it to null"
    if task["monitor"] == "val/probe_acc" and (task.get("probe") != 1 or task["mode"] != "max"):
        return "task.monitor=val/probe_acc: set task.probe=1 and task.mode=max too"
    if plain["mirror"]:
        return f"mirror=true: {key} has no features to average"
    for stage, options in plain["transfer"]["stages"].items():
        place = f"transfer.stages.{stage}"
        if options.get("trainable", "all") != "all":
            return f"{place}.trainable: {key} trains the whole backbone: set it to all"
        if options.get("cache") == "on" or options.get("views", "none") != "none":
            return f"{place}: {key} has no frozen features to store: leave cache and views out"
        augment = options.get("augment", True)
        used = {**(data.get("augment") or {}), **(augment if isinstance(augment, dict) else {})}
        if augment is not False and (used.get("mixup") or used.get("cutmix")):
            return f"{key}: knows no labels to mix: set data.augment.mixup=0 and cutmix=0"
        if name == "barlow" and (augment is False or not any(used.get(k) for k in MOVES)):
            return f"{key}: two views of an image would be equal: {place} must augment"
    if name == "barlow" and data.get("sample_transform") is not None:
        return f"{key}: data.sample_transform would be drawn once for both views: use data.augment"
    return None


def _solver_problem(plain: dict[str, Any]) -> str | None:
    head = plain["head"]
    for name, stage in plain["transfer"]["stages"].items():
        if (solver := stage.get("solver", "sgd")) == "sgd":
            continue
        key = f"transfer.stages.{name}.solver={solver}"
        if stage.get("trainable", "all") != "head":
            return f"{key}: solves for a head alone: set transfer.stages.{name}.trainable=head"
        if head["_target_"] != "graft.models.heads.LinearHead":
            return f"{key}: solves for a linear head: use head=linear, or solver=sgd"
        if stage.get("cache", "auto") == "off":
            return f"{key}: needs stored features: set transfer.stages.{name}.cache=on"
        if head.get("dropout"):
            return f"{key}: knows no dropout: set head.dropout=0"
        if plain["task"]["_target_"] != "graft.tasks.classification.Classification":
            return f"{key}: solves for classes: use solver=sgd, or task=classification"
        if plain["task"].get("class_weights") or plain["task"].get("loss") == "focal":
            return f"{key}: knows no class weights and no focal loss: use solver=sgd"
        if solver == "ridge" and plain["task"]["monitor"] != "val/acc":
            return f"{key}: chooses its strength by accuracy: set task.monitor=val/acc"
        if head.get("norm") == "batchnorm":
            return f"{key}: knows no batches: set head.norm=standardize or none"
    return None


def _batchnorm_problem(plain: dict[str, Any]) -> str | None:
    if plain["head"].get("norm") == "batchnorm" and plain["data"].get("batch_size") == 1:
        return "head.norm=batchnorm: one image has no statistics: use data.batch_size=2 or more"
    return None


def _sharding_problem(plain: dict[str, Any]) -> str | None:
    """What works on whole weights, where each device has a part of them."""
    trainer = plain["trainer"]
    if trainer.get("strategy") != "fsdp":
        return None
    if (task := plain["task"]["_target_"]) in (PRETRAIN_BERT, DANN, *PRETRAINING):
        return (
            f"{task}: has weights of its own, which trainer=fsdp would not share: use trainer=ddp"
        )
    for name, stage in plain["transfer"]["stages"].items():
        for option in ("l2_sp", "ema", "adabn"):
            if stage.get(option) and stage.get("trainable", "all") != "head":
                return (
                    f"transfer.stages.{name}.{option}: needs whole weights on each device, and "
                    "trainer=fsdp has parts of them: use trainer=ddp"
                )
    if trainer.get("compile"):
        return (
            "trainer.compile: blocks that trainer=fsdp has put together again are not compiled any "
            "more: set it to false"
        )
    if str(trainer.get("precision")).startswith("16"):
        return (
            f"trainer.precision={trainer['precision']}: with trainer=fsdp each device would scale "
            "the loss on its own: use bf16-mixed"
        )
    return None


def _logger_problem(plain: dict[str, Any]) -> str | None:
    for logger in (plain.get("logger") or {}).values():
        package = PACKAGES.get((logger or {}).get("_target_", ""))
        if package and find_spec(package) is None:
            return f"logger={package} needs another package: pip install 'graft[{package}]'"
    return None


def _callback_problem(plain: dict[str, Any]) -> str | None:
    for key, callback in (plain.get("callbacks") or {}).items():
        library, _, name = str((callback or {}).get("_target_")).rpartition(".")
        if library.startswith("lightning.") and name in REFUSED_CALLBACKS:
            return f"callbacks.{key}: {name} is not used here: {REFUSED_CALLBACKS[name]}"
    return None
