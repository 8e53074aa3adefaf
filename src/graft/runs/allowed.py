"""Whose code a file of somebody else's may name: what a command's option and the environment say.

Imports nothing heavy, unlike what asks: see `graft.runs.trust`.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

TRUST = "GRAFT_TRUST"  # more packages, with commas; * for any: jobs of one's own sweep
EVERYTHING = "*"


def add_trust(parser: argparse.ArgumentParser) -> None:
    """`--trust PACKAGE`, for this process and those it starts."""

    class Trust(argparse.Action):
        def __call__(self, parser: Any, given: Any, package: Any, option: Any = None) -> None:
            os.environ[TRUST] = ",".join([*allowed_packages(), package])

    parser.add_argument(
        "--trust",
        action=Trust,
        default=argparse.SUPPRESS,
        metavar="PACKAGE",
        help=f"let the folder's config name code of this package, too ({TRUST}=A,B: always)",
    )


def allowed_packages() -> tuple[str, ...]:
    return tuple(name for name in os.environ.get(TRUST, "").split(",") if name)


def trusts(package: str) -> bool:
    return not {package, EVERYTHING}.isdisjoint(allowed_packages())


def trusts_all() -> bool:
    return trusts(EVERYTHING)
