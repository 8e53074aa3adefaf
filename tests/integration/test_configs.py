"""Rule 15: every experiment runs one batch through the real CLI; every option composes."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path

import pytest

from graft.config.checks import nodes, wrong_value
from graft.config.resolved import CONFIGS
from tests.conftest import TINY, Graft, compose

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    (path.parent.name, path.stem)
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "hydra", "paths", "stage") and path.stem != "base"
)
UNLABELLED = ("pretrain_denoising", "pretrain_masked", "pretrain_barlow")
ON_TEXTS = ("pretrain_bert", "text_finetune")  # unit/test_text.py runs them one after the other
PLANS = sorted(path.stem for path in (CONFIGS / "transfer").glob("*.yaml"))
REQUIRED = {
    "linear_grid": ["transfer=linear_probe"],
    "image_folder": ["data.root=somewhere"],
    "image_table": ["data.root=somewhere"],
    "text_csv": ["data.root=somewhere"],
    "text_corpus": ["data.root=somewhere"],
    "unlabelled_folder": ["data.root=somewhere", "task=masked", "task.probe=0", "head=features"],
    "features": ["task=masked"],
    **{task: ["head=features"] for task in ("denoising", "masked", "barlow")},
    "torchvision": ["backbone.model=resnet18"],
    "timm": ["backbone.model=resnet18"],
    "domain_shift": ["data.root=somewhere", "data.target=elsewhere"],
    **{key: ["data.target=elsewhere"] for key in ("adabn", "coral", "dann")},
}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_says_what_it_is_for(group: str, option: str) -> None:
    if option in ("wandb", "mlflow"):
        pytest.importorskip(option)
    config = compose(f"{group}={option}", *REQUIRED.get(option, []))
    first = (CONFIGS / group / f"{option}.yaml").read_text().splitlines()[:2]
    comments = [line for line in first if line.startswith("# ") and "@package" not in line]
    assert comments, f"configs/{group}/{option}.yaml: begin with a comment that says what it is for"
    for key, value in list(nodes(config)):
        if key.startswith(f"{group}.") and value is not None:
            parent, _, last = key.rpartition(".")
            owner = reduce(lambda node, name: node[name], parent.split("."), config)
            owner[last] = [[{}]]  # no key may be that
            assert wrong_value(config), f"{key}: say in graft/config/checks.py what it may be"
            owner[last] = value


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_with_its_own_backbone(name: str) -> None:
    root = ["data.root=somewhere"] if name in ON_TEXTS else []
    config = compose(f"experiment={name}", *REQUIRED.get(name, root))
    assert config["transfer"]["stages"]
    header = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    assert f"graft train experiment={name}" in header


def a_batch(name: str, image_folders: Path) -> list[str]:
    """Overrides for one batch of an experiment on images; of a sweep, of one job."""
    overrides = [f"experiment={name}", "debug=fdr", "data.batch_size=4", "hydra.mode=RUN"]
    if "cifar10" in name or name in ("compare_transfer", *UNLABELLED):
        overrides += [f"data.root={image_folders}", "data.val_fraction=0.1"]
    if name == "domain_shift":
        overrides += [f"data.root={image_folders}", f"data.target={image_folders}"]
    if name.startswith(("cifar10", "compare")):
        overrides += ["backbone=squeezenet1_1", "backbone.weights=null", "data.image_size=32"]
    return overrides


@pytest.mark.parametrize(
    ("transfer", "precision"),
    [
        (None, "auto"), ("linear_probe", "auto"), ("finetune", "auto"),
        (None, "bf16-mixed"), ("finetune", "16-mixed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ON_TEXTS])
def test_every_experiment_runs_a_batch(
    graft: Graft,
    name: str,
    transfer: str | None,
    precision: str,
    image_folders: Path,
    tmp_path: Path,
) -> None:
    """On small images in CIFAR-10's folder layout, with a small backbone from random weights."""
    unlabelled = name in UNLABELLED
    if unlabelled and transfer == "linear_probe":
        pytest.skip("it pretrains the whole backbone")
    overrides = [*a_batch(name, image_folders), "trainer=cpu", f"trainer.precision={precision}"]
    if transfer:
        overrides.append(f"transfer={transfer}")
    done = graft("train", *overrides)
    assert done.returncode == 0, done.stderr
    (record,) = (json.loads(p.read_text()) for p in (tmp_path / "logs").rglob("run.json"))
    assert record["status"] == "done"
    measured = {"val/loss"} if unlabelled else {"val/acc", "test/acc", "test/f1", "test/loss"}
    assert set(record["metrics"]) >= measured
    assert all(key in measured or "target" in key or "oracle" in key for key in record["metrics"])
    for line in ("data  ", "backbone  ", "device  ", "stage ", max(measured)):
        assert line in done.stdout


