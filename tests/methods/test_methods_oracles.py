"""Bottleneck, (IA)^3 and head against independent computations: forward hooks, PEFT, transformers' own saving."""

import peft
import pytest
import torch
from tiny import MODELS, VOCAB, bert_classifier, gpt2, llama, token_ids
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from lora_engine import methods
from lora_engine.config import BottleneckConfig, HeadConfig, IA3Config, LoraConfig, PrefixConfig
from lora_engine.errors import ConfigError, TargetError
from lora_engine.methods.ia3 import IA3Layer

FAMILY = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**FAMILY, intermediate_size=40)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**FAMILY, intermediate_size=40)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**FAMILY, ffn_dim=40, word_embed_proj_dim=32)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**FAMILY)),
}


def randomized(model):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in methods.trainable_parameters(model):
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def hooked(make, config, state):
    """The base model with the adapters of `state` applied from outside, to what whole sublayers return."""
    model = make()
    sublayers = {
        "llama": ("model.layers.{}.self_attn", "self_attn.o_proj", "model.layers.{}.mlp", "mlp.down_proj"),
        "gpt2": ("transformer.h.{}.attn", "attn.c_proj", "transformer.h.{}.mlp", "mlp.c_proj"),
    }[make.__name__]
    act = {"gelu": torch.nn.functional.gelu, "relu": torch.relu}[config.activation]

    def adapt(key):
        def hook(_module, _args, output):
            h = output[0] if isinstance(output, tuple) else output
            down = h @ state[f"{key}.adapter_down.weight"].T + state[f"{key}.adapter_down.bias"]
            h = h + act(down) @ state[f"{key}.adapter_up.weight"].T + state[f"{key}.adapter_up.bias"]
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    for i in range(2):
        attention, projection, mlp, last = (part.format(i) for part in sublayers)
        layer = mlp.rpartition(".")[0]
        if config.placement == "houlsby":
            model.get_submodule(attention).register_forward_hook(adapt(f"{layer}.{projection}"))
        model.get_submodule(mlp).register_forward_hook(adapt(f"{layer}.{last}"))
    return model


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_bottleneck_acts_on_what_a_sublayer_returns(make, placement, activation):
    config = BottleneckConfig(reduction_factor=3, placement=placement, activation=activation)
    ours = randomized(methods.inject(make(), config))
    reference = hooked(make, config, methods.state_dict(ours, config))
    with torch.no_grad():
        mine, expected = ours(input_ids=token_ids()).logits, reference(input_ids=token_ids()).logits
        assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert not torch.allclose(mine, make()(input_ids=token_ids()).logits, atol=1e-2)


def test_bottleneck_in_bert_stands_before_residual_and_norm():
    config = BottleneckConfig(reduction_factor=3)
    ours = randomized(methods.inject(bert_classifier(), config))
    names = {
        name.rpartition(".adapter")[0].split("layer.")[1]
        for name in methods.state_dict(ours, config)
        if "adapter" in name
    }
    assert names == {f"{i}.{place}" for i in (0, 1) for place in ("attention.output.dense", "output.dense")}


@pytest.mark.parametrize("config", [BottleneckConfig(), IA3Config(), LoraConfig(r=2)])
@pytest.mark.parametrize("name", OTHERS)
def test_other_families_start_as_their_base_and_train(name, config):
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    ids = token_ids()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model = methods.inject(model, config)
        assert torch.equal(model(input_ids=ids).logits, before)
    model(input_ids=ids).logits.square().sum().backward()
    assert any(p.grad.abs().sum() > 0 for p in methods.trainable_parameters(model) if p.grad is not None)


@pytest.mark.parametrize("config", [BottleneckConfig(), IA3Config(), PrefixConfig()])
def test_an_unknown_architecture_is_refused(config):
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(TargetError, match="model is a MambaForCausalLM.*allowed"):
        methods.inject(model, config)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-classifier"])
def test_ia3_equals_peft(kind):
    ours = randomized(methods.inject(MODELS[kind](), IA3Config()))
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, IA3Layer)}
    feedforward = [name for name, layer in layers.items() if layer.is_feedforward]
    base = MODELS[kind]()
    if kind == "bert-classifier":
        base.classifier.load_state_dict(ours.classifier.state_dict())
    theirs = peft.get_peft_model(
        base,
        peft.IA3Config(target_modules=list(layers), feedforward_modules=feedforward, fan_in_fan_out=kind == "gpt2"),
    ).eval()
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in methods.METHODS["ia3"].state_dict(ours).items():
            parameter = named["base_model.model." + name.replace("ia3_l", "ia3_l.default")]
            assert parameter.shape == value.shape
            parameter.copy_(value)
        mine, expected = ours(input_ids=token_ids()).logits, theirs(input_ids=token_ids()).logits
        assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("kind", "default"), [("llama", True), ("bert-classifier", False)])
def test_ia3_scales_the_modules_that_peft_scales(kind, default):
    ours = methods.inject(MODELS[kind](), IA3Config())
    layers = {name for name, module in ours.named_modules() if isinstance(module, IA3Layer)}
    theirs = peft.get_peft_model(MODELS[kind](), peft.IA3Config())
    chosen = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.ia3.IA3Layer)
    }
    # PEFT's suffix "output.dense" also matches the output of BERT's attention, which the paper does not scale.
    assert layers == {name for name in chosen if default or "attention.output" not in name}


def test_a_tied_head_gets_a_copy_that_survives_saving(tmp_path):
    model = methods.inject(gpt2(), HeadConfig())
    embedding = model.get_input_embeddings().weight
    start = embedding.detach().clone()
    randomized(model)
    assert torch.equal(embedding, start)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)
    assert model.lm_head.weight.shape[0] == VOCAB


def test_a_model_without_a_head_is_refused():
    with pytest.raises(TargetError, match="BertModel, which has no output head"):
        methods.inject(bert_classifier().bert, HeadConfig())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [HeadConfig(), BottleneckConfig(), PrefixConfig(prefix_length=3), IA3Config()])
@pytest.mark.parametrize("kind", MODELS)
def test_on_a_half_precision_base_what_is_trained_is_float32(kind, config, dtype):
    model = methods.inject(MODELS[kind]().to(dtype), config)
    assert {p.dtype for p in methods.trainable_parameters(model)} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    logits = model(input_ids=token_ids()).logits
    logits.float().square().mean().backward()
    assert logits.dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p in methods.trainable_parameters(model) if p.grad is not None)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: BottleneckConfig(reduction_factor=0), "reduction_factor is 0; allowed: a whole number from 1"),
        (
            lambda: BottleneckConfig(placement="everywhere"),
            "placement is 'everywhere'; allowed: one of houlsby, pfeiffer",
        ),
        (lambda: PrefixConfig(prefix_length=-1), "prefix_length is -1; allowed: a whole number from 0"),
    ],
)
def test_wrong_settings_name_argument_value_and_what_is_allowed(build, words):
    with pytest.raises(ConfigError, match=words):
        build()
