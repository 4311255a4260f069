"""python -m lora_engine.worker --home HOME RUN_ID [RUN_ID ...]: do these runs.

Started detached by an executor; everything it has to say goes into the ledger. A run that another
worker holds is skipped, a failing run is written down and the next one begins. Runs of a sweep are packed where that
is possible (`lora_engine.sweep_worker`), all others go one after another; torch and the base model are loaded once."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_engine.config import run_config_from_dict
from lora_engine.errors import LoraExplorerError, NotFoundError
from lora_engine.runs import Ledger, RunRecord, this_process

if TYPE_CHECKING:
    from lora_engine.session import Session
    from lora_engine.training.loop import Callbacks


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when every run was done, skipped or cancelled, else 1."""
    parser = argparse.ArgumentParser(prog="lora_engine.worker")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("run_ids", nargs="+")
    arguments = parser.parse_args(argv)
    ledger = Ledger(arguments.home)
    outcomes = work_through(ledger, arguments.run_ids)
    return 1 if "failed" in outcomes else 0


def work_through(ledger: Ledger, run_ids: Sequence[str]) -> list[str]:
    """What became of each run, in no particular order."""
    held = Held()
    outcomes: list[str] = []
    for together in _divide(ledger, run_ids):
        if isinstance(together, str):
            outcomes.append(work_on(ledger, together, held))
        else:
            from lora_engine.sweep_worker import work_on_sweep

            outcomes += work_on_sweep(ledger, together, held)
    return outcomes


def _divide(ledger: Ledger, run_ids: Sequence[str]) -> list[str | list[str]]:
    """Single runs, and lists of those that belong to one grid."""
    divided: list[str | list[str]] = []
    by_sweep: dict[str, list[str]] = {}
    for run_id in run_ids:
        try:
            sweep_id = ledger.get_run(run_id).sweep_id
        except NotFoundError:  # deleted meanwhile
            continue
        # Only a grid's spec has ranks; a comparison trains one method after another.
        if sweep_id is None or "rs" not in ledger.get_sweep(sweep_id).spec:
            divided.append(run_id)
        elif sweep_id in by_sweep:
            by_sweep[sweep_id].append(run_id)
        else:
            by_sweep[sweep_id] = [run_id]
            divided.append(by_sweep[sweep_id])
    return divided


class Held:
    """A worker's session, made when torch is there."""

    def __init__(self) -> None:
        self._session: Session | None = None

    def session(self) -> "Session":
        if self._session is None:
            from lora_engine.session import Session

            self._session = Session()
        return self._session


def work_on(ledger: Ledger, run_id: str, held: Held | None = None) -> str:
    """Claim and do one run; what became of it: done, cancelled, failed or skipped."""
    if not ledger.claim_run(run_id, *this_process()):
        return "skipped"
    held = held or Held()
    # Closing the last connection writes the log back to disk: once a run, not once a step.
    with ledger.kept_open():
        return guarded(ledger, [run_id], lambda: train_one(ledger, run_id, held.session()))


def guarded(ledger: Ledger, run_ids: Sequence[str], work: Callable[[], str]) -> str:
    """`work()`; when it fails, every one of these runs says why and the answer is "failed"."""
    try:
        return work()
    except LoraExplorerError as error:
        why = str(error)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        why = _in_words(error)
    for run_id in run_ids:
        fail(ledger, run_id, why)
    return "failed"


def fail(ledger: Ledger, run_id: str, why: str) -> None:
    """Close a run as failed."""
    ledger.finish_run(run_id, "failed", result=early_exit_of(ledger.get_run(run_id)) or None, error=why)


def early_exit_of(record: RunRecord) -> dict[str, Any]:
    """`early_exit` where the run was dropped once: it stays in the result, whatever becomes of the run."""
    kept = (record.result or {}).get("early_exit")
    return {"early_exit": kept} if kept else {}


def train_one(
    ledger: Ledger,
    run_id: str,
    session: "Session",
    *,
    until: int | None = None,
    more: dict[str, Any] | None = None,
) -> str:
    """Do one run that was claimed: done, cancelled, or, once it reached step `until`, "waiting" with a checkpoint.

    `more` is added to the result."""
    # After the claim, so that the page shows at once that somebody is at work: these take seconds.
    ledger.note_progress(run_id, "starting torch")
    from lora_engine.jobs import CHECKPOINT, execute_run

    record = ledger.get_run(run_id)
    folder = ledger.run_folder(run_id)
    start = checkpoint_step(folder / CHECKPOINT)
    ledger.forget_after(run_id, start)
    state, result = execute_run(
        run_config_from_dict(record.config),
        folder,
        callbacks=_callbacks(ledger, run_id, start, until),
        note=lambda text: ledger.note_progress(run_id, text),
        session=session,
    )
    if not state.stopped:
        finish(ledger, record, result | (more or {}))
        return "done"
    if until is not None and state.step >= until and not ledger.cancel_requested(run_id):
        return "waiting"
    return stop(ledger, record)


def stop(ledger: Ledger, record: RunRecord) -> str:
    """Close a run as cancelled; its checkpoint stays."""
    ledger.finish_run(record.id, "cancelled", result=early_exit_of(record) or None, error=None)
    return "cancelled"


def finish(ledger: Ledger, record: RunRecord, result: dict[str, Any]) -> None:
    """Close a run as done, beside what was predicted for it."""
    from lora_engine.jobs import CHECKPOINT

    predicted = (record.prediction or {}).get("peak_bytes")
    result = result | {"predicted_peak_bytes": predicted} | early_exit_of(record)
    ledger.finish_run(record.id, "done", result=result, error=None)
    (ledger.run_folder(record.id) / CHECKPOINT).unlink(missing_ok=True)


def _callbacks(ledger: Ledger, run_id: str, start: int, until: int | None) -> "Callbacks":
    from lora_engine.training.loop import Callbacks, StepReport

    reached = start

    def on_step(report: StepReport) -> None:
        nonlocal reached
        reached = report.step
        ledger.record_step(
            run_id,
            report.step,
            train_loss=report.train_loss,
            lr=report.lr,
            grad_norm=report.grad_norm,
            tokens=report.tokens,
            seconds=report.seconds,
        )

    return Callbacks(
        on_step=on_step,
        on_eval=lambda step, loss: ledger.record_eval(run_id, step, eval_loss=loss, tokens=0),
        should_stop=lambda: (until is not None and reached >= until) or ledger.cancel_requested(run_id),
    )


def checkpoint_step(path: Path) -> int:
    """Step that the run goes on from; rows after it will be written again. -1: from the very start."""
    from lora_engine.training.checkpoint import load_tensors

    return int(load_tensors(path)[1]["state"]["step"]) if path.exists() else -1


def _in_words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return "The device ran out of memory: choose a smaller batch, a shorter length, or checkpointing."
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


if __name__ == "__main__":
    raise SystemExit(main())
