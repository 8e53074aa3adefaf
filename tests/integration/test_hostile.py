"""Run folders, checkpoints and sweeps that want more than to be read: nothing of theirs runs, and
nothing is written outside of their folder.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]

from graft.data.items import FILE, SplitRecord
from graft.runs.open import read_config, require_closed
from graft.runs.trust import require_trusted
from graft.training.checkpoint import is_final, load_checkpoint, replace_weights
from tests.conftest import TINY, Graft, compose
from tests.integration.conftest import Break
from tests.integration.test_configs import REQUIRED


def node(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, **arguments}


def payloads(mark: str) -> dict[str, dict[str, Any]]:
    """What a config may say to have `mark` written; by key in it."""
    touch = f"touch {mark}"
    path = node("pathlib.Path", _args_=[mark])
    write = node("graft.storage.disk.write_atomically", path=path, content="hi")
    nested = {
        "write_atomically": write,
        "touch": node("pathlib.Path.touch", self=path),
        "torch.load": node("torch.load", f=mark, weights_only=False),
        "numpy.load": node("numpy.load", file=mark, allow_pickle=True),
        "eval": node("builtins.eval", _args_=[f"open({mark!r}, 'w')"]),
        "partial": node("functools.partial", _args_=[write]),
    }
    callback = {
        "os.system": node("os.system", command=touch),
        "subprocess": node("subprocess.run", args=touch, shell=True),
        "through board": node("graft.sweeps.launch.os.system", command=touch),
        "through torch": node("torch.serialization.os.system", command=touch),
        "through numpy": node("lightning.pytorch.trainer.trainer.os.system", command=touch),
        "hub": node("torch.hub.load", repo_or_dir="evil/evil", model="x"),
        "a file of weights": node("torch.hub.load_state_dict_from_url", url=mark),
        "library": node("torch.ops.load_library", path=mark),
        "compile": node("torch.compile", model=None),
        "checkpoint": node("lightning.pytorch.callbacks.ModelCheckpoint", dirpath=mark),
        "its name": node("lightning.pytorch.callbacks.ModelCheckpoint", filename=f"../{mark}"),
        "on exception": node("lightning.pytorch.callbacks.OnExceptionCheckpoint", dirpath=mark),
        "a class of lightning": node("lightning.Trainer", default_root_dir=mark),
        "hydra": node("hydra.utils.instantiate", config=write),
        "private": node("graft.__main__.main"),
        "a list": node("lightning.pytorch.callbacks.Timer", duration=[write]),
        "no name": {"_target_": ["os.system"]},
        "nothing there": node("torch.no_such_thing"),
    }
    logger = {
        "lightning's": node("lightning.pytorch.loggers.CSVLogger", name=mark),
        "mlflow": node("graft.reporting.trackers.MLFlow", tracking_uri=f"sqlite:///{mark}"),
        "wandb": node("graft.reporting.trackers.WandB", dir=mark),
        "another's account": node("graft.reporting.trackers.WandB", entity="attacker"),
        "weights for others": node("graft.reporting.trackers.WandB", log_model="all"),
        "code for others": node("graft.reporting.trackers.WandB", save_code=True),
    }
    backbone = {
        "os.system": node("os.system", command=touch),
        "a builder of ours": node("graft.training.build.build_backbone", config=write),
        "torch.load": nested["torch.load"],
        "another kind": node("graft.models.heads.LinearHead"),
        "timm's own files": node("graft.models.timm.timm_backbone", checkpoint_path=mark),
        "timm's urls": node(
            "graft.models.timm.timm_backbone", pretrained_cfg={"url": "x", "architecture": "y"}
        ),
    }
    changes: dict[str, dict[str, Any]]
    changes = {f"callbacks {name}": {"callbacks": {"x": it}} for name, it in callback.items()}
    changes |= {f"logger {name}": {"logger": {"x": it}} for name, it in logger.items()}
    changes |= {f"backbone {name}": {"backbone": it} for name, it in backbone.items()}
    for name, it in nested.items():
        changes[f"optimizer {name}"] = {"optimizer": {"x": it}}
        changes[f"data {name}"] = {"data": {"source": {"x": [it]}}}
        changes[f"transform {name}"] = {"data": {"sample_transform": it}}
        changes[f"stage {name}"] = {"transfer": {"stages": {"finetune": {"scheduler": it}}}}
        changes[f"head {name}"] = {"head": {"bias": it}}
    changes["trainer"] = {"trainer": {"default_root_dir": mark}}
    changes["unused"] = {"unused": node("os.system", command=touch)}
    return changes


def merged(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` in place of what `config` holds; mappings are merged, but not objects."""
    inner = {k: v for k, v in change.items() if isinstance(v, dict) and "_target_" not in v}
    return {**config, **change, **{k: merged(config.get(k) or {}, v) for k, v in inner.items()}}


