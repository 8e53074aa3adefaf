"""How a command ends: its errors in one line, its exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graft.config.overrides import quote_paths
from graft.config.resolved import explain
from graft.training.signals import Preempted

failures: list[str] = []  # of the jobs of this process: a job that fails does not end a sweep


def entry(command: Callable[[], Any]) -> None:
    """Run a command, with errors in one line and an exit code that is not zero."""
    if os.environ.get("HYDRA_FULL_ERROR") != "1":  # the user's own 1 shows all of a traceback
        os.environ |= {"HYDRA_FULL_ERROR": "1", "GRAFT_SHORT_ERRORS": "1"}  # Hydra then raises
    if str(Path.cwd()) not in sys.path:  # ranks and jobs import from where this process does:
        os.environ["PYTHONSAFEPATH"] = "1"  # not a `copy.py` that lies in the current folder
    failures.clear()
    try:
        sys.argv[1:] = quote_paths(sys.argv[1:])
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if "GRAFT_SHORT_ERRORS" not in os.environ:
            raise
        sys.exit(f"graft: error: {explain(error)}")
    except Preempted as error:
        sys.exit(128 + error.signum)
    if failures:
        sys.exit(1)
