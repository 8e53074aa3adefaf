"""The run folder: the one interface between the command that trains and those that come after."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

FORMAT = 1
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "torchmetrics", "numpy")


class RunFolder:
    """`config.yaml`, `overrides.yaml` and `run.json` of one run; created, never shared.

    `run.json` is replaced atomically at every change of state, so a reader always sees a whole one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = {}

    @classmethod
    def create(
        cls, parent: Path, name: str, config: dict[str, Any], overrides: Sequence[str]
    ) -> RunFolder:
        """A new folder `parent/name`, or `name-2`, ... where that is taken.

        Raises:
            OSError: `parent` cannot be written to.
        """
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path = _create_exclusively(parent, name)
        except OSError as error:
            raise OSError(
                f"cannot create a run folder in {parent} ({error.strerror}): set paths.logs or "
                "GRAFT_LOGS to a folder you may write to"
            ) from error
        folder = cls(path)
        for file, content in (("config.yaml", config), ("overrides.yaml", list(overrides))):
            write_atomically(path / file, OmegaConf.to_yaml(OmegaConf.create(content)))
        folder.update(
            format=FORMAT,
            status="running",
            started=_now(),
            finished=None,
            seed=config.get("seed"),
            stage=None,
            metrics={},
            host=socket.gethostname(),
            python=platform.python_version(),
            versions={package: version(package) for package in PACKAGES},
            **_git_state(),
        )
        return folder

    def update(self, **fields: Any) -> None:
        self.record.update(fields)
        write_atomically(self.path / "run.json", json.dumps(self.record, indent=2) + "\n")

    def finish(self, status: str, **fields: Any) -> None:
        self.update(status=status, finished=_now(), **fields)


def run_name(experiment: str | None, overrides: Sequence[str], seed: int) -> str:
    """Readable and sortable: time, then what was overridden, then the seed; no `=` or slashes."""
    words = [datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), experiment or "default"]
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key not in ("experiment", "seed") and not key.startswith("paths."):
            word = f"{key.rsplit('.', 1)[-1]}-{value.rsplit('/', 1)[-1]}"
            words.append(re.sub(r"[^\w.-]+", "-", word).strip("-"))
    return "_".join(words)[:120] + f"_seed{seed}"


def _create_exclusively(parent: Path, name: str) -> Path:
    for attempt in range(1, 1000):
        path = parent / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{parent / name} and 999 more exist")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Whole or not at all, whatever stops the process."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git_state() -> dict[str, Any]:
    """Commit and whether files differ from it; None outside a checkout or without git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"git_commit": commit, "git_dirty": bool(status) if commit else None}
