"""`graft choose` from start to end: normal runs, no look at the test split, a working command."""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from graft.data.datamodule import TransferDataModule
from graft.runs.resume import resume_run
from graft.training.signals import Preempted
from tests.conftest import Graft

FILE = """\
candidates:
  narrow: [backbone.depth=8, backbone.width=4, backbone.weights=null]
  absent: [backbone=resnet18]
plans:
  linear_probe: [transfer=linear_probe, head=linear_grid, optimizer=adamw]
  finetune: [transfer=finetune, optimizer.lr=0.01]
  diverging: [transfer=finetune, optimizer.lr=1.0e+18]
"""
RACE = [
    "--budget", "300s", "--from", "mine.yaml", "trainer=cpu", "trainer.max_epochs=2",
]  # fmt: skip
DATA = ["data.source.per_class=24", "data.source.classes=4"]


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(FILE)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def records(top: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(top.glob("*/run.json"))]


def test_a_race_gives_a_command_that_works_and_is_not_run_twice(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(TransferDataModule, "test_dataloader", None)  # nobody calls it
        done = graft("choose", "synthetic", *RACE, *DATA)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "logs").glob("choose_synthetic_*")
    made = records(folder)
    statuses = [record["status"] for record in made]
    assert statuses == ["done", "done", "done", "failed"]  # features, then the three plans
    for record in made:
        assert not [name for name in record["metrics"] if name.startswith("test/")]
    assert "absent: weights are not at hand (--download fetches them)" in done.stdout
    assert re.search(r"left out: \w+ diverging: its run failed: the val.* is nan", done.stdout)
    for heading in ("val/acc %", "95 % interval", "parameters", "MMACs", "full min", "full MB"):
        assert heading in done.stdout
    assert len((folder / "choice.csv").read_text().splitlines()) == len(made)
    line = re.search(r"^why       (.*)", done.stdout, re.MULTILINE)
    assert line
    assert line[1].count(".") == line[1].count(".", 0, -1) + 1  # a sentence

    chosen = re.search(r"^chosen    graft (.*)", done.stdout, re.MULTILINE)
    assert chosen
    trained = graft(*shlex.split(chosen[1]))
    assert trained.returncode == 0, trained.stderr
    assert "test/acc" in trained.stdout

    again = graft("choose", "synthetic", *RACE, *DATA)
    assert records(folder)[:3] == made[:3]  # what failed is tried again
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]

    compared = graft("compare", str(folder))
    assert compared.returncode == 0
    assert "val/acc" in compared.stdout


def test_a_race_that_was_stopped_goes_on(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def stopped(path: Path, **options: Any) -> dict[str, float]:
        calls.append(path)
        if len(calls) == 2:
            raise Preempted(signal.SIGTERM)
        return resume_run(path, **options)

    monkeypatch.setattr("graft.choose.runs.resume_run", stopped)
    command = ["choose", "synthetic", *RACE, *DATA, "--plans", "linear_probe"]
    first = graft(*command)
    assert first.returncode == 128 + signal.SIGTERM
    assert "the same command goes on" in first.stdout
    done = graft(*command)
    assert done.returncode == 0, done.stderr
    assert len(calls) == len(set(calls)) + 1  # the second run alone was begun twice
    (folder,) = (tmp_path / "logs").glob("choose_synthetic_*")
    assert {record["status"] for record in records(folder)} == {"done"}


def test_what_the_data_or_the_budget_does_not_allow(graft: Graft, image_folders: Path) -> None:
    for path in list((image_folders / "train/dark").iterdir())[1:]:
        path.unlink()
    failed = graft("choose", str(image_folders), *RACE)
    assert "class dark has 1 image: too few for train and val" in failed.stderr
    assert failed.stderr.count("\n") == 1
    failed = graft("choose", "synthetic", *RACE, *DATA, "--candidates", "absent")
    assert "no candidate can be built: absent: weights are not at hand" in failed.stderr
    failed = graft("choose", "synthetic", *RACE, *DATA, "--budget", "0.5s")
    assert "left for features, and those of the fastest candidate" in failed.stderr
    assert failed.stderr.count("\n") == 1
