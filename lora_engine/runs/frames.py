"""Tidy tables of the ledger, for charts, advice and export.

pandas is imported where it is used: a worker needs the ledger and no tables, and pandas takes half a second."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lora_engine.config import method_from_dict
from lora_engine.errors import ConfigError
from lora_engine.runs.ledger import Ledger
from lora_engine.runs.records import RunRecord

if TYPE_CHECKING:
    import pandas as pd

# Counts that can be unknown are float64, so that unknown is NaN; they are exact up to 2**53.
STEP_COLUMNS = {
    "run_id": "str",
    "step": "int64",
    "train_loss": "float64",
    "lr": "float64",
    "grad_norm": "float64",
    "tokens": "int64",
    "seconds": "float64",
}
EVAL_COLUMNS = {"run_id": "str", "step": "int64", "eval_loss": "float64"}
RUN_COLUMNS = {
    "run_id": "str",
    "sweep_id": "str",
    "status": "str",
    "model": "str",
    "data": "str",  # the file's name
    "data_path": "str",
    "method": "str",
    "r": "float64",
    "lora_alpha": "float64",
    "scaling": "float64",
    "targets": "str",
    "lr": "float64",
    "seed": "int64",
    "steps": "int64",  # planned
    "last_step": "float64",  # done so far
    "batch_size": "int64",  # sequences an optimizer step, accumulation included
    "max_length": "int64",
    "precision": "str",
    "device": "str",  # what the run was done on; before that, what was asked for
    "trainable_parameters": "float64",
    "eval_loss_before": "float64",
    "eval_loss_after": "float64",
    "last_eval_step": "float64",  # the latest evaluation, of a run that is not over too
    "last_eval_loss": "float64",
    "seconds": "float64",  # spent in steps; of a run that shared its passes, an equal share of them
    "wall_seconds": "float64",  # from its first start to its end
    "tokens_per_second": "float64",
    "started_seconds": "float64",  # epoch seconds of its first start
    "finished_seconds": "float64",
    "peak_bytes": "float64",  # measured; of a run that shared its passes, one step of it alone
    "pack_peak_bytes": "float64",  # measured, of all that shared its passes together
    "predicted_peak_bytes": "float64",
    "adapter_bytes": "float64",
    "pack_size": "float64",  # runs that shared its passes, itself included; 1 where it was trained alone in a sweep
    "pack_reason": "str",  # why so many: what was measured, or what forbids packing
    "pack_seconds": "float64",  # spent in steps by the whole pack; `seconds` is the run's share
    "alone_step_seconds": "float64",  # what a step would have taken by itself: its share, times the gain probed before
    "early_exit_step": "float64",  # where early exit dropped it, also if it was trained to the end afterwards
    "early_exit_loss": "float64",  # its evaluation loss there
    "created": "datetime64[us, UTC]",
}

ACCURACY_COLUMNS = {
    "run_id": "str",
    "model": "str",
    "method": "str",
    "r": "float64",
    "precision": "str",
    "batch_size": "int64",  # sequences a micro-batch
    "max_length": "int64",
    "device": "str",
    "kind": "str",  # "allocated" (CUDA) | "tracked" (tensor bytes on the CPU)
    "predicted_bytes": "int64",
    "measured_bytes": "int64",
    "reserved_bytes": "float64",  # what CUDA's allocator held
    "error_percent": "float64",  # measured minus predicted, in percent of the predicted
    "created": "datetime64[us, UTC]",
}


def steps_frame(ledger: Ledger, run_ids: Sequence[str]) -> pd.DataFrame:
    """One row a step of these runs (STEP_COLUMNS), ordered by run and step; tokens and seconds run on from step 1."""
    return _frame(ledger.read_steps(run_ids), STEP_COLUMNS)


def evals_frame(ledger: Ledger, run_ids: Sequence[str]) -> pd.DataFrame:
    """One row an evaluation of these runs (EVAL_COLUMNS); step 0 is before training."""
    return _frame([row[:3] for row in ledger.read_evals(run_ids)], EVAL_COLUMNS)


def runs_frame(ledger: Ledger, sweep_id: str | None = None) -> pd.DataFrame:
    """One row a run (RUN_COLUMNS), oldest first, so that a sweep's rows are in grid order; unknown is NaN."""
    return records_frame(ledger.list_runs(sweep_id=sweep_id))


def records_frame(records: Sequence[RunRecord]) -> pd.DataFrame:
    """`runs_frame` of records that were read already, newest first as `Ledger.list_runs` gives them."""
    return _frame([_run_row(record) for record in reversed(records)], RUN_COLUMNS)


def accuracy_frame(ledger: Ledger) -> pd.DataFrame:
    """One row a finished run whose peak was predicted before it started and measured while it ran
    (ACCURACY_COLUMNS), oldest first."""
    return _frame(_accuracy_rows(ledger), ACCURACY_COLUMNS)


def prediction_errors(ledger: Ledger) -> dict[str, list[float]]:
    """`error_percent` of `accuracy_frame` by kind, without a DataFrame: a first page has no time to build one."""
    kind, error = map(list(ACCURACY_COLUMNS).index, ("kind", "error_percent"))
    errors: dict[str, list[float]] = {}
    for row in _accuracy_rows(ledger):
        errors.setdefault(row[kind], []).append(row[error])
    return errors


