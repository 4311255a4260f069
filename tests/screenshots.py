"""make screenshots: every page, desktop and phone width, light and dark, into assets/screenshots/.

Uses real runs: one fine-tune, one sweep and one comparison on a bundled dataset, in a home of their own (or in the
one given as the first argument, which keeps them for the next time)."""

import io
import sys
import tempfile
from pathlib import Path

from dashboard import chromium, dashboard
from PIL import Image
from playwright.sync_api import Page

from lora_engine.assets_path import asset_path
from lora_engine.cli import main as command_line
from lora_engine.comparisons import is_comparison
from lora_engine.runs import Ledger

OUT = Path(__file__).resolve().parents[1] / "assets" / "screenshots"
WIDTHS = {"desktop": (1440, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
LONGEST = 5000


def prepare(home: Path) -> tuple[str, str, str]:
    """(run id, sweep id, comparison id) to show; made when the home has none."""
    ledger = Ledger(home)
    data = ["--data", str(asset_path("datasets/customer_support.jsonl")), "--home", str(home)]

    def grids(comparison: bool) -> list[str]:
        return [sweep.id for sweep in ledger.list_sweeps() if is_comparison(sweep) == comparison]

    if not grids(comparison=True):
        command_line(["compare", *data, "--steps", "40"])
    if not grids(comparison=False):
        command_line(["sweep", *data, "--steps", "40"])
    if all(run.sweep_id for run in ledger.list_runs()):
        command_line(["train", *data, "--r", "8", "--alpha", "16", "--steps", "60"])
    run = next(run for run in ledger.list_runs() if run.sweep_id is None)
    return run.id, grids(comparison=False)[0], grids(comparison=True)[0]


def shoot(page: Page, path: Path) -> None:
    """One picture of the whole page; raises when something is wider than the screen."""
    page.get_by_test_id("stMain").locator("h2").first.wait_for()
    page.wait_for_timeout(4000)
    width = page.viewport_size["width"] if page.viewport_size else 0
    main = page.get_by_test_id("stMain")
    height = int(main.evaluate("(e) => e.scrollHeight"))
    too_wide = int(main.evaluate("(e) => e.scrollWidth - e.clientWidth"))
    if too_wide > 0:
        raise RuntimeError(f"{path.name}: the page is {too_wide} px wider than the screen")
    page.set_viewport_size({"width": width, "height": min(LONGEST, height)})
    page.wait_for_timeout(2000)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    # 256 colours are plenty for a page and a third of the bytes.
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path.name, picture.size, f"{path.stat().st_size / 1024:.0f} KiB")


def main(home: Path) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    run_id, sweep_id, comparison_id = prepare(home)
    pages = {
        "explore": "", "finetune": f"finetune?run={run_id}", "sweep": f"sweep?sweep={sweep_id}", "runs": "runs",
        "compare": f"compare?comparison={comparison_id}", "accuracy": "accuracy",
    }  # fmt: skip
    with dashboard(home) as url, chromium() as browser:
        for device, (width, height) in WIDTHS.items():
            for scheme in SCHEMES:
                for name, address in pages.items():
                    context = browser.new_context(
                        viewport={"width": width, "height": height},
                        color_scheme="dark" if scheme == "dark" else "light",
                    )
                    page = context.new_page()
                    page.goto(f"{url}/{address}")
                    shoot(page, OUT / f"{name}-{device}-{scheme}.png")
                    context.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
