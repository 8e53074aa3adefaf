"""Class folders with the names that people and file systems allow, from training to the tables."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from graft.config.names import visible
from tests.conftest import Graft

NAMES = ["[bold]", ":x:", "猫", "a|b\t", "\x1b[31mred\n", os.fsdecode(b"caf\xe9")]


def test_every_class_is_shown_by_its_name_everywhere(graft: Graft, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in NAMES:
        for split, count in (("train", 6), ("test", 2)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    done = graft(
        "train", "data=image_folder", "data.root=photos", "data.image_size=32",
        "data.batch_size=8", "trainer.max_epochs=1", "backbone.weights=null", "name=猫 [1]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(visible(name) in done.stdout for name in NAMES)
    assert "\nrecall    " in done.stdout
    (run,) = (tmp_path / "logs").iterdir()
    assert "_猫-1_" in run.name
    metadata = next(run.rglob("metadata.tsv")).read_text().splitlines()
    assert len(metadata) == 1 + 2 * len(NAMES)
    assert all(line.count("\t") == 2 for line in metadata)
    tested = graft("eval", f"logs/{run.name}")
    assert tested.returncode == 0, tested.stderr
    assert all(visible(name) in tested.stdout for name in NAMES)
    assert "\nrecall    " in tested.stdout
    assert "\x1b" not in done.stdout + tested.stdout + done.stderr + tested.stderr
    result = json.loads((run / "eval" / "test.json").read_text())
    assert {visible(name) for name in result["per_class"]} == {visible(name) for name in NAMES}
    assert "done" in graft("compare", "logs", "--each", "--where", "name=猫 [1]").stdout
