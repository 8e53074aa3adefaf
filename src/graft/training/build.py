"""From a resolved config to the objects of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from graft.config.checks import nodes
from graft.config.conflicts import REFUSED_CALLBACKS
from graft.config.objects import bind, built, find, make
from graft.config.renamed import current_name
from graft.data.datamodule import TransferDataModule
from graft.data.items import SplitRecord
from graft.data.sources.base import Source
from graft.data.sources.target import build_source
from graft.models.backbone import Backbone
from graft.models.heads import Head, seeded_head
from graft.plan.grid import Grid
from graft.plan.lora import LoRA
from graft.plan.stage import Stage
from graft.training.module import TransferModule
from graft.transforms.images import ImageInputs


def build(
    config: dict[str, Any],
    *,
    pretrained: bool = True,
    recorded: SplitRecord | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> tuple[TransferModule, TransferDataModule]:
    """Module and data of a config; the data is prepared, so sizes and classes are known.

    Args:
        pretrained: False where a checkpoint is loaded next: see `build_backbone`.
        recorded: the splits of the run that the config is of, if it has begun.
        classes: those of the run, where the data may have a part of them, or another order.
        preprocessing: that of the checkpoint, which may have it from weights that are gone.
    """
    backbone = build_backbone(config["backbone"], pretrained=pretrained, recorded=preprocessing)
    # `root` is in the group for the command line; only the source takes it.
    data = {k: v for k, v in config["data"].items() if k not in ("source", *TAKEN_OUT["data"])}
    source: Any = build_source(config["data"], config["paths"]["cache"])
    own = {key: data.pop(key) for key in inputs_options(source) if key in data}
    if not isinstance(backbone.preprocessing, source.inputs.takes):
        raise ValueError(
            f"{type(source).__name__} has rows for {source.inputs.__name__}, which this backbone "
            "does not take: choose another backbone= or data="
        )
    if config["mirror"] and not issubclass(source.inputs, ImageInputs):
        raise ValueError("mirror=true: these inputs are no images, and have no mirror image")
    inputs = source.inputs(backbone.preprocessing, **built(own))
    stages = config["transfer"]["stages"].values()
    datamodule = make(
        data,
        source=source,
        inputs=inputs,
        stage_sizes=[stage["image_size"] for stage in stages if stage.get("image_size")],
        seed=config["seed"],
        recorded=recorded,
    )
    datamodule.processes = processes(config["trainer"])
    datamodule.sees_labels = not getattr(find(config["task"]["_target_"]), "pretrains", False)
    datamodule.prepare_data()
    datamodule.setup()
    if classes is not None:
        datamodule.number_classes(classes)
    wanted = config["head"].get("num_classes")
    if wanted not in (None, datamodule.num_classes):
        raise ValueError(
            f"head.num_classes={wanted}, but the data has {datamodule.num_classes} classes "
            f"({', '.join(datamodule.classes[:5])}, ...): leave it null to follow the data"
        )
    return build_module(config, backbone, datamodule.num_classes), datamodule


def build_module(config: dict[str, Any], backbone: Backbone, num_outputs: int) -> TransferModule:
    backbone.mirror = config["mirror"]
    head = seeded_head(bind_head(config), (backbone.num_features, num_outputs), head_seed(config))
    task = make(config["task"])
    task.build(num_outputs, backbone)
    return TransferModule(backbone, head, task)


def processes(trainer: dict[str, Any]) -> int:
    """How many of them train a run, each on batches of its own."""
    devices = trainer["devices"]
    if devices in ("auto", -1, "-1"):
        there = 1 if trainer["accelerator"] == "cpu" else torch.cuda.device_count()
    else:
        there = len(devices) if isinstance(devices, list) else int(devices)
    return max(1, there) * int(trainer.get("num_nodes", 1))


def inputs_options(source: Any) -> list[str]:
    """Which options of `data` are for the inputs of its source."""
    return [*inspect.signature(getattr(source, "inputs", Source.inputs)).parameters][1:]


TAKEN_OUT = {  # before a class is called
    "data": ("root", "shift", "severity", "target", "oracle"),
    "head": ("num_classes", "seed", "grid"),
    "backbone": ("preprocessing",),
}


def check_arguments(config: dict[str, Any]) -> None:
    """That each class can be imported and takes the arguments it is given, before data is read.

    Raises:
        ValueError: it cannot, or does not.
    """
    for key, node in reversed([*nodes(config)]):  # sources before `data`, which asks them
        if not isinstance(node, dict) or "_target_" not in node:
            continue
        name = node["_target_"]
        try:
            found = find(name)
        except ValueError as error:
            raise ValueError(f"{key}._target_={name}: {_import_problem(name)}") from error
        if isinstance(found, type) and issubclass(found, OnExceptionCheckpoint):
            # With one, Lightning starts each stage from whatever file it has left.
            raise ValueError(
                f"{key}: a kind of OnExceptionCheckpoint, which is not used here: "
                f"{REFUSED_CALLBACKS['OnExceptionCheckpoint']}"
            )
        try:
            parameters = inspect.signature(found).parameters
        except ValueError:  # written in C: it does not say what it takes
            continue
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        own = [name for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL]
        if key == "data":
            own += inputs_options(find(node["source"]["_target_"]))
        for argument in node:
            hydras = str(argument).startswith("_")
            if not hydras and argument not in (*own, *TAKEN_OUT.get(key, ())):
                raise ValueError(
                    f"{key}.{argument}: {name.rpartition('.')[2]} takes no such argument; it takes "
                    f"{', '.join(own)}"
                )


def _import_problem(name: str) -> str:
    package = name.partition(".")[0]
    if (now := current_name(name)) != name:
        return f"it is called {now} now"
    if find_spec(package) is None:
        return (
            f"no package or file {package} is found: if {package}.py is yours, add its folder to "
            "the environment variable PYTHONPATH (PYTHONPATH=. for this one)"
        )
    return f"{package} is there, and importing that of it fails"


def build_backbone(
    config: dict[str, Any],
    *,
    pretrained: bool = True,
    recorded: Mapping[str, Any] | None = None,
) -> Backbone:
    """Without `pretrained`, a backbone that can do without its weights neither downloads nor reads
    them; its preprocessing stays theirs.

    Args:
        recorded: the preprocessing in a checkpoint that is loaded next. A backbone whose
            architecture is part of it is built from that.
    """
    builder = bind({key: value for key, value in config.items() if key != "preprocessing"})
    takes = inspect.signature(builder).parameters
    options: dict[str, Any] = {}
    if not pretrained and "pretrained" in takes:
        options["pretrained"] = False
    if recorded is not None and "recorded" in takes:
        options["recorded"] = recorded
    backbone = builder(**options)
    for own in (config.get("preprocessing"), recorded):
        backbone.preprocessing = backbone.preprocessing.with_own(own or {})
    return backbone


def bind_head(config: dict[str, Any]) -> Callable[[int, int], Head]:
    """The config's head, to be called with (num_features, num_classes)."""
    ours = ("num_classes", "seed", "grid")
    return bind({key: value for key, value in config["head"].items() if key not in ours})


