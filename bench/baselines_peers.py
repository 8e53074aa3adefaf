"""Peers from PyPI at the same job. Not among the dependencies: `pip install timm lightly`."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from baselines_parts import (
    CLASSES,
    DEVICE,
    Result,
    accuracy,
    fit,
    folders,
    loaders,
    network,
    split,
)
from graft.plan.schedules import one_cycle


def timm_loop(a: argparse.Namespace) -> Result:
    """timm's model, data sets, loaders and optimizer."""
    from timm.data.dataset import ImageDataset
    from timm.data.loader import create_loader
    from timm.models import create_model
    from timm.optim._optim_factory import create_optimizer_v2

    def loader(folder: str, part: int | None, training: bool) -> Any:
        images: Any = ImageDataset(str(a.images / folder))
        labels = [label for _, label in images.reader.samples]
        rows = range(len(labels)) if part is None else split(labels)[part]
        chosen: Any = Subset(images, rows)
        made = create_loader(
            chosen,
            input_size=(3, a.size, a.size),
            batch_size=a.batch,
            is_training=training,
            scale=(0.8, 1.0),
            interpolation="bilinear",
            crop_pct=1.0,
            num_workers=2,
            use_prefetcher=DEVICE.type == "cuda",
            device=DEVICE,
        )
        images.transform = chosen.transform  # create_loader sets it on the subset alone
        return made

    parts = {
        "train": loader("train", 0, True),
        "val": loader("train", 1, False),
        "test": loader("test", None, False),
    }
    net = create_model(a.model, pretrained=a.weights is not None, num_classes=CLASSES)
    net = net.to(DEVICE)
    return fit(
        net,
        lambda: parts["train"],
        lambda name: accuracy(net, parts[name]),
        create_optimizer_v2(net, opt="sgd", lr=0.01, weight_decay=5e-4, momentum=0.9),
        one_cycle,
        len(parts["train"]),
        a.epochs,
        smoothing=0.1,
        clip=5.0,
    )


def lightly_probe(a: argparse.Namespace) -> Result:
    """lightly's LinearClassifier with its own optimizer and schedule, on images."""
    from lightly.utils.benchmarking import LinearClassifier
    from pytorch_lightning import Trainer  # lightly's modules are not of the `lightning` package

    parts = loaders(folders(a.images, a.size), a.batch)
    backbone, width = network(a.model, a.weights, None)
    model = nn.Sequential(backbone, nn.Flatten())
    probe = LinearClassifier(model, a.batch, feature_dim=width, num_classes=CLASSES)
    trainer = Trainer(max_epochs=a.epochs, devices=1, default_root_dir=a.out)
    trainer.fit(probe, parts["train"], parts["val"])
    tested = trainer.validate(probe, parts["test"], verbose=False)[0]  # it has no test_step
    return {"accuracy": 100 * tested["val_top1"]}


def sklearn_probe(a: argparse.Namespace) -> Result:
    """scikit-learn's LogisticRegression on stored features, with the strength of lbfgs_probe."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = {k: (x.numpy(), y.numpy()) for k, (x, y) in torch.load(a.features).items()}
    strength = 1 / (0.01 * len(data["train"][0]))  # weight_decay 0.01 on the mean loss
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
    model.fit(*data["train"])
    return {"accuracy": 100 * float(model.score(*data["test"]))}
