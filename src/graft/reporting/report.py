"""What a person reads: the start-up summary, one line per epoch, the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import Progress
from rich.table import Table
from torch import nn

from graft.config.words import plural
from graft.data.datamodule import TransferDataModule
from graft.models.backbone import Backbone
from graft.models.heads import Head
from graft.plan.results import StageResult
from graft.plan.stage import Stage
from graft.reporting.console import LiteralConsole, console, measured

WORDS = ("group", "trainable", "norm")  # columns of the table of groups

FILE_WIDTH = 120  # columns of tables in output that goes to a file


@rank_zero_only
def say(text: str) -> None:
    console.print(text)


@rank_zero_only
def print_start(
    backbone: Backbone, head: Head, datamodule: TransferDataModule, device: str, run: Path
) -> None:
    classes = datamodule.classes
    names = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in datamodule.splits.items())
    kind = ("class", "classes") if datamodule.splits["train"].targets is None else ("target",)
    rows = datamodule.run_inputs.rows
    say(f"data      {sizes} {rows}, {plural(len(classes), *kind)} ({names})")
    say(f"input     {datamodule.inputs.describe()}")
    say(
        f"backbone  {backbone.description or 'no weights named'}: "
        f"{_count(backbone):,} parameters, {plural(len(backbone.blocks), 'block')}, "
        f"{backbone.num_features} features"
    )
    if backbone.taken:
        say(f"weights   {backbone.taken}")
    say(f"head      {type(head).__name__}: {_count(head):,} parameters")
    say(f"device    {device}")
    say(f"run       {run}")


@rank_zero_only
def print_stage(stage: Stage, rows: Sequence[Mapping[str, Any]], head: nn.Module) -> None:
    """What learns, how fast: the rows of `describe_groups`."""
    if stage.solver != "sgd":
        say(f"stage {stage.name}: {stage.solver} on stored features")
        return
    if stage.grid is not None:
        points = stage.grid.points
        say(f"grid      {plural(len(points), 'head')} in one pass over the features")
        seeds = {point.seed for point in points}
        if len(seeds) > 1 and all(bool((p[0] == p[1]).all()) for p in head.parameters()):
            say("          note: these heads start equal whatever the seed, so they stay equal")
    table = Table(
        title=f"stage {stage.name}: {plural(stage.epochs, 'epoch')}", title_justify="left"
    )
    for column in rows[0]:
        table.add_column(column, justify="left" if column in WORDS else "right")
    for row in rows:
        cells = (f"{v:,}" if isinstance(v, int) else str(v) for v in row.values())
        table.add_row(*cells, style="dim" if row["trainable"] == "no" else None)
    _print(table)


def _print(table: Table) -> None:
    wide = max(console.width, FILE_WIDTH)
    to = console if console.is_terminal else LiteralConsole(width=wide)
    to.print(table)


@rank_zero_only
def print_chosen(result: StageResult, top: int = 10) -> None:
    """What a solver chose, or the best heads of a grid."""
    if result.grid is None:
        if result.head:
            say(f"chosen    {', '.join(f'{k} {_short(v)}' for k, v in result.head.items())}")
        return
    order = result.grid.ranked()
    title = f"heads of stage {result.name}: {min(top, len(order))} best of {len(order)}"
    table = Table(title=title, title_justify="left")
    for column in result.grid.row(0):
        table.add_column(column, justify="right")
    for index in order[:top]:
        table.add_row(*(_short(value) for value in result.grid.row(index).values()))
    _print(table)
    best = result.grid.points[order[0]].lr
    rates = sorted({point.lr for point in result.grid.points})
    if len(rates) > 1 and best in (rates[0], rates[-1]):
        which, way = ("smallest", "smaller") if best == rates[0] else ("largest", "larger")
        say(f"note: the best lr, {_short(best)}, is the {which} of head.grid.lr: try {way} ones")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class EpochLines(L.Callback):
    """One line per epoch: for output that goes to a file, where a progress bar is noise."""

    def __init__(self, monitor: str = "val/acc") -> None:
        self.monitor = monitor
        self.started = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        parts = [
            f"{name} {float(metrics[name]):.4f}"
            for name in dict.fromkeys(("train/loss", "val/loss", "val/acc", self.monitor))
            if name in metrics
        ]
        seconds = time.perf_counter() - self.started
        say(
            f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}  "
            f"{'  '.join(parts)}  {seconds:.1f} s"
        )


class PartsBar:
    """Progress of stored features: a bar on a terminal, else a line every half minute."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.told = time.perf_counter()

    @rank_zero_only
    def __call__(self, done: int, total: int) -> None:
        if sys.stdout.isatty():
            if self.progress is None:
                self.progress = Progress(console=console, transient=True)
                self.progress.start()
                self.progress.add_task("features", total=total)
            self.progress.update(self.progress.task_ids[0], completed=done)
            if done == total:
                self.progress.stop()
                self.progress = None
        elif done < total and time.perf_counter() - self.told > 30:
            say(f"features  {done} of {total} parts")
            self.told = time.perf_counter()


