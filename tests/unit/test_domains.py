"""Two domains: what is shifted, what adapts, and that a target's labels have no say in it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from graft.config.job import compose_job
from graft.config.kinds import SHIFTS
from graft.data.datasets import ImageDataset
from graft.data.order import weighted
from graft.data.sources.base import Split, Splits
from graft.data.sources.shifted import Shifted, corrupted
from graft.data.sources.synthetic import Synthetic
from graft.data.splits import draw_splits
from graft.evaluation.mixed import MixedImages
from graft.models.resnet_cifar import resnet_cifar
from graft.plan.freeze import batch_norms
from graft.tasks.coral import Coral, covariance
from graft.tasks.dann import Dann, reverse_gradient
from graft.tasks.label_free import label_free
from graft.training.sampling import sampling_weights
from graft.transforms import corruptions
from graft.transforms.corruptions import CORRUPTIONS, corrupt
from graft.transforms.prepare import Prepare
from graft.transforms.preprocessing import Preprocessing
from tests.conftest import Graft, same

CLASSES = ("dark", "grey", "light")
SMALL = [
    "data=image_folder", "data.image_size=16", "data.batch_size=6", "backbone.depth=8",
    "backbone.width=4", "backbone.weights=null", "trainer=cpu", "trainer.max_epochs=2",
    "logger=csv",
]  # fmt: skip


def domain(
    root: Path, offset: int, *, classes: tuple[str, ...] = CLASSES, test: str = "test"
) -> Path:
    """Class folders of 8 training and 4 test images of each class; `offset` brightens all."""
    for split, count in (("train", 8), (test, 4)):
        rng = np.random.default_rng([offset, count])
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 25, (16, 16, 3))
                pixels = (40 + 70 * number + offset + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def domains(tmp_path: Path) -> list[str]:
    """Overrides for a run on two domains."""
    source, target = domain(tmp_path / "a", 0), domain(tmp_path / "b", 30)
    return [*SMALL, f"data.root={source}", f"data.target={target}"]


def trained(graft: Graft, *overrides: str) -> tuple[dict[str, Any], Path]:
    """The record and the folder of a run."""
    done = graft("train", *overrides)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.split("\nrun  ")[-1].split("\n")[0].strip())
    return json.loads((folder / "run.json").read_text()), folder


def weights(folder: Path, which: str = "best") -> dict[str, Tensor]:
    path = folder / f"checkpoints/finetune/{which}.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


# ---------------------------------------------------------------- the target's labels
@pytest.mark.parametrize(
    "method",
    [
        ["task=dann", "transfer=adabn", "data.sampling=importance", "task.monitor=val/snd"],
        pytest.param(["task=coral", "task.weight=100"], marks=pytest.mark.slow),
    ],
    ids=["dann and more", "coral"],
)
def test_permuting_the_targets_labels_leaves_every_weight_as_it_is(
    graft: Graft, domains: list[str], tmp_path: Path, method: list[str]
) -> None:
    """Rule 21. Images that change their class folder are met in the same order, too."""
    record, first = trained(graft, *domains, *method)
    target = tmp_path / "b/train"
    moved = [shutil.move(target / a, target / b) for a, b in (("dark", "x"), ("grey", "dark"))]
    for i, path in enumerate(sorted((target / "light").iterdir())):  # half of them
        if i % 2:
            shutil.move(path, Path(moved[1]) / f"other{path.name}")
    shutil.move(target / "x", target / "grey")
    again, second = trained(graft, *domains, *method)
    assert same(weights(first), weights(second))
    assert record["metrics"] == again["metrics"]
    if "task=dann" in method:
        assert {"task", "task/norm_bias"} <= {row["group"] for row in record["groups"]["finetune"]}


@pytest.mark.slow
def test_a_discriminator_and_covariances_have_a_say_in_the_weights(
    graft: Graft, domains: list[str]
) -> None:
    plain, dann, coral = (
        weights(trained(graft, *domains, *method)[1])
        for method in ([], ["task=dann"], ["task=coral", "task.weight=100"])
    )
    name = next(key for key in plain if key.endswith("weight"))
    assert not torch.equal(plain[name], dann[name])
    assert not torch.equal(plain[name], coral[name])


def test_a_target_is_tested_and_the_oracle_has_its_own_column(
    graft: Graft, domains: list[str]
) -> None:
    record, folder = trained(graft, *domains, "data.oracle=true", "task.monitor=val/snd")
    metrics = record["metrics"]
    assert {"val/snd", "test/acc", "test_target/acc", "oracle/acc"} <= metrics.keys()
    rows = (folder / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    table = [dict(zip(names, row.split(","), strict=True)) for row in rows[1:]]
    oracle = [float(row["oracle/acc"]) for row in table if row["oracle/acc"]]
    density = [float(row["val/snd"]) for row in table if row["val/snd"]]
    assert len(oracle) == len(density) == 2
    assert metrics["oracle/acc"] == pytest.approx(max(oracle))
    assert metrics["test_target/acc"] == pytest.approx(oracle[density.index(max(density))])
    shown = graft("compare", str(folder.parent)).stdout
    assert shown.index("test_target/acc %") < shown.index("oracle/acc %")


def test_adabn_ends_a_stage_with_the_statistics_of_the_target(
    graft: Graft, domains: list[str]
) -> None:
    """Of all its images, and changes nothing else."""
    record, folder = trained(graft, *domains, "transfer=adabn", "trainer.max_epochs=1")
    assert "test_target/acc" in record["metrics"]
    before, adapted = weights(folder, "last"), weights(folder)
    moved = {name for name in before if not torch.equal(before[name], adapted[name])}
    assert moved == {name for name in before if name.endswith(("running_mean", "running_var"))}
    backbone = resnet_cifar(depth=8, width=4, weights=None).eval()
    prefix = "backbone."
    own = {k.removeprefix(prefix): v for k, v in adapted.items() if k.startswith(prefix)}
    backbone.load_state_dict(own)
    files = sorted((folder.parents[1] / "b/train").rglob("*.png"))
    rows = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in files]))
    first: Any = batch_norms(backbone)[0]
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        backbone(Prepare(backbone.preprocessing.at(16, None))(rows.permute(0, 3, 1, 2)))
    mean = seen[0].mean((0, 2, 3))
    torch.testing.assert_close(first.running_mean, mean, rtol=1e-4, atol=1e-5)
    shutil.rmtree(folder.parents[1] / "b")  # its own test needs no target
    assert graft("eval", str(folder)).returncode == 0


@pytest.mark.slow
def test_adabn_looks_into_compiled_blocks(graft: Graft, domains: list[str]) -> None:
    """What is compiled does not notice hooks that come later."""
    plain, compiled = (
        weights(trained(graft, *domains, "transfer=adabn", f"trainer.compile={compile}")[1])
        for compile in ("false", "true")
    )
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- methods
def test_features_of_images_without_labels_are_in_an_order_of_their_content() -> None:
    """So that no class folder that they lie in decides who is held out, and what is drawn."""
    images = np.arange(24, dtype=np.uint8).repeat(48).reshape(24, 3, 4, 4)
    found = []
    for order in (np.arange(24), np.random.default_rng(0).permutation(24)):
        split = Split(images[order], order % 3, digests=order.astype(np.uint64))
        drawn = draw_splits(
            Splits(["a", "b", "c"], split, None, None), val_fraction=0.2, test_fraction=0.2, seed=0,
            train_fraction=1.0, shots_per_class=None, stratified=False,
        )  # fmt: skip
        found.append({name: part[list(range(len(part)))]["input"] for name, part in drawn.items()})
    assert all(torch.equal(part, found[1][name]) for name, part in found[0].items())


def test_coral_is_the_squared_distance_of_covariances() -> None:
    torch.manual_seed(0)
    source, target = torch.randn(9, 4), 3 * torch.randn(7, 4)
    expected = np.cov(source.numpy().T) - np.cov(target.numpy().T)
    task = Coral(weight=5.0)
    loss = task.domain_loss(source, target, 0.0)
    assert float(loss) == pytest.approx(5 * (expected**2).sum() / (4 * 16), rel=1e-5)
    assert torch.allclose(covariance(source + 7), covariance(source), atol=1e-4)


def test_the_backbone_gets_the_discriminators_gradient_reversed() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, requires_grad=True)
    layer = nn.Linear(3, 1)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    reversed_ = layer(reverse_gradient(x, 0.3)).square().sum()
    found = torch.autograd.grad(reversed_, [x, layer.weight])
    assert torch.allclose(found[0], -0.3 * plain[0])
    assert torch.equal(found[1], plain[1]), "the discriminator's own stays"


@pytest.mark.parametrize(("progress", "strength"), [(0.0, 0.0), (0.1, 0.462117), (1.0, 0.999909)])
def test_the_reversal_grows_over_a_stage_as_published(progress: float, strength: float) -> None:
    torch.manual_seed(0)
    task = Dann(weight=2.0, hidden=8)
    task.build(3, resnet_cifar(depth=8, width=4, weights=None))

    def gradient(**strengths: float) -> Tensor:
        torch.manual_seed(1)
        source, target = torch.randn(4, 16, requires_grad=True), torch.randn(6, 16)
        task.domain_loss(source, target, **strengths).backward()
        assert source.grad is not None
        return source.grad

    one = gradient(progress=1.0) / 0.999909
    assert torch.allclose(gradient(progress=progress), strength * one, atol=1e-6)


def test_scores_without_labels() -> None:
    torch.manual_seed(0)
    tight = torch.eye(3).repeat_interleave(20, 0) * 20
    spread = torch.randn(60, 3) * 2
    sure, unsure = label_free(tight), label_free(spread)
    assert sure["entropy"] < unsure["entropy"]
    assert sure["snd"] == pytest.approx(np.log(19), abs=1e-3), "19 neighbours, all alike"
    p = spread.softmax(1)
    p = p / p.norm(dim=1, keepdim=True)
    entropies = []
    for i in range(60):
        others = torch.cat([p[:i], p[i + 1 :]])
        q = (others @ p[i] / 0.05).softmax(0)
        entropies.append(float(-(q * q.log()).sum()))
    assert float(unsure["snd"]) == pytest.approx(np.mean(entropies), rel=1e-4)
    heads = label_free(torch.stack([tight, spread], 1))
    assert torch.allclose(heads["snd"], torch.stack([sure["snd"], unsure["snd"]]))


class Rows:
    """Stored features that are there."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def blocks(self) -> list[Tensor]:
        return list(self.rows.split(7))


