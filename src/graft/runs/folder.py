"""The run folder: the one interface between the command that trains and those that come after."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from graft.config.names import file_word, shortened
from graft.runs import resources
from graft.storage.disk import create_exclusively, overwrite, remove_leftovers, write_atomically
from graft.storage.run_json import read_record
from graft.training.signals import slurm_job

STATUSES = ("queued", "running", "done", "failed", "preempted", "pruned")
FINAL = ("done", "pruned")
FORMAT = 3
SWEEP = "sweep.yaml"  # in a sweep's folder: its command line
OLDEST = 2  # 1 did not record what resuming and comparing need; see `config.renamed`
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
        self.writing = threading.RLock()  # see graft.training.watch

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
            path = create_exclusively(parent, name)
        except OSError as error:
            raise OSError(
                f"cannot create a run folder in {parent} ({error.strerror}): set paths.logs or "
                "GRAFT_LOGS to a folder you may write to"
            ) from error
        folder = cls(path)
        try:
            folder.write("config.yaml", config)
            folder.write("overrides.yaml", list(overrides))
            folder.update(
                format=FORMAT,
                status="queued",
                started=None,
                finished=None,
                name=config.get("name"),
                tags=config.get("tags"),
                seed=config.get("seed"),
                stage=None,
                stages=[],
                metrics={},
                overrides=list(overrides),
                choices=dict(choices or {}),
                config=config,
                **fields,
            )
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
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
            folder.record = read_record(path)
            found = folder.record["format"]
        except OSError as error:
            inside = sorted(p.parent.name for p in path.glob("*/run.json"))
            hint = f"; there are {len(inside)} in it, like {path / inside[-1]}" if inside else ""
            raise ValueError(f"{path} is not a run folder: no readable run.json{hint}") from error
        if not OLDEST <= found <= FORMAT:
            age = "a newer" if found > FORMAT else "an older"
            raise ValueError(
                f"{path} was written by {age} version of graft: its format is {found}, this one "
                f"reads {OLDEST} to {FORMAT}"
            )
        return folder

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
            remove_leftovers(self.path, *self.path.glob("checkpoints/*/"))
            yield
        finally:
            lock.release()

    def update(self, **fields: Any) -> None:
        with self.writing:
            self.record.update(fields)
            ordered = dict(sorted(self.record.items(), key=lambda item: item[0] == "config"))
            try:
                write_atomically(self.path / "run.json", json.dumps(ordered, indent=2) + "\n")
            except OSError:
                if self.record["status"] in ("queued", "running"):
                    raise
                # Without the indentation it may fit where the longer text was.
                overwrite(self.path / "run.json", json.dumps(ordered) + "\n")

    def finish(self, status: str, **fields: Any) -> None:
        """Record how the run ended; the first to say so is right."""
        peaks = resources.peak_memory()
        for key, before in ((key, self.record.get(key)) for key in peaks):
            peaks[key] = max(peaks[key] or 0, before or 0) or None  # of a resumed run, the largest
        with self.writing:
            if self.record["status"] == "running":
                self.update(status=status, finished=_now(), **peaks, **fields)


def run_name(config: Mapping[str, Any], experiment: str | None, overrides: Sequence[str]) -> str:
    """Readable and sortable: time, the run's name, what was overridden, the seed."""
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    words = "_".join(name_words(config, experiment, overrides))
    return f"{now}_{shortened(words)}_seed{config['seed']}"


def name_words(
    config: Mapping[str, Any], experiment: str | None, overrides: Sequence[str]
) -> list[str]:
    name = config.get("name")
    words = [*([] if name is None else [file_word(str(name))])]
    if experiment or not words:
        words.append(file_word(experiment or "default"))
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key not in ("experiment", "seed", "name") and not key.startswith(("paths.", "hydra.")):
            words.append(file_word(f"{key.rsplit('.', 1)[-1]}-{value.rsplit('/', 1)[-1]}"))
    return words


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
