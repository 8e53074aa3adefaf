"""`graft board` in a real browser: what somebody sees who opens the address it says.

GRAFT_SCREENSHOTS=FOLDER keeps a picture of each page there: docs/images has three of them.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.commands.board import serve
from graft.runs.folder import RunFolder
from tests.conftest import Graft

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWEEP = [
    "experiment=quickstart", "trainer=cpu", "trainer.max_epochs=6",
    "optimizer.lr=0.01,0.02", "head=linear,mlp",
]  # fmt: skip
RUNS = [f"lr-{lr}_head-{head}_seed0" for lr in (0.01, 0.02) for head in ("linear", "mlp")]
# All text of the page, shadow roots and frames included.
TEXT = """
const found = [];
const walk = node => {
  for (const child of node.childNodes) {
    if (child.nodeType === 3 && child.textContent.trim()) found.push(child.textContent.trim());
    if (child.nodeType !== 1 || ['STYLE', 'SCRIPT', 'TEMPLATE'].includes(child.tagName)) continue;
    if (child.tagName === 'IFRAME' && child.contentDocument?.body) walk(child.contentDocument.body);
    if (child.shadowRoot) walk(child.shadowRoot);
    walk(child);
  }
};
walk(document.body);
return found.join('\\n');
"""
# The first element of a kind, in shadow roots and frames too.
FIND = """
const find = (node, selector) => {
  const here = node.querySelector(selector);
  if (here) return here;
  for (const child of node.querySelectorAll('*')) {
    const below = child.shadowRoot || (child.tagName === 'IFRAME' && child.contentDocument);
    const found = below && find(below, selector);
    if (found) return found;
  }
};
const root = find(document, arguments[0]);
"""


def until(true: Callable[[], Any], seconds: float = 60) -> Any:
    """The first value that holds; the last one, once time is up."""
    end = time.monotonic() + seconds
    while not (value := true()) and time.monotonic() < end:
        time.sleep(0.25)
    return value


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: two learning rates, two heads."""
    logs = tmp_path_factory.mktemp("logs")
    subprocess.run(
        [sys.executable, "-m", "graft", "train", "-m", *SWEEP, f"paths.logs={logs}"],
        env={**os.environ, "GRAFT_CACHE": str(logs / "cache")},
        check=True,
        capture_output=True,
    )
    (folder,) = (logs / "sweeps").iterdir()
    return folder


@pytest.fixture(scope="module")
def address(sweep: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "graft", "board", str(sweep), "--port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("4 runs of "), line
        yield line.split(": ")[1].split(" ")[0]
        process.terminate()
        assert process.wait(20) == 128 + 15


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


class Page:
    """One tab of TensorBoard after another."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, tab: str, *texts: str, query: str = "") -> str:
        """The text of a tab, once all of these are in it; a picture of it for the docs."""
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}{query}#{tab}")
        return self.shows(tab.partition("&")[0], *texts)

    def shows(self, name: str, *texts: str) -> str:
        until(lambda: all(text in self.text() for text in texts))
        shown = self.text()
        assert [text for text in texts if text not in shown] == [], f"not in {name}: {shown[-800:]}"
        if folder := os.environ.get("GRAFT_SCREENSHOTS"):
            time.sleep(3)  # it draws, moves and loads what it has text for
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))
        return shown

    def text(self) -> str:
        return str(self.driver.execute_script(TEXT))

    def of(self, selector: str, expression: str) -> Any:
        """An expression of `root`, the element; nothing while that is not there."""
        return self.driver.execute_script(f"{FIND} return root && {expression};", selector)


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1600,1000",
        "--enable-unsafe-swiftshader",  # the projector needs WebGL
    ):  # fmt: skip
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    driver.set_script_timeout(30)
    yield Page(driver, address)
    driver.quit()


browser = pytest.mark.skipif(
    None in (CHROMIUM, DRIVER), reason="needs chromium and chromedriver (chromium-driver)"
)


@pytest.mark.slow
@browser
def test_every_tab_shows_the_runs_under_short_names(page: Page) -> None:
    page.open("scalars&tagFilter=acc|loss", *RUNS, "train/loss", "val/acc", "val/best_acc")
    page.open("timeseries", *RUNS, query="?tagFilter=acc|loss&smoothing=0")
    tags = ["inputs/finetune", "test/confusion", "test/calibration", "test/mistakes"]
    page.open("images", *RUNS, *tags)
    width = "root.shadowRoot.querySelector('img')?.naturalWidth"
    assert until(lambda: page.of("tf-image-loader", width)) > 200
    texts = ["config/text_summary", "groups/finetune/text_summary"]
    page.open("text", *RUNS, *texts, "shots_per_class: 5", "backbone/norm_bias")


@pytest.mark.slow
@browser
def test_hyper_parameters_can_be_sorted_and_drawn_as_parallel_coordinates(page: Page) -> None:
    shown = page.open("hparams", "PARALLEL COORDINATES VIEW", *RUNS, "val/best_acc", "test/acc")
    assert "hp_metric" not in shown
    assert "Number of matching session groups: 4" in shown
    groups = until(lambda: page.of("tf-hparams-table-view", "root.sessionGroups"))
    rows = {group["name"].split("/")[0]: group["hparams"] for group in groups}
    assert [(rows[run]["lr"], rows[run]["head"]) for run in RUNS] == [
        (0.01, "linear"), (0.01, "mlp"), (0.02, "linear"), (0.02, "mlp"),
    ]  # fmt: skip
    for group in groups:
        metrics = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
        assert metrics.keys() == {"val/best_acc", "test/acc", "test/loss", "time/fit_seconds"}
        assert 0 <= metrics["val/best_acc"] <= 1
    page.of("tf-hparams-sessions-pane", "root.set('_selectedTab', 1)")
    plot = "tf-hparams-parallel-coords-plot"
    assert until(lambda: page.of(plot, "root.shadowRoot.querySelectorAll('path').length")) >= 4
    page.shows("parallel-coordinates", "Color by")
    axes = page.of(plot, "[...root.shadowRoot.querySelectorAll('text')].map(t => t.textContent)")
    assert {"lr", "head", "val/best_acc", "test/acc"} <= set(axes)


@pytest.mark.slow
@browser
def test_the_projector_shows_test_images_with_their_labels(page: Page) -> None:
    page.open("projector", "4 runs found", "Points:", "Total variance described", "prediction")
    assert page.of("canvas", "root.width > 100")


def test_what_cannot_be_shown_is_one_line(tmp_path: Path, graft: Graft) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        serve(tmp_path / "nowhere", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no run folder in it"):
        serve(tmp_path / "empty", None)
    run = RunFolder.create(tmp_path / "logs", "run", {"seed": 0}, [], {"logger": "csv"})
    done = graft("board", str(tmp_path / "logs"))
    assert done.returncode == 1
    assert "no TensorBoard events in its runs (logger=csv): see graft compare" in done.stderr
    (run.path / "events.out.tfevents.1").touch()
    done = graft("board", "--port", "-5")
    assert done.stderr == "graft: error: --port -5: must be from 0 to 65535\n"
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = graft("board", str(tmp_path / "logs"), "--port", str(port))
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if "error: " in line)
    assert re.search(rf"--port {port}: .*already in use", line)
