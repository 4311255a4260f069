"""python -m lora_engine.worker --home HOME RUN_ID [RUN_ID ...]: do these runs, one after another.

Started detached by an executor; everything it has to say goes into the ledger. A run that another
worker holds is skipped, a failing run is written down and the next one begins."""

import argparse
import os
import sys
import traceback
from pathlib import Path

import psutil

from lora_engine.config import run_config_from_dict
from lora_engine.errors import LoraExplorerError
from lora_engine.runs import Ledger


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when every run was done, skipped or cancelled, else 1."""
    parser = argparse.ArgumentParser(prog="lora_engine.worker")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("run_ids", nargs="+")
    arguments = parser.parse_args(argv)
    ledger = Ledger(arguments.home)
    outcomes = [work_on(ledger, run_id) for run_id in arguments.run_ids]
    return 1 if "failed" in outcomes else 0


def work_on(ledger: Ledger, run_id: str) -> str:
    """Claim and do one run; what became of it: done, cancelled, failed or skipped."""
    pid = os.getpid()
    if not ledger.claim_run(run_id, pid, psutil.Process(pid).create_time()):
        return "skipped"
    try:
        # Closing the last connection writes the log back to disk: once a run, not once a step.
        with ledger.kept_open():
            status = _train(ledger, run_id)
    except LoraExplorerError as error:
        status = "failed"
        ledger.finish_run(run_id, status, result=None, error=str(error))
    except Exception as error:
        status = "failed"
        traceback.print_exc(file=sys.stderr)
        ledger.finish_run(run_id, status, result=None, error=_in_words(error))
    return status


def _train(ledger: Ledger, run_id: str) -> str:
    # After the claim, so that the page shows at once that somebody is at work: these take seconds.
    ledger.note_progress(run_id, "starting torch")
    from lora_engine.jobs import CHECKPOINT, execute_run
    from lora_engine.training.loop import Callbacks, StepReport

    record = ledger.get_run(run_id)
    folder = ledger.run_folder(run_id)
    ledger.forget_after(run_id, _checkpoint_step(folder / CHECKPOINT))

    def on_step(report: StepReport) -> None:
        ledger.record_step(
            run_id,
            report.step,
            train_loss=report.train_loss,
            lr=report.lr,
            grad_norm=report.grad_norm,
            tokens=report.tokens,
            seconds=report.seconds,
        )

    callbacks = Callbacks(
        on_step=on_step,
        on_eval=lambda step, loss: ledger.record_eval(run_id, step, eval_loss=loss, tokens=0),
        should_stop=lambda: ledger.cancel_requested(run_id),
    )
    state, result = execute_run(
        run_config_from_dict(record.config),
        folder,
        callbacks=callbacks,
        note=lambda text: ledger.note_progress(run_id, text),
    )
    if state.stopped:
        ledger.finish_run(run_id, "cancelled", result=None, error=None)
        return "cancelled"
    predicted = (record.prediction or {}).get("peak_bytes")
    ledger.finish_run(run_id, "done", result=result | {"predicted_peak_bytes": predicted}, error=None)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return "done"


def _checkpoint_step(path: Path) -> int:
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
