"""`graft serve` as a process: its page in a real browser, and its end.

GRAFT_SCREENSHOTS=FOLDER keeps pictures of the page there, light and dark.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from graft.deploy.images import read_image
from graft.deploy.model import Deployed, load
from graft.runs.folder import RunFolder
from graft.runs.train import train
from tests.conftest import TINY, compose
from tests.integration.test_board import browser, until

STRANGE = "<img src=x onerror=alert(1)>.png"
DROP = """
const [name, bytes] = arguments, transfer = new DataTransfer();
transfer.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
document.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, cancelable: true}));
"""
CARDS = """
return [...document.querySelectorAll('#results li')].map(card => ({
  name: card.querySelector('.text p').textContent,
  class: card.querySelector('h2')?.textContent,
  rows: [...card.querySelectorAll('.row')].map(row => row.innerText.trim().split(/\\n+/)),
  bars: [...card.querySelectorAll('.bar')].map(bar => bar.offsetWidth / bar.parentNode.offsetWidth),
  error: card.querySelector('.error')?.textContent,
}))
"""
VIOLATIONS = """
window.violations = [];
document.addEventListener('securitypolicyviolation', event => violations.push(event.blockedURI));
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    with mock.patch.dict(os.environ, GRAFT_CACHE=str(logs / "cache")):
        config = compose(*TINY)
        folder = RunFolder.create(logs, "run", config, TINY)
        folder.start()
        train(config, folder)
    return folder.path


@pytest.fixture(scope="module")
def model(run: Path) -> Deployed:
    return load(run, device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in (("one.png", (40, 60)), ("two.jpg", (32, 32)), (STRANGE, (90, 30))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / name)
    return [folder / "one.png", folder / "two.jpg", folder / STRANGE]


@pytest.fixture(scope="module")
def process(run: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "graft", "serve", str(run), "--port", "0", "--top", "3"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"{run.name} (4 classes): http://127.0.0.1:"), line
        yield process, line.split(": ")[1].split(" ")[0]
        process.kill()


@pytest.fixture(scope="module")
def address(process: tuple[subprocess.Popen[str], str]) -> str:
    return process[1]


def told(model: Deployed, path: Path) -> tuple[str, list[list[str]]]:
    """The class of an image, and the rows that its card shows."""
    (outputs,) = model.predict_rows(read_image(path, model.spec)[None])
    order = np.argsort(-outputs, kind="stable")[:3]
    return model.classes[order[0]], [[model.classes[i], f"{100 * outputs[i]:.1f} %"] for i in order]


class Page:
    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address

    def cards(self) -> list[dict[str, Any]]:
        return list(self.driver.execute_script(CARDS))

    def answered(self, count: int) -> list[dict[str, Any]]:
        until(lambda: sum(bool(c["class"] or c["error"]) for c in self.cards()) == count, 30)
        return self.cards()

    def picture(self, theme: str) -> None:
        if folder := os.environ.get("GRAFT_SCREENSHOTS"):
            scheme = [{"name": "prefers-color-scheme", "value": theme}]
            self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
            self.driver.save_screenshot(str(Path(folder) / f"serve-{theme}.png"))


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,900",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(str(shutil.which("chromedriver")))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(30)
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": VIOLATIONS})
    yield Page(driver, address)
    driver.quit()


@browser
def test_images_get_the_class_that_the_model_gives(
    page: Page, model: Deployed, pictures: list[Path]
) -> None:
    driver = page.driver
    driver.get(page.address)
    name = model.spec.provenance["run"]
    assert until(lambda: driver.find_element("id", "title").text == name)
    chosen, dropped, strange = pictures
    driver.find_element("id", "files").send_keys(f"{chosen}\n{strange}")
    page.answered(2)
    driver.execute_script(DROP, dropped.name, list(dropped.read_bytes()))
    page.answered(3)
    page.picture("light")
    page.picture("dark")
    driver.execute_script(DROP, "broken.png", [1, 2, 3])
    cards = page.answered(4)
    for card, path in zip(cards[:3], (chosen, strange, dropped), strict=True):
        assert card["name"] == path.name
        assert (card["class"], card["rows"]) == told(model, path)
        shown = [float(value.removesuffix(" %")) / 100 for _, value in card["rows"]]
        assert card["bars"] == pytest.approx(shown, abs=0.01)
    assert cards[3]["error"].startswith("not an image in a format that can be read")

    clipboard = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    granted = {"permissions": clipboard, "origin": page.address}
    driver.execute_cdp_cmd("Browser.grantPermissions", granted)
    driver.find_element("id", "copy").click()
    line = f"curl -F images=@photo.jpg {page.address}/predict"
    assert until(lambda: driver.execute_script("return navigator.clipboard.readText()") == line, 10)

    assert driver.execute_script("return violations") == []
    (entry,) = driver.get_log("browser")
    assert "status of 400" in entry["message"]  # of the broken image
    log = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = {
        message["params"]["request"]["url"]
        for message in log
        if message["method"] == "Network.requestWillBeSent"
    }
    assert f"{page.address}/predict" in sent
    own = (f"{page.address}/", "blob:", "data:")
    assert [url for url in sent if not url.startswith(own)] == []


@browser
def test_the_page_is_used_by_keyboard(page: Page) -> None:
    page.driver.get(page.address)
    from selenium.webdriver import ActionChains, Keys

    names = []
    for _ in range(5):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        active = page.driver.switch_to.active_element
        names.append(active.get_attribute("id") or active.text)
    assert names == ["files", "copy", "Interface", "Model", "Health"]


def test_a_body_is_answered_and_the_end_is_one_line(
    process: tuple[subprocess.Popen[str], str], model: Deployed, pictures: list[Path]
) -> None:
    server, address = process
    request = urllib.request.Request(
        f"{address}/predict", pictures[0].read_bytes(), {"Content-Type": "image/png"}
    )
    with urllib.request.urlopen(request) as response:
        (answer,) = json.load(response)["predictions"]
    assert answer["class"] == told(model, pictures[0])[0]
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=30)
    assert out.startswith("stopped after ")
    assert out.count("\n") == 1
    assert err == ""
    assert server.returncode == 0
