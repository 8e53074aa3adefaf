"""How much of a run is its folder, its loggers and its checkpoints: each function timed in a run.

    python scripts/overhead.py trainer.max_epochs=20

Wall time, and CPU time of the main thread, which says more on a machine that others use too.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import time
from collections import defaultdict
from typing import Any

started = time.perf_counter()
spent: dict[str, float] = defaultdict(float)
worked: dict[str, float] = defaultdict(float)
calls: dict[str, int] = defaultdict(int)
running: list[str] = []


def timed(part: str, owner: Any, *names: str) -> None:
    """Time spent in these functions; what one calls of the others counts to the caller alone."""
    for name in names:
        raw = inspect.getattr_static(owner, name)
        original = raw.__func__ if isinstance(raw, classmethod) else raw

        @functools.wraps(original)
        def measured(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            if running and part != "fsync":
                return original(*args, **kwargs)
            running.append(part)
            before, cpu = time.perf_counter(), time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - before
                worked[part] += time.thread_time() - cpu
                calls[part] += 1
                running.pop()

        setattr(owner, name, classmethod(measured) if isinstance(raw, classmethod) else measured)


def main() -> None:
    from graft.commands import train
    from graft.reporting import collect, loggers, tensorboard
    from graft.runs import startup
    from graft.runs.folder import RunFolder
    from graft.training import checkpoint

    startup.import_libraries()
    imported = time.perf_counter() - started
    timed("run folder", RunFolder, "create", "update", "finish")
    timed("TensorBoard", loggers.TensorBoard, "log_metrics", "flush", "finalize")
    timed("metrics.csv", loggers.CSV, "log_metrics")
    timed("hyper-parameters, text", tensorboard, "log_start", "log_groups")
    timed("pictures of inputs", tensorboard.Inputs, "on_train_batch_start")
    timed("pictures of the test", tensorboard, "log_end", "log_grid")
    timed("predictions of the test", collect.Collect, "on_test_batch_end", "on_test_end")
    timed("checkpoints", checkpoint, "write_checkpoint")
    timed("fsync", os, "fsync")  # within the run folder and checkpoints
    try:
        train.entry(train.main)
    finally:
        total, cpu = time.perf_counter() - started, time.thread_time()
        print(f"\n{total:.1f} s in all ({cpu:.1f} s of CPU), {imported:.1f} s of it imports")
        own = [part for part in spent if part not in ("checkpoints", "fsync")]
        rows = {part: [part] for part in sorted(spent, key=lambda part: -spent[part])}
        for name, parts in {**rows, "folder and logging": own}.items():
            wall, work = (sum(seconds[part] for part in parts) for seconds in (spent, worked))
            print(
                f"{name:<24} {1000 * wall:8.1f} ms {100 * wall / total:5.2f} %   CPU "
                f"{1000 * work:8.1f} ms {100 * work / cpu:5.2f} %  {sum(calls[p] for p in parts)}x"
            )


if __name__ == "__main__":
    sys.exit(main())