def print_result(record: Mapping[str, Any], run: Path) -> None:
    say("")
    monitor = record["config"]["task"]["monitor"]
    of_test = (monitor.replace("val/", "test/"), "test/acc", "test_target/acc", "oracle/acc")
    for name in dict.fromkeys((monitor, *of_test)):
        if name in record["metrics"]:
            remark = ", the target's best epoch: nothing goes by it" * (name == "oracle/acc")
            say(f"{name:<9} {measured(name, record['metrics'][name])}{remark}")
    if "recall" in record:
        say(f"recall    {record['recall']}")
    say(f"time      {record['seconds']:.1f} s")
    say(f"run       {run}")
    say(f"board     graft board {run.parent}")


def print_scores(result: Mapping[str, Any], worst: int = 20) -> None:
    """Metrics with their intervals, then the classes, those told apart worst if there are many."""
    table = Table()
    for column in ("metric", "value", "95 % interval"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in result["metrics"].items():
        interval = result["intervals"].get(name)
        table.add_row(name, measured(name, value), _interval(name, interval))
    _print(table)
    if "per_class" not in result:
        return
    names = list(result["classes"])
    order = list(range(len(names)))
    accuracy = [result["per_class"][name]["acc"] for name in names]
    if len(names) > worst:
        order = sorted(order, key=lambda i: 2 if accuracy[i] is None else accuracy[i])[:worst]
    table = Table()
    for column in ("class", "images", "acc", "95 % interval", "most often taken for"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for i in order:
        row = result["per_class"][names[i]]
        other, count = row["taken_for"] or ("", 0)
        share = f"{other} {100 * count / row['images']:.1f} %" if count else ""
        acc = "" if row["acc"] is None else measured("acc", row["acc"])
        table.add_row(names[i], f"{row['images']:,}", acc, _interval("acc", row["interval"]), share)
    _print(table)
    say(f"recall    {result['recall']}")


def print_corruptions(result: Mapping[str, Any]) -> None:
    """Accuracy by corruption and severity."""
    table = Table(title="acc in %, by corruption and severity", title_justify="left")
    severities = next(iter(result["corruptions"].values()))
    for column in ("corruption", *map(str, severities), "mean"):
        table.add_column(column, justify="left" if column == "corruption" else "right")
    for name, rows in result["corruptions"].items():
        values = [100 * row["acc"] for row in rows.values()]
        mean = sum(values) / len(values)
        table.add_row(name, *(f"{value:.2f}" for value in (*values, mean)))
    _print(table)
    adapted = ", not adapted" if result["settings"].get("adapt") else ""
    say(f"clean     {measured('acc', result['metrics']['acc'])}{adapted}")
    say(f"mean      {measured('acc', result['mean_acc'])} over all corruptions and severities")


def _interval(name: str, ends: Sequence[float] | None) -> str:
    return "" if ends is None else " to ".join(measured(name, end) for end in ends)


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())
