"""The README tells the truth: what it says to add is enough, what it says to type runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graft.config.resolved import CONFIGS
from tests.conftest import Graft, compose

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
FILES = {
    match[1]: text
    for language, text in BLOCKS
    if language in ("python", "yaml") and (match := re.match(r"# (\S+)\n", text))
}
COMMANDS = [
    line.partition("#")[0].strip()
    for language, text in BLOCKS
    if language == "bash"
    for line in text.splitlines()
    if line.startswith("graft ")
]


@pytest.mark.slow
def test_the_five_extensions_run_in_a_copy_of_the_repository(tmp_path: Path) -> None:
    kinds = {Path(name).parent.name for name in FILES if name.endswith(".yaml")}
    assert kinds == {"backbone", "head", "data", "task", "transfer"}
    assert all(len(text.splitlines()) <= 15 for text in FILES.values())
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copytree(CONFIGS, tmp_path / "configs")
    for name, text in FILES.items():
        assert not (ROOT / name).exists()
        (tmp_path / name).write_text(text)
    (command,) = [command for command in COMMANDS if "data=shades" in command]
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command), "trainer=cpu", "trainer.max_epochs=3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "stage probe: 5 epochs" in done.stdout
    assert "stage top: 3 epochs" in done.stdout
    accuracy = re.search(r"test/acc +([\d.]+) %", done.stdout)
    assert accuracy
    assert float(accuracy[1]) > 80  # two shades: a model that learns anything tells them apart


@pytest.mark.parametrize("command", [c for c in COMMANDS if "shades" not in c])
def test_every_command_composes(command: str) -> None:
    overrides = [word for word in shlex.split(command)[2:] if not re.search("^-m$|interval", word)]
    # Of a sweep, the first job.
    compose(*(re.sub(r"=([^\[{,]+),.*", r"=\1", override) for override in overrides))


def test_the_table_of_groups_is_complete() -> None:
    for group in CONFIGS.iterdir():
        if group.is_dir() and group.name not in (
            "hydra",
            "paths",
            "logger",
            "preprocessing",
            "stage",
        ):
            assert f"`{group.name}`" in README, group.name
            rows = [line for line in README.splitlines() if line.startswith("|")]
            row = next(line for line in rows if f"`{group.name}`" in line)
            for option in group.glob("*.yaml"):
                if group.name != "backbone" and option.stem != "base":
                    assert re.search(rf"\b{option.stem}\b", row), f"{group.name}={option.stem}"


@pytest.mark.parametrize("command", re.findall(r"`graft (train [^`]*experiment=mine)`", README))
def test_configs_outside_the_repository(graft: Graft, command: str, tmp_path: Path) -> None:
    mine = tmp_path / "my_configs" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\nmirror: true\n")
    done = graft(*shlex.split(command), "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "mirror: true" in done.stdout


def test_the_shell_completes_commands_options_and_keys(
    graft: Graft, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["-sc", "install=bash"], ["train", "-sc", "install=bash"]):
        script = graft(*command).stdout
        assert script.split()[-1] == "graft"
    for line, choice in (
        ("graft tr", "train"),
        ("graft train opti", "optimizer="),
        ("graft train optimizer=", "optimizer=adamw optimizer=sgd"),
        ("graft train data=digits data.batch", "data.batch_size="),
        ("graft eval ", ""),
    ):
        monkeypatch.setenv("COMP_LINE", line)
        assert choice in graft("-sc", "query=bash").stdout
