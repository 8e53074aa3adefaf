"""Random crops, erasing, mixing, single-image transforms, images on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from graft.data.datamodule import TransferDataModule
from graft.data.datasets import ImageDataset
from graft.data.resident import ResidentDataset, fits_on_gpu
from graft.data.sample_transform import SampleTransformed
from graft.training.build import build
from graft.transforms.boxes import BOX_DRAWS, box_matrices, random_boxes
from graft.transforms.draws import beta, uniform
from graft.transforms.images import Augment
from graft.transforms.mixing import mix
from graft.transforms.prepare import Prepare
from graft.transforms.preprocessing import Preprocessing
from tests.conftest import TINY, Train, compose, same

PLAIN = Preprocessing(32, 32, mean=(0, 0, 0), std=(1, 1, 1))


def images(n: int, height: int, width: int | None = None) -> Tensor:
    shape = (n, 3, height, width or height)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def boxes(n: int, height: int, width: int, **options: Any) -> Tensor:
    options = {"scale": (0.08, 1), "ratio": (3 / 4, 4 / 3), **options}
    return random_boxes(uniform(0, 0, torch.arange(n), BOX_DRAWS), height, width, **options)


def in_all(augment: Augment, batch: dict[str, Tensor], **draw: int) -> dict[str, Tensor]:
    return augment.batch(batch, Prepare(PLAIN), 5, **{"seed": 1, "epoch": 2, **draw})


def batch_of(n: int, size: int = 32) -> dict[str, Tensor]:
    index = torch.arange(n)
    return {"input": images(n, size), "label": index % 5, "index": index + 40}


# ---------------------------------------------------------------- random resized crop
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "crop"), [(32, 32, 96), (48, 40, 24), (80, 100, 56)])
def test_a_box_is_resized_as_torchvision_does(
    height: int, width: int, crop: int, interpolation: str
) -> None:
    """Enlarged and reduced, by matrices (small images, GPUs) and image by image (large ones)."""
    batch, drawn = images(30, height, width), boxes(30, height, width)
    p = Preprocessing(crop, crop, (0, 0, 0), (1, 1, 1), interpolation)  # type: ignore[arg-type]
    out = Prepare(p)(batch, drawn) * 255
    rows = box_matrices(drawn[:, 0], drawn[:, 2], height, crop, p.interpolation)
    columns = box_matrices(drawn[:, 1], drawn[:, 3], width, crop, p.interpolation)
    by_matrices = rows[:, None] @ (batch.float() @ columns.mT[:, None])
    for i, box in enumerate(drawn.tolist()):
        expected = TF.resized_crop(
            batch[i].float(), *box, [crop, crop], v2.InterpolationMode(interpolation)
        )
        assert torch.allclose(out[i], expected, atol=2e-3)
        assert torch.allclose(by_matrices[i], expected, atol=2e-3)


def test_boxes_are_distributed_as_torchvisions() -> None:
    """Mean and spread of each side and corner, over 4,000 draws of either."""
    ours = boxes(4000, 60, 90, scale=(0.3, 1.0)).float()
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(8, scale=(0.3, 1.0))
    blank = torch.zeros(3, 60, 90)
    theirs = [transform.make_params([blank]) for _ in range(4000)]
    expected = torch.tensor(
        [[float(d[k]) for k in ("top", "left", "height", "width")] for d in theirs]
    )
    assert torch.allclose(ours.mean(0), expected.mean(0), atol=1.0)
    assert torch.allclose(ours.std(0), expected.std(0), atol=1.0)


def test_a_box_that_never_fits_falls_back_to_the_centre() -> None:
    drawn = boxes(5, 20, 100, scale=(1, 1))
    assert drawn.tolist() == [[0, 36, 20, 27]] * 5


# ---------------------------------------------------------------- erasing
def test_erasing_paints_boxes_of_the_mean_colour_into_the_stated_share() -> None:
    augment = Augment(shift=0, flip=0, erase=0.25)
    batch = {**batch_of(2000), "input": torch.full((2000, 3, 32, 32), 200, dtype=torch.uint8)}
    erased = (in_all(augment, batch)["input"] == 0).all(1)
    areas = erased.float().mean((1, 2))
    hit = areas > 0
    assert abs(hit.float().mean().item() - 0.25) < 0.04
    assert areas[hit].min() > 0.01
    assert areas[hit].max() < 0.36
    for mask in erased[hit][:50]:  # each is a whole rectangle
        assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()


# ---------------------------------------------------------------- mixup and cutmix
@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 4.0])
def test_beta_draws_have_the_right_distribution(alpha: float) -> None:
    u = (torch.arange(100_000) + 0.5) / 100_000
    drawn = beta(alpha, u)
    exact = torch.distributions.Beta(alpha, alpha)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=1e-4)
    assert drawn.var().item() == pytest.approx(exact.variance.item(), rel=1e-3)
    assert torch.allclose(drawn + drawn.flip(0), torch.ones(()), atol=1e-6)
    # The lower quantiles against a sample: Kolmogorov's distance at 1 % significance.
    torch.manual_seed(0)
    sample = exact.sample((20_000,)).sort().values
    lower = slice(0, 50_000, 100)  # the upper ones round to 1
    reached = torch.searchsorted(sample, drawn[lower].contiguous()) / len(sample)
    assert (reached - u[lower]).abs().max() < 1.63 / len(sample) ** 0.5 + 1e-3


def mixed(n: int = 64, **alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images whose every pixel is their own number, their labels, and both mixed."""
    numbers = torch.arange(float(n))[:, None, None, None].expand(n, 3, 16, 16)
    labels = torch.arange(n)
    options = {"mixup": 0.0, "cutmix": 0.0, **alpha}
    return numbers, labels, *mix(numbers, labels, labels, n, seed=0, epoch=0, **options)


