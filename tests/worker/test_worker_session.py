"""One worker, one base: what a run leaves behind does not depend on who was there before it."""

import dataclasses

import pytest
import torch

from lora_engine.assets_path import asset_path
from lora_engine.config import DataConfig, FullConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.errors import InputError
from lora_engine.jobs import execute_run
from lora_engine.methods import inject
from lora_engine.session import Session

CONFIG = RunConfig(
    data=DataConfig(path=str(asset_path("datasets/customer_support.jsonl"))),
    method=LoraConfig(r=2, lora_alpha=6),
    train=TrainConfig(steps=3, batch_size=2, max_length=48, eval_every=3, eval_examples=4, device="cpu"),
)


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("text,label\n" + "".join(f"film {i} is {w},{w}\n" for i in range(12) for w in ("good", "bad")))
    return dataclasses.replace(CONFIG, data=DataConfig(path=str(path)))


def with_train(config, **changes):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def left_behind(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").iterdir())}


def same(a, b):
    timed = {"seconds", "step_seconds", "tokens_per_second"}
    return {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


def test_the_second_run_of_a_session_is_that_of_a_fresh_process(tmp_path):
    session = Session()
    first = with_train(dataclasses.replace(CONFIG, method=LoraConfig(r=4, use_dora=True)), seed=1, lr=1e-2)
    execute_run(first, tmp_path / "first", session=session)
    _, second = execute_run(CONFIG, tmp_path / "second", session=session)
    assert session.num_loads == 1
    _, alone = execute_run(CONFIG, tmp_path / "alone")
    assert left_behind(tmp_path / "second") == left_behind(tmp_path / "alone")
    assert same(second, alone)


def test_ejecting_gives_the_base_back_to_the_bit():
    session = Session()
    model = session.open(CONFIG).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    adapted = inject(model, CONFIG.method, seed=0)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    from lora_engine.methods import lora

    lora.merge(adapted)
    session.close(CONFIG)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(module is modules[name] for name, module in model.named_modules())
    assert not any(module.training for module in model.modules())


def test_a_classifiers_head_is_new_for_every_seed(tmp_path, labelled):
    session = Session()
    for seed in (0, 0, 1):
        config = with_train(labelled, seed=seed)
        folder, alone = tmp_path / f"shared{seed}", tmp_path / f"alone{seed}"
        _, shared_result = execute_run(config, folder, session=session)
        _, alone_result = execute_run(config, alone)
        assert left_behind(folder) == left_behind(alone)
        assert same(shared_result, alone_result)
    assert session.num_loads == 2


def test_what_differs_is_loaded_anew(tmp_path):
    session = Session()
    execute_run(CONFIG, tmp_path / "a", session=session)
    execute_run(dataclasses.replace(CONFIG, method=FullConfig()), tmp_path / "b", session=session)
    _, after_full = execute_run(CONFIG, tmp_path / "c", session=session)
    assert session.num_loads == 2
    execute_run(with_train(CONFIG, precision="bf16"), tmp_path / "d", session=session)
    assert session.num_loads == 3
    with pytest.raises(InputError):
        execute_run(with_train(CONFIG, max_length=9999), tmp_path / "e", session=session)
    _, alone = execute_run(CONFIG, tmp_path / "f", session=session)
    assert same(after_full, alone)
    assert left_behind(tmp_path / "c") == left_behind(tmp_path / "f")
