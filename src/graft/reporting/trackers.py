"""Weights & Biases and MLflow, with one step axis through all stages, and resumed in place.

A run is known there by an identifier that is kept in the run folder. What was logged after the
checkpoint that a resumed run goes on from is logged again, with the same values: neither service
can take a row back.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only


class WandB(WandbLogger):
    """Args: keywords are those of Lightning's logger, and of `wandb.init`."""

    step_offset = 0

    def __init__(self, save_dir: Path, **keywords: Any) -> None:
        file = save_dir / "wandb.id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:12])
        super().__init__(save_dir.name, save_dir, id=file.read_text(), **keywords)
        self._finish(0)  # of an earlier job of this process: `init` would go on with it

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, (step or 0) + self.step_offset)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status != "success":  # which each stage ends with
            self._finish(1)

    def _finish(self, exit_code: int) -> None:
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code)


class MLFlow(MLFlowLogger):
    """Logged in the background, each row being a transaction, and complete at each checkpoint.

    Args: keywords are those of Lightning's logger. Without MLFLOW_TRACKING_URI it is a database
    beside the run.
    """

    step_offset = 0

    def __init__(self, save_dir: Path, **keywords: Any) -> None:
        self.file = save_dir / "mlflow.id"
        known = self.file.read_text() if self.file.exists() else None
        if "MLFLOW_TRACKING_URI" not in os.environ:
            database = save_dir.resolve().parent / "mlflow.db"
            keywords = {"tracking_uri": f"sqlite:///{database}", **keywords}
        super().__init__(run_name=save_dir.name, run_id=known, synchronous=False, **keywords)
        self.resumed = known is not None
        if self.resumed:
            self.experiment.update_run(known, status="RUNNING")
        else:
            self.file.write_text(str(self.run_id))

    def flush(self) -> None:
        import mlflow

        mlflow.flush_async_logging()

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        self.flush()
        super().finalize(status)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        if not self.resumed:  # a parameter can't change there
            super().log_hyperparams(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, (step or 0) + self.step_offset)
