"""A run folder of format 2 as it was first written: evaluated, resumed and compared as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Graft

# Two made-up classes, a narrow ResNet, a probe that is done and a fine-tuning that got SIGTERM.
STOPPED = Path(__file__).parents[1] / "fixtures" / "run_format_2"
# The metrics it ends with. Of its epochs with equal accuracy, then the first was tested; since
# format 3 the one with the lower loss is.
EXPECTED = STOPPED.parent / "run_format_2.json"


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
    expected = json.loads(EXPECTED.read_text())  # today there are more of them
    found = {name: record["metrics"][name] for name in expected}
    assert found == pytest.approx(expected, abs=1e-5)
    assert "callbacks used to create the checkpoint" not in done.stderr
    done = graft("compare", str(run))
    assert done.returncode == 0, done.stderr
    assert f"{100 * record['metrics']['test/acc']:.2f}" in done.stdout
