"""The config of a run with images that it was not trained on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from graft.config.overrides import config_folders, place, quote_paths, search_path
from graft.config.resolved import CONFIGS, check


def with_data(
    config: dict[str, Any], data: Sequence[str], command: Sequence[str] = ()
) -> dict[str, Any]:
    """A run's config with another source of images: their size and batches stay the run's.

    Args:
        data: see `Settings`.
        command: the run's overrides, whose folders of configs are used only if given in `data`.
    """
    from hydra import compose, initialize_config_dir

    name, *given = data
    overrides = quote_paths(given)
    folders = [CONFIGS, *config_folders(overrides)]
    options = {path.stem for folder in folders for path in (folder / "data").glob("*.yaml")}
    groups = sorted(options - {"base"})
    if name in groups:
        overrides.insert(0, f"data={name}")
    elif place(name).is_dir():
        overrides = ["data=image_folder", "data.root=below", *overrides]
    else:
        hint = "".join(
            f"; to look where the run did, add {shlex.quote(o)}" for o in search_path(command)
        )
        raise ValueError(f"--data {name}: neither a folder nor one of {', '.join(groups)}{hint}")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = check(compose("train", overrides))
    source = composed["data"]["source"]
    if name not in groups:
        source |= {
            "_target_": "graft.data.sources.folder.EvalFolder",
            "root": str(place(name)),
        }
    keys = [override.lstrip("+").partition("=")[0].split(".") for override in overrides]
    changed = {key[1]: composed["data"][key[1]] for key in keys if key[0] == "data" and key[1:]}
    # Its training images are not used: they need not be as many as the run's.
    any_number = {"batch_size": 1, "train_fraction": 1.0, "shots_per_class": None}
    shift = {k: composed["data"][k] for k in ("shift", "severity") if k in composed["data"]}
    of_training = {"sampling": "shuffled", "target": None, "oracle": False}
    own = {**config["data"], **shift, **changed, **any_number, **of_training, "source": source}
    return {**config, "data": own, "paths": composed["paths"]}


def read_alike(
    source: dict[str, Any], own: Mapping[str, Any], value_range: Sequence[float] | None
) -> None:
    """Let other images be read as those that a run was trained on, where nothing else is said.

    Args:
        source, own: arguments of the other images' source, and of the run's.
        value_range: what the run found black and white.
    """
    if source.get("background", ...) is None:
        source["background"] = own.get("background")
    if source.get("value_range", ...) is None and value_range is not None:
        source["value_range"] = list(value_range)
