"""Counts against PEFT on real models (meta device), well-known rows, and properties."""

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.numpy import save
from test_calc_shapes import ENCODERS, VARIANTS, encoder_and_shape, real_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from lora_engine import calc
from lora_engine.assets_path import asset_path
from lora_engine.config import FullConfig, LoraConfig
from lora_engine.errors import TargetError

MUST_HOLD = [
    ("HuggingFaceTB/SmolLM2-135M", 8, "q_proj,v_proj", 460_800),
    ("gpt2", 8, "c_attn", 294_912),
    ("openai-community/gpt2-medium", 4, "c_attn", 393_216),
    ("meta-llama/Llama-2-7b-hf", 8, "q_proj,v_proj", 4_194_304),
    ("Llama-3.1-8B", 8, "all-linear", 20_971_520),
    ("TinyLlama", 8, "q_proj,v_proj", 1_126_400),
    ("microsoft/phi-2", 8, "q_proj,k_proj,v_proj,dense,fc1,fc2,lm_head", 12_226_560),
    ("meta-llama/Llama-3.1-405B", 16, "all-linear", 623_443_968),
    ("embedded", 8, "all-linear", 162_816),
]


@pytest.mark.parametrize(("model", "r", "targets", "expected"), MUST_HOLD)
def test_well_known_rows(model, r, targets, expected):
    count = calc.count_parameters(calc.load_shape(model), LoraConfig(r=r, target_modules=calc.parse_targets(targets)))
    assert count.trainable_parameters == expected


def peft_counts(model, config):
    """(trainable, the base's own) of the real model with PEFT's adapters."""
    targets = config.target_modules
    peft_config = PeftConfig(
        r=config.r,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_dora=config.use_dora,
        fan_in_fan_out="gpt2" in type(model).__name__.lower(),
    )
    trainable, everything = get_peft_model(model, peft_config).get_nb_trainable_parameters()
    return trainable, everything - trainable


def assert_counts(shape, model, config):
    count = calc.count_parameters(shape, config)
    assert (count.trainable_parameters, count.total_parameters) == peft_counts(model, config)
    assert sum(module.trainable_parameters for module in count.modules) == count.trainable_parameters


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "embedded",
        "openai-community/gpt2",
        "meta-llama/Llama-3.1-8B",
        "Qwen/Qwen2.5-0.5B",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "microsoft/Phi-3-mini-4k-instruct",
        "mistralai/Mistral-7B-v0.1",
        "google-bert/bert-base-uncased",
    ],
)
def test_counts_of_real_models_are_pefts(name):
    if name == "embedded":
        config = AutoConfig.from_pretrained(asset_path("base"))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    else:
        facts = dict(calc.CATALOG[name])
        model_type = facts.pop("model_type")
        auto = AutoModelForMaskedLM if facts.pop("architectures", None) else AutoModelForCausalLM
        model = real_model(model_type, facts | {"pad_token_id": 0}, auto)
    assert_counts(calc.load_shape(name), model, LoraConfig(r=12))


TARGETS = {
    "llama": ["all-linear", ("q_proj", "v_proj"), r".*layers\.[02]\.mlp\..*_proj", ("lm_head", "o_proj")],
    "qwen2": ["all-linear", ("k_proj",)],
    "qwen3": ["all-linear"],
    "gemma2": ["all-linear"],
    "phi3": ["all-linear", ("qkv_proj", "gate_up_proj")],
    "phi": ["all-linear", ("dense",)],
    "gpt2": ["all-linear", ("c_proj",), ("mlp.c_proj",)],
    "gpt_neox": ["all-linear", ("query_key_value",)],
    "opt 350m": ["all-linear", ("fc1", "project_in")],
    "falcon 7b": ["all-linear"],
    "falcon 40b": ["all-linear", ("dense",)],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("variant", "targets", "use_dora"),
    [(variant, target, dora) for variant, all_ in TARGETS.items() for target in all_ for dora in (False, True)],
)
def test_counts_are_pefts(variant, targets, use_dora):
    model_type, facts = VARIANTS[variant]
    shape = calc.shape_from_config(facts | {"model_type": model_type}, variant)
    assert_counts(shape, real_model(model_type, facts), LoraConfig(r=6, target_modules=targets, use_dora=use_dora))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "kind"), ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("targets", ["all-linear", ("query", "value"), ("dense",)])
def test_encoder_counts_are_pefts(family, kind, targets):
    model, shape = encoder_and_shape(family, kind)
    assert_counts(shape, model, LoraConfig(r=5, target_modules=targets))


