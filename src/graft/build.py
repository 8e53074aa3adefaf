"""From a resolved config to the objects of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from graft.backbones.base import Backbone
from graft.config import bind, make
from graft.data.datamodule import TransferDataModule
from graft.heads import Head, seeded_head
from graft.module import TransferModule
from graft.transfer.grid import Grid
from graft.transfer.lora import LoRA
from graft.transfer.stages import Stage


def build(
    config: dict[str, Any], *, pretrained: bool = True
) -> tuple[TransferModule, TransferDataModule]:
    """Module and data of a config; the data is prepared, so sizes and classes are known.

    Args:
        pretrained: False where a checkpoint is loaded next: see `build_backbone`.
    """
    backbone = build_backbone(config["backbone"], pretrained=pretrained)
    backbone.mirror = config["mirror"]
    # `root` is in the group for the command line; only the source takes it.
    data = {key: value for key, value in config["data"].items() if key != "root"}
    stages = config["transfer"]["stages"].values()
    datamodule = make(
        data,
        preprocessing=backbone.preprocessing,
        stage_sizes=[stage["image_size"] for stage in stages if stage.get("image_size")],
        seed=config["seed"],
    )
    datamodule.prepare_data()
    datamodule.setup()
    wanted = config["head"].get("num_classes")
    if wanted not in (None, datamodule.num_classes):
        raise ValueError(
            f"head.num_classes={wanted}, but the data has {datamodule.num_classes} classes "
            f"({', '.join(datamodule.classes[:5])}, ...): leave it null to follow the data"
        )
    head = seeded_head(
        bind_head(config), (backbone.num_features, datamodule.num_classes), head_seed(config)
    )
    module = TransferModule(
        backbone, head, datamodule.num_classes, label_smoothing=config["label_smoothing"]
    )
    return module, datamodule


def build_backbone(config: dict[str, Any], *, pretrained: bool = True) -> Backbone:
    """Without `pretrained`, a backbone that can do without its weights neither downloads nor reads
    them; its preprocessing stays theirs.
    """
    builder = bind(config)
    if not pretrained and "pretrained" in inspect.signature(builder).parameters:
        return builder(pretrained=False)
    return builder()


def bind_head(config: dict[str, Any]) -> Callable[[int, int], Head]:
    """The config's head, to be called with (num_features, num_classes)."""
    ours = ("num_classes", "seed", "grid")
    return bind({key: value for key, value in config["head"].items() if key not in ours})


def head_seed(config: dict[str, Any]) -> int:
    seed = config["head"].get("seed")
    return config["seed"] if seed is None else seed


def build_stages(config: dict[str, Any]) -> list[Stage]:
    """The plan's stages in order; what a stage leaves null comes from the optimizer's config."""
    lists = config["head"].get("grid")
    stages: list[Stage] = []
    for name, values in config["transfer"]["stages"].items():
        values = dict(values)
        optimizer = dict(config["optimizer"])
        own = values.pop("optimizer", None) or {}
        if "_target_" in own:  # another optimizer takes other arguments
            optimizer = {"lr": optimizer["lr"], "weight_decay": optimizer["weight_decay"]}
        optimizer |= own
        for key in ("lr", "weight_decay"):
            if values.get(key) is None:
                values[key] = optimizer[key]
            optimizer.pop(key, None)
        schedule = values.pop("scheduler", None) or config["scheduler"]
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
