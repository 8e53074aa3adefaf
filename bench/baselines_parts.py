"""What the baselines share: images, models, optimizers and a plain training loop."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from graft.data.subset import stratified_split
from graft.plan.schedules import Schedule

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
