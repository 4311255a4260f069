"""How long will it take? From earlier runs where there are any, else from a stated guess."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lora_engine.calc import estimate_step_flops, load_shape, parse_targets
from lora_engine.config import FullConfig, LoraConfig, MethodConfig, RunConfig
from lora_engine.errors import InputError
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
    there are any, else the same model and device, else the same device, else the stated default.
    Runs that shared their passes with others do not say how long one takes by itself."""
    done, same_model, same_data = _alike(config, _timed_runs(frame, packed=False))
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


def estimate_packed_seconds(spec: SweepSpec, frame: pd.DataFrame | None = None) -> tuple[float, str] | None:
    """(seconds, where from in words) for a sweep whose runs share passes, from earlier ones of this model that did;
    None where there are none.

    Each of them was given an equal share of its pack's seconds, so FLOPs over shares are those of the whole pack;
    the seconds beside the steps are the sweep's, once."""
    _, same_model, same_data = _alike(spec.base, _timed_runs(frame, packed=True))
    for rows, words in ((same_data, "of this model on this data"), (same_model, "of this model")):
        # Whole packs: the latest run and those that were created with it.
        rows = rows[rows["sweep_id"] == rows["sweep_id"].iloc[-1]] if len(rows) else rows
        if len(rows):
            speed = sum(_flops_of_row(row) for row in rows.to_dict("records")) / float(rows["seconds"].sum())
            beside = (rows["wall_seconds"] - rows["pack_seconds"]).clip(lower=0.0).median()
            at_once = Throughput(speed, 0.0, len(rows), f"from {len(rows)} earlier runs {words} that shared passes")
            seconds = estimate_sweep_seconds(spec, throughput=at_once)
            return seconds + (float(beside) if pd.notna(beside) else DEFAULT_OVERHEAD_SECONDS), at_once.basis
    return None


def _alike(config: RunConfig, done: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Runs of the same device; of these the same model; of these the same data."""
    done = done[done["device"].map(lambda device: _same_device(config.train.device, device)).astype(bool)]
    same_model = done[done["model"] == config.model]
    return done, same_model, same_model[same_model["data_path"] == config.data.path]


def _timed_runs(frame: pd.DataFrame | None, *, packed: bool) -> pd.DataFrame:
    columns = ["model", "data_path", "device", "method", "r", "targets", "steps", "batch_size", "max_length"]
    if frame is None or frame.empty:
        return pd.DataFrame({column: [] for column in [*columns, "seconds", "wall_seconds", "sweep_id"]})
    shared = frame["pack_size"] > 1 if "pack_size" in frame.columns else pd.Series(False, index=frame.index)
    return frame[(frame["status"] == "done") & (frame["seconds"] > 0) & (shared if packed else ~shared)]


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
