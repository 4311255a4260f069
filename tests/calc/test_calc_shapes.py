"""Shapes against the models that transformers builds (on the meta device), and every way a config.json is bad."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.pytorch_utils import Conv1D

from lora_engine import calc
from lora_engine.assets_path import asset_path
from lora_engine.errors import InputError, ModelConfigError, NotFoundError

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BARE = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
GPT2 = {
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 101,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

# What makes each family's parameters differ; every one is compared with the real model.
VARIANTS = {
    "llama": ("llama", SMALL | {"num_key_value_heads": 2}),
    "llama tied, biases, own head size": (
        "llama",
        SMALL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 20},
    ),
    "mistral": ("mistral", SMALL | {"num_key_value_heads": 2}),
    "mistral, no kv heads said": ("mistral", SMALL | {"num_attention_heads": 8}),
    "qwen2": ("qwen2", SMALL | {"num_key_value_heads": 2}),
    "qwen2 tied": ("qwen2", SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, default head size": ("qwen3", SMALL | {"num_key_value_heads": 2, "attention_bias": True}),
    "gemma": ("gemma", SMALL | {"num_key_value_heads": 1, "head_dim": 24}),
    "gemma2": ("gemma2", SMALL | {"num_key_value_heads": 2}),
    "phi3": ("phi3", SMALL | {"num_key_value_heads": 2}),
    "phi": ("phi", SMALL),
    "phi, norms on q and k": ("phi", SMALL | {"qk_layernorm": True, "num_key_value_heads": 2}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, own inner size, untied": ("gpt2", GPT2 | {"n_inner": 100, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", SMALL),
    "gpt_neox, no attention bias, tied": ("gpt_neox", SMALL | {"attention_bias": False, "tie_word_embeddings": True}),
    "opt": ("opt", BARE | {"ffn_dim": 80}),
    "opt 350m": ("opt", BARE | {"ffn_dim": 80, "word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "opt, no bias, plain norms": (
        "opt",
        BARE | {"ffn_dim": 80, "enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
    "falcon 7b": ("falcon", BARE),
    "falcon 40b": ("falcon", BARE | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon 11b": (
        "falcon",
        BARE
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 99},
    ),
    "falcon 1b": ("falcon", BARE | {"multi_query": False, "alibi": True, "parallel_attn": False}),
}
ENCODERS = {
    f"{family} {kind}": (family, kind) for family in ("bert", "roberta") for kind in ("Model", "ForMaskedLM")
} | {
    f"{family} {kind}": (family, kind)
    for family in ("bert", "roberta")
    for kind in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
}


def real_model(model_type, facts, auto=AutoModelForCausalLM):
    config = CONFIG_MAPPING[model_type](**facts)
    with torch.device("meta"):
        return auto.from_config(config)


def encoder_and_shape(family, kind):
    import transformers

    title = {"bert": "Bert", "roberta": "Roberta"}[family] + kind
    facts = SMALL | {"id2label": {0: "a", 1: "b", 2: "c"}}
    config = CONFIG_MAPPING[family](**facts)
    with torch.device("meta"):
        model = getattr(transformers, title)(config)
    # As a config.json says it: JSON has no whole numbers as keys.
    stored = json.loads(json.dumps(facts | {"model_type": family, "architectures": [title]}))
    return model, calc.shape_from_config(stored, title)


def assert_same(shape, model):
    """Total, every linear by name with its two sizes and bias, and the head."""
    assert shape.total_parameters == sum(p.numel() for p in model.parameters())
    ours = {
        name: (linear.in_features, linear.out_features, linear.has_bias, linear.kind)
        for linear in shape.linears
        for name in shape.full_names(linear)
    }
    theirs = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            theirs[name] = (rows, columns, True, "conv1d")
        elif isinstance(module, torch.nn.Linear):
            theirs[name] = (module.in_features, module.out_features, module.bias is not None, "linear")
    assert ours == theirs
    assert set(shape.linear_names) == set(theirs)
    others = {name for part in shape.others for name in shape.full_names(part)}
    assert others <= {name for name, _ in model.named_modules()}
    head = model.get_output_embeddings()
    assert shape.output_head == next((name for name, module in model.named_modules() if module is head), None)
    if head is not None:
        assert shape.tied == (head.weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize(("model_type", "facts"), VARIANTS.values(), ids=VARIANTS)
def test_shape_is_that_of_the_real_model(model_type, facts):
    assert_same(calc.shape_from_config(facts | {"model_type": model_type}, "test"), real_model(model_type, facts))


@pytest.mark.parametrize(("family", "kind"), ENCODERS.values(), ids=ENCODERS)
def test_encoder_is_counted_as_the_class_its_config_names(family, kind):
    model, shape = encoder_and_shape(family, kind)
    assert_same(shape, model)
    assert shape.architecture == type(model).__name__
    assert shape.notes == ()


def test_encoder_without_a_named_class_is_the_bare_model_and_says_so():
    shape = calc.shape_from_config(SMALL | {"model_type": "bert"}, "test")
    assert_same(shape, real_model("bert", SMALL, AutoModel))
    assert shape.notes == ("Counted as BertModel; its config.json names no class.",)


def test_decoder_for_another_task_is_counted_as_a_language_model_and_says_so():
    facts = VARIANTS["llama"][1] | {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    shape = calc.shape_from_config(facts, "test")
    assert shape.notes == ("Counted as LlamaForCausalLM; its config.json names LlamaForSequenceClassification.",)


@pytest.mark.parametrize("hub_id", calc.CATALOG)
def test_catalog_model_counts_what_transformers_builds(hub_id):
    facts = {key: value for key, value in calc.CATALOG[hub_id].items() if key not in ("model_type", "architectures")}
    model_type = calc.CATALOG[hub_id]["model_type"]
    auto = AutoModelForMaskedLM if model_type in ("bert", "roberta") else AutoModelForCausalLM
    if "405B" in hub_id or "70B" in hub_id:  # the layers are alike: the real model's build is all that is slow
        facts |= {"num_hidden_layers": 4}
    shape = calc.shape_from_config(calc.CATALOG[hub_id] | facts, hub_id)
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    assert_same(shape, real_model(model_type, facts | tokens, auto))


def test_embedded_model_is_the_shipped_one():
    shape = calc.load_shape("embedded")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(asset_path("base")))
    assert_same(shape, model)
    assert shape.name == "embedded"


def test_published_totals():
    published = {
        "meta-llama/Llama-3.1-405B": 405_853_388_800,
        "meta-llama/Llama-3.1-8B": 8_030_261_248,
        "meta-llama/Llama-2-7b-hf": 6_738_415_616,
        "openai-community/gpt2": 124_439_808,
        "facebook/opt-350m": 331_196_416,
        "microsoft/phi-2": 2_779_683_840,
    }
    assert {hub_id: calc.load_shape(hub_id).total_parameters for hub_id in published} == published


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("GPT2", "openai-community/gpt2"),
        ("TinyLlama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("phi-3", "microsoft/Phi-3-mini-4k-instruct"),
        ("Mistral-7B", "mistralai/Mistral-7B-v0.1"),
        ("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("META-LLAMA/llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("bert-base-uncased", "google-bert/bert-base-uncased"),
    ],
)
def test_catalog_names_in_any_case_and_short(name, hub_id):
    assert calc.load_shape(name).name == hub_id


def test_ambiguous_short_name_lists_what_it_could_be():
    with pytest.raises(NotFoundError) as caught:
        calc.load_shape("SmolLM2")
    assert str(caught.value) == (
        "model is 'SmolLM2', which could be several; allowed: HuggingFaceTB/SmolLM2-135M, "
        "HuggingFaceTB/SmolLM2-360M, HuggingFaceTB/SmolLM2-1.7B."
    )


def test_unknown_name_offers_near_ones():
    with pytest.raises(NotFoundError, match=r"near: .*meta-llama/Llama-3\.1-8B"):
        calc.load_shape("meta-llama/Llama-3.1-8")
    with pytest.raises(NotFoundError, match=r"a name from the catalog\.$"):
        calc.load_shape("zzzz/zzzz")


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 10_000, "~nobody-here/model", "/dev/null/x", "../../etc"])
def test_odd_names_are_input_errors(name):
    with pytest.raises(InputError):
        calc.load_shape(name)


def write_config(folder, content):
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text)
    return folder


def test_folder_and_path(tmp_path):
    folder = write_config(tmp_path / "mine", VARIANTS["llama"][1] | {"model_type": "llama"})
    assert calc.load_shape(str(folder)).name == "mine"
    assert calc.load_shape(str(folder / "config.json")) == calc.load_shape(str(folder))
    with pytest.raises(NotFoundError, match="holds config.json"):
        calc.load_shape(str(tmp_path))


def test_config_in_the_hubs_cache_is_found(tmp_path, monkeypatch):
    cache, commit = tmp_path / "models--somebody--something", "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots").mkdir()
    write_config(cache / "snapshots" / commit, VARIANTS["llama"][1] | {"model_type": "llama"})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert calc.load_shape("somebody/something").name == "somebody/something"


GOOD = VARIANTS["llama"][1] | {"model_type": "llama"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({k: v for k, v in GOOD.items() if k != "hidden_size"}, "hidden_size of bad is missing"),
        (GOOD | {"hidden_size": None}, "hidden_size of bad is missing"),
        (GOOD | {"num_hidden_layers": -2}, "num_hidden_layers of bad is -2; allowed: a whole number from 1 to 10000."),
        (GOOD | {"num_hidden_layers": 10**9}, "num_hidden_layers of bad is 1000000000"),
        (GOOD | {"hidden_size": "48"}, "hidden_size of bad is '48'"),
        (GOOD | {"hidden_size": True}, "hidden_size of bad is True"),
        (GOOD | {"hidden_size": 48.0}, "hidden_size of bad is 48.0"),
        (
            GOOD | {"num_attention_heads": 5},
            "num_attention_heads of bad is 5; allowed: a divisor of the hidden size, 48.",
        ),
        (
            GOOD | {"num_key_value_heads": 3},
            "num_key_value_heads of bad is 3; allowed: a divisor of the 4 attention heads.",
        ),
        (GOOD | {"tie_word_embeddings": "yes"}, "tie_word_embeddings of bad is 'yes'; allowed: true or false."),
        (GOOD | {"hidden_act": 3}, "hidden_act of bad is 3"),
        (GOOD | {"model_type": 7}, "model_type of bad is 7"),
        (GOOD | {"model_type": "rwkv"}, "model_type of bad is 'rwkv'; allowed: bert, falcon, gemma, gemma2, gpt2,"),
        ({}, "model_type of bad is missing; allowed: one of bert,"),
        ("{", "is not JSON (line 1:"),
        ("", "is not JSON (line 1:"),
        ("[1, 2]", "holds a JSON list; allowed: a JSON object."),
        ("[" * 200_000, "that can be read"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "that can be read"),
        (" " * 5_000_001, "larger than 5 MB"),
    ],
)
def test_bad_config_is_one_sentence(tmp_path, content, says):
    folder = write_config(tmp_path / "bad", content)
    with pytest.raises(ModelConfigError) as caught:
        calc.load_shape(str(folder))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "allowed: " in str(caught.value)


def test_config_that_is_not_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ModelConfigError, match="not text in UTF-8"):
        calc.load_shape(str(tmp_path))


def test_config_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert calc.load_shape(str(tmp_path)).hidden_size == 48


def test_importing_calc_imports_no_torch_and_no_numpy():
    code = "import sys, lora_engine.calc; print(*[m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    root = Path(calc.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
