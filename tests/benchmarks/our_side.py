"""Our side: what a sweep does with the same configurations, packed as it would pack them, or one after another."""

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.peft_side import Losses
from benchmarks.workload import PAD_ID, Workload

from lora_engine.config import RunConfig
from lora_engine.methods import inject, lora
from lora_engine.sweeps.packing import group_runs
from lora_engine.training.loop import Callbacks, train
from lora_engine.training.pack import PackCallbacks, train_pack
from lora_engine.training.pack_size import choose_pack_size
from lora_engine.training.pack_step import PackRow


@dataclass(frozen=True)
class Packing:
    """Groups of configurations (by index) that may share a pass, the size measured for each, and what it took."""

    groups: list[list[int]]
    sizes: list[int]
    plans: list[dict[str, Any]]
    seconds: float


def plan(base: Any, work: Workload) -> Packing:
    """As a sweep does before it begins: group by rank, then measure."""
    began = time.perf_counter()
    grouped = group_runs([(str(i), config) for i, config in enumerate(work.configs)])
    groups = [[int(name) for name in group.run_ids] for group in grouped]
    plans = [choose_pack_size(base, _rows(work, group), work.rows, pad_id=PAD_ID) for group in groups]
    facts = [
        {
            "size": p.size,
            "seconds_by_size": dict(p.seconds_by_size),
            "bytes_by_size": dict(p.bytes_by_size),
            "reason": p.reason,
        }
        for p in plans
    ]
    return Packing(groups, [p.size for p in plans], facts, time.perf_counter() - began)


def train_packed(base: Any, work: Workload, packing: Packing) -> Losses:
    losses: dict[int, list[float]] = {i: [] for i in range(work.num_configs)}
    calls = PackCallbacks(on_step=lambda row, report: losses[int(row.name)].append(report.train_loss))
    for group, size in zip(packing.groups, packing.sizes, strict=True):
        if size == 1:
            for i in group:
                losses[i] = _train_alone(base, work, work.configs[i])
            continue
        train_pack(base, _rows(work, group), work.rows, [], pad_id=PAD_ID, size=size, callbacks=calls)
    return [losses[i] for i in range(work.num_configs)]


def train_one_by_one(base: Any, work: Workload) -> Losses:
    """The ordinary loop, on one loaded base."""
    return [_train_alone(base, work, config) for config in work.configs]


def _train_alone(base: Any, work: Workload, config: RunConfig) -> list[float]:
    losses: list[float] = []
    model = inject(base, config.method, seed=config.train.seed)
    calls = Callbacks(on_step=lambda report: losses.append(report.train_loss))
    train(model, work.rows, [], config.train, pad_id=PAD_ID, callbacks=calls)
    lora.eject(base)
    return losses


def _rows(work: Workload, group: list[int]) -> list[PackRow]:
    return [PackRow(name=str(i), config=work.configs[i]) for i in group]
