"""Which runs may share a pass, and what is said of the others."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.config import DataConfig, FullConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.sweeps import BAND, group_runs, pack_refusal

BASE = RunConfig(data=DataConfig(path="a.csv"), method=LoraConfig(r=4), train=TrainConfig(steps=7))


def changed(method: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    return replace(BASE, method=replace(BASE.method, **(method or {})), train=replace(BASE.train, **train))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(BASE, method=FullConfig()), "method full"),
        (changed({"lora_dropout": 0.1}), "lora_dropout 0.1"),
        (changed({"use_dora": True}), "DoRA"),
        (changed({"target_parameters": ("experts.down_proj",)}), "target_parameters"),
        (changed(precision="fp16"), "precision fp16"),
        (changed(precision="mixed-fp16"), "precision mixed-fp16"),
        (changed(optimizer="sgd"), "optimizer sgd"),
    ],
)
def test_what_cannot_be_packed_says_why(config: RunConfig, words: str) -> None:
    assert words in (pack_refusal(config) or "")
    (group,) = group_runs([("a", config), ("b", config)])
    assert group.run_ids == ["a", "b"]
    assert words in (group.reason or "")


@pytest.mark.parametrize(
    "config",
    [
        changed({"r": 1, "lora_alpha": 3.0, "use_rslora": True}),
        changed(lr=1e-4, weight_decay=0.1, seed=5, schedule="cosine", warmup_steps=2, max_grad_norm=0.3),
    ],
)
def test_what_rows_may_differ_in(config: RunConfig) -> None:
    (group,) = group_runs([("a", BASE), ("b", config)])
    assert (group.run_ids, group.reason) == (["a", "b"], None)


@pytest.mark.parametrize(
    "config",
    [
        changed({"target_modules": ("q_proj",)}),
        changed(steps=8),
        changed(batch_size=2),
        changed(max_length=64),
        changed(precision="bf16"),
        changed(checkpointing=True),
        replace(BASE, model="other"),
        replace(BASE, data=DataConfig(path="b.csv")),
    ],
)
def test_what_they_may_not(config: RunConfig) -> None:
    groups = group_runs([("a", BASE), ("b", config), ("c", BASE)])
    assert [group.run_ids for group in groups] == [["a", "c"], ["b"]]
    assert groups[0].reason is None
    assert "no other run" in (groups[1].reason or "")


@given(st.lists(st.tuples(st.integers(1, 200), st.sampled_from([0.0, 0.1])), max_size=30))
def test_no_run_is_lost_and_no_band_is_too_wide(runs: list[tuple[int, float]]) -> None:
    given_runs = [(str(i), changed({"r": r, "lora_dropout": d})) for i, (r, d) in enumerate(runs)]
    groups = group_runs(given_runs)
    assert dict(run for group in groups for run in group.runs) == dict(given_runs)
    assert sum(len(group.runs) for group in groups) == len(given_runs)
    for group in groups:
        assert [int(i) for i in group.run_ids] == sorted(int(i) for i in group.run_ids)
        if group.reason is None:
            ranks = [config.method.r for _, config in group.runs]  # type: ignore[union-attr]
            assert max(ranks) <= BAND * min(ranks)
