"""What Graft is measured against, in the plain style everyone starts from.

`python bench/baselines.py NAME --images FOLDER ...` runs one of them in a process of its own and
ends with a line of JSON: test accuracy in percent and, where it times itself, seconds per training
epoch. Each trains on the images Graft trains on, selects by the same validation images, and uses
the hyper-parameters of the experiment it is compared with. Lightning is imported by those alone
that use it: it slows down torch's Adam on machines without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from graft.data.subset import stratified_split
from graft.plan.schedules import Schedule, cosine, one_cycle

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 10
VAL_SEED = 1  # of the validation images in Graft's datamodule under its default split_seed
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Batches = Iterable[Any]  # of (inputs, labels)
Result = dict[str, float]


# ---------------------------------------------------------------- images and models
def pil_transform(size: int, augment: bool = False) -> Callable[[Any], Tensor]:
    from torchvision import transforms as T

    steps = [T.Resize(size), T.CenterCrop(size), T.ToTensor(), T.Normalize(MEAN, STD)]
    if augment:  # of 32 px images: the shift of an eighth and the mirror of Graft's default
        crop = T.RandomCrop(32, padding=4, padding_mode="reflect")
        steps = [crop, T.RandomHorizontalFlip(), *steps]
    return T.Compose(steps)


def split(labels: Any) -> tuple[list[int], list[int]]:
    """The training and validation images of Graft: 10 % held out, stratified."""
    kept, held_out = stratified_split(torch.as_tensor(labels).numpy(), 0.1, VAL_SEED)
    return kept.tolist(), held_out.tolist()


def folders(root: Path, size: int, augment: bool = False) -> dict[str, Dataset[Any]]:
    from torchvision.datasets import ImageFolder

    plain = pil_transform(size)
    train = ImageFolder(root / "train", pil_transform(size, augment))
    kept, held_out = split(train.targets)
    return {
        "train": Subset(train, kept),
        "val": Subset(ImageFolder(root / "train", plain), held_out),
        "test": ImageFolder(root / "test", plain),
    }


def loaders(data: dict[str, Dataset[Any]], batch: int, workers: int = 2) -> dict[str, Any]:
    return {
        name: DataLoader(
            part,
            batch_size=batch,
            shuffle=name == "train",
            drop_last=name == "train",
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=DEVICE.type == "cuda",
        )
        for name, part in data.items()
    }


def network(name: str, weights: str | None, classes: int | None) -> tuple[nn.Module, int]:
    """(a torchvision model, width of its features); without a classifier when classes is None."""
    from torchvision.models import get_model

    net = get_model(name, weights=weights)
    width = 512 if name.startswith("squeezenet") else net.fc.in_features
    last = nn.Identity() if classes is None else zero_linear(width)
    if name.startswith("squeezenet"):
        net.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    else:
        net.fc = last
    return net, width


def zero_linear(width: int) -> nn.Linear:
    """A new classifier that starts from equal logits, as Graft's does."""
    linear = nn.Linear(width, CLASSES)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def linear_head(width: int) -> nn.Sequential:
    """Normalised features, one linear layer: the head of the probe experiments."""
    return nn.Sequential(nn.BatchNorm1d(width, affine=False), zero_linear(width))


# ---------------------------------------------------------------- plain loops
def adamw(
    net: nn.Module, lr: float = 1e-3, decay: float = 0.01, fused: bool = False
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_groups(net, decay), lr=lr, fused=fused or None)


def sgd(net: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
    groups = decay_groups(net, 5e-4)
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, fused=fused or None)


def decay_groups(net: nn.Module, decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in net.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def accuracy(predict: nn.Module | Callable[[Tensor], Tensor], batches: Batches) -> float:
    hits = total = 0
    for inputs, labels in batches:
        logits = predict(inputs.to(DEVICE))
        hits += int((logits.argmax(1).cpu() == labels.cpu()).sum())
        total += len(labels)
    return 100 * hits / total


def fit(
    learner: nn.Module,
    batches: Callable[[], Batches],
    evaluate: Callable[[str], float],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    steps: int,
    epochs: int,
    features: Callable[[Tensor], Tensor] | None = None,
    smoothing: float = 0.0,
    clip: float | None = None,
) -> Result:
    """Train, validate each epoch, test the best. Seconds are those of training batches alone."""
    total = steps * epochs
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, total))
    best, state, seconds = -1.0, learner.state_dict(), []
    for _ in range(epochs):
        learner.train()
        started = time.perf_counter()
        for inputs, labels in batches():
            inputs, labels = inputs.to(DEVICE), labels.to(DEVICE)
            if features is not None:
                with torch.no_grad():
                    inputs = features(inputs)
            with autocast():
                loss = F.cross_entropy(learner(inputs), labels, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(learner.parameters(), clip)
            optimizer.step()
            rates.step()
        wait()
        seconds.append(time.perf_counter() - started)
        learner.eval()
        if (score := evaluate("val")) > best:
            best, state = score, copy.deepcopy(learner.state_dict())
    learner.load_state_dict(state)
    return {"accuracy": evaluate("test"), "seconds": median(seconds[1:] or seconds)}


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


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
