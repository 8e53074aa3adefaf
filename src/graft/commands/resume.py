"""`graft resume`: go on with a run that was stopped, or with a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from graft.commands import Parser
from graft.commands.train import main as train
from graft.config.overrides import config_dir, key_of, quoted
from graft.config.renamed import current_override
from graft.runs.allowed import add_trust
from graft.runs.entry import entry
from graft.runs.folder import SWEEP
from graft.runs.open import require_closed
from graft.runs.resume import resume_run
from graft.runs.trust import require_harmless
from graft.storage.reading import read_yaml_texts


def main() -> None:
    parser = Parser(
        prog="graft resume",
        description="Go on with a run that was stopped, in its own folder; or with a sweep, whose "
        "jobs that are not done are resumed or run.",
    )
    parser.add_argument("run", type=Path, help="its folder, or that of a sweep")
    parser.add_argument("overrides", nargs="*", default=[], help="like trainer.max_epochs=20")
    parser.add_argument(
        "--config-dir", default="", metavar="DIR", help="configs of your own, for the overrides"
    )
    add_trust(parser)
    arguments = parser.parse_intermixed_args()
    overrides = [*arguments.overrides, *config_dir(arguments.config_dir)]
    if (arguments.run / SWEEP).is_file():
        resume_sweep(arguments.run, overrides)
    else:
        resume_run(arguments.run, overrides)


def resume_sweep(sweep: Path, overrides: Sequence[str]) -> None:
    """The same command line, with `overrides` in place of earlier ones: what is done stays."""
    from graft.sweeps import sweep as sweeps

    asked = {key_of(override) for override in overrides}
    require_closed(sweep)
    noted = read_yaml_texts(sweep / SWEEP)  # ${...} as it was written
    before = [current_override(o) for o in noted if key_of(o) not in asked]
    require_harmless(before, sweep / SWEEP)
    sweeps.read_from = sweep / SWEEP
    folder = quoted("hydra.sweep.dir", str(sweep.resolve()))
    sys.argv[1:] = ["--multirun", *before, *overrides, folder]
    try:
        train()
    finally:
        sweeps.read_from = None


if __name__ == "__main__":
    entry(main)
