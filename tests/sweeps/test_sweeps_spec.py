"""Grids: what they are made of and what they refuse."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.config import DataConfig, FullConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.errors import ConfigError
from lora_engine.sweeps import PACKED, SweepSpec, expand_grid

BASE = RunConfig(
    data=DataConfig(path="a.csv"),
    method=LoraConfig(target_modules=("q_proj",), use_rslora=True),
    train=TrainConfig(steps=7),
)


def axis(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, min_size=1, max_size=4).map(tuple)


@given(
    rs=axis(st.integers(1, 64)),
    lora_alphas=axis(st.sampled_from([1.0, 8.0, 16.0, 1])),
    lrs=axis(st.sampled_from([1e-4, 3e-3])),
    seeds=axis(st.integers(0, 9)),
    ways=st.fixed_dictionaries({}, optional={"packed": st.sampled_from(PACKED), "early_exit": st.booleans()}),
)
def test_every_combination_once(rs: Any, lora_alphas: Any, lrs: Any, seeds: Any, ways: Any) -> None:
    spec = SweepSpec(base=BASE, rs=rs, lora_alphas=lora_alphas, lrs=lrs, seeds=seeds, **ways)
    grid = expand_grid(spec)
    cells = [(c.method.r, c.method.lora_alpha, c.train.lr, c.train.seed) for c in grid]  # type: ignore[union-attr]
    assert len(cells) == len(set(cells)) == spec.num_runs
    assert set(cells) == {(r, a, lr, s) for r in rs for a in lora_alphas for lr in lrs for s in seeds}
    assert SweepSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_all_else_stays_as_in_the_base() -> None:
    config = expand_grid(SweepSpec(base=BASE))[0]
    assert isinstance(config.method, LoraConfig)
    assert (config.method.target_modules, config.method.use_rslora) == (("q_proj",), True)
    assert (config.train.steps, config.data, config.model) == (7, BASE.data, BASE.model)


def test_order_shows_the_whole_map_before_it_repeats() -> None:
    spec = SweepSpec(base=BASE, rs=(1, 2), lora_alphas=(8,), lrs=(0.1, 0.2), seeds=(0, 1))
    cells = [(c.method.r, c.train.lr, c.train.seed) for c in expand_grid(spec)]  # type: ignore[union-attr]
    assert cells[:5] == [(1, 0.1, 0), (2, 0.1, 0), (1, 0.2, 0), (2, 0.2, 0), (1, 0.1, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rs": ()}, r"rs is \(\); allowed: a list of at least one value"),
        ({"lrs": "3e-3"}, "lrs is '3e-3'; allowed: a list"),
        ({"seeds": 3}, "seeds is 3; allowed: a list"),
        ({"rs": (4, 0)}, "r is 0; allowed: a whole number from 1"),
        ({"rs": (4.5,)}, "r is 4.5; allowed: a whole number"),
        ({"lora_alphas": (-1.0,)}, "lora_alpha is -1.0; allowed: a number from 0"),
        ({"lora_alphas": ("8",)}, "lora_alpha is '8'; allowed: a number"),
        ({"lrs": (100.0,)}, "lr is 100.0; allowed: a number from"),
        ({"seeds": (-1,)}, "seed is -1; allowed: a whole number from 0"),
        ({"rs": tuple(range(1, 101)), "seeds": tuple(range(100))}, "num_runs is 20000; allowed: at most 2000"),
        ({"packed": "perhaps"}, "packed is 'perhaps'; allowed: one of auto, always, never"),
        ({"early_exit": "yes"}, "early_exit is 'yes'; allowed: True or False"),
        ({"base": RunConfig(data=BASE.data, method=FullConfig())}, "method is 'full'; allowed: lora"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SweepSpec(**({"base": BASE} | changes))


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="ranks is .*; allowed: one of base, rs"):
        SweepSpec.from_dict(SweepSpec(base=BASE).to_dict() | {"ranks": [1]})


def test_a_spec_of_an_earlier_version_is_packed_where_it_pays() -> None:
    old = {key: value for key, value in SweepSpec(base=BASE).to_dict().items() if key not in ("packed", "early_exit")}
    spec = SweepSpec.from_dict(old)
    assert (spec.packed, spec.early_exit) == ("auto", False)
