"""Target matching against PEFT's own, over the names of real models."""

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from test_calc_shapes import ENCODERS, VARIANTS, encoder_and_shape, real_model

from lora_engine import calc
from lora_engine.calc.targets import select_by_config, select_linears
from lora_engine.config import LoraConfig, method_from_dict, to_dict
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


FULL = LoraConfig(
    target_modules=["q_proj", "v_proj"],
    layers_to_transform=[0, 2],
    layers_pattern="layers",
    exclude_modules=["2.self_attn.v_proj"],
    rank_pattern={"v_proj": 4, "q_proj": 2},
    alpha_pattern={"q_proj": 3.0},
    target_parameters=["mlp.experts.down_proj"],
)


@pytest.mark.parametrize(
    "config",
    [
        FULL,
        LoraConfig(),
        LoraConfig(target_modules=("a",), layers_to_transform=3),
        LoraConfig(exclude_modules=r".*\.x"),
    ],
)
def test_config_goes_through_json_and_can_be_hashed(config):
    values = json.loads(json.dumps(to_dict(config)))
    again = method_from_dict(values)
    assert again == config
    assert hash(again) == hash(config)
    assert list(again.rank_pattern) == list(config.rank_pattern)  # the first key that fits counts
    assert isinstance(values["rank_pattern"], dict)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"layers_to_transform": 1}, "layers_to_transform is 1; allowed: None with target_modules 'all-linear'"),
        ({"target_modules": ".*q", "layers_pattern": "h"}, "layers_pattern is 'h'; allowed: None with target_modules"),
        ({"target_modules": ("q",), "layers_pattern": "h"}, "layers_pattern is 'h'; allowed: None without layers_to"),
        ({"target_modules": ("q",), "layers_to_transform": -1}, "layers_to_transform is -1; allowed: a layer's index"),
        ({"target_modules": ("q",), "layers_to_transform": (0, "1")}, "allowed: a layer's index from 0, or a list"),
        ({"target_modules": ("q",), "layers_to_transform": True}, "layers_to_transform is True"),
        ({"target_modules": ("q",), "layers_to_transform": 1, "layers_pattern": "("}, "a regular expression ("),
        ({"target_modules": ("q",), "layers_to_transform": 1, "layers_pattern": (1,)}, "or a list of names"),
        ({"exclude_modules": "("}, "exclude_modules is '('; allowed: a regular expression ("),
        ({"exclude_modules": (1,)}, "exclude_modules is (1,); allowed: a list of names or a regular expression"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] is 0; allowed: a whole number from 1 to 65536"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern['q'] is 1.5"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern is '('; allowed: a regular expression ("),
        ({"rank_pattern": {"": 1}}, "a mapping whose keys are module names or regular expressions"),
        ({"rank_pattern": "q"}, "rank_pattern is 'q'; allowed: a mapping from the end of a module's name to a number"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern['q'] is -1; allowed: a number from 0"),
        ({"target_parameters": "w"}, "target_parameters is 'w'; allowed: a list of parameter names"),
        ({"target_modules": ()}, "target_modules is (); allowed: a name, a list of names or a regular expression"),
    ],
)
def test_configs_that_are_refused(wrong, says):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**wrong)
    assert says in str(caught.value)


@given(
    name=st.sampled_from(NAMES),
    keys=st.lists(
        st.sampled_from(["q_proj", "proj", r".*\.1\..*", "mlp.up_proj", "x", "self_attn", "1.self_attn.q_proj", ".*"]),
        max_size=3,
        unique=True,
    ),
)
def test_ranks_and_alphas_are_those_that_peft_looks_up(name, keys):
    pattern = {key: number for number, key in enumerate(keys, 1)}
    expected = pattern.get(get_pattern_key(pattern.keys(), name), 99)
    config = LoraConfig(r=99, lora_alpha=99, rank_pattern=pattern, alpha_pattern=pattern).at(name)
    assert (config.r, config.lora_alpha) == (expected, expected)


