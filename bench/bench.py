"""Graft and what people use today, side by side in one run; prints a Markdown table.

    python bench/bench.py --list
    python bench/bench.py probe-warm finetune-bare --images CIFAR_FOLDERS --out table.md
    python bench/bench.py --images CIFAR_FOLDERS --limit 500 --repeats 1 --epochs 1     a check

FOLDER holds class folders (train/<class>/*, test/<class>/*) of 32 px images in ten classes.
Repeats are interleaved (A B A B); figures are medians with their range. What matrix products and
copies reach at that moment is measured before and after each row. A row whose contestants differ
by more than 0.3 points of test accuracy is void. Peers that are no dependencies of Graft:
`pip install timm lightly`; their rows are skipped without them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_measure import (
    Contestant,
    Line,
    Sample,
    Skip,
    copy_gbs,
    gate,
    gemm_gflops,
    interleave,
    run_process,
    spread,
    table,
    verdict,
)

SCRIPTS = Path(__file__).resolve().parent


# ---------------------------------------------------------------- contestants
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


# ---------------------------------------------------------------- the command
def ceiling() -> tuple[float, float]:
    return gemm_gflops(), copy_gbs()


def run_row(name: str, row: Callable[[Bench], Iterable[Line]], bench: Bench) -> list[Line]:
    """Its lines with the ceilings; an error or a reason to skip is a line too."""
    print(f"{name}", file=sys.stderr, flush=True)
    before = ceiling()
    try:
        lines = list(row(bench))
    except Skip as reason:
        return [Line(name, verdict=f"skipped: {reason}")]
    except Exception as error:
        traceback.print_exc()
        return [Line(name, verdict=f"ERROR: {type(error).__name__}: {error}")]
    after = ceiling()
    words = ", ".join(
        f"{a:.0f} -> {b:.0f} {unit}"
        for a, b, unit in zip(before, after, ("GFLOP/s", "GB/s"), strict=True)
    )
    return [dataclasses.replace(line, ceiling=words) for line in lines]


def header(bench: Bench) -> str:
    import torch

    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [x.split(":")[1] for x in info.read_text().splitlines() if x.startswith("model na")]
        cpu = names[0].strip() if names else cpu
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    size = "all images" if bench.limit is None else f"ONLY {bench.limit} training images: a check"
    epochs = f", ONLY {bench.epochs} epochs" if bench.epochs else ""
    return (
        f"{datetime.date.today()}, {cpu}, {cores} cores, {device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; {bench.repeats} repeats, {size}{epochs}. "
        "Median (min..max); ceilings are an fp32 matrix product of 2048 and a copy of 256 MB, "
        "before -> after the row.\n\n"
    )


def main() -> None:
    import bench_rows_runs  # noqa: F401 (adds its rows)
    from bench_rows import ROWS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="all, if none is named")
    parser.add_argument("--images", type=Path, help="class folders")
    parser.add_argument("--weights-home", type=Path, help="TORCH_HOME with pretrained weights")
    parser.add_argument("--limit", type=int, help="training images, for a check")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="instead of each row's own number")
    parser.add_argument("--jobs", type=int, help="of the conventional sweep that are run (32)")
    parser.add_argument("--out", type=Path, help="also write the table here, row by row")
    parser.add_argument("--list", action="store_true", help="name the rows")
    arguments = parser.parse_args()
    if arguments.list:
        for name, row in ROWS.items():
            print(f"{name:<22}{(row.__doc__ or '').splitlines()[0]}")
        return
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; the rows are {', '.join(ROWS)}")
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as work:
        bench = Bench(arguments, Path(work))
        for name in arguments.rows or ROWS:
            lines += run_row(name, ROWS[name], bench)
            if arguments.out:
                arguments.out.write_text(header(bench) + table(lines))
        print(header(bench) + table(lines))
    if any(line.verdict.startswith("ERROR") for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
