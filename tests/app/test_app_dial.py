"""The dial's table: what the browser looks up is what the engine says."""

from dataclasses import replace

import pytest
import state
from dial.table import CANVAS_HEIGHT, CANVAS_WIDTH, DrawnModule, FullCost, answer, dial_table, drawing

from lora_engine import calc
from lora_engine.config import FullConfig, LoraConfig

OPTIONS = {"precision": "fp32", "batch_size": 8, "seq_length": 128}
MODULE = DrawnModule("self_attn.q_proj", 6, 192, 192)


@pytest.fixture(scope="module")
def rows():
    return calc.rank_table(calc.load_shape("embedded"), LoraConfig(r=1), state.RANKS, **OPTIONS)


@pytest.fixture(scope="module")
def full():
    shape = calc.load_shape("embedded")
    memory = calc.estimate_memory(shape, FullConfig(), **OPTIONS)
    return FullCost(shape.total_parameters, memory.peak_bytes, memory.terms, "fp32", shape.total_parameters * 4)


def table(rows, full, **changes):
    given = {
        "r": 8, "lora_alpha": 16.0, "alphas": state.ALPHAS, "keep_ratio": False, "use_rslora": False,
        "precision": "fp32",
    } | changes  # fmt: skip
    return dial_table(rows, full, MODULE, **given)


def test_every_rank_has_its_own_figures(rows, full):
    found = table(rows, full)
    assert [entry["value"] for entry in found["ranks"]] == list(state.RANKS)
    assert found["rank_index"] == 3
    assert found["alphas"][found["alpha_index"]] == {"value": 16.0, "label": "16"}
    entry = found["ranks"][3]
    expected = calc.count_parameters(calc.load_shape("embedded"), LoraConfig(r=8)).trainable_parameters
    assert entry["figures"][0]["value"] == f"{expected:,}"
    assert entry["figures"][0]["exact"] == f"{expected:,} parameters"
    assert entry["answer"].startswith(f"LoRA at rank 8 trains {expected:,} of ")


def test_scaling_is_looked_up_for_each_pair(rows, full):
    plain = table(rows, full)
    assert plain["scaling"][3][plain["alpha_index"]] == "2.0"
    rooted = table(rows, full, use_rslora=True)
    assert rooted["scaling_word"] == "alpha / √r"
    assert rooted["scaling"][4][rooted["alpha_index"]] == "4.0"  # 16 / sqrt(16)


def test_an_alpha_between_the_steps_gets_a_place(rows, full):
    found = table(rows, full, lora_alpha=24.0)
    assert found["alphas"][found["alpha_index"]]["value"] == 24.0
    assert [a["value"] for a in found["alphas"]] == sorted({*state.ALPHAS, 24.0})


def test_a_kept_ratio_gives_each_rank_its_alpha(rows, full):
    found = table(rows, full, r=8, lora_alpha=12.0, keep_ratio=True)
    kept = [found["alphas"][i]["value"] for i in found["kept_alpha_index"]]
    assert kept == [1.5 * r for r in state.RANKS]
    assert table(rows, full)["kept_alpha_index"] is None


def test_bars_share_one_scale(rows, full):
    found = table(rows, full)
    widths = [sum(float(part["width"][:-1]) for part in entry["bar"]) for entry in found["ranks"]]
    widths.append(sum(float(part["width"][:-1]) for part in found["full_bar"]))
    assert max(widths) == pytest.approx(100, abs=0.01)
    peaks = [row["peak_bytes"] for row in rows] + [full.peak_bytes]
    assert widths == pytest.approx([100 * peak / max(peaks) for peak in peaks], abs=0.01)


def test_another_precision_of_full_is_said(rows, full):
    other = replace(full, precision="bf16")
    assert "full fine-tuning in bf16 needs" in answer(rows[0], other, "nf4")
    assert table(rows, other, precision="nf4")["full_word"] == "Full fine-tuning, bf16"


@pytest.mark.parametrize("shape", [(192, 192), (4096, 4096), (4096, 14336), (14336, 4096), (768, 2304), (256, 64)])
@pytest.mark.parametrize("r", [1, 8, 256])
def test_the_drawing_stays_on_its_canvas_and_to_scale(shape, r):
    rows_out, columns_in = shape
    found = drawing(DrawnModule("m", 1, columns_in, rows_out), r, 256)
    boxes = {name: {k: float(v) for k, v in found[name].items()} for name in ("w0", "b", "a")}
    for box in boxes.values():
        assert box["x"] >= 0
        assert box["y"] >= 0
        assert box["x"] + box["width"] <= CANVAS_WIDTH + 0.1
        assert box["y"] + box["height"] <= CANVAS_HEIGHT
    assert boxes["w0"]["height"] == boxes["b"]["height"]
    assert boxes["w0"]["width"] == boxes["a"]["width"]
    assert boxes["w0"]["width"] / boxes["w0"]["height"] == pytest.approx(columns_in / rows_out, rel=0.02)
    if boxes["b"]["width"] > 3:
        assert boxes["b"]["width"] / boxes["w0"]["width"] == pytest.approx(r / columns_in, rel=0.02)
    assert f"{rows_out:,} by {r:,}" in found["words"]
