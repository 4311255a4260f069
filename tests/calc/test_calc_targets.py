"""Target matching against PEFT's own, over the names of real models."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from test_calc_shapes import ENCODERS, VARIANTS, encoder_and_shape, real_model

from lora_engine import calc
from lora_engine.errors import ConfigError, TargetError

NAMES = [
    f"{layer}.{part}"
    for layer in ("model.layers.0", "model.layers.10", "model.layers.1", "transformer.h.3")
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.c_proj", "attn.c_proj", "proj", "xq_proj")
] + ["lm_head", "q_proj", "score"]


def ours(names, targets, head=None):
    try:
        return calc.select_modules(names, targets, output_head=head)
    except TargetError:
        return []


@given(
    targets=st.lists(
        st.sampled_from(
            [
                "q_proj",
                "proj",
                "c_proj",
                "mlp.c_proj",
                "0.self_attn.q_proj",
                "model.layers.1.mlp.up_proj",
                "head",
                "layers.1",
            ]
        ),
        min_size=1,
        max_size=4,
    )
)
def test_lists_match_as_in_peft(targets):
    config = PeftConfig(target_modules=targets)
    assert ours(NAMES, targets) == [name for name in NAMES if check_target_module_exists(config, name)]


@pytest.mark.parametrize(
    "pattern", [r".*q_proj", r"model\.layers\.[01]\..*", "q_proj", r".*(self_attn|attn)\..*", "proj", r".*\.1\..*", ""]
)
def test_regular_expressions_match_as_in_peft(pattern):
    config = PeftConfig(target_modules=pattern)
    assert ours(NAMES, pattern) == [name for name in NAMES if check_target_module_exists(config, name)]


def peft_all_linear(model):
    peft = get_peft_model(model, PeftConfig(target_modules="all-linear", fan_in_fan_out="GPT2" in type(model).__name__))
    names = [name for name, module in peft.named_modules() if isinstance(module, BaseTunerLayer)]
    return sorted(name.removeprefix("base_model.model.") for name in names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "facts"), VARIANTS.values(), ids=VARIANTS)
def test_all_linear_is_pefts(model_type, facts):
    shape = calc.shape_from_config(facts | {"model_type": model_type}, "test")
    chosen = calc.select_modules(shape.linear_names, "all-linear", output_head=shape.output_head)
    assert sorted(chosen) == peft_all_linear(real_model(model_type, facts))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "kind"), ENCODERS.values(), ids=ENCODERS)
def test_all_linear_of_encoders_is_pefts(family, kind):
    model, shape = encoder_and_shape(family, kind)
    chosen = calc.select_modules(shape.linear_names, "all-linear", output_head=shape.output_head)
    assert sorted(chosen) == peft_all_linear(model)


@pytest.mark.parametrize(("model_type", "facts"), VARIANTS.values(), ids=VARIANTS)
def test_aliases_are_the_groups_of_the_shape(model_type, facts):
    check_aliases(calc.shape_from_config(facts | {"model_type": model_type}, "test"))


@pytest.mark.parametrize(("family", "kind"), ENCODERS.values(), ids=ENCODERS)
def test_aliases_of_encoders_are_the_groups_of_the_shape(family, kind):
    check_aliases(encoder_and_shape(family, kind)[1])


def check_aliases(shape):
    """By names alone, the aliases find what the shape knows to be attention and MLP."""
    for group in ("attention", "mlp"):
        known = {name for linear in shape.linears if linear.group == group for name in shape.full_names(linear)}
        assert set(calc.select_modules(shape.linear_names, group)) == known


def test_aliases_in_any_case():
    assert calc.select_modules(NAMES, "All-Linear", output_head="lm_head") == [n for n in NAMES if n != "lm_head"]


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("attention", "attention"),
        (" ALL-linear ", "all-linear"),
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        (" q_proj , v_proj, q_proj,", ("q_proj", "v_proj")),
        ("c_attn", ("c_attn",)),
        ("mlp.c_proj", ("mlp.c_proj",)),
        (r".*layers\.\d{1,2}\.mlp\..*", r".*layers\.\d{1,2}\.mlp\..*"),
    ],
)
def test_parse_targets(text, targets):
    assert calc.parse_targets(text) == targets


@pytest.mark.parametrize("text", ["", "  ", ",,"])
def test_parse_targets_refuses_nothing(text):
    with pytest.raises(ConfigError, match="^targets is"):
        calc.parse_targets(text)


def test_no_match_names_what_there_is():
    with pytest.raises(TargetError) as caught:
        calc.select_modules(["a.q_proj", "b.q_proj", "b.v_proj"], ["wq"])
    assert str(caught.value) == (
        "target_modules is 'wq', which matches no module; allowed: attention, mlp, all-linear, "
        "a regular expression for whole names, or some of q_proj, v_proj."
    )
