"""The run folder holds what is needed to repeat a run, and what it cost."""

from __future__ import annotations

import json
import mmap
import shutil
import subprocess
from pathlib import Path

import pytest

from graft.runs import folder, resources
from graft.runs.folder import RunFolder, checkout
from graft.runs.records import read_run


def git(where: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", where, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    (tmp_path / "clone" / "src").mkdir(parents=True)
    (tmp_path / "clone" / "src" / "model.py").write_text("layers = 3\n")
    (tmp_path / "clone" / "README").write_text("hello\n")
    git(tmp_path / "clone", "init", "-q")
    git(tmp_path / "clone", "add", ".")
    git(tmp_path / "clone", "commit", "-q", "-m", "first")
    return tmp_path / "clone"


def test_a_changed_checkout_can_be_restored_from_its_diff(clone: Path) -> None:
    """From a subfolder, changes elsewhere too; staged or not; new files are not tracked."""
    (clone / "src" / "model.py").write_text("layers = 4\n")
    (clone / "README").write_text("hello again\n")
    (clone / "new.bin").write_bytes(b"x" * 100)
    git(clone, "add", "README")
    commit, diff = checkout(clone / "src")
    assert commit is not None
    assert len(commit) == 40
    assert b"new.bin" not in diff
    git(clone, "checkout", "-q", "--force", commit)
    subprocess.run(["git", "apply"], cwd=clone, input=diff, check=True)
    assert (clone / "src" / "model.py").read_text() == "layers = 4\n"
    assert (clone / "README").read_text() == "hello again\n"


def test_a_clean_checkout_has_no_diff_and_a_large_one_is_cut(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, diff = checkout(clone)
    assert commit
    assert diff == b""
    checkout.cache_clear()
    monkeypatch.setattr(folder, "DIFF_LIMIT", 1000)
    (clone / "README").write_text("word\n" * 5000)
    diff = checkout(clone)[1]
    assert len(diff) < 1100
    assert diff.endswith(b"bytes in all\n")


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert checkout(tmp_path) == (None, b"")


def test_a_run_records_code_hardware_config_and_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "checkout", lambda _: ("c0ffee", b"+layers = 4\n"))
    config = {"seed": 3, "optimizer": {"lr": 1e-3}}
    run = RunFolder.create(tmp_path, "run", config, ["optimizer.lr=1e-3"], {"data": "digits"})
    assert run.record["status"] == "queued"
    run.start()
    run.finish("done", metrics={"val/acc": 0.5})
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["git_commit"], record["git_dirty"]) == ("c0ffee", True)
    assert (tmp_path / "run" / "git.diff").read_bytes() == b"+layers = 4\n"
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["memory_gb"] > 0.1
    assert record["memory_mb"] > 50
    assert list(record)[-1] == "config"  # after what one looks for
    read = read_run(tmp_path / "run")
    assert read.config == config
    assert read.values["data"] == "digits"
    assert read.overridden == ["optimizer.lr"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_a_job_is_its_own() -> None:
    """Jobs of a sweep share a process: a large one must not be counted for the next."""
    size = 300_000_000
    resources.reset_peak()
    before = resources.peak_memory()["memory_mb"]
    held = mmap.mmap(-1, size)  # pages of its own: the heap may have some that were freed
    for start in range(0, size, mmap.PAGESIZE):
        held[start] = 1
    large = resources.peak_memory()["memory_mb"]
    held.close()
    assert resources.peak_memory()["memory_mb"] == pytest.approx(large, abs=10)  # not what is held
    resources.reset_peak()
    after = resources.peak_memory()["memory_mb"]
    assert before is not None
    assert large is not None
    assert after is not None
    assert large - before > 0.9 * size / 1e6
    assert large - after > 0.9 * size / 1e6


def test_a_resumed_run_keeps_the_larger_of_its_peaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(tmp_path, "run", {}, [])
    peaks = iter([900.0, 700.0])
    monkeypatch.setattr(
        resources, "peak_memory", lambda: {"memory_mb": next(peaks), "gpu_memory_mb": None}
    )
    for status in ("preempted", "done"):
        run.start()
        run.finish(status)
    assert (run.record["memory_mb"], run.record["gpu_memory_mb"]) == (900.0, None)


def test_a_runs_name_says_what_it_is_in_few_bytes() -> None:
    """Time, name, experiment, overrides, seed; eighty Chinese letters are 240 bytes."""

    def name(config: dict[str, object], *overrides: str, experiment: str | None = None) -> str:
        return folder.run_name({"seed": 3, **config}, experiment, overrides).split("_", 2)[2]

    assert name({}) == "default_seed3"
    assert name({"name": "my try"}, "name=my try", "optimizer.lr=1e-3") == "my-try_lr-1e-3_seed3"
    assert name({"name": 7}, experiment="quickstart") == "7_quickstart_seed3"
    one, other = (name({}, f"data.root=/{'猫' * 80}{end}") for end in "ab")
    assert one != other
    assert max(len(word.encode()) for word in (one, other)) < 150
