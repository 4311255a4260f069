"""Grids of runs: making, starting and resuming them, and what they teach. Torch-free."""

from lora_engine.sweeps.advice import Advice, advise, best_over, summarize_cells
from lora_engine.sweeps.halving import EarlyExitBill, early_exit_bill, judge, rung_steps, trained_share
from lora_engine.sweeps.launch import cancel_sweep, resume_sweep, start_sweep
from lora_engine.sweeps.packing import BAND, PACKED, RunGroup, group_runs, pack_refusal
from lora_engine.sweeps.spec import SweepSpec, evaluated_at_quarters, expand_grid
from lora_engine.sweeps.timing import (
    PackedEstimate,
    Throughput,
    estimate_alone_seconds,
    estimate_packed_sweep_seconds,
    estimate_run_seconds,
    estimate_sweep_seconds,
    find_throughput,
)

__all__ = [
    "BAND",
    "PACKED",
    "Advice",
    "EarlyExitBill",
    "PackedEstimate",
    "RunGroup",
    "SweepSpec",
    "Throughput",
    "advise",
    "best_over",
    "cancel_sweep",
    "early_exit_bill",
    "estimate_alone_seconds",
    "estimate_packed_sweep_seconds",
    "estimate_run_seconds",
    "estimate_sweep_seconds",
    "evaluated_at_quarters",
    "expand_grid",
    "find_throughput",
    "group_runs",
    "judge",
    "pack_refusal",
    "resume_sweep",
    "rung_steps",
    "start_sweep",
    "summarize_cells",
    "trained_share",
]