def head_seed(config: dict[str, Any]) -> int:
    seed = config["head"].get("seed")
    return config["seed"] if seed is None else seed


def build_stages(config: dict[str, Any]) -> list[Stage]:
    """The plan's stages in order.

    `lr` and `weight_decay` are the stage's, or else its own optimizer's, or else the run's.
    """
    lists = config["head"].get("grid")
    stages: list[Stage] = []
    for name, values in config["transfer"]["stages"].items():
        values = dict(values)
        optimizer = _own_or_run(values.pop("optimizer", None), config["optimizer"])
        schedule = _own_or_run(values.pop("scheduler", None), config["scheduler"])
        for key in ("lr", "weight_decay"):
            choices = (values.get(key), optimizer.pop(key, None), config["optimizer"][key])
            values[key] = next(value for value in choices if value is not None)
        if lists is not None and not stages:  # the winner is the head of the stages that follow
            given = {"lr": values["lr"], "weight_decay": values["weight_decay"]}
            given["seed"] = head_seed(config)
            values["grid"] = Grid(
                bind_head(config), **{key: lists.get(key) or [own] for key, own in given.items()}
            )
        try:
            if values.get("lora"):
                values["lora"] = LoRA(**values["lora"])
            stages.append(
                Stage(
                    name=name,
                    optimizer=bind(optimizer),
                    schedule=bind(schedule),
                    **values,
                )
            )
        except TypeError as error:
            raise ValueError(f"transfer.stages.{name}: {error}") from error
    return stages


def _own_or_run(own: dict[str, Any] | None, run: dict[str, Any]) -> dict[str, Any]:
    """A stage's own optimizer or scheduler; without a `_target_`, the run's with these changes."""
    own = own or {}
    return dict(own) if "_target_" in own else {**run, **own}  # others take other arguments


def check_optimizers(stages: Sequence[Stage]) -> None:
    """Raises a ValueError for what an optimizer or schedule refuses, before data is read."""
    for stage in stages:
        if stage.solver != "sgd" or stage.grid is not None:  # these call none
            continue
        try:
            part = "optimizer"
            stage.optimizer([torch.nn.Parameter(torch.zeros(1))], lr=stage.lr)
            part = "scheduler"
            stage.schedule(0, 1)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{part} of transfer.stages.{stage.name}: {error}") from error
