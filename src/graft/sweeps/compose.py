"""The configs of a sweep's jobs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

KEPT = 8  # compositions


class Composer:
    """Composes jobs as Hydra's own loader does, several times faster.

    What takes a tenth of a second is reading and merging the chosen options of config groups, which
    most sweeps choose once for all jobs. Hydra sets single values after that, so here they are set
    in a copy.

    Args:
        loader: Hydra's.
        master: the config of the sweep.
    """

    def __init__(self, loader: Any, master: DictConfig) -> None:
        self.loader = loader
        self.master = master
        self.parser = OverridesParser.create()
        self.bases: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The config of a job, with its `hydra` node.

        Raises:
            ConfigCompositionException: an option or a key that there is not.
        """
        if self.master.hydra.searchpath:  # groups lie in more places than are asked here
            return self.loader.load_sweep_config(self.master, list(overrides))
        parsed = self.parser.parse_overrides(list(overrides))
        values = self._values(parsed)
        rest = tuple(str(override.input_line) for override in parsed if override not in values)
        if rest not in self.bases:
            if len(self.bases) >= KEPT:
                self.bases.clear()
            self.bases[rest] = self.loader.load_sweep_config(self.master, list(rest))
        config = copy.deepcopy(self.bases[rest])
        try:
            for override in values:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return self.loader.load_sweep_config(self.master, list(overrides))  # which explains it
        note_overrides(config, [o for o in parsed if not o.is_hydra_override()])
        return config

    def _values(self, overrides: Sequence[Override]) -> list[Override]:
        """Those that set a key, and that may as well be made after all others."""
        values: list[Override] = []
        before: list[str] = []  # keys of what has to stay where it is
        for override in reversed(overrides):
            if self._chooses_option(override):
                continue
            key = override.key_or_group
            edits = override.is_add() or override.is_force_add() or override.is_delete()
            if edits or any(_overlap(key, other) for other in before):
                before.append(key)
            else:
                values.insert(0, override)
        return values

    def _chooses_option(self, override: Override) -> bool:
        return (
            override.is_hydra_override()
            or override.package is not None
            or (
                self.loader.repository.group_exists(override.key_or_group)
                and not isinstance(override.value(), dict)
            )
        )


def _overlap(a: str, b: str) -> bool:
    """Whether one of two keys is within the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def note_overrides(config: DictConfig, overrides: list[Override]) -> None:
    """What Hydra writes down of a job's own overrides."""
    job = config.hydra.job
    config.hydra.overrides.task = [override.input_line for override in overrides]
    form = job.config.override_dirname
    job.override_dirname = get_overrides_dirname(
        overrides, list(form.exclude_keys), form.item_sep, form.kv_sep
    )
