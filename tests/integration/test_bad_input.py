"""Bad input gives one clear line and a non-zero exit, before any long work."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import callbacks
from PIL import Image

from graft.config.conflicts import REFUSED_CALLBACKS
from graft.data.datamodule import TransferDataModule
from tests.conftest import TINY, Graft, compose

STAGE = "transfer.stages.finetune"
ADAMW = [f"+optimizer@{STAGE}.optimizer=adamw"]  # for a run with SGD


def error(graft: Graft, *overrides: str) -> str:
    """The one line that `graft train` ends with."""
    done = graft("train", *overrides)
    assert done.returncode != 0, done.stdout
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("graft: error: ")
    assert "Traceback" not in done.stderr
    return lines[0].removeprefix("graft: error: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=quickstrt", "no config experiment=quickstrt: did you mean quickstart?"),
        ("+trainer.max_steps=9", "no config key trainer.max_steps: use trainer.max_epochs=N"),
        ("backbone=resnet5", "no config backbone=resnet5: did you mean resnet"),
        ("dat=digits", "no config key dat: did you mean data?"),
        ("data.bathc_size=3", "no config key data.bathc_size: did you mean data.batch_size"),
        ("data.batch_size=abc", "data.batch_size=abc: must be a whole number above 0"),
        ("data.batch_size=1.5", "data.batch_size=1.5: must be a whole number above 0"),
        ("optimizer.lr=-1", "optimizer.lr=-1: must be a number above 0"),
        ("trainer.max_epochs=ten", "trainer.max_epochs=ten: must be a whole number above 0"),
        ("transfer.stages.finetune.norm=off", "transfer.stages.finetune.norm=off: must be one"),
        ("head.grid=3", "head.grid=3: must be lists of lr, weight_decay and seed, or null"),
        ("head.grid={lr:[0.1,0]}", "head.grid.lr=[0.1, 0]: must be a list of values, each"),
        ("transfer.stages.finetune.views=3", "transfer.stages.finetune.views=3 takes the place"),
        ("trainer.limit_val_batches=0", "trainer.limit_val_batches=0: must be a number of batches"),
        ("paths.cache=''", "paths.cache=: must be the name of a folder"),
        ("data=image_folder", "no value for data.root: give one as data.root=VALUE"),
        (
            "callbacks.mine._target_=a.B",
            "no config key callbacks.mine._target_: to add one, write +",
        ),
    ],
)
def test_errors_in_the_config(graft: Graft, override: str, message: str) -> None:
    assert error(graft, override).startswith(message)


def test_errors_in_the_config_are_found_before_heavy_imports(
    graft_process: Graft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert error(graft_process, "seed=abc").startswith("seed=abc: must be a whole number")
    photos = ["data=image_folder", f"data.root={tmp_path}"]
    for mistyped, message in {
        "data.root=no": f"{tmp_path}/no: no such folder; data.root= says where the images are",
        "backbone.weights=no.pth": f"backbone.weights={tmp_path}/no.pth: neither a file nor a run",
    }.items():
        assert error(graft_process, *photos, mistyped).startswith(message)


@pytest.mark.parametrize(("command", "code"), [(["train"], -signal.SIGINT), (["eval", "RUN"], 130)])
def test_ctrl_c_during_imports_is_one_line(
    graft_process: Graft,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: list[str],
    code: int,
) -> None:
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = graft_process(*command)
    assert (done.returncode, done.stderr) == (code, "graft: interrupted\n")


@pytest.mark.slow
def test_each_of_hundreds_of_wrong_overrides_is_one_line_that_names_the_key() -> None:
    """Found before torch is imported, which the script asserts."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.wrong_overrides"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)
    assert len(messages) >= 300
    accepted = [override for override, message in messages.items() if not message]
    assert not accepted
    for override, message in messages.items():
        assert override.lstrip("~").partition("=")[0] in message
        assert "\n" not in message
        assert "Error" not in message  # the name of a class in place of what is wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=range(0)"], "seed=range(0): there is no value in it"),
        (["seed=0,1,0"], "seed=0,1,0: a value is there twice"),
        (
            ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=0", "seed=0,1"],
            "hydra.sweeper.n_trials=0",
        ),
    ],
)
def test_a_sweep_without_jobs_or_with_one_twice(
    graft: Graft, arguments: list[str], message: str
) -> None:
    if "hydra/sweeper=optuna" in arguments:
        pytest.importorskip("optuna")
    assert error(graft, "-m", *arguments).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+head.widht=3", "head.widht: LinearHead takes no such argument; it takes num_features"),
        ("+data.augment.blur=3", "data.augment.blur: Augment takes no such argument"),
        ("+optimizer.momentun=0.9", "optimizer.momentun: SGD takes no such argument"),
        ("+scheduler.end=0", "scheduler.end: one_cycle takes no such argument"),
        ("optimizer.momentum=0", "optimizer of transfer.stages.finetune: Nesterov momentum"),
        (
            "+callbacks.mine._target_=my_code.Mine",
            "callbacks.mine._target_=my_code.Mine: no package or file my_code is found",
        ),
        (
            "+callbacks.stop={_target_: lightning.pytorch.callbacks.Timer, durations: 3}",
            "callbacks.stop.durations: Timer takes no such argument",
        ),
    ],
)
def test_what_a_class_does_not_take_is_said_before_data_is_read(
    graft: Graft, override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransferDataModule, "prepare_data", pytest.fail)
    assert error(graft, "trainer=cpu", override).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["transfer=linear_probe", "data.augment.flip=0.4"],
            "data.augment.flip=0.4: no stage of this plan augments its images: set "
            "transfer.stages.probe.augment=true",
        ),
        (["transfer=ridge_probe", "optimizer.lr=0.1"], "optimizer.lr=0.1: this plan solves for"),
        ([*ADAMW, "optimizer.lr=0.1"], "optimizer.lr=0.1: every stage of this plan has its own"),
        ([*ADAMW, "optimizer.momentum=0.8"], "optimizer.momentum=0.8: every stage"),
        (
            ["transfer=linear_probe", "head=linear_grid", "optimizer.lr=0.1"],
            "optimizer.lr=0.1: every stage of this plan has its own (probe)",
        ),
        ([f"{STAGE}.scheduler={{warmup: 0.1}}", "scheduler.warmup=0"], "scheduler.warmup=0: every"),
        (
            [*ADAMW, f"{STAGE}.lr=0.2", f"{STAGE}.optimizer.lr=0.1"],
            f"{STAGE}.optimizer.lr=0.1: {STAGE}.lr is set too and comes first",
        ),
    ],
)
def test_what_nothing_would_act_on_is_refused(
    graft: Graft, overrides: list[str], message: str
) -> None:
    assert error(graft, *overrides).startswith(message)


