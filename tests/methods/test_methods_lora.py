"""LoRA in torch: against the numpy core in float64, against PEFT in float32, and its own promises."""

import copy

import numpy as np
import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_engine import core
from lora_engine.config import LoraConfig
from lora_engine.errors import TargetError
from lora_engine.methods import lora, trainable_parameters

# alpha / r = 3/2, once as 3/2 and once as 12/8: no power of two, so a forgotten factor shows.
RATIOS = [(2, 3.0), (8, 12.0)]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=24, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval()


def bert():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    return BertModel(config).eval()


def falcon():
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
    return FalconForCausalLM(config).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "falcon": falcon}


def fill_b(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for layer in lora.lora_layers(model).values():
        with torch.no_grad():
            layer.lora_B.weight.copy_(torch.randn(layer.lora_B.weight.shape, generator=generator) * 0.1)
    return model


def outputs(model, ids):
    result = model(input_ids=ids)
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


@pytest.fixture
def ids():
    return torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("r", "alpha"), RATIOS)
def test_layer_equals_the_numpy_core_in_float64(r, alpha):
    torch.manual_seed(0)
    base = torch.nn.Linear(7, 5).double()
    layer = lora.LoraLayer(base, LoraConfig(r=r, lora_alpha=alpha), name="q", seed=0).double()
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    x = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    grad_h = torch.randn(3, 4, 5, dtype=torch.float64)
    h = layer(x)
    h.backward(grad_h)
    W0, A, B, bias = (t.detach().numpy() for t in (base.weight, layer.lora_A.weight, layer.lora_B.weight, base.bias))
    expected_h = core.forward(x.detach().numpy(), W0, A, B, alpha / r, bias)
    expected = core.backward(grad_h.numpy(), x.detach().numpy(), W0, A, B, alpha / r)
    assert np.abs(h.detach().numpy() - expected_h).max() <= 1e-10
    for grad, value in zip((x.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad), expected, strict=True):
        assert np.abs(grad.numpy() - value).max() <= 1e-10
    assert base.weight.grad is None


def test_gradcheck():
    base = torch.nn.Linear(5, 4).double().requires_grad_(False)
    x, A, B = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 5), (2, 5), (4, 2)))
    assert torch.autograd.gradcheck(
        lambda *t: lora._LowRankLinear.apply(t[0], base.weight, base.bias, *t[1:], 1.5), (x, A, B)
    )


@pytest.mark.parametrize(("r", "alpha"), RATIOS)
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_equal_peft(make, ids, r, alpha, rslora):
    ours = lora.inject(make(), LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora))
    fill_b(ours)
    theirs = peft.get_peft_model(
        make(),
        peft.LoraConfig(
            r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=list(lora.lora_layers(ours)),
            fan_in_fan_out=make is gpt2,
        ),
    ).eval()  # fmt: skip
    named = dict(theirs.named_parameters())
    pairs = {}
    for name, value in lora.state_dict(ours).items():
        key = "base_model.model." + name.replace(".weight", ".default.weight")
        with torch.no_grad():
            named[key].copy_(value)
        pairs[name] = named[key]
    assert {n for n, p in named.items() if p.requires_grad} == {
        "base_model.model." + n.replace(".weight", ".default.weight") for n in pairs
    }
    mine, reference = outputs(ours, ids), outputs(theirs, ids)
    assert relative(mine, reference) <= 1e-5
    # Random weights: a layer norm at the end would turn the mean square into a constant.
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(4))
    (mine * weights).sum().backward()
    (reference * weights).sum().backward()
    grads = dict(ours.named_parameters())
    for name, parameter in pairs.items():
        if name.startswith("pooler"):  # behind the last hidden state
            assert grads[name].grad is None
            continue
        assert relative(grads[name].grad, parameter.grad) <= 1e-5, name


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


def test_starts_as_the_base_model(make, ids):
    base = make()
    expected = outputs(copy.deepcopy(base), ids)
    assert torch.allclose(outputs(lora.inject(base, LoraConfig()), ids), expected, atol=1e-6)


def test_only_the_adapter_is_trained(make, ids):
    model = fill_b(lora.inject(make(), LoraConfig(r=4)))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.1)
    outputs(model, ids).square().mean().backward()
    optimizer.step()
    named = dict(model.named_parameters())
    assert all(torch.equal(named[n], value) for n, value in frozen.items())
    assert {n for n, p in named.items() if p.requires_grad} == set(lora.state_dict(model))


def test_merge_equals_unmerged_and_unmerge_restores_every_bit(make, ids):
    model = fill_b(lora.inject(make(), LoraConfig(r=4, lora_alpha=6)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = outputs(model, ids)
    lora.merge(model)
    assert torch.allclose(outputs(model, ids), expected, atol=1e-5)
    lora.merge(model)  # a second merge changes nothing
    lora.unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_state_round_trip(make, ids):
    model = fill_b(lora.inject(make(), LoraConfig(r=4)))
    other = lora.inject(make(), LoraConfig(r=4), seed=5)
    lora.load_state_dict(other, lora.state_dict(model))
    assert torch.equal(outputs(model, ids), outputs(other, ids))


def test_dial_at_zero_is_the_base_bit_for_bit(make, ids):
    expected = outputs(make(), ids)
    model = fill_b(lora.inject(make(), LoraConfig()))
    lora.set_scale(model, 0.0)
    assert torch.equal(outputs(model, ids), expected)
    lora.set_scale(model, 1.0)
    assert not torch.allclose(outputs(model, ids), expected)


def test_dropout_only_while_training(ids):
    model = fill_b(lora.inject(llama(), LoraConfig(lora_dropout=0.5)))
    assert torch.equal(outputs(model, ids), outputs(model, ids))
    model.train()
    assert not torch.equal(outputs(model, ids), outputs(model, ids))


def test_half_precision_base_keeps_a_float32_adapter(ids):
    model = fill_b(lora.inject(llama().to(torch.bfloat16), LoraConfig()))
    out = outputs(model, ids)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainable_parameters(model))


@pytest.mark.parametrize("targets", ["attention", "mlp", "all-linear", ("q_proj", "v_proj"), r".*layers\.1\..*_proj"])
def test_targets_match_what_peft_matches(targets):
    ours = set(lora.lora_layers(lora.inject(llama(), LoraConfig(target_modules=targets))))
    spelled = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
    theirs = peft.get_peft_model(
        llama(),
        peft.LoraConfig(
            target_modules=spelled.get(targets, list(targets) if isinstance(targets, tuple) else targets),
            task_type="CAUSAL_LM",
        ),
    )
    expected = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert ours == expected


def test_unmatched_targets_are_an_error():
    with pytest.raises(TargetError, match="nonsense"):
        lora.inject(llama(), LoraConfig(target_modules=("nonsense",)))


def test_targets_that_are_no_linear_layer_are_an_error():
    with pytest.raises(TargetError, match="Linear and Conv1D"):
        lora.inject(llama(), LoraConfig(target_modules=("input_layernorm",)))
