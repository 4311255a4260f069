"""What a comparison of methods is made of: one base run, and for every method the learning rates it may choose from.

Two stages, each of ordinary runs. The search trains every method at each of its learning rates with the first seed;
every method has equally many. The repeats train it with the other seeds at the rate whose evaluation loss was lowest.
The search looks at the same evaluation rows as the repeats, so losses are a little flattered, for all methods alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lora_engine.config import (
    DEFAULT_LRS,
    MethodConfig,
    RunConfig,
    default_lr,
    method_from_dict,
    run_config_from_dict,
    to_dict,
)
from lora_engine.errors import ConfigError

KIND = "comparison"  # tells its record in the ledger from a grid's
MATCHES = ("steps", "parameters", "memory", "seconds")
MAX_RUNS = 500
_NUM_RATES = 3
_LADDER = tuple(float(f"{digit}e{power}") for power in range(-8, 1) for digit in (1, 3))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method of a comparison: its config, the learning rates of its search, and its steps."""

    method: MethodConfig
    lrs: tuple[float, ...]
    steps: int

    @property
    def name(self) -> str:
        return self.method.method


@dataclass(frozen=True, kw_only=True)
class ComparisonSpec:
    """Methods on the same model, data and batches. `base` gives all but method, learning rate, steps and seed.

    `match` says what was made equal and `notes` what could not be. Raises ConfigError for a method that comes twice,
    unequal numbers of learning rates, a value no run may have, or more than MAX_RUNS runs."""

    base: RunConfig
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    match: str = "steps"
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if not names or len(set(names)) != len(names):
            raise ConfigError("methods", ",".join(names), f"at least one of {', '.join(DEFAULT_LRS)}, each once")
        if not self.seeds:
            raise ConfigError("seeds", self.seeds, "at least one whole number")
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(self.seeds)))
        if self.match not in MATCHES:
            raise ConfigError("match", self.match, f"one of {', '.join(MATCHES)}")
        sizes = {entry.name: len(entry.lrs) for entry in self.entries}
        if 0 in sizes.values() or len(set(sizes.values())) != 1:
            raise ConfigError("lrs", sizes, "equally many learning rates for every method, at least one")
        if count_runs(self) > MAX_RUNS:
            raise ConfigError("num_runs", count_runs(self), f"at most {MAX_RUNS}; choose fewer methods or seeds")
        for entry in self.entries:  # the configs know what is allowed and say it
            for lr in entry.lrs:
                for seed in self.seeds:
                    make_cell(self, entry, lr, seed)

    def entry(self, method: str) -> Entry:
        """The entry of that name."""
        return next(entry for entry in self.entries if entry.name == method)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the inverse."""
        return {
            "kind": KIND,
            "base": to_dict(self.base),
            "entries": [
                {"method": to_dict(entry.method), "lrs": list(entry.lrs), "steps": entry.steps}
                for entry in self.entries
            ],
            "seeds": list(self.seeds),
            "match": self.match,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ComparisonSpec":
        """Inverse of `to_dict`. Raises ConfigError."""
        if values.get("kind") != KIND:
            raise ConfigError("kind", values.get("kind"), KIND)
        return cls(
            base=run_config_from_dict(values["base"]),
            entries=tuple(
                Entry(method=method_from_dict(entry["method"]), lrs=tuple(entry["lrs"]), steps=entry["steps"])
                for entry in values["entries"]
            ),
            seeds=tuple(values["seeds"]),
            match=values["match"],
            notes=tuple(values["notes"]),
        )


def default_rates(method: str, num_classes: int = 0) -> tuple[float, ...]:
    """Three learning rates around the method's default, two to a decade."""
    return rates_around(default_lr(method, num_classes))


def rates_around(lr: float) -> tuple[float, ...]:
    """`lr` and its neighbours on 1, 3, 10, 30, ...; ascending."""
    nearest = min(range(len(_LADDER)), key=lambda i: abs(math.log(_LADDER[i] / lr)))
    place = min(max(nearest, 1), len(_LADDER) - 2)
    return tuple(lr if i == nearest else _LADDER[i] for i in range(place - 1, place + 2))


def make_cell(spec: ComparisonSpec, entry: Entry, lr: float, seed: int) -> RunConfig:
    """One run. The order of its batches depends on the seed alone, so every method reads the same ones."""
    return replace(spec.base, method=entry.method, train=replace(spec.base.train, lr=lr, seed=seed, steps=entry.steps))


def count_runs(spec: ComparisonSpec) -> int:
    """Runs of both stages; the search's run at the chosen rate is the first seed's."""
    return sum(len(entry.lrs) + len(spec.seeds) - 1 for entry in spec.entries)


def search_cells(spec: ComparisonSpec) -> list[RunConfig]:
    """The runs of the first stage: the middle rate of every method first, so that all methods are seen early."""
    most = max(len(entry.lrs) for entry in spec.entries)
    order = sorted(range(most), key=lambda i: abs(i - (most - 1) // 2))
    return [make_cell(spec, entry, entry.lrs[i], spec.seeds[0]) for i in order for entry in spec.entries]


def repeat_cells(spec: ComparisonSpec, rates: Mapping[str, float]) -> list[RunConfig]:
    """The runs of the second stage: every other seed of the methods in `rates`, at the rate given there."""
    return [
        make_cell(spec, entry, rates[entry.name], seed)
        for seed in spec.seeds[1:]
        for entry in spec.entries
        if entry.name in rates
    ]


class CellView(Protocol):
    """What is read of a run."""

    @property
    def id(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def result(self) -> Mapping[str, Any] | None: ...
    @property
    def prediction(self) -> Mapping[str, Any] | None: ...


def find_cell(runs: Sequence[CellView], config: RunConfig) -> CellView | None:
    """The run of `config`, a finished one first."""
    wanted = to_dict(config)
    same = [run for run in runs if run.config == wanted]
    return next((run for run in same if run.status == "done"), same[0] if same else None)


def loss_of(run: CellView | None) -> float | None:
    """Evaluation loss after training; None where there is none, or it is not a number."""
    value = (run.result or {}).get("eval_loss_after") if run is not None and run.status == "done" else None
    return float(value) if value is not None and math.isfinite(value) else None


def choose_rates(spec: ComparisonSpec, runs: Sequence[CellView]) -> dict[str, float]:
    """method -> the learning rate of the lowest loss in the search (equal losses: the smaller rate).

    A method none of whose runs has a finite loss is left out."""
    chosen = {}
    for entry in spec.entries:
        losses = {lr: loss_of(find_cell(runs, make_cell(spec, entry, lr, spec.seeds[0]))) for lr in entry.lrs}
        finite = sorted((loss, lr) for lr, loss in losses.items() if loss is not None)
        if finite:
            chosen[entry.name] = finite[0][1]
    return chosen


def missing_cells(spec: ComparisonSpec, runs: Sequence[CellView]) -> list[RunConfig]:
    """What the comparison still lacks, of the stage it is in; a cell that exists is never planned again.

    Nothing while the search is going on: the rates are not chosen yet."""
    cells = search_cells(spec)
    found = [find_cell(runs, cell) for cell in cells]
    lacking = [cell for cell, run in zip(cells, found, strict=True) if run is None]
    if lacking:
        return lacking
    if any(run is not None and run.status not in ("done", "failed") for run in found):
        return []
    return [cell for cell in repeat_cells(spec, choose_rates(spec, runs)) if find_cell(runs, cell) is None]
