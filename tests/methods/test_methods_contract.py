"""One contract for every method, on language models and classifiers of each kind."""

import copy

import pytest
import torch
from tiny import HEADS, HIDDEN, INNER, LABELS, LAYERS, MODELS, VOCAB, token_ids

from lora_engine import methods
from lora_engine.calc import count_parameters, shape_from_config
from lora_engine.config import (
    METHOD_CONFIGS,
    BottleneckConfig,
    FullConfig,
    HeadConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    method_from_dict,
    to_dict,
)
from lora_engine.errors import NotMergeableError

CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=4.5),
    "rslora": LoraConfig(r=3, lora_alpha=4.5, use_rslora=True, target_modules="attention"),
    "dora": LoraConfig(r=3, lora_alpha=4.5, use_dora=True),
    "full": FullConfig(),
    "head": HeadConfig(),
    "houlsby": BottleneckConfig(reduction_factor=5, activation="relu"),
    "pfeiffer": BottleneckConfig(reduction_factor=64, placement="pfeiffer"),
    "prefix": PrefixConfig(prefix_length=5),
    "prefix-0": PrefixConfig(prefix_length=0),
    "prefix-mlp": PrefixConfig(prefix_length=5, reparametrize=True, encoder_hidden_size=7),
    "ia3": IA3Config(),
}
IDENTITIES = ("lora", "rslora", "full", "head", "houlsby", "pfeiffer", "prefix-0", "ia3")
MERGEABLE = ("lora", "rslora", "dora", "ia3")

STEPS = 3


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def is_classifier(kind):
    return kind.endswith("classifier")


def logits_of(model, ids):
    return model(input_ids=ids).logits


def train(model, kind, steps=STEPS):
    """Real optimizer steps on everything that requires a gradient, in training mode."""
    ids = token_ids()
    labels = torch.arange(len(ids)) % LABELS if is_classifier(kind) else ids[:, 1:].flatten()
    optimizer = torch.optim.AdamW(methods.trainable_parameters(model), lr=1e-2)
    model.train()
    for _ in range(steps):
        if not any(p.numel() for p in methods.trainable_parameters(model)):  # a prefix of length 0
            break
        logits = logits_of(model, ids)
        if not is_classifier(kind):
            logits = logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def trained(kind, config, seed=1):
    return train(methods.inject(MODELS[kind](), config, seed=seed), kind)


def task_head_count(kind):
    bias = kind == "bert-classifier"
    return LABELS * (HIDDEN + bias) if is_classifier(kind) else 0


def kv_width(kind):
    return HIDDEN // HEADS * (2 if kind.startswith("llama") else HEADS)


def expected_count(kind, config):
    """What the method trains in the base, or of a language model's head, in closed form."""
    if isinstance(config, HeadConfig):
        return 0 if is_classifier(kind) else VOCAB * HIDDEN
    if isinstance(config, BottleneckConfig):
        m = max(1, HIDDEN // config.reduction_factor)
        return (2 if config.placement == "houlsby" else 1) * LAYERS * (2 * HIDDEN * m + m + HIDDEN)
    if isinstance(config, PrefixConfig):
        wide = LAYERS * 2 * kv_width(kind)
        if not config.reparametrize:
            return config.prefix_length * wide
        inner = config.encoder_hidden_size or HIDDEN
        return config.prefix_length * kv_width(kind) + inner * (kv_width(kind) + 1) + wide * (inner + 1)
    if isinstance(config, IA3Config):  # GPT-2's fused map is scaled whole
        return LAYERS * ((3 * HIDDEN if kind.startswith("gpt2") else 2 * kv_width(kind)) + INNER)
    return calculator_count(kind, config)


def calculator_count(kind, config):
    """`count_parameters` of the base without its task head."""
    facts = MODELS[kind]().config.to_dict()
    facts["architectures"] = [type(MODELS[kind]()).__name__]
    modules = count_parameters(shape_from_config(facts, kind), config).modules
    return sum(module.trainable_parameters for module in modules if module.name not in ("score", "classifier"))


def test_every_method_is_registered_under_its_configs_name():
    assert set(methods.METHODS) == set(METHOD_CONFIGS) == {config.method for config in CONFIGS.values()}
    for config in CONFIGS.values():
        assert method_from_dict(to_dict(config)) == config
    for module in methods.METHODS.values():
        assert all(
            callable(getattr(module, f)) for f in ("inject", "state_dict", "load_state_dict", "merge", "unmerge")
        )


@pytest.mark.parametrize("name", IDENTITIES)
def test_starts_as_the_base_model_bit_for_bit(kind, name):
    model = methods.inject(MODELS[kind](), CONFIGS[name], seed=1)
    with torch.no_grad():
        assert torch.equal(logits_of(model, token_ids()), logits_of(MODELS[kind](), token_ids()))


def test_trains_what_it_declares_and_leaves_the_base_alone(kind, name):
    base = MODELS[kind]()
    before = {n: (p, p.detach().clone()) for n, p in base.named_parameters()}
    model = methods.inject(base, CONFIGS[name], seed=1)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    train(model, kind)
    kept = {id(p) for p in model.parameters()}
    for n, (p, value) in before.items():
        if not p.requires_grad:
            assert torch.equal(p, value), n
        head = is_classifier(kind) and n.startswith(("score", "classifier"))  # a copy of it was trained
        assert id(p) in kept or head, n
    for n, p in model.named_parameters():
        assert torch.equal(p, start[n]) == (n not in trainable or p.numel() == 0), n


def test_number_of_trained_parameters(kind, name):
    config = CONFIGS[name]
    model = methods.inject(MODELS[kind](), config, seed=1)
    actual = sum(p.numel() for p in methods.trainable_parameters(model))
    if isinstance(config, FullConfig):
        assert actual == sum(p.numel() for p in MODELS[kind]().parameters())
    else:
        assert actual == expected_count(kind, config) + task_head_count(kind)
        # The calculator reads a decoder's config as the language model that it mostly is.
        if name != "head" or kind in ("llama", "gpt2", "bert-classifier"):
            assert actual == calculator_count(kind, config) + task_head_count(kind)


def test_same_seed_same_start_whatever_else_is_random(kind, name):
    first = methods.state_dict(methods.inject(MODELS[kind](), CONFIGS[name], seed=7), CONFIGS[name])
    model = MODELS[kind]()
    torch.rand(5)
    second = methods.state_dict(methods.inject(model, CONFIGS[name], seed=7), CONFIGS[name])
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[n]) for n, value in first.items())


