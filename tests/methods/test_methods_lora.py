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

from lora_engine import calc, core
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


def fill(model, seed=1):
    """Random B and magnitudes, so that every part of the update shows."""
    generator = torch.Generator().manual_seed(seed)
    fill_b(model, seed)
    for layer in lora.lora_layers(model).values():
        if layer.lora_magnitude_vector is not None:
            with torch.no_grad():
                m = layer.lora_magnitude_vector.weight
                m.mul_(1 + 0.3 * torch.randn(m.shape, generator=generator))
    return model


def peft_twin(make, ours, config):
    """PEFT's model with the weights of ours; and (our name, its parameter) of all that is trained."""
    theirs = peft.get_peft_model(
        make(),
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            target_modules=list(config.target_modules),
            layers_to_transform=config.layers_to_transform,
            exclude_modules=list(config.exclude_modules) or None,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            fan_in_fan_out=make is gpt2,
        ),
    )
    named = dict(theirs.named_parameters())
    pairs = {}
    for name, value in lora.state_dict(ours).items():
        pairs[name] = named["base_model.model." + name.replace(".weight", ".default.weight")]
        with torch.no_grad():
            pairs[name].copy_(value)
    assert {id(p) for p in pairs.values()} == {id(p) for p in named.values() if p.requires_grad}
    return theirs, pairs


VARIANTS = [
    ("llama", LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=("q_proj", "down_proj"))),
    ("llama", LoraConfig(r=8, lora_alpha=12, use_dora=True, use_rslora=True, target_modules=("q_proj", "lm_head"))),
    ("gpt2", LoraConfig(r=3, lora_alpha=4, use_dora=True, target_modules=("c_attn", "c_proj"))),
    ("bert", LoraConfig(r=3, lora_alpha=4, use_dora=True, target_modules=("query", "output.dense"))),
    ("falcon", LoraConfig(r=3, lora_alpha=4, use_dora=True, target_modules=("query_key_value", "dense"))),
    ("llama", LoraConfig(target_modules=("q_proj", "up_proj"), layers_to_transform=1)),
    ("llama", LoraConfig(target_modules=("q_proj", "k_proj", "up_proj"), exclude_modules=("0.mlp.up_proj", "k_proj"))),
    (
        "llama",
        LoraConfig(
            r=5,
            lora_alpha=7,
            target_modules=("q_proj", "v_proj", "o_proj"),
            rank_pattern={"q_proj": 3, r"layers\.1\..*v_proj": 11},
            alpha_pattern={"self_attn.o_proj": 13, "1.self_attn.q_proj": 2.5},
            use_rslora=True,
        ),
    ),
    ("gpt2", LoraConfig(target_modules=("c_proj",), rank_pattern={"mlp.c_proj": 3}, use_dora=True, lora_alpha=3)),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("family", "config"), VARIANTS)
def test_variants_equal_peft(family, config, training, ids):
    make = MODELS[family]
    ours = fill(lora.inject(make(), config)).train(training)
    theirs, pairs = peft_twin(make, ours, config)
    theirs.train(training)
    no_dropout(ours, theirs)
    mine, reference = outputs(ours, ids), outputs(theirs, ids)
    assert relative(mine, reference) <= 1e-5
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(4))
    (mine * weights).sum().backward()
    (reference * weights).sum().backward()
    grads = dict(ours.named_parameters())
    for name, parameter in pairs.items():
        assert relative(grads[name].grad, parameter.grad) <= 1e-5, name


def no_dropout(*models):
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_equals_peft(use_dora, ids):
    config = LoraConfig(r=3, lora_alpha=4, lora_dropout=0.4, use_dora=use_dora, target_modules=("q_proj", "down_proj"))
    ours = fill(lora.inject(llama(), config)).train()
    theirs, _ = peft_twin(llama, ours, config)
    results = []
    for model in (ours, theirs.train()):
        torch.manual_seed(7)
        results.append(outputs(model, ids))
    assert relative(*results) <= 1e-5


def test_dora_equals_the_numpy_core_in_float64():
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=4, use_dora=True)
    layer = lora.LoraLayer(torch.nn.Linear(7, 5).double(), config, name="q", seed=0).double()
    x = torch.randn(3, 4, 7, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B.weight.normal_()
        layer.lora_magnitude_vector.weight.normal_()
        base = layer.base_layer
        W0, A, B, m, bias = (
            t.numpy()
            for t in (
                base.weight,
                layer.lora_A.weight,
                layer.lora_B.weight,
                layer.lora_magnitude_vector.weight,
                base.bias,
            )
        )
        expected = core.forward_dora(x.numpy(), W0, A, B, m, 4 / 3, bias)
        assert np.abs(layer(x).numpy() - expected).max() <= 1e-10
        merged = core.merge_dora(W0, A, B, m, 4 / 3)
        assert np.abs(expected - (x.numpy() @ merged.T + bias)).max() <= 1e-10
        assert np.allclose(core.merge_dora(W0, A, 0 * B, core.row_norms(W0), 4 / 3), W0)


def test_dora_starts_as_the_base_and_its_dial_is_straight(make, ids):
    expected = outputs(make(), ids)
    model = lora.inject(make(), LoraConfig(use_dora=True))
    assert torch.allclose(outputs(model, ids), expected, atol=1e-5)
    fill(model)
    lora.set_scale(model, 0.0)
    assert torch.equal(outputs(model, ids), expected)
    for scale in (0.5, 1.0, 1.5):
        lora.set_scale(model, scale)
        unmerged = outputs(model, ids)
        lora.merge(model)
        assert torch.allclose(outputs(model, ids), unmerged, atol=2e-5)
        lora.unmerge(model)


def test_dora_merges_and_unmerges(make, ids):
    model = fill(lora.inject(make(), LoraConfig(r=4, lora_alpha=6, use_dora=True)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected, update = outputs(model, ids), next(iter(lora.lora_layers(model).values())).delta_W()
    lora.merge(model)
    assert torch.allclose(outputs(model, ids), expected, atol=1e-5)
    assert torch.equal(next(iter(lora.lora_layers(model).values())).delta_W(), update)
    lora.unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_dora_on_a_half_precision_base(ids):
    model = fill(lora.inject(llama().to(torch.bfloat16), LoraConfig(use_dora=True)))
    out = outputs(model, ids)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainable_parameters(model))


def test_scaling_follows_the_patterns():
    config = LoraConfig(r=4, lora_alpha=6, rank_pattern={"q_proj": 9}, alpha_pattern={"k_proj": 10}, use_rslora=True)
    layers = lora.lora_layers(lora.inject(llama(), config))
    found = {name.rpartition(".")[2]: (layer.r, layer.scaling) for name, layer in layers.items()}
    assert found["q_proj"] == (9, pytest.approx(6 / 3))
    assert found["k_proj"] == (4, pytest.approx(10 / 2))
    assert found["v_proj"] == (4, pytest.approx(6 / 2))


@pytest.mark.parametrize(("family", "config"), VARIANTS)
def test_trained_is_what_is_counted(family, config):
    model = lora.inject(MODELS[family](), config)
    facts = model.config.to_dict() | {"architectures": [type(model).__name__]}
    counted = calc.count_parameters(calc.shape_from_config(facts, family), config)
    assert sum(p.numel() for p in trainable_parameters(model)) == counted.trainable_parameters
