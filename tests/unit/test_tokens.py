"""Rows that are no images: token ids, with inputs and a backbone of their own, through the same
data, module and trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from graft.data.items import SplitRecord
from graft.data.resident import ResidentDataset
from graft.data.sources.base import Source, Split, Splits
from graft.data.splits import check_splits
from graft.features.store import FeatureStore
from graft.models.backbone import Backbone
from graft.models.resnet_cifar import resnet_cifar
from graft.runs.folder import RunFolder
from graft.runs.startup import quiet_libraries
from graft.runs.train import train
from graft.training.build import build, build_stages, check_arguments
from graft.transforms.draws import uniform
from graft.transforms.images import ImageInputs
from graft.transforms.inputs import Inputs, Views
from graft.transforms.preprocessing import Preprocessing
from tests.conftest import TINY, Trained, compose

WORDS, WIDTH = 10, 16  # word 0 pads
IMAGE_OPTIONS = ("image_size", "resize_size", "augment", "sample_transform")


@dataclass(frozen=True)
class Length:
    """What the weights expect of a sentence."""

    length: int = 12

    def with_own(self, values: Mapping[str, Any]) -> Length:
        return Length(**{**vars(self), **values})


class Tokens(nn.Module):
    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows.long(), rows > 0


class TokenInputs(Inputs):
    """int32 token ids (N, T) -> (ids, mask), both (N, T).

    Args:
        drop: how many of the words training leaves out.
    """

    unit, takes = "tokens", Length

    def __init__(self, preprocessing: Length, *, drop: float = 0.0) -> None:
        self.preprocessing, self.prepare, self.size = preprocessing, Tokens(), preprocessing.length
        self.drop = drop

    def of_stage(
        self,
        *,
        augment: bool | Mapping[str, Any] = True,
        size: int | None = None,
        views: Views = "none",
    ) -> TokenInputs:
        if isinstance(augment, Mapping) or size is not None or views != "none":
            raise ValueError("a stage has no augmentation, image_size or views of its own for text")
        return TokenInputs(self.preprocessing, drop=self.drop if augment else 0.0)

    @property
    def augments(self) -> bool:
        return self.drop > 0

    def example(self, count: int) -> Tensor:
        return torch.ones(count, self.size, dtype=torch.int32)

    def problem(self, rows: NDArray[Any]) -> str | None:
        return None if rows.dtype == np.int32 and rows.ndim == 2 else "rows must be int32 (N, T)"

    def describe(self) -> str:
        return f"{self.size} tokens"

    def augment(
        self, batch: dict[str, Tensor], num_classes: int, *, seed: int, epoch: int
    ) -> dict[str, Tensor]:
        rows = batch["input"]
        kept = uniform(seed, epoch, batch["index"], rows.shape[1]) >= self.drop
        return {**batch, "input": self.prepare(torch.where(kept, rows, 0))}


class Sentences(Source):
    """Two classes that use other words, sentences of 3 to 12 words."""

    inputs = TokenInputs

    def load(self, preprocessing: Length) -> Splits:
        parts = []
        for seed, count in enumerate((48, 16, 17)):
            rng = np.random.default_rng(seed)
            labels = np.arange(count) % 2
            words = rng.integers(1, 7, (count, preprocessing.length)) + 3 * labels[:, None]
            lengths = rng.integers(3, preprocessing.length + 1, count)
            words *= np.arange(preprocessing.length) < lengths[:, None]
            parts.append(Split(words.astype(np.int32), labels))
        train, val, test = parts
        return Splits(["low", "high"], train, val, test)


class Embed(nn.Module):
    """Token ids to embeddings, beside the mask that tells padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ids, mask = inputs
        return self.table(ids), mask


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, mask = state
        return tokens + self.linear(tokens), mask


class Pool(nn.Module):
    def forward(self, state: tuple[Tensor, Tensor]) -> Tensor:
        tokens, mask = state
        weights = mask[..., None].float()
        return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)


def encoder(length: int = 12) -> Backbone:
    inputs = TokenInputs(Length(length))
    blocks = {"embed": Embed(), "mix": Mix(), "pool": Pool()}
    example = inputs.prepare(inputs.example(1))
    return Backbone(blocks, inputs.preprocessing, example=example, channels_last=False)


def config_of(*overrides: str, **data: Any) -> dict[str, Any]:
    config = compose(*TINY, "trainer.max_epochs=8", "optimizer.lr=0.1", *overrides)
    config["backbone"] = {"_target_": f"{__name__}.encoder"}
    kept = {key: value for key, value in config["data"].items() if key not in IMAGE_OPTIONS}
    config["data"] = {**kept, **data, "source": {"_target_": f"{__name__}.Sentences"}}
    return config


def run(folder: Path, *overrides: str, **data: Any) -> Trained:
    quiet_libraries()
    made = RunFolder.create(folder, "run", config_of(*overrides, **data), overrides)
    made.start()
    metrics, module = train(config_of(*overrides, **data), made)
    return Trained(metrics, module, made.path)


