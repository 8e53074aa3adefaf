"""The benchmark's own arithmetic: medians, the gate of equal results, verdicts, the table."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "bench_measure.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_measure", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("values", "text"),
    [([2.0], "2"), ([3.0, 1.0, 2.0], "2 (1..3)"), ([1.0, 2.0], "1.5 (1..2)")],
)
def test_spread_is_the_median_with_its_range(
    bench: ModuleType, values: list[float], text: str
) -> None:
    assert bench.spread(values) == text


@pytest.mark.parametrize(
    ("ratio", "goal", "text"),
    [(15.0, 15.0, "met"), (7.5, 15.0, "missed: 50% of it"), (1.0, None, "")],
)
def test_verdict_says_by_how_much(
    bench: ModuleType, ratio: float, goal: float | None, text: str
) -> None:
    assert bench.verdict(ratio, goal) == text


@pytest.mark.parametrize(
    ("ours", "theirs", "equal"),
    [
        ([80.0], [80.3], True),
        ([80.0], [80.31], False),
        ([80.31], [80.0], False),
        ([70.0, 80.0, 80.1], [80.2], True),  # medians: one bad repeat does not decide
        ([None], [80.0], True),  # a contestant without an accuracy has none to compare
    ],
)
def test_gate_compares_median_accuracies(
    bench: ModuleType, ours: Sequence[float | None], theirs: Sequence[float | None], equal: bool
) -> None:
    sides = [[bench.Sample(1.0, accuracy=a) for a in side] for side in (ours, theirs)]
    assert bench.gate(*sides)[0] is equal


def test_gate_names_both_accuracies(bench: ModuleType) -> None:
    sides = [[bench.Sample(1.0, accuracy=a)] for a in (79.0, 80.5)]
    assert bench.gate(*sides) == (False, "test 79.00 % against 80.50 %")


def test_table_keeps_one_line_per_row_whatever_a_cell_holds(bench: ModuleType) -> None:
    lines = bench.table([bench.Line("a", note="x | y\nz"), bench.Line("b", ours="1 s")])
    header, rule, first, second = lines.splitlines()
    assert header.startswith("| row | ours | theirs | ratio | goal | verdict |")
    assert rule.count("---") == header.count("|") - 1
    assert "x \\| y z" in first
    assert second.startswith("| b | 1 s |")


def test_repeats_are_interleaved(bench: ModuleType) -> None:
    calls: list[tuple[str, int]] = []

    def contestant(name: str, repeat: int) -> object:
        calls.append((name, repeat))
        return bench.Sample(float(repeat))

    names = {name: lambda repeat, name=name: contestant(name, repeat) for name in "ab"}
    samples = bench.interleave(names, 2)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [s.seconds for s in samples["a"]] == [0.0, 1.0]


def test_a_process_is_measured_with_its_children(bench: ModuleType) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint('done')"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    sample, text = bench.run_process([sys.executable, "-c", child], os.environ)
    assert text.strip() == "done"
    assert sample.cpu >= 0.3
    assert sample.seconds >= 0.3


def test_a_failing_process_says_what_it_said(bench: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="ended with 1: no such thing"):
        bench.run_process([sys.executable, "-c", "exit('no such thing')"], os.environ)
