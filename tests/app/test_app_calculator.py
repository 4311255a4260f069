"""The calculator on the page: one's own config.json, what fits, compute, methods, traces, and how good it all was."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from app_pages import finished_run, open_page, texts
from state import Settings
from tracing import difference_sentence, trace_arguments, trace_error, traced_table

from lora_engine import calc
from lora_engine.config import LoraConfig
from lora_engine.runs import store_config

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
    "tie_word_embeddings": False,
}  # fmt: skip
BIG = {"model": "meta-llama/Llama-3.1-70B", "precision": "bf16", "batch": "8", "seq": "2048", "r": "32"}


def drop_config(app, content):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    app.session_state["own_config"] = True  # the fold, open
    app.run()
    app.file_uploader(key="config_upload").upload("config.json", content, "application/json").run()
    assert not app.exception
    return app


def errors(app):
    return [str(error.value) for error in app.error]


def tables(app):
    return [table.value for table in app.dataframe]


def test_a_dropped_config_becomes_the_model(home):
    app = drop_config(open_page(), LLAMA)
    model = Path(app.session_state["_settings"].model)
    assert model.parent == home / "models"
    assert model.name.startswith("llama-")
    assert not errors(app)
    # The address it leaves behind brings it back, and every page can use it.
    again = open_page(model=str(model))
    assert again.session_state["_settings"].model == str(model)
    assert not errors(again)
    assert str(model) in again.selectbox(key="model").options
    assert calc.load_shape(str(model)).num_layers == 3


BAD_CONFIGS = {
    "lacks hidden_size": (
        {k: v for k, v in LLAMA.items() if k != "hidden_size"},
        "hidden_size of config.json is missing",
    ),
    "not JSON": (b"hidden_size: 64", "config.json is not JSON (line 1"),
    "not text": (b"\xff\xfe\x00{", "config.json is not text in UTF-8"),
    "a list": (b"[1, 2]", "config.json holds a JSON list; allowed: a JSON object"),
    "50 MB": (b" " * 50_000_000, "config.json has 50.0 MB; at most 5 MB are read"),
    "negative layers": (LLAMA | {"num_hidden_layers": -2}, "num_hidden_layers of config.json is -2; allowed: a whole"),
    "heads that do not divide": (LLAMA | {"num_attention_heads": 5}, "num_attention_heads of config.json is 5"),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_bad_config_is_one_clear_sentence_and_the_model_stays(home, kind):
    content, words = BAD_CONFIGS[kind]
    app = drop_config(open_page(), content)
    assert len(errors(app)) == 1
    assert words in errors(app)[0]
    assert str(home) not in errors(app)[0]
    assert app.session_state["_settings"].model == "embedded"
    assert not list(home.rglob("models/*/config.json"))
    # Choosing another model takes the sentence away.
    app.selectbox(key="model").set_value("openai-community/gpt2").run()
    assert not errors(app)


def test_an_unknown_architecture_is_shown_with_a_button_that_traces_it():
    app = drop_config(open_page(), {"model_type": "mamba", "hidden_size": 64})
    assert "which the formulas do not know" in app.warning[0].value
    assert not errors(app)
    settings = app.session_state["_settings"]
    assert settings.model == "embedded"
    assert Path(settings.unknown_model).name.startswith("mamba-")
    assert app.button(key="trace").label == "Trace it"
    assert trace_arguments(settings)[0] == settings.unknown_model


def test_a_rank_beyond_the_layer_is_noted():
    assert "larger than the smaller side" not in texts(open_page(r="8"))
    assert "Rank 256 is larger than the smaller side of" in texts(open_page(r="256"))


def test_a_config_of_any_type_gets_a_folder_of_its_own(home):
    folder = store_config(home, json.dumps({"model_type": "../../etc/x" * 30}).encode())
    assert folder.parent == home / "models"
    assert store_config(home, b"nonsense").name.startswith("model-")
    assert store_config(home, b"nonsense") == store_config(home, b"nonsense")


def test_the_moment_of_the_peak_is_said():
    text = texts(open_page())
    assert "comes while the loss is computed" in text
    assert "gradients do not exist yet" in text


def test_accumulation_and_the_adapters_type_reach_the_estimate_and_the_address():
    app = open_page(accumulation="4", adapter_dtype="bf16")
    options = app.session_state["_settings"].memory_options
    assert (options["accumulation"], options["adapter_dtype"]) == (4, "bf16")


def test_what_fits_and_what_would():
    app = open_page(**BIG, card="A100, 80 GB")
    text = texts(app)
    assert "A100, 80 GB: **does not fit 80.0 GiB**, with the interval as shipped" in text
    assert "The gentlest way: " in text
    table = next(table for table in tables(app) if "saves" in table)
    assert list(table["fits"])
    assert table["words"].str.contains("gradient checkpointing").any()


def test_a_single_change_is_applied_to_the_sidebar():
    app = open_page(**BIG, card="A100, 80 GB")
    app.button_group(key="take_change").set_value("Turn on gradient checkpointing").run()
    assert not app.exception
    assert app.session_state["_settings"].checkpointing is True


def test_the_whole_plan_is_applied_and_then_it_fits():
    app = open_page(**BIG, card="A100, 80 GB")
    app.button(key="apply_plan").click().run()
    assert not app.exception
    settings = app.session_state["_settings"]
    memory = calc.estimate_memory(
        calc.load_shape(settings.model), settings.method, precision=settings.precision, **settings.memory_options
    )
    card = calc.find_gpu("A100, 80 GB")
    assert memory.peak_bytes <= calc.fit.card_room(card.memory_bytes)
    assert "The gentlest way" not in texts(app)


def test_a_lower_rank_keeps_the_ratio():
    import streamlit as st
    from state import apply_change

    from lora_engine.config import FullConfig

    st.session_state.update({"r": 32, "_last_r": 32, "lora_alpha": 16.0, "keep_ratio": True, "targets": "mlp"})
    apply_change(LoraConfig(r=8, target_modules="attention"), {"batch_size": 2, "accumulation": 4})
    assert {key: st.session_state[key] for key in ("r", "lora_alpha", "targets", "batch", "accumulation")} == {
        "r": 8, "lora_alpha": 4.0, "targets": "attention", "batch": 2, "accumulation": 4,
    }  # fmt: skip
    apply_change(FullConfig(), {})
    assert st.session_state["r"] == 8


def test_the_largest_of_everything_is_what_the_engine_says():
    import cache
    from fitting import changes_table

    method, options = LoraConfig(r=16), Settings(seq_length=2048).memory_options
    shape, room = calc.load_shape("meta-llama/Llama-3.1-8B"), 40 * 2**30
    found = cache.limits(shape.name, method, "bf16", options, room)
    peak = calc.estimate_memory(shape, method, precision="bf16", **(options | {"batch_size": found["batch"]}))
    more = calc.estimate_memory(shape, method, precision="bf16", **(options | {"batch_size": found["batch"] + 1}))
    assert peak.peak_bytes <= room < more.peak_bytes
    plan, single = cache.changes(shape.name, method, "bf16", options, room)
    assert plan[-1].fits
    assert list(changes_table(single)["words"]) == [change.words for change in single]


def test_compute_is_a_line_with_its_card_and_utilisation():
    app = open_page(model="meta-llama/Llama-3.1-8B", precision="bf16", card="H100, 80 GB", checkpointing="true")
    line = next(str(m.value) for m in app.markdown if "A step takes" in str(m.value))
    assert "on H100, 80 GB at 40 % of its peak" in line
    assert "1,000 steps" in line
    flops = calc.count_step_flops(calc.load_shape("meta-llama/Llama-3.1-8B"), LoraConfig(), 8, 128, checkpointing=True)
    seconds = calc.estimate_step_seconds(flops.total, calc.find_gpu("H100, 80 GB"), "bf16")
    from formatting import format_duration, format_flops

    assert format_flops(flops.total) in line
    assert format_duration(seconds) in line
    app.session_state["compute"] = True  # the fold, open
    app.run()
    assert "by its data sheet" in texts(app)
    app.number_input(key="compute_steps").set_value(50).run()
    assert "50 steps" in next(str(m.value) for m in app.markdown if "A step takes" in str(m.value))


def test_every_method_is_counted_with_its_arithmetic():
    import cache

    table = cache.methods_table("openai-community/gpt2", LoraConfig(r=4)).set_index("method")
    shape = calc.load_shape("openai-community/gpt2")
    assert {"lora", "full", "head", "bottleneck", "prefix"} <= set(table.index)
    assert table.loc["full", "trainable_parameters"] == shape.total_parameters
    for formula in table["formula"]:
        left, _, right = formula.partition(" = ")
        numbers = left.replace(" x ", " * ").replace("experts", "")
        assert eval(numbers) == int(right.replace(",", ""))


# Traces


TRACED = {
    "model": "gpt2", "total_parameters": 1000, "trainable_parameters": 100, "peak_bytes": 1000, "peak_phase": "loss",
    "terms": {
        "weights": 500, "adapter": 50, "gradients": 0, "optimizer": 100, "activations": 250, "logits": 100,
        "overhead": 0,
    },
    "phases": {"loss": 1000}, "seconds": 2.5, "notes": [],
}  # fmt: skip


def test_a_trace_beside_the_formula():
    terms = TRACED["terms"] | {"activations": 260, "overhead": 5}
    estimate = calc.MemoryEstimate(
        terms=terms, moment="loss", peak_bytes=1015, low_bytes=1000, high_bytes=1030, gradient_bytes=50,
        inference_bytes=600,
    )  # fmt: skip
    counted = calc.ParameterCount(1000, 100, 10.0, (), ())
    table = traced_table(TRACED, estimate, counted).set_index("figure")
    assert list(table.index) == [
        "Parameters", "Trainable parameters", "Base weights", "Adapter", "Optimizer", "Activations",
        "Logits and overhead", "Peak",
    ]  # fmt: skip
    assert list(table.loc["Activations"]) == ["260 B", "250 B", "+1.00 %"]
    assert list(table.loc["Peak"]) == ["0.991 KiB", "0.977 KiB", "+1.50 %"]
    assert table.loc["Parameters", "difference"] == "none"
    sentence = difference_sentence(TRACED, estimate)
    assert "needs **0.977 KiB** at its peak, while the loss is computed" in sentence
    assert "**1.50 % above it**" in sentence


def test_a_trace_alone():
    table = traced_table(TRACED)
    assert list(table.columns) == ["figure", "traced"]
    assert "formula" not in difference_sentence(TRACED, None).lower()


def test_the_arguments_are_those_of_the_command_line():
    from lora_engine.assets_path import absolute_model

    settings = Settings(
        model="openai-community/gpt2", r=4, lora_alpha=6.0, targets=("c_attn", "c_fc"), checkpointing=True
    )
    arguments = trace_arguments(settings)
    assert arguments[0] == absolute_model("openai-community/gpt2")
    assert dict(zip(arguments[1:-1:2], arguments[2:-1:2], strict=True)) == {
        "--method": "lora", "--precision": "fp32", "--batch": "8", "--seq": "128", "--attention": "sdpa",
        "--accumulation": "1", "--optimizer": "adamw", "--r": "4", "--alpha": "6.0", "--targets": "c_attn,c_fc",
    }  # fmt: skip
    assert arguments[-1] == "--checkpointing"


def traces(app):
    app.session_state["trace_fold"] = True
    app.run()
    app.button(key="trace").click().run(timeout=120)
    assert not app.exception
    return next(table for table in tables(app) if "traced" in table)


def test_a_known_model_is_traced_beside_its_formula():
    app = drop_config(open_page(batch="2", seq="16", r="4"), LLAMA)
    table = traces(app).set_index("figure")
    assert not errors(app)
    assert table.loc["Parameters", "difference"] == table.loc["Trainable parameters", "difference"] == "none"
    off = table.loc["Peak", "difference"].removesuffix(" %").replace("−", "-")
    assert off in ("none", "under 0.01") or abs(float(off)) <= 5
    assert "The formula is **" in texts(app)
    # It stays while the settings stay, goes when they change, and comes back with them.
    app.select_slider(key="r").set_value(8).run()
    assert app.button(key="trace").label == "Trace it"
    app.select_slider(key="r").set_value(4).run()
    assert any("traced" in table for table in tables(app))


def test_an_unknown_architecture_is_traced_in_place_of_a_formula():
    codegen = {"model_type": "codegen", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "rotary_dim": 4}
    app = drop_config(open_page(batch="2", seq="16", attention_kernel="eager"), codegen)
    app.button(key="trace").click().run(timeout=120)
    assert not errors(app)
    table = next(table for table in tables(app) if "traced" in table)
    assert list(table.columns) == ["figure", "traced"]
    # Counted by transformers itself.
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        facts = {key: value for key, value in codegen.items() if key != "model_type"}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("codegen", **facts))
    assert table["traced"][0] == f"{sum(p.numel() for p in model.parameters()):,}"


def test_a_trace_that_fails_says_why_once_and_can_be_tried_again():
    app = drop_config(open_page(), {"model_type": "no_such_architecture", "hidden_size": 64})
    app.button(key="trace").click().run(timeout=120)
    assert len(errors(app)) == 1
    assert "transformers cannot read its config" in errors(app)[0]
    app.select_slider(key="r").set_value(4).run()
    assert app.button(key="trace").label == "Trace it"
    assert "choose eager" in trace_error("X does not support ... scaled_dot_product_attention yet.")


def test_a_quantised_step_is_not_traced():
    app = open_page(precision="nf4", model="openai-community/gpt2")
    app.session_state["trace_fold"] = True
    app.run()
    assert app.button(key="trace").disabled


# Accuracy


def test_accuracy_starts_with_the_one_button_that_fills_it():
    app = open_page("views/accuracy.py")
    assert [button.key for button in app.button] == ["first_run"]
    app.button(key="first_run").click().run()
    assert app.header[0].value == "What happens on my data?"


def test_accuracy_of_a_single_run(home):
    finished_run(home, predicted=1000, peak_bytes=1020)
    text = texts(open_page("views/accuracy.py"))
    assert "On this machine 1 run: the prediction was off by 2.00 %." in text
    assert "From 8 runs on it is calibrated on yours (1 run so far)." in text


def test_accuracy_of_many_runs_calibrates_explore(home):
    for i in range(24):
        finished_run(home, r=8, seed=i, predicted=10_000, peak_bytes=10_000 + 10 * (i - 12))
    app = open_page("views/accuracy.py")
    text = texts(app)
    assert "On this machine 24 runs: the prediction was off by 0.600 % in the median and 1.20 % at worst." in text
    assert "calibrated on 24 runs: ±1.20 % holds for a like run with 95 %" in text
    assert len(tables(app)[0]) == 24
    explore = open_page()
    assert "**fits 12.0 GiB with 95 %**, from 24 runs on this machine" in texts(explore)


def test_runs_on_a_card_are_told_from_runs_on_the_cpu(home):
    import cache

    for i in range(8):
        finished_run(home, seed=i, predicted=1000, peak_bytes=1000 + i, peak_kind="allocated", reserved_bytes=1500)
        finished_run(home, seed=i, predicted=1000, peak_bytes=1100)
    text = texts(open_page("views/accuracy.py"))
    assert "8 runs, allocated on the card: 0.350 % in the median, 0.700 % at worst." in text
    assert "8 runs, tensor bytes on the CPU: 10.0 % in the median" in text
    # Cards are what Explore speaks of, so the runs on one count first.
    interval = cache.interval()
    assert (interval.level_percent, interval.count) == (88, 8)
    assert interval.high_percent == pytest.approx(0.7)
    assert isinstance(cache.accuracy(), pd.DataFrame)
