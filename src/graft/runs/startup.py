"""What a process does before it trains: imports, and what it says of them."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import threading
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
        from graft.reporting import report  # noqa: F401
        from graft.training import build, trainer  # noqa: F401
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)
        gc.enable()


def quiet_libraries() -> None:
    """Silence what a user can do nothing about; everything else stays."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it raises what it says
    for reporter in ("profilers", "callbacks.model_summary"):  # there only if a user sets one
        logging.getLogger(f"lightning.pytorch.{reporter}").setLevel(logging.INFO)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",  # batches are one indexing call: workers cost time here
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*`broadcast_buffers` is deprecated.*",  # its replacement is not in torch 2.11
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",  # the order is ours
        '.*callbacks used to create the checkpoint.*"ModelCheckpoint.*',  # of format 2
        ".*lr_scheduler.step.* before .optimizer.step.*",  # 16-mixed leaves out steps that overflow
        ".*module.s. in eval mode at the start of training.*",  # frozen blocks are meant to be
    ):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", module="PIL")  # odd metadata of images: their pixels count
    threading.excepthook = _report_thread


def _report_thread(error: threading.ExceptHookArgs) -> None:
    """TensorBoard raises in the main thread what its writer met, a full disk say."""
    if type(error.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(error)


def is_first_process() -> bool:
    """Of all nodes; before a Trainer exists, Lightning may know the rank within this node only."""
    from lightning.pytorch.utilities import rank_zero_only

    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0 and int(os.environ.get("NODE_RANK", 0)) == 0
