"""Optuna proposes the jobs of a sweep; its study goes on with the sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.distributions import FloatDistribution as Float
from optuna.distributions import IntDistribution as Int

import graft.runs.train as graft_train
from graft.sweeps.study import distribution, open_study
from tests.conftest import TINY, Graft
from tests.integration.test_launchers import records, statuses

OPTUNA = ["hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-3,1e-1))"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval(0.1,1)", Float(0.1, 1.0)),
        ("tag(log,interval(1e-4,1e-1))", Float(1e-4, 1e-1, log=True)),
        ("int(interval(8,64))", Int(8, 64)),
        ("tag(log,int(interval(8,64)))", Int(8, 64, log=True)),
        ("range(2,9,2)", Int(2, 8, step=2)),
        ("0.1,0.2", CategoricalDistribution(["0.1", "0.2"])),
        ("choice(a,'b c')", CategoricalDistribution(["a", r"b\ c"])),
    ],
)
def test_hydras_grammar_is_the_search_space(text: str, expected: BaseDistribution) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"key={text}"])
    assert distribution(override) == expected


def test_a_study_goes_on_where_it_stopped(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trial for each run, with its score; one that failed stays open and is tried again."""
    train = graft_train.train

    def failing(*arguments: Any) -> Any:
        if len([*tmp_path.glob("s/*/run.json")]) == 2:
            raise OSError("the network is down")
        return train(*arguments)

    swept = [*OPTUNA, "transfer=linear_probe,finetune", "trainer.limit_test_batches=1"]
    with monkeypatch.context() as patch:
        patch.setattr("graft.runs.train.train", failing)
        n = "hydra.sweeper.n_trials=2"
        assert graft("train", "-m", *TINY, *swept, n, "hydra.sweep.dir=s").returncode == 1
    assert statuses(tmp_path / "s") == ["done", "failed"]
    first = records(tmp_path / "s")
    more = graft("resume", str(tmp_path / "s"), "hydra.sweeper.n_trials=3")
    assert more.returncode == 0, more.stderr
    assert "[3/3]  done" in more.stdout
    runs = records(tmp_path / "s")
    assert [run["status"] for run in runs] == ["done"] * 3
    assert runs[0] == first[0]
    assert runs[1]["config"] == first[1]["config"]
    trials = open_study(tmp_path / "s").trials
    assert [trial.value for trial in trials] == [run["metrics"]["val/acc"] for run in runs]
    for trial, run in zip(trials, runs, strict=True):
        assert trial.params["optimizer.lr"] == run["config"]["optimizer"]["lr"]
        assert trial.params["transfer"] == run["choices"]["transfer"]
    assert len({trial.params["optimizer.lr"] for trial in trials}) == 3  # nothing drawn again
    assert "best      val/acc" in more.stdout


def test_pruned_runs_end_early_and_have_ended(graft: Graft, tmp_path: Path) -> None:
    """The epochs of earlier stages count as steps, so that the same step is as far in all runs."""
    done = graft(
        "train", "-m", *TINY, *OPTUNA, "transfer=lp_ft", "transfer.stages.probe.epochs=1",
        "trainer.max_epochs=3", "hydra.sweeper.n_trials=1", f"hydra.sweep.dir={tmp_path / 's'}",
        "hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner",
        "~hydra.sweeper.pruner.n_startup_trials", "hydra.sweeper.pruner.n_warmup_steps=1",
        "+hydra.sweeper.pruner.lower=2.0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = records(tmp_path / "s")
    assert (run["status"], run["error"]) == ("pruned", "pruned after 2 epochs")
    (trial,) = open_study(tmp_path / "s").trials
    assert trial.state.name == "PRUNED"
    assert [*trial.intermediate_values] == [0, 1]
    assert run["metrics"] == {"val/acc": max(trial.intermediate_values.values())}
    assert "PRUNED" not in done.stdout
    again = graft("resume", str(tmp_path / "s"))
    assert again.returncode == 0, again.stderr
    assert statuses(tmp_path / "s") == ["pruned"]
    (folder,) = (tmp_path / "s").glob("*/run.json")
    assert "is pruned: nothing to resume" in graft("resume", str(folder.parent)).stdout
