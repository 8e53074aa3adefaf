"""A run folder of format 2 as it was first written: evaluated, resumed and compared as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Graft

# Two made-up classes, a narrow ResNet, a probe that is done and a fine-tuning that got SIGTERM.
STOPPED = Path(__file__).parents[1] / "fixtures" / "run_format_2"
EXPECTED = STOPPED.parent / "run_format_2.json"  # the metrics it ended with when it went on then


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("GRAFT_TRUST")
    return shutil.copytree(STOPPED, tmp_path / "run")


def test_a_run_of_the_first_format_2_is_evaluated_compared_and_resumed(
    graft: Graft, run: Path
) -> None:
    done = graft("eval", str(run), "--ckpt", "last")
    assert done.returncode == 0, done.stderr
    assert "12 images" in done.stdout
    done = graft("resume", str(run))
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "done"
    assert record["metrics"] == pytest.approx(json.loads(EXPECTED.read_text()), abs=1e-5)
    done = graft("compare", str(run))
    assert done.returncode == 0, done.stderr
    assert f"{100 * record['metrics']['test/acc']:.2f}" in done.stdout
