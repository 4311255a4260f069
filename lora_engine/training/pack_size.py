"""How many configs share a pass: as many as fit, and no more than pay. Measured, never a constant.

Memory is affine in the number of configs, so two measured packs tell the largest. Speed is not: on a CPU packing stops
paying near 64-128 tokens a config, on a GPU when one config fills the chip, so packs are tried until configs a second
stop rising.
"""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch

from lora_engine.data import Encoded
from lora_engine.methods.packed import eject_pack
from lora_engine.training.loop import LoopState, heaviest_step, lr_at
from lora_engine.training.memory_limits import is_out_of_memory
from lora_engine.training.pack_step import PackedSteps, PackRow

# A larger pack has to be this much faster; less is noise.
WORTH = 1.03
# Of two ways to cut that take within so much of each other, which a short probe hardly tells apart, the smaller packs:
# they need less memory and are done sooner.
CLOSE = 1.05
# Of the free memory; allocators need room between tensors.
USED_SHARE = 0.9
# A probe times so many steps, of long ones fewer: at least two, for so many seconds.
TIMED_STEPS, ENOUGH_SECONDS = 5, 0.2


@dataclass(frozen=True)
class PackPlan:
    """`size` configs a pack; 1: one after another with the ordinary loop. `bytes_by_size` is the peak of a step, base
    model included; `seconds_by_size` that of a step of the whole pack. `reason` in a sentence. `times_faster`: than the
    same runs one after another; None where that was not measured."""

    size: int
    seconds_by_size: dict[int, float]
    bytes_by_size: dict[int, int]
    reason: str
    times_faster: float | None = None


@dataclass(frozen=True)
class Probe:
    """Throw-away steps of one pack: fastest seconds, peak bytes, and those of them that the pack adds to the base."""

    seconds: float
    peak_bytes: int
    added_bytes: int


def choose_pack_size(
    model: Any,
    rows: Sequence[PackRow],
    train_rows: Sequence[Encoded],
    *,
    pad_id: int,
    free_bytes: int | None = None,
) -> PackPlan:
    """The pack size for `rows` on the bare base `model`, which stays as it is. `free_bytes` (None: asked of the device)
    is what tensors beside the base may take.

    The rows of the highest ranks are tried, the dearest packs there can be. Of all ways to cut `rows` into even packs
    the one that takes least is chosen: 9 rows that go best 8 at a time go 9 at once, not 5 and 4."""
    if not rows:
        raise ValueError("rows is empty; allowed: at least one")
    dearest = sorted(rows, key=lambda row: -row.method.r)
    budget = int(USED_SHARE * (free_memory(_device(model)) if free_bytes is None else free_bytes))
    seconds: dict[int, float] = {}
    peaks: dict[int, int] = {}
    added: dict[int, int] = {}
    most, limit = len(rows), ""
    size = 1
    while True:
        probe = probe_pack(model, dearest[:size], train_rows, pad_id=pad_id)
        if probe is None:  # memory ran out
            most, limit = max(1, size // 2), "memory ran out"
            break
        seconds[size], peaks[size], added[size] = probe.seconds, probe.peak_bytes, probe.added_bytes
        if size == 2:
            fits = rows_that_fit(budget, added[1], added[2])
            if fits < most:
                most, limit = fits, "more would not fit into memory"
        if size == most or (size >= 2 and _rate(seconds, size) < WORTH * _rate(seconds, size // 2)):
            break
        size = min(2 * size, most)
        if size in seconds:
            break
    size, step_seconds = _cut(len(rows), {n: s for n, s in seconds.items() if n <= most})
    if size > 1 and len(rows) * seconds[1] < WORTH * step_seconds:
        size, step_seconds = 1, len(rows) * seconds[1]
    gain = len(rows) * seconds[1] / max(step_seconds, 1e-9)
    return PackPlan(size, seconds, peaks, _reason(size, len(rows), most, limit, gain), gain)


def _cut(num_rows: int, seconds: Mapping[int, float]) -> tuple[int, float]:
    """The size of even packs of `num_rows` rows whose steps take least together, and what they take; of those that
    take about as little the smallest. It lies within the sizes measured, between which seconds are taken as linear."""
    sizes = sorted(seconds)
    known = [seconds[size] for size in sizes]

    def together(num_packs: int) -> float:
        each, more = divmod(num_rows, num_packs)
        low, high = np.interp((each, each + 1), sizes, known)
        return float((num_packs - more) * low + more * high)

    fewest = -(-num_rows // sizes[-1])
    seconds_by_count = {count: together(count) for count in range(fewest, num_rows + 1)}
    least = min(seconds_by_count.values())
    count = max(count for count, total in seconds_by_count.items() if total <= CLOSE * least)
    return -(-num_rows // count), seconds_by_count[count]


def probe_pack(
    model: Any, rows: Sequence[PackRow], train_rows: Sequence[Encoded], *, pad_id: int, timed: int = TIMED_STEPS
) -> Probe | None:
    """Steps of `rows` from their beginning, thrown away; None when memory ran out. `model` stays as it is."""
    fresh = [replace(row, state=LoopState(), tensors=None) for row in rows]
    device, was_training = _device(model), model.training
    at = [heaviest_step(train_rows, row.config.train) for row in fresh]
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes(model)
    probe: Probe | None = None
    try:
        steps = PackedSteps(model, fresh, train_rows, pad_id)
        model.train()
        memory = steps.memory()
        lrs = [lr_at(row.config.train, 0) for row in fresh]
        with memory.watch():
            steps.step(at, lrs)
        times: list[float] = []
        while len(times) < timed and (len(times) < 2 or sum(times) < ENOUGH_SECONDS):
            began = time.perf_counter()
            steps.step([len(times) + 1] * len(fresh), lrs)
            times.append(time.perf_counter() - began)
        probe = Probe(min(times, default=0.0), memory.peak_bytes, memory.peak_bytes - before)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    finally:
        eject_pack(model)
        model.train(was_training)
    if probe is None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return probe


def rows_that_fit(budget: int, one: int, two: int) -> int:
    """How many rows add at most `budget` bytes where one adds `one` and two add `two`; at least 1."""
    return max(1, (budget - one) // max(1, two - one) + 1)


def even_size(num_rows: int, size: int) -> int:
    """The size of the fewest packs of at most `size` rows, made even."""
    return -(-num_rows // -(-num_rows // size))


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors can take on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available)


def resident_bytes(model: torch.nn.Module) -> int:
    """Of parameters and buffers; a tied weight counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for storage in storages.values())


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _rate(seconds: dict[int, float], size: int) -> float:
    """Configs a second."""
    return size / max(seconds[size], 1e-9)


def _reason(size: int, rows: int, most: int, limit: str, gain: float) -> str:
    if size == 1:
        if rows == 1:
            return "there is one run"
        return limit or "one run fills the machine: a larger pack trains no more configs a second"
    if size == rows:
        return f"all {rows} together are {gain:.1f} times as fast as one after another"
    because = limit if limit and size >= even_size(rows, most) else "a larger pack trains no more configs a second"
    return f"{size} together are {gain:.1f} times as fast as one after another; {because}"