def test_full_counts_everything_once():
    for model_type, facts in VARIANTS.values():
        shape = calc.shape_from_config(facts | {"model_type": model_type}, "test")
        count = calc.count_parameters(shape, FullConfig())
        assert (
            count.trainable_parameters == count.total_parameters == sum(m.trainable_parameters for m in count.modules)
        )
        assert count.trainable_percent == 100.0


def test_modules_are_grouped_by_their_name_in_a_layer():
    count = calc.count_parameters(calc.load_shape("embedded"), LoraConfig(r=4, target_modules=("q_proj", "down_proj")))
    assert [(m.name, m.count, m.in_features, m.out_features, m.trainable_parameters) for m in count.modules] == [
        ("self_attn.q_proj", 6, 192, 192, 6 * 4 * 384),
        ("mlp.down_proj", 6, 512, 192, 6 * 4 * 704),
    ]


def test_notes_say_what_surprises():
    shape = calc.load_shape("embedded")
    beyond = calc.count_parameters(shape, LoraConfig(r=128, target_modules=("k_proj", "q_proj")))
    assert len(beyond.notes) == 1
    assert "Rank 128 is larger than the smaller side of self_attn.k_proj (down to 64)" in beyond.notes[0]
    assert beyond.trainable_parameters == 6 * 128 * (192 + 64 + 192 + 192)
    missing = calc.count_parameters(shape, LoraConfig(target_modules=("q_proj", "c_attn")))
    assert missing.notes == ("No module is called c_attn.",)
    head = calc.count_parameters(shape, LoraConfig(target_modules=("lm_head",)))
    assert "shares its weight with the input embedding" in head.notes[0]


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (("c_attn",), "target_modules is 'c_attn', which matches no module; allowed: attention, mlp, all-linear"),
        (("embed_tokens",), "'model.embed_tokens', an embedding; allowed: Linear and Conv1D modules."),
        (("mlp", "q_proj"), "'model.layers.0.mlp', a block; allowed: Linear and Conv1D modules."),
        (("input_layernorm",), "a norm; allowed"),
        ("q_proj", "matches no module"),
        ("(", "no regular expression"),
    ],
)
def test_targets_that_cannot_be_adapted(targets, says):
    with pytest.raises(TargetError) as caught:
        calc.count_parameters(calc.load_shape("embedded"), LoraConfig(target_modules=targets))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    r=st.integers(1, 512), targets=st.sampled_from(["all-linear", "attention", "mlp", ("q_proj",)]), dora=st.booleans()
)
def test_trainable_is_affine_in_the_rank(r, targets, dora):
    shape = calc.load_shape("TinyLlama")

    def trained(rank):
        return calc.count_parameters(
            shape, LoraConfig(r=rank, target_modules=targets, use_dora=dora)
        ).trainable_parameters

    step = trained(2) - trained(1)
    assert trained(r) == trained(1) + (r - 1) * step
    assert dora or trained(1) == step


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("model", "r"), [("embedded", 1), ("embedded", 64), ("gpt2", 8), ("TinyLlama", 4)])
def test_adapter_file_is_as_large_as_safetensors_writes_it(model, r, use_dora):
    import numpy as np

    shape, config = calc.load_shape(model), LoraConfig(r=r, use_dora=use_dora)
    tensors = {}
    for linear in shape.linears:
        for name in shape.full_names(linear) if linear.group != "head" else []:
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = np.zeros((r, linear.in_features), np.float32)
            tensors[f"{key}.lora_B.weight"] = np.zeros((linear.out_features, r), np.float32)
            if use_dora:
                tensors[f"{key}.lora_magnitude_vector"] = np.zeros(linear.out_features, np.float32)
    written = len(save(tensors, metadata={"format": "pt"}))
    assert calc.adapter_file_bytes(shape, config) == pytest.approx(written, rel=0.01)


def test_full_file_is_the_model():
    shape = calc.load_shape("embedded")
    assert calc.adapter_file_bytes(shape, FullConfig()) == pytest.approx(4 * shape.total_parameters, rel=0.001)


def test_counting_the_largest_model_takes_under_5_ms():
    """Without any cache: a new shape each time. The best of three, for a machine that does other things too."""
    seconds = []
    for layers in (124, 125, 126):
        shape = calc.shape_from_config(
            calc.CATALOG["meta-llama/Llama-3.1-405B"] | {"num_hidden_layers": layers}, f"timed {layers}"
        )
        began = time.perf_counter()
        calc.count_parameters(shape, LoraConfig(r=16))
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.005


def test_counts_are_plain_json():
    count = calc.count_parameters(calc.load_shape("gpt2"), LoraConfig())
    assert json.dumps([vars(module) for module in count.modules])
