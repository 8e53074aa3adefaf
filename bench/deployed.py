"""An exported model beside `graft eval`, and beside preprocessing outside of the model.

    python bench/deployed.py --images CIFAR_FOLDERS --work FOLDER resnet18 [OVERRIDE ...]

Trains a ridge probe on a part of the training images, evaluates it, exports it to both formats and
prints a row of a Markdown table: how many first classes equal those of `graft eval` in batches of
1, 7 and 64 of one file, the largest difference of logits, and how many are left when the same model
is fed images that were preprocessed outside of it, by torchvision's transforms on PIL images
(`transforms`) or by `Image.resize` to a square (`resize`), both with the right mean and deviation.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from graft.data.items import SplitRecord
from graft.deploy.artefact import open_model
from graft.deploy.images import read_image
from graft.deploy.model import Deployed, load
from graft.deploy.torch_files import ProgramModel

BATCHES = (64, 7, 1)
FEW = {7: 350, 1: 50}  # images in batches that small
COLUMNS = ("backbone", "images", "onnx", "pt2", "logits onnx", "logits pt2", "transforms", "resize")


def graft(*arguments: str) -> None:
    command = [sys.executable, "-m", "graft", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")


def outside(model: Deployed, transform: Callable[[Image.Image], Tensor], files: list[Path]) -> Any:
    """First classes of the model's network on images that were preprocessed outside of it."""
    found = []
    for start in range(0, len(files), 64):
        images = [transform(Image.open(f).convert("RGB")) for f in files[start : start + 64]]
        with torch.inference_mode():
            found.append(model.head(model.backbone(torch.stack(images))).argmax(1).numpy())
    return np.concatenate(found)


def usual(model: Deployed) -> dict[str, Callable[[Image.Image], Tensor]]:
    from torchvision import transforms as T

    own = model.spec.preprocessing
    interpolation = T.InterpolationMode(own.interpolation)
    tail = [T.ToTensor(), T.Normalize(own.mean, own.std)]
    return {
        "transforms": T.Compose(
            [T.Resize(own.resize_size, interpolation), T.CenterCrop(own.crop_size), *tail]
        ),
        "resize": T.Compose([lambda image: image.resize((own.crop_size,) * 2), *tail]),
    }


def logits(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """But for a constant in each row."""
    logs = np.log(np.maximum(probabilities, 1e-30))
    return logs - logs.mean(1, keepdims=True)


def row(backbone: str, images: Path, work: Path, overrides: list[str]) -> str:
    data = ["data=image_folder", f"data.root={images}", "trainer=cpu", "trainer.precision=32-true"]
    plan = ["transfer=ridge_probe", f"backbone={backbone}", f"paths.logs={work}"]
    graft("train", *plan, *data, *overrides)
    (run,) = work.iterdir()
    graft("eval", str(run))
    kept = np.load(run / "eval" / "test.npz")
    expected = kept["prediction"][np.argsort(kept["index"])]
    record = SplitRecord.read(run)
    assert record is not None
    items = record.splits["test"]
    files = [images / name.decode() for name in items.names.tolist()]
    model = load(run, device="cpu")
    rows = np.stack([np.asarray(read_image(file, model.spec)) for file in files])
    reference = np.concatenate(
        [model.predict_rows(rows[i : i + 64]) for i in range(0, len(rows), 64)]
    )
    cells = [backbone, f"{len(files):,}"]
    differences = []
    for suffix in ("onnx", "pt2"):
        graft("export", str(run), "--format", suffix)
        path = run / "export" / f"model.{suffix}"
        exported = (
            open_model(path, device="cpu") if suffix == "onnx" else ProgramModel(path, trusted=True)
        )
        equal, largest = [], 0.0
        for size in BATCHES:
            count = min(FEW.get(size, len(rows)), len(rows))
            parts = [
                exported.predict_rows(rows[i : i + size][: count - i])
                for i in range(0, count, size)
            ]
            found = np.concatenate(parts)
            equal.append(int((found.argmax(1) == expected[:count]).sum()) - count)
            apart = np.abs(logits(found) - logits(reference[:count])).max()
            largest = max(largest, float(apart / np.abs(logits(reference)).max()))
        wrong = -sum(equal)
        cells.append("all" if wrong == 0 else f"all but {wrong}")
        differences.append(f"{largest:.1e}")
    shares = [
        f"{(outside(model, transform, files) == expected).mean():.2%}"
        for transform in usual(model).values()
    ]
    return f"| {' | '.join([*cells, *differences, *shares])} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER")
    settings = parser.parse_intermixed_args()  # options among the overrides
    print(row(settings.backbone, settings.images, settings.work, settings.overrides), flush=True)


if __name__ == "__main__":
    main()
