"""How bench/bench.py measures: fresh processes, interleaved repeats, ceilings, the table."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GATE = 0.3  # points of test accuracy


@dataclass(frozen=True)
class Sample:
    """One measurement of one contestant."""

    seconds: float  # of the work compared, which may be less than all it did
    cpu: float = 0.0  # of all it did, its children included
    peak: float = 0.0  # GB resident at once in all its processes, shared pages counted once
    accuracy: float | None = None  # on test, in percent


Contestant = Callable[[int], Sample]  # called with the number of the repeat, which is its seed


@dataclass(frozen=True)
class Line:
    row: str
    ours: str = ""
    theirs: str = ""
    ratio: str = ""
    goal: str = ""
    verdict: str = ""
    note: str = ""
    ceiling: str = ""


class Skip(Exception):
    """This row cannot run here, and why."""


# ---------------------------------------------------------------- pure helpers
def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, and (min..max) where there are several."""
    middle = f"{statistics.median(values):.{digits}g}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}g}..{max(values):.{digits}g})"


def verdict(ratio: float, goal: float | None) -> str:
    if goal is None:
        return ""
    return "met" if ratio >= goal else f"missed: {ratio / goal:.0%} of it"


def gate(ours: Iterable[Sample], theirs: Iterable[Sample]) -> tuple[bool, str]:
    """Whether the results are equal, and both in words. Nothing to compare is equal."""
    middles = [
        statistics.median(known)
        for samples in (ours, theirs)
        if (known := [s.accuracy for s in samples if s.accuracy is not None])
    ]
    if len(middles) < 2:
        return True, ""
    equal = abs(middles[0] - middles[1]) <= GATE + 1e-9
    return equal, f"test {middles[0]:.2f} % against {middles[1]:.2f} %"


def table(lines: Iterable[Line]) -> str:
    names = [field.name for field in dataclasses.fields(Line)]
    rows = [names, ["---"] * len(names)]
    for line in lines:
        cells = (str(getattr(line, name)) for name in names)
        rows.append([" ".join(cell.replace("|", "\\|").split()) for cell in cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


# ---------------------------------------------------------------- measuring
def cpu_seconds() -> float:
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(work: Callable[[], Any]) -> Sample:
    before, started = cpu_seconds(), time.perf_counter()
    work()
    return Sample(time.perf_counter() - started, cpu_seconds() - before)


def resident_gb(root: int) -> float:
    """Of a process and all below it; a page they share counts once (PSS). Linux only."""
    total, waiting = 0, [root]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            text = (process / "smaps_rollup").read_text()
            total += next(int(x.split()[1]) for x in text.splitlines() if x.startswith("Pss:"))
            for children in process.glob("task/*/children"):
                waiting += map(int, children.read_text().split())
        except (OSError, StopIteration):
            continue  # it ended meanwhile
    return total * 1024 / 1e9


def run_process(
    command: Sequence[str], env: Mapping[str, str], watch: bool = False
) -> tuple[Sample, str]:
    """(Sample, stdout) of a fresh process; `watch` samples its memory while it runs.

    Not `ru_maxrss`: on Linux a child inherits the peak of the process it was forked from.
    """
    peak, ended = 0.0, threading.Event()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        before, started = cpu_seconds(), time.perf_counter()
        process = subprocess.Popen(command, env=dict(env), stdout=out, stderr=err)

        def follow() -> None:
            nonlocal peak
            while not ended.wait(0.1):
                peak = max(peak, resident_gb(process.pid))

        watcher = threading.Thread(target=follow)
        if watch:
            watcher.start()
        try:
            code = process.wait()
        finally:
            ended.set()
            if watch:
                watcher.join()
        sample = Sample(time.perf_counter() - started, cpu_seconds() - before, peak)
        out.seek(0)
        err.seek(0)
        text, errors = out.read(), err.read()
    if code != 0:
        last = " ".join((errors.strip() or text.strip()).splitlines()[-2:])
        raise RuntimeError(f"{Path(command[1]).name} {command[2]} ended with {code}: {last}")
    return sample, text


def interleave(contestants: Mapping[str, Contestant], repeats: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for repeat in range(repeats):
        for name, contestant in contestants.items():
            sample = contestant(repeat)
            print(f"  {name} {repeat + 1}/{repeats}: {sample}", file=sys.stderr, flush=True)
            samples[name].append(sample)
    return samples


def gemm_gflops(size: int = 2048, repeats: int = 5, dtype: str = "float32") -> float:
    """Best of some fp32 matrix products: what the arithmetic units give to this process now."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    return 2 * size**3 / _fastest(lambda: a @ a, repeats) / 1e9


def copy_gbs(megabytes: int = 256, repeats: int = 5) -> float:
    """Best of some copies larger than the caches; bytes read and written both count."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(megabytes * 250_000, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), repeats) / 1e9


def _fastest(work: Callable[[], Any], repeats: int) -> float:
    import torch

    seconds = []
    for _ in range(repeats + 1):  # the first is a warm-up, and never the fastest
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
