"""compare, end to end on a tiny model: both stages, inference, resuming, and what it refuses."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_engine import comparisons
from lora_engine.assets_path import asset_path
from lora_engine.cli import main
from lora_engine.runs import Ledger

CONTRACT = {
    "method", "trainable_parameters", "eval_loss_before", "eval_loss_after", "eval_accuracy", "step_seconds",
    "peak_bytes", "inference_seconds_per_token", "mergeable", "merge_max_abs_diff",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The embedded model's tokenizer and kind, two thin layers."""
    folder = tmp_path_factory.mktemp("tiny")
    config = AutoConfig.from_pretrained(asset_path("base"))
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2})
    config.update({"num_key_value_heads": 1, "head_dim": 16, "layer_types": None})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(asset_path("base") / name, folder / name)
    return str(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "parcels.jsonl"
    lines = [{"prompt": f"Where is parcel {i}", "completion": f"It left on day {i}."} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def run_json(capsys, *argv):
    code = main([*argv, "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return code, json.loads(out)


def test_two_methods_and_two_seeds(capsys, home, tiny, rows):
    request = ["compare", tiny, "--data", rows, "--methods", "lora,bottleneck", "--seeds", "0,1", "--steps", "4"]
    request += ["--batch", "4", "--seq", "48", "--device", "cpu", "--lrs", "lora:1e-3,1e-2;bottleneck:1e-3,1e-2"]
    code, payload = run_json(capsys, *request)
    assert code == 0
    assert payload["status"] == "done"
    assert payload["error"] is None
    lora, bottleneck = payload["methods"]
    for row in (lora, bottleneck):
        assert row.keys() >= CONTRACT
        assert row["eval_loss_after"] < row["eval_loss_before"]
        assert row["eval_loss_after_min"] <= row["eval_loss_after"] <= row["eval_loss_after_max"]
        losses = {cell["lr"]: cell["eval_loss_after"] for cell in row["tried"]}
        assert row["lr"] == min(losses, key=losses.get)
        assert row["num_seeds"] == 2
        assert row["inference_seconds_per_token"] > 0
    assert lora["eval_loss_before"] == pytest.approx(bottleneck["eval_loss_before"], abs=1e-6)  # both start at the base
    assert (lora["mergeable"], bottleneck["mergeable"]) == (True, False)
    assert lora["merge_max_abs_diff"] <= 1e-4
    assert bottleneck["merge_max_abs_diff"] is None
    assert payload["inference"]["noise_low"] <= 1 <= payload["inference"]["noise_high"]
    assert payload["conclusion"].startswith("LoRA's loss is")

    ledger = Ledger(home)
    runs = ledger.list_runs()
    assert len(runs) == 2 * (2 + 1)
    finished = {run.id: run.finished for run in runs}
    # The same request: everything is there already, nothing is trained again.
    assert main(request) == 0
    text = capsys.readouterr().out
    assert "bottleneck" in text
    assert payload["conclusion"] in text
    assert {run.id: run.finished for run in ledger.list_runs()} == finished

    # Inference lost, as by a kill before its end: only that is done again.
    sweep, _ = comparisons.read_cells(ledger, payload["comparison_id"])
    comparisons.write_state(ledger, sweep, {"doing": None, "inference": None})
    assert comparisons.read_comparison(ledger, sweep.id)["status"] == "interrupted"
    code, again = run_json(capsys, *request)
    assert again["status"] == "done"
    assert again["methods"][0]["merge_max_abs_diff"] == lora["merge_max_abs_diff"]
    assert {run.id: run.finished for run in ledger.list_runs()} == finished


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--methods", "lora,magic"], "methods is 'lora,magic'; allowed: names of lora, full"),
        (["--methods", "lora,lora"], "methods is 'lora,lora'; allowed"),
        (["--lrs", "fast"], "lr is 'fast'; allowed: numbers separated by commas"),
        (["--lrs", "lora:1e-3,3e-3", "--methods", "lora,full"], "equally many learning rates"),
        (["--seeds", ""], "seeds"),
        (["--steps", "0"], "steps is 0"),
        (["--eval-rows", "0"], "eval"),
        (["--prefix-length", "200", "--seq", "128"], "prefix-length is 200; allowed: at most 128 beside 128 tokens"),
    ],
)
def test_wrong_requests_are_one_line(capsys, home, rows, argv, words):
    assert main(["compare", "--data", rows, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert Ledger(home).list_sweeps() == []
