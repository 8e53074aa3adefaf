"""What Graft is measured against, in the plain style everyone starts from.

`python bench/baselines.py NAME --images FOLDER ...` runs one of them in a process of its own and
ends with a line of JSON: test accuracy in percent and, where it times itself, seconds per training
epoch. Each trains on the images Graft trains on, selects by the same validation images, and uses
the hyper-parameters of the experiment it is compared with. Lightning is imported by those alone
that use it: it slows down torch's Adam on machines without a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from baselines_parts import (
    CLASSES,
    DEVICE,
    MEAN,
    STD,
    Result,
    accuracy,
    adamw,
    autocast,
    fit,
    folders,
    linear_head,
    loaders,
    network,
    pil_transform,
    sgd,
    split,
)
from graft.plan.schedules import cosine, one_cycle


def reference(a: argparse.Namespace) -> Result:
    """The recipe everyone starts from: PIL per sample, frozen features recomputed each epoch."""
    parts = loaders(folders(a.images, a.size), a.batch)
    backbone, width = network(a.model, a.weights, None)
    backbone.to(DEVICE).eval().requires_grad_(False)
    head = linear_head(width).to(DEVICE)

    def evaluate(name: str) -> float:
        return accuracy(lambda images: head(backbone(images).flatten(1)), parts[name])

    result = fit(
        head,
        lambda: parts["train"],
        evaluate,
        adamw(head),
        partial(cosine, warmup=0.05),
        len(parts["train"]),
        a.epochs,
        features=lambda images: backbone(images).flatten(1),
    )
    del result["seconds"]  # end to end is what counts
    return result


@torch.no_grad()
def reference_features(root: Path, model: str, weights: str | None, size: int) -> Tensor:
    """What the reference recipe computes in every epoch, for the training images in order."""
    from torchvision.datasets import ImageFolder

    images = ImageFolder(root / "train", pil_transform(size))
    ordered = Subset(images, split(images.targets)[0])
    backbone = network(model, weights, None)[0].to(DEVICE).eval()
    batches = DataLoader(ordered, batch_size=256, num_workers=2)
    return torch.cat([backbone(x.to(DEVICE)).flatten(1).cpu() for x, _ in batches])


def uint8_arrays(root: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """All images, decoded once, where the model is."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    parts = {}
    for name in ("train", "test"):
        folder = ImageFolder(root / name, pil_to_tensor)
        images = torch.stack([image for image, _ in folder]).to(DEVICE)
        parts[name] = (images, torch.tensor(folder.targets, device=DEVICE))
    images, labels = parts["train"]
    kept, held_out = split(labels.cpu())
    return {
        "train": (images[kept], labels[kept]),
        "val": (images[held_out], labels[held_out]),
        "test": parts["test"],
    }


def bare_finetune(a: argparse.Namespace) -> Result:
    """A hand-optimised loop: uint8 tensors, batched crop, mirror and resize, channels_last."""
    data = uint8_arrays(a.images)
    net = network(a.model, a.weights, CLASSES)[0].to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean = 255 * torch.tensor(MEAN, device=DEVICE)[:, None, None]
    std = 255 * torch.tensor(STD, device=DEVICE)[:, None, None]

    def prepare(images: Tensor) -> Tensor:
        x = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
        return F.interpolate(x, size=(a.size, a.size), mode="bilinear", align_corners=False)

    def cropped(images: Tensor) -> Tensor:
        n, side = len(images), images.shape[-1]
        padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect")
        positions = torch.arange(side, device=DEVICE)
        rows = positions + torch.randint(0, 9, (n, 1), device=DEVICE)
        columns = positions + torch.randint(0, 9, (n, 1), device=DEVICE)
        columns = torch.where(torch.rand(n, 1, device=DEVICE) < 0.5, columns.flip(1), columns)
        every = torch.arange(n, device=DEVICE)[:, None, None]
        return padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    images, labels = data["train"]
    steps = len(images) // a.batch

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(images), device=DEVICE)[: steps * a.batch].split(a.batch):
            yield prepare(cropped(images[index])), labels[index]

    def evaluate(name: str) -> float:
        pairs = zip(data[name][0].split(256), data[name][1].split(256), strict=True)
        with autocast():
            return accuracy(net, ((prepare(x), y) for x, y in pairs))

    return fit(
        net,
        batches,
        evaluate,
        sgd(net, fused=True),
        one_cycle,
        steps,
        a.epochs,
        smoothing=0.1,
        clip=5.0,
    )


def bare_head(a: argparse.Namespace) -> Result:
    """Head training with nothing around it: features in one tensor, sliced by a permutation."""
    data = torch.load(a.features)
    std, mean = torch.std_mean(data["train"][0], dim=0)
    data = {name: ((x - mean) / (std + 1e-5), y) for name, (x, y) in data.items()}
    features, labels = data["train"]
    head = linear_head(features.shape[1])[1]  # the features are normalised already
    steps = len(features) // a.batch

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(features))[: steps * a.batch].split(a.batch):
            yield features[index], labels[index]

    def evaluate(name: str) -> float:
        return accuracy(head, [data[name]])

    schedule = partial(cosine, warmup=0.05)
    return fit(head, batches, evaluate, adamw(head, fused=True), schedule, steps, a.epochs)


def lightning(a: argparse.Namespace) -> Result:
    from baselines_lightning import finetune

    return finetune(a)


def main() -> None:
    from baselines_peers import lightly_probe, sklearn_probe, timm_loop

    contestants: dict[str, Callable[[argparse.Namespace], Result]] = {
        "reference": reference,
        "bare-finetune": bare_finetune,
        "bare-head": bare_head,
        "lightning": lightning,
        "timm": timm_loop,
        "lightly": lightly_probe,
        "sklearn": sklearn_probe,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=contestants)
    parser.add_argument("--images", type=Path, help="class folders")
    parser.add_argument("--features", type=Path, help="split -> (features, labels), by torch.save")
    parser.add_argument("--model", default="squeezenet1_1")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where logs and checkpoints go")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    np.random.seed(arguments.seed)  # noqa: NPY002 (the one transforms draw from)
    torch.manual_seed(arguments.seed)
    print(json.dumps(contestants[arguments.name](arguments)))


if __name__ == "__main__":
    main()
