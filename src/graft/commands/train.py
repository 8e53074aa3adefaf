"""`graft train`: compose a config, check it, and train what it describes."""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from graft.config.job import Job
from graft.config.names import visible
from graft.config.resolved import CONFIGS, explain
from graft.runs.entry import entry, failures


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(config: DictConfig) -> float:
    """One run; the jobs of a sweep are started by our launchers."""
    try:
        return run_job(config)
    except Exception as error:
        if "GRAFT_SHORT_ERRORS" not in os.environ:
            raise
        failures.append(explain(error))
        print(f"graft: error: {visible(failures[-1])}", file=sys.stderr)
        return float("nan")


def run_job(config: DictConfig) -> float:
    hydra_config = HydraConfig.get()
    job = Job.of(config, hydra_config)  # before torch is imported
    if hydra_config.mode == RunMode.MULTIRUN:
        raise ValueError(
            f"hydra/launcher={hydra_config.runtime.choices['hydra/launcher']}: sweeps run with "
            "hydra/launcher=in_process, processes or slurm"
        )
    from graft.runs.run import run

    return run(job.config, job.overrides, job.choices)[job.config["task"]["monitor"]]


if __name__ == "__main__":
    entry(main)
