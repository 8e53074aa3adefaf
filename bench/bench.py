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
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from bench_contestants import Bench
from bench_measure import Line, Skip, copy_gbs, gemm_gflops, table


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