def edit(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """In config.yaml and in the copy in run.json."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    changed = change(config) or config
    (run / "config.yaml").write_text(yaml.dump(changed, sort_keys=False))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "config": changed}))


@pytest.fixture(autouse=True)
def _nobody_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFT_TRUST")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made") / "run"


@pytest.fixture
def run(graft: Graft, made: Path, tmp_path: Path, break_at: Break) -> Path:
    """A run that failed after its first epoch: there is something to evaluate and to resume."""
    if not made.exists():
        from graft.training.module import TransferModule

        break_at(TransferModule, "loss", 8)
        graft("train", *TINY, "trainer.max_epochs=2", f"paths.logs={made.parent}")
        (folder,) = (p for p in made.parent.iterdir() if p.is_dir())
        folder.rename(made)
    return shutil.copytree(made, tmp_path / "given" / "run")


def files(top: Path, but: Path) -> dict[str, bytes]:
    """What is below `top`, but not below `but`, nor in the cache: content by name."""
    return {
        str(path): path.read_bytes() if path.is_file() else b""
        for path in top.rglob("*")
        if not path.is_relative_to(but) and not path.is_relative_to(top / "cache")
    }


def refused(graft: Graft, run: Path, *command: str) -> str:
    """What is said; outside of the folder nothing may change."""
    before = files(run.parents[1], but=run)
    done = graft(command[0], str(run), *command[1:])
    assert files(run.parents[1], but=run) == before
    assert done.returncode == 1, done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("graft: error: ")
    return done.stderr


@pytest.mark.parametrize("name", payloads(""))
def test_code_that_a_config_names_is_refused_unless_it_is_what_its_place_takes(
    graft: Graft, run: Path, tmp_path: Path, name: str
) -> None:
    mark = tmp_path / "MARK"
    edit(run, lambda config: merged(config, payloads(str(mark))[name]))
    built_by_eval = not name.startswith(("callbacks", "logger"))
    for command in ("eval", "resume") if built_by_eval else ("resume",):
        refused(graft, run, command)
    assert not mark.exists()


def test_honest_configs_of_every_group_are_trusted(tmp_path: Path) -> None:
    from graft.config.resolved import CONFIGS

    for group in ("backbone", "callbacks", "head", "optimizer", "scheduler", "transfer", "logger"):
        for name in sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")):
            if name not in ("mlflow", "wandb"):  # which need not be installed
                require_trusted(compose(f"{group}={name}", *REQUIRED.get(name, [])), tmp_path)
    require_trusted(compose("sample_transform=rand_augment"), tmp_path)
    for data in ("image_folder", "cifar10"):
        require_trusted(compose(f"data={data}", "data.root=x"), tmp_path)
    prune = node("graft.sweeps.study.Prune", trial=0, pruner=node("optuna.pruners.MedianPruner"))
    require_trusted({"callbacks": {"prune": prune}}, tmp_path)


def test_a_package_is_trusted_by_name(graft: Graft, run: Path) -> None:
    share = node("tests.rank_states.WriteShare", folder="share")
    edit(run, lambda config: merged(config, {"callbacks": {"share": share}}))
    assert "add --trust tests)" in refused(graft, run, "resume")
    assert graft("eval", str(run)).returncode == 0  # which builds no callbacks
    assert not (run / "share").exists()
    edit(run, lambda config: merged(config, {"callbacks": {"share": node("tests.conftest.os")}}))
    assert "it is of None, not of " in refused(graft, run, "resume", "--trust", "tests")


@pytest.mark.parametrize("stage", ["../../../x", "/tmp/x", "..", ".hidden", "a/b", "", "a\\nb"])
def test_a_stage_names_no_folder_elsewhere(graft: Graft, run: Path, stage: str) -> None:
    def rename(config: dict[str, Any]) -> None:
        config["transfer"]["stages"] = {stage: config["transfer"]["stages"]["finetune"]}

    edit(run, rename)
    for command in ("eval", "resume"):
        assert "a stage's name is also a folder's" in refused(graft, run, command)


LINKS = (
    "eval", "eval/test.json", "checkpoints", "checkpoints/finetune", "metrics.csv", "error.log",
    "grid.csv", "git.diff", "run.json", "splits.npz", "checkpoints/finetune/.last.ckpt.unfinished",
)  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_links_that_lead_out_of_a_run_are_not_followed(
    graft: Graft, run: Path, tmp_path: Path, name: str
) -> None:
    path, there = run / name, tmp_path / "there"
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.move(path, there)
    elif path.exists():
        there.write_bytes(path.read_bytes())
        path.unlink()
    path.symlink_to(there)
    for command in ("eval", "resume"):
        assert "is a link that leads out" in refused(graft, run, command)


def test_a_link_of_wandbs_is_no_reason_to_refuse_a_run(run: Path, tmp_path: Path) -> None:
    link = run / "wandb/run-20261126_054255-a1b2/logs/debug-core.log"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "core.log")
    require_closed(run)
    (run / "wandb/x.log").symlink_to(tmp_path / "core.log")
    with pytest.raises(ValueError, match="leads out"):
        require_closed(run)


def test_a_file_that_is_renamed_meanwhile_is_no_reason_either(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "walk", lambda top: [(top, [], ["run.json", ".run.json.123"])])
    require_closed(run)


def test_nothing_is_written_where_a_config_says(run: Path, tmp_path: Path) -> None:
    def elsewhere(config: dict[str, Any]) -> None:
        config["paths"]["cache"] = str(tmp_path / "MARK")
        config["data"] = compose("data=cifar10", f"paths.cache={tmp_path}/MARK")["data"]

    edit(run, elsewhere)
    config = read_config(run)
    own = str(tmp_path / "cache")
    assert (config["paths"]["cache"], config["data"]["source"]["cache"]) == (own, own)
    assert config["data"]["source"]["download"] is False
    assert read_config(run, trusted=True)["paths"]["cache"] == str(tmp_path / "MARK")


def test_a_place_is_not_deleted(graft: Graft, run: Path) -> None:
    assert "keeps its keys" in refused(graft, run, "resume", "~data.root")


def test_a_pipe_in_a_run_is_not_waited_for(graft: Graft, run: Path) -> None:
    (run / "error.log").unlink()
    os.mkfifo(run / "error.log")
    for command in ("eval", "resume"):
        assert "error.log is a named pipe, not a file: remove it" in refused(graft, run, command)


TIMES = range(1, 40)
BOMBS = {
    "anchors": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in TIMES),
    "interpolations": "a0: x\n" + "".join(f"a{i}: ${{a{i - 1}}}${{a{i - 1}}}\n" for i in TIMES),
    "nested interpolations": "a: " + "${" * 3000 + "}" * 3000,
    "the environment": "seed: ${oc.env:HOME}",
    "tags": "a: !!python/object/apply:os.system ['touch MARK']",
    "depth": "a: " + "[" * 5000 + "]" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_config_neither_unfolds_nor_reads_the_environment(
    graft: Graft, run: Path, bomb: str
) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write(f"\nmore:\n  {bomb}".replace("\n", "\n  "))
    for command in ("eval", "resume"):
        assert "config.yaml is damaged: " in refused(graft, run, command)


SWEEPS = [
    "+callbacks.x={_target_: os.system, command: touch MARK}",
    "+callbacks.x={_target_: graft.sweeps.launch.os.system, command: touch MARK}",
    "+hydra.callbacks.x={_target_: os.system, command: touch MARK}",
    "+hydra={callbacks: {x: {_target_: os.system, command: touch MARK}}}",
    "hydra.launcher={_target_: os.system, command: touch MARK}",
    "hydra.launcher._target_=os.system",
    "hydra.sweeper._target_=os.system",
    "hydra.searchpath=[file://evil]",
    "hydra/job_logging=../../evil",
    "+hydra.job.env_set.LD_PRELOAD=evil.so",
    "+hydra.launcher.options={slurm_setup: [touch MARK]}",
    "+hydra.launcher.options={slurm_partition: 'gpu\\ntouch MARK'}",
    *(
        f"{key}={{_target_: graft.config.objects.make, config: {{_target_: os.mkdir, path: MARK}}}}"
        for key in ("hydra.sweeper.params", "+hydra.sweeper.pruner", "+hydra.sweeper.sampler")
    ),
    "hydra.sweeper.params={x: {_target_: builtins.print}}",
    "hydra.sweeper.params={hydra.callbacks.x: a}",
    "hydra.sweeper.params={+hydra/job_logging: a}",
    "hydra.sweeper.params={data@hydra.callbacks: a}",
    "hydra.sweeper._recursive_=true",
    "hydra/launcher=basic",
    "hydra/sweeper=basic",
    "++hydra.sweeper.sampler._target_=os.system",
    "trainer.max_epochs=${oc.env:HOME}",
    "+trainer.x=$\\{oc.env:HOME\\}",
    "+trainer.x={y: '${seed}${seed}'}",
    "--config-dir=evil",
    "--experimental-rerun=evil.pickle",
    "-cn=evil",
    "data=../../../evil",
    "+data@hydra.callbacks=evil",
    "optimizer._target_=torch.load",
    "backbone._target_=subprocess.run",
    "+data.sample_transform._target_=torch.load",
]


@pytest.mark.parametrize("override", SWEEPS)
def test_a_sweeps_file_sets_values_and_nothing_else(
    graft: Graft, tmp_path: Path, override: str
) -> None:
    sweep = tmp_path / "given" / "sweep"
    sweep.mkdir(parents=True)
    (tmp_path / "evil.yaml").write_text("# @package _global_\nhydra: {callbacks: {x: {}}}\n")
    noted = [*TINY, "seed=0", override.replace("MARK", str(tmp_path / "MARK"))]
    (sweep / "sweep.yaml").write_text(yaml.dump(noted))
    said = refused(graft, sweep, "resume")
    assert any(
        f" {words} " in said for words in ("is not run:", "is not used:", "unexpected keyword")
    )
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize(
    "override",
    ["+seed.x=${oc.env:HOME}", "hydra.searchpath=[file://evil]", "hydra.searchpath=[pkg://this]"],
)
def test_overrides_of_a_run_are_used_if_they_are_typed_again(
    graft: Graft, run: Path, override: str
) -> None:
    noted = yaml.safe_load((run / "overrides.yaml").read_text())
    (run / "overrides.yaml").write_text(yaml.dump([*noted, override]))
    said = refused(graft, run, "resume", "trainer.max_epochs=3")
    assert f"{override} is not used: " in said
    data = refused(graft, run, "eval", "--data", "mine")
    assert ("hydra.searchpath" in override) == (f"add {shlex.quote(override)}" in data)


def test_ones_own_sweep_runs_ones_own_code_and_a_file_of_it_needs_trust(
    graft: Graft, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    own = ["+callbacks.own._target_=tests.integration.test_hostile.Nothing", "seed=0"]
    done = graft("train", "-m", *TINY, *own, f"hydra.sweep.dir={sweep}")
    assert done.returncode == 0, done.stderr
    assert "add --trust tests)" in graft("resume", str(sweep)).stderr
    assert graft("resume", str(sweep), "--trust", "tests").returncode == 0


def test_a_torn_line_of_a_study_does_not_block_it(tmp_path: Path) -> None:
    from graft.sweeps.study import FILE, mend, open_study

    open_study(tmp_path).ask()
    whole = (tmp_path / FILE).read_bytes()
    for torn in (whole + b'{"op', whole + b'{"op{"op": 3}\n' + b"[]\n"):
        (tmp_path / FILE).write_bytes(torn)
        mend(tmp_path / FILE)
        assert (tmp_path / FILE).read_bytes() == whole
    (tmp_path / FILE).write_text('{"op_code": 99}\n')
    with pytest.raises(ValueError, match="damaged"):
        open_study(tmp_path)


class Nothing(L.Callback):
    """A callback of one's own."""


def test_a_study_is_not_unpickled(graft: Graft, tmp_path: Path) -> None:
    sweep = tmp_path / "given" / "sweep"
    sweep.mkdir(parents=True)
    sampler = "hydra.sweeper.sampler._target_=optuna.samplers.CmaEsSampler"
    noted = [*TINY, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "seed=0,1", sampler]
    (sweep / "sweep.yaml").write_text(yaml.dump(noted))
    assert "does not unpickle" in refused(graft, sweep, "resume")


class Touch:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


CHECKPOINTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no checkpoint": lambda c: [1, 2],
    "empty": lambda c: {},
    "no note": lambda c: {**c, "graft": None},
    "no classes": lambda c: {**c, "graft": {**c["graft"], "classes": 3}},
    "classes of another type": lambda c: {**c, "graft": {**c["graft"], "classes": [1, 2]}},
    "no stage": lambda c: {**c, "graft": {"classes": ["a"]}},
    "no weights": lambda c: {**c, "state_dict": None},
    "weights that are none": lambda c: {**c, "state_dict": dict.fromkeys(c["state_dict"], 1)},
    "weights by number": lambda c: {**c, "state_dict": {1: torch.ones(1)}},
    "no loops": lambda c: {**c, "loops": {}},
    "loops of another type": lambda c: {**c, "loops": {"fit_loop": []}},
    "a step that is none": lambda c: {**c, "global_step": "5"},
    "no config": lambda c: {**c, "graft": {**c["graft"], "config": None}},
}
RESUMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no states": lambda c: {k: v for k, v in c.items() if k != "resume"},
    "no optimizers": lambda c: {**c, "optimizer_states": None},
    "another optimizer": lambda c: {**c, "optimizer_states": [{"state": 1, "param_groups": 2}]},
    "no schedules": lambda c: {**c, "lr_schedulers": [1]},
    "no callbacks": lambda c: {**c, "callbacks": 3},
    "no random states": lambda c: {**c, "resume": {"ranks": [{}], "should_stop": False}},
    "weights of other shapes": lambda c: {
        **c, "state_dict": {k: torch.ones(7) for k in c["state_dict"]}
    },
}  # fmt: skip