@pytest.mark.parametrize("transfer", PLANS)
def test_every_plan_runs_a_batch_in_each_of_its_stages(
    graft: Graft, transfer: str, tmp_path: Path
) -> None:
    other = "data.target={shift: fog}"
    done = graft(
        "train", *TINY, f"transfer={transfer}", "debug=fdr", *[other] * (transfer == "adabn")
    )
    assert done.returncode == 0, done.stderr
    (record,) = (json.loads(p.read_text()) for p in (tmp_path / "logs").rglob("run.json"))
    stages = compose(f"transfer={transfer}", *REQUIRED.get(transfer, []))["transfer"]["stages"]
    assert list(record["groups"]) == list(stages)
    assert record["stage"] == list(stages)[-1]


@pytest.mark.parametrize("preset", sorted(path.stem for path in CONFIGS.glob("debug/*.yaml")))
def test_every_debug_preset_runs_on_the_embedded_default(
    graft: Graft, preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = [
        "data.image_size=16",
        "backbone.depth=8",
        "backbone.width=4",
        "backbone.weights=null",
        "trainer=cpu",
    ]
    done = graft("train", f"debug={preset}", *narrow)
    assert done.returncode == 0, done.stderr
    assert ("Total time (s)" in caplog.text) == (preset == "profiler")


@pytest.mark.parametrize(
    "callback",
    [
        "EMAWeightAveraging", "WeightAveraging", "LambdaCallback", "LearningRateMonitor",
        "ModelSummary", "RichModelSummary", "Timer, duration: '01:00:00:00'",
        "GradientAccumulationScheduler, scheduling: {0: 2}",
        "StochasticWeightAveraging, swa_lrs: 0.01",
    ],
)  # fmt: skip
def test_lightnings_callbacks_work(
    graft: Graft, callback: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = f"+callbacks.mine={{_target_: lightning.pytorch.callbacks.{callback}}}"
    done = graft("train", *TINY, "trainer.max_epochs=2", config)
    assert done.returncode == 0, done.stderr
    printed = done.stdout + caplog.text
    assert ("rainable params" in printed) == ("Summary" in callback)


@pytest.mark.parametrize(
    "overrides",
    [
        ["head=mlp", "head.norm=standardize", "transfer=linear_probe"],
        ["head=cosine", "optimizer=adamw", "scheduler=cosine"],
        ["transfer=ema", "scheduler=constant", "trainer.accumulate_grad_batches=2"],
        ["callbacks=early_stopping", "head.norm=batchnorm", "head.dropout=0.2"],
        ["backbone.taps=all", "transfer=linear_probe", "task.label_smoothing=0.1"],
        ["transfer.stages.finetune.layer_decay=0.7", "transfer.stages.finetune.head_lr_scale=10"],
        ["data.num_workers=1", "data.image_size=48", "data.resize_size=56"],
        [
            "data.augment.scale=[0.3,1]",
            "data.augment.erase=0.3",
            "data.augment.mixup=0.2",
            "data.augment.cutmix=1",
            "task.label_smoothing=0.1",
            "data.num_workers=1",
            "sample_transform=trivial_augment",
        ],
        ["logger=default"],
    ],
    ids=" ".join,
)
def test_combinations_of_options_run(graft: Graft, overrides: list[str]) -> None:
    done = graft("train", *TINY, *overrides)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.lower()


def test_two_runs_never_share_a_folder(graft: Graft, tmp_path: Path) -> None:
    for _ in range(2):
        assert graft("train", *TINY).returncode == 0
    folders = list((tmp_path / "logs").iterdir())
    assert len(folders) == 2
    assert all("=" not in folder.name for folder in folders)
    assert {"config.yaml", "overrides.yaml", "run.json", "metrics.csv", "checkpoints"} <= {
        path.name for path in folders[0].iterdir()
    }


def test_output_to_a_file_is_one_line_per_epoch(graft: Graft) -> None:
    done = graft("train", *TINY, "trainer.max_epochs=3")
    lines = [line for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert "\r" not in done.stdout
    assert done.stderr == ""


def test_a_process_ends_without_a_word_on_stderr(graft_process: Graft) -> None:
    """What libraries say as the interpreter shuts down is seen in a process of its own alone."""
    done = graft_process("train", *TINY)
    assert (done.returncode, done.stderr) == (0, "")
