"""Counts against PEFT on real models (meta device), well-known rows, and properties."""

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config as PeftIA3
from peft import LoraConfig as PeftConfig
from peft import PrefixTuningConfig as PeftPrefix
from peft import get_peft_model
from safetensors.numpy import save
from test_calc_peft import architecture
from test_calc_shapes import ENCODERS, VARIANTS, encoder_and_shape, real_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from lora_engine import calc
from lora_engine.assets_path import asset_path
from lora_engine.calc.params import COUNTERS
from lora_engine.config import (
    METHOD_CONFIGS,
    BottleneckConfig,
    FullConfig,
    HeadConfig,
    LoraConfig,
    PrefixConfig,
)
from lora_engine.errors import ConfigError, TargetError

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


def test_the_largest_has_882_modules():
    modules = calc.count_parameters(calc.load_shape("meta-llama/Llama-3.1-405B"), LoraConfig(r=16)).modules
    assert (len(modules), sum(module.count for module in modules)) == (7, 882)


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


CLASSIFIERS = [name for name in ENCODERS if name.endswith("Classification")]


@pytest.mark.parametrize(("model_type", "facts"), VARIANTS.values(), ids=VARIANTS)
def test_head_is_the_output_embeddings_own(model_type, facts):
    shape = calc.shape_from_config(facts | {"model_type": model_type}, "test")
    model = real_model(model_type, facts)
    count = calc.count_parameters(shape, HeadConfig())
    assert count.trainable_parameters == sum(p.numel() for p in model.get_output_embeddings().parameters())
    assert count.total_parameters == shape.total_parameters
    assert bool(count.notes) == shape.tied
    if shape.tied:
        grown = shape.total_parameters + model.get_output_embeddings().weight.numel()
        assert f"grows from {shape.total_parameters:,} to {grown:,} parameters" in count.notes[0]


@pytest.mark.parametrize(("family", "kind"), [ENCODERS[name] for name in CLASSIFIERS], ids=CLASSIFIERS)
def test_head_of_a_classifier_is_what_stands_beside_the_encoder(family, kind):
    model, shape = encoder_and_shape(family, kind)
    base = f"{model.base_model_prefix}."
    head = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(base))
    assert calc.count_parameters(shape, HeadConfig()).trainable_parameters == head


def test_a_bare_encoder_has_no_head():
    _, shape = encoder_and_shape("bert", "Model")
    with pytest.raises(TargetError, match="BertModel, which has no output head; allowed: a language model"):
        calc.count_parameters(shape, HeadConfig())