@given(
    targets=st.lists(
        st.sampled_from(["q_proj", "proj", "mlp.c_proj", "model.layers.1.mlp.up_proj", "lm_head"]), min_size=1
    ),
    layers=st.one_of(st.none(), st.integers(0, 11), st.lists(st.integers(0, 11), max_size=3)),
    pattern=st.sampled_from([None, "layers", "h", ["h", "layers"], [], "model.layers", "nothing", r"l\w+s"]),
    exclude=st.sampled_from([None, ["q_proj"], ["10.self_attn.q_proj", "c_proj"], r".*\.1\..*", ["proj"]]),
)
def test_layers_and_exclusions_match_as_in_peft(targets, layers, pattern, exclude):
    pattern = None if layers is None else pattern
    config = PeftConfig(
        target_modules=targets, layers_to_transform=layers, layers_pattern=pattern, exclude_modules=exclude
    )
    expected = [name for name in NAMES if check_target_module_exists(config, name)]
    try:
        found = calc.select_modules(
            NAMES, targets, layers_to_transform=layers, layers_pattern=pattern, exclude_modules=exclude or ()
        )
    except TargetError:
        found = []
    assert found == expected


def test_selection_says_ranks_and_layers():
    shape = calc.load_shape("embedded")  # six layers
    config = LoraConfig(
        r=8,
        target_modules=("q_proj", "v_proj"),
        layers_to_transform=(2, 3, 5),
        exclude_modules=("5.self_attn.v_proj",),
        rank_pattern={"3.self_attn.q_proj": 5, "v_proj": 2},
    )
    selection = select_linears(shape, config)
    assert selection is select_linears(shape, replace(config, r=64, lora_alpha=1.0))  # one for every r
    assert [(t.name, t.count, t.r(config)) for t in selection.targets] == [
        ("self_attn.q_proj", 2, 8),
        ("self_attn.q_proj", 1, 5),
        ("self_attn.v_proj", 2, 2),
    ]
    assert selection.first_layer == 2
    patterns = [({t.name: t.r(config) for t in targets}, layers) for targets, layers in selection.patterns]
    assert patterns == [
        ({"self_attn.q_proj": 8, "self_attn.v_proj": 2}, (2,)),
        ({"self_attn.q_proj": 5, "self_attn.v_proj": 2}, (3,)),
        ({"self_attn.q_proj": 8}, (5,)),
    ]
    assert (selection.values_per_rank, selection.fixed_values) == (2 * 384, 5 * 384 + 2 * 2 * 256)


def test_a_rule_is_the_same_for_one_layer_as_for_all():
    """What is tried on one name for all layers agrees with every name tried."""
    shape = calc.load_shape("TinyLlama")
    for config in (
        LoraConfig(target_modules=("q_proj", "mlp.up_proj"), layers_to_transform=(0, 21)),
        LoraConfig(target_modules=("v_proj", "lm_head"), layers_to_transform=3, layers_pattern="layers"),
        LoraConfig(target_modules=("v_proj", "lm_head"), exclude_modules=("4.self_attn.v_proj",)),
        LoraConfig(target_modules="mlp", layers_to_transform=(1, 2)),
        LoraConfig(exclude_modules=r".*\.1\d\..*"),
    ):
        chosen = select_by_config(shape.linear_names, config, output_head=shape.output_head)
        assert sum(count for _, count in select_linears(shape, config).linears) == len(chosen)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=16),
        LoraConfig(target_modules=("q_proj", "v_proj"), layers_to_transform=tuple(range(0, 120, 2))),
        LoraConfig(target_modules=r".*\.(q_proj|v_proj)"),
        LoraConfig(rank_pattern={"q_proj": 4}),
    ],
)
def test_selecting_in_the_largest_model_takes_milliseconds(config):
    seconds = []
    for layers in (141, 142, 143, 144, 145):
        shape = calc.shape_from_config(
            calc.CATALOG["meta-llama/Llama-3.1-405B"] | {"num_hidden_layers": layers}, f"timed {layers}"
        )
        began = time.perf_counter()
        select_linears(shape, config)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.005
