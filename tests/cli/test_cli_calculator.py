"""count and memory: every way of naming targets, every method, and config files that are wrong."""

import json

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_engine.cli import main
from lora_engine.config import METHOD_CONFIGS

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 200, "n_positions": 32}
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 200,
}  # fmt: skip


def run(capsys, *argv):
    try:
        code = main([*argv])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *argv):
    code, out, err = run(capsys, *argv, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.fixture
def config(tmp_path):
    """content -> the path of a config.json that holds it."""

    def write(content):
        path = tmp_path / "config.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(path)

    return write


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--targets", "c_attn,c_fc", "--layers", "0,2"], {"layers_to_transform": [0, 2]}),
        (["--exclude", "c_fc"], {"target_modules": "all-linear", "exclude_modules": ["c_fc"]}),
        (
            ["--exclude", r".*h\.[01]\..*"],
            {"target_modules": "all-linear", "exclude_modules": r".*h\.[01]\..*"},
        ),
        (["--targets", "c_attn,c_fc", "--rank-pattern", "c_fc=3"], {"rank_pattern": {"c_fc": 3}}),
        (
            ["--targets", "c_attn,c_fc", "--rank-pattern", "c_fc=3", "--rank-pattern", r"h\.1\.attn\.c_attn=5"],
            {"rank_pattern": {"c_fc": 3, r"h\.1\.attn\.c_attn": 5}},
        ),
        (["--targets", "c_attn,c_fc", "--alpha-pattern", "c_fc=3.5"], {"alpha_pattern": {"c_fc": 3.5}}),
    ],
)
def test_targets_are_named_as_in_peft(capsys, config, flags, settings):
    payload = run_json(capsys, "count", config(GPT2), "--r", "6", *flags)
    values = {k: v for k, v in GPT2.items() if k != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **values))
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=6, fan_in_fan_out=True, task_type="CAUSAL_LM", **{"target_modules": ["c_attn", "c_fc"]} | settings
            ),
        )
    assert payload["trainable_parameters"] == adapted.get_nb_trainable_parameters()[0]
    for module in payload["modules"]:
        assert module["formula"].endswith(f"= {module['trainable_parameters']:,}")


def test_experts_are_named_as_parameters(capsys):
    mixtral = ["count", "mistralai/Mixtral-8x7B-v0.1", "--target-parameters", "mlp.experts.down_proj"]
    alone = run_json(capsys, *mixtral, "--targets", "")
    assert [module["name"] for module in alone["modules"]] == ["mlp.experts.down_proj"]
    both = run_json(capsys, *mixtral, "--targets", "q_proj")
    assert both["trainable_parameters"] > alone["trainable_parameters"]


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_every_method_is_counted_and_estimated(capsys, method):
    counted = run_json(capsys, "count", "embedded", "--method", method)
    assert sum(module["trainable_parameters"] for module in counted["modules"]) == counted["trainable_parameters"]
    assert all(module["formula"] for module in counted["modules"])
    memory = run_json(capsys, "memory", "embedded", "--method", method)
    assert sum(memory["terms"].values()) == memory["peak_bytes"]
    assert memory["moment"] in ("loss", "head", "backward", "embedding", "optimizer")
    # One AdamW step holds two moments of everything that is trained; float32 or the weights' own bfloat16.
    assert memory["gradient_bytes"] in (2 * counted["trainable_parameters"], 4 * counted["trainable_parameters"])


def test_accumulation_holds_gradients_and_narrow_adapters_take_half(capsys):
    plain = run_json(capsys, "memory", "embedded")
    assert (plain["moment"], plain["terms"]["gradients"]) == ("loss", 0)
    held = run_json(capsys, "memory", "embedded", "--accumulation", "2")
    assert held["terms"]["gradients"] == held["gradient_bytes"] == plain["gradient_bytes"]
    narrow = run_json(capsys, "memory", "embedded", "--adapter-dtype", "bf16")
    assert 2 * narrow["terms"]["adapter"] == plain["terms"]["adapter"]


def test_people_read_the_moment_and_the_formula(capsys):
    assert "Highest while the loss is computed" in run(capsys, "memory", "embedded")[1]
    assert "6 x 8 x (192 + 192)" in run(capsys, "count", "embedded")[1]


BAD = {
    "lacks hidden_size": ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size of"),
    "not JSON": (b"hidden_size: 64", "is not JSON (line 1"),
    "50 MB": (b" " * 50_000_000, "is larger than 5 MB"),
    "negative layers": (LLAMA | {"num_hidden_layers": -2}, "num_hidden_layers"),
    "heads that do not divide": (LLAMA | {"num_attention_heads": 5}, "num_attention_heads"),
    "unknown architecture": ({"model_type": "mamba", "hidden_size": 64}, "lora-explorer trace"),
}


@pytest.mark.parametrize("command", ["count", "memory"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_config_is_one_line(capsys, config, command, kind):
    content, words = BAD[kind]
    code, out, err = run(capsys, command, config(content))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_a_rank_beyond_the_layer_is_a_note(capsys, config):
    payload = run_json(capsys, "count", config(LLAMA), "--r", "65")
    assert payload["notes"][-1].startswith("Rank 65 is larger than the smaller side of")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["count", "--layers", "0"], "layers is (0,); allowed: None with target_modules 'all-linear'"),
        (["count", "--targets", "q_proj", "--layers", "x"], "'x'; allowed: whole numbers separated by commas"),
        (["count", "--targets", "q_proj", "--layers", "99"], "99"),
        (["count", "--rank-pattern", "q_proj"], "'q_proj'; allowed: KEY=VALUE, the value a whole number"),
        (["count", "--rank-pattern", "q_proj=1.5"], "'q_proj=1.5'; allowed: KEY=VALUE, the value a whole number"),
        (["count", "--rank-pattern", "q_proj=0"], "rank_pattern['q_proj'] is 0; allowed: a whole number from 1"),
        (["count", "--rank-pattern", "(=1"], "rank_pattern is"),
        (["count", "--alpha-pattern", "q_proj=much"], "'q_proj=much'; allowed: KEY=VALUE, the value a number"),
        (["count", "--exclude", "("], "exclude is '('; allowed: a regular expression"),
        (["count", "--targets", "", "--target-parameters", "nothing_like_it"], "nothing_like_it"),
        (["memory", "--accumulation", "0"], "accumulation is 0; allowed: a whole number from 1"),
        (["memory", "--adapter-dtype", "int4"], "invalid choice: 'int4'"),
        (["memory", "--method", "full", "--precision", "nf4"], "precision is 'nf4'; allowed"),
    ],
)
def test_wrong_requests_are_one_line(capsys, argv, words):
    code, out, err = run(capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