def test_images_like_the_targets_weigh_more_and_wrong_ones_are_harder() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(40, 2) - 1, torch.randn(40, 2) + 1
    stored: Any = {"train": Rows(torch.cat([left, right])), "target": Rows(torch.randn(30, 2) + 1)}
    labels = np.repeat([0, 1], 40)
    importance = sampling_weights("importance", stored, labels)
    assert importance.mean() == pytest.approx(1, abs=1e-3)
    assert importance[40:].mean() > 2 * importance[:40].mean()
    labels[3] = 1  # among those of class 0
    hard = sampling_weights("hard", stored, labels)
    assert hard.argmax() == 3
    assert hard.min() >= 0.4
    stored = {"train": Rows(torch.cat([torch.randn(99, 2) - 9, torch.ones(1, 2)]))}
    stored["target"] = Rows(torch.randn(30, 2) * 0.1 + 1)
    extreme = sampling_weights("importance", stored, np.zeros(100, np.int64))
    assert extreme.max() == extreme[99] == pytest.approx(10, abs=0.1), "the others had too little"


def test_a_pass_shows_each_image_as_often_as_its_weight_says() -> None:
    weights = np.array([0.0, 0.5, 1.0, 2.0, 1.5])
    counts = np.zeros(5)
    for seed in range(200):
        drawn = weighted(weights, np.random.default_rng(seed))
        once = np.bincount(drawn % 5, minlength=5)
        assert len(set(drawn.tolist())) == 5, "each time with an augmentation of its own"
        assert (np.abs(once - weights) < 1).all()
        counts += once
    assert np.allclose(counts / 200, weights, atol=0.15)


