"""Packed bases: values of the reference, gradients of autograd, bytes of the calculator, and runs on them."""

import copy
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from lora_engine import calc, methods
from lora_engine.calc.memory import weight_bytes
from lora_engine.config import (
    PRECISIONS,
    TRAINABLE_PRECISIONS,
    BottleneckConfig,
    DataConfig,
    FullConfig,
    HeadConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    RunConfig,
    TrainConfig,
)
from lora_engine.core import quantize as reference
from lora_engine.data import IGNORED, Encoded
from lora_engine.errors import ConfigError, NotMergeableError
from lora_engine.methods import lora
from lora_engine.methods.quantized import (
    QUANTIZED_PRECISIONS,
    QuantizedLinear,
    dequantize,
    num_parameters,
    quantize,
    quantize_model,
    stored_bytes,
    unpack_model,
)
from lora_engine.training.base import load_base, resolve_model
from lora_engine.training.batches import label_batch, make_batch
from lora_engine.training.loop import Callbacks, train
from lora_engine.training.loss import evaluate
from lora_engine.training.measure import LiveBytes
from lora_engine.training.merging import merge_difference

sys.path.insert(0, str(Path(__file__).parent.parent / "methods"))
import tiny

CPU = torch.device("cpu")
METHODS = [
    LoraConfig(r=3),
    LoraConfig(r=3, use_dora=True),
    HeadConfig(),
    BottleneckConfig(),
    PrefixConfig(),
    IA3Config(),
]
SETTINGS = TrainConfig(lr=1e-2, steps=12, batch_size=4, max_length=16, device="cpu", eval_every=6, checkpoint_every=4)


@pytest.fixture(params=QUANTIZED_PRECISIONS)
def precision(request):
    return request.param


@pytest.fixture
def weight():
    return 0.1 * torch.randn(24, 100, generator=torch.Generator().manual_seed(1))


