"""`import graft`: a model trained and used from Python, in a process that others are at home in."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import graft
from graft.config.resolved import CONFIGS
from graft.data.items import SplitRecord
from graft.runs.evaluate import evaluate
from graft.storage.run_json import read_record
from tests.conftest import Graft
from tests.unit.test_targets import table

NARROW = ["backbone.depth=8", "backbone.width=4", "backbone.weights=null", "logger=csv"]
NARROW += ["data.batch_size=8", "trainer=cpu"]


def tiny(data: str | Path, *more: str, **keywords: Any) -> graft.Run:
    chosen: dict[str, Any] = {"backbone": "resnet20_cifar", "epochs": 1, **keywords}
    return graft.finetune(data, overrides=[*NARROW, *more], **chosen)


@pytest.fixture
def graft_command(graft: Graft) -> Graft:  # whose name is the package's here
    return graft


def process_state() -> dict[str, Any]:
    """What a run must not change under who called it."""
    loggers = ("", "lightning.pytorch", "lightning.fabric", "hydra.utils")
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    return {
        "signals": [signal.getsignal(signum) for signum in handled],
        "levels": [logging.getLogger(name).level for name in loggers],
        "handlers": list(logging.getLogger().handlers),
        "filters": list(warnings.filters),
        "environment": dict(os.environ),
        "arguments": list(sys.argv),
        "excepthook": threading.excepthook,
        "threads": {t.name for t in threading.enumerate() if t.name.startswith("graft")},
        "hydra": GlobalHydra.instance().hydra,
        "precision": torch.get_float32_matmul_precision(),
        "drawn": (random.getstate()[1][:9], torch.get_rng_state().sum().item()),
        "numpy": np.random.get_state()[1].sum(),  # type: ignore[index]  # noqa: NPY002
        "grad": torch.is_grad_enabled(),
    }


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = "import graft, sys; graft.finetune; print([m for m in sys.modules if m in "
    code += "('torch', 'lightning', 'torchvision')], dir(graft))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
    assert "'finetune'" in done.stdout
    assert "'load'" in done.stdout
    with pytest.raises(AttributeError, match="has no attribute 'fine_tune'"):
        _ = graft.fine_tune


def test_predictions_from_python_are_those_of_the_evaluation(image_folders: Path) -> None:
    run = tiny(image_folders, epochs=3)
    evaluate(run.path)
    kept = np.load(run.path / "eval/test.npz")
    record = SplitRecord.read(run.path)
    assert record is not None
    names = [image_folders / os.fsdecode(name) for name in record.splits["test"].names]
    model = run.load()
    found = model.predict(names)
    assert [p.path for p in found] == names
    assert [p.label for p in found] == [model.classes[i] for i in kept["prediction"]]
    assert len({p.label for p in found}) > 1
    confidence = np.array([p.probability for p in found], np.float32)
    np.testing.assert_allclose(confidence, kept["confidence"], rtol=1e-4)
    for p in found:
        assert list(p.probabilities) == model.classes == ["dark", "grey", "light"]
        assert p.probability == max(p.probabilities.values())
        assert sum(p.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert model.predict(str(names[0])) == graft.load(str(run.path)).predict([str(names[0])])


def test_a_model_is_a_plain_module_that_preprocesses(image_folders: Path, tmp_path: Path) -> None:
    model = tiny(image_folders).load()
    assert isinstance(model, torch.nn.Module)
    assert not model.training
    images = torch.randint(0, 256, (2, 3, 40, 32), dtype=torch.uint8)
    ready = model.preprocess(images)
    assert ready.dtype == torch.float32
    assert torch.equal(model.backbone(ready), model.features(images))
    for wrong in (ready, images[0], images[:, :1]):
        with pytest.raises(ValueError, match="preprocesses them itself"):
            model(wrong)


def test_sizes_may_differ_within_a_call(image_folders: Path, tmp_path: Path) -> None:
    model = tiny(image_folders).load()
    files = []
    for i, size in enumerate([(32, 32), (90, 60), (20, 20), (32, 32), (500, 33)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(files[-1])
    together = model.predict(iter(files))
    for one, file in zip(together, files, strict=True):
        (alone,) = model.predict(file)
        assert alone.label == one.label
        assert alone.probability == pytest.approx(one.probability, rel=1e-4)
    assert model.predict([]) == []


def test_an_image_that_cannot_be_read_is_named(image_folders: Path, tmp_path: Path) -> None:
    model = tiny(image_folders).load()
    good = next((image_folders / "test/dark").iterdir())
    bad = tmp_path / "broken.jpg"
    bad.write_bytes(good.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken\.jpg: "):
        model.predict([good, bad])
    with pytest.raises(FileNotFoundError, match=r"nothing\.jpg"):
        model.predict([good, tmp_path / "nothing.jpg"])


@pytest.mark.parametrize(
    ("task", "filled"), [("multilabel", "probabilities"), ("regression", "numbers")]
)
def test_what_is_no_class_has_no_label(tmp_path: Path, task: str, filled: str) -> None:
    root = table(tmp_path / "photos")
    file = "labels.csv" if task == "multilabel" else "numbers.csv"
    more = [f"data.root={root}", f"data.source.table={file}"]
    run = tiny("image_table", *more, task=task)
    evaluate(run.path)
    kept = np.load(run.path / "eval/test.npz")
    record = SplitRecord.read(run.path)
    assert record is not None
    names = [root / os.fsdecode(name) for name in record.splits["test"].names]
    model = run.load()
    outputs = torch.from_numpy(kept["output"])
    expected = model.task.cpu().predicted(outputs).numpy()
    for p, row in zip(model.predict(names), expected, strict=True):
        assert (p.label, p.probability) == (None, None)
        values = getattr(p, filled)
        assert {**p.probabilities, **p.numbers} == values
        assert list(values) == model.classes
        np.testing.assert_allclose([*values.values()], row, rtol=1e-4, atol=1e-5)


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"backbone": "resnet20_cifr"},
        "no config backbone=resnet20_cifr: did you mean resnet20",
    ),
    ({"plan": "lp_tf"}, "no config transfer=lp_tf: did you mean lp_ft"),
    ({"head": "lineal"}, "no config head=lineal: did you mean linear"),
    ({"epochs": 0}, "trainer.max_epochs=0: must be a whole number above 0"),
    ({"config_dir": "nowhere"}, "config_dir=nowhere: no such folder"),
    ({"overrides": ["trainer.max_epoch=2"]}, "did you mean trainer.max_epochs"),
    ({"overrides": ["trainer.devices=2"]}, "one device; on several, type: graft train data="),
    ({"overrides": ["trainer.num_nodes=2"]}, "one device; on several, type: graft train data="),
]


@pytest.mark.parametrize(("keywords", "message"), WRONG)
def test_what_is_wrong_is_said_as_the_command_says_it(
    image_folders: Path, tmp_path: Path, keywords: dict[str, Any], message: str
) -> None:
    before = process_state()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        graft.finetune(image_folders, **{"backbone": "resnet20_cifar", **keywords})
    assert "\n" not in str(caught.value)
    assert process_state() == before
    assert not (tmp_path / "logs").exists()


def test_data_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data=cifar1O: .*did you mean cifar10"):
        tiny("cifar1O")
    with pytest.raises(ValueError, match="neither a folder nor a config of data"):
        tiny(tmp_path / "digits")  # a path is one, whatever its name
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        tiny(tmp_path / "empty")


def test_a_second_run_in_the_same_process_is_the_same_run(
    image_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = tiny(
        image_folders, "transfer.stages.probe.epochs=2", plan="lp_ft", logs="a folder, of mine"
    )
    second = tiny(
        image_folders, "transfer.stages.probe.epochs=2", plan="lp_ft", logs="a folder, of mine"
    )
    assert first.path != second.path
    assert first.path.parent == second.path.parent == Path("a folder, of mine").absolute()
    assert first.metrics == second.metrics
    assert first.metrics.keys() >= {"val/acc", "test/acc"}


def test_what_belongs_to_the_process_is_as_it_was(image_folders: Path) -> None:
    tiny(image_folders)  # what imports leave behind is theirs
    heard: list[int] = []
    logging.getLogger("lightning.pytorch").setLevel(logging.DEBUG)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
        try:
            before = process_state()
            tiny(image_folders)
            assert process_state() == before
            compose("train", [])  # Hydra of one's own goes on
            with pytest.raises(ValueError, match="but the data has 3 classes"):
                tiny(image_folders, "head.num_classes=2")
            assert process_state() == before
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_run_in_another_thread(image_folders: Path) -> None:
    runs: list[Any] = []
    thread = threading.Thread(target=lambda: runs.append(tiny(image_folders)))
    thread.start()
    thread.join()
    assert runs[0].metrics["test/acc"] >= 0


class Interrupt(L.Callback):
    """Sends a signal after the first step, so often; in the test, to this very process."""

    def __init__(self, signum: int, times: int = 1) -> None:
        self.signum, self.times = signum, times

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            for _ in range(self.times):
                signal.raise_signal(self.signum)


def interrupting(signum: int, times: int = 1) -> list[str]:
    callback = f"{{_target_: {__name__}.Interrupt, signum: {int(signum)}, times: {times}}}"
    return [f"+callbacks.stop={callback}"]


@pytest.mark.parametrize("times", [1, 2])
def test_after_an_interrupt_the_run_can_be_resumed_and_python_goes_on(
    image_folders: Path, tmp_path: Path, graft_command: Graft, times: int
) -> None:
    """A second one ends a command's process: a notebook has more in it than the run."""
    before = process_state()
    with pytest.raises(KeyboardInterrupt):
        tiny(image_folders, *interrupting(signal.SIGINT, times))
    after = process_state()
    assert {key: after[key] for key in ("signals", "arguments", "threads", "hydra")} == {
        key: before[key] for key in ("signals", "arguments", "threads", "hydra")
    }
    (path,) = (tmp_path / "logs").iterdir()
    assert read_record(path)["status"] == "preempted"
    if times == 1:
        done = graft_command("resume", str(path))
        assert done.returncode == 0, done.stderr
        assert read_record(path)["status"] == "done"


def test_another_signal_reaches_the_handler_that_was_there(image_folders: Path) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGUSR1, lambda signum, frame: heard.append(signum))
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGUSR1"):
            tiny(image_folders, *interrupting(signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert heard == [signal.SIGUSR1]
