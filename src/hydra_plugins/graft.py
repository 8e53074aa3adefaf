"""Where Hydra looks for launchers and sweepers. Every command imports this: nothing heavy here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from graft.config.kinds import POSITIVE_INT
from graft.config.overrides import require_values
from graft.sweeps import processes, slurm
from graft.sweeps.launch import SweepLauncher


class InProcess(SweepLauncher):
    def __init__(self) -> None:
        super().__init__(processes.InProcess())


class Processes(SweepLauncher):
    def __init__(self, devices: str | list[int], jobs_per_device: int, n_jobs: int) -> None:
        super().__init__(processes.Processes(devices, jobs_per_device, n_jobs))


class Slurm(SweepLauncher):
    def __init__(self, n_jobs: int, cluster: str, options: dict[str, Any], **common: Any) -> None:
        super().__init__(slurm.Slurm(n_jobs, {**common, **options}, cluster))


class Grid(BasicSweeper):
    """Hydra's own, where the launcher checks the jobs: that takes a tenth of a second for each."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        pass

    @staticmethod
    def split_arguments(
        overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        require_values(overrides)
        return BasicSweeper.split_arguments(overrides, max_batch_size)


class Optuna(Sweeper):
    def __init__(
        self, n_trials: int, params: DictConfig | None, pruner: DictConfig | None, **settings: Any
    ) -> None:
        if not POSITIVE_INT[1](n_trials):
            raise ValueError(f"hydra.sweeper.n_trials={n_trials}: must be {POSITIVE_INT[0]}")
        self.n_trials = n_trials
        self.params = [f"{key!s}={value}" for key, value in (params or {}).items()]
        self.pruner: Any = None if pruner is None else OmegaConf.to_container(pruner)
        self.settings = settings | {"sampler": OmegaConf.to_container(settings["sampler"])}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.parser = OverridesParser.create(config_loader=hydra_context.config_loader)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        try:
            from graft.sweeps.study import search
        except ImportError as error:
            raise ValueError("hydra/sweeper=optuna needs Optuna: pip install optuna") from error
        assert isinstance(self.launcher, SweepLauncher)
        overrides = self.parser.parse_overrides([*self.params, *arguments])
        require_values(overrides)
        search(self.launcher, overrides, self.n_trials, pruner=self.pruner, **self.settings)
