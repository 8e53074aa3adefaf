"""Self-supervised tasks: their losses, what they see, what is kept of their encoder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from graft.data.sources.base import Source, Split, Splits
from graft.models.backbone import Backbone
from graft.models.resnet_cifar import resnet_cifar
from graft.models.torchvision import torchvision_backbone
from graft.runs.folder import RunFolder
from graft.runs.startup import quiet_libraries
from graft.runs.train import train
from graft.tasks.barlow import Barlow
from graft.tasks.base import Tally
from graft.tasks.denoising import Denoising
from graft.tasks.masked import Masked
from graft.tasks.pretraining import spatial_map
from graft.training.adabn import estimate_statistics
from graft.transforms.color import COLOR_DRAWS, LUMA, recolored
from graft.transforms.draws import normal, uniform_many
from graft.transforms.preprocessing import Preprocessing
from tests.conftest import TINY, Graft, Trained, compose, same

SSL = ["head=features", "data.batch_size=8", "optimizer=adamw", "trainer.max_epochs=2"]
TASKS = {
    "denoising": ["task=denoising", "task.blur=0.5"],
    "masked": ["task=masked"],
    "barlow": ["task=barlow", "task.width=16", "data.augment.color=0.4"],
}


class Relabelled(Source):
    """The same images in the same order, under other labels; all splits are drawn."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def load(self, preprocessing: Preprocessing) -> Splits:
        images = np.random.default_rng(0).integers(0, 255, (60, 3, 16, 16)).astype(np.uint8)
        labels = np.random.default_rng(self.seed).permutation(np.arange(60) % 3)
        return Splits(["a", "b", "c"], Split(images, labels), None, None)


def run(tmp_path: Path, name: str, *overrides: str, labels: int = 0) -> Trained:
    quiet_libraries()
    config = compose(*TINY, *SSL, *TASKS[name], *overrides)
    config["data"]["source"] = {"_target_": f"{__name__}.Relabelled", "seed": labels}
    folder = RunFolder.create(tmp_path, "run", config, overrides)
    folder.start()
    metrics, module = train(config, folder)
    return Trained(metrics, module, folder.path)


