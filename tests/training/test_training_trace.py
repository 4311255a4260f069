"""The tracer against steps that really run, and the instant formula against the tracer."""

import statistics

import pytest
from benchmarks.memory import Case, compare, config_of, measure, random_cases
from transformers import CONFIG_MAPPING

from lora_engine import calc
from lora_engine.calc.memory import TERMS
from lora_engine.config import (
    BottleneckConfig,
    FullConfig,
    HeadConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    TrainConfig,
)
from lora_engine.errors import ModelLoadError, NotFoundError, UnknownArchitectureError
from lora_engine.training.trace import CATEGORIES, load_config, trace_memory, trace_step

SMALL = (128, 4, 2, 384, 1000)
STEP = TrainConfig(batch_size=4, max_length=128)


@pytest.mark.parametrize(
    ("family", "method", "precision", "checkpointing", "attention"),
    [
        ("llama", LoraConfig(r=8), "fp32", False, "sdpa"),
        ("llama", FullConfig(), "bf16", False, "sdpa"),
        ("llama", LoraConfig(r=8), "mixed-bf16", True, "sdpa"),
        ("llama", HeadConfig(), "fp32", False, "sdpa"),
        ("llama", BottleneckConfig(), "bf16", False, "sdpa"),
        ("llama", PrefixConfig(), "fp32", False, "sdpa"),
        ("llama", IA3Config(), "fp32", False, "sdpa"),
        ("llama", LoraConfig(r=8, use_dora=True), "fp32", False, "sdpa"),
        ("gpt2", LoraConfig(r=8), "bf16", False, "eager"),
        ("phi3", FullConfig(), "fp32", False, "sdpa"),
        ("gemma2", LoraConfig(r=8), "fp32", False, "eager"),
        ("mixtral", LoraConfig(r=8, target_modules="attention"), "fp32", False, "sdpa"),
        ("mixtral", FullConfig(), "bf16", False, "sdpa"),
        ("bert", LoraConfig(r=8), "fp32", False, "sdpa"),
    ],
    ids=str,
)
def test_the_trace_is_what_a_real_step_takes(family, method, precision, checkpointing, attention):
    """Within 1 % of the tracked bytes of the same step, run for real."""
    train = TrainConfig(batch_size=4, max_length=128, precision=precision, checkpointing=checkpointing)
    case = Case(family, SMALL, 2, method, train, attention)
    traced = trace_step(config_of(family, SMALL, 2), method, train, attention=attention)
    assert traced.peak_bytes == pytest.approx(measure(case), rel=0.01)


def test_the_formula_holds_over_random_combinations():
    """A part of the benchmark's combinations; there are 300 in tests/benchmarks/results/memory.json."""
    rows = [compare(case) for case in random_cases(24, seed=1)]
    off = sorted(abs(row["difference_percent"]) for row in rows)
    assert statistics.median(off) <= 1.0
    assert off[-1] <= 5.0, max(rows, key=lambda row: abs(row["difference_percent"]))
    for row in rows:
        for term in ("weights", "adapter", "optimizer"):  # arithmetic; buffers and step counters are beside it
            assert row["predicted_terms"][term] == pytest.approx(row["traced_terms"][term], abs=400_000)


def test_deep_models_are_continued_from_shallow_ones():
    config = config_of("llama", SMALL, 10)
    for method in (LoraConfig(r=8), FullConfig()):
        whole, continued = trace_step(config, method, STEP), trace_memory(config, method, STEP)
        assert continued.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-3)
        assert continued.total_parameters == whole.total_parameters
        assert continued.trainable_parameters == whole.trainable_parameters
    # A config with an entry for every layer is cut along with the layers.
    lists = CONFIG_MAPPING["qwen3"](
        **config_of("qwen3", SMALL, 10).to_dict() | {"layer_types": ["full_attention"] * 10}
    )
    assert trace_memory(lists, LoraConfig(r=8), STEP).peak_bytes > 0


def test_a_trace_counts_what_the_calculator_counts():
    for family in ("llama", "gpt2", "mixtral"):
        config = config_of(family, SMALL, 2)
        method = LoraConfig(r=8)
        traced = trace_step(config, method, STEP)
        counted = calc.count_parameters(calc.shape_from_config(config.to_dict(), family), method)
        assert traced.total_parameters == counted.total_parameters
        assert traced.trainable_parameters == counted.trainable_parameters
        assert set(traced.terms) == set(CATEGORIES) == set(TERMS)
        assert sum(traced.terms.values()) == traced.peak_bytes


def test_an_architecture_that_the_calculator_does_not_know_can_be_traced():
    config = CONFIG_MAPPING["helium"](
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        head_dim=16, vocab_size=200, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with pytest.raises(UnknownArchitectureError):
        calc.shape_from_config(config.to_dict(), "helium")
    traced = trace_memory(config, LoraConfig(r=4), STEP)
    assert traced.trainable_parameters == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


@pytest.mark.parametrize("model", ["embedded", "gpt2", "meta-llama/Llama-3.1-8B"])
def test_configs_by_name(model):
    assert load_config(model).vocab_size > 0


def test_configs_that_are_none(tmp_path):
    with pytest.raises(NotFoundError, match="no/such-model"):
        load_config("no/such-model")
    for text in ("{", '{"model_type": "of my own"}', "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelLoadError, match="transformers cannot read its config"):
            load_config(str(tmp_path))
