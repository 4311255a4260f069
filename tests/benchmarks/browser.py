"""How fast the dashboard feels, measured in headless Chromium.

first_chart_seconds: from starting the server process to the first chart drawn, a new server each time.
release_seconds: from the dial's release to the server's chart showing the new rank.
held_seconds: from a move of the held dial to the frame that shows its figures and drawing."""

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import summary
from dashboard import chromium, dashboard
from playwright.sync_api import Browser, Page

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# The clock starts at the event itself and stops in the frame after the change is in the document.
WATCH_RELEASE = """(input) => new Promise((resolve) => {
  input.addEventListener('change', () => {
    const began = performance.now();
    const look = () => {
      const text = [...document.querySelectorAll('.js-plotly-plot')].map((p) => p.textContent).join(' ');
      if (text.includes(window.expectedMark)) resolve((performance.now() - began) / 1000);
      else requestAnimationFrame(look);
    };
    look();
  }, {once: true});
})"""

WATCH_HELD = """(input) => {
  const root = input.getRootNode();
  window.heldSeconds = [];
  const state = () => root.querySelector('.figures').textContent + root.querySelector('svg').outerHTML;
  let before = state();
  input.addEventListener('input', (event) => {
    const began = event.timeStamp;
    const look = () => {
      const now = state();
      if (now !== before) { before = now; window.heldSeconds.push((performance.now() - began) / 1000); }
      else requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
  }, {capture: true});
}"""


def run(repeats: int = 30) -> dict[str, Any]:
    """All three figures, each with its spread."""
    with chromium() as browser:
        first = [first_chart(browser) for _ in range(repeats)]
        with tempfile.TemporaryDirectory() as home, dashboard(Path(home)) as url:
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(url)
            page.locator(".js-plotly-plot .main-svg").nth(1).wait_for()
            page.wait_for_timeout(2000)
            held = held_moves(page, repeats)
            release = [release_dial(page, i) for i in range(repeats)]
    return {
        "first_chart_seconds": summary(first),
        "release_seconds": summary(release),
        "held_seconds": summary(held),
    }


def first_chart(browser: Browser) -> float:
    """A fresh server, a fresh page."""
    with tempfile.TemporaryDirectory() as home:
        began = time.perf_counter()
        with dashboard(Path(home)) as url:
            context = browser.new_context(viewport={"width": 1440, "height": 900})
            page = context.new_page()
            page.goto(url)
            page.locator(".js-plotly-plot .main-svg").first.wait_for()
            seconds = time.perf_counter() - began
            context.close()
    return seconds


def held_moves(page: Page, repeats: int) -> list[float]:
    """Drag along the rank dial without letting go."""
    dial = page.locator("#dial-rank")
    dial.evaluate(WATCH_HELD)
    box = dial.bounding_box()
    assert box
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 3 / 8, middle)
    page.mouse.down()
    for i in range(repeats):
        step = (4, 5, 6, 5, 4, 3)[i % 6]
        page.mouse.move(box["x"] + box["width"] * step / 8, middle)
        page.wait_for_timeout(120)
    page.mouse.up()
    page.wait_for_timeout(1500)
    seconds: list[float] = page.evaluate("window.heldSeconds")
    return seconds


def release_dial(page: Page, i: int) -> float:
    """One keyboard step of the rank dial: input and change in one, as on release."""
    dial = page.locator("#dial-rank")
    index = int(dial.input_value())
    step = 1 if (index < 7 and i % 2 == 0) or index == 0 else -1
    page.evaluate("(mark) => { window.expectedMark = mark; }", f"rank {RANKS[index + step]}:")
    handle = dial.element_handle()
    page.evaluate(f"(input) => {{ window.waiting = ({WATCH_RELEASE})(input); }}", handle)
    dial.press("ArrowRight" if step > 0 else "ArrowLeft")
    seconds: float = page.evaluate("window.waiting")
    page.wait_for_timeout(300)
    return seconds
