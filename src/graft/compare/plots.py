"""`graft compare --plot`: learning curves with bands, bars with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from graft.compare.groups import Comparison, Group, settings
from graft.compare.tables import heading, interval
from graft.config.names import visible
from graft.reporting.console import is_share
from graft.reporting.fonts import drawable
from graft.runs.records import Run
from graft.storage.reading import read_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEGEND = 20  # groups that a legend can name
HALF = 30  # letters that are left of either end of a long name


def draw(comparison: Comparison, metric: str, path: Path) -> None:
    """A PNG, PDF or SVG: validation over steps, and `metric` of each group.

    Raises:
        ValueError: the file's ending names no format of pictures.
    """
    from matplotlib import font_manager, ft2font, rc_context

    groups = comparison.groups
    texts, usual = settings(comparison.columns, [group.values for group in groups])
    title = f"settings of most: {usual}" if usual else ""
    (title, *names), fonts = zip(*map(drawable, [title, *texts]), strict=True)
    families = ["DejaVu Sans"]
    for font in {font for font in fonts if font}:
        font_manager.fontManager.addfont(font)
        families.append(ft2font.FT2Font(str(font)).family_name)
    with rc_context({"font.family": families, "text.parse_math": False}):  # $ is a letter
        _draw(groups, names, metric, title, path)


def _draw(
    groups: Sequence[Group], names: Sequence[str], metric: str, title: str, path: Path
) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot: it looks for a display

    height = max(4.0, 1.5 + 0.3 * len(groups))
    figure = Figure(figsize=(13, min(height, 100)), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    curve = metric.replace("test/", "val/", 1)
    names = [n if len(n) <= 2 * HALF else f"{n[:HALF]}...{n[-HALF:]}" for n in names]
    colours = colormaps["viridis"].resampled(len(groups))
    for place, (group, name) in enumerate(zip(groups, names, strict=True)):
        _curve(curves, group, curve, colours(place), name)
        _bar(bars, group, metric, place, colours(place))
    curves.set(xlabel="step", ylabel=heading(curve), title="mean ± standard deviation over seeds")
    if len(groups) <= LEGEND:
        curves.legend(fontsize="small")
    bars.set_yticks(range(len(groups)), names)
    bars.invert_yaxis()
    bars.set(xlabel=heading(metric), title="mean and 95 % interval; dots are runs")
    bars.margins(x=0.1)
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=120)


def _curve(axes: Axes, group: Group, metric: str, colour: object, name: str) -> None:
    values: dict[int, list[float]] = {}
    for run in group.runs.values():
        try:
            curve = learning_curve(run, metric)
        except (OSError, ValueError) as error:
            print(f"note: no curve of {visible(str(error))}")
            continue
        for step, value in curve.items():
            values.setdefault(step, []).append(value * (100 if is_share(metric) else 1))
    steps = sorted(values)
    means = [fmean(values[step]) for step in steps]
    spreads = [stdev(values[step]) if len(values[step]) > 1 else 0.0 for step in steps]
    axes.plot(steps, means, color=colour, label=name, marker="." if len(steps) < 30 else "")
    low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def _bar(axes: Axes, group: Group, metric: str, place: int, colour: object) -> None:
    scale = 100 if is_share(metric) else 1
    numbers = [scale * number for number in group.numbers(metric).values()]
    summary = group.summary(metric)
    if summary is None:
        return
    low, high = interval(metric, summary.mean, summary.half or 0.0)
    reach = [[scale * (summary.mean - low)], [scale * (high - summary.mean)]]
    axes.errorbar(scale * summary.mean, place, xerr=reach, fmt="D", color=colour, capsize=4)
    axes.plot(numbers, [place] * len(numbers), ".", color="black", markersize=4, zorder=3)


def learning_curve(run: Run, metric: str) -> dict[int, float]:
    """Values of a metric by step, from `metrics.csv`; none where nothing was logged."""
    file = run.path / "metrics.csv"
    if not file.exists():  # logger=null
        return {}
    rows = [row for row in read_csv(file) if row.get(metric)]
    try:
        return {int(row["step"]): float(row[metric]) for row in rows}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged: its steps or {metric} are not numbers") from error