def test_mixup_blends_images_and_labels_by_one_weight() -> None:
    _, labels, out, target = mixed(mixup=1.0)
    assert torch.allclose(target.sum(1), torch.ones(len(labels)))
    assert torch.allclose(
        out, (target @ labels.float())[:, None, None, None].expand_as(out), atol=1e-4
    )
    own = target[labels, labels]
    assert 0.35 < own.mean() < 0.65
    assert len(set(own.tolist())) > 60
    assert ((target > 0).sum(1) <= 2).all()


def test_the_area_cutmix_keeps_is_the_weight_of_the_label() -> None:
    numbers, labels, out, target = mixed(cutmix=1.0)
    assert torch.allclose(target.sum(1), torch.ones(len(labels)))
    kept = (out == numbers)[:, 0].float().mean((1, 2))
    assert torch.equal(kept, target[labels, labels])
    for i in range(len(labels)):
        others = out[i][out[i] != i].unique()
        assert len(others) <= 1  # one partner, and the label of that one
        assert all(target[i, int(other)] == 1 - target[i, i] for other in others)


def test_with_both_on_each_image_draws_which() -> None:
    _, _, out, _ = mixed(400, mixup=1.0, cutmix=1.0)
    blended = (out != out.round()).flatten(1).any(1).float().mean().item()
    assert 0.4 < blended < 0.6


def test_weights_and_boxes_do_not_depend_on_the_batch_though_the_partner_does() -> None:
    _, labels, _, target = mixed(cutmix=1.0)
    half = labels[::2]
    again = mix(torch.zeros(32, 3, 16, 16), half, half, 64, mixup=0, cutmix=1.0, seed=0, epoch=0)[1]
    assert torch.equal(again[torch.arange(32), half], target[half, half])


# ---------------------------------------------------------------- all of them
EVERYTHING: dict[str, Any] = {"scale": (0.2, 1.0), "erase": 0.5}


@pytest.mark.parametrize("size", [32, 80])
def test_crop_and_erasing_depend_on_seed_epoch_and_index_alone(size: int) -> None:
    augment, batch = Augment(**EVERYTHING), batch_of(40, size)
    whole = in_all(augment, batch)["input"]
    assert whole.shape == (40, 3, 32, 32)
    order = torch.randperm(40)[:17]
    part = in_all(augment, {key: value[order] for key, value in batch.items()})["input"]
    assert torch.allclose(part, whole[order], atol=1e-6)
    for other in ({"seed": 4}, {"epoch": 6}):
        changed = (in_all(augment, batch, **other)["input"] - whole).abs().amax((1, 2, 3))
        assert (changed > 1e-3).float().mean() > 0.95


def test_switching_one_on_leaves_the_draws_of_the_others() -> None:
    batch = batch_of(30)
    plain = in_all(Augment(), batch)["input"]
    erased = in_all(Augment(erase=0.5), batch)["input"]
    assert torch.equal(erased[erased != 0], plain[erased != 0])


def test_impossible_settings_are_refused() -> None:
    for key, value in {"scale": (0.5, 0.1), "ratio": (0, 1), "erase": 2, "mixup": -1}.items():
        with pytest.raises(ValueError, match=key):
            Augment(**{key: value})  # type: ignore[arg-type]
    for override in ("scale=[0.5]", "scale=[0.1,2]", "ratio=0.7", "erase=-1", "cutmix=-0.1"):
        with pytest.raises(ValueError, match=f"data.augment.{override.split('=')[0]}="):
            compose(*TINY, f"data.augment.{override}")


def test_a_stage_trains_on_soft_labels(train_tiny: Train) -> None:
    """Targets reach the loss: same images and draws, other weights than with hard labels."""
    overrides = ["task.label_smoothing=0.1", "data.augment.cutmix=1.0"]
    one = train_tiny(*overrides, "seed=1")
    assert same(one.state(), train_tiny(*overrides, "seed=1", "data.num_workers=2").state())
    assert one.metrics["test/loss"] > 0
    logits, target = torch.tensor([[2.0, 0.0, 1.0, 0.0]]), torch.tensor([[0.7, 0.3, 0.0, 0.0]])
    one.module.head = torch.nn.Identity()  # type: ignore[assignment]
    one.module.backbone.forward = lambda x: x  # type: ignore[assignment, method-assign]
    batch = {"input": logits, "label": torch.tensor([0]), "target": target}
    smooth = 0.9 * target + 0.1 / 4
    expected = -(smooth * logits.log_softmax(1)).sum()
    assert torch.allclose(one.module.loss(batch), expected)


