"""What `graft train OVERRIDES` is to run: composed and checked, before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import DictConfig, open_dict

from graft.config.conflicts import missing_path, without_effect
from graft.config.overrides import config_folders, place, quote_paths, quoted, whole_command
from graft.config.resolved import CONFIGS, check, chosen_options, explain
from graft.config.words import did_you_mean


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        config: resolved, as plain values.
        overrides: they mean the same in any folder.
        choices: the option of each config group.
    """

    config: dict[str, Any]
    overrides: list[str]
    choices: dict[str, str | None]

    @classmethod
    def of(cls, config: DictConfig, hydra: Any) -> Job:
        """What a composed config describes.

        Args:
            hydra: Hydra's own config.

        Raises:
            ValueError: it cannot be run, or not all of it would count.
        """
        plain = check(config)
        overrides = whole_command(hydra, hydra.overrides.task)
        if problem := without_effect(plain, overrides) or missing_path(plain):
            raise ValueError(problem)
        return cls(plain, overrides, chosen_options(hydra.runtime.choices))


def compose_job(overrides: Sequence[str]) -> Job:
    """What the command would run; Hydra's state in this process stays as it is.

    Raises:
        ValueError: the command's own line for what is wrong.
    """
    with _own_hydra():
        try:
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                config = compose("train", quote_paths(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(config)  # for ${hydra:...} in configs of one's own
            hydra = config.hydra
            with open_dict(config):
                del config["hydra"]
            return Job.of(config, hydra)
        except HydraException as error:
            raise ValueError(explain(error, overrides)) from None


def data_overrides(data: str | Path, own: Sequence[str] = ()) -> list[str]:
    """What `graft train` takes for a folder of class folders, or the name of a config of data.

    Args:
        own: overrides that name folders with configs.

    Raises:
        ValueError: it is neither.
    """
    folders = [CONFIGS, *config_folders(own)]
    names = {path.stem for folder in folders for path in (folder / "data").glob("*.yaml")}
    known = sorted(names - {"base"})
    if isinstance(data, str) and data in known:
        return [f"data={data}"]
    if place(data).is_dir():
        return ["data=image_folder", quoted("data.root", str(data))]
    hint = did_you_mean(str(data), known) or f"; configs of data: {', '.join(known)}"
    raise ValueError(f"data={data}: neither a folder nor a config of data{hint}")


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra as if nobody had used it, who may be within a `hydra.main` of their own."""
    state, version, config = GlobalHydra.instance(), VersionBase.instance(), HydraConfig.instance()
    before = state.hydra, version.version_base, config.cfg
    state.clear()
    try:
        yield
    finally:
        state.hydra, version.version_base, config.cfg = before
        GlobalHydra.set_instance(state)