def rows(num=12, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(num):
        ids = [int(t) for t in (rng.integers(1, 60) + np.arange(int(rng.integers(8, 16)))) % 60 + 1]
        made.append(Encoded(row=i, input_ids=ids, labels=[IGNORED] * 3 + ids[3:], truncated=False))
    return made


def packed_model(precision, kind="llama", dtype=torch.bfloat16, **more):
    return quantize_model(tiny.MODELS[kind](**more).to(dtype), precision)


def test_the_same_bytes_and_values_as_the_reference(precision):
    for shape in ((24, 100), (3, 7), (1, 1), (512, 300)):  # the last: more than one piece
        W = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        state = {name: value.numpy() for name, value in quantize(W, precision).items()}
        if precision == "int8":
            codes, absmax = reference.quantize_int8(W.numpy())
            values = reference.dequantize_int8(codes, absmax)
        else:
            codes, absmax = reference.quantize_nf4(W.numpy())
            if precision == "nf4-dq":
                scales, nested, offset = reference.quantize_absmax(absmax, state["offset"][()])
                assert np.array_equal(nested, state["nested_absmax"])
                values = reference.dequantize_nf4(
                    codes, reference.dequantize_absmax(scales, nested, offset), tuple(shape)
                )
                absmax = scales
            else:
                values = reference.dequantize_nf4(codes, absmax, tuple(shape))
        assert np.array_equal(codes, state["codes"])
        assert np.array_equal(absmax, state["absmax"])
        ours = dequantize(quantize(W, precision), precision, shape, torch.float32)
        assert np.array_equal(values, ours.numpy())
        half = dequantize(quantize(W, precision), precision, shape, torch.bfloat16)
        assert torch.equal(half, ours.bfloat16())  # rounded once


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_bytes_of_the_cpu(precision, weight):
    here, there = quantize(weight, precision), quantize(weight.cuda(), precision)
    for name, value in here.items():
        torch.testing.assert_close(there[name].cpu(), value, rtol=1e-6, atol=0)
    for dtype in (torch.float32, torch.bfloat16):
        values = dequantize({n: v.cuda() for n, v in here.items()}, precision, tuple(weight.shape), dtype)
        assert torch.equal(values.cpu(), dequantize(here, precision, tuple(weight.shape), dtype))


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_is_a_linear_layer_of_its_values(precision, weight, conv, bias):
    out, inner = weight.shape
    plain = torch.nn.Linear(inner, out, bias=bias or conv)
    plain.weight.data = weight
    layer = plain
    if conv:
        layer = Conv1D(out, inner)
        layer.weight.data, layer.bias.data = weight.t().contiguous(), plain.bias.data
    packed = QuantizedLinear(layer, precision)
    assert (packed.in_features, packed.out_features) == (inner, out)
    plain.weight.data = packed.weight
    x = torch.randn(2, 5, inner, generator=torch.Generator().manual_seed(3), requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, theirs = packed(x), plain(y)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert not any(p.requires_grad for p in packed.parameters())


@pytest.mark.parametrize("config", [LoraConfig(r=3), LoraConfig(r=3, lora_dropout=0.4), LoraConfig(r=3, use_dora=True)])
@pytest.mark.parametrize("scale", [1.0, 0.7, 0.0])
def test_lora_on_a_packed_layer_is_lora_on_its_values(precision, weight, config, scale):
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0])
    plain.weight.data = weight
    packed = QuantizedLinear(plain, precision)
    plain.weight.data = packed.weight
    results = []
    for base in (packed, plain.requires_grad_(False)):
        layer = lora.LoraLayer(base, config, name="x", seed=1)
        layer.scale = scale
        layer.lora_B.weight.data = 0.1 * torch.randn(24, 3, generator=torch.Generator().manual_seed(4))
        x = torch.randn(6, 100, generator=torch.Generator().manual_seed(5), requires_grad=True)
        torch.manual_seed(6)
        h = layer(x)
        h.square().sum().backward()
        results.append([h, x.grad, *(p.grad for p in layer.factors().values())])
    for ours, theirs in zip(*results, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        else:
            assert ours is None


@pytest.mark.parametrize("adapted", [False, True])
def test_nothing_dequantised_is_kept_for_backward(precision, adapted):
    layer = QuantizedLinear(torch.nn.Linear(256, 256, bias=False), precision)
    if adapted:
        layer = lora.LoraLayer(layer, LoraConfig(r=2), name="x", seed=0)
    x = torch.randn(1, 256, requires_grad=True)
    live = LiveBytes()
    for tensor in (x, *layer.parameters(), *layer.buffers()):
        live.add(tensor)
    stored = live.live_bytes
    with live:
        h = layer(x)
        assert live.live_bytes - stored < 256 * 256  # less than a byte a weight; dequantised it has four
        h.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-classifier"])
def test_stored_bytes_are_the_calculators(precision, kind):
    model = packed_model(precision, kind)
    whole = tiny.MODELS[kind]()
    packed = [name for name, x in model.named_modules() if isinstance(x, QuantizedLinear)]
    assert num_parameters(model) == sum(p.numel() for p in whole.parameters())
    facts = whole.config.to_dict() | {"architectures": [type(whole).__name__]}
    shape = calc.shape_from_config(facts, kind)
    assert len(packed) == sum(x.count for x in shape.linears if x.per_layer)
    outside = sum(p.numel() for p in whole.parameters()) - shape.total_parameters  # what a classifier differs in
    extra = stored_bytes(model) - weight_bytes(shape, precision) - 2 * outside
    # Double quantisation subtracts the mean of each map's scales: 4 bytes a map.
    assert 0 <= extra <= (4 * len(packed) if precision == "nf4-dq" else 0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method + ("-dora" * getattr(m, "use_dora", False)))
@pytest.mark.parametrize(("kind", "precision"), [*(("llama", p) for p in QUANTIZED_PRECISIONS), ("gpt2", "nf4")])
def test_every_method_but_full_trains_and_leaves_the_bytes_alone(kind, precision, method):
    model = methods.inject(packed_model(precision, kind), method)
    named = [b for x in model.modules() if isinstance(x, QuantizedLinear) for b in x.state.values()]
    kept = [b.clone() for b in named]
    config = dataclasses.replace(SETTINGS, precision=precision, steps=6, lr=3e-2)
    state = train(model, rows(), rows(6, seed=9), config, pad_id=0)
    assert state.eval_loss_after < state.eval_loss_before
    assert all(torch.equal(a, b) for a, b in zip(named, kept, strict=True))


def test_a_stopped_run_resumes_bit_identically(tmp_path, precision):
    config = dataclasses.replace(SETTINGS, precision=precision, steps=6, checkpoint_every=2)

    def run(stop_at=None, checkpoint=None):
        seen = []
        callbacks = Callbacks(on_step=seen.append, should_stop=lambda: stop_at is not None and len(seen) >= stop_at)
        model = methods.inject(packed_model(precision), LoraConfig(r=3, lora_dropout=0.2))
        state = train(model, rows(), rows(6, seed=9), config, pad_id=0, checkpoint=checkpoint, callbacks=callbacks)
        return state, [report.train_loss for report in seen]

    whole, losses = run()
    _, first = run(stop_at=3, checkpoint=tmp_path / "c")
    resumed, second = run(checkpoint=tmp_path / "c")
    assert first + second == losses
    assert resumed.eval_loss_after == whole.eval_loss_after


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_packs_the_sum_again_and_unmerging_restores_every_byte(precision, kind, use_dora):
    model = methods.inject(packed_model(precision, kind, torch.float32), LoraConfig(r=3, use_dora=use_dora))
    for layer in lora.lora_layers(model).values():
        layer.lora_B.weight.data = 0.02 * torch.randn(
            layer.lora_B.weight.shape, generator=torch.Generator().manual_seed(7)
        )
    name, layer = next(iter(lora.lora_layers(model).items()))
    before = {n: b.clone() for n, b in model.named_buffers()}
    W0, delta = layer.base_layer.dequantize(torch.float32), layer.delta_W()
    wanted = quantize(W0 + delta, precision)
    logits = model(input_ids=tiny.token_ids()).logits
    lora.merge(model)
    lora.merge(model)  # twice is once
    assert all(torch.equal(value, wanted[n]) for n, value in layer.base_layer.state.items()), name
    torch.testing.assert_close(layer.delta_W(), delta)
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers())
    lora.unmerge(model)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert torch.equal(model(input_ids=tiny.token_ids()).logits, logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_unpacked_it_is_the_same_model_and_merges_in_full(precision, kind):
    model = methods.inject(packed_model(precision, kind, torch.float32), LoraConfig(r=3))
    for layer in lora.lora_layers(model).values():
        layer.lora_B.weight.data.fill_(0.01)
    with torch.no_grad():
        logits = model(input_ids=tiny.token_ids()).logits
        unpack_model(model)
        assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
        torch.testing.assert_close(model(input_ids=tiny.token_ids()).logits, logits, rtol=1e-4, atol=1e-5)
        lora.merge(model)
        assert (model(input_ids=tiny.token_ids()).logits - logits).norm() <= 1e-5 * logits.norm()


def test_ia3_does_not_merge_into_bytes(precision):
    model = methods.inject(packed_model(precision), IA3Config())
    with pytest.raises(NotMergeableError, match=f"precision is '{precision}'"):
        methods.METHODS["ia3"].merge(model)


def test_difference_of_merging_grows_with_fewer_bits():
    ids = tiny.token_ids()
    found = {}
    for name in ("fp32", "bf16", "int8", "nf4", "nf4-dq"):
        if name in QUANTIZED_PRECISIONS:
            model = packed_model(name)
        else:
            model = tiny.llama().to(torch.float32 if name == "fp32" else torch.bfloat16)
        model = methods.inject(model, LoraConfig(r=3))
        for layer in lora.lora_layers(model).values():
            layer.lora_B.weight.data = 0.05 * torch.randn(
                layer.lora_B.weight.shape, generator=torch.Generator().manual_seed(7)
            )
        before = copy.deepcopy(model.state_dict())
        found[name] = merge_difference(model, label_batch(ids, ids, CPU))
        assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    sizes = {name: difference.max_abs_logit_diff for name, difference in found.items()}
    assert sizes["fp32"] <= 1e-5 * found["fp32"].max_abs_logit
    assert sizes["fp32"] < sizes["bf16"] < sizes["nf4"]
    assert sizes["fp32"] < sizes["int8"] < sizes["nf4"]
    assert all(abs(x.loss_diff) <= x.max_abs_logit_diff * 2 for x in found.values())


def test_the_embedded_model_packed_is_close_to_itself_in_bf16(precision):
    settings = dataclasses.replace(SETTINGS, max_length=128)
    folder = resolve_model("embedded")
    whole = load_base(folder, dataclasses.replace(settings, precision="bf16"), CPU)
    packed = load_base(folder, dataclasses.replace(settings, precision=precision), CPU)
    batch = make_batch(rows(), 0, CPU)
    losses = [evaluate(model, [batch]) for model in (whole, packed)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert stored_bytes(packed) < stored_bytes(whole)
    shape = calc.load_shape("embedded")
    assert stored_bytes(packed) == pytest.approx(weight_bytes(shape, precision), abs=4 * 42)
    assert next(packed.parameters()).dtype == torch.bfloat16


def test_the_calculators_peak_is_that_of_a_real_run(precision):
    folder = resolve_model("embedded")
    config = dataclasses.replace(SETTINGS, precision=precision, steps=2, batch_size=2, max_length=64, eval_examples=1)
    model = methods.inject(load_base(folder, config, CPU), LoraConfig(r=8))
    ids = list(range(5, 69))
    full = [Encoded(row=i, input_ids=ids, labels=ids, truncated=False) for i in range(8)]
    state = train(model, full, full[:1], config, pad_id=1)
    memory = calc.estimate_memory(
        calc.load_shape("embedded"), LoraConfig(r=8), precision=precision, batch_size=2, seq_length=64
    )
    assert memory.peak_bytes == pytest.approx(state.peak_bytes, rel=0.04)


def test_full_fine_tuning_of_packed_weights_is_refused(precision):
    with pytest.raises(ConfigError, match=f"precision is '{precision}'; allowed: fp32, .*cannot be trained"):
        RunConfig(data=DataConfig(path="x"), method=FullConfig(), train=TrainConfig(precision=precision))
    for method in METHODS:
        RunConfig(data=DataConfig(path="x"), method=method, train=TrainConfig(precision=precision))
    assert set(PRECISIONS) == {*TRAINABLE_PRECISIONS, *QUANTIZED_PRECISIONS}
