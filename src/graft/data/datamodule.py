"""One LightningDataModule for every source: splits, subsets, loaders, inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from graft.data.datasets import Batch, FeatureDataset, ImageDataset
from graft.data.items import SplitRecord
from graft.data.loaders import Batches, Steps, epoch_and_first_batch, whole_batches
from graft.data.order import BatchOrder, batch_size_for
from graft.data.resident import ResidentDataset, fits_on_gpu
from graft.data.sample_transform import SampleTransformed, WithEpoch
from graft.data.sources.base import Source
from graft.data.splits import check_splits, draw_splits, renumbered
from graft.storage.stored import StoredFeatures
from graft.transforms.inputs import Inputs, Views, views_count


class TransferDataModule(L.LightningDataModule):
    """CIFAR-10 or any other source, prepared as the backbone expects.

    Args:
        source: where rows and labels come from.
        inputs: what turns rows into what the backbone takes.
        batch_size: of training images; None: see `batch_size_for`.
        stage_sizes: of inputs, that stages of the plan set for themselves.
        resident: whether images live on the GPU: "auto", "on" or "off"; see `fits_on_gpu`.
        val_fraction: part of the training images held out for model selection, where the source
            has no validation split of its own. Stratified and drawn with `split_seed`, never with
            the run's seed. Likewise `test_fraction` where there is no test split.
        train_fraction: keeps this part of the remaining training images, stratified.
        shots_per_class: keeps this many training images of each class.
        epoch_images: how many training images make an epoch, in place of each once: few labels are
            gone through several times, many in parts. So runs on different numbers of labels train
            equally long.
        seed: the run's seed: order of the data and augmentation.
        recorded: the items of each split, of a run that has begun; None: they are drawn.
        drop_last: leave out a smaller last training batch (the next epoch draws anew).
        sampling: "shuffled": each training image once; "balanced": each class equally often;
            "importance" or "hard": by `weights`, which somebody sets.
        reshuffle: draw the order of the training images anew in every epoch.
    """

    def __init__(
        self,
        source: Source,
        inputs: Inputs,
        *,
        batch_size: int | None = None,
        eval_batch_size: int = 256,
        stage_sizes: Sequence[int] = (),
        resident: str = "auto",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        train_fraction: float = 1.0,
        shots_per_class: int | None = None,
        epoch_images: int | None = None,
        drop_last: bool = True,
        sampling: str = "shuffled",
        reshuffle: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
        recorded: SplitRecord | None = None,
    ) -> None:
        super().__init__()
        if resident == "on" and inputs.sample_transform is not None:
            raise ValueError("data.resident=on and data.sample_transform exclude each other")
        self.source = source
        self.run_inputs = self.inputs = inputs  # a stage may have other ones
        self.stored_as = inputs.to_store(stage_sizes)
        self.resident = resident
        self.residents: dict[str, ResidentDataset] = {}
        self.processes = 1  # `build` knows how many; each has batches of `batch_size`
        self.batch_size = batch_size or 0  # 0: `setup` knows how many images there are
        self.eval_batch_size = eval_batch_size
        self.draw_splits = partial(
            draw_splits,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=split_seed,
            train_fraction=train_fraction,
            shots_per_class=shots_per_class,
        )
        self.epoch_images = epoch_images
        self.drop_last = drop_last
        self.sampling = sampling
        self.reshuffle = reshuffle
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed
        self.recorded = recorded
        self.changes: dict[str, str] = {}  # by split, what has changed since it was recorded
        self.streams: tuple[str, ...] = ("train",)  # of the task
        self.weights: np.ndarray | None = None  # of the training images, in their order
        self.val_splits = ["val"]  # what a validation goes through
        self.tested = "test"  # the split that a test goes through
        self.two_views = False  # likewise
        self.sees_labels = True  # likewise: or else no split is drawn by them
        self.stage_seed = seed
        self.features: dict[str, StoredFeatures] = {}
        self.steps_per_batch = 1  # of stored features in training: see `training.steps`
        self.digests: dict[str, str] = {}
        self.splits: dict[str, ImageDataset] = {}
        self.classes: list[str] = []

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def prepare_data(self) -> None:
        if not self.splits:  # every stage's trainer asks again
            self.source.prepare(self.stored_as)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        loaded = self.loaded = self.source.load(self.stored_as)
        check_splits(loaded, type(self.source).__name__, self.run_inputs)
        if self.recorded is not None:
            self.classes = self.recorded.classes
            splits, self.changes = self.recorded.find(loaded)
        else:
            self.classes = loaded.classes
            splits = self.draw_splits(loaded, stratified=self.sees_labels)
        blind = splits["train"].targets is not None or not self.sees_labels
        if self.sampling in ("balanced", "hard") and blind:
            raise ValueError(f"data.sampling={self.sampling} needs classes, and this data has none")
        images = self.epoch_images or len(splits["train"])
        self.batch_size = self.batch_size or batch_size_for(max(1, images // self.processes))
        if self.recorded is None and self.batch_size > images:
            raise ValueError(
                f"data.batch_size={self.batch_size} is larger than the {images} training images of "
                f"an epoch: set data.batch_size to {images} or less"
            )
        self.splits = splits

    def record(self) -> SplitRecord:
        """The items of each split."""
        return self.recorded or SplitRecord.of(self.loaded, self.splits)

    def number_classes(self, names: Sequence[str]) -> None:
        """Let labels of the test split count these classes, a run's: see `renumbered`."""
        self.replace_test(renumbered(self.splits["test"], self.classes, names))
        self.classes = list(names)

    def replace_test(self, dataset: ImageDataset) -> None:
        """Put other images in place of the test split, and drop what was derived from the old."""
        self.splits["test"] = dataset
        for derived in (self.residents, self.digests, self.features):
            derived.pop("test", None)

    def start_stage(
        self,
        index: int,
        *,
        augment: bool | Mapping[str, Any] = True,
        image_size: int | None = None,
        views: Views = "none",
    ) -> None:
        """What differs between stages: the draw, augmentation and the size of inputs.

        It drops the features of the stage before.
        """
        self.stage_seed = self.seed + 1_000_003 * index
        self.inputs = self.run_inputs.of_stage(augment=augment, size=image_size, views=views)
        self.features = {}
        self.steps_per_batch = 1

    def order(
        self, split: str, *, train: bool, like: int | None = None, number: int = 0
    ) -> BatchOrder:
        """This rank's batches of a split, by position; see `loader`."""
        balanced = train and self.sampling == "balanced" and like is None
        trainer = self.trainer
        world_size = trainer.world_size if trainer else 1
        epoch_images = like * self.batch_size * world_size if like else self.epoch_images
        return BatchOrder(
            len(self.splits[split]),
            self.batch_size if train else self.eval_batch_size,
            shuffle=train,
            labels=self.splits[split].labels if balanced else None,
            weights=self.weights if train and split == "train" else None,
            epoch_size=epoch_images if train else None,
            drop_last=train and (self.drop_last or like is not None),
            seed=self.stage_seed + 7_368_787 * number,
            epoch=self._epoch if self.reshuffle else lambda: 0,
            first=self._first_step if train else lambda: 0,
            rank=trainer.global_rank if trainer else 0,
            world_size=world_size,
        )

    def loader(
        self, split: str, *, train: bool, like: int | None = None, number: int = 0
    ) -> DataLoader[Batch] | Batches:
        """This rank's batches of a split; `train` shuffles.

        Args:
            like: as many batches as that, of another stream: it decides how long an epoch is.
            number: of the stream; each has an order of its own.

        Raises:
            ValueError: the data has no such split, or too few images.
        """
        if split not in self.splits:
            hint = ": set data.target=FOLDER" if split == "target" else ""
            raise ValueError(
                f"the task trains on {split!r}, which this data does not have: it has "
                f"{', '.join(self.splits)}{hint}"
            )
        dataset: Dataset[Batch] = self.splits[split]
        trainer = self.trainer
        batches = self.order(split, train=train, like=like, number=number)
        if train and len(batches) == 0:
            raise ValueError(
                f"data.batch_size={self.batch_size} on {batches.world_size} processes is larger "
                f"than the {batches.epoch_size} training images"
            )
        if not train and len(self.splits[split]) < batches.world_size:
            raise ValueError(
                f"the {split} split has {len(self.splits[split])} images, fewer than the "
                f"{batches.world_size} processes: raise data.{split}_fraction"
            )
        sampler: Sampler[Any] = batches
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        if split in self.features:
            images = self.splits[split]
            stored = FeatureDataset(self.features[split], images, self.stage_seed, self._epoch)
            return Batches(stored, batches, self.steps_per_batch if train else 1)
        if train and (transform := self.inputs.sample_transform) is not None:
            dataset = SampleTransformed(self.splits[split], transform, self.stage_seed)
            sampler = WithEpoch(batches)
        elif split in self.residents or fits_on_gpu(self.resident, self.splits[split], device):
            if split not in self.residents:
                self.residents[split] = ResidentDataset(self.splits[split], device)
            dataset = self.residents[split]
        on_host = isinstance(dataset, ImageDataset | SampleTransformed)
        return whole_batches(
            dataset,
            sampler,
            num_workers=self.num_workers if on_host else 0,
            pin_memory=self.pin_memory and on_host,
        )

    def prepared(
        self,
        split: str,
        rows: Sequence[int] | np.ndarray,
        device: torch.device,
        views: Views = "none",
    ) -> Any:
        """Inputs of the backbone, for `position * V + view` of a split's V views of each row."""
        positions, view = np.divmod(np.asarray(rows), views_count(views))
        batch = self.splits[split][positions.tolist()]
        drawn, index = batch["input"].to(device), batch["index"].to(device)
        return self.inputs.viewed(drawn, index, torch.from_numpy(view).to(device), views)

    def digest(self, split: str) -> str:
        """That of `ImageDataset.digest`."""
        if split not in self.digests:
            self.digests[split] = self.splits[split].digest()
        return self.digests[split]

    def train_dataloader(self) -> Any:
        first, *others = self.streams
        if not others:
            return self.loader(first, train=True)
        loaders = {first: self.loader(first, train=True)}
        for number, name in enumerate(others, 1):
            loaders[name] = self.loader(name, train=True, like=len(loaders[first]), number=number)
        return loaders

    def val_dataloader(self) -> list[DataLoader[Batch] | Batches]:
        return [self.loader(split, train=False) for split in self.val_splits]

    def test_dataloader(self) -> DataLoader[Batch] | Batches:
        return self.loader(self.tested, train=False)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Rows to inputs, on whatever device the batch is on by now."""
        if isinstance(batch, Steps):
            return batch
        if isinstance(batch.get("train"), dict):  # several streams
            return {name: self.on_after_batch_transfer(part, 0) for name, part in batch.items()}
        if "input" not in batch:
            return batch
        training = self.trainer is not None and self.trainer.training
        return self.transform(batch, augment=training, epoch=self._epoch())

    def _first_step(self) -> int:
        return epoch_and_first_batch(self.trainer)[1] * self.steps_per_batch

    def _epoch(self) -> int:
        return epoch_and_first_batch(self.trainer)[0]

    def transform(self, batch: Batch, *, augment: bool, epoch: int = 0) -> Batch:
        """The batch with its rows prepared; if `augment`, as the stage trains on them, with the
        seed and epoch of a task's own draws. Of two views both are augmented, and the same ones
        in every validation.
        """
        seed = self.stage_seed if augment else 0
        draw = partial(self.inputs.augment, batch, self.num_classes, epoch=epoch if augment else 0)
        more = {"draw": torch.tensor([seed, epoch])} if augment else {}
        if self.two_views:
            more["second"] = draw(seed=seed + 2_147_483_647)["input"]
        elif not augment:
            return self.inputs.evaluated(batch)
        return {**draw(seed=seed), **more}
