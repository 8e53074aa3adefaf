"""The `graft` command. Imports nothing heavy before it knows what is asked for."""

from __future__ import annotations

import io
import os
import signal
import sys
from importlib import import_module
from typing import Any

from graft import __version__
from graft.config.names import visible

COMMANDS = (
    "train", "resume", "compare", "choose", "eval", "predict", "export", "serve", "board", "cache",
)  # fmt: skip
MODULES = {"eval": "evaluate"}  # of a command whose name is a function of Python's
INTERRUPTED = b"graft: interrupted\n"
SHELL = ("-sc", "--shell-completion")
HELP = f"""graft {__version__}: transfer learning with a pretrained backbone and a new head

usage: graft COMMAND [ARGUMENTS]

commands:
  train [OVERRIDES] [-m]   compose a config, train, test the best checkpoint
                           graft train                                    the embedded default
                           graft train experiment=cifar10_linear_probe backbone=resnet18
                           graft train -m optimizer.lr=0.01,0.1           a sweep; also with
                               hydra/launcher=processes|slurm hydra/sweeper=optuna
                           graft train --help | --cfg job                 options, resolved config
                           eval "$(graft -sc install=bash)"               completes with TAB
  resume RUN [OVERRIDES]   go on with a run that was stopped, as if it had not been
                           graft resume logs/2026-11-24_12-00-00_quickstart_seed0
                           graft resume logs/sweeps/2026-11-24_12-00-00   jobs not yet done
  compare [RUNS_OR_FOLDERS]
                           what differs, mean and spread over seeds, time, memory (--help: more)
  choose DATA [--budget 10m]
                           which backbone and transfer plan for this data: a measured race
  eval RUN [--data OTHER]  test metrics of a run, with intervals (--help: other data, corruptions)
  predict MODEL PATHS...   classes and probabilities of images, as CSV, JSONL, Parquet or a table
  serve MODEL [--port N]   a page to try a model in a browser, and POST /predict for programs
  export RUN [--format onnx|pt2|safetensors]
                           one file that takes raw images, compared with the run's model
  board [FOLDER] [--port N]
                           TensorBoard on this machine, with runs of logs/ or another folder
  cache [list|verify|prune]
                           decoded images and frozen features on disk: sizes, checksums, clean-up

Everything about a run is in its folder under logs/.
"""


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # None after >&-
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python's own stderr
    try:
        _run()
    except KeyboardInterrupt:
        os.write(2, INTERRUPTED)
        sys.exit(130)
    except SystemExit as error:
        if isinstance(error.code, str):  # a message, with names of files and classes in it
            sys.exit(visible(error.code, keep="\n"))
        raise


def _interrupted(signum: int, frame: Any) -> None:
    """Ctrl-C while nothing is there to be saved, during imports say, which may catch what is
    raised: one line, and the end that a shell expects.
    """
    os.write(2, INTERRUPTED)
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def _run() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    # Of the others, one waits for Ctrl-C and one cleans up; a run soon has its own handlers.
    if (
        command not in ("board", "eval")
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _interrupted)
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
    elif command == "--version":
        print(__version__)
    elif command in SHELL or (command == "train" and sys.argv[2:] and sys.argv[2] in SHELL):
        complete(sys.argv[-1])
    elif command in ("train", "resume"):
        # By the specification of __main__ Lightning starts further ranks of this very command, as
        # `python -m graft.commands.train OVERRIDES`; Hydra sees its arguments alone.
        # Options first: argparse takes no overrides after one that stands among them.
        options = [a for a in sys.argv[2:] if a in ("-m", "--multirun")]
        sys.argv[1:] = [*options, *(a for a in sys.argv[2:] if a not in options)]
        module = {"train": "graft.commands.train", "resume": "graft.commands.resume"}[command]
        imported = import_module(module)
        sys.modules["__main__"].__spec__ = imported.__spec__
        imported.entry(imported.main)
    elif command in COMMANDS:
        import_module(f"graft.commands.{MODULES.get(command, command)}").main(sys.argv[2:])
    else:
        known = ", ".join(COMMANDS)
        sys.exit(f"graft: no command {command!r}; commands: {known} (see graft --help)")


def complete(task: str) -> None:
    """What the shell completes for `graft train`: Hydra's own completion of overrides.

    Hydra's script calls `graft -sc query=SHELL` with the line so far in COMP_LINE, and expects
    overrides after the first word.
    """
    line = os.environ.get("COMP_LINE", "")
    program, _, rest = line.lstrip().partition(" ")
    command, space, overrides = rest.lstrip().partition(" ")
    if task.startswith("query=") and not space:
        print(" ".join(name for name in COMMANDS if name.startswith(command)))
    elif not task.startswith("query=") or command == "train":
        from graft.commands.train import main as train

        os.environ["COMP_LINE"] = f"{program} {overrides}"
        sys.argv[:] = ["graft", "-sc", task]
        train()
