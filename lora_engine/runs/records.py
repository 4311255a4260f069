"""What the ledger hands out: frozen records of runs and sweeps."""

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from lora_engine.runs.processes import is_alive

STATUSES = ("queued", "running", "done", "failed", "cancelled", "interrupted")
CLAIMABLE = ("queued", "interrupted")
RESUMABLE = ("interrupted", "cancelled", "failed")
FINAL = ("done", "failed", "cancelled")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run as it stands. Times are ISO 8601 in UTC, those named `_seconds` epoch seconds.

    `result` is None until the run is done; of one that early exit dropped (`dropped`) it holds `early_exit`, also
    while it is trained to the end after all. `error` is one sentence when it failed. `last_*` are None
    before the first step or evaluation; a diverged loss is NaN. `pid` and `create_time` are the
    worker's: of the one that has the run, or, while queued, of the one that will come to it."""

    id: str
    sweep_id: str | None
    status: str
    config: dict[str, Any]
    prediction: dict[str, Any] | None
    result: dict[str, Any] | None
    error: str | None
    progress: str
    created: str
    started: str | None
    finished: str | None
    created_seconds: float
    started_seconds: float | None
    finished_seconds: float | None
    num_steps: int
    last_step: int | None
    last_train_loss: float | None
    last_eval_loss: float | None
    cancel_requested: bool
    pid: int | None
    create_time: float | None
    identity: str | None

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen unless somebody asks for it."""
        return self.status in FINAL

    @property
    def dropped(self) -> bool:
        """Whether early exit ended the run; it keeps its checkpoint and can be resumed."""
        return was_dropped(self.status, self.result)

    @property
    def waits_for_worker(self) -> bool:
        """Whether the run is queued and a living worker will come to it. Asks the system."""
        return self.status == "queued" and is_alive(self.pid, self.create_time, self.identity)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN and infinities, which JSON does not have, become None."""
        values: dict[str, Any] = finite_only(asdict(self))
        return values


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """One sweep; `run_ids` in grid order, `status` derived from its runs (`derive_sweep_status`)."""

    id: str
    spec: dict[str, Any]
    created: str
    created_seconds: float
    status: str
    run_ids: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values: dict[str, Any] = finite_only(asdict(self) | {"run_ids": list(self.run_ids)})
        return values


def was_dropped(status: str, result: Mapping[str, Any] | None) -> bool:
    """Whether a run of this status and result was ended by early exit, which is an end like any other."""
    return status == "cancelled" and bool((result or {}).get("early_exit"))


def derive_sweep_status(statuses: Sequence[str], waiting: Sequence[bool | None]) -> str:
    """running, queued, interrupted, cancelled, failed or done. Give a run that `was_dropped` as done.

    `waiting[i]` says of a queued run whether the worker it was given to lives (None: given to
    nobody yet). Between two cells nothing is `running` for a moment; the living worker tells that
    from a sweep whose worker died. `failed` only if every run failed: one bad cell is a result."""
    queued = [alive for status, alive in zip(statuses, waiting, strict=True) if status == "queued"]
    begun = any(status != "queued" for status in statuses)
    if "running" in statuses or (begun and True in queued):
        return "running"
    if "interrupted" in statuses or False in queued:
        return "queued" if True in queued else "interrupted"
    if queued:
        return "queued"
    if "cancelled" in statuses:
        return "cancelled"
    if statuses and all(status == "failed" for status in statuses):
        return "failed"
    return "done"


def run_from_row(row: sqlite3.Row) -> RunRecord:
    """A row of the query in `ledger.py`, which adds the last step and evaluation to the run's columns."""
    values = {key: row[key] for key in row.keys()}  # noqa: SIM118 (iterating a Row gives values)
    del values["number"]
    for key in ("config", "prediction", "result"):
        values[key] = None if values[key] is None else json.loads(values[key])
    for key in ("created", "started", "finished"):
        values[f"{key}_seconds"] = values[key]
        values[key] = iso(values[key])
    values["cancel_requested"] = bool(values["cancel_requested"])
    # SQLite keeps NaN as NULL: a step without a loss is one whose loss was not a number.
    if values["last_step"] is not None and values["last_train_loss"] is None:
        values["last_train_loss"] = math.nan
    if values.pop("last_eval_step") is not None and values["last_eval_loss"] is None:
        values["last_eval_loss"] = math.nan
    return RunRecord(**values)


def iso(seconds: float | None) -> str | None:
    """Epoch seconds as `2026-01-31T12:00:00.250Z`."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def finite_only(value: Any) -> Any:
    """`value` with every float that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(item) for item in value]
    return value
