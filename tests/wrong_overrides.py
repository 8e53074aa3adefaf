"""Prints, as JSON, what `graft train` says to a few hundred wrong overrides; in a process of its
own, since torch must not be imported for it.

Each key of some configs gets values that its own value shows to be wrong: other types, numbers that
are not finite, a group of keys in place of a value, no value.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from graft.config.checks import nodes
from graft.config.resolved import CONFIGS, check, explain
from graft.sweeps.compose import Composer

BASES = [
    ["callbacks=early_stopping"],
    [
        "data=cifar10", "backbone=resnet18", "head=mlp", "transfer=linear_probe", "optimizer=adamw",
        "scheduler=cosine", "sample_transform=none", "head.grid={lr:[0.1],weight_decay:[0]}",
    ],
    ["data=synthetic", "backbone=convnext_tiny", "head=cosine", "transfer=lora", "logger=csv"],
    ["sample_transform=rand_augment", "scheduler=constant"],
]  # fmt: skip
WRONG: dict[type, list[str]] = {
    bool: ["abc", "{zz:1}"],
    int: ["abc", "inf", "-7", "{zz:1}"],
    float: ["abc", "nan", "-7", "{zz:1}"],
    str: ["[[1]]", "{zz:1}"],
    list: ["abc", "[nan,1]", "true"],
    dict: ["true"],
    type(None): ["true", "{zz:1}"],
}
DELETED = ["seed", "data.source", "backbone._target_", "optimizer.lr", "trainer.precision"]
# What a group of keys may take besides: a plan's stage may set some arguments of the optimizer and
# the scheduler, which these check themselves.
RIGHT = [f"transfer.stages.STAGE.{part}={{zz:1}}" for part in ("optimizer", "scheduler")]


def wrong_overrides(config: Any) -> Iterator[str]:
    for key, value in nodes(config):
        for wrong in WRONG[type(value)]:
            yield f"{key}={wrong}"
    yield from (f"~{key}" for key in DELETED)


def main() -> None:
    said: dict[str, str] = {}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for base in BASES:
            composer = Composer(loader, loader.load_configuration("train", base, RunMode.RUN))
            config = composer.compose(base)
            del config.hydra
            for override in wrong_overrides(OmegaConf.to_container(config, resolve=True)):
                if override in said or re.sub(r"(stages)\.\w+", r"\1.STAGE", override) in RIGHT:
                    continue
                sys.argv[1:] = [*base, override]
                try:
                    config = composer.compose([*base, override])
                    del config.hydra
                    check(config)
                except Exception as error:
                    said[override] = explain(error)
                else:
                    said[override] = ""
    assert "torch" not in sys.modules
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
