"""One LightningDataModule for every source: splits, subsets, loaders, batch transforms."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from graft.config.words import plural
from graft.data.datasets import Batch, FeatureDataset, ImageDataset, drawn_view, views_count
from graft.data.items import SplitRecord
from graft.data.loaders import Batches, Steps, whole_batches
from graft.data.order import BatchOrder
from graft.data.resident import ResidentDataset, fits_on_gpu
from graft.data.sample_transform import SampleTransformed, WithEpoch
from graft.data.sources.base import Source
from graft.data.splits import check_splits, draw_splits
from graft.storage.stored import StoredFeatures
from graft.transforms.images import Augment
from graft.transforms.prepare import Prepare
from graft.transforms.preprocessing import Preprocessing

FEW_STEPS = 8
"""Below that many steps an epoch is too short to train on, and a note says so."""


class TransferDataModule(L.LightningDataModule):
    """CIFAR-10 or any other source, prepared as the backbone expects.

    Args:
        source: where images and labels come from.
        batch_size: of training images; None: see `batch_size_for`.
        preprocessing: the backbone's; `image_size`, `resize_size` override it.
        image_size: side in px of the images the backbone gets. None takes the weights' own resize
            and crop; a number resizes the whole image to it, without a crop.
        resize_size: shorter side before the central crop, if other than `image_size`.
        stage_sizes: sides that stages of the plan set for themselves.
        sample_transform: for single training images, in the workers; see `SampleTransformed`.
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
        sampling: "shuffled": each training image once; "balanced": each class equally often.
        reshuffle: draw the order of the training images anew in every epoch.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        *,
        batch_size: int | None = None,
        eval_batch_size: int = 256,
        image_size: int | None = None,
        resize_size: int | None = None,
        stage_sizes: Sequence[int] = (),
        augment: Augment | None = None,
        sample_transform: Callable[[Tensor], Tensor] | None = None,
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
        if train_fraction != 1.0 and shots_per_class is not None:
            raise ValueError("data.train_fraction and data.shots_per_class exclude each other")
        if resident == "on" and sample_transform is not None:
            raise ValueError("data.resident=on and data.sample_transform exclude each other")
        self.source = source
        self.own_preprocessing = self.preprocessing = preprocessing.at(image_size, resize_size)
        self.prepare_images = Prepare(self.preprocessing)
        # Stages with sizes of their own resize what is stored, so that is the largest.
        forms = (self.preprocessing, *map(self.preprocessing.at, stage_sizes))
        self.stored = max(forms, key=lambda form: form.resize_size)
        self.augment = augment
        self.sample_transform = sample_transform
        self.resident = resident
        self.residents: dict[str, ResidentDataset] = {}
        self.processes = 1  # `build` knows how many; each has batches of `batch_size`
        self.batch_size = batch_size or 0  # 0: `setup` knows how many images there are
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        self.train_fraction = train_fraction
        self.shots_per_class = shots_per_class
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
        self.stage_index = 0
        self.stage_augments = True
        self.stage_augment = augment
        self.stage_views: str | int = "none"
        self.features: dict[str, StoredFeatures] = {}
        self.steps_per_batch = 1  # of stored features in training: see `training.steps`
        self.digests: dict[str, str] = {}
        self.splits: dict[str, ImageDataset] = {}
        self.classes: list[str] = []
        self.value_range: tuple[float, float] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def prepare_data(self) -> None:
        if self.splits:  # every stage's trainer asks again
            return
        self.source.prepare(self.stored)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        loaded = self.loaded = self.source.load(self.stored)
        check_splits(loaded, type(self.source).__name__)
        self.value_range = loaded.value_range
        if self.recorded is not None:
            self.classes = self.recorded.classes
            self.splits, self.changes = self.recorded.find(loaded)
            images = self.epoch_images or len(self.splits["train"])
            self.batch_size = self.batch_size or batch_size_for(max(1, images // self.processes))
            return
        self.classes = loaded.classes
        splits = draw_splits(
            loaded,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.split_seed,
            train_fraction=self.train_fraction,
            shots_per_class=self.shots_per_class,
        )
        if self.sampling == "balanced" and splits["train"].targets is not None:
            raise ValueError("data.sampling=balanced needs classes, and this data has none")
        images = self.epoch_images or len(splits["train"])
        self.batch_size = self.batch_size or batch_size_for(max(1, images // self.processes))
        if self.batch_size > images:
            raise ValueError(
                f"data.batch_size={self.batch_size} is larger than the {images} training images of "
                f"an epoch: set data.batch_size to {images} or less"
            )
        self.splits = splits

    def notes(
        self, *, steps: bool, augments: Sequence[bool | Mapping[str, Any]] = ()
    ) -> Iterator[str]:
        """What a user should know of the training images.

        Args:
            steps: whether they are trained on in steps, not solved for.
            augments: what each stage says of augmentation.
        """
        used = map(self._augment_of, augments)
        if self.loaded.cut and any(augment and augment.scale for augment in used):
            yield (
                "data.augment.scale crops from the central square of an image: of "
                f"{self.loaded.cut:,} that are longer one way the ends are never seen"
            )
        train = self.splits["train"]
        absent = sorted({*range(self.num_classes)} - {*train.labels.tolist()})
        if absent and train.targets is None:
            names = few([self.classes[label] for label in absent])
            yield f"no training images of {len(absent)} of {self.num_classes} classes: {names}"
        images = self.epoch_images or len(train)
        images = max(1, images // self.processes)  # a batch is of one process
        count, left = divmod(images, self.batch_size)
        if not steps or count >= FEW_STEPS:
            return
        share = " of each process" if self.processes > 1 else ""
        unused = (
            f" and leaves out {left} of {images} images{share}" if left and self.drop_last else ""
        )
        count += bool(left and not self.drop_last)
        better = batch_size_for(images)
        hint = (
            f"; data.batch_size={better} has {images // better}" if better < self.batch_size else ""
        )
        yield f"an epoch has {plural(count, 'step')}{unused}{hint}"

    def record(self) -> SplitRecord:
        """The items of each split."""
        return self.recorded or SplitRecord.of(self.loaded, self.splits)

    def number_classes(self, names: Sequence[str]) -> None:
        """Let labels of the test images count these classes, a run's, in its order.

        Raises:
            ValueError: there are others.
        """
        if unknown := [name for name in self.classes if name not in names]:
            raise ValueError(
                f"the data has classes that the run does not know: {few(unknown)}; it knows "
                f"{few(names)}"
            )
        test = copy.copy(self.splits["test"])
        test.labels = np.array([names.index(name) for name in self.classes])[test.labels]
        self.classes = list(names)
        self.replace_test(test)

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
        views: str | int = "none",
    ) -> None:
        """What differs between stages: the draw, augmentation and the size of the images.

        It drops the features of the stage before.
        """
        self.stage_index = index
        self.stage_augments = augment is not False
        self.stage_augment = self._augment_of(augment)
        self.preprocessing = self.own_preprocessing.at(image_size)
        self.prepare_images = Prepare(self.preprocessing)
        self.features = {}
        self.steps_per_batch = 1
        self.stage_views = views

    def _augment_of(self, stage: bool | Mapping[str, Any]) -> Augment | None:
        if isinstance(stage, Mapping):
            return dataclasses.replace(self.augment or Augment(), **stage)
        return self.augment if stage else None

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
            raise ValueError(
                f"the task trains on {split!r}, which this data does not have: it has "
                f"{', '.join(self.splits)}"
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
        if train and self.stage_augments and self.sample_transform is not None:
            dataset = SampleTransformed(self.splits[split], self.sample_transform, self.stage_seed)
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
        views: str | int = "none",
    ) -> Tensor:
        """Images as the backbone takes them, for rows `position * V + view` of a split.

        views: "none", "flip" (the image and its mirror image) or a number of random augmentations,
            the same ones whatever the run's seed.
        """
        positions, view = np.divmod(np.asarray(rows), views_count(views))
        batch = self.splits[split][positions.tolist()]
        images, index = batch["input"].to(device), batch["index"].to(device)
        return self._viewed(images, index, torch.from_numpy(view).to(device), views)

    def _viewed(self, images: Tensor, index: Tensor, view: Tensor, views: str | int) -> Tensor:
        if views == "flip":
            images = torch.where((view == 1)[:, None, None, None], images.flip(3), images)
        elif isinstance(views, int) and self.augment is not None:
            # Not mixed: a view is of one image.
            augment = dataclasses.replace(self.augment, mixup=0.0, cutmix=0.0)
            drawn = {"input": images, "index": index * views + view}
            return augment.batch(drawn, self.prepare_images, 0, seed=0, epoch=0)["input"]
        return self.prepare_images(images)

    def digest(self, split: str) -> str:
        """That of `ImageDataset.digest`."""
        if split not in self.digests:
            self.digests[split] = self.splits[split].digest()
        return self.digests[split]

    @property
    def stage_seed(self) -> int:
        return self.seed + 1_000_003 * self.stage_index

    def train_dataloader(self) -> Any:
        first, *others = self.streams
        if not others:
            return self.loader(first, train=True)
        loaders = {first: self.loader(first, train=True)}
        for number, name in enumerate(others, 1):
            loaders[name] = self.loader(name, train=True, like=len(loaders[first]), number=number)
        return loaders

    def val_dataloader(self) -> DataLoader[Batch] | Batches:
        return self.loader("val", train=False)

    def test_dataloader(self) -> DataLoader[Batch] | Batches:
        return self.loader("test", train=False)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """uint8 images to normalised ones, on whatever device the batch is on by now."""
        if isinstance(batch, Steps):
            return batch
        if isinstance(batch.get("train"), dict):  # several streams
            return {name: self.on_after_batch_transfer(part, 0) for name, part in batch.items()}
        if "input" not in batch:
            return batch
        training = self.trainer is not None and self.trainer.training
        return self.transform(batch, augment=training, epoch=self._epoch())

    def _epoch_and_first_batch(self) -> tuple[int, int]:
        """The epoch, and the batch it goes on with: 0, unless it was interrupted.

        From the counters of Lightning's loops, which checkpoints restore; `trainer.current_epoch`
        lags behind while it starts.
        """
        if self.trainer is None:
            return 0, 0
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return epochs.processed, batches.processed if epochs.ready > epochs.processed else 0

    def _first_step(self) -> int:
        return self._epoch_and_first_batch()[1] * self.steps_per_batch

    def _epoch(self) -> int:
        return self._epoch_and_first_batch()[0]

    def transform(self, batch: Batch, *, augment: bool, epoch: int = 0) -> Batch:
        """The batch with its images normalised; if `augment`, as the stage trains on them."""
        if augment and (count := views_count(self.stage_views)) > 1:
            index = batch["index"]
            view = drawn_view(count, index, seed=self.stage_seed, epoch=epoch)
            return {**batch, "input": self._viewed(batch["input"], index, view, self.stage_views)}
        if augment and self.stage_augment is not None:
            return self.stage_augment.batch(
                batch, self.prepare_images, self.num_classes, seed=self.stage_seed, epoch=epoch
            )
        return {**batch, "input": self.prepare_images(batch["input"])}

    def describe(self) -> dict[str, Any]:
        """Sizes for the start-up summary."""
        return {name: len(split) for name, split in self.splits.items()}


def batch_size_for(images: int) -> int:
    """128, or the power of two down to 8 that gives an epoch of so many images enough steps.

    In a handful of steps the running statistics of BatchNorm do not follow the weights.
    """
    return next((size for size in (128, 64, 32, 16) if size * FEW_STEPS <= images), min(8, images))


def few(names: Sequence[str]) -> str:
    """The first of them."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
