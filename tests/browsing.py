"""A real browser for tests of pages: Chromium without a window, and tabs that note what they say and ask for."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from frankenmoe.palette import contrast

SHOTS = Path(__file__).parents[1] / "build" / "screenshots"  # CI keeps them
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT = 60_000  # milliseconds
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

# every text that is shown, its colour and the colour behind it
LEGIBLE = """() => {
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const clear = (each) => /^rgba.*, 0(\\.\\d+)?\\)$/.test(getComputedStyle(each).backgroundColor);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), own = walker.currentNode.parentElement;
    if (!text || !own.checkVisibility({ opacityProperty: true })) continue;
    if (own.closest('.hidden, :disabled, option, script')) continue;
    let behind = own;
    while (behind.parentElement && clear(behind)) behind = behind.parentElement;
    found.push([text, getComputedStyle(own).color, getComputedStyle(behind).backgroundColor]);
  }
  return found;
}"""


@contextmanager
def launched() -> Iterator[Any]:
    """The browser; skips the test where there is none."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no chromium: .ci/run must install it")
        pytest.skip("no chromium here: apt-get install chromium to test the page")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


def open_tab(browser: Any, url: str, *, width: int = 1280, scheme: str = "light", height: int = 900) -> Any:
    """A tab of a context of its own, ready to be used. `said` has its console and errors, `asked` its requests."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab = context.new_page()
    tab.said, tab.asked = [], []
    tab.on("console", lambda message: tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.goto(url)
    tab.wait_for_selector("html[data-ready]")
    return tab


def whole(tab: Any, replies: int) -> None:
    """Waits until the playground has so many whole replies."""
    tab.locator(".reply[aria-busy=false]").nth(replies - 1).wait_for(timeout=WAIT)
    assert tab.locator(".reply").count() == replies


def shoot(tab: Any, name: str, *, whole: bool = False) -> None:
    """Keeps a picture of the tab, or of its whole page."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=str(SHOTS / f"{name}.png"), full_page=whole)


def legible(tab: Any) -> None:
    """Every text that is shown has the contrast of WCAG 2.2, AA."""
    found = tab.evaluate(LEGIBLE)
    assert len(found) > 10
    for text, ink, paper in found:
        assert contrast(_hex(ink), _hex(paper)) >= 4.5, (text, ink, paper)


def _hex(colour: str) -> str:
    return "#" + "".join(f"{round(float(part)):02x}" for part in re.findall(r"[\d.]+", colour)[:3])
