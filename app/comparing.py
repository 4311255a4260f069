"""One comparison as it happens and what it found; everything is read from the ledger."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import cache
import pandas as pd
import scale_dial
import state
import streamlit as st
from charts import compare as charts
from formatting import MIB, format_duration, format_number, plural
from promises import FAILS, HOLDS, Promise, promises
from widgets import download_table, show_chart

from lora_engine.comparisons import (
    comparer,
    is_active,
    read_cells,
    read_comparison,
    resume_comparison,
)
from lora_engine.config import DEFAULT_LRS, RunConfig
from lora_engine.errors import InputError, NotFoundError
from lora_engine.runs import RunRecord, SweepRecord, evals_frame, runs_frame, steps_frame
from lora_engine.sweeps import cancel_sweep, estimate_run_seconds, find_throughput
from lora_engine.sweeps.comparison import ComparisonSpec, count_runs, search_cells

COMPARISON = "comparison"  # its id in the address bar
METHODS = ("lora", *(name for name in DEFAULT_LRS if name != "lora"))
REFRESH_SECONDS = 2.0
TABLE_COLUMNS = {
    "method": st.column_config.TextColumn("Method"),
    "trainable_parameters": st.column_config.NumberColumn("Trained", format="localized"),
    "lr": st.column_config.NumberColumn("Learning rate", format="%g"),
    "steps": st.column_config.NumberColumn("Steps", format="localized"),
    "num_seeds": st.column_config.NumberColumn("Seeds done"),
    "eval_loss_before": st.column_config.NumberColumn("Loss before", format="%.3f"),
    "eval_loss_after": st.column_config.NumberColumn("Loss after (mean)", format="%.3f"),
    "eval_loss_after_min": st.column_config.NumberColumn("lowest", format="%.3f"),
    "eval_loss_after_max": st.column_config.NumberColumn("highest", format="%.3f"),
    "eval_accuracy": st.column_config.NumberColumn("Accuracy", format="percent"),
    "step_seconds": st.column_config.NumberColumn("A step", format="%.3f s"),
    "peak_mib": st.column_config.NumberColumn("Peak memory", format="%.1f MiB"),
    "inference_ms": st.column_config.NumberColumn("A token", format="%.2f ms"),
    "merged_ms": st.column_config.NumberColumn("A token, merged", format="%.2f ms"),
    "merge_max_abs_diff": st.column_config.NumberColumn("Merging changes logits by", format="%.1e"),
}


def find_comparison() -> SweepRecord | None:
    """The comparison of the address bar, if there is one."""
    comparison_id = state.recall(COMPARISON)
    if comparison_id is None:
        return None
    try:
        return read_cells(cache.ledger(), comparison_id)[0]
    except (NotFoundError, InputError) as error:
        st.error(str(error))
        state.remember(COMPARISON, None)
        return None


def data_of(record: SweepRecord | None) -> Path | None:
    """The file a comparison was trained on."""
    return Path(record.spec["base"]["data"]["path"]) if record else None


def first_cells(spec: ComparisonSpec) -> list[RunConfig]:
    """One run a method, at its middle rate: rate and seed cost nothing."""
    return search_cells(spec)[: len(spec.entries)]


def estimate_seconds(spec: ComparisonSpec) -> tuple[float, str]:
    """(seconds for all runs one after another, what that is taken from)."""
    throughput = find_throughput(spec.base, runs_frame(cache.ledger()))
    cells = first_cells(spec)
    repeats = count_runs(spec) // len(spec.entries)
    seconds = repeats * sum(estimate_run_seconds(cell, throughput=throughput) for cell in cells)
    return seconds, throughput.basis


def show_comparison(comparison_id: str) -> None:
    """Progress and a growing table while it runs; the answer and its evidence when nobody works on it any more."""
    active = is_active(cache.ledger(), comparison_id)
    st.fragment(run_every=REFRESH_SECONDS if active else None)(_refresh)(comparison_id, active)
    if not active:
        _findings(comparison_id)


def _refresh(comparison_id: str, was_active: bool) -> None:
    try:
        active = is_active(cache.ledger(), comparison_id)
    except NotFoundError as error:  # deleted in another tab
        st.error(str(error))
        return
    if was_active and not active:
        st.rerun()
    found = read_comparison(cache.ledger(), comparison_id)
    if active:
        _progress(comparison_id, found)
        table = charts.methods_pareto_table(found["methods"])
        show_chart(charts.plot_methods_pareto(table), table, name=f"live_{comparison_id}", alt=_pareto_alt(table))
    elif found["status"] != "done":
        _what_is_left(comparison_id, found)


def _progress(comparison_id: str, found: Mapping[str, Any]) -> None:
    record, runs = read_cells(cache.ledger(), comparison_id)
    total = count_runs(ComparisonSpec.from_dict(record.spec))
    over = sum(run.is_final for run in runs)
    at_work = next((run for run in runs if run.status == "running"), None)
    within = (at_work.last_step or 0) / max(1, at_work.num_steps) if at_work else 0.0
    bar, button = st.columns([6, 1], vertical_alignment="bottom")
    bar.progress(min(1.0, (over + within) / max(1, total)), progress_words(runs, total, found["doing"]))
    if button.button("Stop", key=f"stop_{comparison_id}", width="stretch", disabled=over >= total):
        cancel_sweep(cache.ledger(), comparison_id)
        st.rerun()


def progress_words(runs: Sequence[RunRecord], total: int, doing: str | None) -> str:
    """How many runs are over, what is being done, and how long the rest will take."""
    over = [run for run in runs if run.is_final]
    at_work = next((run for run in runs if run.status == "running"), None)
    if at_work is None:
        now = f"now {doing}" if doing and doing != "training" else "waiting for the worker"
        return f"{len(over)} of {plural(total, 'run')} over; {now}"
    method = charts.METHOD_NAMES.get(at_work.config["method"]["method"], "")
    train = at_work.config["train"]
    now = f"now {method}, learning rate {format_number(train['lr'])}, seed {train['seed']}"
    took = [
        run.finished_seconds - run.started_seconds
        for run in over
        if run.status == "done" and run.finished_seconds and run.started_seconds
    ]
    within = (at_work.last_step or 0) / max(1, at_work.num_steps)
    left = sum(took) / len(took) * (total - len(over) - within) if took else None
    return f"{len(over)} of {plural(total, 'run')} over; {now}" + (f"; {format_duration(left)} left" if left else "")


def _what_is_left(comparison_id: str, found: Mapping[str, Any]) -> None:
    why = f" {found['error']}" if found["error"] else ""
    errors = sorted({error for row in found["methods"] for error in row["errors"]})
    st.warning(f"This comparison is {found['status']}: not everything was done.{why} {' '.join(errors)}".strip())
    if st.button("Resume the rest", key=f"resume_{comparison_id}", type="primary"):
        resume_comparison(cache.ledger(), comparison_id, comparer(cache.ledger()))
        st.rerun()


def _findings(comparison_id: str) -> None:
    found = read_comparison(cache.ledger(), comparison_id)
    rows, inference = found["methods"], found["inference"]
    if all(row["eval_loss_after"] is None for row in rows):
        return
    st.subheader(found["conclusion"].split(". ")[0].rstrip(".") + ".", anchor=False)
    st.markdown(". ".join(found["conclusion"].split(". ")[1:]))
    st.caption(f"{found['search']}. " + " ".join(found["notes"]))
    show_promises(promises(rows, inference))
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Loss against trainable parameters", anchor=False)
        table = charts.methods_pareto_table(rows)
        show_chart(charts.plot_methods_pareto(table), table, name=f"methods_{comparison_id}", alt=_pareto_alt(table))
        st.caption("Each point: the mean over seeds; its line, from the lowest to the highest seed.")
    with right:
        st.subheader("Loss against time", anchor=False)
        times = _times(rows)
        show_chart(
            charts.plot_loss_by_time(times),
            times,
            name=f"times_{comparison_id}",
            alt="Evaluation loss against measured seconds in training steps, a line a run, a colour a method.",
        )
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Memory to train", anchor=False)
        memory = charts.method_memory_table(rows)
        show_chart(
            charts.plot_method_memory(memory),
            memory,
            name=f"method_memory_{comparison_id}",
            alt="Predicted memory by method, stacked by term, with the measured peak marked.",
        )
    with right:
        st.subheader("Time at inference", anchor=False)
        latency = charts.latency_table(rows, inference)
        show_chart(
            charts.plot_latency(
                latency,
                unit=inference["unit"] if inference else "token",
                noise=(inference["noise_low"], inference["noise_high"]) if inference else (1.0, 1.0),
            ),
            latency,
            name=f"latency_{comparison_id}",
            alt="Time a token by method, merged and unmerged, beside the base model and its noise.",
        )
        if inference:
            st.caption(
                f"All in one process, taking turns; medians over {plural(inference['rounds'], 'round')}. Grey: how far "
                "the base differs from itself in nine of ten rounds."
            )
    _confusion(rows, comparison_id)
    _table(rows, comparison_id)
    lora = next((row for row in rows if row["method"] == "lora" and row["run_ids"]), None)
    if lora:
        scale_dial.show_fold(lora["run_ids"][0])


def _pareto_alt(table: pd.DataFrame) -> str:
    parts = [
        f"{charts.METHOD_NAMES.get(row['method'], row['method'])} {row['eval_loss']:.3f} with "
        f"{row['trainable_parameters']:,.0f} parameters"
        for row in table.to_dict("records")
    ]
    return f"Evaluation loss against trainable parameters: {'; '.join(parts) or 'no run has finished'}."


def _times(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    methods = {run_id: row["method"] for row in rows for run_id in row["run_ids"]}
    ledger, run_ids = cache.ledger(), list(methods)
    return charts.loss_by_time_table(evals_frame(ledger, run_ids), steps_frame(ledger, run_ids), methods)


def show_promises(kept: Sequence[Promise]) -> None:
    """The five promises of low rank, each with its figure and whether it holds here."""
    if not kept:
        return
    st.subheader("Five promises of low rank, in your figures", anchor=False)
    signs = {HOLDS: ("✓", "#009E73"), FAILS: ("✕", "#D55E00")}
    parts = []
    for promise in kept:
        sign, colour = signs.get(promise.verdict, ("·", "#9A9A9A"))
        parts.append(
            f'<div><dt>{escape(promise.title)}</dt><dd class="value">{escape(promise.figure)}</dd>'
            f'<dd><b style="color:{colour}">{sign}</b> {escape(promise.verdict)}</dd>'
            f"<dd>{escape(promise.note)}.</dd></div>"
        )
    st.html(
        "<style>dl.promises{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:1rem 0;"
        "margin:.4rem 0;padding:0;font-variant-numeric:tabular-nums}dl.promises div{padding:0 .9rem;"
        "border-left:1px solid #8a8f9455}dl.promises dt,dl.promises dd{margin:0;font-size:.87rem;opacity:.85}"
        "dl.promises dd.value{font-size:1.35rem;font-weight:650;line-height:1.35;opacity:1}</style>"
        f'<dl class="promises">{"".join(parts)}</dl>'
    )


def _confusion(rows: Sequence[Mapping[str, Any]], comparison_id: str) -> None:
    labelled = {row["method"]: row for row in rows if row["confusion_matrix"]}
    if not labelled:
        return
    st.subheader("Which class was taken for which", anchor=False)
    method = st.segmented_control(
        "Method",
        list(labelled),
        format_func=lambda name: charts.METHOD_NAMES.get(name, name),
        default=next(iter(labelled)),
        required=True,
        key=f"confusion_{comparison_id}",
    )
    row = labelled[method]
    table = charts.confusion_table(row["confusion_matrix"], row["classes"])
    show_chart(
        charts.plot_confusion(table),
        table,
        name=f"confusion_{comparison_id}_{method}",
        alt=f"Confusion matrix of {method}, summed over {plural(row['num_seeds'], 'seed')}.",
    )
    st.caption(f"Evaluation rows, summed over {plural(row['num_seeds'], 'seed')}.")


def results_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row a method; columns of TABLE_COLUMNS, those without any value left out."""
    frame = pd.DataFrame(
        [
            {
                **{key: row.get(key) for key in TABLE_COLUMNS},
                "method": charts.METHOD_NAMES.get(row["method"], row["method"]),
                "peak_mib": _scaled(row["peak_bytes"], 1 / MIB),
                "inference_ms": _scaled(row["inference_seconds_per_token"], 1000),
                "merged_ms": _scaled(row["merged_seconds_per_token"], 1000),
            }
            for row in rows
        ]
    )
    return frame.dropna(axis="columns", how="all")


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _table(rows: Sequence[Mapping[str, Any]], comparison_id: str) -> None:
    st.subheader("Every method", anchor=False)
    frame = results_table(rows)
    st.dataframe(frame, hide_index=True, column_config={key: TABLE_COLUMNS[key] for key in frame.columns})
    download_table(frame, f"comparison_{comparison_id}", "Export CSV")
