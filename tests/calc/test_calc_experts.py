"""Models with experts and models that read images: what is said about the count, and configs that are wrong."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from real_models import (
    ALL_VARIANTS,
    DEEPSEEK,
    LLAMA4,
    MOE_VARIANTS,
    OTHER_ENCODERS,
    QWEN_MOE,
    SMALL,
    VARIANTS,
    assert_same,
    encoder_and_shape,
    real_model,
)

from lora_engine import calc
from lora_engine.calc.experts import OLD_NAMES
from lora_engine.errors import ModelConfigError, UnknownArchitectureError

KV = {"num_key_value_heads": 2}
MIXTRAL = SMALL | KV | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3 = SMALL | QWEN_MOE | {"model_type": "qwen3_moe"}
SCOUT = SMALL | LLAMA4 | {"model_type": "llama4_text"}
V3 = SMALL | DEEPSEEK | {"model_type": "deepseek_v3", "q_lora_rank": 20}


def test_experts_are_said_to_be_out_of_reach_and_what_is_active():
    shape = calc.shape_from_config(MIXTRAL, "test")
    idle = 3 * 2 * 3 * 48 * 80  # layers, idle experts, maps of an expert
    assert shape.active_parameters == shape.total_parameters - idle
    assert shape.notes == (
        "The 4 experts of a layer, in every layer, are the 3-D parameters mlp.experts.gate_up_proj and "
        "mlp.experts.down_proj, no linear modules: target_modules does not reach them, target_parameters does. "
        "PEFT 0.21 turns all-linear into both for this family, router included, and so does this count.",
        f"A token passes 2 of 4 experts: {shape.active_parameters:,} of {shape.total_parameters:,} parameters "
        "are active.",
    )


def test_shared_experts_and_dense_layers_are_said():
    notes = calc.shape_from_config(V3, "test").notes
    assert notes[0].startswith("The 8 experts of a layer, in 2 of 3 layers,")
    assert notes[1].startswith("A token passes 3 of 8 experts and the shared expert:")


def test_dense_models_have_no_experts_and_are_active_as_a_whole():
    shape = calc.load_shape("meta-llama/Llama-3.1-8B")
    assert (shape.moe, shape.latent, shape.experts, shape.notes) == (None, None, (), ())
    assert shape.active_parameters == shape.total_parameters


def test_what_memory_reads_of_a_shape_with_experts():
    shape = calc.shape_from_config(V3, "test")
    moe, latent = shape.moe, shape.latent
    assert (moe.num_experts, moe.experts_per_token, moe.layers) == (8, 3, (1, 2))
    assert (moe.intermediate_size, moe.shared_intermediate_size, moe.dense_intermediate_size) == (24, 24, 80)
    assert (latent.q_lora_rank, latent.kv_lora_rank, latent.v_head_dim) == (20, 16, 10)
    assert (shape.intermediate_size, shape.experts_per_token) == (24, 3)
    assert (shape.head_dim, shape.num_kv_heads) == (12 + 8, 4)
    routers = [part for part in shape.others if part.name == moe.router]
    assert [(part.kind, part.layers, part.num_parameters) for part in routers] == [("router", (1, 2), 8 * 48)]


def test_a_router_that_is_a_linear_counts_as_one():
    shape = calc.shape_from_config(SCOUT, "test")
    assert f"model.layers.0.{shape.moe.router}" in shape.linear_names


def with_peft(model):
    """(names of what PEFT adapts of "all-linear", whether it adapts parameters as well)."""
    peft = get_peft_model(model, PeftConfig(target_modules="all-linear"))
    names = [name for name, module in peft.named_modules() if isinstance(module, BaseTunerLayer)]
    parameters = bool(peft.peft_config["default"].target_parameters)
    return sorted(name.removeprefix("base_model.model.") for name in names), parameters


def all_linear(shape):
    return sorted(calc.select_modules(shape.linear_names, "all-linear", output_head=shape.output_head))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "facts"), MOE_VARIANTS.values(), ids=MOE_VARIANTS)
def test_all_linear_is_pefts_where_it_leaves_experts_out(model_type, facts):
    names, parameters = with_peft(real_model(model_type, facts))
    shape = calc.shape_from_config(facts | {"model_type": model_type}, "test")
    assert parameters == (model_type in OLD_NAMES)
    if not parameters:
        assert all_linear(shape) == names
    assert shape.moe is None or ("PEFT 0.21 turns" in shape.notes[0]) == parameters


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "kind"), OTHER_ENCODERS.values(), ids=OTHER_ENCODERS)
def test_all_linear_is_pefts_in_encoders(family, kind):
    model, shape = encoder_and_shape(family, kind)
    assert (all_linear(shape), False) == with_peft(model)


def groups_by_name(shape):
    """What the aliases find by names alone, beside what the shape knows."""
    for group in ("attention", "mlp"):
        known = {name for linear in shape.linears if linear.group == group for name in shape.full_names(linear)}
        if known:
            yield set(calc.select_modules(shape.linear_names, group)), known


@pytest.mark.parametrize(("model_type", "facts"), MOE_VARIANTS.values(), ids=MOE_VARIANTS)
def test_aliases_are_the_groups_of_a_shape_with_experts(model_type, facts):
    for found, known in groups_by_name(calc.shape_from_config(facts | {"model_type": model_type}, "test")):
        assert found == known


@pytest.mark.parametrize(("family", "kind"), OTHER_ENCODERS.values(), ids=OTHER_ENCODERS)
def test_aliases_are_the_groups_of_an_encoder(family, kind):
    for found, known in groups_by_name(encoder_and_shape(family, kind)[1]):
        assert found == known


@pytest.mark.parametrize("variant", ["gemma3", "llama4, every second layer", "mistral", "qwen3_moe"])
def test_of_a_multimodal_model_the_language_model_is_counted(variant):
    text_type, facts = ALL_VARIANTS[variant]
    config = {
        "model_type": "some_vision_model",
        "architectures": ["SomeForConditionalGeneration"],
        "text_config": facts | {"model_type": text_type},
        "vision_config": {"hidden_size": 7},
    }
    shape = calc.shape_from_config(config, "test")
    assert_same(shape, real_model(text_type, facts))
    assert (shape.name, shape.model_type) == ("test", text_type)
    assert shape.notes[0] == (
        f"Counted is the language model of SomeForConditionalGeneration, as {shape.architecture}; "
        "what reads images or sound is left out."
    )


def test_text_config_without_a_type_is_that_of_the_family():
    facts = VARIANTS["gemma3"][1]
    shape = calc.shape_from_config({"model_type": "gemma3", "text_config": facts}, "test")
    assert_same(shape, real_model("gemma3_text", facts))


def test_what_only_the_outer_config_says_about_tying_counts():
    outer = {"model_type": "mistral3", "text_config": SMALL | KV | {"model_type": "mistral"}}
    assert not calc.shape_from_config(outer, "test").tied
    assert calc.shape_from_config(outer | {"tie_word_embeddings": True}, "test").tied
    inner = outer["text_config"] | {"tie_word_embeddings": False}
    assert not calc.shape_from_config(outer | {"tie_word_embeddings": True, "text_config": inner}, "test").tied


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            MIXTRAL | {"num_experts_per_tok": 5},
            "num_experts_per_tok of bad is 5; allowed: a whole number from 1 to the 4 experts of a layer.",
        ),
        (MIXTRAL | {"num_experts_per_tok": 0}, "num_experts_per_tok of bad is 0"),
        (
            MIXTRAL | {"num_local_experts": -8},
            "num_local_experts of bad is -8; allowed: a whole number from 1 to 100000.",
        ),
        (MIXTRAL | {"num_local_experts": 10**9}, "num_local_experts of bad is 1000000000"),
        (MIXTRAL | {"num_local_experts": "8"}, "num_local_experts of bad is '8'"),
        (MIXTRAL | {"intermediate_size": None}, "intermediate_size of bad is missing"),
        (QWEN3 | {"moe_intermediate_size": 0}, "moe_intermediate_size of bad is 0"),
        (QWEN3 | {"decoder_sparse_step": 0}, "decoder_sparse_step of bad is 0"),
        (
            QWEN3 | {"mlp_only_layers": [0, 3]},
            "mlp_only_layers of bad is [0, 3]; allowed: a list of whole numbers from 0 to 2.",
        ),
        (QWEN3 | {"mlp_only_layers": "all"}, "mlp_only_layers of bad is 'all'"),
        (QWEN3 | {"mlp_only_layers": [True]}, "mlp_only_layers of bad is [True]"),
        (SCOUT | {"moe_layers": [-1]}, "moe_layers of bad is [-1]"),
        (SCOUT | {"interleave_moe_layer_step": -2}, "interleave_moe_layer_step of bad is -2"),
        (V3 | {"first_k_dense_replace": -1}, "first_k_dense_replace of bad is -1"),
        (V3 | {"kv_lora_rank": None, "qk_rope_head_dim": 0}, "qk_rope_head_dim of bad is 0"),
        (V3 | {"q_lora_rank": "1536"}, "q_lora_rank of bad is '1536'"),
        (V3 | {"n_shared_experts": 1.5}, "n_shared_experts of bad is 1.5"),
        (V3 | {"model_type": "deepseek_v2", "num_experts_per_tok": None}, "num_experts_per_tok of bad is missing"),
        ({"model_type": "gemma3"}, "text_config of bad is missing; allowed: a config.json that says it, as gemma3"),
        ({"model_type": "llama4", "text_config": [1]}, "text_config of bad is [1]; allowed: a JSON object."),
        ({"model_type": "llava", "text_config": {"model_type": 3}}, "model_type of text_config of bad is 3"),
        (
            {"model_type": "gemma3", "text_config": {"num_hidden_layers": 2}},
            "hidden_size of text_config of bad is missing",
        ),
        ({"model_type": "t5", "d_model": 48}, "vocab_size of bad is missing"),
        (VARIANTS["t5"][1] | {"model_type": "t5", "num_decoder_layers": -6}, "num_decoder_layers of bad is -6"),
        (
            SMALL | {"model_type": "deberta-v2", "relative_attention": True, "pos_att_type": 3},
            "pos_att_type of bad is 3",
        ),
        (SMALL | {"model_type": "deberta-v2", "type_vocab_size": -1}, "type_vocab_size of bad is -1"),
    ],
)
def test_bad_config_is_one_sentence(tmp_path, config, says):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelConfigError) as caught:
        calc.load_shape(str(folder))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "allowed: " in str(caught.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "mamba", "hidden_size": 48}, "model_type of test is 'mamba'; allowed: bert,"),
        ({"hidden_size": 48}, "model_type of test is missing; allowed: one of bert,"),
        (
            {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}},
            "model_type of text_config of test is 'qwen3_5_text'; allowed: bert,",
        ),
    ],
)
def test_unknown_architectures_are_told_apart(config, says):
    with pytest.raises(UnknownArchitectureError) as caught:
        calc.shape_from_config(config, "test")
    assert str(caught.value).startswith(says)


def test_a_known_architecture_with_a_wrong_value_is_not_unknown():
    with pytest.raises(ModelConfigError) as caught:
        calc.shape_from_config(MIXTRAL | {"hidden_size": -1}, "test")
    assert not isinstance(caught.value, UnknownArchitectureError)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([10**12, 0.5, "", "x", "gated-gelu"]),
    st.lists(st.integers(-1, 4), max_size=2),
    st.just({}),
)


@settings(deadline=None)
@given(variant=st.sampled_from(sorted(ALL_VARIANTS)), data=st.data())
def test_whatever_a_value_is_the_answer_is_a_shape_or_one_sentence(variant, data):
    model_type, facts = ALL_VARIANTS[variant]
    key = data.draw(st.sampled_from(sorted(facts)))
    try:
        shape = calc.shape_from_config(facts | {"model_type": model_type, key: data.draw(ODD)}, "test")
    except ModelConfigError as error:
        said = str(error)
    else:
        said = None
    if said is not None:
        assert "allowed: " in said
        return
    names = shape.linear_names
    assert len(set(names)) == len(names) == sum(linear.count for linear in shape.linears)
    assert 0 < shape.active_parameters <= shape.total_parameters
