"""Going on with a run that was stopped, in its own folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.config.overrides import PLACES, SEARCHPATH, key_of, path_of, search_path
from graft.config.renamed import as_current
from graft.config.resolved import CONFIGS, check, leaves, moved, set_leaf
from graft.config.words import plural
from graft.runs.folder import FINAL, FORMAT, RunFolder
from graft.runs.open import damaged, read_checkpoint, read_config, read_overrides, require_closed
from graft.runs.startup import import_libraries, is_first_process
from graft.runs.train import run_in_folder
from graft.runs.trust import require_harmless
from graft.storage.run_json import read_record
from graft.training.signals import slurm_job

if TYPE_CHECKING:
    from graft.plan.results import Resumed

Tell = Callable[[str], Any]

# What may change while a run goes on: how long, and what its result does not depend on.
FREE = re.compile(
    r"trainer\.(max_epochs|accelerator|log_every_n_steps|checkpoint_every_n_(steps|minutes))"
    r"|transfer\.stages\.[^.]+\.epochs"
    r"|data\.(num_workers|pin_memory|resident|eval_batch_size)"
    r"|paths\.\w+|data\.(root|source\.(root|cache|download))"  # data is checked by content
)
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
REASONS = {
    "backbone": "the checkpoint holds the weights of another one",
    "head": "the checkpoint holds the weights of another one",
    "transfer": "the stages so far were trained with another plan",
    "data": "the epoch goes on in the middle of the images' order",
    "optimizer": "its state in the checkpoint goes with the settings it was made with",
    "scheduler": "a part of it has been run through",
}


def resume_run(
    path: Path, overrides: Sequence[str] = (), *, trusted: bool = False
) -> dict[str, float]:
    """Run what is left of the run in this folder, everything of one that is queued.

    Args:
        trusted: its config is that of one's own command line.

    Returns its metrics, also of one that is done.
    """
    folder = RunFolder.open(path)
    if overrides and folder.record["status"] in FINAL:
        raise ValueError(f"{path} has ended, so {' '.join(overrides)} cannot change: train anew")
    if is_done(folder):
        return folder.record["metrics"]
    require_closed(path)  # before anything in it is locked, cleaned up or written
    import_libraries()

    # What Lightning starts as further ranks of this command reads what the first one has written.
    first = is_first_process()
    with folder.locked() if first else nullcontext():
        if first:
            folder = RunFolder.open(path)
            if is_done(folder):  # by whom we waited for
                return folder.record["metrics"]
        config = changed(folder, overrides, trusted=trusted)
        heard = first and folder.record["status"] != "queued"
        resumed = progress(folder, config, tell=print if heard else lambda text: None)
        if first:
            if overrides:
                folder.write("config.yaml", config)
                folder.write("overrides.yaml", [*earlier(folder.path, overrides), *overrides])
            (folder.path / "error.log").unlink(missing_ok=True)
            folder.update(format=FORMAT, config=config)
        return run_in_folder(config, folder if first else None, resumed)


def run_of_this_job(logs: Path, overrides: Sequence[str]) -> Path | None:
    """The run that this SLURM job had begun with these overrides before it was requeued."""
    job = slurm_job()
    if job is None or int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0:
        return None
    for path in sorted(logs.glob("*/run.json"), reverse=True):
        with suppress(ValueError, OSError):  # not what we look for
            record = read_record(path.parent)
            if (record.get("slurm_job"), record.get("overrides")) == (job, list(overrides)):
                return path.parent
    return None


def is_done(folder: RunFolder) -> bool:
    status = folder.record["status"]
    if status not in FINAL:
        return False
    if all(int(os.environ.get(rank, 0)) == 0 for rank in RANKS):  # known without Lightning
        print(f"{folder.path} is {'finished' if status == 'done' else status}: nothing to resume")
    return True


def changed(
    folder: RunFolder, overrides: Sequence[str], *, trusted: bool = False
) -> dict[str, Any]:
    """The run's config with overrides that can be made while it goes on.

    Raises:
        ValueError: another one, with the reason.
    """
    # The first rank writes both files while others read, on whatever network disk: each of them
    # makes the same change, to a config that may have it already.
    before = earlier(folder.path, overrides)
    config = read_config(folder.path, trusted=trusted)
    for override in overrides:
        if override.startswith("~"):
            raise ValueError(f"{override}: a resumed run keeps its keys; change one by KEY=VALUE")
    places = [override for override in overrides if PLACES.fullmatch(key_of(override))]
    for override in places:
        config = moved(config, key_of(override), path_of(override))
    overrides = [override for override in overrides if override not in places]
    if not overrides:
        return config
    for override in overrides:
        if key_of(override) in REASONS:  # what is set within it may not fit another choice
            refuse(key_of(override))
    asked = {key_of(override) for override in overrides}
    source = folder.path / "overrides.yaml"
    require_harmless([o for o in before if o not in overrides], source)  # or typed again
    # The config of the run is resolved: what an override leads to is what it changes in the
    # config that is composed anew.
    old = dict(leaves(_composed([*before, *search_path(overrides)])))
    new = dict(leaves(_composed([o for o in before if key_of(o) not in asked] + list(overrides))))
    now = dict(leaves(config))
    done = {f"transfer.stages.{stage['name']}.epochs" for stage in folder.record["stages"]}
    for key in sorted(old.keys() | new.keys()):
        same = [key in c and repr(c[key]) == repr(new[key]) for c in (old, now) if key in new]
        if any(same):  # by repr: 1 batch is not 1.0
            continue
        if key in done and key not in asked:
            continue  # it follows another key, and has its epochs behind it
        refuse(key, done)
        set_leaf(config, key, new[key])
    return config


def earlier(path: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides of a run before these are added: the first rank may have done that, or the same
    command when it was given before.
    """
    noted = read_overrides(path)
    if overrides and noted[-len(overrides) :] == [*overrides]:
        noted = noted[: -len(overrides)]
    return [o for o in noted if key_of(o) != SEARCHPATH or not search_path(overrides)]


