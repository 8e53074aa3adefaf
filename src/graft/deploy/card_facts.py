"""What a model card tells of a run, from the run folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.config.overrides import PATHS, SEARCHPATH, is_path, key_of, path_of
from graft.data.items import SplitRecord
from graft.deploy.model import Deployed, load
from graft.runs.evaluate import evaluate, stage_and_epoch
from graft.runs.open import (
    checkpoint_path,
    damaged,
    read_checkpoint,
    read_overrides,
    read_run,
)
from graft.storage.reading import read_json
from graft.storage.run_json import read_record

HUB_DATASETS = {"cifar10": "uoft-cs/cifar10"}  # of configs/data, as model hubs call them


@dataclass(frozen=True)
class Facts:
    """A run and its evaluation.

    Attributes:
        name: of the run folder.
        result: what `graft eval` keeps.
        overrides: of the command, without paths of the machine.
        dataset: how the data is called, not where it lies.
    """

    name: str
    config: dict[str, Any]
    record: dict[str, Any]
    result: dict[str, Any]
    splits: SplitRecord | None
    overrides: list[str]
    model: Deployed
    dataset: str

    @classmethod
    def of(cls, run: Path) -> Facts:
        """Evaluates the run, if that has not been done since its best checkpoint was written.

        Raises:
            ValueError: no run folder, or a damaged one; without an evaluation, data that is not
                there.
        """
        config, status = read_run(run)
        checkpoint = checkpoint_path(run, config, status, "best")
        model = load(run, device="cpu")
        kept = run / "eval" / "test.json"
        result = read_json(kept) if kept.is_file() else {}
        stage, epoch = stage_and_epoch(read_checkpoint(checkpoint))
        tested = {"stage": stage, "epoch": epoch, "checkpoint": f"checkpoints/{stage}/best.ckpt"}
        fresh = kept.is_file() and kept.stat().st_mtime >= checkpoint.stat().st_mtime
        if not fresh or any(result.get(key) != value for key, value in tested.items()):
            evaluate(run)
            result = read_json(kept)
        with damaged(kept):
            _check(result, model)
        record = read_record(run)
        return cls(
            name=run.resolve().name,
            config=config,
            record=record,
            result=result,
            splits=SplitRecord.read(run),
            overrides=[shown for o in read_overrides(run) if (shown := general(o))],
            model=model,
            dataset=_dataset(config, record),
        )

    @property
    def kind(self) -> str:
        return self.model.spec.output_kind

    @property
    def backbone(self) -> str:
        """The architecture, as its config names it."""
        own = self.config["backbone"].get("model") or self.choice("backbone")
        return str(own or self.config["backbone"]["_target_"].rpartition(".")[2])

    def choice(self, group: str) -> str | None:
        return (self.record.get("choices") or {}).get(group)

    @property
    def weights(self) -> str:
        """Where the pretrained weights come from; of a file, its name alone."""
        source = str((self.record.get("weights") or {}).get("source") or "not recorded")
        return Path(source).name if "/" in source else source

    @property
    def base_model(self) -> str | None:
        """The name that a model hub knows the pretrained model by."""
        found = re.fullmatch(r"timm ([\w-]+) ([\w-]+)", self.weights)
        return f"timm/{found[1]}.{found[2]}" if found else None


def _check(result: dict[str, Any], model: Deployed) -> None:
    """Raises a KeyError, TypeError or ValueError if parts are missing or of another type."""
    metrics = {name: float(value) for name, value in result["metrics"].items()}
    for name, pair in result["intervals"].items():
        low, high = map(float, pair)
        if name not in metrics or low > high:
            raise ValueError(f"the interval of {name} is {pair}")
    if result["classes"] != model.classes:
        raise ValueError("it is of other classes than the run's")
    result["images"] = int(result["images"])
    for name, row in (result.get("per_class") or {}).items():
        if name not in model.classes or not isinstance(row["images"], int):
            raise ValueError(f"there is no class {name!r}")


def _dataset(config: dict[str, Any], record: dict[str, Any]) -> str:
    """The option of `data`, or the folder's own name: not a home folder's, which is a person's."""
    choice = (record.get("choices") or {}).get("data")
    source = config["data"]["source"]
    root = Path(str(source.get("root") or ""))
    own = choice in (None, "image_folder", "image_table") and root.name
    is_home = root == Path.home() or root.parent.name in ("home", "Users")
    return root.name if own and not is_home else str(choice or "own images")


def general(override: str) -> str | None:
    """An override without a path of this machine; None if it is about nothing else."""
    key, _, value = override.partition("=")
    name = key_of(key)
    if re.search(r"key|token|secret|password|passwd", name.rpartition(".")[2], re.IGNORECASE):
        return None
    if name == SEARCHPATH:
        return f"{key}=[FOLDER]"
    if PATHS.fullmatch(key) and is_path(name, path_of(override)):
        shown = {"backbone.weights": "FILE", "data.root": "FOLDER"}.get(name)
        return f"{key}={shown}" if shown else None
    return f"{key}=PATH" if re.search(r"(^|[^\w.])[/~]", value) else override
