"""The whole main job in headless Chromium, as a person would do it, with a reload in the middle of a run."""

import io
import os
import re
import signal
import time
import zipfile

import pytest
from dashboard import chromium, dashboard
from playwright.sync_api import Page, expect

from lora_engine.runs import Ledger, steps_frame

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

STEPS = 60
PATIENCE = 120_000  # milliseconds; two busy cores


def rows() -> bytes:
    """A small file of one's own: questions and answers."""
    things = ["ladder", "kettle", "lantern", "boat", "clock", "violin", "saddle", "mirror", "basket", "hammer"]
    places = ["in the attic", "by the river", "under the stairs", "behind the barn"]
    lines = ["question,answer"]
    for thing in things:
        lines += [
            f"Where is the {thing} kept {place}?,The {thing} is kept {place} and nowhere else." for place in places
        ]
    return "\n".join(lines).encode()


def open_page(page: Page, name: str) -> None:
    page.get_by_test_id("stSidebarNav").get_by_role("link", name=name, exact=True).click()


def drop_file(page: Page, name: str, content: bytes) -> None:
    main = page.get_by_test_id("stMain")
    main.locator("input[type=file]").first.set_input_files({"name": name, "mimeType": "text/plain", "buffer": content})


def fill_number(page: Page, key: str, value: int) -> None:
    field = page.locator(f".st-key-{key} input")
    field.fill(str(value))
    field.press("Enter")


def wait_for_steps(ledger: Ledger, run_id: str, steps: int) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while (ledger.get_run(run_id).last_step or 0) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_explore_finetune_sweep_and_runs(home):
    crashes: list[str] = []
    expect.set_options(timeout=PATIENCE)
    with dashboard(home) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 1000}, accept_downloads=True)
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: crashes.append(str(error)))
        page.goto(url)
        explore(page)
        run_id = finetune(page, home)
        sweep(page, home)
        history(page, run_id)
        assert crashes == []
        expect(page.get_by_test_id("stException")).to_have_count(0)


def explore(page: Page) -> None:
    answer = page.locator(".dial .answer")
    expect(answer).to_contain_text("LoRA at rank 8 trains 162,816 of")
    expect(page.locator(".js-plotly-plot").first).to_be_visible()

    # Held: everything in the dial follows the hand, the address does not yet.
    rank = page.locator("#dial-rank")
    box = rank.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] * 3 / 8, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 4 / 8, box["y"] + box["height"] / 2, steps=4)
    expect(answer).to_contain_text("LoRA at rank 16 trains 325,632 of")
    expect(page.locator(".dial .scaling")).to_contain_text("alpha / r = 1.0")
    assert "r=16" not in page.url
    page.mouse.up()
    page.wait_for_url(re.compile(r"[?&]r=16\b"))

    # The keyboard turns it too, and a deep link brings it back.
    rank.press("ArrowLeft")
    page.wait_for_url(lambda address: not re.search(r"[?&]r=16\b", address))
    expect(answer).to_contain_text("LoRA at rank 8 trains")
    page.goto(page.url.split("?")[0] + "?r=4&lora_alpha=6")
    expect(answer).to_contain_text("LoRA at rank 4 trains 81,408 of")
    expect(page.locator(".dial .scaling")).to_contain_text("alpha / r = 1.5")


def finetune(page: Page, home) -> str:
    open_page(page, "Fine-tune")
    # A file that cannot be read is refused in place, and the next one works.
    drop_file(page, "picture.csv", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(200))
    expect(page.get_by_test_id("stAlert").first).to_be_visible()
    drop_file(page, "mine.csv", rows())
    expect(page.get_by_text(re.compile(r"40 (of 40 )?(rows|examples)")).first).to_be_visible()
    fill_number(page, "steps", STEPS)
    page.get_by_role("button", name="Start").click()
    page.wait_for_url(re.compile(r"[?&]run="))
    found = re.search(r"[?&]run=([^&]+)", page.url)
    assert found
    run_id = found.group(1)
    expect(page.get_by_text(re.compile(rf"Step \d+ of {STEPS}")).first).to_be_visible()
    ledger = Ledger(home)
    wait_for_steps(ledger, run_id, 2)

    page.reload()
    heading = page.get_by_role("heading", name=re.compile("Evaluation loss fell from"))
    expect(page.get_by_text(re.compile(rf"Step \d+ of {STEPS}")).first.or_(heading)).to_be_visible()
    expect(heading).to_be_visible()
    expect(page.get_by_role("heading", name="The same prompt, before and after")).to_be_visible()
    expect(page.get_by_text("With the adapter, after 60 steps")).to_be_visible()
    assert list(steps_frame(ledger, [run_id])["step"]) == list(range(1, STEPS + 1))

    with page.expect_download() as waiting:
        page.get_by_role("button", name=re.compile("Download adapter")).click()
    with zipfile.ZipFile(io.BytesIO(waiting.value.path().read_bytes())) as archive:
        names = {name.split("/")[-1] for name in archive.namelist()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    return run_id


def sweep(page: Page, home) -> None:
    page.get_by_role("button", name="Try other ranks").click()
    expect(page.get_by_role("heading", name="Which rank and alpha?")).to_be_visible(timeout=30_000)
    expect(page).to_have_url(re.compile(r"[?&]r=4\b"))
    expect(page.get_by_text(re.compile("mine.csv")).first).to_be_visible()
    for key, unwanted in (("grid_r", ("4", "8")), ("grid_alpha", ("8",)), ("grid_seed", ("1",))):
        for label in unwanted:
            page.locator(f".st-key-{key}").get_by_role("button", name=label, exact=True).click()
    fill_number(page, "grid_steps", 20)
    expect(page.get_by_text(re.compile(r"\b4 runs")).first).to_be_visible()
    page.locator(".st-key-start_sweep button").click()
    page.wait_for_url(re.compile(r"[?&]sweep="))

    # Its worker dies half way; the page says so and has the button that goes on.
    ledger = Ledger(home)
    sweep_id = ledger.list_sweeps()[0].id
    order = ledger.get_sweep(sweep_id).run_ids
    wait_for_steps(ledger, order[1], 3)
    pid = ledger.get_run(order[1]).pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    over = [run.id for run in ledger.list_runs(sweep_id=sweep_id) if run.status == "done"]
    before = steps_frame(ledger, over)
    page.get_by_role("button", name="Resume the rest").click()
    deadline = time.monotonic() + PATIENCE / 1000
    while ledger.get_sweep(sweep_id).status != "done":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert steps_frame(ledger, over).equals(before), "a finished cell was trained twice"
    for run_id in order:
        assert list(steps_frame(ledger, [run_id])["step"]) == list(range(1, 21))
    expect(page.get_by_text(re.compile(r"Rank \d+ is enough|Rank \d+ is best|Rank \d+")).first).to_be_visible()
    expect(page.locator(".js-plotly-plot").nth(2)).to_be_visible()


def history(page: Page, run_id: str) -> None:
    open_page(page, "Runs")
    expect(page.get_by_text("5 of 5 runs")).to_be_visible()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export CSV").click()
    lines = waiting.value.path().read_text().strip().splitlines()
    assert len(lines) == 6
    assert any(run_id in line for line in lines)

    open_page(page, "Accuracy")
    expect(page.get_by_text(re.compile(r"On this machine 5 runs: the prediction was off by [\d.]+ %"))).to_be_visible()
    expect(page.locator(".js-plotly-plot").nth(1)).to_be_visible()
