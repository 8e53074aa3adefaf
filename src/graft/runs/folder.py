"""The run folder: the one interface between the command that trains and those that come after."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from graft.runs import resources
from graft.signals import slurm_job

STATUSES = ("queued", "running", "done", "failed", "preempted", "pruned")
FINAL = ("done", "pruned")
FORMAT = 2  # 1 did not record what resuming and comparing need
LOCK_SECONDS = 10.0  # workers of a run that was killed hold its lock until they notice
DIFF_LIMIT = 1_000_000  # bytes of git.diff
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "torchmetrics", "numpy")


class RunFolder:
    """`config.yaml`, `overrides.yaml` and `run.json` of one run; created, never shared.

    `run.json` is replaced atomically at every change of state, so a reader always sees a whole one.
    It repeats the config, because JSON is read 25 times faster than YAML: `graft compare` looks at
    thousands. `git.diff` is what a checkout with changes differs by.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = {}

    @classmethod
    def create(
        cls,
        parent: Path,
        name: str,
        config: dict[str, Any],
        overrides: Sequence[str],
        choices: Mapping[str, str | None] | None = None,
        **fields: Any,
    ) -> RunFolder:
        """A new folder `parent/name`, or `name-2`, ... where that is taken; its run is `queued`.

        Args:
            choices: the option of each config group, which the config itself does not name.
            fields: more of `run.json`.

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
        folder.write("config.yaml", config)
        folder.write("overrides.yaml", list(overrides))
        folder.update(
            format=FORMAT,
            status="queued",
            started=None,
            finished=None,
            seed=config.get("seed"),
            stage=None,
            stages=[],
            metrics={},
            overrides=list(overrides),
            choices=dict(choices or {}),
            config=config,
            **fields,
        )
        return folder

    def start(self) -> None:
        """Its run begins, with this code on this machine, or goes on."""
        began = {}
        if self.record["started"] is None:
            commit, diff = checkout(Path(__file__).parent)
            if diff:
                (self.path / "git.diff").write_bytes(diff)
            began = {
                "started": _now(),
                "host": socket.gethostname(),
                "python": platform.python_version(),
                "versions": _versions(),
                "hardware": resources.hardware(),
                "slurm_job": slurm_job(),
                "git_commit": commit,
                "git_dirty": bool(diff) if commit else None,
            }
        self.update(status="running", finished=None, error=None, **began)
        resources.reset_peak()

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of an earlier run.

        Raises:
            ValueError: it is none, or one that this version does not understand.
        """
        folder = cls(path.resolve())
        try:
            folder.record = json.loads((path / "run.json").read_text(encoding="utf-8"))
            found = folder.record["format"]
        except (OSError, ValueError, KeyError) as error:
            inside = sorted(p.parent.name for p in path.glob("*/run.json"))
            hint = f"; there are {len(inside)} in it, like {path / inside[-1]}" if inside else ""
            raise ValueError(f"{path} is not a run folder: no readable run.json{hint}") from error
        if found != FORMAT:
            age = "a newer" if found > FORMAT else "an older"
            raise ValueError(
                f"{path} was written by {age} version of graft: its format is {found}, this one "
                f"reads {FORMAT}"
            )
        return folder

    def read(self, file: str) -> Any:
        """`config.yaml` or `overrides.yaml`, as plain values."""
        try:
            return OmegaConf.to_container(OmegaConf.load(self.path / file))
        except (OSError, ValueError, YAMLError) as error:
            raise ValueError(f"{self.path / file} cannot be read: {error}") from error

    def write(self, file: str, content: Any) -> None:
        write_atomically(self.path / file, OmegaConf.to_yaml(OmegaConf.create(content)))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For as long as a process works in the folder; the system frees the lock if it dies.

        Raises:
            ValueError: another one does.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise ValueError(
                f"{self.path} is being written by another process (started on "
                f"{self.record.get('host')}): wait for it, or stop it"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def update(self, **fields: Any) -> None:
        self.record.update(fields)
        ordered = dict(sorted(self.record.items(), key=lambda item: item[0] == "config"))
        write_atomically(self.path / "run.json", json.dumps(ordered, indent=2) + "\n")

    def finish(self, status: str, **fields: Any) -> None:
        peaks = resources.peak_memory()
        for key, before in ((key, self.record.get(key)) for key in peaks):
            peaks[key] = max(peaks[key] or 0, before or 0) or None  # of a resumed run, the largest
        self.update(status=status, finished=_now(), **peaks, **fields)


def run_name(experiment: str | None, overrides: Sequence[str], seed: int) -> str:
    """Readable and sortable: time, then what was overridden, then the seed; no `=` or slashes."""
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return "_".join([now, *name_words(experiment, overrides)])[:120] + f"_seed{seed}"


def name_words(experiment: str | None, overrides: Sequence[str]) -> list[str]:
    words = [re.sub(r"[^\w.-]+", "-", experiment or "default")]
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key not in ("experiment", "seed") and not key.startswith("paths."):
            word = f"{key.rsplit('.', 1)[-1]}-{value.rsplit('/', 1)[-1]}"
            words.append(re.sub(r"[^\w.-]+", "-", word).strip("-"))
    return words


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
    except OSError as error:  # a full disk is met when writing, which does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


@cache
def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


@cache  # a process runs the code it started with
def checkout(folder: Path) -> tuple[str | None, bytes]:
    """Commit of the checkout that `folder` is in, and the diff of its tracked files from it.

    (None, nothing) outside a checkout or without git.
    """

    def git(*arguments: str) -> bytes | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    diff = commit and git("diff", "--no-ext-diff", "--no-color", "HEAD")
    if diff and len(diff) > DIFF_LIMIT:
        diff = diff[:DIFF_LIMIT] + f"\n... cut: {len(diff):,} bytes in all\n".encode()
    return commit.decode().strip() if commit else None, diff or b""
