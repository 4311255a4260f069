"""Steps on fixed buffers: the ordinary loop's numbers, nothing asked of the device, resumed bit-identically.

There is no graph without CUDA: the same code runs here with the capture off, and the capture against a stand-in."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from methods.tiny import bert_classifier, gpt2, llama, llama_classifier
from nothing_asked import NothingAsked, OnTheDevice
from transformers import masking_utils
from transformers.utils import import_utils

from lora_engine.config import FullConfig, LoraConfig, TrainConfig
from lora_engine.data import IGNORED, Encoded
from lora_engine.methods import inject
from lora_engine.training import graphs, steps
from lora_engine.training.batches import Batch, make_batch
from lora_engine.training.graphs import StaticStep, without_device_checks
from lora_engine.training.loop import Callbacks, build_optimizer, train
from lora_engine.training.loss import labelled_loss_sum
from lora_engine.training.steps import StaticSteps, Trained, static_refusal, static_sizes

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def rows(num=12, seed=0, classes=0):
    """Of very different lengths, so that several sizes of buffers are used."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(num):
        ids = [int(t) for t in rng.integers(1, 90, int(rng.choice([5, 7, 20, 41])))]
        masked = int(rng.integers(0, 4))
        labels = [IGNORED] * masked + ids[masked:]
        made.append(Encoded(i, ids, [], False, label=i % classes) if classes else Encoded(i, ids, labels, False))
    return made


def settings(**changes):
    base = TrainConfig(
        lr=3e-3, steps=13, batch_size=2, max_length=48, device="cpu", checkpoint_every=5, eval_every=6,
        weight_decay=0.1, warmup_steps=3, max_grad_norm=0.7,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def run(model, config, method=None, *, classes=0, checkpoint=None, stop_at=None, dtype=torch.float32):
    model = inject(model, method or LoraConfig(r=3), seed=config.seed).to(dtype)
    seen = []
    callbacks = Callbacks(
        on_step=seen.append, should_stop=lambda: stop_at is not None and len(seen) >= stop_at
    )  # fmt: skip
    state = train(
        model, rows(classes=classes), rows(6, 9, classes), config, pad_id=0, checkpoint=checkpoint, callbacks=callbacks
    )
    return model, state, seen


@pytest.fixture
def static(monkeypatch):
    """The loop as on CUDA, with the capture off."""
    monkeypatch.setattr(steps, "static_refusal", lambda _config, _device: None)


MODELS = {
    "llama": (llama, 0),
    "gpt2": (lambda: gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), 0),
    "llama-classifier": (llama_classifier, 3),
    "bert-classifier": (bert_classifier, 3),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_static_steps_give_what_ordinary_ones_give(monkeypatch, name, dtype, tolerance):
    make, classes = MODELS[name]
    if name == "bert-classifier":
        make = lambda: without_dropout(bert_classifier())  # noqa: E731
    ordinary = run(make(), settings(), classes=classes, dtype=dtype)
    assert ordinary[1].notes["graph"] == "only CUDA has graphs"
    monkeypatch.setattr(steps, "static_refusal", lambda _config, _device: None)
    fixed = run(make(), settings(), classes=classes, dtype=dtype)
    assert fixed[1].notes["graph"] == "not yet captured"
    for field in ("train_loss", "grad_norm", "lr", "step", "tokens"):
        expected = [getattr(report, field) for report in ordinary[2]]
        np.testing.assert_allclose([getattr(report, field) for report in fixed[2]], expected, rtol=tolerance)
    np.testing.assert_allclose(fixed[1].eval_loss_after, ordinary[1].eval_loss_after, rtol=tolerance)
    others = dict(ordinary[0].named_parameters())
    for parameter, value in fixed[0].named_parameters():
        torch.testing.assert_close(value, others[parameter], rtol=tolerance, atol=10 * tolerance)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.usefixtures("static")
@pytest.mark.parametrize("stop_at", [1, 7, 11])
def test_static_steps_resume_bit_identically(tmp_path, stop_at):
    config = settings()
    model, whole, whole_steps = run(llama(), config)
    path = tmp_path / "checkpoint.safetensors"
    _, stopped, first = run(llama(), config, checkpoint=path, stop_at=stop_at)
    assert stopped.stopped
    assert len(first) >= stop_at
    resumed_model, resumed, second = run(llama(), config, checkpoint=path)
    assert [r.train_loss for r in first + second] == [r.train_loss for r in whole_steps]
    assert [r.step for r in first + second] == list(range(1, config.steps + 1))
    assert resumed.eval_loss_after == whole.eval_loss_after
    named = dict(model.named_parameters())
    assert all(torch.equal(p, named[n]) for n, p in resumed_model.named_parameters())


@pytest.mark.usefixtures("static")
def test_reports_come_together_and_before_what_is_due():
    told = []
    model = inject(llama(), LoraConfig(r=3))
    callbacks = Callbacks(
        on_step=lambda report: told.append(report.step), on_eval=lambda step, _loss: told.append(f"eval {step}")
    )
    train(model, rows(), rows(4), settings(steps=8, eval_every=3), pad_id=0, callbacks=callbacks)
    assert told == ["eval 0", 1, 2, 3, "eval 3", 4, 5, 6, "eval 6", 7, 8, "eval 8"]


def test_sizes_hold_every_batch_of_the_run():
    config = settings(steps=40)
    some = rows()
    sizes, measured = static_sizes(some, config)
    assert list(sizes) == sorted(sizes)
    assert max(sizes) == 48
    assert 0 < measured < 40
    for step in range(40):
        picked = steps.rows_of_step(len(some), config.batch_size, step, config.seed)
        batch = make_batch([some[i] for i in picked], 0)
        assert any(size >= batch.input_ids.shape[1] and most >= batch.num_labels for size, most in sizes.items())


def test_who_gets_fixed_buffers():
    cuda = torch.device("cuda")
    assert static_refusal(settings(), cuda) is None
    assert static_refusal(settings(precision="mixed-bf16"), cuda) is None
    assert static_refusal(settings(), CPU) == "only CUDA has graphs"
    for changes, reason in (
        ({"precision": "fp16"}, "loss scaling"),
        ({"precision": "nf4"}, "quantised"),
        ({"accumulation": 2}, "accumulation"),
        ({"checkpointing": True}, "checkpointing"),
        ({"optimizer": "sgd"}, "AdamW"),
    ):
        assert reason in static_refusal(settings(**changes), cuda)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [LoraConfig(r=3), FullConfig()])
