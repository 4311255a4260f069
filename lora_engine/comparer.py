"""python -m lora_engine.comparer --home HOME RUN_ID [RUN_ID ...]: do the comparison that these runs belong to.

Started detached like a worker, and a worker for every run: the search, then the repeats that its losses call for,
then inference of all methods side by side. Killed at any point, it is gone on with from the runs that are left."""

import argparse
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from lora_engine.comparisons import (
    add_missing,
    finished_runs,
    is_mine_to_do,
    needs_measuring,
    read_cells,
    write_state,
)
from lora_engine.config import run_config_from_dict
from lora_engine.errors import LoraExplorerError, NotFoundError
from lora_engine.runs import Ledger, this_process
from lora_engine.worker import work_on


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the comparison is complete or was cancelled, else 1."""
    parser = argparse.ArgumentParser(prog="lora_engine.comparer")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("run_ids", nargs="+")
    arguments = parser.parse_args(argv)
    ledger = Ledger(arguments.home)
    sweep_id = ledger.get_run(arguments.run_ids[0]).sweep_id
    if sweep_id is None:
        return 1
    try:
        return compare(ledger, sweep_id)
    except NotFoundError:  # deleted meanwhile
        return 0


def compare(ledger: Ledger, sweep_id: str) -> int:
    """Go through what is left of the comparison."""
    sweep, _ = read_cells(ledger, sweep_id)
    if not is_mine_to_do(ledger, sweep):
        return 0
    write_state(ledger, sweep, {"doing": "training", "error": None})
    try:
        return _go_through(ledger, sweep_id)
    finally:
        with suppress(NotFoundError):
            write_state(ledger, sweep, {"doing": None})


def _go_through(ledger: Ledger, sweep_id: str) -> int:
    while True:
        # This process, so that a queued run is never taken for one that nobody will come to.
        ledger.assign_worker(add_missing(ledger, sweep_id), *this_process())
        queued = [run.id for run in read_cells(ledger, sweep_id)[1] if run.status in ("queued", "interrupted")]
        for run_id in queued:
            work_on(ledger, run_id)
        if not queued or any(run.status == "cancelled" for run in read_cells(ledger, sweep_id)[1]):
            break
    return _measure(ledger, sweep_id) if needs_measuring(ledger, sweep_id) else 0


def _measure(ledger: Ledger, sweep_id: str) -> int:
    sweep, _ = read_cells(ledger, sweep_id)
    write_state(ledger, sweep, {"doing": "starting the measurement of inference"})
    from lora_engine.inference import measure_inference

    runs = {
        method: (run_config_from_dict(config), ledger.run_folder(run_id))
        for method, (run_id, config) in finished_runs(ledger, sweep_id).items()
    }
    try:
        inference = measure_inference(runs, note=lambda text: write_state(ledger, sweep, {"doing": text}))
    except LoraExplorerError as error:
        write_state(ledger, sweep, {"error": str(error)})
        return 1
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        write_state(ledger, sweep, {"error": f"{type(error).__name__}: {error}"})
        return 1
    write_state(ledger, sweep, {"inference": inference})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
