"""Run folders read back: what was asked for, what came of it."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from graft.config.renamed import as_current
from graft.config.resolved import leaves
from graft.runs.folder import FORMAT
from graft.storage.reading import read_yaml_mapping
from graft.storage.run_json import SHAPES, read_record

# Config keys that make no other experiment: no result depends on them.
IGNORED = (
    "seed", "tags", "paths", "logger", "data.num_workers", "data.pin_memory",
    "data.eval_batch_size", "data.source.cache", "data.source.download",
    "trainer.log_every_n_steps", "trainer.checkpoint_every_n_steps",
    "trainer.checkpoint_every_n_minutes", "callbacks.prune.trial",
)  # fmt: skip
# Likewise, if it is recorded which images were read.
BY_DIGEST = ("data.root", "data.source.root", "data.source.on_error")
FACTS = ("status", "host", "device", "git_commit", "train_images")  # of run.json, to filter by


def objective(config: dict[str, Any]) -> tuple[str, str]:
    """The metric that a run's best checkpoint goes by, and "max" or "min"."""
    task = as_current(config).get("task") or {}
    return str(task.get("monitor", "val/acc")), str(task.get("mode", "max"))


@dataclass(frozen=True)
class Run:
    """One run folder; `problem` says why its record could not be read."""

    path: Path
    record: dict[str, Any]
    config: dict[str, Any]
    problem: str = ""

    @property
    def status(self) -> str:
        return "unreadable" if self.problem else str(self.record.get("status"))

    @property
    def error(self) -> str:
        return self.problem or str(self.record.get("error") or "")

    @property
    def metrics(self) -> dict[str, float]:
        return self.record.get("metrics") or {}

    @cached_property
    def leaves(self) -> dict[str, str]:
        """Every config key with its value as text, folders relative to `paths`."""
        places = [(str(p), f"${{paths.{k}}}") for k, p in self.config.get("paths", {}).items()]

        def shown(value: Any) -> str:
            for place, name in places:
                if isinstance(value, str) and (value == place or value.startswith(place + "/")):
                    return name + value[len(place) :]
            return text(value)

        return {key: shown(value) for key, value in leaves(self.config)}

    @cached_property
    def values(self) -> dict[str, str]:
        """All there is to filter and group by: options of groups, config keys, facts."""
        choices = {k: text(v) for k, v in (self.record.get("choices") or {}).items()}
        facts = {key: text(self.record.get(key)) for key in FACTS}
        return {**facts, **choices, **self.leaves, **self.contents, "status": self.status}

    @cached_property
    def contents(self) -> dict[str, str]:
        """What the images and weights were that the run names by their places, if it recorded it:
        the start of a digest of them.
        """
        data = self.record.get("data") or {}
        splits = [[name, split.get("digest")] for name, split in sorted(data.items())]
        found = (
            {"data.digest": hashlib.sha256(json.dumps(splits).encode()).hexdigest()} if data else {}
        )
        if digest := (self.record.get("weights") or {}).get("digest"):
            found["backbone.weights.digest"] = str(digest)
        return {key: digest[:8] for key, digest in found.items()}

    @cached_property
    def identity(self) -> tuple[tuple[str, str], ...]:
        """Equal for runs that differ by nothing but the seed, and what no result depends on."""
        skipped = [*IGNORED, *(BY_DIGEST if "data.digest" in self.contents else ())]
        if (
            "/" in self.leaves.get("backbone.weights", "")
            and "backbone.weights.digest" in self.contents
        ):
            skipped.append("backbone.weights")
        known = {
            key: value
            for key, value in self.leaves.items()
            if key not in skipped and key.split(".")[0] not in skipped
        }
        known |= self.contents
        if "train_images" in self.record:
            known["train_images"] = text(self.record["train_images"])
        return tuple(sorted(known.items()))

    def has(self, key: str, values: Sequence[str]) -> bool:
        """Whether it has one of these values of a key; one of these tags."""
        if key == "tags":
            return any(text(tag) in values for tag in self.config.get("tags") or [])
        return self.values.get(key, "-") in values

    @property
    def overridden(self) -> list[str]:
        """Keys that were given on the command line or by a sweep."""
        return [o.lstrip("+~").partition("=")[0] for o in self.record.get("overrides") or []]

    def number(self, name: str) -> float | None:
        """A metric, or `seconds`, `fit_seconds` (of the stages alone), `memory_mb`, ..."""
        if name == "fit_seconds":
            stages = self.record.get("stages") or []
            return sum(stage["seconds"] for stage in stages) if stages else None
        return self.metrics.get(name, self.record.get(name))


def text(value: Any) -> str:
    """As one types it; equal for equal numbers. A text stays what it is: 007 is not 07."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ",".join(text(item) for item in value) + "]"
    number = None if isinstance(value, str) else as_number(value)
    return str(value) if number is None else repr(number).removesuffix(".0")


def as_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def find_runs(places: Sequence[Path]) -> list[Run]:
    """The runs in these folders and below, each once, sorted by path.

    Raises:
        ValueError: no such folder, or no run in it.
    """
    found: dict[Path, Run] = {}
    for place in places:
        if not place.is_dir():
            raise ValueError(f"{place}: no such folder")
        paths = [*run_folders(place)]
        if not paths:
            raise ValueError(f"{place}: no run folder in it (one that holds a run.json)")
        found |= {path.resolve(): read_run(path) for path in paths}
    return sorted(found.values(), key=lambda run: str(run.path))


def run_folders(top: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(top):
        if "run.json" in files:
            yield Path(folder)
            below.clear()  # checkpoints and events


def read_run(path: Path) -> Run:
    """A run, of which `problem` says why its record cannot be read: one odd file must not end the
    comparison of a thousand.
    """
    try:
        record = read_record(path)
        if record["format"] > FORMAT:
            written = f"written by a newer graft (format {record['format']}, this one: {FORMAT})"
            return Run(path, record, {}, f"{written}: update graft")
        config = record.get("config") or read_yaml_mapping(path / "config.yaml")
        config = as_current(config)
        if not SHAPES["config"](config):
            return Run(path, {}, {}, "config.yaml is damaged: a group of it is no mapping")
    except (OSError, ValueError) as error:
        return Run(path, {}, {}, " ".join(str(error).replace(f"{path}{os.sep}", "").split()))
    return Run(path, record, config)


def known(name: str, names: Sequence[str], what: str) -> str:
    """`name`, if it is one of `names`.

    Raises:
        ValueError: it is not; says which are close.
    """
    if name in names:
        return name
    close = sorted((full for full in names if full.endswith(f".{name}")), key=len)[:3]
    close = close or difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there is {', '.join(names[:8])}"
    raise ValueError(f"no {what} {name} in these runs: {hint}")