# ---------------------------------------------------------------- shifted data
def test_the_names_that_are_checked_are_the_corruptions_there_are() -> None:
    assert tuple(CORRUPTIONS) == SHIFTS


def test_shifted_data_is_built_once_and_stays_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Synthetic(classes=2, per_class=5, test_per_class=3)
    plain = source.load(Preprocessing(32, 32))
    first = Shifted(source, "gaussian_noise", 5, tmp_path).load(Preprocessing(32, 32))
    expected = corrupt(torch.from_numpy(plain.train.images), torch.arange(10), "gaussian_noise", 5)
    assert np.array_equal(first.train.images, expected.numpy())
    assert first.test is not None
    assert np.array_equal(first.train.labels, plain.train.labels)
    monkeypatch.setattr(corruptions, "corrupt", None)
    again = Shifted(source, "gaussian_noise", 5, tmp_path).load(Preprocessing(32, 32))
    assert np.array_equal(again.train.images, first.train.images)
    assert ImageDataset(again.train).digest() != ImageDataset(plain.train).digest()
    with pytest.raises(TypeError):  # another severity is another entry
        Shifted(source, "gaussian_noise", 4, tmp_path).load(Preprocessing(32, 32))


def test_a_mixed_stream_has_every_image_in_every_corruption(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 255, (4, 3, 8, 8)).astype(np.uint8), np.arange(4))
    parts = [corrupted(ImageDataset(split), name, 1, tmp_path) for name in ("fog", "contrast")]
    mixed = MixedImages(parts)
    batch = mixed[[1, 6, 3]]
    assert len(mixed) == 8
    assert batch["label"].tolist() == [1, 2, 3]
    assert batch["index"].tolist() == [1, 6, 3]
    assert torch.equal(batch["input"][1], parts[1][[2]]["input"][0])


