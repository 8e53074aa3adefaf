"""What a user should know of the training data before a run starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graft.config.words import plural
from graft.data.datamodule import TransferDataModule
from graft.data.order import FEW_STEPS, batch_size_for
from graft.data.splits import few
from graft.transforms.images import ImageInputs


def notes(
    data: TransferDataModule, *, steps: bool, augments: Sequence[bool | Mapping[str, Any]] = ()
) -> Iterator[str]:
    """What a user should know of the training images.

    Args:
        steps: whether they are trained on in steps, not solved for.
        augments: what each stage says of augmentation.
    """
    used = [data.run_inputs.of_stage(augment=augment) for augment in augments]
    if data.loaded.cut and any(isinstance(i, ImageInputs) and i.crops for i in used):
        yield (
            "data.augment.scale crops from the central square of an image: of "
            f"{data.loaded.cut:,} that are longer one way the ends are never seen"
        )
    yield from data.run_inputs.notes(data.loaded.cut)
    train = data.splits["train"]
    absent = sorted({*range(data.num_classes)} - {*train.labels.tolist()})
    if absent and train.targets is None:
        names = few([data.classes[label] for label in absent])
        yield f"no training images of {len(absent)} of {data.num_classes} classes: {names}"
    images = data.epoch_images or len(train)
    images = max(1, images // data.processes)  # a batch is of one process
    count, left = divmod(images, data.batch_size)
    if not steps or count >= FEW_STEPS:
        return
    share = " of each process" if data.processes > 1 else ""
    unused = f" and leaves out {left} of {images} images{share}" if left and data.drop_last else ""
    count += bool(left and not data.drop_last)
    better = batch_size_for(images)
    hint = f"; data.batch_size={better} has {images // better}" if better < data.batch_size else ""
    yield f"an epoch has {plural(count, 'step')}{unused}{hint}"
