"""`graft train`: compose a config, check it, and train what it describes."""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from graft.config.conflicts import missing_path, without_effect
from graft.config.names import visible
from graft.config.overrides import whole_command
from graft.config.resolved import CONFIGS, check, chosen_options, explain
from graft.runs.entry import entry, failures


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(config: DictConfig) -> float:
    """One run; the jobs of a sweep are started by our launchers."""
    try:
        return job(config)
    except Exception as error:
        if "GRAFT_SHORT_ERRORS" not in os.environ:
            raise
        failures.append(explain(error))
        print(f"graft: error: {visible(failures[-1])}", file=sys.stderr)
        return float("nan")


def job(config: DictConfig) -> float:
    plain = check(config)  # before torch is imported
    hydra_config = HydraConfig.get()
    overrides = whole_command(hydra_config, hydra_config.overrides.task)
    if problem := without_effect(plain, overrides) or missing_path(plain):
        raise ValueError(problem)
    if hydra_config.mode == RunMode.MULTIRUN:
        raise ValueError(
            f"hydra/launcher={hydra_config.runtime.choices['hydra/launcher']}: sweeps run with "
            "hydra/launcher=in_process, processes or slurm"
        )
    from graft.runs.run import run

    return run(plain, overrides, chosen_options(hydra_config.runtime.choices))[
        plain["task"]["monitor"]
    ]


if __name__ == "__main__":
    entry(main)
