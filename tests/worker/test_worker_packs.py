"""Packs through the real worker: what comes out is what runs one after another leave behind."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_engine import pack_worker
from lora_engine.assets_path import asset_path
from lora_engine.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.executors import InlineExecutor
from lora_engine.pack_files import Entry
from lora_engine.runs import Ledger, runs_frame, steps_frame
from lora_engine.sweeps import SweepSpec, resume_sweep, start_sweep
from lora_engine.training.loop import LoopState
from lora_engine.training.pack_step import PackRow

STEPS, LR = 4, 1e-2
CONFIG = RunConfig(
    data=DataConfig(path=str(asset_path("datasets/customer_support.jsonl"))),
    method=LoraConfig(target_modules="attention"),
    train=TrainConfig(steps=STEPS, batch_size=2, max_length=32, eval_every=2, eval_examples=4, device="cpu"),
)
GRID = {"rs": (1, 4), "lora_alphas": (6.0,), "lrs": (LR,), "seeds": (0, 1)}


def sweep(home, base=CONFIG, **changes):
    ledger = Ledger(home)
    sweep_id = start_sweep(ledger, SweepSpec(base=base, **(GRID | changes)), InlineExecutor(home))
    return ledger, sweep_id, ledger.list_runs(sweep_id=sweep_id)[::-1]


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    apart = np.concatenate([np.abs(ours[name] - theirs[name]).ravel() for name in ours])
    # Nearly all: AdamW moves a value whose gradient is nothing but rounding as far as any other.
    assert np.quantile(apart, 0.95) <= 2e-5
    assert apart.max() <= 2 * STEPS * LR


def assert_same_results(ledger, packed, alone):
    for one, other in zip(packed, alone, strict=True):
        assert (one.status, other.status, one.error) == ("done", "done", None)
        assert one.result.keys() == other.result.keys()
        for key in ("trainable_parameters", "total_parameters", "adapter_bytes", "steps", "method", "classes"):
            assert one.result.get(key) == other.result.get(key)
        for key in ("eval_loss_before", "eval_loss_after"):
            assert one.result[key] == pytest.approx(other.result[key], abs=1e-4)
        assert one.result["sample"]["before"] == other.result["sample"]["before"]
        assert one.result["sample"]["prompt"] == other.result["sample"]["prompt"]
        files = [ledger.run_folder(run.id) / "adapter" for run in (one, other)]
        assert len({(f / "adapter_config.json").read_text() for f in files}) == 1
        assert_close(*(load_file(f / "adapter_model.safetensors") for f in files))
        steps = [steps_frame(ledger, [run.id]) for run in (one, other)]
        assert list(steps[0]["step"]) == list(range(1, STEPS + 1))
        np.testing.assert_allclose(steps[0]["train_loss"], steps[1]["train_loss"], atol=1e-4)
        np.testing.assert_allclose(steps[0]["lr"], steps[1]["lr"])
        assert list(steps[0]["tokens"]) == list(steps[1]["tokens"])


def test_packed_and_one_after_another_give_the_same(home):
    ledger, sweep_id, packed = sweep(home, packed="always")
    _, _, alone = sweep(home, packed="never")
    assert_same_results(ledger, packed, alone)
    for one, other in zip(packed, alone, strict=True):
        assert one.result["pack"]["size"] == 4
        assert one.result["pack"]["seconds"] == pytest.approx(4 * one.result["seconds"])
        assert one.result["pack"]["peak_bytes"] > one.result["peak_bytes"]
        # Measured once a rank, on the batches of its first run.
        measured_on_the_same = one.config["train"]["seed"] == 0
        assert one.result["peak_bytes"] == pytest.approx(
            other.result["peak_bytes"], rel=0 if measured_on_the_same else 0.1
        )
        assert other.result["pack"] == {"size": 1, "reason": "packed is never"}
    assert not ledger.pack_folder(sweep_id).exists()
    frame = runs_frame(ledger, sweep_id)
    assert list(frame["pack_size"]) == [4.0] * 4


def test_a_step_alone_is_the_share_of_the_packs_step_times_what_packing_gains():
    row = PackRow("a", CONFIG, LoopState(step=10, seconds=0.5))
    assert pack_worker._alone_step(row, Entry("0", ("a",), times_faster=3.0)) == pytest.approx(0.15)
    assert pack_worker._alone_step(row, Entry("0", ("a",))) is None


def test_classifiers_have_the_head_of_their_seed(home, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("text,label\n" + "".join(f"film {i} is {w},{w}\n" for i in range(12) for w in ("good", "bad")))
    base = RunConfig(data=DataConfig(path=str(path)), method=CONFIG.method, train=CONFIG.train)
    ledger, _, packed = sweep(home, base, packed="always")
    _, _, alone = sweep(home, base, packed="never")
    assert_same_results(ledger, packed, alone)
    for one, other in zip(packed, alone, strict=True):
        assert one.result["eval_accuracy"] == other.result["eval_accuracy"]
        heads = [load_file(ledger.run_folder(r.id) / "adapter" / "trained.safetensors") for r in (one, other)]
        assert_close(*heads)


def test_what_cannot_be_packed_goes_one_after_another_and_says_why(home):
    base = RunConfig(data=CONFIG.data, method=LoraConfig(lora_dropout=0.1), train=CONFIG.train)
    _, _, records = sweep(home, base, rs=(1,))
    assert [record.status for record in records] == ["done"] * 2
    assert {record.result["pack"]["reason"] for record in records} == {
        "lora_dropout 0.1 draws masks of its own in every run"
    }


def test_a_failing_pack_says_why_in_every_row_and_can_be_resumed(home, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(12)]
    base = RunConfig(data=DataConfig(path=str(path)), method=CONFIG.method, train=CONFIG.train)
    ledger, sweep_id, records = sweep(home, base, packed="always")
    assert [record.status for record in records] == ["failed"] * 4
    assert all("rows.jsonl" in record.error for record in records)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    resume_sweep(ledger, sweep_id, InlineExecutor(home), failed=True)
    assert ledger.get_sweep(sweep_id).status == "done"