def test_save_and_load_restore_the_trained_model(kind, name):
    config = CONFIGS[name]
    model = trained(kind, config)
    state = {n: value.clone() for n, value in methods.state_dict(model, config).items()}
    if name != "prefix-mlp":
        assert sum(value.numel() for value in state.values()) == sum(
            p.numel() for p in methods.trainable_parameters(model)
        )
    fresh = methods.inject(MODELS[kind](), config, seed=2)
    methods.load_state_dict(fresh, config, state)
    with torch.no_grad():
        ours, theirs = logits_of(fresh, token_ids(seed=5)), logits_of(model, token_ids(seed=5))
        assert (ours - theirs).abs().max() <= (1e-5 if name == "prefix-mlp" else 0.0)
        if name not in ("prefix-0",) or is_classifier(kind):
            assert not torch.allclose(ours, logits_of(MODELS[kind](), token_ids(seed=5)), atol=1e-4)
    if state:
        state.pop(next(iter(state)))
        with pytest.raises(KeyError):
            methods.load_state_dict(fresh, config, state)


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_equals_unmerged_and_unmerge_restores_every_bit(kind, name):
    config = CONFIGS[name]
    model = trained(kind, config)
    module, ids = methods.METHODS[config.method], token_ids(seed=5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        unmerged = logits_of(model, ids)
        module.merge(model)
        module.merge(model)  # twice is once
        merged = logits_of(model, ids)
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert (merged - unmerged).abs().max() <= 1e-5
        module.unmerge(model)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert torch.equal(logits_of(model, ids), unmerged)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in MERGEABLE])
def test_what_cannot_be_merged_says_so(name):
    model = methods.inject(MODELS["llama"](), CONFIGS[name])
    for action in ("merge", "unmerge"):
        with pytest.raises(NotMergeableError, match="merge"):
            getattr(methods.METHODS[CONFIGS[name].method], action)(model)


def test_a_copy_is_the_same_model(name):
    model = trained("llama", CONFIGS[name])
    with torch.no_grad():
        assert torch.equal(logits_of(copy.deepcopy(model), token_ids()), logits_of(model, token_ids()))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-classifier"])
def test_checkpointing_gives_the_same_gradients(kind, name):
    if name == "prefix-0" and not is_classifier(kind):
        return  # trains nothing

    def gradients(checkpointing):
        model = MODELS[kind]()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model = methods.inject(model, CONFIGS[name], seed=1).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attn_dropout"):
                module.attn_dropout.p = 0.0
        logits_of(model, token_ids()).square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, saved = gradients(False), gradients(True)
    assert plain.keys() == saved.keys()
    for n, grad in plain.items():
        assert (grad is None) == (saved[n] is None), n
        if grad is not None:
            torch.testing.assert_close(saved[n], grad, rtol=1e-4, atol=1e-6, msg=n)
