"""Lightning's loggers, writing into the run folder, with one step axis through all stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger


class TensorBoard(TensorBoardLogger):
    """Events straight in the run folder, so that TensorBoard shows the run's own name."""

    step_offset = 0

    def __init__(self, save_dir: Path) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, None if step is None else step + self.step_offset)

    def save(self) -> None:
        """Nothing but the events: the run folder has its config already."""


class CSV(CSVLogger):
    """`metrics.csv` in the run folder."""

    step_offset = 0

    def __init__(self, save_dir: Path) -> None:
        super().__init__(save_dir, name="", version="")

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics(dict(metrics), None if step is None else step + self.step_offset)


def advance(loggers: list[Logger], steps: int) -> None:
    """The next stage's steps follow on those of the last: each stage's trainer counts from 0."""
    for logger in loggers:
        if isinstance(logger, TensorBoard | CSV):
            logger.step_offset += steps