def test_a_probe_on_stored_features_is_one_that_computes_them(tmp_path: Path) -> None:
    """Rules 1 and 11: of the same weights, and nothing of the backbone moves."""
    stored, computed = (
        run(tmp_path / cache, "transfer=linear_probe", f"transfer.stages.probe.cache={cache}")
        for cache in ("on", "off")
    )
    assert [*tmp_path.glob("**/features-*/about.json")]
    assert stored.metrics["test/acc"] > 0.9
    assert stored.metrics == pytest.approx(computed.metrics, abs=1e-6)
    for key, value in stored.state().items():
        assert torch.allclose(value, computed.state()[key], atol=1e-6), key
    record = SplitRecord.read(stored.folder)
    assert record is not None
    assert record.splits["train"].side == (12,)
    found, changes = record.find(Sentences().load(Length()))
    assert changes == {}
    assert len(found["test"]) == 17


def test_every_block_learns_and_images_are_missing_from_pictures_alone(tmp_path: Path) -> None:
    plan = ["transfer=lp_ft", "transfer.stages.probe.epochs=4", "logger=default"]
    found = run(tmp_path, *plan, drop=0.2)
    assert found.metrics["test/acc"] > 0.9
    before = torch.load(found.folder / "checkpoints/probe/best.ckpt", weights_only=True)
    after = found.state()
    assert {key for key in after if torch.equal(before["state_dict"][key], after[key])} == set()
    tags = EventAccumulator(str(found.folder), size_guidance={"images": 0}).Reload().Tags()
    assert set(tags["images"]) == {"test/confusion", "test/calibration"}


def test_stored_features_are_those_computed_anew(tmp_path: Path) -> None:
    module, data = build(config_of("transfer=linear_probe"))
    (stage,) = build_stages(config_of("transfer=linear_probe"))
    data.start_stage(0, augment=stage.augment)
    module.start_stage(stage)
    store = FeatureStore(
        module.backbone, module.cut, data, stage, tmp_path, device=torch.device("cpu")
    )
    features = store.features(["train", "val"])
    with torch.no_grad():
        for split in ("train", "val"):
            inputs = data.prepared(split, range(len(data.splits[split])), torch.device("cpu"))
            expected = module.backbone(inputs)
            assert torch.allclose(features[split][torch.arange(len(expected))], expected, atol=1e-6)


def test_an_epoch_drops_its_own_words() -> None:
    _, data = build(config_of(drop=0.5))
    batch = data.splits["train"][list(range(8))]
    masks = [data.transform(batch, augment=True, epoch=epoch)["input"][1] for epoch in (0, 1, 0)]
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(data.transform(batch, augment=False)["input"][1], batch["input"] > 0)


def test_a_model_with_its_preparation_takes_rows() -> None:
    module, data = build(config_of())
    whole = nn.Sequential(data.inputs.prepare, module.backbone, module.head)
    assert whole(data.inputs.example(3)).shape == (3, 2)


def test_rows_on_the_device_keep_their_type() -> None:
    _, data = build(config_of())
    resident = ResidentDataset(data.splits["val"], torch.device("cpu"))
    for key, value in data.splits["val"][[3, 1]].items():
        assert torch.equal(resident[[3, 1]][key], value), key
    assert resident[[0]]["input"].dtype == torch.int32


def test_options_of_images_are_refused() -> None:
    """Rule 25: of the datamodule's options, and of a stage's."""
    check_arguments(config_of(drop=0.5))
    with pytest.raises(ValueError, match=r"data\.image_size: .* takes no such argument; .*drop"):
        check_arguments(config_of(image_size=64))
    _, data = build(config_of())
    with pytest.raises(ValueError, match="for text"):
        data.start_stage(0, views="flip")


def test_what_does_not_fit_together_is_refused() -> None:
    config = config_of()
    config["backbone"] = compose(*TINY)["backbone"]
    with pytest.raises(ValueError, match="Sentences has rows for TokenInputs, which this"):
        build(config)
    with pytest.raises(ValueError, match="mirror=true: these inputs are no images"):
        build(config_of("mirror=true"))
    loaded = Sentences().load(Length())
    with pytest.raises(ValueError, match="Sentences, train split: images must be"):
        check_splits(loaded, "Sentences", ImageInputs(Preprocessing(32, 32)))


def test_blocks_may_pass_tuples_on() -> None:
    """Padding, token 0, changes no feature (rule 24)."""
    backbone, prepare = encoder(), Tokens()
    assert backbone.passes_tuples
    assert backbone.num_features == WIDTH
    rows = torch.tensor([[3, 4, 5]], dtype=torch.int32)
    short, padded = prepare(rows), prepare(F.pad(rows, (0, 4)))
    assert torch.allclose(backbone(short), backbone(padded), atol=1e-6)
    assert backbone.maps(short).shape == (1, 3, WIDTH)
    assert torch.equal(backbone.forward_from(1, backbone.blocks[0](short)), backbone(short))
    assert not resnet_cifar(depth=8, width=4, weights=None).passes_tuples
