"""A whole grid through the real sweep: ledger, worker, packs; in full, with early exit, and one after another."""

import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from lora_engine.assets_path import asset_path
from lora_engine.calc.predict import predict_run
from lora_engine.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.executors import InlineExecutor
from lora_engine.runs import Ledger, runs_frame
from lora_engine.sweeps import SweepSpec, estimate_sweep_seconds, evaluated_at_quarters, start_sweep

CELL = ["r", "lora_alpha", "lr"]


def run_early_exit(*, smoke: bool = False, repeats: int = 0) -> dict[str, Any]:  # noqa: ARG001
    """r 1 to 32 x 3 alphas x 3 rates x 2 seeds, 40 steps of 2 x 64 tokens each, on the bundled customer-support set.

    Both sweeps begin in a fresh folder and process, so their seconds include starting torch and measuring the pack
    size; the sequential estimate is taken from one run of every rank, trained with packing off."""
    axes: dict[str, Any] = {
        "rs": (1, 2, 4, 8, 16, 32),
        "lora_alphas": (8.0, 16.0, 32.0),
        "lrs": (1e-3, 3e-3, 1e-2),
        "seeds": (0, 1),
    }
    train = evaluated_at_quarters(TrainConfig(steps=40, batch_size=2, max_length=64, device="auto"))
    if smoke:
        axes |= {"rs": (1, 2), "lora_alphas": (8.0,), "seeds": (0,), "lrs": (1e-3, 3e-3)}
        train = TrainConfig(steps=4, batch_size=1, max_length=32, eval_examples=2, device="cpu")
    data = DataConfig(path=str(asset_path("datasets/customer_support.jsonl")))
    base = RunConfig(data=data, method=LoraConfig(), train=train)
    spec = SweepSpec(base=base, **axes)
    tried = SweepSpec(
        base=base, rs=spec.rs, lora_alphas=spec.lora_alphas[-1:], lrs=spec.lrs[:1], seeds=(0,), packed="never"
    )
    full, full_seconds, _ = _sweep(spec)
    early, early_seconds, _ = _sweep(SweepSpec(base=base, **axes, early_exit=True))
    alone, alone_seconds, alone_estimate = _sweep(tried, estimate_for=spec)
    # From one end to the next: a worker takes all runs of a sweep at once, and starts torch once for all.
    each = float(alone["finished_seconds"].sort_values().diff().mean())
    sequential = alone_seconds + each * (spec.num_runs - tried.num_runs)
    return {
        "runs": spec.num_runs,
        "steps": train.steps,
        "sequential": {
            "seconds": sequential,
            "note": f"{tried.num_runs} runs, one of every rank, took {alone_seconds:.1f} s, "
            f"{each:.2f} s each after the first; all others at that",
            "estimate_of_the_page_seconds": alone_estimate,
        },
        "full": {"seconds": full_seconds, "times_faster": sequential / full_seconds, **_facts(full)},
        "early_exit": {"seconds": early_seconds, "times_faster": sequential / early_seconds, **_facts(early)},
        "seconds_saved": full_seconds - early_seconds,
        "share_saved": 1 - early_seconds / full_seconds,
        "regret": regret(full, early),
        "packed_against_alone_max_loss_difference": _difference(full, alone),
    }


def regret(full: pd.DataFrame, early: pd.DataFrame) -> dict[str, Any]:
    """What was given up: mean loss over seeds of the cell that early exit ends with, minus the full grid's best, both
    as the full grid ended."""
    losses = full.groupby(CELL)["eval_loss_after"].mean()
    survivors = early[early["status"] == "done"].groupby(CELL)["eval_loss_after"].mean()
    best, chosen = losses.idxmin(), survivors.idxmin()
    return {
        "best": dict(zip(CELL, best, strict=True)) | {"eval_loss": float(losses[best])},
        "chosen": dict(zip(CELL, chosen, strict=True)) | {"eval_loss": float(losses[chosen])},
        "regret_nats": float(losses[chosen] - losses[best]),
        "best_was_dropped": best not in survivors.index,
        "cells": len(losses),
        "cells_kept": len(survivors),
        "spread_nats": float(losses.max() - losses.min()),
    }


def _sweep(spec: SweepSpec, *, estimate_for: SweepSpec | None = None) -> tuple[pd.DataFrame, float, float | None]:
    """(its runs, wall seconds from the request to the last file, what the page would say of another sweep then)."""
    with tempfile.TemporaryDirectory() as home:
        ledger = Ledger(Path(home))
        began = time.perf_counter()
        sweep_id = start_sweep(ledger, spec, InlineExecutor(ledger.home), predict_run)
        seconds = time.perf_counter() - began
        frame = runs_frame(ledger, sweep_id)
        results = {run.id: run.result or {} for run in ledger.list_runs(sweep_id=sweep_id)}
        frame["pack_size"] = [results[run_id].get("pack", {}).get("size", 1) for run_id in frame["run_id"]]
        wrong = frame[~frame["status"].isin(["done", "cancelled"])]
        if len(wrong):
            raise RuntimeError(
                f"{len(wrong)} runs are {wrong['status'].iloc[0]}: {(Path(home) / 'worker.log').read_text()}"
            )
        estimate = estimate_sweep_seconds(estimate_for, frame) if estimate_for else None
        return frame, seconds, estimate


def _facts(frame: pd.DataFrame) -> dict[str, Any]:
    done = frame[frame["status"] == "done"]
    return {"runs_finished": len(done), "pack_sizes": sorted(set(done["pack_size"].tolist()))}


def _difference(full: pd.DataFrame, alone: pd.DataFrame) -> float:
    keys = [*CELL, "seed"]
    both = full.merge(alone, on=keys, suffixes=("", "_alone"))
    return float((both["eval_loss_after"] - both["eval_loss_after_alone"]).abs().max())
