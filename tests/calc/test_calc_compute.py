"""Operations against torch's own counter on real models; seconds and energy by arithmetic."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache

from lora_engine import calc
from lora_engine.calc import compute
from lora_engine.calc.gpus import GPUS
from lora_engine.calc.structure import ExpertShape, LinearShape
from lora_engine.config import BottleneckConfig, FullConfig, HeadConfig, LoraConfig, PrefixConfig
from lora_engine.errors import ConfigError
from lora_engine.methods import full, lora

SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 500,
    "intermediate_size": 224,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PLAIN = {key: value for key, value in SMALL.items() if key not in ("head_dim", "num_key_value_heads")}
FAMILIES = {
    "llama": SMALL,
    "qwen2": SMALL,
    "gemma": SMALL,
    "phi3": SMALL,
    "phi": PLAIN,
    "gpt_neox": PLAIN,
    "gpt2": {"n_embd": 96, "n_layer": 3, "n_head": 4, "vocab_size": 500, "bos_token_id": 0, "eos_token_id": 0},
    "opt": {key: PLAIN[key] for key in PLAIN if key != "intermediate_size"}
    | {"ffn_dim": 224, "word_embed_proj_dim": 48, "do_layer_norm_before": False},
    "bert": PLAIN,
}
BATCH, LENGTH = 2, 48
# The counter knows no product in place; eager attention shows it the products of attention.
IN_PLACE = {torch.ops.aten.addmm_: lambda _out, a, b, **_more: 2 * a[0] * a[1] * b[1]}


def build(family, **more):
    config = CONFIG_MAPPING[family](**(FAMILIES.get(family, {}) | more))
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    facts = config.to_dict()
    if family == "bert":
        facts["architectures"] = ["BertForMaskedLM"]
    return auto.from_config(config, attn_implementation="eager"), calc.shape_from_config(facts, family)


def counted(model, **inputs):
    ids = torch.randint(1, 500, (BATCH, LENGTH))
    model.train()
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss.backward()
    return counter.get_total_flops()


LORAS = {
    "all": LoraConfig(r=4),
    "attention": LoraConfig(r=4, target_modules="attention"),
    "mlp": LoraConfig(r=4, target_modules="mlp"),
    "last layer": LoraConfig(r=4, target_modules=r".*\.2\..*(proj|dense|c_attn|qkv_proj|key|fc1|fc2).*"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", LORAS)
def test_lora_operations_are_what_torch_counts(family, targets):
    method = LORAS[targets]
    model, shape = build(family)
    model = lora.inject(model, method)
    assert calc.estimate_step_flops(shape, method, BATCH, LENGTH) == pytest.approx(counted(model), rel=0.005)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_operations_are_what_torch_counts(family):
    model, shape = build(family)
    model = full.inject(model, FullConfig())
    assert calc.estimate_step_flops(shape, FullConfig(), BATCH, LENGTH) == pytest.approx(counted(model), rel=0.005)


@pytest.mark.parametrize("target", ["o_proj", "gate_proj", "down_proj", "lm_head", "k_proj"])
def test_nothing_goes_back_below_what_is_trained(target):
    method = LoraConfig(r=4, target_modules=(target,))
    model, shape = build("llama")
    model = lora.inject(model, method)
    assert calc.estimate_step_flops(shape, method, BATCH, LENGTH) == pytest.approx(counted(model), rel=0.005)


@pytest.mark.parametrize("method", [LORAS["all"], FullConfig()])
def test_checkpointing_adds_one_forward(method):
    model, shape = build("llama")
    model = (lora if isinstance(method, LoraConfig) else full).inject(model, method)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    predicted = calc.count_step_flops(shape, method, BATCH, LENGTH, checkpointing=True)
    assert predicted.recomputed > 0
    # torch stops recomputing once it has every saved tensor: the last product of a layer may be spared.
    assert predicted.total == pytest.approx(counted(model), rel=0.06)
    assert predicted.total >= counted(model)


def with_experts(shape, num_experts, per_token):
    """Mixtral's parts on a Llama: a router and 3-D experts in the place of the MLP."""
    h, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_layers
    router = LinearShape("mlp.gate", layers, h, num_experts, "linear", False, "mlp")
    linears = [x for x in shape.linears if x.group != "mlp"]
    others = [replace(x, feeds=("mlp.gate",)) if x.name == "post_attention_layernorm" else x for x in shape.others]
    return replace(
        shape,
        linears=(*linears[:-1], router, linears[-1]),
        others=tuple(others),
        experts=(
            ExpertShape("mlp.experts.gate_up_proj", layers, num_experts, h, 2 * inner),
            ExpertShape("mlp.experts.down_proj", layers, num_experts, inner, h),
        ),
        experts_per_token=per_token,
    )


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj",), None])
def test_only_active_experts_count(targets):
    """Two of four experts, every token in exactly two: torch multiplies what is routed and no more."""
    config = CONFIG_MAPPING["mixtral"](**SMALL, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    shape = with_experts(build("llama")[1], 4, 2)
    assert shape.total_parameters == sum(p.numel() for p in model.parameters())
    method = FullConfig() if targets is None else LoraConfig(r=4, target_modules=targets)
    model = (full if targets is None else lora).inject(model, method)
    assert calc.estimate_step_flops(shape, method, BATCH, LENGTH) == pytest.approx(counted(model), rel=0.005)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_head_needs_no_backward_through_the_base(family):
    model, shape = build(family, tie_word_embeddings=False)
    model.requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    step = calc.count_step_flops(shape, HeadConfig(), BATCH, LENGTH)
    assert step.total == pytest.approx(counted(model), rel=0.005)
    assert step.backward == BATCH * LENGTH * 2 * 96 * 500


class Adapter(nn.Module):
    """Houlsby et al. 2019, section 2.1, around a module that may answer with a tuple."""

    def __init__(self, inside, size, inner):
        super().__init__()
        self.inside = inside
        self.down, self.up = nn.Linear(size, inner), nn.Linear(inner, size)

    def forward(self, *args, **more):
        out = self.inside(*args, **more)
        h = out[0] if isinstance(out, tuple) else out
        h = h + self.up(torch.nn.functional.gelu(self.down(h)))
        return (h, *out[1:]) if isinstance(out, tuple) else h


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bottleneck_operations(family, placement):
    model, shape = build(family)
    model.requires_grad_(False)
    method = BottleneckConfig(reduction_factor=8, placement=placement)
    for layer in model.model.layers if family == "llama" else model.transformer.h:
        layer.mlp = Adapter(layer.mlp, 96, 96 // 8)
        if placement == "houlsby":
            name = "self_attn" if family == "llama" else "attn"
            setattr(layer, name, Adapter(getattr(layer, name), 96, 96 // 8))
    assert calc.estimate_step_flops(shape, method, BATCH, LENGTH) == pytest.approx(counted(model), rel=0.005)


def test_prefix_operations():
    model, shape = build("llama")
    model.requires_grad_(False)
    length = 16
    pairs = [
        tuple(torch.randn(BATCH, 2, length, 24, requires_grad=True) for _ in range(2)) for _ in range(shape.num_layers)
    ]
    cache = DynamicCache(pairs)
    method = PrefixConfig(prefix_length=length)
    measured = counted(model, past_key_values=cache, attention_mask=torch.ones(BATCH, length + LENGTH))
    assert calc.estimate_step_flops(shape, method, BATCH, LENGTH) == pytest.approx(measured, rel=0.005)
    layers, kv = shape.num_layers, shape.kv_width
    mlp = nn.Sequential(nn.Linear(kv, 40), nn.Tanh(), nn.Linear(40, 2 * kv))
    embedding = torch.randn(length, kv, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        sum(mlp(embedding).sum() for _ in range(layers)).backward()
    through_mlp = PrefixConfig(prefix_length=length, reparametrize=True, encoder_hidden_size=40)
    more = calc.estimate_step_flops(shape, through_mlp, BATCH, LENGTH) - calc.estimate_step_flops(
        shape, method, BATCH, LENGTH
    )
    assert more == counter.get_total_flops()


def test_well_known_rules_of_thumb():
    """6N a token for full fine-tuning, a little over 4N on a frozen base, at short sequences."""
    shape = calc.load_shape("Llama-2-7b-hf")
    n = sum(x.count * x.in_features * x.out_features for x in shape.linears)
    assert calc.count_step_flops(shape, FullConfig(), 1, 16).per_token == pytest.approx(6 * n, rel=0.002)
    assert calc.count_step_flops(shape, LoraConfig(r=8), 1, 16).per_token == pytest.approx(4 * n, rel=0.02)
    frozen = calc.count_step_flops(shape, LoraConfig(r=8), 1, 16, checkpointing=True).per_token
    assert frozen == pytest.approx(6 * n, rel=0.04)


def test_accumulation_is_so_many_micro_batches():
    shape = calc.load_shape("embedded")
    one = calc.count_step_flops(shape, LoraConfig(), 2, 64)
    four = calc.count_step_flops(shape, LoraConfig(), 2, 64, accumulation=4)
    assert (four.total, four.tokens) == (4 * one.total, 4 * one.tokens)
    assert one.total == one.forward + one.backward
    dora = calc.count_step_flops(shape, LoraConfig(use_dora=True), 2, 64)
    assert dora.forward > one.forward
    assert dora.backward == one.backward


@pytest.mark.parametrize("argument", ["batch_size", "seq_length", "accumulation"])
def test_sizes_out_of_range(argument):
    sizes = {"batch_size": 1, "seq_length": 8, argument: 0}
    with pytest.raises(ConfigError, match=f"{argument} is 0; allowed: a whole number of at least 1"):
        calc.estimate_step_flops(calc.load_shape("embedded"), LoraConfig(), **sizes)


def test_seconds_and_energy():
    card = calc.find_gpu("A100, 80 GB")
    assert calc.estimate_step_seconds(312e12, card, "bf16", 1.0) == 1.0
    assert calc.estimate_step_seconds(312e12, card, "nf4", 0.5) == 2.0
    assert calc.estimate_step_seconds(19.5e12, card, "fp32", 1.0) == 1.0
    assert calc.estimate_step_seconds(156e12, card, "fp32", 1.0, tf32=True) == 1.0
    assert calc.estimate_step_seconds(1.0, card, "bf16", moved_bytes=2039e9) == 1.0
    assert calc.estimate_step_seconds(1e15, card, "bf16") == pytest.approx(1e15 / (0.4 * 312e12))
    assert calc.estimate_energy_watt_hours(3600, card) == 400
    assert calc.estimate_energy_watt_hours(1800, card, 0.5) == 100


def test_old_cards_have_no_bfloat16():
    t4 = calc.find_gpu("T4")
    assert compute.peak_flops_per_second(t4, "bf16") == compute.peak_flops_per_second(t4, "fp32")
    assert compute.peak_flops_per_second(t4, "mixed-fp16") == compute.peak_flops_per_second(t4, "nf4") == 65e12


def test_cards_are_plausible():
    names = [gpu.name for gpu in GPUS]
    assert len(set(names)) == len(names) >= 25
    for gpu in GPUS:
        assert gpu.fp32_flops_per_second <= gpu.tf32_flops_per_second <= gpu.fp16_flops_per_second
        said = int(gpu.name.rpartition(", ")[2].removesuffix(" GB"))
        assert 0.9 * said * 1e9 < gpu.memory_bytes <= 1.08 * said * 1e9, gpu.name
        assert 0 < gpu.bandwidth_bytes_per_second < 1e13
        assert 70 <= gpu.power_watts <= 1000
        assert calc.find_gpu(gpu.name) is gpu


def test_cards_are_found_by_the_name_people_use():
    for said, name in (
        ("t4", "Tesla T4, 16 GB"),
        ("RTX 4090", "GeForce RTX 4090, 24 GB"),
        ("3090", "GeForce RTX 3090, 24 GB"),
        ("H100", "H100, 80 GB"),
        ("4060 Ti", "GeForce RTX 4060 Ti, 16 GB"),
        ("l4", "L4, 24 GB"),
        ("L40", "L40, 48 GB"),
        ("A10", "A10, 24 GB"),
        ("A100 80", "A100, 80 GB"),
    ):
        assert calc.find_gpu(said).name == name
    assert calc.find_gpu("") is None
    assert calc.find_gpu("abacus") is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: calc.estimate_step_seconds(1.0, c, "fp8"), "precision is 'fp8'; allowed: one of fp32"),
        (lambda c: calc.estimate_step_seconds(1.0, c, "bf16", 0.0), "utilisation is 0.0; allowed: a number above 0"),
        (lambda c: calc.estimate_step_seconds(-1.0, c, "bf16"), "flops is -1.0; allowed: a number of at least 0"),
        (lambda c: calc.estimate_energy_watt_hours(-1.0, c), "seconds is -1.0"),
        (lambda c: calc.estimate_energy_watt_hours(1.0, c, 2.0), "load is 2.0; allowed: a number above 0, up to 1"),
    ],
)
def test_compute_refuses_what_makes_no_sense(call, says):
    with pytest.raises(ConfigError) as caught:
        call(GPUS[0])
    assert says in str(caught.value)
