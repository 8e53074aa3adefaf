"""Kill -9 of real runs at chosen moments: `python -m tests.killing ROOT SEED RUNS OVERRIDES...`.

A server that has imported everything forks each attempt, so that none pays for the imports. A
moment is a number of calls, Python's and C's: that spreads over validation and the writing of
checkpoints as over training, and is the same on a slow machine.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

# Where counting begins: in every fourth run with the run folder, else where the stages start.
FOLDER, STAGES = ("RunFolder.create", "RunFolder.open"), ("run_stages",)
NEVER = 10**12


def attempt(command: list[str], begin: tuple[str, ...], moment: int, note: Path) -> int:
    """Run a command, to its `moment`-th call since `begin`; returns its exit code, -9 if killed."""
    pid = os.fork()
    if pid == 0:
        os._exit(_run(command, begin, moment, note))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _run(command: list[str], begin: tuple[str, ...], moment: int, note: Path) -> int:
    from graft import cli

    calls = 0

    def wait(frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_qualname in begin:
            sys.setprofile(count)

    def count(frame: FrameType | None, event: str, argument: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            names = []
            while frame is not None:
                names.append(frame.f_code.co_qualname)
                frame = frame.f_back
            note.write_text(" ".join(names))
            os.kill(os.getpid(), signal.SIGKILL)

    sys.argv = ["graft", *command]
    sys.setprofile(wait)
    try:
        cli.main()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    finally:
        sys.setprofile(None)
        if calls < moment:
            note.write_text(str(calls))
    return 0


def train_and_kill(
    root: Path, begin: tuple[str, ...], moments: list[int], overrides: list[str]
) -> list[str]:
    """Train, and resume until no moment is left. Returns the stack at each kill."""
    logs, note = root / "logs", root / "note"
    root.mkdir(parents=True)
    stacks = []
    for moment in [*moments, NEVER]:
        folders = list(logs.iterdir()) if logs.exists() else []
        if folders and not (folders[0] / "run.json").exists():
            shutil.rmtree(folders.pop())  # killed before it was a run
        paths = [f"paths.logs={logs}", f"paths.cache={root / 'cache'}"]
        command = ["resume", str(folders[0])] if folders else ["train", *overrides, *paths]
        code = attempt(command, begin, moment, note)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise SystemExit(f"{root.name}: {command[0]} ended with {code}")
        stacks.append(note.read_text())
    return stacks


def main() -> None:
    import torch

    import graft.reporting.report
    import graft.runs.resume
    import graft.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    root, rng, runs, overrides = (
        Path(sys.argv[1]),
        random.Random(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4:],
    )
    calls = {}
    for name, begin in (("whole", STAGES), ("again", FOLDER)):
        train_and_kill(root / name, begin, [], overrides)
        calls[begin] = int((root / name / "note").read_text())
    stacks = []
    for i in range(runs):
        begin = STAGES if i % 4 else FOLDER
        first, second = (i + rng.random()) / runs, rng.random()
        moments = [int(part * calls[begin]) for part in (first, second)]
        stacks += train_and_kill(root / f"run{i}", begin, moments, overrides)
    (root / "stacks.json").write_text(json.dumps(stacks))


if __name__ == "__main__":
    main()
