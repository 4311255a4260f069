"""The words and columns of the Accuracy page."""

import pandas as pd
import streamlit as st
from charts.accuracy import KIND_WORDS
from formatting import format_percent, plural

from lora_engine import calc
from lora_engine.calc.interval import MIN_RUNS
from lora_engine.calc.memory import UNCERTAINTY_PERCENT

COLUMNS = {
    "created": st.column_config.DatetimeColumn("Started", format="D MMM, HH:mm"),
    "model": st.column_config.TextColumn("Model"),
    "method": st.column_config.TextColumn("Method"),
    "r": st.column_config.NumberColumn("Rank (r)", format="%d"),
    "predicted_mib": st.column_config.NumberColumn("Predicted", format="%.1f MiB"),
    "measured_mib": st.column_config.NumberColumn("Measured", format="%.1f MiB"),
    "error_percent": st.column_config.NumberColumn(
        "Off by", format="%+.2f %%", help="Measured minus predicted, in percent of the predicted."
    ),
    "kind": st.column_config.TextColumn("Measured as"),
    "reserved_mib": st.column_config.NumberColumn("Reserved", format="%.1f MiB"),
    "precision": st.column_config.TextColumn("Precision"),
    "batch_size": st.column_config.NumberColumn("Batch"),
    "max_length": st.column_config.NumberColumn("Tokens, at most"),
    "device": st.column_config.TextColumn("Device"),
    "run_id": st.column_config.TextColumn("Run"),
}


def error_sentence(frame: pd.DataFrame) -> str:
    """How far predictions were off, in the median and at worst."""
    errors = frame["error_percent"].abs()
    count = plural(len(errors), "run")
    if len(errors) == 1:
        return f"On this machine {count}: the prediction was off by {format_percent(errors.iloc[0])}."
    return (
        f"On this machine {count}: the prediction was off by {format_percent(errors.median())} in the median "
        f"and {format_percent(errors.max())} at worst."
    )


def kind_sentences(frame: pd.DataFrame) -> list[str]:
    """The same by what was measured, where runs of both kinds are there."""
    if frame["kind"].nunique() < 2:
        return []
    return [
        f"{plural(len(rows), 'run')}, {KIND_WORDS.get(str(kind), str(kind))}: "
        f"{format_percent(rows['error_percent'].abs().median())} in the median, "
        f"{format_percent(rows['error_percent'].abs().max())} at worst."
        for kind, rows in frame.groupby("kind")
    ]


def interval_sentence(interval: calc.Interval | None, count: int) -> str:
    """Where the interval of predictions is from."""
    if interval is None:
        return (
            f"The interval shown with predictions is the one shipped: ±{UNCERTAINTY_PERCENT} % of what is not exact. "
            f"From {MIN_RUNS} runs on it is calibrated on yours ({plural(count, 'run')} so far)."
        )
    return (
        f"The interval shown with predictions is calibrated on {plural(interval.count, 'run')}: "
        f"±{format_percent(interval.high_percent)} holds for a like run with {interval.level_percent} %."
    )
