"""Runs: what have I tried?"""

import cache
import charts
import run_history
import scale_dial
import state
import streamlit as st
from charts.curves import curve_name
from formatting import MIB
from widgets import download_table, empty_state, show_chart

from lora_engine.runs import evals_frame, runs_frame

st.header("What have I tried?", anchor=False)

frame = runs_frame(cache.ledger()).iloc[::-1].reset_index(drop=True)
if frame.empty:
    if empty_state(
        "Every run is kept here with its settings, its curve, and what was predicted beside what was measured.",
        "Fine-tune for the first time",
        key="first_run",
    ):
        state.open_page("views/finetune.py")
    st.stop()

shown = run_history.filters(frame)
event = st.dataframe(
    shown.assign(peak_mib=shown["peak_bytes"] / MIB)[list(run_history.COLUMNS)],
    hide_index=True,
    # Ticks are positions: other rows are another table, or the wrong runs would be deleted.
    key=f"runs_table_{hash(tuple(shown['run_id']))}",
    on_select="rerun",
    selection_mode="multi-row",
    column_config=run_history.COLUMNS,
)
picked = [str(shown["run_id"].iloc[i]) for i in event["selection"]["rows"] if i < len(shown)]
with st.container(horizontal=True, vertical_alignment="center"):
    download_table(shown, "runs", "Export CSV")
    if not picked:
        st.caption(f"{len(shown)} of {len(frame)} runs. Tick some to overlay their curves; tick one to see all of it.")

if picked:
    rows = shown.set_index("run_id").loc[picked]
    names = {
        str(run_id): curve_name(row["r"], row["lora_alpha"], row["lr"], row["seed"]) for run_id, row in rows.iterrows()
    }
    table = charts.overlay_table(evals_frame(cache.ledger(), picked), names)
    st.subheader("Evaluation loss", anchor=False)
    show_chart(
        charts.plot_overlay(table),
        table,
        name="overlay",
        alt="Evaluation loss over the steps of " + "; ".join(names.values()) + ".",
    )
    run_history.delete_button(picked)

if len(picked) == 1:
    record = cache.ledger().get_run(picked[0])
    run_history.show_details(record)
    scale_dial.show_fold(record.id)
    if st.button("Open on the Fine-tune page", key="open_run"):
        state.remember(state.RUN, record.id)
        state.open_page("views/finetune.py")
