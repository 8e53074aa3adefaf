"""What a process does before it trains: imports, and what it says of them."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import warnings


def import_libraries() -> None:
    """What every run imports, a fifth faster: the garbage collector would go through the modules
    again and again while they load, and after that too. Nothing of them is garbage until the
    process ends, when triton would report as leaked what still is set aside.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        from graft import build, report, trainer  # noqa: F401
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)
        gc.enable()


def quiet_libraries() -> None:
    """Silence what a user can do nothing about; everything else stays."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",  # batches are one indexing call: workers cost time here
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*`broadcast_buffers` is deprecated.*",  # its replacement is not in torch 2.11
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",  # the order is ours
        ".*module.s. in eval mode at the start of training.*",  # frozen blocks are meant to be
    ):
        warnings.filterwarnings("ignore", message)


def is_first_process() -> bool:
    """Of all nodes; before a Trainer exists, Lightning may know the rank within this node only."""
    from lightning.pytorch.utilities import rank_zero_only

    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0 and int(os.environ.get("NODE_RANK", 0)) == 0
