"""A grid of heads as a picture: learning rate by weight decay, for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from lightning.pytorch.loggers.logger import Logger
from PIL import Image, ImageDraw, ImageFont

from graft.loggers import TensorBoard
from graft.transfer.grid import GridRecord

CELL = (76, 40)  # px
MARGIN = (92, 62)  # left and top, for what the axes are
LOW, HIGH = np.array([247, 251, 255]), np.array([8, 64, 129])  # light to dark blue


def log(record: GridRecord, loggers: Sequence[Logger]) -> None:
    """At the last step of the stage; the loggers have moved on to the next one."""
    for logger in loggers:
        if isinstance(logger, TensorBoard):
            logger.experiment.add_image(
                "grid/val_acc", np.asarray(draw(record)), logger.step_offset - 1, dataformats="HWC"
            )


def draw(record: GridRecord) -> Image.Image:
    """Validation accuracy in percent, the best over seeds; a head that never was finite is grey."""
    rates = sorted({point.lr for point in record.points})
    decays = sorted({point.weight_decay for point in record.points})
    best = np.full((len(decays), len(rates)), -1.0)
    for point, acc in zip(record.points, record.acc, strict=True):
        cell = decays.index(point.weight_decay), rates.index(point.lr)
        best[cell] = max(best[cell], acc)

    width, height = MARGIN[0] + CELL[0] * len(rates), MARGIN[1] + CELL[1] * len(decays)
    image = Image.new("RGB", (max(width, 300) + 8, height + 8), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    pen.text((8, 6), "val/acc in %: lr across, weight_decay down", "black", font)
    for i, rate in enumerate(rates):
        at = (MARGIN[0] + (i + 0.5) * CELL[0], MARGIN[1] - 6)
        pen.text(at, f"{rate:.3g}", "black", font, anchor="mb")
    finite = best[best >= 0]
    low, spread = (finite.min(), np.ptp(finite)) if finite.size else (0.0, 0.0)
    for j, decay in enumerate(decays):
        top = MARGIN[1] + j * CELL[1]
        pen.text((MARGIN[0] - 8, top + CELL[1] / 2), f"{decay:.3g}", "black", font, anchor="rm")
        for i in range(len(rates)):
            left, acc = MARGIN[0] + i * CELL[0], best[j, i]
            shade = (acc - low) / spread if spread else 1.0
            fill, text, ink = (190, 190, 190), "nan", "black"
            if acc >= 0:
                red, green, blue = (LOW + shade * (HIGH - LOW)).astype(int).tolist()
                fill, text, ink = (red, green, blue), f"{100 * acc:.2f}", "black"
                ink = "white" if shade > 0.55 else "black"
            pen.rectangle((left, top, left + CELL[0] - 2, top + CELL[1] - 2), fill)
            if acc == best.max():
                pen.rectangle((left, top, left + CELL[0] - 2, top + CELL[1] - 2), None, "red", 3)
            pen.text((left + CELL[0] / 2 - 1, top + CELL[1] / 2), text, ink, font, anchor="mm")
    return image