def refuse(key: str, done: Collection[str] = ()) -> None:
    """Raises a ValueError if a key can't change in a run that goes on."""
    if key in done:
        raise ValueError(f"{key} cannot change: this stage is done")
    if not FREE.fullmatch(key):
        reason = REASONS.get(key.split(".")[0], "it would not be the same run")
        raise ValueError(f"{key} cannot change in a resumed run: {reason}; start a new run with it")


def _composed(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return check(compose("train", overrides))


def progress(folder: RunFolder, config: dict[str, Any], *, tell: Tell = print) -> Resumed:
    """How far the run came: its stages done, and the checkpoint of the one after them."""
    from graft.data.items import SplitRecord
    from graft.plan.results import Resumed, StageResult
    from graft.training.checkpoint import is_whole

    names = list(config["transfer"]["stages"])
    done = [StageResult.recorded(record, folder.path) for record in folder.record["stages"]]
    if [result.name for result in done] != names[: len(done)]:
        raise ValueError(f"{folder.path / 'run.json'} is damaged: its stages are not the plan's")
    for result in done:
        if not is_whole(result.best_checkpoint):
            raise ValueError(
                f"{result.best_checkpoint} is missing or damaged, and stage {result.name} cannot "
                "be skipped without it: start a new run"
            )
    splits = SplitRecord.read(folder.path)
    resumed = Resumed(done, step=sum(result.steps for result in done), splits=splits)
    if len(done) == len(names):
        tell(f"resuming  {folder.path}: all stages are done, the test is not")
        return resumed
    name = names[len(done)]
    stage = config["transfer"]["stages"][name]
    path = None
    if stage.get("solver", "sgd") == "sgd":
        path = usable(folder.path / "checkpoints" / name, tell)
    if path is not None and (lost := lost_best(path)):
        tell(f"note: {lost} is missing or damaged, and what was best is in no other file")
        path = None
    if path is None:
        tell(f"resuming  {folder.path}: stage {name} from its start")
        return resumed
    checkpoint = read_checkpoint(path, mmap=True)
    now = dict(leaves(config))
    for key, value in leaves(as_current(checkpoint["graft"]["config"])):
        if repr(now.get(key)) != repr(value):  # somebody has edited config.yaml
            refuse(key)
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if epochs > stage["epochs"]:
        raise ValueError(
            f"transfer.stages.{name}.epochs={stage['epochs']}: {epochs} are behind it already"
        )
    if splits is None:
        tell("note: this run did not record its images, so they are taken to be unchanged")
    resumed.checkpoint = path
    resumed.step += checkpoint["global_step"]
    after = f"after {plural(epochs, 'epoch')}, step {resumed.step}"
    tell(f"resuming  {folder.path}: stage {name} {after}")
    return resumed


def lost_best(last: Path) -> Path | None:
    """The best checkpoint of the stage so far, if there was one and it cannot be used."""
    from graft.plan.results import BEST
    from graft.training.best import state_of_format_2
    from graft.training.checkpoint import is_whole

    checkpoint = read_checkpoint(last, mmap=True)
    with damaged(last):
        states = checkpoint["callbacks"]
        had = (states.get("Best") or state_of_format_2(checkpoint) or {}).get("best") is not None
    best = last.with_name(BEST)
    return best if had and not is_whole(best) else None


def usable(stage: Path, tell: Tell = print) -> Path | None:
    """The last checkpoint of a stage that can be read, if there is any."""
    from graft.plan.results import LAST, PREVIOUS
    from graft.training.checkpoint import is_whole

    last, previous = stage / LAST, stage / PREVIOUS
    if is_whole(last):
        return last
    found = is_whole(previous)
    if last.exists() or found:
        state = "damaged" if last.exists() else "missing"
        instead = "the one before it is used" if found else "and there is none before it"
        tell(f"note: {last} is {state}: {instead}")
    return previous if found else None
