"""A sweep leaves tables behind: of every run, of groups of seeds, and one key by another."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from graft.sweeps import launch, sweep
from tests.conftest import TINY, Graft


def only_sweep(tmp_path: Path) -> Path:
    (sweep,) = (tmp_path / "logs" / "sweeps").iterdir()
    return sweep


def test_the_tables_of_a_sweep_with_a_failing_job(graft: Graft, tmp_path: Path) -> None:
    done = graft("train", "-m", *TINY, "optimizer.lr=1e30,0.01,0.02", "seed=0,1")
    assert done.returncode != 0
    sweep = only_sweep(tmp_path)
    with (sweep / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["optimizer.lr"], row["seed"], row["status"]) for row in rows[2:]) == [
        (lr, seed, "done") for lr in ("0.01", "0.02") for seed in ("0", "1")
    ]
    assert [row["status"] for row in rows[:2]] == ["failed", "failed"]
    assert "lower optimizer.lr" in rows[0]["error"]
    table = (sweep / "summary.md").read_text()
    assert table.startswith("| test/acc % | val/acc % | n | optimizer.lr |")
    assert "left out: 2 failed" in table
    assert f"4 of 6 runs done in {sweep}" in done.stdout
    assert "left out: 2 failed" in done.stdout
    assert not (sweep / "table.md").exists()


def test_an_experiment_can_be_a_sweep_with_a_table(graft: Graft, tmp_path: Path) -> None:
    """The command line replaces what the experiment sweeps over, value by value."""
    done = graft(
        "train", "experiment=compare_transfer", *TINY, "data.image_size=32", "data.epoch_images=24",
        "backbone=resnet20_cifar", "transfer=linear_probe,finetune", "seed=0",
        "data.train_fraction=0.1,1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sweep = only_sweep(tmp_path)
    records = [json.loads(path.read_text()) for path in sweep.glob("*/run.json")]
    assert len(records) == 4
    assert {len(record["stages"]) for record in records} == {1}
    assert {record["train_images"] for record in records} == {4, 44}
    assert all(record["choices"]["experiment"] == "compare_transfer" for record in records)
    header, line, *body = (sweep / "table.md").read_text().splitlines()[2:6]
    assert header == "| transfer \\ data.train_fraction | 0.1 (4 images) | 1 (44 images) |"
    assert line == "| --- | ---: | ---: |"
    assert [row.split(" | ")[0] for row in body] == ["| linear_probe", "| finetune"]
    assert "test/acc %: one seed" in done.stdout
    assert "fit s, peak MB: mean time of the fits, largest memory" in done.stdout
    with (sweep / "table.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4


def test_the_tables_grow_as_jobs_end(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks, or stops the sweep, in the middle finds what is there."""
    seen: list[list[str]] = []

    def noted(folder: Path) -> str:
        text = sweep.summarise(folder)
        with (folder / "summary.csv").open() as file:
            seen.append([row["status"] for row in csv.DictReader(file)])
        return text

    monkeypatch.setattr(launch, "summarise", noted)
    assert graft("train", "-m", *TINY, "seed=0,1,2").returncode == 0
    assert seen[:2] == [["done", "queued", "queued"], ["done", "done", "queued"]]
    assert seen[2:] == [["done"] * 3] * 2
    assert graft("train", *TINY).returncode == 0
    assert len(seen) == 4  # a single run is no sweep
