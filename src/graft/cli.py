"""The `graft` command. Imports nothing heavy before it knows what is asked for."""

from __future__ import annotations

import runpy
import sys

from graft import __version__

HELP = f"""graft {__version__}: transfer learning with a pretrained backbone and a new head

usage: graft COMMAND [ARGUMENTS]

commands:
  train [OVERRIDES] [-m]   compose a config, train, test the best checkpoint
                           graft train                                    the embedded default
                           graft train experiment=cifar10_linear_probe backbone=resnet18
                           graft train -m optimizer.lr=0.01,0.1           a sweep; also with
                               hydra/launcher=processes|slurm hydra/sweeper=optuna
                           graft train --help | --cfg job                 options, resolved config
  resume RUN [OVERRIDES]   go on with a run that was stopped, as if it had not been
                           graft resume logs/2026-11-24_12-00-00_quickstart_seed0
                           graft resume logs/sweeps/2026-11-24_12-00-00   jobs not yet done
  compare [RUNS_OR_FOLDERS]
                           what differs, mean and spread over seeds, time, memory (--help: more)
  eval RUN [--data OTHER]  test metrics of a run, with intervals (--help: other data, corruptions)
  board [FOLDER] [--port N]
                           TensorBoard on this machine, with runs of logs/ or another folder
  cache [list|verify|prune]
                           decoded images and frozen features on disk: sizes, checksums, clean-up

Everything about a run is in its folder under logs/.
"""


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
    elif command == "--version":
        print(__version__)
    elif command in ("train", "resume"):
        # Run as a module named __main__, so that Lightning starts further ranks of this very
        # command (`python -m graft.train OVERRIDES`) and Hydra sees its arguments alone.
        # Options first: argparse takes no overrides after one that stands among them.
        options = [a for a in sys.argv[2:] if a in ("-m", "--multirun")]
        sys.argv[1:] = [*options, *(a for a in sys.argv[2:] if a not in options)]
        module = {"train": "graft.train", "resume": "graft.runs.resume"}[command]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif command == "eval":
        from graft.runs.evaluate import main as evaluate

        evaluate(sys.argv[2:])
    elif command == "cache":
        from graft.runs.cache import main as cache

        cache(sys.argv[2:])
    elif command == "compare":
        from graft.runs.compare import main as compare

        compare(sys.argv[2:])
    elif command == "board":
        from graft.runs.board import main as board

        board(sys.argv[2:])
    else:
        known = "train, resume, eval, compare, board, cache (see graft --help)"
        sys.exit(f"graft: no command {command!r}; commands: {known}")
