"""The explorer in a real browser: a visitor clicks from a picture to the downloads."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captum_fusion.demo import digits

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("gradio", reason="the page needs the extra 'app'")

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")

#: Milliseconds; machines may be slow.
PATIENCE = 60_000


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The page's address, served by the command as a user starts it."""
    command = [sys.executable, "-m", "captum_fusion", "explore", "--model", "digits", "--methods", "grad-cam"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if found:
            break
    else:
        pytest.fail(f"the page is not served: {said}")
    yield found[0]
    process.terminate()
    process.wait(30)
    process.stdout.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def visit(browser: Any, address: str) -> Iterator[Any]:
    """The page, with the first map drawn. It asks no other server for anything."""
    sync_api.expect.set_options(timeout=PATIENCE)
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(PATIENCE)
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "//" in request.url else "data"))
    page.goto(address)
    settle(page, "grad-cam")
    yield page
    page.close()
    assert hosts <= {address.removeprefix("http://"), "data"}


def settle(page: Any, *captions: str) -> None:
    """Wait until the run has ended and the maps are drawn."""
    for i, caption in enumerate(captions):
        sync_api.expect(page.locator(f"#caption{i}")).to_contain_text(caption)
    sync_api.expect(page.locator("#explain")).to_be_enabled()


def give(page: Any, file: Path) -> None:
    """Upload a file."""
    page.locator("#picture button[aria-label='Remove Image']").click()
    page.locator("#picture input[type=file]").set_input_files(file)


def choose(page: Any, name: str, text: str, option: str) -> None:
    """Choose an option of a dropdown by typing."""
    page.locator(f"#{name} input").click()
    page.locator(f"#{name} input").fill(text)
    page.locator("[role=option]", has_text=option).first.click()
    page.keyboard.press("Escape")


def test_a_visitor_explores_an_upload(visit: Any, tmp_path: Path) -> None:
    upload = tmp_path / "mine.png"
    with Image.open(digits.scene_path("four_and_six")) as scene:
        scene.resize((192, 192)).save(upload)
    give(visit, upload)
    sync_api.expect(visit.locator("#note")).to_contain_text("mine.png: 192 x 192 pixels")
    settle(visit, "grad-cam: six")
    visit.locator("#target label", has_text="four").click()
    settle(visit, "grad-cam: four")
    choose(visit, "rival", "six", "six")
    settle(visit, "grad-cam: four rather than six")
    choose(visit, "methods", "fusion-cam:preset=fast", "fusion-cam:preset=fast")
    settle(visit, "grad-cam", "fusion-cam:preset=fast: four rather than six")
    sync_api.expect(visit.locator("#map1 img")).to_be_visible()
    before = visit.locator("#map0 img").get_attribute("src")
    visit.locator("#mode label", has_text="contour").click()
    visit.wait_for_function("before => document.querySelector('#map0 img').src !== before", arg=before)
    visit.get_by_role("tab", name="Steps").click()
    sync_api.expect(visit.locator("#stepcaption1")).to_contain_text("Region map")
    visit.get_by_role("tab", name="Download").click()
    bundle = zipfile.ZipFile(io.BytesIO(download(visit, "bundle")))
    manifest = json.loads(bundle.read("manifest.json"))
    assert [entry["method"] for entry in manifest["maps"]] == ["grad-cam", "fusion-cam:preset=fast"]
    assert manifest["maps"][0]["rather_than"]["name"] == "six"
    assert bundle.read("mine.png") == upload.read_bytes()
    assert np.load(io.BytesIO(download(visit, "map"))).shape == (2, 96, 96)
    with Image.open(io.BytesIO(download(visit, "picture"))) as picture:
        assert picture.format == "PNG"


def download(page: Any, name: str) -> bytes:
    button = page.locator(f"#download_{name}")
    sync_api.expect(button).to_be_enabled()
    with page.expect_download() as waiting:
        button.click()
    return Path(waiting.value.path()).read_bytes()


def test_a_part_is_brushed_away(visit: Any) -> None:
    visit.get_by_role("tab", name="Brush").click()
    visit.locator("#brush").click()
    sync_api.expect(visit.locator("#brushed")).to_contain_text("Nothing is painted")
    canvas = visit.locator("#editor canvas").first
    canvas.scroll_into_view_if_needed()
    visit.wait_for_timeout(1000)
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    visit.mouse.move(*middle)
    visit.mouse.down()
    for step in range(12):
        visit.mouse.move(middle[0] + 5 * step, middle[1] + 4 * step)
    visit.mouse.up()
    visit.wait_for_timeout(500)
    visit.locator("#brush").click()
    sync_api.expect(visit.locator("#brushed")).to_contain_text("of what the network sees is painted over")
    sync_api.expect(visit.locator("#brushed")).to_contain_text("Without it")


def test_the_network_is_asked_and_mistakes_get_one_line(visit: Any, tmp_path: Path) -> None:
    visit.get_by_role("tab", name="Ask the network").click()
    sync_api.expect(visit.locator("#answer")).to_contain_text("Highlighted part hidden")
    sync_api.expect(visit.locator("#only img")).to_be_visible()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    give(visit, broken)
    sync_api.expect(visit.locator("#note")).to_have_text("broken.png is not an image")
    visit.locator("#examples button").nth(1).click()
    settle(visit, "grad-cam")
    sync_api.expect(visit.locator("#note")).to_contain_text("96 x 96 pixels")
    choose(visit, "layer", "stage2 (", "stage2 (")
    settle(visit, "grad-cam")
    sync_api.expect(visit.locator("#layer input")).to_have_value("stage2 (48 x 24 x 24)")


def test_prices_are_those_of_the_chosen_layer(visit: Any) -> None:
    def samples(layer: str, example: int) -> int:
        choose(visit, "layer", f"{layer} (", f"{layer} (")
        settle(visit, "grad-cam")
        visit.locator("#examples button").nth(example).click()
        settle(visit, "grad-cam")
        visit.locator("#methods input").click()
        visit.locator("#methods input").fill("score-cam (")
        price = visit.locator("[role=option]", has_text=re.compile(r"^\W*score-cam \(")).inner_text()
        visit.keyboard.press("Escape")
        found = re.search(r"(\d+) samples", price)
        assert found, price
        return int(found[1])

    assert samples("stage2", 0) <= 48 + 1 < samples("stage4", 1)


def test_a_narrow_window_shows_everything(visit: Any) -> None:
    visit.set_viewport_size({"width": 420, "height": 900})
    visit.wait_for_timeout(500)
    assert visit.evaluate("document.documentElement.scrollWidth") <= 420
    top = visit.locator("#map0").bounding_box()["y"]
    for tab in ("Ask the network", "Brush", "Steps", "Download"):
        assert visit.get_by_role("tab", name=tab).is_visible()
    assert top < visit.locator("#methods").bounding_box()["y"]  # the map before the choice of methods
