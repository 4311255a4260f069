"""Frozen layers that are skipped: the same losses as with them, the same bits when resumed, the model as it was."""

import dataclasses

import numpy as np
import pytest
import torch
from methods.tiny import bert_classifier, gpt2, gpt2_classifier, llama, llama_classifier

from lora_engine.config import FullConfig, HeadConfig, LoraConfig, TrainConfig
from lora_engine.data import IGNORED, Encoded
from lora_engine.methods import inject
from lora_engine.training import prefix_cache
from lora_engine.training.batches import make_batch
from lora_engine.training.loop import Callbacks, train
from lora_engine.training.prefix_cache import first_trained_layer

LINEARS = ("q_proj", "down_proj", "c_attn", "c_proj", "query", "dense")
UPPER = LoraConfig(r=3, target_modules=LINEARS, layers_to_transform=(2, 3))


pytestmark = pytest.mark.usefixtures("one_thread")


def rows(num=8, seed=0, classes=0):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(num):
        ids = [int(t) for t in rng.integers(1, 90, int(rng.choice([5, 11, 20])))]
        labels = [IGNORED] * 2 + ids[2:]
        made.append(Encoded(i, ids, [], False, label=i % classes) if classes else Encoded(i, ids, labels, False))
    return made


def settings(**changes):
    base = TrainConfig(
        lr=3e-3, steps=12, batch_size=3, max_length=24, device="cpu", checkpoint_every=5, eval_every=6, eval_examples=4
    )
    return dataclasses.replace(base, **changes)


def run(model, config, method=UPPER, *, classes=0, checkpoint=None, stop_at=None, ready=lambda _model: None):
    model = inject(model, method, seed=config.seed)
    ready(model)
    seen = []
    callbacks = Callbacks(on_step=seen.append, should_stop=lambda: stop_at is not None and len(seen) >= stop_at)
    state = train(
        model, rows(classes=classes), rows(5, 9, classes), config, pad_id=0, checkpoint=checkpoint, callbacks=callbacks
    )
    return model, state, seen


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attn_pdrop = model.config.attention_probs_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(getattr(module, "attn_dropout", None), float):
            module.attn_dropout = 0.0
    return model


