"""`graft board`: TensorBoard on this machine, with run names that can be read."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import OmegaConf

from graft.commands import Parser
from graft.config.names import file_word, shortened, visible
from graft.config.overrides import place
from graft.config.resolved import CONFIGS
from graft.config.words import plural
from graft.runs.folder import name_words
from graft.runs.records import Run, find_runs, read_run, run_folders

EVENTS = "events.out.tfevents.*"
EVERY = 10.0  # seconds after which new runs are looked for


def main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="graft board", description="Show runs in TensorBoard, on this machine alone."
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="of runs, a sweep or a run (default: paths.logs)"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 6006")
    given = parser.parse_args(arguments)
    before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        serve(given.folder or logs(), given.port)
    except ValueError as error:
        sys.exit(f"graft: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def logs() -> Path:
    """Where runs land, if no override says otherwise."""
    return place(OmegaConf.load(CONFIGS / "paths" / "default.yaml").logs)


def serve(folder: Path, port: int | None) -> None:
    """Until it is stopped.

    Raises:
        ValueError: nothing to show, or the port is taken or none.
    """
    if port is not None and not 0 <= port < 2**16:
        raise ValueError(f"--port {port}: must be from 0 to 65535")
    runs = find_runs([folder])
    if not any(any(run.path.glob(EVENTS)) for run in runs):
        logger = runs[0].values.get("logger")
        raise ValueError(
            f"{folder}: no TensorBoard events in its runs (logger={logger}): see graft compare"
        )
    from tensorboard.program import TensorBoard, TensorBoardServerException

    # TensorBoard names runs by their folders: it is shown links with shorter names.
    with TemporaryDirectory(prefix="graft-board-") as top:
        links = Links(folder, Path(top), runs)
        board = TensorBoard()
        asked = [f"--port={port}"] if port is not None else []
        board.configure(["tensorboard", f"--logdir={top}", *asked])
        try:
            with redirect_stderr(StringIO()):  # advice about its own options
                address = board.launch()
        except TensorBoardServerException as error:
            raise ValueError(f"--port {port}: {error.msg}") from error
        count = plural(len(runs), "run")
        print(f"{count} of {visible(str(folder))}: {address} (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(EVERY)
            links.update()


class Links:
    """A folder of links to the runs of `folder` that have something to show.

    A link is named by what its run was told, without what all `runs` beside it were told too.
    """

    def __init__(self, folder: Path, links: Path, runs: Sequence[Run]) -> None:
        self.folder, self.links = folder.resolve(), links
        self.shared: dict[Path, set[str]] = {}
        self.named: set[Path] = set()
        for run in runs:
            words, above = set(_words(run)), run.path.resolve().parent
            self.shared[above] = words & self.shared.get(above, words)
        for above in self.shared:
            if sum(run.path.resolve().parent == above for run in runs) == 1:
                self.shared[above] = set()
        self.update()

    def update(self) -> None:
        """Link to runs that came since."""
        for path in sorted(run_folders(self.folder)):
            if path in self.named or not any(path.glob(EVENTS)):
                continue
            run, above = read_run(path), path.parent
            words = [w for w in _words(run) if w not in self.shared.get(above, set())]
            # What stands in a run.json is cleaned: it must not name a place elsewhere.
            seed = file_word(str(run.record.get("seed")))
            name = shortened("_".join([*words, f"seed{seed}"]))
            place = self.links
            if above.is_relative_to(self.folder):
                for part in above.relative_to(self.folder).parts:
                    place /= file_word(part)
                    if place.is_symlink():  # to a run, in whose folder nothing is to be written
                        place = place.with_name(f"{place.name} (folder)")
            place.mkdir(parents=True, exist_ok=True)
            numbers = ["", *(f" ({n})" for n in range(2, 10_000))]
            link = next(p for n in numbers if not os.path.lexists(p := place / f"{name}{n}"))
            link.symlink_to(path, target_is_directory=True)
            self.named.add(path)


def _words(run: Run) -> list[str]:
    if run.problem:
        return [file_word(run.path.name)]
    experiment = (run.record.get("choices") or {}).get("experiment")
    return name_words(run.config, experiment, run.record.get("overrides") or [])
