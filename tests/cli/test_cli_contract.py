"""The command line's contract: keys, exit codes, one line on standard error, and a real train and sweep."""

import json
import socket
import subprocess
import sys
import time

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_engine import cli
from lora_engine.assets_path import asset_path
from lora_engine.cli import main
from lora_engine.commands import COMMANDS, find_command
from lora_engine.config import TrainConfig
from lora_engine.export import load_adapter
from lora_engine.runs import Ledger, runs_frame
from lora_engine.sweeps import early_exit_bill
from lora_engine.sweeps.packing import PACKED
from lora_engine.training.base import load_base, resolve_model

SUPPORT = str(asset_path("datasets/customer_support.jsonl"))
SMALL = ["--steps", "6", "--batch", "4", "--seq", "64", "--device", "cpu"]


def run_json(capsys, *argv):
    code = main([*argv, "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return code, json.loads(out)


def test_count(capsys):
    code, payload = run_json(capsys, "count", "gpt2", "--r", "8", "--targets", "c_attn")
    assert code == 0
    assert payload["trainable_parameters"] == 294_912
    assert payload["total_parameters"] == 124_439_808
    assert {"model", "trainable_percent", "modules", "notes"} <= payload.keys()
    assert {"name", "count", "in_features", "out_features", "trainable_parameters"} <= payload["modules"][0].keys()
    assert sum(module["trainable_parameters"] for module in payload["modules"]) == 294_912


def test_memory(capsys):
    code, payload = run_json(
        capsys, "memory", "meta-llama/Llama-2-7b-hf", "--targets", "q_proj,v_proj", "--precision", "nf4"
    )
    assert code == 0
    assert set(payload["terms"]) == {
        "weights", "adapter", "gradients", "optimizer", "activations", "logits", "overhead",
    }  # fmt: skip
    assert payload["low_bytes"] <= payload["peak_bytes"] <= payload["high_bytes"]
    assert payload["inference_bytes"] < payload["peak_bytes"]
    assert {"name", "memory_bytes", "fits", "max_batch"} <= payload["gpus"][0].keys()


def test_data(capsys):
    code, payload = run_json(capsys, "data", SUPPORT)
    assert code == 0
    assert payload["format"] == "jsonl"
    assert payload["task"] == "prompt_completion"
    assert payload["rows"] >= 200
    keys = {"columns", "examples", "tokens", "dropped", "warnings", "preview"}
    assert keys <= payload.keys()


def test_data_with_labels_says_its_classes(capsys, tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "".join(f"film {i} is {w},{w}\n" for i in range(12) for w in ("good", "bad")))
    _, payload = run_json(capsys, "data", str(path))
    assert payload["classes"] == [{"name": "bad", "rows": 12}, {"name": "good", "rows": 12}]
    assert payload["trained_tokens"] == payload["examples"] == 24
    assert main(["data", str(path)]) == 0
    assert "\n2 classes: bad 12, good 12.\n" in capsys.readouterr().out + "\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["count", "gpt2", "--json"], ["memory", "gpt2"], ["count", "embedded"], ["data", SUPPORT], ["runs"],
    ],
)  # fmt: skip
def test_commands_for_people_print_text(capsys, argv):
    assert main(argv) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["count", "no/such-model"], "no/such-model"),
        (["count", "--r", "0"], "r is 0; allowed: a whole number from 1"),
        (["count", "--r", "many"], "--r: invalid int value: 'many'"),
        (["count", "--targets", "nonsense"], "nonsense"),
        (["memory", "--precision", "fp12"], "invalid choice: 'fp12'"),
        (["memory", "--batch", "0"], "batch"),
        (["data", "missing.csv"], "data is 'missing.csv'; allowed: the path of a file that exists"),
        (["train", "--data", "missing.csv"], "missing.csv"),
        (["train", "--data", SUPPORT, "--steps", "0"], "steps is 0; allowed: a whole number from 1"),
        (["train", "--data", SUPPORT, "--lr", "-1"], "lr is -1.0; allowed"),
        (["train", "--data", SUPPORT, "--seq", "9999"], "at most 256"),
        (["train", "no/such-model", "--data", SUPPORT], "no/such-model"),
        (["sweep", "--data", SUPPORT, "--r", "1,x"], "'1,x'; allowed: whole numbers separated by commas"),
        (["sweep", "--data", SUPPORT, "--r", ""], "r"),
        (["generate", "nothing", "--prompt", "Hi"], "nothing"),
        (["runs", "show", "../../etc"], "../../etc"),
        (["runs", "show"], "run is missing"),
        (["pretrain", "--corpus", "nowhere", "--out", "x"], "nowhere"),
        (["app", "--port", "99999999"], "port is 99999999; allowed"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_wrong_requests_exit_with_2_and_one_line(capsys, argv, words):
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert "Traceback" not in captured.err


def test_the_dashboard_says_that_its_port_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "lora_engine.cli", "app", "--no-browser", "--port", port]
        done = subprocess.run([*command, "--home", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"is port {port} in use?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_ways_to_pack_are_those_of_the_engine():
    assert cli.PACKED == PACKED


def test_every_command_has_its_function():
    assert all(callable(find_command(name)) for name in COMMANDS)


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_train_then_peft_loads_the_adapter_and_the_dial_turns(capsys, home, targets):
    code, payload = run_json(
        capsys, "train", "embedded", "--data", SUPPORT, "--r", "4", "--alpha", "6", "--targets", targets, *SMALL
    )
    assert code == 0
    assert payload["status"] == "done"
    assert payload["steps"] == 6
    assert payload["eval_loss_after"] < payload["eval_loss_before"]
    keys = {
        "run_id", "method", "trainable_parameters", "total_parameters", "seconds", "tokens_per_second",
        "peak_bytes", "predicted_peak_bytes", "adapter_bytes",
    }  # fmt: skip
    assert all(payload[key] for key in keys)

    adapter = Ledger(home).run_folder(payload["run_id"]) / "adapter"
    ids = torch.arange(20, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(resolve_model("embedded"), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    ours = load_base(resolve_model("embedded"), TrainConfig(), torch.device("cpu")).eval()
    load_adapter(ours, adapter)
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-4
    trained = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    assert trained == payload["trainable_parameters"]

    run = payload["run_id"]
    prompt = ["--prompt", "My parcel has not arrived.", "--max-tokens", "12"]
    _, zero = run_json(capsys, "generate", run, *prompt, "--scale", "0", "--eval")
    _, one = run_json(capsys, "generate", run, *prompt, "--eval")
    assert zero["eval_loss"] == pytest.approx(payload["eval_loss_before"], abs=1e-6)
    assert one["eval_loss"] == pytest.approx(payload["eval_loss_after"], abs=1e-6)

    code, shown = run_json(capsys, "runs", "show", run)
    assert shown["run_id"] == run
    code, listed = run_json(capsys, "runs", "list")
    assert [r["run_id"] for r in listed["runs"]] == [run]
    assert run_json(capsys, "runs", "delete", run)[0] == 0
    assert not adapter.exists()


def test_full_fine_tuning_leaves_a_model_folder(capsys, home):
    _, payload = run_json(capsys, "train", "--data", SUPPORT, "--method", "full", *SMALL)
    folder = Ledger(home).run_folder(payload["run_id"]) / "adapter"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == payload["trainable_parameters"] == payload["total_parameters"]
    _, text = run_json(capsys, "generate", payload["run_id"], "--prompt", "Hello", "--max-tokens", "4")
    assert text["scale"] == 1.0
    code = main(["generate", payload["run_id"], "--prompt", "Hello", "--scale", "0.5"])
    assert code == 2
    assert "scale is 0.5; allowed: 0 or 1 for method full" in capsys.readouterr().err


def test_a_prefix_is_trained_and_generates(capsys, home):
    small = [*SMALL, "--steps", "2", "--batch", "2"]
    _, payload = run_json(capsys, "train", "--data", SUPPORT, "--method", "prefix", "--prefix-length", "3", *small)
    assert (payload["status"], payload["method"]) == ("done", "prefix")
    assert payload["trainable_parameters"] == 3 * 2 * 6 * 64  # length, keys and values, layers, width of the keys
    folder = Ledger(home).run_folder(payload["run_id"]) / "adapter"
    assert {path.name for path in folder.iterdir()} == {"method_config.json", "trained.safetensors"}
    _, text = run_json(capsys, "generate", payload["run_id"], "--prompt", "Hello", "--max-tokens", "4")
    assert text["scale"] == 1.0


def test_texts_with_labels_train_a_classifier(capsys, tmp_path, home):
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "".join(f"film {i} is {w},{w}\n" for i in range(12) for w in ("good", "bad")))
    _, payload = run_json(capsys, "train", "--data", str(path), "--method", "head", *SMALL, "--lr", "0.01")
    assert payload["status"] == "done"
    assert payload["eval_loss_after"] < payload["eval_loss_before"]
    assert 0 <= payload["eval_accuracy"] <= 1
    assert 0 <= payload["eval_macro_f1"] <= 1
    assert payload["predicted_peak_bytes"] == pytest.approx(payload["peak_bytes"], rel=0.03)
    prediction = Ledger(home).get_run(payload["run_id"]).prediction
    for key in ("trainable_parameters", "total_parameters"):
        assert prediction[key] == payload[key]
    assert prediction["adapter_bytes"] == pytest.approx(payload["adapter_bytes"], abs=100)
    _, text = run_json(capsys, "generate", payload["run_id"], "--prompt", "film 3 is good", "--eval")
    assert text["text"] in ("good", "bad")
    assert text["eval_accuracy"] == payload["eval_accuracy"]


def test_sweep(capsys):
    code, payload = run_json(capsys, "sweep", "--data", SUPPORT, "--r", "1,4", "--alpha", "6", "--seeds", "0,1", *SMALL)
    assert code == 0
    assert payload["status"] == "done"
    assert len(payload["runs"]) == 4
    assert {(run["r"], run["seed"]) for run in payload["runs"]} == {(1, 0), (1, 1), (4, 0), (4, 1)}
    assert payload["recommended"]["r"] in (1, 4)
    assert payload["recommended"]["reason"]
    assert (payload["packed"], payload["early_exit"]) == ("auto", None)
    assert payload["estimated_seconds"]["sequential"] > 0
    assert payload["estimated_seconds"]["packed"] is None  # nothing was packed before
    assert all(run["pack"]["reason"] for run in payload["runs"])
    sweep_id = payload["sweep_id"]
    assert run_json(capsys, "runs", "show", sweep_id)[1]["status"] == "done"
    code, again = run_json(capsys, "runs", "resume", sweep_id)
    assert again["status"] == "done"
    assert run_json(capsys, "runs", "delete", sweep_id)[0] == 0
    assert run_json(capsys, "runs")[1] == {"runs": []}


def test_sweep_with_early_exit_and_the_full_grid_afterwards(capsys, home):
    grid = ["--r", "1,4", "--alpha", "6", "--seeds", "0", "--targets", "attention"]
    ways = ["--packed", "always", "--early-exit", "--steps", "6", "--batch", "2", "--seq", "32", "--device", "cpu"]
    code, payload = run_json(capsys, "sweep", "--data", SUPPORT, *grid, *ways)
    assert (code, payload["status"]) == (0, "done")
    assert payload["early_exit"]["num_dropped"] == 1
    assert payload["early_exit"]["regret"] is None
    (dropped,) = [run for run in payload["runs"] if run["early_exit"]]
    assert (dropped["status"], dropped["eval_loss_after"]) == ("cancelled", None)
    code, _ = run_json(capsys, "runs", "resume", payload["sweep_id"])
    assert code == 0
    ledger, deadline = Ledger(home), time.monotonic() + 120
    while ledger.get_run(dropped["run_id"]).status != "done":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert early_exit_bill(runs_frame(ledger, payload["sweep_id"])).regret >= 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sweep", "--data", SUPPORT, "--packed", "perhaps"], "invalid choice: 'perhaps'"),
        (["data", "~nosuchuser/rows.csv"], "~nosuchuser/rows.csv"),
        (["train", "--data", SUPPORT, "--seq", "4"], "seq is 4; allowed: a whole number from 8"),
        (["train", "--data", SUPPORT, "--method", "prefix", "--prefix-length", "-1"], "prefix-length is -1; allowed"),
        (["count", "--method", "bottleneck", "--reduction-factor", "0"], "reduction-factor is 0; allowed"),
        (["train", "--data", SUPPORT, "--method", "full", "--precision", "fp16"], "precision is 'fp16'; allowed: fp32"),
        (["sweep", "--data", SUPPORT, "--alpha", "-1"], "alpha"),
        (["pretrain", "--corpus", "CORPUS", "--out", "OUT", "--seed", "-1"], "seed is -1; allowed"),
        (["pretrain", "--corpus", "CORPUS", "--out", "OUT", "--hidden", "0"], "hidden is 0; allowed"),
        (["pretrain", "--corpus", "CORPUS", "--out", "OUT"], "a.txt is not UTF-8"),
    ],
)
def test_odd_requests_too(capsys, tmp_path, argv, words):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 50)
    argv = [{"CORPUS": str(tmp_path), "OUT": str(tmp_path / "out")}.get(part, part) for part in argv]
    try:
        code = main(argv)
    except SystemExit as stop:  # what argparse itself refuses
        code = stop.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_a_long_continuation_keeps_its_prompt(capsys):
    _, payload = run_json(capsys, "train", "--data", SUPPORT, *SMALL)
    prompt = ["--prompt", "The parcel with the blue kettle never came to my house in York."]
    _, short = run_json(capsys, "generate", payload["run_id"], *prompt, "--max-tokens", "8")
    _, long = run_json(capsys, "generate", payload["run_id"], *prompt, "--max-tokens", "4096")
    assert long["text"].startswith(short["text"])