CASES = {
    "llama": (lambda: llama(num_hidden_layers=4), UPPER, 0, 2),
    "gpt2": (lambda: without_dropout(gpt2(n_layer=4)), UPPER, 0, 2),
    "llama-classifier": (llama_classifier, LoraConfig(r=3, target_modules=LINEARS, layers_to_transform=(1,)), 3, 1),
    "gpt2-classifier-head": (lambda: without_dropout(gpt2_classifier()), HeadConfig(), 3, 2),
    "bert-classifier": (
        lambda: without_dropout(bert_classifier()),
        LoraConfig(r=3, target_modules=LINEARS, layers_to_transform=(1,)),
        3,
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_whole_model(monkeypatch, name):
    make, method, classes, depth = CASES[name]
    _, cached, cached_steps = run(make(), settings(), method, classes=classes)
    note = cached.notes["prefix_cache"]
    assert note["layers"] == depth, note
    tokens = sum(len(row.input_ids) for row in [*rows(classes=classes), *rows(5, 9, classes)[:4]])
    assert note["bytes"] == tokens * 32 * 4
    monkeypatch.setattr(prefix_cache, "CAPACITY_BYTES", 0)
    _, whole, whole_steps = run(make(), settings(), method, classes=classes)
    assert f"the rows would take {note['bytes']} bytes, more than 0" == whole.notes["prefix_cache"]
    for field in ("train_loss", "grad_norm"):
        expected = [getattr(report, field) for report in whole_steps]
        np.testing.assert_allclose([getattr(report, field) for report in cached_steps], expected, rtol=2e-4)
    np.testing.assert_allclose(cached.eval_loss_before, whole.eval_loss_before, rtol=1e-5)
    np.testing.assert_allclose(cached.eval_loss_after, whole.eval_loss_after, rtol=1e-5)


def test_a_frozen_layer_sees_every_row_once_and_the_model_is_as_it_was():
    seen = []
    model = llama(num_hidden_layers=4)
    batch = make_batch(rows(3), 0)
    before = model(input_ids=batch.input_ids).logits
    model.model.layers[1].mlp.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    run(model, settings())
    setup = 3 + 3  # the first batch twice, to see that nothing changes
    assert sum(seen) == setup + len(rows()) + 4
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    assert not any(layer._forward_hooks for layer in model.model.layers)
    for layer in model.model.layers[2:]:
        for module in layer.modules():
            if hasattr(module, "scale"):
                module.scale = 0.0
    assert torch.equal(model(input_ids=batch.input_ids).logits, before)


@pytest.mark.parametrize("stop_at", [1, 8])
def test_a_stopped_run_resumes_bit_identically(tmp_path, stop_at):
    model, whole, whole_steps = run(llama(num_hidden_layers=4), settings())
    path = tmp_path / "checkpoint.safetensors"
    _, stopped, first = run(llama(num_hidden_layers=4), settings(), checkpoint=path, stop_at=stop_at)
    assert stopped.stopped
    resumed_model, resumed, second = run(llama(num_hidden_layers=4), settings(), checkpoint=path)
    assert [r.train_loss for r in first + second] == [r.train_loss for r in whole_steps]
    assert resumed.eval_loss_after == whole.eval_loss_after
    named = dict(model.named_parameters())
    assert all(torch.equal(p, named[n]) for n, p in resumed_model.named_parameters())


def reads_the_first_layer(model):
    """As models do that hand something from their first layer to their last."""
    layers = model.model.layers
    layers[0].mlp.register_forward_hook(lambda module, _inputs, output: setattr(module, "kept", output))
    layers[3].register_forward_hook(lambda _module, _inputs, output: output + _first(layers[0].mlp.kept, output))


def _first(kept, output):
    return kept.mean() if len(kept) == len(output) else kept.mean() * 3


def trains_the_embedding(model):
    model.get_input_embeddings().weight.requires_grad_(True)


def drops_on_the_way(model):
    model.model.layers[1].mlp.register_forward_hook(lambda m, _i, output: torch.dropout(output, 0.5, m.training))


@pytest.mark.parametrize(
    ("reason", "changes", "method", "ready"),
    [
        ("the first layer is trained", {}, LoraConfig(r=3), None),
        ("the first layer is trained", {}, FullConfig(), None),
        ("most rows are seen once", {"steps": 1}, UPPER, None),
        ("gradient checkpointing", {"checkpointing": True}, UPPER, None),
        ("dropout in the frozen layers", {}, UPPER, drops_on_the_way),
        ("something below them is trained", {}, UPPER, trains_the_embedding),
        ("the loss without them is", {}, UPPER, reads_the_first_layer),
    ],
)
def test_what_is_not_cached_says_why_and_trains(reason, changes, method, ready):
    model, state, seen = run(
        llama(num_hidden_layers=4), settings(**changes), method, ready=ready or (lambda _model: None)
    )
    assert state.notes["prefix_cache"].startswith(reason)
    assert len(seen) == state.step == settings(**changes).steps
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_dropout_above_the_frozen_layers_stays(monkeypatch):
    method = dataclasses.replace(UPPER, lora_dropout=0.3)
    _, cached, cached_steps = run(llama(num_hidden_layers=4), settings(), method)
    assert cached.notes["prefix_cache"]["layers"] == 2
    monkeypatch.setattr(prefix_cache, "CAPACITY_BYTES", 0)
    _, _, whole_steps = run(llama(num_hidden_layers=4), settings(), method)
    expected = [report.train_loss for report in whole_steps]
    np.testing.assert_allclose([report.train_loss for report in cached_steps], expected, rtol=1e-4)


def test_the_first_trained_layer():
    assert first_trained_layer(inject(llama(num_hidden_layers=4), UPPER)) == 2
    assert first_trained_layer(inject(llama(num_hidden_layers=4), LoraConfig(r=2))) == 0
    assert first_trained_layer(inject(llama_classifier(), HeadConfig())) == 2
