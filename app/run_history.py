"""The pieces of the Runs page: filters, one run's settings, deleting."""

from pathlib import Path
from typing import Any

import cache
import pandas as pd
import streamlit as st
from formatting import format_bytes, format_duration, format_integer, format_loss, format_number, plural

from lora_engine.errors import InputError
from lora_engine.runs import RunRecord

COLUMNS = {
    "created": st.column_config.DatetimeColumn("Started", format="D MMM, HH:mm"),
    "status": st.column_config.TextColumn("Status"),
    "data": st.column_config.TextColumn("Data"),
    "model": st.column_config.TextColumn("Model"),
    "r": st.column_config.NumberColumn("Rank (r)", format="%d"),
    "lora_alpha": st.column_config.NumberColumn("alpha", format="%g"),
    "lr": st.column_config.NumberColumn("Learning rate", format="%g"),
    "seed": st.column_config.NumberColumn("Seed"),
    "steps": st.column_config.NumberColumn("Steps"),
    "eval_loss_before": st.column_config.NumberColumn("Loss before", format="%.3f"),
    "eval_loss_after": st.column_config.NumberColumn("Loss after", format="%.3f"),
    "seconds": st.column_config.NumberColumn("Seconds", format="%.1f"),
    "peak_mib": st.column_config.NumberColumn("Peak memory", format="%.1f MiB"),
    "run_id": st.column_config.TextColumn("Run"),
}
SEARCHED = ("run_id", "sweep_id", "data", "model", "targets", "status")


def filters(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that match what is typed and ticked."""
    left, right = st.columns([2, 3], vertical_alignment="bottom")
    text = left.text_input(
        "Search", key="runs_search", placeholder="data, model, run or sweep", persist_state="session"
    )
    present = sorted(set(frame["status"]))
    statuses = right.pills("Status", present, selection_mode="multi", key="runs_status", wrap=True)
    return match(frame, text, statuses)


def match(frame: pd.DataFrame, text: str, statuses: list[str]) -> pd.DataFrame:
    """Rows with one of `statuses` (all for none) in which each word of `text` occurs somewhere."""
    shown = frame[frame["status"].isin(statuses)] if statuses else frame
    if text.strip():
        haystack = shown[list(SEARCHED)].fillna("").astype(str).agg(" ".join, axis=1).str.lower()
        for word in text.lower().split():
            hit = haystack.str.contains(word, regex=False)
            shown, haystack = shown[hit], haystack[hit]
    return shown.reset_index(drop=True)


def show_details(record: RunRecord) -> None:
    """One run: prediction beside measurement, settings, files."""
    if record.error:
        st.error(record.error)
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Predicted and measured", anchor=False)
        st.dataframe(comparison(record), hide_index=True)
    with right:
        st.subheader("Settings", anchor=False)
        st.dataframe(settings_table(record.config), hide_index=True)
    folder = cache.ledger().run_folder(record.id)
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    with st.expander(f"{plural(len(files), 'file')} in {folder}"):
        st.dataframe(
            [{"File": str(p.relative_to(folder)), "Size": format_bytes(p.stat().st_size)} for p in files],
            hide_index=True,
        )


def comparison(record: RunRecord) -> pd.DataFrame:
    """A row a figure: what it is, predicted, measured."""
    result, prediction = record.result or {}, record.prediction or {}
    rows = [
        ("Peak memory", format_bytes(prediction.get("peak_bytes")), format_bytes(result.get("peak_bytes"))),
        (
            "Trainable parameters",
            format_integer(prediction.get("trainable_parameters")),
            format_integer(result.get("trainable_parameters")),
        ),
        ("Adapter file", format_bytes(prediction.get("adapter_bytes")), format_bytes(result.get("adapter_bytes"))),
        ("Evaluation loss before", "", format_loss(result.get("eval_loss_before"))),
        ("Evaluation loss after", "", format_loss(result.get("eval_loss_after"))),
        ("Time in steps", "", format_duration(result.get("seconds"))),
        ("Device", "", str(result.get("device") or "unknown")),
    ]
    return pd.DataFrame(rows, columns=["Figure", "Predicted", "Measured"])


def settings_table(config: dict[str, Any]) -> pd.DataFrame:
    """A row a setting, names as in the configs."""
    flat: list[tuple[str, str]] = [("model", str(config.get("model")))]
    for part in ("data", "method", "train"):
        for name, value in (config.get(part) or {}).items():
            if value is None:
                continue
            flat.append((name, Path(value).name if name == "path" else _text(value)))
    return pd.DataFrame(flat, columns=["Setting", "Value"])


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format_number(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def delete_button(run_ids: list[str]) -> None:
    """Delete, after asking once."""
    what = plural(len(run_ids), "run")
    if st.button(f"Delete {what}", key="delete_runs", icon=":material/delete:"):
        _confirm(run_ids)


@st.dialog("Delete for good?")
def _confirm(run_ids: list[str]) -> None:
    names = ", ".join(f"`{run_id}`" for run_id in run_ids)
    st.markdown(
        f"{names}: {plural(len(run_ids), 'run')}, with curves, checkpoints and adapters. This cannot be undone."
    )
    if st.button("Delete", type="primary", key="delete_confirmed"):
        refusals = []
        for run_id in run_ids:
            try:
                cache.ledger().delete_run(run_id)
            except InputError as error:
                refusals.append(str(error))
        if not refusals:
            st.rerun()
        for refusal in refusals:
            st.error(refusal)
