"""What a command that comes after training reads from a run folder."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from graft.config import check
from graft.runs.folder import FORMAT


def read_run(run: Path) -> tuple[dict[str, Any], str]:
    """The resolved config and the status of a run folder."""
    if not (run / "config.yaml").is_file() or not (run / "run.json").is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.yaml and run.json")
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{run / 'run.json'} is damaged: {error}") from error
    if (found := record.get("format", FORMAT)) > FORMAT:
        raise ValueError(
            f"{run} was written by a newer graft (format {found}, this one knows {FORMAT}): update"
        )
    config = OmegaConf.load(run / "config.yaml")
    if not isinstance(config, DictConfig):
        raise ValueError(f"{run / 'config.yaml'} is damaged: not a mapping")
    return check(config), record["status"]


def checkpoint_path(run: Path, config: dict[str, Any], status: str, ckpt: str) -> Path:
    if ckpt not in ("best", "last"):
        path = Path(ckpt).expanduser()
        if not path.is_file():
            raise ValueError(f"--ckpt {ckpt}: no such file; or give best or last")
        return path
    path = run / "checkpoints" / [*config["transfer"]["stages"]][-1] / f"{ckpt}.ckpt"
    if not path.is_file():
        others = sorted(str(other) for other in run.glob("checkpoints/*/*.ckpt"))
        hint = f"; there is --ckpt {' or '.join(others)}" if others else ""
        raise ValueError(f"{run} (status {status}) has no {path.relative_to(run)}{hint}")
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is torn, unreadable or no checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or "classes" not in checkpoint.get("graft", {}):
        raise ValueError(f"{path} is no checkpoint of graft: it does not name its classes")
    return checkpoint
