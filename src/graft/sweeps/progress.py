"""What a sweep says while it runs."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.status import Status

from graft.reporting.console import console, measured
from graft.runs.folder import FINAL
from graft.runs.records import objective


class Progress:
    """A line as each job ends; on a terminal also one that stays at the bottom."""

    def __init__(self, total: int, skipped: int) -> None:
        self.total = total
        self.skipped = skipped
        self.ended: Counter[str] = Counter()
        self.failed: list[str] = []
        self.started = self.last = time.monotonic()  # of the sweep, and when a job ended
        self.status: Status | None = None

    @contextmanager
    def shown(self, *, live: bool) -> Iterator[None]:
        """Live only where nothing else writes to the terminal."""
        if live and console.is_terminal:
            with console.status("") as self.status:
                yield
        else:
            yield

    def update(self, running: int) -> None:
        if self.status is not None:
            self.status.update(f"sweep: {self.count()} ended {self.rest(running)}")

    def count(self) -> str:
        return f"{self.skipped + self.ended.total()}/{self.total}"

    def end(self, label: str, record: dict[str, Any], running: int) -> None:
        status = record["status"]
        self.ended[status] += 1
        self.last = time.monotonic()
        monitor, _ = objective(record["config"])
        shown = (monitor, monitor.replace("val/", "test/"))
        what = [
            f"{name} {measured(name, record['metrics'][name])}"
            for name in shown
            if name in record["metrics"]
        ]
        if status not in FINAL:
            what = [" ".join((record.get("error") or "another process is at it").split())]
            self.failed.append(label)
        seconds = f"{record['seconds']:.1f} s" if "seconds" in record else ""
        text = "  ".join([f"[{self.count()}]", f"{status:<9}", label, *what, seconds])
        console.print(text, self.rest(running))

    def rest(self, running: int) -> str:
        """(1 failed, 2 running, 0:04:10 left)"""
        ran = self.ended.total()
        each = (self.last - self.started) / ran if ran else 0
        left = each * (self.total - self.skipped - ran) - (time.monotonic() - self.last)
        parts = [f"{len(self.failed)} failed"] * bool(self.failed)
        parts += [f"{running} running"] * bool(running)
        parts += [f"{datetime.timedelta(seconds=round(left))} left"] * (left > 0)
        return f"({', '.join(parts)})" if parts else ""
