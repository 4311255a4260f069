"""LoRA on stacked experts: against PEFT with copied weights, in memory and on disk."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lora_engine.config import LoraConfig
from lora_engine.errors import ConfigError, TargetError
from lora_engine.export import ADAPTER_WEIGHTS, load_adapter, save_adapter
from lora_engine.methods import lora, trainable_parameters

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97,
    "intermediate_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
FACTS = {
    "mixtral": SMALL | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": SMALL | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 6},
    "gpt_oss": SMALL | {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 6},
}
STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
CASES = [
    ("mixtral", LoraConfig(r=2, lora_alpha=3, target_modules=(), target_parameters=STACKED)),
    ("mixtral", LoraConfig(r=2, lora_alpha=3, target_modules=("q_proj",), target_parameters=STACKED[1:])),
    ("mixtral", LoraConfig(r=2, lora_alpha=3, use_rslora=True)),
    ("qwen3_moe", LoraConfig(r=2, lora_alpha=3, target_modules=("gate_proj", "up_proj", "down_proj", "v_proj"))),
    (
        "qwen3_moe",
        LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=("gate", "o_proj"),
            target_parameters=STACKED,
            rank_pattern={"down_proj": 5, "gate.weight": 3},
            alpha_pattern={r"layers\.1\..*gate_up_proj": 7},
        ),
    ),
    ("gpt_oss", LoraConfig(r=3, lora_alpha=4, target_modules=("q_proj",), target_parameters=STACKED)),
]
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT looks at modules only
IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(3))


def base(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FACTS[family]))
    for p in model.parameters():  # experts start as they are allocated
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def filled(family, config):
    model = lora.inject(base(family), config)
    for adapter in lora.adapters(model).values():
        torch.nn.init.normal_(adapter.lora_B.weight, std=0.1)
    return model


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


@pytest.mark.parametrize(("family", "config"), CASES)
def test_outputs_and_gradients_equal_peft(family, config):
    ours = filled(family, config)
    theirs = peft.get_peft_model(
        base(family),
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
            target_modules=config.target_modules
            if isinstance(config.target_modules, str)
            else list(config.target_modules),
            target_parameters=list(config.target_parameters) or None,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
        ),
    ).eval()
    named, pairs = dict(theirs.named_parameters()), {}
    for name, value in lora.state_dict(ours).items():
        pairs[name] = named["base_model.model." + name.replace(".weight", ".default.weight")]
        with torch.no_grad():
            pairs[name].copy_(value)
    assert {id(p) for p in pairs.values()} == {id(p) for p in named.values() if p.requires_grad}
    mine, reference = ours(IDS).logits, theirs(IDS).logits
    assert relative(mine, reference) <= 1e-5
    assert relative(mine, base(family)(IDS).logits) > 1e-3
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(4))
    (mine * weights).sum().backward()
    (reference * weights).sum().backward()
    grads = dict(ours.named_parameters())
    for name, parameter in pairs.items():
        assert relative(grads[name].grad, parameter.grad) <= 1e-5, name


@pytest.mark.parametrize(("family", "config"), CASES)
def test_merge_dial_and_files(family, config, tmp_path):
    model, expected = filled(family, config), base(family)(IDS).logits
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = model(IDS).logits
    lora.merge(model)
    assert torch.allclose(model(IDS).logits, adapted, atol=1e-4)
    lora.unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    lora.set_scale(model, 0.0)
    assert torch.equal(model(IDS).logits, expected)
    lora.set_scale(model, 1.0)
    assert {id(p) for p in trainable_parameters(model)} == {
        id(p) for adapter in lora.adapters(model).values() for p in adapter.factors().values()
    }
    save_adapter(model, config, base_model="base", out=tmp_path)
    assert load_file(tmp_path / ADAPTER_WEIGHTS).keys() == {f"base_model.model.{n}" for n in lora.state_dict(model)}
    theirs = peft.PeftModel.from_pretrained(base(family), tmp_path).eval()
    assert relative(theirs(IDS).logits, adapted) <= 1e-5
    again = base(family)
    load_adapter(again, tmp_path)
    assert torch.equal(again(IDS).logits, adapted)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"target_parameters": STACKED, "use_dora": True}, ConfigError, "use_dora is True; allowed: False where model"),
        ({"target_parameters": STACKED, "lora_dropout": 0.1}, ConfigError, "lora_dropout is 0.1; allowed: 0 where"),
        ({"target_parameters": ("input_layernorm.weight",)}, TargetError, "allowed: parameters of two or three dim"),
        ({"target_parameters": ("q_proj.weight",)}, TargetError, "parameters of modules that target_modules leaves"),
        ({"target_modules": (), "target_parameters": ("x",)}, TargetError, "'x', which matches no parameter"),
    ],
)
def test_what_no_adapter_of_a_parameter_can_be(config, error, says):
    with pytest.raises(error, match=says):
        lora.inject(base("gpt_oss"), LoraConfig(**({"target_modules": ("q_proj",)} | config)))
