"""The sections of a model card."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from graft import __version__
from graft.config.words import plural
from graft.deploy.card_data import METRICS
from graft.deploy.card_facts import Facts
from graft.deploy.card_training import FEW, count, data, names, origin, plan, preprocessing
from graft.deploy.markdown import block, code, escaped, literal, table
from graft.reporting.console import measured

TASKS = {
    "classes": "gives an image the probability of each of {count}",
    "labels": "gives an image the probability of each of {count}, which do not exclude each other",
    "numbers": "estimates {count} from an image",
}
NAMES = {name: shown for name, (_, shown) in METRICS.items()} | {
    "nll": "Negative log-likelihood",
    "ece": "Expected calibration error",
    "loss": "Loss",
}
PRINTED = {
    "classes": "prediction.label, prediction.probability",
    "labels": "prediction.probabilities",
    "numbers": "prediction.numbers",
}


def sections(
    facts: Facts, title: str, file: str, pictures: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """(heading, Markdown) of each.

    Args:
        file: what `graft.load` is given: the run's own folder, or a file beside the card.
        pictures: file name -> what it shows.
    """
    yield f"# {escaped(title)}", _what(facts)
    yield "## How to load it", _loading(facts, file)
    yield "## Test results", "\n\n".join([_metrics(facts), *_shown(pictures)])
    if facts.kind == "classes":
        yield "### By class", _by_class(facts)
    yield "## Intended use and limits", _limits(facts)
    yield "## Data", data(facts)
    yield "## Training", plan(facts)
    yield "## Preprocessing", preprocessing(facts)
    yield "## Hardware, time, versions", origin(facts)


def _what(facts: Facts) -> str:
    start = "random weights"
    if facts.weights != "random":
        start = f"the pretrained weights {code(facts.weights)}"
    parameters = sum(p.numel() for p in facts.model.parameters())
    return (
        f"A model that {TASKS[facts.kind].format(count=count(facts))}: {names(facts)}. It is "
        f"{code(facts.backbone)} with a new head, {parameters:,} parameters, trained from {start} "
        f"with Graft {__version__}."
    )


def _loading(facts: Facts, file: str) -> str:
    what = "the folder of the run" if file == facts.name else "the file beside this card"
    text = (
        "import graft\n\n"
        f"# {what}\n"
        f"model = graft.load({literal(file)})\n"
        'for prediction in model.predict(["image.jpg"]):\n'
        f"    print(prediction.path, {PRINTED[facts.kind]})"
    )
    return (
        block(text, "python")
        + "\n\nThe model takes images as they are stored, and preprocesses them itself: as a "
        "PyTorch module, `model(images)` takes `(N, 3, H, W)` uint8 RGB."
    )


def _metrics(facts: Facts) -> str:
    bounds = facts.result["intervals"]
    rows = []
    for name, value in facts.result["metrics"].items():
        low, high = bounds.get(name, (math.nan, math.nan))
        interval = f"{measured(name, low)} to {measured(name, high)}" if name in bounds else ""
        rows.append([escaped(NAMES.get(name, name)), measured(name, float(value)), interval])
    notes = facts.result.get("notes") or []
    held_out = "" if notes else " that the model was neither trained nor chosen on"
    noted = "".join(f" Note: {escaped(note)}." for note in notes)
    return (
        table(["metric", "value", "95 % interval"], rows)
        + f"\n\nOn {plural(facts.result['images'], 'test image')}{held_out}, with the weights of "
        f"the best validation.{noted} The intervals are of "
        "other images of the same kind (bootstrap); another training run would differ too, and "
        "that is not in them."
    )


def _shown(pictures: Mapping[str, str]) -> Iterator[str]:
    for name, text in pictures.items():
        yield f"![{escaped(text)}]({name})"


def _by_class(facts: Facts) -> str:
    found = facts.result.get("per_class") or {}
    rows = sorted(found.items(), key=lambda item: (item[1]["acc"] is None, item[1]["acc"]))
    if len(rows) <= FEW:
        rows = list(found.items())
    cells = []
    for name, row in rows[:FEW]:
        recall, interval, other = "", "", ""
        if row["acc"] is not None:
            recall = measured("acc", row["acc"])
            interval = " to ".join(measured("acc", end) for end in row["interval"])
        if row["taken_for"]:
            other = f"{escaped(row['taken_for'][0])} ({row['taken_for'][1]:,})"
        cells.append([escaped(name), other, f"{row['images']:,}", recall, interval])
    header = ["class", "most often taken for", "test images", "recall", "95 % interval"]
    text = table(header, cells, left=2)
    return f"The {FEW} of {len(found):,} with the lowest recall.\n\n" * (len(found) > FEW) + text


def _limits(facts: Facts) -> str:
    lines = [
        "This is what the run itself tells. What the model is meant for, where the images come "
        "from and who may be affected by its mistakes is for its authors to add.",
        "",
    ]
    if facts.kind == "classes":
        lines.append(
            f"- It knows the {count(facts)} above and nothing else. An image of anything else is "
            "given one of them too, often with a high probability."
        )
        lines.append(f"- Recall differs by class: {escaped(str(facts.result.get('recall')))}.")
        ece = float(facts.result["metrics"]["ece"])
        lines.append(
            "- Its probabilities differ from how often it is right by "
            f"{100 * ece:.1f} percentage points on average, on images like those of the test."
        )
    else:
        lines.append(
            f"- It answers with the {count(facts)} above for any image, also for one that has "
            "nothing to do with them."
        )
    if facts.splits is not None:
        height, width = facts.splits.splits["train"].side
        crop = facts.model.spec.preprocessing.crop_size
        lines.append(
            f"- It was trained and tested on images stored at {width} x {height} px, which it sees "
            f"at {crop} x {crop}. Smaller ones are enlarged; how well that works was not tested."
        )
    lines.append(
        "- Images from other cameras, places or times may be harder than those of the test."
    )
    return "\n".join(lines)
