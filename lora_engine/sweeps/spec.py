"""What a sweep is made of: a base run and the values of its four axes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_engine.config import LoraConfig, RunConfig, TrainConfig, run_config_from_dict, to_dict
from lora_engine.errors import ConfigError
from lora_engine.sweeps.packing import PACKED

MAX_RUNS = 2000
_AXES = ("rs", "lora_alphas", "lrs", "seeds")
_WAYS = ("packed", "early_exit")


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """A grid of LoRA runs: every rank with every alpha, learning rate and seed, all else as in `base`.

    `packed` says how it is trained: "auto" packs runs where that is measured to be faster, "always" wherever it is
    possible, "never" trains one after another; what comes out is the same. `early_exit` drops the worse half of the
    cells at a quarter and at half of the steps.

    Repeated values are kept once. Raises ConfigError for an empty axis, a value no run may have, a
    base that is not LoRA, or more than MAX_RUNS runs."""

    base: RunConfig
    rs: tuple[int, ...] = (1, 2, 4, 8)
    lora_alphas: tuple[float, ...] = (8.0, 16.0)
    lrs: tuple[float, ...] = (3e-3,)
    seeds: tuple[int, ...] = (0, 1)
    packed: str = "auto"
    early_exit: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.base.method, LoraConfig):
            raise ConfigError("method", self.base.method.method, "lora, the method that has a rank to sweep")
        for axis in _AXES:
            values = getattr(self, axis)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ConfigError(axis, values, "a list of at least one value")
            object.__setattr__(self, axis, tuple(dict.fromkeys(values)))
        # Each value once, in a config of its own: the configs know what is allowed and say it.
        for r in self.rs:
            replace(self.base.method, r=r)
        for alpha in self.lora_alphas:
            replace(self.base.method, lora_alpha=alpha)
        for lr in self.lrs:
            replace(self.base.train, lr=lr)
        for seed in self.seeds:
            replace(self.base.train, seed=seed)
        object.__setattr__(self, "lora_alphas", tuple(dict.fromkeys(float(alpha) for alpha in self.lora_alphas)))
        object.__setattr__(self, "lrs", tuple(dict.fromkeys(float(lr) for lr in self.lrs)))
        if self.num_runs > MAX_RUNS:
            raise ConfigError("num_runs", self.num_runs, f"at most {MAX_RUNS}; choose fewer values")
        if self.packed not in PACKED:
            raise ConfigError("packed", self.packed, f"one of {', '.join(PACKED)}")
        if not isinstance(self.early_exit, bool):
            raise ConfigError("early_exit", self.early_exit, "True or False")

    @property
    def num_runs(self) -> int:
        """How many runs the grid has."""
        return len(self.rs) * len(self.lora_alphas) * len(self.lrs) * len(self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the inverse."""
        axes = {axis: list(getattr(self, axis)) for axis in _AXES}
        return {"base": to_dict(self.base)} | axes | {way: getattr(self, way) for way in _WAYS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SweepSpec":
        """Inverse of `to_dict`. Raises ConfigError on an unknown key or a wrong value."""
        rest = dict(values)
        base = run_config_from_dict(rest.pop("base", None) or {})
        for key in rest:
            if key not in (*_AXES, *_WAYS):
                raise ConfigError(key, rest[key], f"one of base, {', '.join((*_AXES, *_WAYS))}")
        return cls(base=base, **{key: _as_tuple(value) for key, value in rest.items()})


def expand_grid(spec: SweepSpec) -> list[RunConfig]:
    """The runs of the grid. Ranks go by fastest and seeds slowest: the whole map is seen early, then repeated."""
    return [
        replace(
            spec.base,
            method=_with_rank(spec.base, r, alpha),
            train=replace(spec.base.train, lr=lr, seed=seed),
        )
        for seed in spec.seeds
        for lr in spec.lrs
        for alpha in spec.lora_alphas
        for r in spec.rs
    ]


def _with_rank(base: RunConfig, r: int, alpha: float) -> LoraConfig:
    assert isinstance(base.method, LoraConfig)  # SweepSpec refuses anything else
    return replace(base.method, r=r, lora_alpha=alpha)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def evaluated_at_quarters(train: TrainConfig) -> TrainConfig:
    """`train` with an evaluation at every quarter of its steps.

    Of dozens of runs nobody reads ten points of each curve, and on small batches ten evaluations take longer than the
    steps between them."""
    return replace(train, eval_every=max(1, train.steps // 4))


Predict = Callable[[RunConfig], Mapping[str, Any] | None]
"""What a run is expected to cost, or None where nobody knows."""
