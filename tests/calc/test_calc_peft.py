"""Counts against PEFT's over random configs: whatever PEFT makes of one, trained parameters or an error, so do we.

Every architecture is built once, with three layers on the meta device; PEFT injects into a copy of it."""

import copy
import random
import re
import warnings

import pytest
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from test_calc_shapes import ENCODERS, SMALL, VARIANTS, encoder_and_shape, real_model

from lora_engine import calc
from lora_engine.calc.experts import OLD_NAMES
from lora_engine.calc.structure import ExpertShape, OtherShape
from lora_engine.config import LoraConfig
from lora_engine.errors import InputError

EXPERTS = {
    "mixtral": SMALL | {"num_key_value_heads": 2, "num_local_experts": 3},
    "qwen3_moe": SMALL | {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 3, "moe_intermediate_size": 20},
    "gpt_oss": SMALL | {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3},
}
REAL = ("Qwen/Qwen2.5-0.5B", "openai-community/gpt2", "TinyLlama/TinyLlama-1.1B-Chat-v1.0")  # in their own size
COMBINATIONS = 36  # of each architecture


def expert_shape(model_type, model):
    """The shape of a tiny model of experts, made by hand from a Llama's and the real parameters."""
    from dataclasses import replace

    facts = EXPERTS[model_type]
    biases = {"attention_bias": True} if model_type == "gpt_oss" else {}
    dense = calc.shape_from_config(facts | biases | {"model_type": "llama"}, model_type)
    sizes = {name: p.shape for name, p in model.named_parameters()}
    stacks, transposed = [], model_type == "gpt_oss"
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        experts, a, b = sizes[f"model.layers.0.{name}"]
        inner, out = (a, b) if transposed else (b, a)
        stacks.append(ExpertShape(name, 3, experts, inner, out, has_bias=transposed, transposed=transposed))
    router = "mlp.router" if model_type == "gpt_oss" else "mlp.gate"
    size = sum(n.numel() for name, n in sizes.items() if name.startswith(f"model.layers.0.{router}."))
    others = (*dense.others, OtherShape(router, 3, size, "router", 48, per_layer=True))
    linears = tuple(linear for linear in dense.linears if linear.group != "mlp")
    return replace(dense, model_type=model_type, linears=linears, others=others, experts=tuple(stacks))


def architecture(name):
    """(real model on the meta device, shape)."""
    if name in ENCODERS:
        return encoder_and_shape(*ENCODERS[name])
    if name in EXPERTS:
        model = real_model(name, EXPERTS[name])
        return model, expert_shape(name, model)
    if name in REAL:
        facts = dict(calc.CATALOG[name])
        return real_model(facts.pop("model_type"), facts), calc.load_shape(name)
    model_type, facts = VARIANTS[name]
    return real_model(model_type, facts), calc.shape_from_config(facts | {"model_type": model_type}, name)


def random_targets(rng, shape):
    names = list(shape.linear_names)
    leaves = sorted({name.rpartition(".")[2] for name in names})
    path = shape.layer_path
    few = rng.sample(leaves, rng.randint(1, min(3, len(leaves))))
    inside = [name for name in names if name.startswith(path + ".")]
    choices = [
        "all-linear",
        tuple(few),
        tuple(few),
        tuple(few),
        (*few, "nonsense"),
        tuple({".".join(name.split(".")[-2:]) for name in rng.sample(inside, 2)}),
        tuple({".".join(name.split(".")[-3:]) for name in rng.sample(inside, 3)}),
        tuple(rng.sample(names, rng.randint(1, 4))),
        (rng.choice(names), *few),
        rf".*\.({'|'.join(few)})",
        rf"{re.escape(path)}\.[02]\..*({'|'.join(few)})",
        rng.choice(leaves),  # one string: a regular expression for a whole name
        ("nonsense",),
        (*few, rng.choice([part.name for part in shape.others if part.kind == "norm"])),
        (rng.choice(["1", "2", inside[0].split(".")[-2]]),),
    ]
    if shape.experts:
        choices += [("gate_proj", "up_proj", "q_proj"), ("w1", "w2", "w3"), ("down_proj", "v_proj"), ("gate",), ("w1",)]
    if shape.model_type in OLD_NAMES:
        # PEFT turns a regular expression into the last names of what it matches, and so adapts other layers too.
        choices = [targets for targets in choices if not isinstance(targets, str) or targets == "all-linear"]
    return rng.choice(choices)


