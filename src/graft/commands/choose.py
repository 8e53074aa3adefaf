"""`graft choose`: which backbone and which transfer plan for this data, within a budget of time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from graft.commands import Parser, errors_in_one_line
from graft.config.overrides import place, quote_paths


def main(arguments: Sequence[str]) -> None:
    options = _parser().parse_intermixed_args(arguments)
    with errors_in_one_line():
        _choose(options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="graft choose",
        description="A race between pretrained backbones and transfer plans on your data: ridge "
        "and nearest neighbours on stored features first, then short trainings of the better half, "
        "halved again by validation accuracy. The test split is not looked at. The same command "
        "goes on with a race that was stopped.",
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="a folder of class folders, or a config of data (digits)")
    add("overrides", nargs="*", metavar="OVERRIDE", help="of all runs, as graft train takes them")
    add("--budget", default="10m", metavar="TIME", help="of the race: 90s, 10m (default), 1.5h")
    add("--candidates", type=_names, default=[], metavar="NAME,NAME", help="of the file; default: "
        "all whose weights are at hand")  # fmt: skip
    add("--plans", type=_names, default=[], metavar="NAME,NAME", help="of the file, or of "
        "configs/transfer; default: all of the file")  # fmt: skip
    add("--from", dest="file", type=Path, metavar="FILE", help="in place of configs/choose.yaml")
    add("--download", action="store_true", help="fetch weights that are not at hand")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _choose(options: argparse.Namespace) -> None:
    from graft.choose.entrants import read_entrants, seconds_of

    budget = seconds_of(options.budget)
    entrants = read_entrants(
        place(options.data) if Path(options.data).is_dir() else options.data,
        quote_paths(options.overrides),
        candidates=options.candidates,
        plans=options.plans,
        file=options.file,
    )

    from graft.runs.startup import import_libraries

    import_libraries()

    from graft.choose.outcome import chosen, command, reason, table
    from graft.choose.race import run_race
    from graft.compare.table import terminal_width
    from graft.reporting.console import console
    from graft.storage.disk import write_atomically
    from graft.training.signals import Preempted

    try:
        race = run_race(entrants, budget, console.print, download=options.download)
    except Preempted as error:
        console.print(f"{error}; the same command goes on")
        sys.exit(128 + error.signum)
    best, rows, folder = chosen(race), table(race), race.runs.folder
    write_atomically(folder / "choice.md", rows.markdown())
    write_atomically(folder / "choice.csv", rows.csv())
    print("\n" + rows.plain(terminal_width()))
    console.print(f"time      {race.runs.spent / 60:.1f} of {budget / 60:.1f} min")
    console.print(f"written   choice.md, choice.csv; more: graft compare {folder} --each")
    console.print(f"why       {reason(race, best)}")
    console.print(f"chosen    {command(race, best)}")
