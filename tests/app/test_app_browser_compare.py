"""Compare and the dial in headless Chromium: two methods trained from the page, then the dial turned."""

import json
import time

import pytest
from dashboard import chromium, dashboard
from playwright.sync_api import expect

from lora_engine.runs import Ledger, store_upload

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

PATIENCE = 240_000  # milliseconds; two busy cores
RELEASE_SECONDS = 2.0


def test_two_methods_from_the_page_then_the_dial(home):
    rows = [{"prompt": f"Where is parcel {i}", "completion": f"It left on day {i}."} for i in range(30)]
    path = store_upload(home, "parcels.jsonl", "\n".join(map(json.dumps, rows)).encode())
    expect.set_options(timeout=PATIENCE)
    with dashboard(home) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 1400})
        page.set_default_timeout(PATIENCE)
        page.goto(f"{url}/compare?data={path.parent.name}/{path.name}")
        for name in ("Full fine-tuning", "Head only", "Prefix tuning"):
            page.locator(".st-key-compare_methods").get_by_role("button", name=name).click()
        for seed in ("1", "2"):
            page.locator(".st-key-compare_seeds").get_by_role("button", name=seed, exact=True).click()
        steps = page.locator(".st-key-compare_steps input")
        steps.fill("6")
        steps.press("Enter")
        expect(page.get_by_text("6 runs, one after another")).to_be_visible()
        page.get_by_role("button", name="Start", exact=True).click()
        expect(page.get_by_text("runs over; now").first).to_be_visible()
        page.reload()  # closing the page stops nothing
        expect(page.get_by_role("heading", name="Five promises of low rank, in your figures")).to_be_visible()
        expect(page.get_by_text("LoRA's loss is").first).to_be_visible()

        lora = next(r for r in Ledger(home).list_runs() if r.config["method"]["method"] == "lora")
        sample = lora.result["sample"]
        page.get_by_text("The dial: from the base model").click()
        text = page.locator(".text-block").first
        expect(page.get_by_text("Evaluation loss here").first).to_be_visible()
        slider = page.locator(f".st-key-scale_{lora.id}").get_by_role("slider")
        page.wait_for_timeout(5000)
        slider.focus()
        began = time.monotonic()
        slider.press("Home")
        expect(page.get_by_text("The base model.", exact=True)).to_be_visible()
        expect(text).to_have_text(sample["before"].strip() or "Nothing but blank lines.", timeout=10_000)
        assert time.monotonic() - began <= RELEASE_SECONDS
        expect(page.get_by_test_id("stException")).to_have_count(0)
