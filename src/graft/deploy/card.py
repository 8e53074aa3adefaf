"""A model card: README.md with the metadata that model hubs read, and its pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from graft.data.items import SplitRecord
from graft.deploy.card_data import front_matter
from graft.deploy.card_facts import Facts
from graft.deploy.card_text import sections
from graft.evaluation.evaluator import Evaluator
from graft.reporting import pictures, report
from graft.runs.open import checkpoint_path, damaged, read_checkpoint, read_run
from graft.storage.disk import explained, write_atomically
from graft.tasks.scores import Predictions

README = "README.md"
SHOWN = 10  # images of a picture


def write_card(
    run: str | Path,
    folder: str | Path,
    *,
    title: str | None = None,
    license: str | None = None,
    model: str | None = None,
    examples: bool = True,
    force: bool = False,
) -> Path:
    """The card of a run, which is evaluated for it if that has not been done; returns its path.

    Nothing of the machine is in it: no paths, no names of users or hosts.

    Args:
        title: None: the run's name, or backbone and data.
        license: of the model, as model hubs spell it ("apache-2.0"); None leaves it out.
        model: the file beside the card that its snippet loads; None: the run folder.
        examples: show test images, for whoever may publish them.
        force: replace what is in `folder`.

    Raises:
        ValueError: no run folder, one without a test, or a card that is there already.
        OSError: the folder cannot be written to.
    """
    run, folder = Path(run), Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: a card is a folder with {README} and its pictures")
    if (folder / README).exists() and not force:
        raise ValueError(f"{folder / README} exists: add --force (force=True) to replace it")
    facts = Facts.of(run)
    drawn: dict[str, tuple[Image.Image, str]] = {}
    if facts.kind == "classes":
        predictions = _predictions(run / "eval" / "test.npz")
        drawn |= _of_predictions(predictions, facts)
        if examples:
            drawn |= _of_images(run, predictions, facts)
    title = title or str(facts.config.get("name") or f"{facts.backbone} on {facts.dataset}")
    shown = {name: text for name, (_, text) in drawn.items()}
    with damaged(run / "run.json"):
        found = sections(facts, title, model or facts.name, shown)
        parts = [f"{heading}\n\n{text}\n" for heading, text in found]
        card = "\n".join([front_matter(facts, title, license), *parts])
    files = {name: _png(image) for name, (image, _) in drawn.items()}
    _write(folder, {**files, README: card.encode("utf-8", "backslashreplace")})
    return folder / README


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """README.md last; if one cannot be written, none of the new ones is left."""
    made = not folder.exists()
    with explained(folder, lambda: sum(map(len, files.values()))):
        folder.mkdir(parents=True, exist_ok=True)
    new = [folder / name for name in files if not (folder / name).exists()]
    try:
        for name, content in files.items():
            write_atomically(folder / name, content)
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        if made:
            folder.rmdir()
        raise


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _predictions(file: Path) -> Predictions:
    try:
        with np.load(file, allow_pickle=False) as kept:
            index, label, prediction, confidence = (
                torch.from_numpy(kept[name])
                for name in ("index", "label", "prediction", "confidence")
            )
            return Predictions(
                index, label.long(), prediction.long(), confidence, torch.zeros(len(index))
            )
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing: run graft eval again") from error
    except Exception as error:  # zipfile and numpy raise a dozen kinds
        raise ValueError(f"{file} is damaged ({error}): run graft eval again") from error


def _of_predictions(p: Predictions, facts: Facts) -> dict[str, tuple[Image.Image, str]]:
    ece = float(facts.result["metrics"]["ece"])
    return {
        "confusion.png": (
            pictures.confusion(p, facts.model.classes),
            "Confusion matrix of the test: the true class down, the predicted one across",
        ),
        "calibration.png": (
            pictures.calibration(p, ece),
            "Calibration of the test: how often predictions of a confidence are right",
        ),
    }


def _of_images(run: Path, p: Predictions, facts: Facts) -> dict[str, tuple[Image.Image, str]]:
    """Test images, where the data is still there: one of each class, and the surest mistakes."""
    config, status = read_run(run)
    path = checkpoint_path(run, config, status, "best")
    try:
        checkpoint = read_checkpoint(path)
        evaluator = Evaluator.build(config, checkpoint, path, SplitRecord.read(run))
    except (ValueError, OSError) as error:
        report.say(f"note: the card shows no images: {error}")
        return {}
    split = evaluator.datamodule.splits["test"]
    if len(split) != len(p) or (split.labels[p.index] != p.label.numpy()).any():
        report.say("note: the card shows no images: the test images are not those of the test")
        return {}
    first = [int(rows[0]) for i in range(len(facts.model.classes)) if len(rows := _rows(p, i))]
    drawn = {}
    for name, at, text in (
        ("examples.png", torch.tensor(first[:SHOWN]), "Test images, with what the model says"),
        ("mistakes.png", pictures.surest_mistakes(p, SHOWN), "The mistakes it is surest of"),
    ):
        if len(at):
            images = split[p.index[at].tolist()]["input"]
            drawn[name] = (pictures.predicted(images, p, at, facts.model.classes), text)
    return drawn


def _rows(p: Predictions, label: int) -> torch.Tensor:
    return (p.label == label).nonzero()[:, 0]
