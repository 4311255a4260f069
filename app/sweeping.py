"""One sweep as it happens and what it found; everything is read from the ledger."""

from pathlib import Path

import cache
import charts
import pandas as pd
import state
import streamlit as st
from formatting import MIB, format_duration, format_number, plural
from widgets import download_table, show_chart

from lora_engine.errors import InputError, NotFoundError
from lora_engine.executors import LocalExecutor
from lora_engine.runs import RunRecord, SweepRecord, runs_frame
from lora_engine.sweeps import Advice, advise, best_over, cancel_sweep, resume_sweep, summarize_cells

REFRESH_SECONDS = 2.0
TABLE_COLUMNS = {
    "run_id": st.column_config.TextColumn("Run"),
    "status": st.column_config.TextColumn("Status"),
    "r": st.column_config.NumberColumn("Rank (r)", format="%d"),
    "lora_alpha": st.column_config.NumberColumn("alpha", format="%g"),
    "lr": st.column_config.NumberColumn("Learning rate", format="%g"),
    "seed": st.column_config.NumberColumn("Seed"),
    "trainable_parameters": st.column_config.NumberColumn("Trainable", format="localized"),
    "eval_loss_before": st.column_config.NumberColumn("Loss before", format="%.3f"),
    "eval_loss_after": st.column_config.NumberColumn("Loss after", format="%.3f"),
    "seconds": st.column_config.NumberColumn("Seconds", format="%.1f"),
    "peak_mib": st.column_config.NumberColumn("Peak memory", format="%.1f MiB"),
}


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


def active_runs(sweep_id: str) -> list[RunRecord]:
    """Runs that somebody works on, or will."""
    runs: list[RunRecord] = cache.ledger().list_runs(sweep_id=sweep_id)
    return [run for run in runs if run.status == "running" or run.waits_for_worker]


def show_sweep(sweep_id: str) -> None:
    """Progress and heatmap while it runs; advice, charts and table when nobody works on it any more."""
    active = bool(active_runs(sweep_id))
    st.fragment(run_every=REFRESH_SECONDS if active else None)(_refresh)(sweep_id, active)
    if not active:
        _findings(runs_frame(cache.ledger(), sweep_id), sweep_id)


def _refresh(sweep_id: str, was_active: bool) -> None:
    running = active_runs(sweep_id)
    if was_active and not running:
        st.rerun()
    frame = runs_frame(cache.ledger(), sweep_id)
    if running:
        _progress(frame, running, sweep_id)
        _heatmap(frame, sweep_id)
    else:
        _what_is_left(frame, sweep_id)


def _progress(frame: pd.DataFrame, running: list[RunRecord], sweep_id: str) -> None:
    over, total = int((~frame["status"].isin(["queued", "running"])).sum()), len(frame)
    at_work = [run for run in running if run.status == "running"]
    within = sum((run.last_step or 0) / max(1, run.num_steps) for run in at_work)
    left = _seconds_left(frame, total - over - within)
    doing = f"; now {_name(at_work[0])}, {at_work[0].progress or 'starting'}" if at_work else "; waiting for the worker"
    words = f"{over} of {plural(total, 'run')} over{doing}" + (f"; {format_duration(left)} left" if left else "")
    bar, button = st.columns([6, 1], vertical_alignment="bottom")
    bar.progress(min(1.0, (over + within) / max(1, total)), words)
    if button.button("Stop", key=f"stop_{sweep_id}", width="stretch"):
        cancel_sweep(cache.ledger(), sweep_id)
        st.rerun()


def _name(run: RunRecord) -> str:
    method = run.config["method"]
    return f"rank {method['r']}, alpha {format_number(method['lora_alpha'])}"


def _seconds_left(frame: pd.DataFrame, runs_left: float) -> float | None:
    each = frame["wall_seconds"].median()
    return float(each * runs_left) if pd.notna(each) else None


def _what_is_left(frame: pd.DataFrame, sweep_id: str) -> None:
    left = frame[frame["status"] != "done"]
    if left.empty:
        return
    counts = ", ".join(f"{count} {status}" for status, count in left["status"].value_counts().items())
    st.warning(f"{len(frame) - len(left)} of {plural(len(frame), 'run')} are done; {counts}.")
    if st.button("Resume the rest", key=f"resume_{sweep_id}", type="primary"):
        resume_sweep(cache.ledger(), sweep_id, LocalExecutor(cache.ledger().home), failed=True, cancelled=True)
        st.rerun()


def _heatmap(frame: pd.DataFrame, sweep_id: str) -> None:
    st.subheader("Loss over rank and alpha", anchor=False)
    table = charts.heatmap_table(frame, best_over(frame, ("r", "lora_alpha")))
    show_chart(
        charts.plot_heatmap(table),
        table,
        name=f"heatmap_{sweep_id}",
        alt="Evaluation loss by rank and alpha, best over the learning rate and averaged over seeds; "
        "dotted lines join cells of equal alpha / r.",
    )
    st.caption(
        "Each cell: the best learning rate, mean over seeds. Dotted lines join cells of equal alpha / r: along them "
        "the update has the same scale."
    )


def _advice(frame: pd.DataFrame) -> Advice | None:
    try:
        advice = advise(frame)
    except InputError as error:
        st.info(str(error))
        return None
    st.subheader(advice.reason, anchor=False)
    st.caption(
        f"Best at that rank: alpha {format_number(advice.lora_alpha)}, learning rate {format_number(advice.lr)}."
    )
    return advice


def _findings(frame: pd.DataFrame, sweep_id: str) -> None:
    advice = _advice(frame)
    if advice is None:
        _heatmap(frame, sweep_id)
        _table(frame, sweep_id)
        return
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Loss against rank", anchor=False)
        show_chart(
            charts.plot_loss_by_rank(advice.table, recommended=advice.r),
            advice.table,
            name=f"loss_by_rank_{sweep_id}",
            alt=f"Evaluation loss against rank, best over alpha and learning rate. {advice.reason}",
        )
    with right:
        st.subheader("Loss against trainable parameters", anchor=False)
        pareto = charts.pareto_table(summarize_cells(frame))
        show_chart(
            charts.plot_pareto(pareto),
            pareto,
            name=f"pareto_{sweep_id}",
            alt="Evaluation loss against trainable parameters; a line joins what nothing smaller beats.",
        )
    _heatmap(frame, sweep_id)
    costs = charts.cost_by_rank_table(frame)
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Time against rank", anchor=False)
        show_chart(
            charts.plot_time_by_rank(costs),
            costs,
            name=f"time_{sweep_id}",
            alt="Measured seconds a run against rank, median with the fastest and the slowest run.",
        )
    with right:
        st.subheader("Memory against rank", anchor=False)
        show_chart(
            charts.plot_memory_by_rank(costs),
            costs,
            name=f"memory_{sweep_id}",
            alt="Peak memory against rank, measured beside predicted.",
        )
    _table(frame, sweep_id)


def _table(frame: pd.DataFrame, sweep_id: str) -> None:
    st.subheader("Every run", anchor=False)
    shown = frame.assign(peak_mib=frame["peak_bytes"] / MIB)
    st.dataframe(shown[list(TABLE_COLUMNS)], hide_index=True, column_config=TABLE_COLUMNS)
    download_table(frame, f"sweep_{sweep_id}", "Export CSV")
