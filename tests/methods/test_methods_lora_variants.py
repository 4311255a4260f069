"""DoRA, rsLoRA, patterns, layers and exclusions: against PEFT with copied weights, the numpy core and the counts."""

import numpy as np
import peft
import pytest
import torch
from test_methods_lora import MODELS, fill_b, gpt2, llama, outputs, relative

from lora_engine import calc, core
from lora_engine.config import LoraConfig
from lora_engine.methods import lora, trainable_parameters


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


@pytest.fixture
def ids():
    return torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(3))


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