def random_config(rng, shape):
    """Arguments that both LoraConfigs take."""
    targets = random_targets(rng, shape)
    leaves = sorted({name.rpartition(".")[2] for name in shape.linear_names})
    module_list = shape.layer_path.rpartition(".")[2]
    listed = not isinstance(targets, str) or rng.random() < 0.05

    def keys():
        leaf = rng.choice(leaves)
        forms = (
            leaf,
            rf"{module_list}\.1\..*{leaf}",
            f"2.{rng.choice(list(shape.linear_names)).split('.', 3)[-1]}",
            ".*",
        )
        return rng.choice(forms)

    config = {"r": rng.randint(1, 16), "target_modules": targets, "use_rslora": rng.random() < 0.3}
    config["use_dora"] = rng.random() < 0.25
    config["lora_dropout"] = rng.choice([0.0, 0.0, 0.0, 0.1])
    if listed and rng.random() < 0.45:
        config["layers_to_transform"] = rng.choice([0, 1, 2, 3, [0, 2], [1], [5, 6], []])
    if listed and rng.random() < (0.5 if "layers_to_transform" in config else 0.03):
        config["layers_pattern"] = rng.choice([module_list, [module_list], ["x", module_list], "nonsense", []])
    if rng.random() < 0.35:
        config["exclude_modules"] = rng.choice(
            [[rng.choice(leaves)], leaves, rf".*\.{module_list}\.1\..*", [keys()], rf".*{rng.choice(leaves)}"]
        )
    if rng.random() < 0.5:
        config["rank_pattern"] = {keys(): rng.randint(1, 20) for _ in range(rng.randint(1, 3))}
        config["alpha_pattern"] = {keys(): rng.randint(1, 20)}
    conv = any(linear.kind == "conv1d" for linear in shape.linears)
    if not conv and rng.random() < (0.5 if shape.experts else 0.15):
        stacked = [part.name for part in shape.experts]
        forms = [f"{rng.choice(leaves)}.weight", f"{rng.choice(shape.others).name}.weight", "nonsense.weight"]
        config["target_parameters"] = (
            rng.sample(stacked, rng.randint(1, len(stacked))) if stacked else [rng.choice(forms)]
        )
        config["use_dora"] = config["use_dora"] and rng.random() < 0.2
        if rng.random() < 0.4:
            config["target_modules"] = ()
    return config


def theirs(model, config):
    """What PEFT trains; None where it refuses."""
    arguments = {key: copy.deepcopy(value) for key, value in config.items()}
    if isinstance(arguments["target_modules"], tuple):
        arguments["target_modules"] = list(arguments["target_modules"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = get_peft_model(copy.deepcopy(model), PeftConfig(**arguments))
        except ValueError:
            return None
    return sum(p.numel() for p in made.parameters() if p.requires_grad)


def ours(shape, config):
    try:
        counted = calc.count_parameters(shape, LoraConfig(**config))
    except InputError:
        return None
    assert counted.trainable_parameters == sum(module.trainable_parameters for module in counted.modules)
    for module in counted.modules:
        terms, equals, total = module.formula.partition(" = ")
        assert equals
        assert eval(terms.replace("experts", "").replace("x", "*").replace("* *", "*")) == module.trainable_parameters
        assert total == f"{module.trainable_parameters:,}"
    return counted.trainable_parameters


@pytest.mark.parametrize("name", [*VARIANTS, *ENCODERS, *EXPERTS, *REAL])
def test_counts_of_random_configs_are_pefts(name):
    model, shape = architecture(name)
    rng = random.Random(f"counts of {name}")
    for _ in range(8 if name in REAL else COMBINATIONS * (3 if name in EXPERTS else 1)):
        config = random_config(rng, shape)
        assert ours(shape, config) == theirs(model, config), config


def test_the_combinations_are_many_and_mostly_train():
    assert (len(VARIANTS) + len(ENCODERS) + 3 * len(EXPERTS)) * COMBINATIONS >= 300
    rng = random.Random(0)
    shape = calc.shape_from_config(VARIANTS["llama"][1] | {"model_type": "llama"}, "llama")
    results = [ours(shape, random_config(rng, shape)) for _ in range(200)]
    assert sum(result is not None for result in results) > 100
