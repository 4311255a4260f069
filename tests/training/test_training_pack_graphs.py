"""Steps of a pack on fixed buffers against the pack's own, and nothing asked of the device."""

import pytest
import torch
from methods import tiny
from nothing_asked import NothingAsked
from test_training_pack import class_rows, new_head, run_configs, text_rows
from transformers.utils import import_utils

from lora_engine.training.graphs import without_device_checks
from lora_engine.training.loop import lr_at
from lora_engine.training.pack_graphs import StaticPackedSteps, static_pack_refusal
from lora_engine.training.pack_step import PackedSteps, PackRow

MODELS = {"llama": tiny.llama, "llama-classifier": tiny.llama_classifier}


pytestmark = pytest.mark.usefixtures("one_thread")


def packed_steps(name, dtype=torch.float32):
    model = MODELS[name]().to(dtype)
    classes = "classifier" in name
    some = class_rows() if classes else text_rows()
    rows = [
        PackRow(str(i), config, head=new_head(model, config.train.seed) if classes else None)
        for i, config in enumerate(run_configs()[:4])
    ]
    packed = PackedSteps(model, rows, some, 0)
    model.train()
    return packed, some


def do(packed, step, num=7):
    """`num` steps, each config at a step of its own, as in a pack that was formed anew."""
    results = []
    for i in range(num):
        at = [i + 2 * k for k in range(len(packed.rows))]
        lrs = [lr_at(row.config.train, k) for row, k in zip(packed.rows, at, strict=True)]
        losses, norms, tokens = step(at, lrs)
        results.append((losses, norms))
        assert all(isinstance(count, int) for count in tokens)
    return torch.tensor(results, dtype=torch.float64), packed.pack.parameters.detach().clone()


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_fixed_buffers_give_what_the_packs_own_steps_give(name, dtype, tolerance):
    packed, _ = packed_steps(name, dtype)
    expected = do(packed, packed.step)
    packed, some = packed_steps(name, dtype)
    static = StaticPackedSteps(packed, some, 0)
    found = do(packed, static.step)
    assert static.reason is None
    assert not static.captured
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    # Its own steps go on from there, where a graph turns out to be impossible.
    static.reason = "no graph"
    losses, norms, _ = static.step([9] * 4, [1e-3] * 4)
    assert torch.isfinite(torch.tensor([losses, norms])).all()


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_step_asks_nothing_of_the_device(monkeypatch, name):
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    packed, some = packed_steps(name)
    static = StaticPackedSteps(packed, some, 0)
    static.launch([0] * 4, [1e-3] * 4)
    with without_device_checks(), NothingAsked():
        static._step.function(*static._step.inputs)


def test_only_cuda_has_graphs():
    packed, _ = packed_steps("llama")
    assert static_pack_refusal(packed) == "only CUDA has graphs"