def built(task: Any, backbone: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    task.build(10, backbone or resnet_cifar(depth=8, width=4, weights=None))
    return task


class Encoder:
    """A model with a backbone alone."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.backbone = resnet_cifar(depth=8, width=4, weights=None).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"input": images, "index": torch.arange(6), "label": torch.zeros(6).long()}


@pytest.mark.parametrize("name", TASKS)
def test_labels_leave_every_weight_as_it_is_and_statistics_are_of_clean_images(
    tmp_path: Path, name: str
) -> None:
    """Rules 21 and 22, where splits are drawn and an online score looks at labels."""
    first, other = (run(tmp_path / str(i), name, "task.probe=1", labels=i) for i in (0, 1))
    assert same(first.state(), other.state())
    assert set(first.metrics) == {"val/loss"}
    rows = (first.folder / "metrics.csv").read_text()
    assert "val/probe_acc" in rows.splitlines()[0]
    saved = torch.load(first.folder / "checkpoints/finetune/best.ckpt", weights_only=True)
    assert same(saved["state_dict"], first.state())

    data = first.module.trainer.datamodule  # type: ignore[attr-defined]
    whole = data.prepared("train", range(len(data.splits["train"])), torch.device("cpu"))
    exact = copy.deepcopy(first.module.backbone)
    estimate_statistics(exact, [whole])
    expected = exact.state_dict()
    for key, kept in first.module.backbone.state_dict().items():
        assert torch.allclose(kept.float(), expected[key].float(), rtol=1e-4, atol=1e-5), key


def test_a_pretrained_encoder_goes_on_and_predicts_nothing(tmp_path: Path, graft: Graft) -> None:
    """It is the start of another plan and of more pretraining; eval and export say what it is."""
    options = [*TINY, *SSL, *TASKS["denoising"], "trainer.max_epochs=1"]
    done = graft("train", *options)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "logs").iterdir()
    for command in (["eval", str(folder)], ["export", str(folder)]):
        done = graft(*command)
        assert done.returncode == 1
        assert "a pretrained encoder, which predicts nothing" in done.stderr
    for overrides in (["transfer=lp_ft", "transfer.stages.probe.epochs=1"], [*SSL, "task=masked"]):
        done = graft("train", *TINY, *overrides, f"backbone.weights={folder}", "debug=fdr")
        assert done.returncode == 0, done.stderr
        assert f"tensors of {folder}" in done.stdout
    done = graft("train", *TINY, f"backbone.weights={folder}", "backbone.depth=14")
    assert done.returncode == 1
    assert "does not fit the architecture" in done.stderr
    assert "missing (blocks.stage1_2" in done.stderr or "stage1_2" in done.stderr


def test_masked_loss_counts_masked_pixels_alone(batch: dict[str, Tensor]) -> None:
    task, images = built(Masked(ratio=0.6, patch=8)), batch["input"]
    seen, mask = task.corrupted(images, 0, 0, batch["index"])
    assert (mask.sum(1) == 10).all()
    pixels = F.interpolate(mask.view(-1, 1, 4, 4).float(), scale_factor=8).bool().expand_as(images)
    assert torch.equal(seen[~pixels], images[~pixels])
    assert (seen[pixels] == 0).all()
    restored = torch.randn_like(images, requires_grad=True)
    losses = task.losses(restored, images, mask)
    (gradient,) = torch.autograd.grad(losses.sum(), restored)
    assert ((gradient != 0) == pixels).all()
    # The paper's target, written out for one patch of one image.
    row, column = divmod(int(mask[0].nonzero()[0]), 4)
    at = (0, slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
    patch = images[at].double()
    target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
    others = losses[0] * 10 - sum(
        task.losses(restored, images, one)[0]
        for one in torch.eye(16).bool()[mask[0]][1:, None].expand(-1, 6, -1)
    )
    assert float(others.detach()) == pytest.approx(
        float((restored[at].detach() - target).square().mean()), rel=1e-4
    )
    shown = task.shown(restored, images, mask)
    assert torch.allclose(shown[~pixels], images[~pixels])


def test_what_is_corrupted_depends_on_seed_epoch_and_index_alone(batch: dict[str, Tensor]) -> None:
    images, index = batch["input"], batch["index"]
    for task in (built(Denoising()), built(Masked())):
        whole = task.corrupted(images, 3, 1, index)[0]
        part = task.corrupted(images[4:], 3, 1, index[4:])[0]
        assert torch.equal(whole[4:], part)
        for seed, epoch, at in ((4, 1, index), (3, 2, index), (3, 1, index + 1)):
            assert not torch.equal(whole, task.corrupted(images, seed, epoch, at)[0])
    noise = normal(0, 0, torch.arange(50), 3072)
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert abs(float((noise[:, 1:] * noise[:, :-1]).mean())) < 0.01
    assert len(uniform_many(0, 0, torch.arange(9), 200).flatten().unique()) > 1790


def test_denoising_loss_is_the_squared_error_of_the_clean_image(batch: dict[str, Tensor]) -> None:
    task, model, tally = built(Denoising(noise=0.5)), Encoder(), Tally()
    restored, seen, _ = task.restored(model, batch)
    assert float((seen - batch["input"]).std()) == pytest.approx(0.5, rel=0.05)
    expected = F.mse_loss(restored, batch["input"])
    assert torch.allclose(task.loss(model, batch), expected)
    for part in (slice(2), slice(2, 6)):
        task.evaluate(model, {key: value[part] for key, value in batch.items()}, tally)
    assert float(task.metrics(tally.take())["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_barlow_loss_is_that_of_the_paper(batch: dict[str, Tensor]) -> None:
    """In float64, with the batch's own mean and deviation; in validation over all batches."""
    task, model, tally = built(Barlow(width=12, redundancy=0.01)), Encoder(), Tally()
    task.eval()
    batch["second"] = batch["input"] + torch.randn_like(batch["input"])
    views = [task.projector(model.backbone(batch[k])).double() for k in ("input", "second")]
    first, second = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in views)
    c = torch.einsum("ni,nj->ij", first, second) / 6
    expected = sum((1 - c[i, i]) ** 2 for i in range(12)) + 0.01 * sum(
        c[i, j] ** 2 for i in range(12) for j in range(12) if i != j
    )
    assert float(task.loss(model, batch)) == pytest.approx(float(expected), rel=1e-4)
    for part in (slice(2), slice(2, 6)):
        task.evaluate(model, {key: value[part] for key, value in batch.items()}, tally)
    assert float(task.metrics(tally.take())["loss"]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    "model",
    ["resnet18", *(pytest.param(m, marks=pytest.mark.slow) for m in ("vit_b_32", "swin_t"))],
)
def test_encoders_of_all_kinds_give_a_square_of_places(model: str) -> None:
    backbone = torchvision_backbone(model=model, weights=None).eval()
    maps = spatial_map(backbone, torch.randn(1, 3, 224, 224))
    assert maps.shape == (1, backbone.num_features, 7, 7)
    built(Denoising(decoder_width=0), backbone)


