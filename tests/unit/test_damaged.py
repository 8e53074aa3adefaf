"""What a full disk, a bad one or an attacker leaves of a run is read, or one line says why."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from graft.compare.groups import grouped
from graft.compare.plots import learning_curve
from graft.models.weights import WeightsFile
from graft.runs.open import read_checkpoint, read_config
from graft.runs.records import Run, read_run
from tests.unit.test_reading import COUNTS, damaged

RUN = Path(__file__).parents[1] / "fixtures" / "run_format_2"


def compared(run: Path) -> None:
    """All that a comparison looks at; an odd record is listed, not an error."""
    found = read_run(run)
    comparison = grouped([found, read_run(RUN)])
    for group in comparison.groups:
        comparison.cells(group)
        for name in ("test/acc", "fit_seconds", "memory_mb", "seconds"):
            group.summary(name)


def curve(run: Path) -> None:
    learning_curve(Run(run, {}, {}), "val/acc")


def config(run: Path) -> None:
    read_config(run, trusted=True)


FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config.yaml": ("config.yaml", config),
    "run.json": ("run.json", compared),
    "metrics.csv": ("metrics.csv", curve),
    "checkpoint": ("last.ckpt", lambda run: read_checkpoint(run / "last.ckpt")),
    "weights .pth": ("w.pth", lambda run: WeightsFile.read(run / "w.pth")),
    "weights .safetensors": ("w.safetensors", lambda run: WeightsFile.read(run / "w.safetensors")),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("config.yaml", "run.json", "metrics.csv", "checkpoints/finetune/last.ckpt"):
        (tmp_path / Path(name).name).write_bytes((RUN / name).read_bytes())
    weights = {"a.weight": torch.ones(3, 2), "a.bias": torch.zeros(3)}
    torch.save(weights, tmp_path / "w.pth")
    save_file(weights, tmp_path / "w.safetensors")
    return tmp_path


@pytest.mark.parametrize("count", [200, COUNTS[1]])
@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_read_or_explained_in_one_line(run: Path, kind: str, count: int) -> None:
    name, read = FILES[kind]
    file, draw = run / name, random.Random(0)
    whole = file.read_bytes()
    for _ in range(count):
        file.write_bytes(damaged(whole, draw))
        said = name
        try:
            read(run)
        except (ValueError, OSError) as error:
            said = str(error)
        assert "\n" not in said, said
        assert name in said, said


def values(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is a value, in nested mappings and lists."""
    inner = node.items() if isinstance(node, dict) else enumerate(node)
    found = [path] if path else []
    for key, value in inner:
        if isinstance(value, dict | list):
            found += values(value, (*path, key))
        else:
            found.append((*path, key))
    return found


ODD = [None, [], {}, "", "x", -1, 0, 10**400, 1.5, float("nan"), True, [1, "x"], {"a": {"b": 1}}]


@pytest.mark.parametrize("count", [300, COUNTS[1]])
def test_records_with_a_value_of_another_type_end_no_comparison(run: Path, count: int) -> None:
    draw, record = random.Random(0), (run / "run.json").read_text()
    places = values(json.loads(record))
    for _ in range(count):
        changed = json.loads(record)
        *path, last = draw.choice(places)
        at = changed
        for key in path:
            at = at[key]
        at[last] = draw.choice(ODD)
        (run / "run.json").write_text(json.dumps(changed))
        compared(run)