def _accuracy_rows(ledger: Ledger) -> list[tuple[Any, ...]]:
    records = reversed(ledger.list_runs(status="done"))
    return [row for record in records if (row := _accuracy_row(record)) is not None]


def _frame(rows: Sequence[Sequence[Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    import pandas as pd

    by_column = list(zip(*rows, strict=True)) or [()] * len(columns)
    series = {}
    for (name, dtype), values in zip(columns.items(), by_column, strict=True):
        if dtype.startswith("datetime"):
            moments = pd.to_datetime(pd.Series(values, dtype="float64"), unit="s", utc=True)
            series[name] = moments.dt.as_unit("us")
        else:
            series[name] = pd.Series(values, dtype=dtype)
    return pd.DataFrame(series)


def _run_row(record: RunRecord) -> tuple[Any, ...]:
    config = record.config
    method: Mapping[str, Any] = config.get("method") or {}
    train: Mapping[str, Any] = config.get("train") or {}
    data: Mapping[str, Any] = config.get("data") or {}
    result: Mapping[str, Any] = record.result or {}
    prediction: Mapping[str, Any] = record.prediction or {}
    pack: Mapping[str, Any] = result.get("pack") or {}
    early_exit: Mapping[str, Any] = result.get("early_exit") or {}
    path = str(data.get("path") or "")
    targets = method.get("target_modules")
    wall = None
    if record.status == "done" and record.started_seconds is not None and record.finished_seconds is not None:
        wall = record.finished_seconds - record.started_seconds
    values: dict[str, Any] = {
        "run_id": record.id,
        "sweep_id": record.sweep_id,
        "status": record.status,
        "model": config.get("model"),
        # Paths of either system: a ledger may be looked at on another one.
        "data": PurePath(path.replace("\\", "/")).name or None,
        "data_path": path or None,
        "method": method.get("method"),
        "r": method.get("r"),
        "lora_alpha": method.get("lora_alpha"),
        "scaling": _scaling(method),
        "targets": ",".join(targets) if isinstance(targets, list | tuple) else targets,
        "lr": train.get("lr"),
        "seed": train.get("seed", 0),
        "steps": record.num_steps,
        "last_step": record.last_step,
        "batch_size": train.get("batch_size", 1) * train.get("accumulation", 1),
        "max_length": train.get("max_length", 0),
        "precision": train.get("precision"),
        "device": result.get("device") or train.get("device"),
        "trainable_parameters": _first(result.get("trainable_parameters"), prediction.get("trainable_parameters")),
        "eval_loss_before": result.get("eval_loss_before"),
        "eval_loss_after": result.get("eval_loss_after"),
        "last_eval_step": record.last_eval_step,
        "last_eval_loss": record.last_eval_loss,
        "seconds": result.get("seconds"),
        "wall_seconds": wall,
        "started_seconds": record.started_seconds,
        "finished_seconds": record.finished_seconds,
        "tokens_per_second": result.get("tokens_per_second"),
        "peak_bytes": result.get("peak_bytes"),
        "pack_peak_bytes": pack.get("peak_bytes"),
        "predicted_peak_bytes": _first(result.get("predicted_peak_bytes"), prediction.get("peak_bytes")),
        "adapter_bytes": result.get("adapter_bytes"),
        "pack_size": pack.get("size"),
        "pack_reason": pack.get("reason"),
        "pack_seconds": pack.get("seconds"),
        "alone_step_seconds": pack.get("alone_step_seconds"),
        "early_exit_step": early_exit.get("step"),
        "early_exit_loss": early_exit.get("eval_loss"),
        "created": record.created_seconds,
    }
    return _row(values, RUN_COLUMNS)


def _accuracy_row(record: RunRecord) -> tuple[Any, ...] | None:
    config = record.config
    method: Mapping[str, Any] = config.get("method") or {}
    train: Mapping[str, Any] = config.get("train") or {}
    result: Mapping[str, Any] = record.result or {}
    predicted, measured = (record.prediction or {}).get("peak_bytes"), result.get("peak_bytes")
    if not predicted or not measured:
        return None
    values: dict[str, Any] = {
        "run_id": record.id,
        "model": config.get("model"),
        "method": method.get("method"),
        "r": method.get("r"),
        "precision": train.get("precision"),
        "batch_size": train.get("batch_size", 1),
        "max_length": train.get("max_length", 0),
        "device": result.get("device"),
        "kind": result.get("peak_kind") or "tracked",
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "reserved_bytes": result.get("reserved_bytes"),
        "error_percent": 100.0 * (measured - predicted) / predicted,
        "created": record.created_seconds,
    }
    return _row(values, ACCURACY_COLUMNS)


def _row(values: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Any, ...]:
    """In the order of `columns`. A missing number is NaN from here on; a missing text stays None, which pandas reads
    as missing."""
    return tuple(
        math.nan if values[name] is None and dtype == "float64" else values[name] for name, dtype in columns.items()
    )


def _scaling(method: Mapping[str, Any]) -> float | None:
    try:
        return getattr(method_from_dict(method), "scaling", None) if method else None
    except (ConfigError, TypeError):  # a method of a newer version
        return None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
