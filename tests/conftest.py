"""What tests share: composing real configs, and small models and data that train in a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from graft import cli
from graft.config.resolved import CONFIGS, check
from graft.training.module import TransferModule

# A run of a second: made-up images, a narrow ResNet from scratch.
TINY = [
    "data=synthetic",
    "data.source.per_class=12",
    "data.source.classes=4",
    "data.batch_size=8",
    "backbone.depth=8",
    "backbone.width=4",
    "backbone.weights=null",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "logger=csv",
]


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    """Tests run side by side: two threads each would fight for two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GRAFT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("GRAFT_TRUST", "tests")  # whose callbacks watch runs, and are resumed
    for name in ("COLUMNS", "LINES"):  # of the shell: tables would be fitted to its window
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _listening() -> None:
    """A shell's background job ignores these two, and commands that ran in this process change it:
    what a run then ignores, it would not be stopped by."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def compose(*overrides: str) -> dict[str, Any]:
    """The resolved config of `graft train OVERRIDES`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return check(hydra_compose("train", list(overrides)))


Graft = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def graft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Graft:
    """`graft("train", ...)`: the real command, in an empty folder, without a process of its own."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        GlobalHydra.instance().clear()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["graft", *arguments])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # put back after the test
        capfd.readouterr()
        code: Any = 0
        try:
            with mock.patch.dict(os.environ):  # what the command sets must not outlive it
                cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return call


@pytest.fixture
def graft_process(tmp_path: Path) -> Graft:
    """The same in a process of its own."""

    def call(*arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "graft", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return call


@pytest.fixture
def image_folders(tmp_path: Path) -> Path:
    """train/ and test/ class folders of small JPEG images that differ by class."""
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for brightness, name in ((60, "dark"), (120, "grey"), (190, "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(brightness, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


@dataclass
class Trained:
    """What a test looks at after a run."""

    metrics: dict[str, float]
    module: TransferModule
    folder: Path

    def state(self) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in self.module.state_dict().items()}


Train = Callable[..., Trained]


@pytest.fixture
def train_tiny(tmp_path: Path) -> Train:
    """`train_tiny("transfer=linear_probe", ...)`: a run of a second in this process."""

    def call(*overrides: str) -> Trained:
        from graft.runs.folder import RunFolder
        from graft.runs.startup import quiet_libraries
        from graft.runs.train import train

        quiet_libraries()
        config = compose(*TINY, *overrides)
        folder = RunFolder.create(tmp_path / "logs", "run", config, overrides)
        folder.start()
        metrics, module = train(config, folder)
        return Trained(metrics, module, folder.path)

    return call


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, keys included."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def equal(a: Any, b: Any) -> bool:
    """What checkpoints hold, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b
