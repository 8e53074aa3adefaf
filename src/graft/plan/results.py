"""What a stage of a plan ends with, and how far an interrupted plan came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.data.items import SplitRecord
from graft.plan.grid import GridRecord

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"  # files of a stage


@dataclass
class StageResult:
    """What a stage ends with, and a resumed run needs of it.

    `steps`: of the loggers' axis that it took. `head`: hyper-parameters the stage chose; `grid`:
    scores of all its heads, if it had many. `oracle`: the best accuracy of any epoch on the
    target's test split, if it was measured; nothing goes by it.
    """

    name: str
    best_checkpoint: Path
    best_score: float
    seconds: float = 0.0
    steps: int = 0
    head: dict[str, Any] = field(default_factory=dict)
    grid: GridRecord | None = None
    oracle: float | None = None

    def record(self) -> dict[str, Any]:
        """For `run.json`; the checkpoint's path is relative to it."""
        return {
            "name": self.name,
            "best_checkpoint": str(_best(self.name)),
            "score": self.best_score,
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            **({} if self.oracle is None else {"oracle": self.oracle}),
        }

    @classmethod
    def recorded(cls, record: dict[str, Any], run: Path) -> StageResult:
        best = run / _best(record["name"])  # not as recorded: it stays in the run's folder
        return cls(
            record["name"],
            best,
            record["score"] if "score" in record else record["val/acc"],
            record["seconds"],
            record["steps"],
            oracle=record.get("oracle"),
        )


def _best(stage: str) -> Path:
    return Path("checkpoints", stage, BEST)


@dataclass
class Resumed:
    """How far an interrupted plan came.

    `checkpoint`: of the stage after those done, to go on from; None to start that stage anew.
    `step`: where it is on the loggers' axis. `splits`: the items of each split, once recorded.
    """

    done: Sequence[StageResult] = ()
    checkpoint: Path | None = None
    step: int = 0
    splits: SplitRecord | None = None
