"""Weights & Biases and MLflow, without a network: one run each, whatever stops it."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.training.module import TransferModule
from tests.conftest import TINY, Graft, compose

# Two stages of two epochs, five batches each.
PLAN = [
    *TINY, "trainer.max_epochs=2", "transfer=lp_ft", "transfer.stages.probe.epochs=2",
    "trainer.log_every_n_steps=1",
]  # fmt: skip


def needs(package: str) -> pytest.MarkDecorator:
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"needs the {package} extra")


@pytest.fixture
def stopped(graft: Graft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """`stopped("mlflow")`: a run that crashed in its second stage, resumed."""

    def call(logger: str) -> Path:
        calls, original = 0, TransferModule.loss

        def broken(self: TransferModule, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 17:  # of 20
                raise RuntimeError("a crash")
            return original(self, *arguments)

        monkeypatch.setattr(TransferModule, "loss", broken)
        assert graft("train", *PLAN, f"logger={logger}").returncode == 1
        (run,) = (tmp_path / "logs").glob("*/run.json")
        done = graft("resume", str(run.parent))
        assert done.returncode == 0, done.stderr
        return run.parent

    return call


@pytest.mark.slow
@needs("mlflow")
def test_a_resumed_run_goes_on_as_the_same_run_of_mlflow(
    stopped: Callable[[str], Path], tmp_path: Path
) -> None:
    run = stopped("mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/logs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'graft'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == run.name
    assert found.info.status == "FINISHED"
    assert found.data.params["transfer"] == "lp_ft"
    assert found.data.params["optimizer.lr"] == "0.05"
    assert {"val/best_acc", "test/acc", "test/loss"} <= found.data.metrics.keys()
    for metric in ("val/acc", "train/loss_step"):
        points = {p.step: p.value for p in client.get_metric_history(found.info.run_id, metric)}
        with (run / "metrics.csv").open() as file:
            rows = {int(r["step"]): float(r[metric]) for r in csv.DictReader(file) if r[metric]}
        assert points == pytest.approx(rows)


@pytest.mark.slow
@needs("wandb")
def test_a_resumed_run_goes_on_as_the_same_run_of_wandb(
    stopped: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[dict[str, Any]] = []
    original = wandb.Run.log

    def log(self: Any, data: dict[str, Any], *arguments: Any, **keywords: Any) -> None:
        logged.append(data)
        original(self, data, *arguments, **keywords)

    monkeypatch.setattr(wandb.Run, "log", log)
    run = stopped("wandb")
    parts = list((run / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert {part.name.rpartition("-")[2] for part in parts} == {(run / "wandb.id").read_text()}
    steps = [row["trainer/global_step"] for row in logged if "val/acc" in row]
    assert steps == [4, 9, 14, 19]
    assert {"val/best_acc", "time/fit_seconds"} <= logged[-1].keys()
    wandb.finish()


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_says_which_extra_has_it(
    logger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.config.conflicts.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"logger={logger} .*pip install 'graft\[{logger}\]'"):
        compose(*TINY[:-1], f"logger={logger}")
