"""What a command that comes after training reads from a run folder, whoever wrote it."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.config.overrides import is_path, own_cache, place
from graft.config.renamed import as_current, current_override
from graft.config.resolved import check_values, leaves, set_leaf
from graft.runs.allowed import trusts_all
from graft.runs.folder import FORMAT
from graft.runs.trust import require_trusted
from graft.storage.reading import read_yaml_mapping, read_yaml_texts
from graft.storage.run_json import read_record

CONFIG = "config.yaml"
OF_WANDB = re.compile(r"wandb/(offline-)?run-[^/]+/logs/debug[\w-]*\.log")  # its own


def read_run(run: Path) -> tuple[dict[str, Any], str]:
    """The resolved config, without what only training takes, and the status of a run folder."""
    if not (run / CONFIG).is_file() or not (run / "run.json").is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.yaml and run.json")
    record = read_record(run)
    if record["format"] > FORMAT:
        raise ValueError(
            f"{run} was written by a newer graft (format {record['format']}, this one knows "
            f"{FORMAT}): update"
        )
    return read_config(run, unused=("callbacks", "logger")), str(record.get("status"))


def read_config(
    run: Path, *, trusted: bool = False, unused: Collection[str] = ()
) -> dict[str, Any]:
    """The resolved config of a run folder that can be worked in.

    Args:
        trusted: it is that of one's own command line.
        unused: groups that are left out: nothing of them is built, so that it needs no trust.

    Raises:
        ValueError: it is damaged, or names code that is not to be run, or the folder leads out of
            itself.
    """
    require_closed(run)
    config = as_current(read_yaml_mapping(run / CONFIG))
    if "${" in str(config):
        raise ValueError(f"{run / CONFIG} is damaged: it holds ${{...}}, and a run's is resolved")
    with damaged(run / CONFIG):
        check_values(config)
    config.update(dict.fromkeys(unused))
    if not trusted:
        require_trusted(config, run / CONFIG)
    if not trusted and not trusts_all():  # nothing is written where the file says
        for key, value in list(leaves(config)):
            if key.endswith(".cache") and is_path(key, value):
                set_leaf(config, key, str(place(own_cache())))
            elif key == "data.source.download":
                set_leaf(config, key, False)
    return config


def read_overrides(run: Path) -> list[str]:
    return [current_override(text) for text in read_yaml_texts(run / "overrides.yaml")]


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Errors of what lacks a part, or has one of another type, as one line with the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path} is damaged ({reason})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def require_closed(folder: Path) -> None:
    """Whatever is written in a folder that others made stays in it.

    Raises:
        ValueError: there is a link in it that leads out, or something that is no file.
    """
    top = os.path.realpath(folder)
    for below, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = os.path.join(below, name)  # noqa: PTH118 (ten times a Path's speed)
            try:
                status = os.lstat(path)
            except FileNotFoundError:  # a running run has renamed it
                continue
            mode = status.st_mode
            if stat.S_ISLNK(mode):
                inside = os.path.realpath(path).startswith(top + os.sep)
                if not inside and not OF_WANDB.fullmatch(os.path.relpath(path, top)):
                    raise ValueError(
                        f"{path} is a link that leads out of the run folder: remove it"
                    )
            elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                from graft.data.sources.decode import why_no_file

                raise ValueError(f"{path} is {why_no_file(status)}: remove it")


def checkpoint_path(run: Path, config: dict[str, Any], status: str, ckpt: str) -> Path:
    if ckpt not in ("best", "last"):
        path = place(ckpt)
        if not path.is_file():
            raise ValueError(f"--ckpt {ckpt}: no such file; or give best or last")
        return path
    path = run.resolve() / "checkpoints" / [*config["transfer"]["stages"]][-1] / f"{ckpt}.ckpt"
    if not path.is_file():
        others = sorted(str(other) for other in run.glob("checkpoints/*/*.ckpt"))
        hint = f"; there is --ckpt {' or '.join(others)}" if others else ""
        name = path.relative_to(run.resolve())
        raise ValueError(f"{run} (status {status}) has no {name}{hint}")
    return path


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint of graft: of the types that ours have, as far as we read it ourselves.

    Raises:
        ValueError: it is torn, or something else.
    """
    import torch
    from torch import Tensor

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of a damaged file, torch raises almost any
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is torn, unreadable or no checkpoint: {reason}") from error
    note = checkpoint.get("graft") if isinstance(checkpoint, dict) else None
    if not isinstance(note, dict) or "classes" not in note:
        raise ValueError(f"{path} is no checkpoint of graft: it does not name its classes")
    with damaged(path):
        state = checkpoint["state_dict"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        counts = [
            progress["total"]["started"], progress["current"]["processed"],
            checkpoint["global_step"],
        ]  # fmt: skip
        if not (
            isinstance(note["classes"], list)
            and all(isinstance(name, str) for name in [*note["classes"], note["stage"], *state])
            and all(isinstance(value, Tensor) for value in state.values())
            and all(isinstance(count, int) for count in counts)
            and isinstance(note["config"], dict)
        ):
            raise TypeError("a part of it is of another type")
    return checkpoint
