"""A callback that stops a run in a process of its own at a chosen step."""

from __future__ import annotations

import os
from typing import Any

import lightning as L


class SignalAt(L.Callback):
    """Sends a signal to its own rank, as GRAFT_TEST_STOP="RANK STEP SIGNUM" says; RANK may be all.

    By the environment, not the config: that one is the same when the run is resumed.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        rank, step, signum = os.environ.get("GRAFT_TEST_STOP", "none 0 0").split()
        if rank in ("all", str(trainer.global_rank)) and trainer.global_step == int(step):
            os.kill(os.getpid(), int(signum))
