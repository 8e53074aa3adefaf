"""Pictures for TensorBoard, drawn with Pillow: matplotlib takes a second to import."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from graft.plan.grid import GridRecord
from graft.reporting.console import is_share
from graft.reporting.fonts import drawable
from graft.tasks.scores import BINS, Predictions, confusion_matrix, merged, reliability

LOW, HIGH = np.array([247, 251, 255]), np.array([8, 64, 129])  # light to dark blue
BLUE, RED, GREY, PALE = (66, 122, 178), (200, 40, 40), (190, 190, 190), (225, 225, 225)
LINE = 16  # px, of text
SHOWN = 320  # classes of a confusion matrix, 2 px each
NAMED = 40  # of more classes than that, those with the most mistakes

Caption = Sequence[tuple[str, str | tuple[int, int, int]]]  # lines of (text, colour)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@cache
def _font(size: int, file: Path | None = None) -> Font:
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


def _fitted(name: str, width: float, size: int) -> tuple[str, Font]:
    """The name, cut where it is wider than `width` px, and a font that has its letters."""
    text, file = drawable(name)
    font = _font(size, file)
    if font.getlength(text) <= width:
        return text, font
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "...", font


def tiles(images: Tensor, captions: Sequence[Caption], columns: int = 5) -> Image.Image:
    """(N, 3, H, W) uint8 images in rows, the lines of its caption under each."""
    columns = min(columns, len(images))
    side = int(np.clip(max(images.shape[2:]), 96, 128))
    lines = max(len(caption) for caption in captions)
    width, height = side + 6, side + 6 + LINE * lines
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + 6, rows * height + 6), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = 6 + place % columns * width, 6 + place // columns * height
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        scale = side / max(image.size)
        size = (round(scale * image.width), round(scale * image.height))
        how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        sheet.paste(image.resize(size, how), (left, top))
        for line, (text, colour) in enumerate(caption):
            at = (left, top + side + 1 + LINE * line)
            shown, font = _fitted(text, side, 12)
            pen.text(at, shown, colour, font)
    return sheet


def surest_mistakes(p: Predictions, most: int) -> Tensor:
    """Which of the predictions they are."""
    wrong = (p.prediction != p.label).nonzero()[:, 0]
    return wrong[p.confidence[wrong].argsort(descending=True)][:most]


def predicted(images: Tensor, p: Predictions, at: Tensor, classes: Sequence[str]) -> Image.Image:
    """Images (N, 3, H, W) uint8 of the predictions `at`, with the class each is taken for, red
    where that is wrong, and then the right one.
    """
    captions: list[Caption] = []
    rows = zip(p.prediction[at].tolist(), p.label[at].tolist(), p.confidence[at], strict=True)
    for prediction, label, confidence in rows:
        wrong = prediction != label
        taken_for = f"{classes[prediction]} {100 * confidence:.0f}%"
        right = [(f"is {classes[label]}", "black")] if wrong else []
        captions.append([(taken_for, RED if wrong else BLUE), *right])
    return tiles(images, captions)


def cells(
    shades: NDArray[np.float64],
    texts: Sequence[Sequence[str]] | None,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    size: tuple[int, int],
) -> Image.Image:
    """A matrix as coloured cells.

    Args:
        shades: (R, C) in [0, 1], light to dark; nan is grey.
        texts: in the cells; `rows` and `columns` are written where cells are high enough.
        size: (width, height) of a cell in px.
    """
    width, height = size
    font = _font(13)
    named = min(size) >= 12
    cut = [
        [_fitted(name, 110, 13) if named else ("", font) for name in names]
        for names in (rows, columns)
    ]
    left, above = (
        12 + int(max((own.getlength(name) for name, own in names), default=0)) for names in cut
    )
    upright = above - 12 > width - 4
    above = LINE + 20 + (above if upright else LINE)
    known = np.nan_to_num(shades)[..., None]
    colours = np.where(np.isnan(shades)[..., None], GREY, LOW + known * (HIGH - LOW))
    block = colours.astype(np.uint8).repeat(height, 0).repeat(width, 1)
    right = max(left + block.shape[1], int(_font(15).getlength(title)) + 8)
    sheet = Image.new("RGB", (right + 10, above + block.shape[0] + 10), "white")
    sheet.paste(Image.fromarray(block), (left, above))
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 6), title, "black", _font(15))
    for j, (name, own) in enumerate(cut[0]):
        pen.text((left - 6, above + (j + 0.5) * height), name, "black", own, anchor="rm")
    for i, (name, own) in enumerate(cut[1]):
        middle = left + (i + 0.5) * width
        if not upright:
            pen.text((middle, above - 6), name, "black", own, anchor="mb")
        elif name:
            label = Image.new("RGB", (int(own.getlength(name)) + 2, LINE), "white")
            ImageDraw.Draw(label).text((0, LINE / 2), name, "black", own, anchor="lm")
            turned = label.rotate(90, expand=True)
            sheet.paste(turned, (int(middle - LINE / 2), above - 6 - turned.height))
    if min(size) >= 6:
        for j in range(len(shades) + 1):
            y = above + j * height
            pen.line((left, y, left + block.shape[1], y), "white")
        for i in range(shades.shape[1] + 1):
            x = left + i * width
            pen.line((x, above, x, above + block.shape[0]), "white")
    for j, line in enumerate(texts or ()):
        for i, text in enumerate(line):
            ink = "white" if shades[j, i] > 0.55 else "black"
            at = (left + (i + 0.5) * width, above + (j + 0.5) * height)
            pen.text(at, text, ink, font, anchor="mm")
    return sheet


def heads(record: GridRecord) -> Image.Image:
    """The monitored metric of a grid of heads, the best over seeds, learning rate by weight decay;
    a head that never was finite is grey.
    """
    rates = sorted({point.lr for point in record.points})
    decays = sorted({point.weight_decay for point in record.points})
    best = np.full((len(decays), len(rates)), np.nan)
    for point, score in zip(record.points, record.score, strict=True):
        cell = decays.index(point.weight_decay), rates.index(point.lr)
        if np.isfinite(score):
            best[cell] = np.fmax(best[cell], score)
    finite = best[~np.isnan(best)]
    spread = np.ptp(finite) if finite.size else 0.0
    shades = (best - finite.min()) / spread if spread else np.where(np.isnan(best), np.nan, 1.0)

    scale, unit = (100, " in %") if is_share(record.monitor) else (1, "")

    def text(score: float) -> str:
        mark = "*" if score == finite.max(initial=-np.inf) else ""
        return "nan" if np.isnan(score) else f"{scale * record.sign * score:.2f}{mark}"

    return cells(
        shades,
        [[text(score) for score in row] for row in best],
        [f"{decay:.3g}" for decay in decays],
        [f"{rate:.3g}" for rate in rates],
        f"{record.monitor}{unit} (* best): lr across, weight_decay down",
        (76, 40),
    )


def confusion(p: Predictions, classes: Sequence[str]) -> Image.Image:
    """Truth down, prediction across; shades are the root of a class's share, so that few mistakes
    show; numbers are images. A cell costs memory: of many classes, most are one.
    """
    if len(classes) > SHOWN:
        p, kept = merged(p, len(classes), NAMED)
        classes = [*(classes[i] for i in kept), f"{len(classes) - len(kept):,} others"]
    matrix = confusion_matrix(p, len(classes))
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = int(np.clip(640 // len(classes), 2, 44))
    texts = None
    if side >= 22:
        texts = [[str(count) if count else "" for count in row] for row in matrix]
    title = f"{matrix.sum():,} test images: truth down, prediction across"
    return cells(np.sqrt(share), texts, classes, classes, title, (side, side))


def calibration(p: Predictions, ece: float) -> Image.Image:
    """Reliability diagram: accuracy over confidence, and how many images have which confidence.

    Bars that end below the diagonal are of predictions surer than they are right.
    """
    side, left, top, strip = 420, 52, 56, 90  # px
    sheet = Image.new("RGB", (left + side + 20, top + side + 16 + strip + 44), "white")
    pen = ImageDraw.Draw(sheet)
    font = _font(13)
    images, confidence, accuracy = reliability(p)
    width, floor = side / BINS, top + side
    base = floor + 16 + strip
    pen.text((8, 6), f"ECE {100 * ece:.2f} %, {len(p):,} test images", "black", _font(15))
    for tick in range(6):
        at = tick / 5
        x, y = left + at * side, floor - at * side
        pen.line((left, y, left + side, y), PALE)
        pen.line((x, top, x, floor), PALE)
        pen.text((left - 6, y), f"{at:.1f}", "black", font, anchor="rm")
        pen.text((x, base + 5), f"{at:.1f}", "black", font, anchor="mt")
    for i in range(BINS):
        if not images[i]:
            continue
        x0, x1 = left + i * width + 1, left + (i + 1) * width - 2
        reached, claimed = floor - accuracy[i] * side, floor - confidence[i] * side
        pen.rectangle((x0, reached, x1, floor), BLUE)
        gap = sorted((reached, claimed))
        pen.rectangle((x0, gap[0], x1, gap[1]), (242, 200, 200) if claimed < reached else None, RED)
        high = max(1, strip * images[i] / images.max())
        pen.rectangle((x0, base - high, x1, base), GREY)
    pen.line((left, floor, left + side, top), (90, 90, 90), 2)
    pen.line((left, base, left + side, base), "black")
    pen.line((left, floor, left + side, floor), "black")
    pen.text((8, 28), "accuracy of 15 bins (blue), distance to confidence (red)", "black", font)
    pen.text((left + 8, floor + 20), "images", "black", font)
    pen.text((left + side / 2, base + 24), "confidence", "black", font, anchor="mt")
    return sheet
