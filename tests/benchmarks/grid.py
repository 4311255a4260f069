"""A grid of configurations: ours against PEFT with a plain loop, PEFT with transformers' Trainer, and a script started
for each configuration. Same model, rows, order, initial values, steps, optimizer, precision and threads."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from benchmarks import our_side, peft_side
from benchmarks.machine import summary
from benchmarks.peft_side import Losses
from benchmarks.rounds import max_difference, paired, peak_bytes, script_per_config, settle, take_turns
from benchmarks.workload import Workload

PACKED, ALONE = "ours, packed", "ours, one after another"
LOOP, LOOP_FUSED, TRAINER = "PEFT, plain loop", "PEFT, plain loop, fused AdamW", "PEFT, Trainer"
SCRIPT = "PEFT, a script per configuration"
UNMEASURED = "unmeasured: no CUDA device here"

# (sequences, tokens each, steps, rounds): 32, 128 and 512 tokens of a configuration's step.
ON_CPU = ((1, 32, 40, 5), (2, 64, 20, 5), (4, 128, 8, 3))
GPU_MODELS = {"embedded": "fp32", "GPT-2 125M": "bf16"}
TOKENS_OF_1B = (128, 512, 2048)


def run_grid(*, smoke: bool = False, repeats: int = 0) -> dict[str, Any]:
    """16 configurations of the embedded model on the CPU; `repeats` 0: as many as ON_CPU says."""
    if smoke:
        return {"threads": torch.get_num_threads(), "cells": [compare(_tiny(Workload()), 2)]}
    cells = []
    for batch_size, length, steps, rounds in ON_CPU:
        work = Workload(batch_size=batch_size, length=length, steps=steps)
        cells.append(compare(work, repeats or rounds, scripts=2))
    return {"threads": torch.get_num_threads(), "cells": cells}


def run_grid_gpu(*, smoke: bool = False, repeats: int = 0) -> dict[str, Any]:
    """The same on a CUDA card, with larger models, single runs and the crossover of a 1B model. Smoke: all of it on
    the CPU with a tiny model."""
    if smoke:
        works = (_tiny(_gpu_grids("cpu")[0]), _tiny(_gpu_singles("cpu")[0]), _tiny(_gpu_1b("cpu")[0]))
        return _gpu_figures([works[0]], [works[1]], [works[2]], 1)
    if not torch.cuda.is_available():
        return {"rows": {work.label: UNMEASURED for work in (*_gpu_grids(), *_gpu_singles(), *_gpu_1b())}}
    return _gpu_figures(_gpu_grids(), _gpu_singles(), _gpu_1b(), repeats or 5)


def _gpu_figures(
    grids: list[Workload], singles: list[Workload], crossover: list[Workload], repeats: int
) -> dict[str, Any]:
    return {
        "grids": [compare(work, repeats) for work in grids],
        "singles": [compare_single(work, repeats) for work in singles],
        "crossover": [compare(work, min(repeats, 3)) for work in crossover],
    }


def compare(work: Workload, repeats: int, *, scripts: int = 0) -> dict[str, Any]:
    """Everybody does `work`, `repeats` times in turn; `scripts` configurations are also done by a script each."""
    bases = {name: work.load() for name in (PACKED, ALONE, LOOP, LOOP_FUSED, TRAINER)}
    packing = our_side.plan(bases[PACKED], work)

    def runs(work: Workload) -> dict[str, Callable[[], Losses]]:
        return {
            PACKED: partial(our_side.train_packed, bases[PACKED], work, packing),
            **_one_after_another(bases, work),
        }

    figures = _measure(work, runs, bases, repeats, reference=PACKED)
    packed = figures["runs"][PACKED]
    packed |= {"planning_seconds": packing.seconds, "pack_sizes": packing.sizes, "plans": packing.plans}
    whole = statistics.median(packed["all_seconds"]) + packing.seconds
    for run in figures["runs"].values():
        run["times_ours_with_planning"] = run["seconds"]["median"] / whole
    if scripts:
        done = script_per_config(work, scripts)
        total = statistics.mean(done["seconds"]) * work.num_configs
        figures["runs"][SCRIPT] = {
            "seconds_each": done["seconds"],
            "seconds": summary([total]),
            "note": f"{scripts} of {work.num_configs} were started and timed; the total is scaled from them",
            "times_ours": summary([total / s for s in packed["all_seconds"]]),
            # Its A is another; B is zero, so the first losses are the same all the same.
            "max_first_loss_difference": max(
                abs(a - b) for a, b in zip(done["first_losses"], figures["first_losses"], strict=False)
            ),
            "peak_bytes": done["peak_rss_bytes"],
            "peak_kind": "resident set of one process",
        }
    return figures


def compare_single(work: Workload, repeats: int) -> dict[str, Any]:
    """One run, by our ordinary loop and by PEFT."""
    bases = {name: work.load() for name in (ALONE, LOOP, LOOP_FUSED, TRAINER)}
    return _measure(work, partial(_one_after_another, bases), bases, repeats, reference=ALONE)


def _one_after_another(bases: dict[str, Any], work: Workload) -> dict[str, Callable[[], Losses]]:
    return {
        ALONE: partial(our_side.train_one_by_one, bases[ALONE], work),
        LOOP: partial(peft_side.train_in_loop, bases[LOOP], work, fused=False),
        LOOP_FUSED: partial(peft_side.train_in_loop, bases[LOOP_FUSED], work, fused=True),
        TRAINER: partial(peft_side.train_with_trainer, bases[TRAINER], work),
    }


def _measure(
    work: Workload,
    runs: Callable[[Workload], dict[str, Callable[[], Losses]]],
    bases: dict[str, Any],
    repeats: int,
    *,
    reference: str,
) -> dict[str, Any]:
    short = replace(work, steps=2)
    peaks = {}
    for name, run in runs(short).items():  # warms up, too
        with peak_bytes(bases[name], work.device) as found:
            run()
        peaks[name] = found
    taken = take_turns(runs(work), repeats, work.device)
    ours = taken[reference]
    rate = matrix_rate(work.device, work.precision)
    figures: dict[str, Any] = {
        "model": work.model,
        "configurations": work.num_configs,
        "tokens": work.tokens,
        "sequences": work.batch_size,
        "steps": work.steps,
        "device": torch.cuda.get_device_name() if work.device == "cuda" else "cpu",
        "precision": work.precision,
        "matrix_flops_per_second": rate,
        "first_losses": [losses[0] for losses in ours["losses"]],
        "runs": {},
    }
    for name, done in taken.items():
        seconds = statistics.median(done["seconds"])
        figures["runs"][name] = {
            "seconds": summary(done["seconds"]),
            "all_seconds": done["seconds"],
            "milliseconds_per_step": 1000 * seconds / (work.steps * work.num_configs),
            "times_ours": paired(done["seconds"], ours["seconds"]),
            "max_loss_difference": max_difference(done["losses"], ours["losses"]),
            "share_of_matrix_rate": work.flops / seconds / rate,
            "peak_bytes": peaks[name]["peak_bytes"],
            "peak_kind": peaks[name]["kind"],
        }
    return figures


def matrix_rate(device: str, precision: str) -> float:
    """FLOPs a second of one large square product in the precision's own type: what the device can do at best."""
    size, dtype = (8192 if device == "cuda" else 1024), torch.bfloat16 if "bf16" in precision else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        settle(device)
        began = time.perf_counter()
        torch.mm(a, a)
        settle(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[2:])


def _gpu_grids(device: str = "cuda") -> list[Workload]:
    return [
        Workload(
            model=model,
            num_configs=count,
            steps=40,
            batch_size=sequences,
            length=length,
            precision=precision,
            device=device,
        )
        for model, precision in GPU_MODELS.items()
        for count in (16, 64)
        for sequences, length in ((1, 32), (4, 128))
    ]


def _gpu_singles(device: str = "cuda") -> list[Workload]:
    return [
        Workload(model=model, num_configs=1, steps=200, batch_size=8, length=128, precision=precision, device=device)
        for model, precision in (*GPU_MODELS.items(), ("Llama 1B", "bf16"))
    ]


def _gpu_1b(device: str = "cuda") -> list[Workload]:
    """Fewer tokens to more: where packing stops paying."""
    return [
        Workload(
            model="Llama 1B",
            num_configs=8,
            steps=10,
            batch_size=tokens // 128,
            length=128,
            precision="bf16",
            device=device,
        )
        for tokens in TOKENS_OF_1B
    ]


def _tiny(work: Workload) -> Workload:
    """The same code in a second."""
    return replace(
        work, model="tiny Llama", num_configs=min(3, work.num_configs), steps=3, batch_size=1, length=16, device="cpu"
    )
