"""One sweep as it happens; everything is read from the ledger. What it found: `sweep_findings`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cache
import pandas as pd
import state
import streamlit as st
import sweep_findings
import sweep_progress
from charts.heatmap import is_dropped
from formatting import plural
from sweep_findings import SweepView
from sweep_words import bill_sentence

from lora_engine.errors import InputError, NotFoundError
from lora_engine.executors import LocalExecutor
from lora_engine.runs import RunRecord, SweepRecord, records_frame
from lora_engine.sweeps import SweepSpec, cancel_sweep, early_exit_bill, resume_sweep

REFRESH_SECONDS = 2.0


def find_sweep() -> SweepRecord | None:
    """The sweep of the address bar, if there is one."""
    sweep_id = state.recall(state.SWEEP)
    if sweep_id is None:
        return None
    try:
        record: SweepRecord = cache.ledger().get_sweep(sweep_id)
    except (NotFoundError, InputError) as error:
        st.error(str(error))
        state.remember(state.SWEEP, None)
        return None
    return record


def data_of(record: SweepRecord | None) -> Path | None:
    """The file a sweep was trained on."""
    path = ((record.spec.get("base") or {}).get("data") or {}).get("path") if record else None
    return Path(path) if path else None


def spec_of(record: SweepRecord) -> SweepSpec | None:
    """What the grid was made of; None when a newer version wrote it."""
    try:
        return SweepSpec.from_dict(record.spec)
    except InputError:
        return None


def is_worked_on(runs: Sequence[RunRecord]) -> bool:
    """Whether somebody works on one of these runs, or will. Asks the system once a worker, not once a run."""
    if any(run.status == "running" for run in runs):
        return True
    workers = {(run.pid, run.create_time, run.identity): run for run in runs if run.status == "queued"}
    return any(run.waits_for_worker for run in workers.values())


def show_sweep(record: SweepRecord) -> bool:
    """Progress and heatmap while it runs; advice, what is left to do, charts and table when nobody works on it any
    more. Whether it runs still."""
    runs = cache.ledger().list_runs(sweep_id=record.id)
    active = is_worked_on(runs)
    view = SweepView(record.id, spec_of(record))
    if active:
        st.fragment(run_every=REFRESH_SECONDS)(_refresh)(view)
    else:
        frame = records_frame(runs)
        advice = sweep_findings.answer(frame, view)
        _what_is_left(frame, record.id)
        sweep_findings.evidence(frame, view, advice)
    return active


def _refresh(view: SweepView) -> None:
    runs: list[RunRecord] = cache.ledger().list_runs(sweep_id=view.sweep_id)  # one query for all of it
    if not is_worked_on(runs):
        st.rerun()  # the whole page, which has more to show now; the clock stops
    frame = records_frame(runs)
    _progress(frame, runs, view.sweep_id)
    sweep_findings.heatmap(frame, view, sweep_findings.choose_rate(frame, view))


def _progress(frame: pd.DataFrame, runs: Sequence[RunRecord], sweep_id: str) -> None:
    progress = sweep_progress.count_progress(frame)
    pace = sweep_progress.note_pace(sweep_id, progress.steps_done)
    left = sweep_progress.seconds_left(progress, pace)
    words = sweep_progress.progress_words(progress, _doing(runs), left)
    bar, button = st.columns([6, 1], vertical_alignment="bottom")
    bar.progress(progress.share, words)
    if button.button("Stop", key=f"stop_{sweep_id}", width="stretch"):
        with cache.ledger().kept_open():
            cancel_sweep(cache.ledger(), sweep_id)
        st.rerun()


def _doing(runs: Sequence[RunRecord]) -> str:
    """What is being trained, else what most of the running ones are at: those that wait for their turn say less."""
    said = [run.progress or "starting" for run in runs if run.status == "running"]
    training = [words for words in said if words.startswith("training")]
    return Counter(training or said or ["waiting for the worker"]).most_common(1)[0][0]


def _what_is_left(frame: pd.DataFrame, sweep_id: str) -> None:
    rest = frame[(frame["status"] != "done") & ~is_dropped(frame)]
    if len(rest):
        done = int((frame["status"] == "done").sum())
        counts = ", ".join(f"{count} {status}" for status, count in rest["status"].value_counts().items())
        st.warning(f"{done} of {plural(len(frame), 'run')} are done; {counts}.")
        if st.button("Resume the rest", key=f"resume_{sweep_id}", type="primary"):
            _resume(sweep_id, failed=True, cancelled=bool((rest["status"] == "cancelled").any()))
    elif frame["early_exit_step"].notna().any():
        bill = early_exit_bill(frame)
        st.info(bill_sentence(bill))
        if not bill.complete and st.button("Run the full grid too", key=f"full_grid_{sweep_id}", type="primary"):
            _resume(sweep_id, cancelled=True)


def _resume(sweep_id: str, **which: Any) -> None:
    with cache.ledger().kept_open():
        resume_sweep(cache.ledger(), sweep_id, LocalExecutor(cache.ledger().home), **which)
    st.rerun()
