"""How long will it take? From earlier runs where there are any, else from a stated guess."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lora_engine.calc import estimate_step_flops, load_shape, parse_targets
from lora_engine.config import FullConfig, LoraConfig, MethodConfig, RunConfig
from lora_engine.errors import InputError
from lora_engine.sweeps.halving import trained_share
from lora_engine.sweeps.packing import pack_refusal
from lora_engine.sweeps.spec import SweepSpec, expand_grid

# Guesses of the right order for a small model, used until a first run is done. Pretraining one of
# 3 M parameters (6 FLOPs a parameter and token) at 4,000 tokens a second is 7e10 on two CPU cores.
DEFAULT_FLOPS_PER_SECOND = {"cpu": 5e10, "mps": 5e11, "cuda": 2e12}
# Likewise: loading, evaluations and the two samples, which a run does beside its steps.
DEFAULT_OVERHEAD_SECONDS = 8.0
# Where the shape of a model is not known: what a token of a step costs, as of 10 M parameters.
_DEFAULT_FLOPS_PER_TOKEN = 4e7
_MAX_RUNS = 10


@dataclass(frozen=True)
class Throughput:
    """FLOPs a second in steps, seconds beside the steps of a run, how many runs say so, and where from in words."""

    flops_per_second: float
    overhead_seconds: float
    num_runs: int
    basis: str


def find_throughput(config: RunConfig, frame: pd.DataFrame | None = None) -> Throughput:
    """Median over the latest done runs of `frame` (`runs_frame`): the same model, data and device if
    there are any, else the same model and device, else the same device, else the stated default."""
    done = _timed_runs(frame)
    done = done[done["device"].map(lambda device: _same_device(config.train.device, device)).astype(bool)]
    same_model = done[done["model"] == config.model]
    same_data = same_model[same_model["data_path"] == config.data.path]
    choices = (
        (same_data, "of this model on this data"),
        (same_model, "of this model"),
        (done, "of other models"),
    )
    for rows, words in choices:
        rows = rows.tail(_MAX_RUNS)
        if len(rows):
            speeds = [_flops_of_row(row) / row["seconds"] for row in rows.to_dict("records")]
            beside = (rows["wall_seconds"] - rows["seconds"]).clip(lower=0.0).fillna(DEFAULT_OVERHEAD_SECONDS)
            plural = "run" if len(rows) == 1 else "runs"
            return Throughput(
                float(pd.Series(speeds).median()),
                float(beside.median()),
                len(rows),
                f"from {len(rows)} earlier {plural} {words}",
            )
    guess = DEFAULT_FLOPS_PER_SECOND.get(config.train.device, DEFAULT_FLOPS_PER_SECOND["cpu"])
    words = f"a guess at {guess / 1e9:g} GFLOP/s until a first run is done"
    return Throughput(guess, DEFAULT_OVERHEAD_SECONDS, 0, words)


def estimate_run_seconds(
    config: RunConfig, frame: pd.DataFrame | None = None, *, throughput: Throughput | None = None
) -> float:
    """Seconds from start to end of one run, scaled from `throughput` (default: `find_throughput`) by FLOPs."""
    throughput = throughput or find_throughput(config, frame)
    train = config.train
    step_flops = _step_flops(config.model, config.method, train.batch_size * train.accumulation, train.max_length)
    return throughput.overhead_seconds + train.steps * step_flops / throughput.flops_per_second


def estimate_sweep_seconds(
    spec: SweepSpec, frame: pd.DataFrame | None = None, *, throughput: Throughput | None = None
) -> float:
    """Seconds for a sweep whose runs go one after another."""
    throughput = throughput or find_throughput(spec.base, frame)
    # Alpha, learning rate and seed cost nothing: one estimate a rank is enough.
    configs = expand_grid(spec)[: len(spec.rs)]
    repeats = spec.num_runs // len(spec.rs)
    return repeats * sum(estimate_run_seconds(config, throughput=throughput) for config in configs)


def estimate_alone_seconds(spec: SweepSpec, frame: pd.DataFrame) -> float | None:
    """Seconds for the grid of a packed sweep had its runs gone one after another, from its own runs (`frame`): each
    one's steps at what a step would have taken alone, and an equal share of what the sweep did beside its steps. None:
    nobody measured what sharing gains."""
    if not frame["alone_step_seconds"].notna().any():
        return None
    timed = _timed_runs(frame)
    return spec.num_runs * float(timed["wall_seconds"].mean()) if len(timed) else None


@dataclass(frozen=True)
class PackedEstimate:
    """Seconds of a packed sweep, and in words how it is known."""

    seconds: float
    basis: str


def estimate_packed_sweep_seconds(spec: SweepSpec, frame: pd.DataFrame | None = None) -> PackedEstimate | None:
    """Seconds for a sweep as `spec` says: packed, and with early exit if it has that. None: nobody knows, since no
    packed run of this model was done on such a device, or the sweep cannot be packed.

    From each earlier run's share of its packs' steps, by FLOPs, and what sweeps took beside their steps."""
    train = spec.base.train
    if spec.packed == "never" or pack_refusal(spec.base) is not None:
        return None
    rows = _packed_runs(frame)
    rows = rows[rows["device"].map(lambda device: _same_device(train.device, device)).astype(bool)]
    rows = rows[rows["model"] == spec.base.model]
    same_data = rows[rows["data_path"] == spec.base.data.path]
    rows, words = (same_data, "of this model on this data") if len(same_data) else (rows, "of this model")
    if rows.empty:
        return None
    latest = rows[rows["sweep_id"] == rows["sweep_id"].iloc[-1]]
    flops = sum(_flops_of_row(row) for row in latest.to_dict("records"))
    beside = _seconds_beside(latest)
    configs = expand_grid(spec)[: len(spec.rs)]
    sequences = train.batch_size * train.accumulation
    step_flops = sum(_step_flops(c.model, c.method, sequences, train.max_length) for c in configs)
    repeats = spec.num_runs // len(spec.rs)
    steps = repeats * train.steps * step_flops * float(latest["seconds"].sum()) / flops
    if spec.early_exit:
        steps *= trained_share(train, spec.num_runs // len(spec.seeds))
    plural = "run" if len(latest) == 1 else "runs"
    basis = f"from {len(latest)} {plural} {words} in the latest packed sweep"
    return PackedEstimate(beside * spec.num_runs + steps, basis)


def _packed_runs(frame: pd.DataFrame | None) -> pd.DataFrame:
    done = _done_runs(frame)
    return done[_pack_size(done) > 1]


def _pack_size(frame: pd.DataFrame) -> "pd.Series[Any]":
    sizes = frame.get("pack_size")
    return pd.Series(1.0, index=frame.index) if sizes is None else sizes.fillna(1.0)


def _timed_runs(frame: pd.DataFrame | None) -> pd.DataFrame:
    """Done runs with the seconds that they take alone: of packed ones at the speed-up probed, else they tell nothing.

    A worker claims many runs of a sweep at once, so each one's wall time holds its waiting for others: what a run did
    beside its steps is an equal share of what the sweep did."""
    done = _done_runs(frame)
    in_sweep = done["pack_size"].notna() if "pack_size" in done.columns else pd.Series(False, index=done.index)
    if not in_sweep.any():
        return done
    alone = (done["alone_step_seconds"] * done["steps"]).where(done["pack_size"] > 1, done["seconds"])
    beside = {sweep_id: _seconds_beside(rows) for sweep_id, rows in done[in_sweep].groupby("sweep_id")}
    wall = alone + done["sweep_id"].map(beside)
    done = done.assign(
        seconds=done["seconds"].where(~in_sweep, alone), wall_seconds=done["wall_seconds"].where(~in_sweep, wall)
    )
    return done[done["seconds"].notna()]


def _seconds_beside(rows: pd.DataFrame) -> float:
    """What the runs of one sweep took beside their steps, an equal share each. Their groups begin one after another,
    and a sweep may have been interrupted: only time in which one of them was on its way counts."""
    on_the_way, until = 0.0, -math.inf
    for began, ended in sorted(zip(rows["started_seconds"], rows["finished_seconds"], strict=True)):
        on_the_way += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return max(0.0, on_the_way - float(rows["seconds"].sum())) / len(rows)


def _done_runs(frame: pd.DataFrame | None) -> pd.DataFrame:
    columns = ["model", "data_path", "device", "method", "r", "targets", "steps", "batch_size", "max_length"]
    if frame is None or frame.empty:
        return pd.DataFrame({column: [] for column in [*columns, "seconds", "wall_seconds"]})
    return frame[(frame["status"] == "done") & (frame["seconds"] > 0)]


def _same_device(asked: str, used: object) -> bool:
    """`used` is "cpu", "mps" or the name of a CUDA card; "auto" takes whatever was used before."""
    used = str(used)
    return asked == "auto" or asked == used or (asked == "cuda" and used not in ("cpu", "mps", "auto"))


def _flops_of_row(row: dict[Hashable, Any]) -> float:
    method: MethodConfig = FullConfig()
    if row["method"] == "lora":
        method = LoraConfig(r=int(row["r"]), target_modules=parse_targets(str(row["targets"])))
    step_flops = _step_flops(str(row["model"]), method, int(row["batch_size"]), int(row["max_length"]))
    return step_flops * int(row["steps"])


def _step_flops(model: str, method: MethodConfig, batch_size: int, seq_length: int) -> float:
    # Full sequences: real ones are shorter, by the same share before and after on like data.
    try:
        return float(estimate_step_flops(load_shape(model), method, batch_size, seq_length))
    except InputError:
        return _DEFAULT_FLOPS_PER_TOKEN * batch_size * seq_length
