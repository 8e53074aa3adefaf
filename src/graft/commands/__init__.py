"""One file per command: arguments in, one call, text out."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, instead of all of its usage."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        option, _, reason = message.partition(": ")
        usage = " ".join(self.format_usage().split())
        form = re.search(rf"\[({re.escape(option)} .*?)\](?= |$)", usage)
        if form and reason.startswith("expected"):
            message += f": write {form[1]}"
        sys.exit(f"graft: error: {message} (see {self.prog} --help)")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the process with one line for any error; HYDRA_FULL_ERROR=1 shows where it came from."""
    try:
        yield
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        from graft.config.resolved import explain  # brings Hydra along

        sys.exit(f"graft: error: {explain(error)}")
