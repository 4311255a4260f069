"""The layout of a pack: what it begins with, what it gives back, what it refuses."""

import copy

import pytest
import tiny
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from lora_engine import methods
from lora_engine.config import FullConfig, LoraConfig
from lora_engine.errors import ConfigError
from lora_engine.methods import lora
from lora_engine.methods.packed import eject_pack, inject_pack, pack_of, refusal
from lora_engine.methods.places import task_head_parameters
from lora_engine.methods.quantized import quantize_model

RANKS, SEEDS = (3, 8, 1, 5), (0, 1, 1, 4)
CONFIGS = [LoraConfig(r=r, lora_alpha=5.0 + i) for i, r in enumerate(RANKS)]


def dropless(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def packed(kind="llama", **more):
    model = dropless(tiny.MODELS[kind]())
    return model, inject_pack(model, CONFIGS, seeds=SEEDS, **more)


def fill(pack):
    """Values that no run has: every trained tensor of every row random, the padding left alone."""
    generator = torch.Generator().manual_seed(0)
    for i in range(pack.size):
        for value in pack.state_dict(i).values():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_rows_begin_as_separate_runs_do(kind):
    model, pack = packed(kind)
    for i, (config, seed) in enumerate(zip(CONFIGS, SEEDS, strict=True)):
        alone = methods.inject(tiny.MODELS[kind](), config, seed=seed)
        wanted = methods.state_dict(alone, config)
        assert list(pack.state_dict(i)) == list(wanted)
        assert list(pack.state_dict(i)) == [name for name, p in alone.named_parameters() if p.requires_grad]
        for name, value in pack.state_dict(i).items():
            assert torch.equal(value, wanted[name])
    assert pack_of(model) is pack


@pytest.mark.parametrize("kind", tiny.MODELS)
@torch.no_grad()
def test_every_row_computes_what_its_own_model_computes(kind):
    model, pack = packed(kind)
    fill(pack)
    ids = torch.cat([tiny.token_ids(rows=2, seed=i) for i in range(4)])
    logits = model(input_ids=ids).logits.chunk(4)
    for i, (config, seed) in enumerate(zip(CONFIGS, SEEDS, strict=True)):
        alone = methods.inject(dropless(tiny.MODELS[kind]()), config, seed=seed)
        methods.load_state_dict(alone, config, pack.state_dict(i))
        torch.testing.assert_close(logits[i], alone(input_ids=ids.chunk(4)[i]).logits, rtol=1e-4, atol=1e-5)
    pack.set_enabled(False)
    if not list(task_head_parameters(model)):
        base = dropless(tiny.MODELS[kind]())(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, base)


def test_a_row_is_one_stretch_of_memory_and_the_optimizers_parameter():
    model, pack = packed()
    assert pack.parameters.shape == pack.gradients.shape == (4, pack.num_parameters)
    for i, row in enumerate(pack.rows):
        assert row.data_ptr() == pack.parameters[i].data_ptr()
        assert row.grad.data_ptr() == pack.gradients[i].data_ptr()
    ids = torch.cat([tiny.token_ids(rows=1)] * 4)
    model(input_ids=ids, labels=ids).loss.backward()
    layer = next(iter(pack.layers.values()))
    assert layer.lora_A.shape == (4, 8, tiny.HIDDEN)
    assert layer.lora_B.shape[::2] == (4, 8)
    assert torch.count_nonzero(pack.gradients)
    pack.zero_grad()
    assert not layer.lora_B.grad.any()


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_ejecting_leaves_the_base_bit_for_bit(kind):
    model = tiny.MODELS[kind]()
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    fill(inject_pack(model, CONFIGS, seeds=SEEDS))
    eject_pack(model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    assert pack_of(model) is None
    assert eject_pack(model) is model


@pytest.mark.parametrize("kind", ["llama", "bert-classifier"])
def test_keeping_rows_forms_a_smaller_pack(kind):
    model, pack = packed(kind)
    fill(pack)
    states = [{name: value.clone() for name, value in pack.state_dict(i).items()} for i in range(4)]
    kept = pack.keep([2, 0])
    assert pack_of(model) is kept
    assert next(iter(kept.layers.values())).r == 3
    for i, old in enumerate((2, 0)):
        assert all(torch.equal(value, states[old][name]) for name, value in kept.state_dict(i).items())
    with pytest.raises(KeyError):
        kept.load_state_dict(0, {})


def test_heads_are_those_given():
    model = tiny.bert_classifier()
    heads = [{name: torch.full(p.shape, float(i)) for name, p in task_head_parameters(model)} for i in range(4)]
    pack = inject_pack(model, CONFIGS, seeds=SEEDS, heads=heads)
    for i in range(4):
        assert (pack.state_dict(i)["classifier.weight"] == i).all()
        assert (pack.state_dict(i)["classifier.bias"] == i).all()


def test_lora_is_ejected_too():
    model = tiny.gpt2()
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    methods.inject(model, LoraConfig(r=3))
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            layer.lora_B.weight.fill_(1.0)
    lora.merge(model)
    lora.eject(model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def moe():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
        )
    ).eval()  # fmt: skip


class Gathering(nn.Module):
    """Sends some of the tokens through a map, as experts do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = torch.zeros_like(x) if self.inner.in_features == self.inner.out_features else self.inner(x)
        out[:, ::2] = self.inner(x[:, ::2].reshape(-1, x.shape[-1])).view(x.shape[0], -1, out.shape[-1])
        return out


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (FullConfig(), "method is 'full'; only lora is packed"),
        (LoraConfig(use_dora=True), "use_dora is True"),
        (LoraConfig(lora_dropout=0.1), "lora_dropout is 0.1: separate runs draw their own masks"),
    ],
    ids=str,
)
def test_methods_that_cannot_be_packed(config, why):
    assert why in refusal(config, tiny.llama())


def test_models_that_cannot_be_packed():
    assert refusal(LoraConfig(), tiny.llama()) is None
    assert refusal(LoraConfig(), quantize_model(tiny.llama(), "nf4")) is None
    assert "the model has dropout of its own" in refusal(LoraConfig(), tiny.gpt2())
    assert refusal(LoraConfig(), dropless(tiny.bert_classifier())) is None
    assert "target_parameters are adapted" in refusal(LoraConfig(target_parameters=("experts.down_proj",)), moe())
    attention = LoraConfig(target_modules=("q_proj", "v_proj"))
    assert refusal(attention, moe()) is None
    gathers = tiny.llama()
    gathers.model.layers[0].mlp.down_proj = nn.Sequential(nn.Identity(), gathers.model.layers[0].mlp.down_proj)
    gathers.model.layers[0].self_attn.o_proj = Gathering(gathers.model.layers[0].self_attn.o_proj)
    why = refusal(LoraConfig(target_modules=("q_proj", "inner")), gathers)
    assert why.startswith("target_modules matches 'model.layers.0.self_attn.o_proj.inner', which does not see every")
    assert not gathers.training
    state = torch.get_rng_state()
    refusal(LoraConfig(), tiny.gpt2())
    assert not torch.equal(state, torch.zeros_like(state))


def test_configs_that_do_not_fit_together():
    model = tiny.llama()
    other = LoraConfig(target_modules=("q_proj",))
    with pytest.raises(ConfigError, match="target_modules is .*; allowed: what adapts the same modules"):
        inject_pack(model, [LoraConfig(), other], seeds=(0, 0))
    with pytest.raises(ConfigError, match="allowed: LoRA without DoRA, dropout and target_parameters"):
        inject_pack(model, [LoraConfig(lora_dropout=0.5)], seeds=(0,))
    assert pack_of(model) is None


def test_sequences_must_divide_among_the_configs():
    model, _ = packed()
    with pytest.raises(ValueError, match="allowed: the sequences of 4 configs, one after another"):
        model(input_ids=tiny.token_ids(rows=6))
