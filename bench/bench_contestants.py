"""The contestants of bench/bench.py: Graft and baselines, each in fresh processes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_measure import (
    Contestant,
    Line,
    Sample,
    Skip,
    gate,
    interleave,
    run_process,
    spread,
    verdict,
)

SCRIPTS = Path(__file__).resolve().parent


class Bench:
    """What a row needs: the images, contestants in fresh processes, and lines of the table."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.work = work
        self.repeats: int = arguments.repeats
        self.epochs: int | None = arguments.epochs
        self.jobs: int = arguments.jobs or (2 if arguments.limit else 32)
        self.limit: int | None = arguments.limit
        self.env = dict(os.environ)
        if arguments.weights_home:
            self.env["TORCH_HOME"] = os.environ["TORCH_HOME"] = str(arguments.weights_home)
        paths = [str(SCRIPTS), *filter(None, [self.env.get("PYTHONPATH")])]
        self.env["PYTHONPATH"] = os.pathsep.join(paths)
        self.whole: Path | None = arguments.images
        self.memory: dict[str, Any] = {}  # what rows share

    @property
    def images(self) -> Path:
        return self.subset(self.limit)

    def subset(self, train: int | None) -> Path:
        """The class folders with the first `train` training images, test images in proportion."""
        if self.whole is None:
            raise Skip("needs --images FOLDER")
        folder = self.whole.resolve()
        small = self.work / f"images-{train}"
        if train is None or small.is_dir():
            return folder if train is None else small
        total = sum(1 for _ in (folder / "train").glob("*/*"))
        for source in sorted(folder.glob("t*/*")):
            files = sorted(source.iterdir())
            target = small / source.relative_to(folder)
            target.mkdir(parents=True)
            for file in files[: max(1, round(len(files) * train / total))]:
                (target / file.name).symlink_to(file)
        return small

    def folder(self, name: str = "x") -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.work))

    def graft(
        self, *overrides: str, cache: Path | None = None, clock: bool = False, watch: bool = False
    ) -> Contestant:
        """`graft train` in a process of its own. Without `cache`, every repeat starts cold.

        clock: seconds are those of an epoch's training batches, not of the whole process.
        """

        def run(repeat: int) -> Sample:
            folder = self.folder("graft")
            command = [sys.executable, "-m", "graft", "train", *overrides, f"seed={repeat}"]
            if clock:
                command.append("+callbacks.clock._target_=baselines_lightning.EpochClock")
                command.append(f"+callbacks.clock.file='{folder}/epochs.json'")
            places = {"GRAFT_LOGS": folder / "logs", "GRAFT_CACHE": cache or folder / "cache"}
            env = {**self.env, **{key: str(value) for key, value in places.items()}}
            sample, _ = run_process(command, env, watch)
            record = json.loads(next((folder / "logs").glob("*/run.json")).read_text())
            sample = dataclasses.replace(sample, accuracy=100 * record["metrics"]["test/acc"])
            if clock:
                seconds = json.loads((folder / "epochs.json").read_text())
                sample = dataclasses.replace(
                    sample, seconds=statistics.median(seconds[1:] or seconds)
                )
            return sample

        return run

    def baseline(self, name: str, **options: Any) -> Contestant:
        """One of baselines.py in a process of its own; it may time a part of itself."""

        def run(repeat: int) -> Sample:
            options_ = {"out": self.folder(name), "seed": repeat, **options}
            command = [sys.executable, str(SCRIPTS / "baselines.py"), name]
            command += [f"--{k}={v}" for k, v in options_.items() if v is not None]
            sample, text = run_process(command, self.env)
            return dataclasses.replace(sample, **json.loads(text.strip().splitlines()[-1]))

        return run

    def versus(
        self,
        row: str,
        contestants: Mapping[str, Contestant],
        goal: float | None = None,
        *,
        items: int | None = None,
        note: str = "",
    ) -> Line:
        """Measure ours and theirs, in this order. `items` turns seconds into a rate."""
        samples = interleave(contestants, self.repeats)
        ours, theirs = samples.values()
        return self.compare(row, ours, theirs, goal, items=items, note=note)

    def compare(
        self,
        row: str,
        ours: Sequence[Sample],
        theirs: Sequence[Sample],
        goal: float | None,
        *,
        items: int | None = None,
        note: str = "",
    ) -> Line:
        equal, results = gate(ours, theirs)
        medians = [statistics.median(s.seconds for s in side) for side in (ours, theirs)]
        cpu = " against ".join(f"{statistics.median(s.cpu for s in x):.3g}" for x in (ours, theirs))
        ratio = medians[1] / medians[0]
        return Line(
            row,
            _figure(ours, items),
            _figure(theirs, items),
            f"{ratio:.3g}x",
            "" if goal is None else f"{goal:g}x",
            verdict(ratio, goal) if equal else f"void: {results}",
            "; ".join(filter(None, [note, results if equal else "", f"CPU {cpu} s"])),
        )


def _figure(samples: Sequence[Sample], items: int | None) -> str:
    if items is None:
        return f"{spread([s.seconds for s in samples])} s"
    return f"{spread([items / s.seconds for s in samples])} images/s"
