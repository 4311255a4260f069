"""The loop: learns, resumes bit-identically, stops when told, measures what it says it measures."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_engine.config import FullConfig, LoraConfig, TrainConfig
from lora_engine.data import IGNORED, Encoded
from lora_engine.errors import ConfigError, ModelLoadError
from lora_engine.methods import inject
from lora_engine.training.base import load_base, resolve_device, resolve_model
from lora_engine.training.batches import label_batch, make_batch, rows_of_step
from lora_engine.training.checkpoint import load_tensors, save_tensors
from lora_engine.training.loop import Callbacks, lr_at, train
from lora_engine.training.loss import evaluate, labelled_loss_sum

CPU = torch.device("cpu")


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows(num=12, seed=0, masked=3):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(num):
        # A pattern to learn: each token is the one before plus one.
        ids = [int(t) for t in (rng.integers(1, 60) + np.arange(int(rng.integers(8, 16)))) % 60 + 1]
        labels = [IGNORED] * masked + ids[masked:]
        made.append(Encoded(row=i, input_ids=ids, labels=labels, truncated=False))
    return made


def settings(**changes):
    base = TrainConfig(lr=1e-2, steps=12, batch_size=4, max_length=16, device="cpu", checkpoint_every=4, eval_every=4)
    return dataclasses.replace(base, **changes)


def run(config, *, method=None, checkpoint=None, stop_at=None, model=None):
    model = inject(model or tiny_llama(), method or LoraConfig(r=4), seed=config.seed)
    seen, evals = [], []

    def on_step(report):
        seen.append(report)

    callbacks = Callbacks(
        on_step=on_step,
        on_eval=lambda step, loss: evals.append((step, loss)),
        should_stop=lambda: stop_at is not None and len(seen) >= stop_at,
    )
    state = train(model, rows(), rows(6, seed=9), config, pad_id=0, checkpoint=checkpoint, callbacks=callbacks)
    return model, state, seen, evals


@pytest.mark.parametrize("method", [LoraConfig(r=4), FullConfig()])
def test_loss_falls_on_rows_it_has_not_seen(method):
    _, state, seen, evals = run(settings(steps=60), method=method)
    assert state.eval_loss_after < state.eval_loss_before - 0.5
    assert [report.step for report in seen] == list(range(1, 61))
    assert evals[0] == (0, state.eval_loss_before)
    assert evals[-1] == (60, state.eval_loss_after)


@pytest.mark.parametrize("stop_at", [1, 5, 11])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stopped_run_resumes_bit_identically(tmp_path, stop_at, dropout):
    method = LoraConfig(r=4, lora_dropout=dropout)
    whole_model, whole, whole_steps, _ = run(settings(), method=method)
    path = tmp_path / "checkpoint.safetensors"
    _, stopped, first, _ = run(settings(), method=method, checkpoint=path, stop_at=stop_at)
    assert stopped.stopped
    resumed_model, resumed, second, _ = run(settings(), method=method, checkpoint=path)
    assert [r.train_loss for r in first + second] == [r.train_loss for r in whole_steps]
    assert resumed.eval_loss_after == whole.eval_loss_after
    whole_named = dict(whole_model.named_parameters())
    assert all(torch.equal(p, whole_named[n]) for n, p in resumed_model.named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "mixed-bf16", "mixed-fp16"])
def test_every_precision_trains(precision):
    from lora_engine.training.base import PRECISION_PLANS

    model = tiny_llama().to(PRECISION_PLANS[precision].weights)
    _, state, seen, _ = run(settings(precision=precision, steps=40), model=model)
    assert state.eval_loss_after < state.eval_loss_before - 0.2
    assert all(np.isfinite(report.train_loss) for report in seen)


def test_accumulation_equals_one_large_batch():
    _, _, large, _ = run(settings(batch_size=8, steps=4))
    _, _, small, _ = run(settings(batch_size=4, accumulation=2, steps=4))
    np.testing.assert_allclose([r.train_loss for r in large], [r.train_loss for r in small], rtol=1e-5)


def test_checkpointing_gives_the_same_gradients():

    _, _, steps, _ = run(settings(steps=3))
    model = tiny_llama()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    _, _, saved, _ = run(settings(steps=3), model=model)
    np.testing.assert_allclose([r.train_loss for r in steps], [r.train_loss for r in saved], rtol=1e-5)


def test_loss_before_the_head_equals_the_models_own():
    for model in (
        tiny_llama(),
        GPT2LMHeadModel(
            GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
        ),
    ):
        model.eval()
        ids = torch.randint(1, 61, (5, 16), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:3, :7] = -100
        batch = label_batch(ids, labels, CPU)
        with torch.no_grad():
            own = model(input_ids=ids, labels=labels).loss
            mine = labelled_loss_sum(model, batch)
        assert float(mine) / batch.num_labels == pytest.approx(float(own), rel=1e-5)


def test_right_padding_changes_nothing():
    model = tiny_llama().eval()
    some = rows(6)
    together = evaluate(model, [make_batch(some, 0, CPU)])
    weights = [make_batch([row], 0, CPU) for row in some]
    assert evaluate(model, weights) == pytest.approx(together, rel=1e-5)


def test_peak_memory_holds_at_least_what_must_be_there():
    model, state, _, _ = run(settings(), method=FullConfig())
    parameters = sum(p.numel() for p in model.parameters()) * 4
    assert state.peak_kind == "tracked"
    # Weights, gradients and both Adam moments are alive at once; activations come on top.
    assert 4 * parameters <= state.peak_bytes <= 12 * parameters


def test_evaluation_takes_the_same_rows_whatever_the_batch():
    from lora_engine.training.batches import evaluation_batches

    for size in (3, 4, 100):
        batches = evaluation_batches(rows(12), settings(batch_size=size, eval_examples=7), 0, CPU)
        assert sum(len(batch.input_ids) for batch in batches) == 7


def test_rows_of_step_visits_every_row_once_an_epoch():
    seen = [i for step in range(5) for i in rows_of_step(10, 4, step, seed=0)]
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:20]) == list(range(10))
    assert rows_of_step(10, 4, 3, seed=0) == rows_of_step(10, 4, 3, seed=0)
    assert len(rows_of_step(3, 8, 0, seed=0)) == 8


def test_learning_rate_schedules():
    assert lr_at(settings(steps=10, warmup_steps=2), 0) == pytest.approx(5e-3)
    assert lr_at(settings(steps=10, schedule="constant"), 9) == 1e-2
    assert lr_at(settings(steps=10, schedule="linear"), 5) == pytest.approx(5e-3)
    assert lr_at(settings(steps=10, schedule="cosine"), 5) == pytest.approx(5e-3)


def test_checkpoint_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(2.0)}
    save_tensors(tmp_path / "c", tensors, {"step": 3})
    loaded, facts = load_tensors(tmp_path / "c")
    assert facts == {"step": 3}
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_base_models_are_refused_with_one_sentence(tmp_path):
    with pytest.raises(ModelLoadError, match="config.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelLoadError, match="pickled weights are refused"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelLoadError, match="could not be downloaded"):
        resolve_model("nobody/nothing-here")
    with pytest.raises(ConfigError, match="max_length is 512; allowed: at most 256"):
        load_base(resolve_model("embedded"), settings(max_length=512), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_device_is_refused():
    with pytest.raises(ConfigError, match="device is 'cuda'; allowed: auto, cpu"):
        resolve_device("cuda")
    assert resolve_device("auto").type in ("cpu", "mps")


def test_models_are_left_alone_by_evaluation():
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    model.train()
    evaluate(model, [make_batch(rows(3), 0, CPU)])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