@pytest.mark.parametrize("name", REFUSED_CALLBACKS)
def test_lightnings_callbacks_that_have_no_place_are_refused_by_name(name: str) -> None:
    assert hasattr(callbacks, name)
    with pytest.raises(ValueError, match=rf"^callbacks.mine: {name} is not used here"):
        compose(f"+callbacks.mine._target_=lightning.pytorch.callbacks.{name}")


class KeepOnException(callbacks.OnExceptionCheckpoint):
    """Of a user's own."""


def test_a_kind_of_on_exception_checkpoint_is_refused(graft: Graft) -> None:
    """Lightning would start each stage from its file, if there is one."""
    config = f"+callbacks.mine={{_target_: {__name__}.KeepOnException, dirpath: .}}"
    assert error(graft, *TINY, config).startswith("callbacks.mine: a kind of OnExceptionCheckpoint")


def test_suggested_keys_are_those_of_the_plan_that_was_chosen(graft: Graft) -> None:
    wrong = error(graft, "transfer=linear_probe", "transfer.stages.finetune.epochs=2")
    assert "did you mean transfer.stages.probe.epochs" in wrong
    assert "or transfer.stages.finetune" not in wrong


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head.grid={lr:[0.1,0.1]}"], "head.grid.lr=[0.1, 0.1]: a value is there twice"),
        (
            ["head=linear", "head.grid={rate:[0.1]}"],
            "no config key head.grid.rate: it has lr, weight_decay",
        ),
        (["transfer=finetune"], "head.grid: the first stage, finetune, trains more than the head"),
        (["transfer=ridge_probe"], "head.grid: transfer.stages.probe.solver=ridge solves for one"),
        (["trainer.gradient_clip_val=1"], "head.grid: trainer.gradient_clip_val takes a norm"),
        (["trainer.precision=16-mixed"], "head.grid: in trainer.precision=16-mixed one diverging"),
        (["head.dropout=0.5"], "head.dropout=0.5: heads of a grid would draw other masks"),
        (["head=mlp", "transfer=ridge_probe"], "transfer.stages.probe.solver=ridge: solves for a"),
        (
            ["head=linear", "transfer=lbfgs_probe", "transfer.stages.probe.trainable=all"],
            "transfer.stages.probe.solver=lbfgs: solves for a head alone",
        ),
        (
            ["head=linear", "transfer=lbfgs_probe", "transfer.stages.probe.cache=off"],
            "transfer.stages.probe.solver=lbfgs: needs stored features",
        ),
        (
            ["head=linear", "transfer=ridge_probe", "head.norm=batchnorm"],
            "transfer.stages.probe.solver=ridge: knows no batches",
        ),
        (["head.norm=batchnorm", "data.batch_size=1"], "head.norm=batchnorm: one image has no"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_that_do_not_go_together_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        compose("transfer=linear_probe", "head=linear_grid", *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("transfer=ema", "transfer.stages.finetune.ema: needs whole weights on each device"),
        ("transfer=l2_sp", "transfer.stages.finetune.l2_sp: needs whole weights on each device"),
        ("trainer.compile=true", "trainer.compile: blocks that trainer=fsdp has put together"),
        ("trainer.precision=16-mixed", "trainer.precision=16-mixed: with trainer=fsdp each device"),
    ],
)
def test_what_sharded_weights_do_not_go_with(override: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        compose("trainer=fsdp", override)


def test_an_unknown_command_is_named(graft: Graft) -> None:
    done = graft("trian")
    assert done.returncode != 0
    assert done.stderr.startswith("graft: no command 'trian'")


def test_a_batch_larger_than_the_data(graft: Graft) -> None:
    message = error(graft, *TINY, "data.batch_size=500")
    assert message.startswith("data.batch_size=500 is larger than the 44 training images")


def test_a_head_of_another_number_of_classes(graft: Graft) -> None:
    assert "head.num_classes=7, but the data has 4 classes" in error(
        graft, *TINY, "head.num_classes=7"
    )


def test_weights_of_another_architecture_name_the_keys_that_differ(
    graft: Graft, tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    torch.save({"layer1.weight": torch.zeros(3)}, path)
    message = error(graft, *TINY, f"backbone.weights={path}")
    assert "does not fit" in message
    assert "no tensor in it has the name and the shape of one of the model's" in message
    parts = {"blocks.stem.conv.weight": torch.zeros(4, 3, 3, 3), "layer1.weight": torch.zeros(3)}
    torch.save(parts, path)
    message = error(graft, *TINY, f"backbone.weights={path}")
    assert "44 missing (blocks.stem.bn.weight, blocks.stem.bn.bias, " in message


def folder_error(graft: Graft, root: Path, *overrides: str) -> str:
    return error(graft, *TINY[3:], "data=image_folder", f"data.root={root}", *overrides)


def test_no_data_folder_an_empty_one_and_one_class(graft: Graft, tmp_path: Path) -> None:
    assert "no such folder" in folder_error(graft, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in folder_error(graft, tmp_path / "empty")
    only = tmp_path / "one" / "train" / "cats"
    only.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(only / "a.png")
    assert "class" in folder_error(graft, tmp_path / "one")


def test_a_test_class_that_is_not_in_train(graft: Graft, image_folders: Path) -> None:
    (image_folders / "test" / "dark").rename(image_folders / "test" / "unknown")
    assert "unknown" in folder_error(graft, image_folders)


def test_a_truncated_image_is_named_and_can_be_skipped(graft: Graft, image_folders: Path) -> None:
    broken = image_folders / "train" / "grey" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    message = folder_error(graft, image_folders)
    assert "1 of 78" in message
    assert str(broken.relative_to(image_folders)) in message
    assert "data.source.on_error=skip" in message
    done = graft(
        "train", *TINY[3:], "data=image_folder", f"data.root={image_folders}",
        "data.source.on_error=skip", "data.batch_size=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "53 train, 18 test, 6 val" in done.stdout


def test_no_network_and_no_data(graft: Graft, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to put where, and what works without."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    message = error(graft, *TINY[3:], "data=cifar10")
    assert "cifar-10-python.tar.gz" in message
    assert "data=digits" in message


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder nobody may write to")
def test_a_log_folder_that_cannot_be_written(graft: Graft) -> None:
    """Under /proc nobody may create folders, not even root."""
    message = error(graft, *TINY, "paths.logs=/proc/logs")
    assert "cannot create a run folder in /proc/logs" in message
    assert "GRAFT_LOGS" in message


def test_a_failed_run_is_recorded_as_failed(graft: Graft, tmp_path: Path) -> None:
    error(graft, *TINY, "optimizer.lr=1e30")
    (run,) = (tmp_path / "logs").iterdir()
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "failed"
    assert "lower optimizer.lr" in record["error"]
    assert "Traceback" in (run / "error.log").read_text()


def test_a_failed_job_leaves_the_rest_of_a_sweep_running(graft: Graft, tmp_path: Path) -> None:
    done = graft("train", *TINY, "-m", "optimizer.lr=1e30,0.01")
    assert done.returncode != 0
    records = [json.loads(p.read_text()) for p in (tmp_path / "logs").rglob("run.json")]
    assert sorted(record["status"] for record in records) == ["done", "failed"]