def test_a_run_on_shifted_data_and_on_a_shifted_target(graft: Graft, domains: list[str]) -> None:
    noisy = ["data.shift=contrast", "data.severity=3", "data.target={shift: fog, severity: 1}"]
    record, folder = trained(graft, *domains, *noisy, "task=coral")
    assert "test_target/acc" in record["metrics"]
    assert record["config"]["data"]["target"] == {"shift": "fog", "severity": 1}
    root = folder.parents[1] / "a"
    done = graft(
        "eval", str(folder), "--data", "image_folder", f"data.root={root}", "data.shift=fog"
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.shift=fogg"], "data.shift=fogg: must be one of gaussian_noise, "),
        (["data.shift=fog", "data.severity=6"], "data.severity=6: must be a whole number from 1"),
        (["data.target={shift: fog, severity: 0}"], "data.target.severity=0: must be a whole"),
        (["data.severity=3"], "data.severity=3: there is no data.shift"),
        (["data.target=nowhere"], "nowhere: no such folder"),
        (["data.target={severity: 3}"], "data.target: neither a shift nor a source"),
        (["data.target={shft: fog}"], "no config key data.target.shft: it has shift, severity"),
        (["task=dann"], "task=dann: there is no second domain: set data.target=FOLDER"),
        (["task.monitor=val/snd"], "task.monitor=val/snd: there is no second domain"),
        (["data.sampling=importance"], "data.sampling=importance: there is no second domain"),
        (["data.oracle=true"], "data.oracle=true: there is no second domain"),
        (["transfer=adabn"], "transfer.stages.finetune.adabn=true: there is no second domain"),
        (["task.monitor=val/entropy", "data.target=x"], "smaller is better: set task.mode=min"),
        (["task=coral", "data.target=x", "transfer=linear_probe"], "no stage of this plan trains"),
        (["task=coral", "data.target=x", "data.augment.mixup=0.2"], "images of data.target have"),
        (["task=dann", "data.target=x", "task.hidden=0"], "task.hidden=0: must be a whole number"),
        (["task=dann", "data.target=x", "trainer=fsdp"], "has weights of its own"),
        (["transfer=ridge_probe", "data.sampling=hard"], "this plan solves for its head on each"),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.monitor=oracle/acc"],
            "must be a metric of val/ or train/",
        ),
    ],
)
def test_what_cannot_be_is_said_before_any_work(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compose_job(overrides)


def refused(graft: Graft, *overrides: str) -> str:
    done = graft("train", *overrides)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    return line


def test_targets_that_are_none(graft: Graft, tmp_path: Path) -> None:
    own = [*SMALL, f"data.root={domain(tmp_path / 'a', 0)}"]
    other = domain(tmp_path / "b", 30, classes=("dark", "grey", "violet"))
    line = refused(graft, *own, f"data.target={other}")
    assert f"data.target={other}: the data has classes that the run does not know: violet" in line
    untested = domain(tmp_path / "c", 30, test="val")
    assert "it has no test split" in refused(graft, *own, f"data.target={untested}")


def test_adabn_without_batchnorm_is_refused_by_name(graft: Graft, domains: list[str]) -> None:
    squeezenet = ["backbone=squeezenet1_1", "backbone.weights=null", "data.image_size=32"]
    tiny = [o for o in domains if not o.startswith(("backbone.", "data.image_size"))]
    line = refused(graft, *tiny, *squeezenet, "transfer=adabn", "trainer.max_epochs=1")
    assert "squeezenet1_1" in line
    assert "has no BatchNorm" in line