# ---------------------------------------------------------------- single images, in workers
ROTATED = "data.sample_transform={_target_: torchvision.transforms.v2.RandomRotation, degrees: 40}"


def epochs(workers: int, *overrides: str) -> list[dict[str, Tensor]]:
    """Training batches of two epochs, without a trainer."""
    _, datamodule = build(compose(*TINY, f"data.num_workers={workers}", ROTATED, *overrides))
    found = []
    for epoch in range(2):
        loader: Any = datamodule.loader("train", train=True)
        sampler = loader.sampler
        getattr(sampler, "batches", sampler).epoch = lambda epoch=epoch: epoch
        before = torch.get_rng_state()
        parts = list(loader)
        assert torch.equal(torch.get_rng_state(), before)
        found.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        order = found[-1]["index"].argsort()
        found[-1] = {key: value[order] for key, value in found[-1].items()}
    return found


def test_single_image_transforms_do_not_depend_on_workers_but_on_the_epoch() -> None:
    overrides = ["data.batch_size=11"]  # no image is left out
    alone = epochs(0, *overrides)
    torch.rand(3)
    parallel = epochs(2, *overrides)
    assert all(same(a, b) for a, b in zip(alone, parallel, strict=True))
    changed = (alone[0]["input"] != alone[1]["input"]).flatten(1).any(1)
    assert changed.float().mean() > 0.95
    assert not same(alone[0], epochs(0, *overrides, "seed=5")[0])


def test_single_image_transforms_are_for_training_stages_that_augment() -> None:
    _, datamodule = build(compose(*TINY, ROTATED))
    stored = datamodule.splits["val"][list(range(4))]["input"]
    assert torch.equal(next(iter(datamodule.loader("val", train=False)))["input"][:4], stored)
    datamodule.start_stage(0, augment=False)
    batch = next(iter(datamodule.loader("train", train=True)))
    assert torch.equal(batch["input"], datamodule.splits["train"][batch["index"].tolist()]["input"])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.ToDtype(torch.float32), r"float32 \(3, 32, 32\): must be uint8"),
        (v2.RandomResize(20, 40), "in one batch: end it with a resize or crop"),
        (v2.ToPILImage(), "Image: must be uint8"),
    ],
)
def test_a_transform_that_cannot_be_batched_is_explained(transform: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"data.sample_transform gave .*{message}"):
        SampleTransformed(dataset(), transform, seed=0)[list(range(8)), 0]


def test_a_stage_with_single_image_transforms_is_not_cached(train_tiny: Train) -> None:
    with pytest.raises(ValueError, match="it augments the images"):
        train_tiny(
            ROTATED, "data.augment=null", "transfer.stages.finetune.trainable=1",
            "transfer.stages.finetune.cache=on",
        )  # fmt: skip


# ---------------------------------------------------------------- images on the device
def dataset() -> ImageDataset:
    return build(compose(*TINY))[1].splits["train"]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_images_on_the_device_are_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.data.resident.CHUNK", 7)
    plain = dataset()
    resident = ResidentDataset(plain, torch.device(device))
    batch = resident[[5, 1, 30]]
    assert all(value.device.type == device for value in batch.values())
    assert same({key: value.cpu() for key, value in batch.items()}, plain[[5, 1, 30]])
    assert len(resident) == len(plain)


def test_resident_images_train_as_others_do(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = train_tiny("data.num_workers=1").state()
    monkeypatch.setattr("graft.data.datamodule.fits_on_gpu", lambda *_: True)
    loaders: list[Any] = []
    original = TransferDataModule.loader

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaders.append(original(self, *args, **kwargs))
        return loaders[-1]

    monkeypatch.setattr(TransferDataModule, "loader", recorded)
    assert same(train_tiny("data.num_workers=1", "data.pin_memory=true").state(), before)
    assert loaders
    assert all(isinstance(loader.dataset, ResidentDataset) for loader in loaders)
    assert not any(loader.num_workers or loader.pin_memory for loader in loaders)


def test_resident_images_need_a_gpu_and_room(train_tiny: Train, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match=r"data.resident=on needs a CUDA device; .* cpu"):
        train_tiny("data.resident=on")
    with pytest.raises(ValueError, match="exclude each other"):
        build(compose(*TINY, "data.resident=on", ROTATED))
    split, gpu = dataset(), torch.device("cuda")
    size = 44 * 3 * 32 * 32
    for free, fits in ((4 * size, True), (4 * size - 4, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert fits_on_gpu("auto", split, gpu) is fits
        assert fits_on_gpu("on", split, gpu)
        assert not fits_on_gpu("off", split, gpu)
