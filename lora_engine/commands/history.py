"""runs: what was tried, and what is to become of it."""

import argparse
from collections.abc import Sequence
from typing import Any

from lora_engine.commands.requests import Output
from lora_engine.comparisons import comparer, is_comparison, resume_comparison
from lora_engine.errors import InputError, NotFoundError
from lora_engine.executors import LocalExecutor
from lora_engine.runs import Ledger, RunRecord, SweepRecord, default_home
from lora_engine.sweeps import cancel_sweep, resume_sweep
from lora_engine.text import table_text


def runs(arguments: argparse.Namespace) -> Output:
    """list, or show, cancel, resume or delete one run or one sweep."""
    ledger = Ledger(default_home())
    if arguments.action == "list":
        records = ledger.list_runs()
        return {"runs": [run_payload(r) for r in records]}, runs_table(records) if records else "No runs yet."
    if not arguments.run:
        raise InputError(f"run is missing; allowed: lora-explorer runs {arguments.action} ID.")
    act = {"show": lambda *_: None, "cancel": _cancel, "resume": _resume, "delete": _delete}[arguments.action]
    record = _find(ledger, arguments.run)
    act(ledger, record)
    if arguments.action == "delete":
        kind = "run_id" if isinstance(record, RunRecord) else "sweep_id"
        return {kind: record.id, "status": "deleted"}, f"Deleted {record.id}."
    record = _find(ledger, record.id)
    if isinstance(record, SweepRecord):
        cells = [ledger.get_run(run_id) for run_id in record.run_ids]
        payload = {"sweep_id": record.id, "status": record.status, "runs": [run_payload(cell) for cell in cells]}
        return payload, f"Sweep {record.id}: {record.status}\n\n{runs_table(cells)}"
    payload = run_payload(record) | {"config": record.config, "prediction": record.prediction, "error": record.error}
    shown = {key: value for key, value in payload.items() if key not in ("config", "prediction")}
    return payload, table_text(["", ""], [[key, value] for key, value in shown.items()])


def runs_table(records: Sequence[RunRecord]) -> str:
    """One line a run."""
    rows = [
        [r.id, r.status, r.config["model"], r.config["method"]["method"], r.config["method"].get("r", ""),
         f"{r.last_step or 0}/{r.num_steps}", loss_text(r.result or {})]
        for r in records
    ]  # fmt: skip
    return table_text(["run", "status", "model", "method", "r", "steps", "evaluation loss"], rows)


def run_payload(record: RunRecord) -> dict[str, Any]:
    result = record.result or {}
    keys = (
        "trainable_parameters", "total_parameters", "eval_loss_before", "eval_loss_after", "eval_accuracy",
        "eval_macro_f1", "seconds",
        "tokens_per_second", "peak_bytes", "peak_kind", "adapter_bytes", "device",
    )  # fmt: skip
    return {
        "run_id": record.id,
        "sweep_id": record.sweep_id,
        "status": record.status,
        "method": record.config["method"]["method"],
        "steps": record.last_step or 0,
        "predicted_peak_bytes": (record.prediction or {}).get("peak_bytes"),
        **{key: result.get(key) for key in keys},
    }


def loss_text(values: dict[str, Any]) -> str:
    loss = values.get("eval_loss_after")
    return "" if loss is None else f"{loss:.4f}"


def _find(ledger: Ledger, run_id: str) -> RunRecord | SweepRecord:
    """The run or the sweep of that id. Raises NotFoundError."""
    try:
        return ledger.get_run(run_id)
    except NotFoundError:
        if run_id in {sweep.id for sweep in ledger.list_sweeps()}:
            return ledger.get_sweep(run_id)
        raise


def _cancel(ledger: Ledger, record: RunRecord | SweepRecord) -> None:
    if isinstance(record, SweepRecord):
        cancel_sweep(ledger, record.id)
    else:
        ledger.request_cancel(record.id)


def _resume(ledger: Ledger, record: RunRecord | SweepRecord) -> None:
    executor = LocalExecutor(ledger.home)
    if isinstance(record, SweepRecord) and is_comparison(record):
        resume_comparison(ledger, record.id, comparer(ledger))
    elif isinstance(record, SweepRecord):
        # What early exit dropped is gone on with once nothing else is left: the full grid, on request.
        left = resume_sweep(ledger, record.id, executor, failed=True, cancelled=True, dropped=False)
        if not left and record.status not in ("running", "queued"):
            resume_sweep(ledger, record.id, executor, dropped=True)
    else:
        ledger.requeue(record.id)
        executor.submit([record.id])


def _delete(ledger: Ledger, record: RunRecord | SweepRecord) -> None:
    if isinstance(record, SweepRecord):
        ledger.delete_sweep(record.id)
    else:
        ledger.delete_run(record.id)