def test_a_static_step_asks_nothing_of_the_device(monkeypatch, name, method):
    make, classes = MODELS[name]
    # During a capture transformers makes masks without looking into them.
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    model = inject(without_dropout(make()), method).train()
    config = settings()
    trainable = [p for p in model.parameters() if p.requires_grad]
    trained = Trained(
        model, trainable, build_optimizer(trainable, config), torch.amp.GradScaler("cpu", enabled=False), config
    )
    some = rows(classes=classes)
    static_steps = StaticSteps(trained, some, 0)
    with without_device_checks():
        static_steps([make_batch(some[:2], 0)], 1e-3)
        step = next(iter(static_steps.steps.values()))
        with NothingAsked():
            step.function(*step.inputs)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_a_step_lives_on_the_device(monkeypatch, name):
    """The meta device stands for one that is not the host: a capture may not copy from host to device."""
    make, classes = MODELS[name]
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # autocast does not know meta
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    model = inject(without_dropout(make()), LoraConfig(r=3)).to("meta").train()
    batch = make_batch(rows(3, classes=classes), 0, torch.device("meta"))
    with without_device_checks(), OnTheDevice():
        (labelled_loss_sum(model, batch) / torch.ones((), device="meta")).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)


def test_packed_sequences_are_looked_for_again_afterwards():
    original = masking_utils.find_packed_sequence_indices
    with without_device_checks():
        assert masking_utils.find_packed_sequence_indices(None) is None
    assert masking_utils.find_packed_sequence_indices is original


def test_random_numbers_are_found_out():
    drawing = StaticStep(lambda x: (torch.nn.functional.dropout(x),), [torch.ones(4)], capture=False)
    drawing(torch.ones(4))
    assert drawing.reason == "the step draws random numbers (dropout)"
    plain = StaticStep(lambda x: (x * 2,), [torch.ones(4)], capture=False)
    plain(torch.ones(4))
    assert plain.reason == "not asked for"


class FakeGraph:
    """What torch.cuda.CUDAGraph does, on the host: what was captured is done at each replay and not before."""

    function = None

    def replay(self):
        type(self).function()

    def pool(self):
        return (0, 0)


class FakeStream:
    def __init__(self, _device=None):
        pass

    def wait_stream(self, _other):
        pass


@pytest.fixture
def fake_cuda(monkeypatch):
    made = {"captures": 0, "restored": 0, "pools": []}

    @contextlib.contextmanager
    def capture(_graph, pool=None, stream=None):
        made["captures"] += 1
        made["pools"].append(pool)
        assert isinstance(stream, FakeStream)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device=None: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _stream: made.update(restored=made["restored"] + 1))
    return made


def test_a_step_is_captured_after_the_warm_up_and_replayed(fake_cuda):
    x, total = torch.zeros(2), torch.zeros(2)

    def function(x):
        if not fake_cuda["captures"]:
            total.add_(x)
        return (total * 1,)

    step = StaticStep(function, [x], capture=True)
    results = [step(torch.full((2,), float(i)))[0] for i in range(graphs.WARM_UP_STEPS)]
    assert not step.captured
    FakeGraph.function = lambda: step._outputs[0].copy_(total.add_(x))
    results += [step(torch.full((2,), float(i)))[0] for i in range(graphs.WARM_UP_STEPS, 6)]
    assert step.captured
    assert fake_cuda["captures"] == 1
    assert [float(result[0]) for result in results] == [0.0, 1.0, 3.0, 6.0, 10.0, 15.0]
    # Another size of the same step shares the memory.
    other = StaticStep(function, [torch.zeros(3)], capture=True, pool=step)
    for _ in range(graphs.WARM_UP_STEPS + 1):
        FakeGraph.function = lambda: None
        other(torch.zeros(3))
    assert fake_cuda["pools"] == [None, (0, 0)]


def test_a_capture_that_fails_loses_no_step(fake_cuda):
    done = []

    def function(x):
        if fake_cuda["captures"] and not fake_cuda["restored"]:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        done.append(float(x[0]))
        return (x * 2,)

    step = StaticStep(function, [torch.zeros(1)], capture=True)
    results = [float(step(torch.full((1,), float(i)))[0]) for i in range(6)]
    assert results == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert done == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert step.reason == "capturing failed: operation not permitted when stream is capturing"
    assert fake_cuda == {"captures": 1, "restored": 1, "pools": [None]}


def test_loss_of_a_padded_batch_is_the_loss_of_the_batch():
    model, batch = llama(), make_batch(rows(3), 0)
    values = steps.static_values(batch, 64, batch.num_labels + 9, 0, torch.tensor(0.1))
    padded = Batch(values[0], values[1], values[2], 0)
    with torch.no_grad():
        torch.testing.assert_close(labelled_loss_sum(model, padded), labelled_loss_sum(model, batch))