@pytest.mark.parametrize("factor", [1, 5, 16, 10_000])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_bottleneck_is_two_linears_in_each_place(factor, placement):
    shape = calc.load_shape("embedded")
    h, m = shape.hidden_size, max(1, shape.hidden_size // factor)
    with torch.device("meta"):
        adapter = torch.nn.Sequential(torch.nn.Linear(h, m), torch.nn.Linear(m, h))
    places = {"houlsby": 2, "pfeiffer": 1}[placement]
    config = BottleneckConfig(reduction_factor=factor, placement=placement)
    count = calc.count_parameters(shape, config)
    assert count.trainable_parameters == places * shape.num_layers * sum(p.numel() for p in adapter.parameters())
    assert len(count.modules) == places
    tensors = {
        f"model.layers.{i % 6}.mlp.down_proj.adapter_{i // 6}.{n}.weight": p
        for i in range(places * shape.num_layers)
        for n, p in adapter.named_parameters()
    }
    assert_file(shape, config, tensors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("encoder_hidden_size", [None, 20])
@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt2", "mistral", "gpt_neox"])
def test_prefix_is_pefts(variant, encoder_hidden_size):
    model_type, facts = VARIANTS[variant]
    shape = calc.shape_from_config(facts | {"model_type": model_type}, variant)
    model = get_peft_model(
        real_model(model_type, facts),
        PeftPrefix(
            num_virtual_tokens=7,
            task_type="CAUSAL_LM",
            prefix_projection=encoder_hidden_size is not None,
            encoder_hidden_size=encoder_hidden_size,
        ),
    )
    config = PrefixConfig(
        prefix_length=7, reparametrize=encoder_hidden_size is not None, encoder_hidden_size=encoder_hidden_size or 0
    )
    count = calc.count_parameters(shape, config)
    assert count.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Whatever trains it, the plain prefix is kept.
    assert_file(shape, config, {"prompt_embeddings": torch.empty(7, 2 * shape.num_layers * shape.kv_width)})
    assert bool(count.notes) == config.reparametrize


def test_a_prefix_of_nothing_trains_nothing():
    assert calc.count_parameters(calc.load_shape("embedded"), PrefixConfig(prefix_length=0)).trainable_parameters == 0


def assert_file(shape, config, tensors):
    import numpy as np

    written = len(save({name: np.zeros(p.shape, np.float32) for name, p in tensors.items()}, metadata={"format": "pt"}))
    assert calc.adapter_file_bytes(shape, config) == pytest.approx(written, rel=0.02, abs=120)


def test_formulas_say_the_arithmetic():
    shape = calc.load_shape("Llama-2-7b-hf")

    def formulas(method):
        return {module.name: module.formula for module in calc.count_parameters(shape, method).modules}

    q = "self_attn.q_proj"
    assert formulas(LoraConfig(r=8, target_modules=("q_proj",)))[q] == "32 x 8 x (4096 + 4096) = 2,097,152"
    dora = formulas(LoraConfig(r=8, target_modules=("q_proj",), use_dora=True))
    assert dora[q] == "32 x (8 x (4096 + 4096) + 4096) = 2,228,224"
    mixed = formulas(LoraConfig(r=8, target_modules=("q_proj",), rank_pattern={r"layers\.[01]\..*": 2}))
    assert mixed[q] == "2 x 2 x (4096 + 4096) + 30 x 8 x (4096 + 4096) = 1,998,848"
    assert formulas(FullConfig())["mlp.up_proj"] == "32 x 4096 x 11008 = 1,442,840,576"
    assert formulas(HeadConfig()) == {"lm_head": "32000 x 4096 = 131,072,000"}
    assert formulas(PrefixConfig(prefix_length=16)) == {"prefix": "16 x 2 x 32 x 4096 = 4,194,304"}
    assert formulas(BottleneckConfig())["adapter after MLP"] == "32 x (2 x 4096 x 256 + 256 + 4096) = 67,248,128"


@pytest.mark.parametrize(
    "method", [LoraConfig(rank_pattern={"q_proj": 3}), FullConfig(), HeadConfig(), BottleneckConfig(), PrefixConfig()]
)
@pytest.mark.parametrize("model", ["embedded", "gpt2", "microsoft/phi-2", "facebook/opt-350m"])
def test_every_formula_gives_its_count(model, method):
    count = calc.count_parameters(calc.load_shape(model), method)
    for module in count.modules:
        terms, _, total = module.formula.partition(" = ")
        assert eval(terms.replace("x", "*")) == module.trainable_parameters == int(total.replace(",", ""))
    assert count.trainable_parameters == sum(module.trainable_parameters for module in count.modules) > 0


def test_every_method_is_counted():
    assert COUNTERS.keys() >= METHOD_CONFIGS.keys()


IA3_TARGETS = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "phi3": (["qkv_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "opt 350m": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "falcon 40b": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", IA3_TARGETS)
def test_ia3_is_pefts(variant):
    model_type, facts = VARIANTS[variant]
    shape = calc.shape_from_config(facts | {"model_type": model_type}, variant)
    targets, feedforward = IA3_TARGETS[variant]
    model = get_peft_model(
        real_model(model_type, facts),
        PeftIA3(target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=variant == "gpt2"),
    )
    modules, _ = COUNTERS["ia3"](shape, None)
    trained = sum(module.trainable_parameters for module in modules)
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_notes_of_patterns_and_ranks():
    shape = calc.load_shape("embedded")
    config = LoraConfig(target_modules=("q_proj",), rank_pattern={"k_proj": 4, "q_proj": 300}, alpha_pattern={"x": 2})
    notes = " ".join(calc.count_parameters(shape, config).notes)
    assert "Rank 300 is larger than the smaller side of self_attn.q_proj (down to 192)" in notes
    assert "No adapted module is called k_proj, x: that pattern does nothing." in notes


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT looks at modules only
def test_experts_are_counted_with_what_they_mean():
    model, shape = architecture("mixtral")
    count = calc.count_parameters(shape, LoraConfig(r=4))
    assert count.trainable_parameters == peft_counts(model, LoraConfig(r=4))[0]
    stacked = next(module for module in count.modules if module.name.endswith("gate_up_proj"))
    assert stacked.formula == f"3 x 3 experts x 8 x (48 + 160) = {3 * 3 * 8 * 208:,}"
    assert any("stacks 3 experts in one parameter; each gets 8 ranks of its own, 24 in all" in n for n in count.notes)
    with pytest.raises(TargetError, match="'w1' alone; allowed: w1 and w3 together"):
        calc.count_parameters(shape, LoraConfig(target_modules=("w1", "q_proj")))
    with pytest.raises(ConfigError, match="use_dora is True; allowed: False where mlp"):
        calc.count_parameters(shape, LoraConfig(use_dora=True))
    with pytest.raises(TargetError, match="target_parameters is 'x', which matches no parameter; allowed: mlp.experts"):
        calc.count_parameters(shape, LoraConfig(target_modules=(), target_parameters=("x",)))


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


def test_counting_the_largest_model_takes_under_2_ms():
    """Without any cache: a new shape each time. The best of three, for a machine that does other things too."""
    seconds = []
    for layers in (124, 125, 126):
        shape = calc.shape_from_config(
            calc.CATALOG["meta-llama/Llama-3.1-405B"] | {"num_hidden_layers": layers}, f"timed {layers}"
        )
        began = time.perf_counter()
        calc.count_parameters(shape, LoraConfig(r=16))
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.002


def test_counts_are_plain_json():
    count = calc.count_parameters(calc.load_shape("gpt2"), LoraConfig())
    assert json.dumps([vars(module) for module in count.modules])
