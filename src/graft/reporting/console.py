"""The console that everything is printed on: names are shown, never obeyed."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from graft.config.names import visible


class LiteralConsole(Console):
    """A Rich console on which `[bold]`, `:x:` and terminal escapes are letters, also in tables."""

    def __init__(self, width: int | None = None) -> None:
        literal = {"markup": False, "emoji": False, "highlight": False}
        super().__init__(soft_wrap=True, width=width, **literal)  # type: ignore[arg-type]

    def on_broken_pipe(self) -> None:
        """Goes on without output, as `graft train | head` is no reason to end a run: Rich exits."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

    def render_str(self, text: str, **keywords: Any) -> Text:
        return super().render_str(visible(text), **keywords)


console = LiteralConsole()

SHARES = ("acc", "f1", "macro_f1", "ece")  # metrics from 0 to 1, which are shown in percent


def is_share(name: str) -> bool:
    return name.rpartition("/")[2] in SHARES


def measured(name: str, value: float) -> str:
    """A metric as it is printed."""
    return f"{100 * value:.2f} %" if is_share(name) else f"{value:.4f}"
