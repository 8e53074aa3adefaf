"""Rule 26: what a fork does not want can be deleted, and the rest still trains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = {
    "sweeps": (
        "src/graft/sweeps", "src/hydra_plugins", "configs/hydra/launcher", "configs/hydra/sweeper",
    ),
    "choose": ("src/graft/choose", "src/graft/commands/choose.py", "configs/choose.yaml"),
    "compare": ("src/graft/compare", "src/graft/commands/compare.py", "src/graft/choose"),
    "evaluation": (
        "src/graft/evaluation", "src/graft/commands/evaluate.py", "src/graft/runs/evaluate.py",
        "src/graft/runs/other_data.py", "src/graft/deploy",
    ),
    "tables": (
        "src/graft/tasks/multilabel.py", "src/graft/tasks/regression.py",
        "src/graft/data/sources/table.py", "configs/task/multilabel.yaml",
        "configs/task/regression.yaml", "configs/data/image_table.yaml",
    ),
    "text": (
        "src/graft/transforms/text.py", "src/graft/data/sources/texts.py",
        "src/graft/data/sources/corpus.py", "src/graft/models/huggingface.py",
        "src/graft/models/text_blocks.py", "src/graft/models/tokenizer.py",
        "src/graft/tasks/pretrain_bert.py", "src/graft/deploy/texts.py",
        "configs/data/text_csv.yaml", "configs/data/text_corpus.yaml",
        "configs/backbone/huggingface.yaml", "configs/backbone/bert.yaml",
        "configs/task/pretrain_bert.yaml", "configs/experiment/pretrain_bert.yaml",
        "configs/experiment/text_finetune.yaml",
    ),
    "shift": (
        "src/graft/tasks/domains.py", "src/graft/tasks/coral.py", "src/graft/tasks/dann.py",
        "configs/task/coral.yaml", "configs/task/dann.yaml", "configs/transfer/adabn.yaml",
        "configs/experiment/domain_shift.yaml",
    ),
    "self-supervised": tuple(
        f"{folder}{name}"
        for task in ("denoising", "masked", "barlow")
        for folder, name in (
            ("src/graft/tasks/", f"{task}.py"), ("configs/task/", f"{task}.yaml"),
            ("configs/experiment/pretrain_", f"{task}.yaml"),
        )
    ),
    "timm": ("src/graft/models/timm.py", "configs/backbone/timm.yaml"),
    "trackers": (
        "src/graft/reporting/trackers.py",
        "configs/logger/wandb.yaml", "configs/logger/mlflow.yaml",
    ),
}  # fmt: skip


def trains_without(folder: Path, *parts: str) -> None:
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    for name in parts:
        for path in OPTIONAL[name]:
            gone = folder / path
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
    if "sweeps" in parts:  # Hydra's own launcher and sweeper take their place
        hydra = folder / "configs/hydra/default.yaml"
        ours = ("override launcher", "override sweeper")
        lines = [s for s in hydra.read_text().splitlines() if not any(name in s for name in ours)]
        hydra.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "graft", "train", "debug=fdr", "trainer=cpu"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder / "src")},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "logs").glob("*_seed0")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "graft", "resume", str(run)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder / "src")},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nothing to resume" in done.stdout


def test_without_all_that_is_optional_a_run_trains(tmp_path: Path) -> None:
    trains_without(tmp_path, *OPTIONAL)


@pytest.mark.slow
@pytest.mark.parametrize("part", OPTIONAL)
def test_without_a_single_part_a_run_trains(tmp_path: Path, part: str) -> None:
    trains_without(tmp_path, part)
