"""Lightning's loggers, writing into the run folder, with one step axis through all stages.

A resumed run takes back what was logged after its checkpoint, and goes on with the same curves.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary

from graft.storage.disk import explained, write_atomically
from graft.storage.reading import read_csv


class TensorBoard(TensorBoardLogger):
    """Events straight in the run folder, so that TensorBoard shows the run's own name.

    Args:
        images: show pictures and the embedding projector too; see `graft.reporting.tensorboard`.
    """

    step_offset = 0
    kept = 0

    def __init__(self, save_dir: Path, images: bool = False) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False)
        self.images = images

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        shown = {name: value for name, value in metrics.items() if name != "epoch"}  # a saw
        super().log_metrics(shown, None if step is None else step + self.step_offset)

    def save(self) -> None:
        """Nothing but the events: the run folder has its config already."""

    @rank_zero_only
    def start(
        self, params: Mapping[str, str | float], changed: Collection[str], metrics: Sequence[str]
    ) -> None:
        """A row of the HPARAMS tab, within this run.

        Not `log_hyperparams`, which makes up values of the metrics before there are any.

        Args:
            changed: keys of `params` that come first.
            metrics: tags of scalars.
        """
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        experiment, session = api_pb2.Experiment(), plugin_data_pb2.SessionStartInfo()
        for key, value in params.items():
            text = isinstance(value, str)
            kind = api_pb2.DATA_TYPE_STRING if text else api_pb2.DATA_TYPE_FLOAT64
            experiment.hparam_infos.add(name=key, type=kind, differs=key in changed)
            setattr(session.hparams[key], "string_value" if text else "number_value", value)
        for metric in metrics:
            experiment.metric_infos.add(name=api_pb2.MetricName(tag=metric))
        data = {
            metadata.EXPERIMENT_TAG: plugin_data_pb2.HParamsPluginData(experiment=experiment),
            metadata.SESSION_START_INFO_TAG: plugin_data_pb2.HParamsPluginData(
                session_start_info=session
            ),
        }
        for tag, content in data.items():
            summary = Summary()
            summary.value.add(tag=tag, metadata=metadata.create_summary_metadata(content))
            self.experiment._get_file_writer().add_summary(summary)

    def rewind(self, step: int) -> None:
        """Before the first event: TensorBoard is to drop those of `step` and later."""
        self._kwargs["purge_step"] = self.kept = step

    def is_new(self, step: int) -> bool:
        """Whether what belongs to a step is not there yet, from before the run was resumed."""
        return step >= self.kept

    @rank_zero_only
    def flush(self) -> None:
        self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """A stage that succeeds closes nothing: a run is one file of events. Those that start
        within a second are read in the order of a counter as text, "10" before "9".
        """
        if status == "success":
            self.flush()
        else:
            with suppress(OSError):  # a full disk: what failed has been raised, or comes before it
                self.close()

    @rank_zero_only
    def close(self) -> None:
        super().finalize("failed")


class CSV(Logger):
    """`metrics.csv` in the run folder: a row is on disk as soon as it is logged.

    Not Lightning's `CSVLogger`, which deletes an earlier file, and rewrites it in place when a
    column is new.
    """

    step_offset = 0

    def __init__(self, save_dir: Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self.columns: list[str] = []

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has its config already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = {**metrics, "step": (step or 0) + self.step_offset}
        if any(name.startswith("test/") for name in metrics):
            row.pop("epoch", None)  # of the trainer that tests: 0
        if new := row.keys() - set(self.columns):
            rows = self._rows() if self.columns else []
            self._write(sorted([*self.columns, *new]), rows)
        with explained(self.path, lambda: 1000), self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows of `step` and later, and one that was cut off."""
        if self.path.exists():
            rows = self._rows()
            try:
                kept = [row for row in rows if int(row["step"]) < step]
            except (KeyError, ValueError) as error:
                raise ValueError(f"{self.path} is damaged: its steps are no numbers") from error
            self._write(list(rows[0]) if rows else [], kept)

    def flush(self) -> None:
        """Nothing waits."""

    def _rows(self) -> list[dict[str, str]]:
        return read_csv(self.path)

    def _write(self, columns: list[str], rows: Sequence[Mapping[str, str]]) -> None:
        self.columns = columns
        text = io.StringIO()
        if columns:
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        write_atomically(self.path, text.getvalue())


def advance(loggers: Sequence[Logger], steps: int) -> None:
    """The next stage's steps follow on those of the last: each stage's trainer counts from 0."""
    for logger in loggers:
        if hasattr(logger, "step_offset"):  # ours
            logger.step_offset += steps


def rewind(loggers: Sequence[Logger], step: int) -> None:
    """Everything before `step` of the axis is kept, the rest will be logged again."""
    for logger in loggers:
        if isinstance(logger, TensorBoard | CSV):
            logger.rewind(step)


def flush(loggers: Sequence[Logger]) -> None:
    """Have it on disk: what a checkpoint comes after."""
    for logger in loggers:
        if hasattr(logger, "flush"):
            logger.flush()