def spoil(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    for path in run.glob("checkpoints/finetune/*.ckpt"):
        torch.save(change(torch.load(path, weights_only=False)), path)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_of_another_form_are_one_line(graft: Graft, run: Path, name: str) -> None:
    spoil(run, CHECKPOINTS[name])
    for command in ("eval", "resume"):
        assert ".ckpt is " in refused(graft, run, command)


@pytest.mark.parametrize("name", RESUMED)
def test_states_of_another_form_are_one_line(graft: Graft, run: Path, name: str) -> None:
    spoil(run, RESUMED[name])
    said = refused(graft, run, "resume")
    assert "cannot be resumed from" in said or ".ckpt is damaged" in said


def test_checkpoints_are_not_unpickled(graft: Graft, run: Path, tmp_path: Path) -> None:
    spoil(run, lambda checkpoint: {**checkpoint, "x": Touch(tmp_path / "MARK")})
    for command in ("eval", "resume"):
        assert "is torn, unreadable or no checkpoint" in refused(graft, run, command)
    assert not (tmp_path / "MARK").exists()


def test_nothing_that_a_resumed_run_reads_is_unpickled(tmp_path: Path) -> None:
    """What the checkpoints of its other stages and the record of its splits are read by."""
    mark, best, module = tmp_path / "MARK", tmp_path / "best.ckpt", cast(Any, torch.nn.Module())
    torch.save({"state_dict": {}, "graft": {}, "x": Touch(mark)}, best)
    for read in (
        is_final,
        partial(load_checkpoint, module),
        partial(replace_weights, module=module),
    ):
        with pytest.raises(UnpicklingError):
            read(best)
    names: Any = {"train-names": np.array([Touch(mark)], object)}
    np.savez(tmp_path / FILE, classes=[b"a"], **names)
    with pytest.raises(ValueError, match="is damaged"):
        SplitRecord.read(tmp_path)
    assert not mark.exists()


def test_any_file_may_be_named_as_a_checkpoint(graft: Graft, run: Path) -> None:
    for path in ("/etc/passwd", str(run / "run.json"), str(run / "metrics.csv")):
        assert "no checkpoint" in refused(graft, run, "eval", "--ckpt", path)
