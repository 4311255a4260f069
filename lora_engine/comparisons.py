"""Comparisons in the ledger: starting, resuming, looking. Torch-free; the work is `lora_engine.comparer`'s.

A comparison is a sweep whose spec says so, and its cells are runs like any other. What belongs to the whole of it,
inference measured side by side, lies in a file of its first run's folder and goes with it."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_engine.config import to_dict
from lora_engine.errors import InputError
from lora_engine.executors import LocalExecutor
from lora_engine.executors.base import Executor
from lora_engine.runs import Ledger, RunRecord, SweepRecord, is_alive, this_process
from lora_engine.sweeps.comparison import KIND, ComparisonSpec, choose_rates, missing_cells, search_cells
from lora_engine.sweeps.spec import Predict
from lora_engine.sweeps.verdict import conclude, summarize_methods

COMPARER = (sys.executable, "-P", "-m", "lora_engine.comparer")
STATE_FILE = "comparison.json"
START_SECONDS = 30.0  # in which a comparer that was started says that it is there


def comparer(ledger: Ledger) -> Executor:
    """The executor whose process goes through both stages and then measures inference."""
    return LocalExecutor(ledger.home, COMPARER)


def start_comparison(ledger: Ledger, spec: ComparisonSpec, executor: Executor, predict: Predict | None = None) -> str:
    """Write the search's runs down and hand them over; the sweep's id. The comparer adds the repeats.

    When a comparison of the same spec exists, it is gone on with instead: no cell is trained twice."""
    found = find_comparison(ledger, spec)
    if found is not None:
        resume_comparison(ledger, found, executor)
        return found
    cells = search_cells(spec)
    # Rate and seed cost nothing: one prediction a method is enough.
    predictions = (
        {entry.name: predict(cell) for entry, cell in zip(spec.entries, cells, strict=False)} if predict else {}
    )
    runs = [(to_dict(cell), predictions.get(cell.method.method)) for cell in cells]
    sweep_id, run_ids = ledger.create_sweep(spec.to_dict(), runs)
    executor.submit(run_ids)
    return sweep_id


def find_comparison(ledger: Ledger, spec: ComparisonSpec) -> str | None:
    """The newest comparison of exactly this spec."""
    wanted = spec.to_dict()
    return next((sweep.id for sweep in ledger.list_sweeps() if sweep.spec == wanted), None)


def is_comparison(sweep: SweepRecord) -> bool:
    """Whether a sweep of the ledger is a comparison of methods."""
    return sweep.spec.get("kind") == KIND


def resume_comparison(ledger: Ledger, sweep_id: str, executor: Executor) -> bool:
    """Go on with what is left; False when nothing is, or somebody is at it. Finished cells stay as they are."""
    sweep, runs = read_cells(ledger, sweep_id)
    left = [run.id for run in runs if run.status != "done"]
    if is_active(ledger, sweep_id) or (is_complete(ledger, sweep, runs) and not left):
        return False
    for run in runs:
        if run.status in ("interrupted", "cancelled", "failed"):
            ledger.requeue(run.id)
    if not left:
        # What is left does not exist yet; the first run, though done, tells the comparer which comparison.
        # Until it says that it is there, nothing else would show that it is on its way.
        _write(_state_path(ledger, sweep), read_state(ledger, sweep) | {"expected": time.time() + START_SECONDS})
    executor.submit(left or [runs[0].id])
    return True


def read_cells(ledger: Ledger, sweep_id: str) -> tuple[SweepRecord, list[RunRecord]]:
    """The comparison and its runs, in the order they were made. Raises NotFoundError, InputError."""
    sweep = ledger.get_sweep(sweep_id)
    if not is_comparison(sweep):
        raise InputError(f"comparison is {sweep_id!r}, a sweep over ranks; allowed: the id of a comparison.")
    return sweep, ledger.list_runs(sweep_id=sweep_id)[::-1]


def is_active(ledger: Ledger, sweep_id: str) -> bool:
    """Whether a living process works on it: on a run, between two stages, or measuring."""
    sweep, runs = read_cells(ledger, sweep_id)
    if any(run.status == "running" or run.waits_for_worker for run in runs):
        return True
    return _worker_lives(read_state(ledger, sweep))


def is_complete(ledger: Ledger, sweep: SweepRecord, runs: list[RunRecord]) -> bool:
    """Whether both stages are over and inference was measured; runs that failed count as over."""
    spec = ComparisonSpec.from_dict(sweep.spec)
    over = _all_over(spec, runs)
    return over and set(choose_rates(spec, runs)) <= set(_measured(ledger, sweep))


def needs_measuring(ledger: Ledger, sweep_id: str) -> bool:
    """Whether every run is over, nothing is missing, and inference of some method was not measured."""
    sweep, runs = read_cells(ledger, sweep_id)
    spec = ComparisonSpec.from_dict(sweep.spec)
    return _all_over(spec, runs) and not is_complete(ledger, sweep, runs)


def _all_over(spec: ComparisonSpec, runs: list[RunRecord]) -> bool:
    return all(run.status in ("done", "failed") for run in runs) and not missing_cells(spec, runs)


def _measured(ledger: Ledger, sweep: SweepRecord) -> Mapping[str, Any]:
    methods: Mapping[str, Any] = (read_state(ledger, sweep).get("inference") or {}).get("methods") or {}
    return methods


def add_missing(ledger: Ledger, sweep_id: str) -> list[str]:
    """Write down the runs of the next stage, if its turn has come; their ids."""
    sweep, runs = read_cells(ledger, sweep_id)
    predictions = {run.config["method"]["method"]: run.prediction for run in runs}
    return [
        ledger.create_run(
            to_dict(cell),
            sweep_id=sweep_id,
            prediction=predictions.get(cell.method.method),
            num_steps=cell.train.steps,
        )
        for cell in missing_cells(ComparisonSpec.from_dict(sweep.spec), runs)
    ]


def read_comparison(ledger: Ledger, sweep_id: str) -> dict[str, Any]:
    """All of it: `comparison_id, status, doing, methods (summarize_methods), conclusion, inference, match, ...`."""
    sweep, runs = read_cells(ledger, sweep_id)
    spec = ComparisonSpec.from_dict(sweep.spec)
    state = read_state(ledger, sweep)
    inference = state.get("inference")
    rows = summarize_methods(spec, runs, inference)
    if is_active(ledger, sweep_id):
        status = "running"
    elif sweep.status in ("failed", "cancelled") or is_complete(ledger, sweep, runs):
        status = sweep.status
    else:
        status = "interrupted"
    return {
        "comparison_id": sweep_id,
        "status": status,
        "doing": state.get("doing") if _worker_lives(state) else None,
        "error": state.get("error"),
        "match": spec.match,
        "notes": list(spec.notes),
        "seeds": list(spec.seeds),
        "search": f"Each method's learning rate is the best of {len(spec.entries[0].lrs)} by evaluation loss, with "
        f"seed {spec.seeds[0]}, on the same rows that its loss is given for",
        "methods": rows,
        "conclusion": conclude(rows),
        "base_seconds_per_token": (inference or {}).get("base_seconds_per_token"),
        "inference": {key: value for key, value in (inference or {}).items() if key != "methods"} or None,
    }


def finished_runs(ledger: Ledger, sweep_id: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """method -> (id, config) of its first finished run at the chosen rate: the ones to measure."""
    sweep, runs = read_cells(ledger, sweep_id)
    rows = summarize_methods(ComparisonSpec.from_dict(sweep.spec), runs)
    configs = {run.id: run.config for run in runs}
    return {row["method"]: (row["run_ids"][0], configs[row["run_ids"][0]]) for row in rows if row["run_ids"]}


def read_state(ledger: Ledger, sweep: SweepRecord) -> dict[str, Any]:
    """What the comparer wrote: `doing, pid, create_time, inference, error`; empty before it began."""
    try:
        state = json.loads(_state_path(ledger, sweep).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(ledger: Ledger, sweep: SweepRecord, changes: Mapping[str, Any]) -> None:
    """Add `changes` and who makes them, in one move: a reader sees the old state or the new one.

    Raises NotFoundError when the comparison was deleted."""
    ledger.get_run(sweep.run_ids[0])  # a deleted comparison gets no file again
    pid, create_time = this_process()
    me = {"pid": pid, "create_time": create_time, "expected": None}
    _write(_state_path(ledger, sweep), read_state(ledger, sweep) | me | dict(changes))


def _write(path: Path, state: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{STATE_FILE}.{os.getpid()}")
    partial.write_text(json.dumps(state), encoding="utf-8")
    partial.replace(path)


def is_mine_to_do(ledger: Ledger, sweep: SweepRecord) -> bool:
    """False while another living process has the comparison."""
    state = read_state(ledger, sweep)
    lives = bool(state.get("doing")) and is_alive(state.get("pid"), state.get("create_time"))
    return not lives or state.get("pid") == os.getpid()


def _worker_lives(state: Mapping[str, Any]) -> bool:
    if (state.get("expected") or 0) > time.time():
        return True
    return bool(state.get("doing")) and is_alive(state.get("pid"), state.get("create_time"))


def _state_path(ledger: Ledger, sweep: SweepRecord) -> Path:
    return ledger.run_folder(sweep.run_ids[0]) / STATE_FILE
