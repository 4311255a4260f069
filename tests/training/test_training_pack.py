"""The packed loop against separate runs of the single loop; rows that come and go, memory that ends."""

import copy
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_engine import methods
from lora_engine.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.data import IGNORED, Encoded
from lora_engine.methods.places import task_head_parameters
from lora_engine.training import loop
from lora_engine.training.base import prepare_model
from lora_engine.training.pack import PackCallbacks, PackRow, train_pack

sys.path.insert(0, str(Path(__file__).parent.parent / "methods"))
import tiny

CPU = torch.device("cpu")

# (r, alpha, lr, weight decay, seed): no two alike; scalings that are no powers of two.
GRID = [
    (1, 3.0, 1e-3, 0.0, 0),
    (2, 5.0, 3e-3, 0.1, 1),
    (3, 7.0, 5e-3, 0.0, 2),
    (4, 11.0, 1e-3, 0.3, 0),
    (6, 16.0, 2e-3, 0.01, 1),
    (8, 12.0, 4e-3, 0.0, 3),
]
SETTINGS = TrainConfig(
    steps=50, batch_size=2, max_length=16, device="cpu", eval_every=20, eval_examples=6, checkpoint_every=1000
)


def text_rows(num=12, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(num):
        ids = [int(t) for t in (rng.integers(1, 60) + np.arange(int(rng.integers(6, 16)))) % 60 + 1]
        masked = int(rng.integers(0, 4))
        made.append(Encoded(row=i, input_ids=ids, labels=[IGNORED] * masked + ids[masked:], truncated=False))
    return made


def class_rows(num=12, seed=0):
    return [dataclasses.replace(row, labels=[], label=row.input_ids[0] % tiny.LABELS) for row in text_rows(num, seed)]


def run_configs(grid=GRID, method=None, **changes):
    method = method or {}
    return [
        RunConfig(
            data=DataConfig(path="x"),
            method=LoraConfig(r=r, lora_alpha=alpha, **method),
            train=dataclasses.replace(SETTINGS, lr=lr, weight_decay=decay, seed=seed, **changes),
        )
        for r, alpha, lr, decay, seed in grid
    ]


def new_head(model, seed):
    """First values of a task head that depend on the seed, as at loading."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float32)
        for name, p in task_head_parameters(model)
    }


class Seen:
    """What a run told, by step."""

    def __init__(self):
        self.steps, self.evals = [], []


def train_alone(base, config, rows, eval_rows, tmp_path, *, double=False):
    model = copy.deepcopy(base)
    methods.load_task_head(model, new_head(model, config.train.seed))
    methods.inject(model, config.method, seed=config.train.seed)
    if double:
        model.double()
    prepare_model(model, config.train)
    seen, path = Seen(), tmp_path / f"{config.train.seed}-{config.method.r}-{config.train.lr}.safetensors"
    saver = dataclasses.replace(config.train, checkpoint_every=config.train.steps - 1)
    state = loop.train(
        model, rows, eval_rows, saver, pad_id=0, checkpoint=path,
        callbacks=loop.Callbacks(on_step=seen.steps.append, on_eval=lambda *pair: seen.evals.append(pair)),
    )  # fmt: skip
    return methods.state_dict(model, config.method), state, seen


def packed_rows(base, configs):
    return [
        PackRow(name=str(i), config=config, head=new_head(base, config.train.seed)) for i, config in enumerate(configs)
    ]


def train_together(base, configs, rows, eval_rows, **more):
    packed = packed_rows(base, configs)
    seen = {row.name: Seen() for row in packed}
    callbacks = PackCallbacks(
        on_step=lambda row, report: seen[row.name].steps.append(report),
        on_eval=lambda row, *pair: seen[row.name].evals.append(pair),
        **more.pop("callbacks", {}),
    )
    prepare_model(base, configs[0].train)
    train_pack(base, packed, rows, eval_rows, pad_id=0, callbacks=callbacks, **more)
    return packed, [seen[row.name] for row in packed]


def parameters(row):
    return {k.removeprefix("parameter."): v for k, v in row.tensors.items() if k.startswith("parameter.")}


def delta_W(state, config):
    return {
        name: config.method.scaling * state[name.replace("lora_A", "lora_B")].double() @ value.double()
        for name, value in state.items()
        if "lora_A" in name
    }


def assert_same(base, configs, rows, eval_rows, tmp_path, *, loss_tolerance=1e-5, delta_tolerance=2e-4, **more):
    bits = {name: value.clone() for name, value in base.state_dict().items()}
    packed, seen = train_together(copy.deepcopy(base), configs, rows, eval_rows, **more)
    for config, row, told in zip(configs, packed, seen, strict=True):
        state, ended, alone = train_alone(base, config, rows, eval_rows, tmp_path)
        assert list(parameters(row)) == list(state)
        np.testing.assert_allclose(
            [r.train_loss for r in told.steps], [r.train_loss for r in alone.steps], rtol=0, atol=loss_tolerance
        )
        np.testing.assert_allclose([r.grad_norm for r in told.steps], [r.grad_norm for r in alone.steps], rtol=1e-2)
        assert [(r.step, r.lr, r.tokens) for r in told.steps] == [(r.step, r.lr, r.tokens) for r in alone.steps]
        assert [step for step, _ in told.evals] == [step for step, _ in alone.evals]
        np.testing.assert_allclose(
            [loss for _, loss in told.evals], [loss for _, loss in alone.evals], rtol=0, atol=loss_tolerance
        )
        assert row.state.eval_loss_after == pytest.approx(ended.eval_loss_after, abs=loss_tolerance)
        for name, wanted in delta_W(state, config).items():
            got = delta_W(parameters(row), config)[name]
            assert torch.linalg.norm(got - wanted) <= delta_tolerance * torch.linalg.norm(wanted), name
        for name in (n for n in state if "lora_" not in n):
            torch.testing.assert_close(parameters(row)[name], state[name], rtol=1e-3, atol=1e-5)
    assert all(torch.equal(value, bits[name]) for name, value in base.state_dict().items())
    return packed


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fp32_is_separate_runs(tmp_path, kind):
    dropless = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    assert_same(tiny.MODELS[kind](**dropless), run_configs(), text_rows(), text_rows(6, 9), tmp_path)