def test_colours_move_by_what_was_drawn_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(60, 190, (4, 3, 8, 8), generator=rng).byte()
    u = torch.rand(4, COLOR_DRAWS, generator=rng)
    assert torch.equal(recolored(images, u, 0.0, 0.0), images)
    grey = recolored(images, u, 0.0, 1.0)
    assert (grey.float() - grey.float().mean(1, keepdim=True)).abs().max() <= 1
    hue = torch.full((4, COLOR_DRAWS), 0.5)
    hue[:, 0], hue[:, 4] = 0.0, 1.0  # hue alone: the grey value stays
    turned = recolored(images, hue, 0.4, 0.0)
    assert not torch.equal(turned, images)
    weights = torch.tensor(LUMA)[:, None, None]
    before, after = ((weights * x.float()).sum(1) for x in (images, turned))
    assert (before - after).abs().mean() < 1
    u[:, 0] = 0.9  # an image in five stays
    assert torch.equal(recolored(images, u, 0.4, 0.0), images)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=masked", "task.ratio=0"], "task.ratio=0: must be a number above 0 and below 1"),
        (["task=masked", "task.ratio=1"], "task.ratio=1: must be a number above 0 and below 1"),
        (["task=masked", "task.ratio=0.001"], "masks 0 of the 64 patches"),
        (["task=masked", "task.patch=5"], "task.patch=5 does not divide images of 32 x 32 px"),
        (["task=denoising", "data.image_size=30"], "use a multiple of 4, the stride"),
        (["task=denoising", "task.noise=0"], "nothing would be left to restore"),
        (["task=denoising", "backbone.taps=all"], "features of several blocks have no common map"),
        (["task=masked", "head=linear"], "task=masked: has a decoder or projector of its own"),
        (["task=classification"], "head=features: gives no outputs"),
        (["task=barlow", "data.augment=null"], "two views of an image would be equal"),
        (["task=barlow", "data.shots_per_class=2"], "task=barlow sees no classes"),
        (["task=barlow", "data.augment.mixup=0.2"], "knows no labels to mix"),
        (["task=masked", "transfer=linear_probe"], "trains the whole backbone"),
        (["task=masked", "task.monitor=val/probe_acc"], "set task.probe=1 and task.mode=max"),
        (["task=masked", "data.sampling=hard"], "data.sampling: task=masked sees no classes"),
        (["task=masked", "data.target={shift: fog}"], "task=masked: makes no use of data.target"),
        (["task=masked", "data.target={shift: fog}", "data.oracle=true"], "are for classifiers"),
        (["task=barlow", "data.augment.shift=0", "data.augment.flip=0"], "views of an image would"),
        (["task=masked", "trainer=fsdp"], "has weights of its own, which trainer=fsdp would not"),
    ],
)
def test_what_cannot_be_pretrained_is_refused_in_a_line(
    graft: Graft, overrides: list[str], message: str
) -> None:
    done = graft("train", *TINY, "head=features", *overrides)
    assert done.returncode == 1
    assert done.stderr.startswith("graft: error: ")
    assert message in done.stderr


def test_an_encoder_whose_top_no_pixel_trains() -> None:
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    blocks = {"conv": nn.Conv2d(3, 4, 2, 2), "pool": pooled, "fc": nn.Linear(4, 4)}
    with pytest.raises(ValueError, match="block fc of this backbone comes after its last map"):
        built(Denoising(), Backbone(blocks, Preprocessing(16, 16)))


def test_a_flat_folder_of_images(graft: Graft, tmp_path: Path) -> None:
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    data = ["data=unlabelled_folder", f"data.root={folder}", "data.image_size=32"]
    plain = [option for option in TINY if not option.startswith("data")] + data
    options = [*plain, *SSL, *TASKS["masked"]]
    done = graft("train", *options, "task.probe=0")
    assert done.returncode == 1
    assert "photos: no images" in done.stderr
    for i in range(24):
        pixels = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if i % 2 else "") / f"{i}.png")
    done = graft("train", *options)
    assert "task.probe=5: these images have no classes: set task.probe=0" in done.stderr
    done = graft("train", *options, "task.probe=0")
    assert done.returncode == 0, done.stderr
    assert "1 class (image)" in done.stdout
    done = graft("train", *plain)
    assert "data=unlabelled_folder: has no classes to learn" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_digits_are_learnt_from_a_pretrained_encoder(
    graft: Graft, tmp_path: Path, name: str
) -> None:
    """Pretrain, then LP-FT from it."""
    tiny = ["data=digits", "backbone.depth=8", "backbone.weights=null", "trainer=cpu"]
    done = graft(
        "train", *tiny, f"experiment=pretrain_{name}", "data.batch_size=64", "trainer.max_epochs=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "logs").iterdir()
    rows = [row.split(",") for row in (folder / "metrics.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("val/loss")] or 0) for row in rows[1:]]
    losses = [loss for loss in losses if loss]
    assert losses[-1] < losses[0]
    done = graft(
        "train", *tiny, "transfer=lp_ft", f"backbone.weights={folder}", "trainer.max_epochs=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
