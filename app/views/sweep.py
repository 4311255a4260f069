"""Sweep: which rank and alpha?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import cache
import state
import streamlit as st
import sweeping
from data_picker import choose
from formatting import format_number, plural
from loop_form import RATES, Loop, predict, run_config, show_notes
from streamlit.delta_generator import DeltaGenerator
from sweep_words import predicted_words
from widgets import explain

from lora_engine.config import DEVICES
from lora_engine.errors import InputError
from lora_engine.executors import LocalExecutor
from lora_engine.runs import runs_frame
from lora_engine.sweeps import SweepSpec, evaluated_at_quarters, start_sweep

V = TypeVar("V", int, float)
SEEDS = (0, 1, 2, 3, 4)

settings = state.current()
st.header("Which rank and alpha?", anchor=False)


def start(spec: SweepSpec, report: Mapping[str, Any]) -> None:
    """Write the sweep down, hand its runs to a worker, and keep its id in the address bar."""
    from lora_engine.calc.predict import predict_run, row_facts

    predict_cell = partial(predict_run, rows=row_facts(report))
    executor = LocalExecutor(cache.ledger().home)
    state.remember(state.SWEEP, start_sweep(cache.ledger(), spec, executor, predict_cell))


def pick(column: DeltaGenerator, label: str, options: Sequence[V], default: Sequence[V], key: str) -> list[V]:
    """Chips, any number of them; in order."""
    chosen = column.pills(
        label,
        options,
        selection_mode="multi",
        default=default,
        format_func=format_number,
        key=key,
        wrap=True,
        persist_state="session",
    )
    return sorted(chosen)


record = sweeping.find_sweep()
busy = False
if record is not None:
    with st.container(border=True):
        busy = sweeping.show_sweep(record)

st.subheader("Data", anchor=False)
chosen = choose(settings, preview=False, used=sweeping.data_of(record))

if chosen is not None and chosen.usable:
    report = chosen.report
    st.subheader("Grid", anchor=False)
    left, right = st.columns(2, gap="large")
    rs = pick(left, "Rank (r)", state.RANKS, (1, 2, 4, 8), "grid_r")
    alphas = pick(left, "Scaling (alpha)", state.ALPHAS, (8.0, 16.0), "grid_alpha")
    lrs = pick(right, "Learning rate", RATES, (3e-3, 1e-2), "grid_lr")
    seeds = pick(right, "Seed", SEEDS, (0, 1), "grid_seed")
    left, right = st.columns(2, gap="large")
    steps = left.number_input("Steps a run", 1, 1_000_000, 40, step=10, key="grid_steps", persist_state="session")
    device = right.segmented_control(
        "Device", DEVICES, default="auto", required=True, key="grid_device", persist_state="session"
    )
    early_exit = st.toggle("Stop the worst half early", key="grid_early_exit", persist_state="session")
    st.caption(
        "At a quarter and again at half of the steps, the half with the higher loss stops; seeds stay together. "
        "This can drop what would have won in the end: run the full grid afterwards and the page says what it cost."
    )
    show_notes(settings)
    if not (rs and alphas and lrs and seeds):
        st.info("Choose at least one value of each: rank, alpha, learning rate and seed.")
        st.stop()
    try:
        base = run_config(settings, chosen, Loop(steps=int(steps), device=str(device)))
        spec = SweepSpec(
            base=replace(base, train=evaluated_at_quarters(base.train)),
            rs=tuple(rs),
            lora_alphas=tuple(alphas),
            lrs=tuple(lrs),
            seeds=tuple(seeds),
            early_exit=early_exit,
        )
    except InputError as error:
        st.error(str(error))
        st.stop()
    if predict(base, report) is not None:
        st.markdown(
            f"**{plural(spec.num_runs, 'run')}** of {plural(int(steps), 'step')}: "
            f"{predicted_words(spec, runs_frame(cache.ledger()))}."
        )
        if st.button("Start", type="primary", key="start_sweep", disabled=busy, icon=":material/play_arrow:"):
            start(spec, report)
            st.rerun()
        if busy:
            st.caption("A sweep is going on; stop it or let it finish first.")


def _formula() -> None:
    st.latex(
        r"r^\star = \min \{\, r : \min_{\alpha,\eta} \bar{\mathcal{L}}(r,\alpha,\eta)"
        r" \le \mathcal{L}_\text{best} + \sigma \,\}"
    )
    st.caption("The bar: mean over seeds. Sigma: the standard deviation over seeds, pooled over ranks.")


explain(
    "A sweep trains the same data with every combination of rank, alpha, learning rate and seed; runs that can share "
    "one pass over the frozen base do. With alpha / r scaling, alpha acts much like a learning rate: compare ranks at "
    "their best learning rate, not at one.",
    _formula,
)
