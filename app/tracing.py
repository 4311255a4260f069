"""Trace it: a real step on fake tensors, beside the formula or in place of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import cache
import pandas as pd
import state
import streamlit as st
from charts import TERM_WORDS
from formatting import format_bytes, format_duration, format_integer, format_percent
from model_picker import model_word
from state import Settings

from lora_engine import calc
from lora_engine.assets_path import absolute_model
from lora_engine.config import TRAINABLE_PRECISIONS
from lora_engine.errors import LoraExplorerError
from lora_engine.executors.tracing import trace_model

WHAT = (
    "The real model, adapters, loss and optimizer run one step on tensors that have sizes and no contents. "
    "Nothing is allocated; it takes some seconds."
)
# What backward of the loss makes is logits to the formula and passing by to the tracer: together they compare.
ROWS = {TERM_WORDS[term]: (term,) for term in TERM_WORDS if term not in ("logits", "overhead")} | {
    "Logits and overhead": ("logits", "overhead")
}
NO_KERNEL = "scaled_dot_product_attention"
PHASES = {
    "forward": "in the forward pass",
    "loss": "while the loss is computed",
    "backward": "on the way back",
    "lower backward": "on the way back through the lower layers",
    "optimizer": "while the optimizer updates the weights",
}


def trace_arguments(settings: Settings) -> tuple[str, ...]:
    """What `lora-explorer trace` is asked for these settings."""
    model = settings.unknown_model or settings.model
    targets = settings.targets if isinstance(settings.targets, str) else ",".join(settings.targets)
    flags = {
        "--method": "lora", "--precision": settings.precision, "--batch": settings.batch_size,
        "--seq": settings.seq_length, "--attention": settings.attention, "--accumulation": settings.accumulation,
        "--optimizer": traced_optimizer(settings), "--r": settings.r, "--alpha": settings.lora_alpha,
        "--targets": targets,
    }  # fmt: skip
    switches = {
        "--checkpointing": settings.checkpointing, "--rslora": settings.use_rslora, "--dora": settings.use_dora,
    }  # fmt: skip
    return (
        absolute_model(model),
        *(str(part) for pair in flags.items() for part in pair),
        *(name for name, on in switches.items() if on),
    )


def traced_optimizer(settings: Settings) -> str:
    """The sidebar's where torch has it; 8-bit AdamW is traced as AdamW."""
    return settings.optimizer if settings.optimizer in ("adamw", "sgd") else "adamw"


def traced_table(
    traced: Mapping[str, Any],
    estimate: calc.MemoryEstimate | None = None,
    counted: calc.ParameterCount | None = None,
) -> pd.DataFrame:
    """figure, formula, traced, difference a row, as text; without a formula the two columns are left out.

    The difference is the formula's, in percent of what was traced; of a memory term in percent of the traced peak."""
    rows: list[tuple[str, float | None, float, float, bool]] = []
    for key, word in (("total_parameters", "Parameters"), ("trainable_parameters", "Trainable parameters")):
        ours = getattr(counted, key) if counted else None
        rows.append((word, ours, traced[key], traced[key], False))
    for word, terms in ROWS.items():
        ours = sum(estimate.terms[term] for term in terms) if estimate else None
        theirs = sum(traced["terms"].get(term, 0) for term in terms)
        if ours or theirs:
            rows.append((word, ours, theirs, traced["peak_bytes"], True))
    rows.append(("Peak", estimate.peak_bytes if estimate else None, traced["peak_bytes"], traced["peak_bytes"], True))
    table = []
    for word, ours, theirs, whole, is_bytes in rows:
        text = format_bytes if is_bytes else format_integer
        entry = {"figure": word, "formula": text(ours), "traced": text(theirs)}
        if ours is not None and whole:
            off = 100 * (ours - theirs) / whole
            entry["difference"] = _difference(off) if ours != theirs else "none"
        table.append(entry)
    frame = pd.DataFrame(table)
    return frame.drop(columns="formula") if estimate is None else frame


def _difference(off: float) -> str:
    if abs(off) < 0.01:
        return "under 0.01 %"
    return f"{'+' if off > 0 else '−'}{format_percent(abs(off))}"


def difference_sentence(traced: Mapping[str, Any], estimate: calc.MemoryEstimate | None) -> str:
    """The answer first: the peak, where it is, and how far the formula is from it."""
    peak = format_bytes(traced["peak_bytes"])
    where = PHASES.get(traced["peak_phase"], traced["peak_phase"])
    took = f"traced in {format_duration(traced['seconds'])}"
    if estimate is None:
        return f"The step needs **{peak}** at its peak, {where} ({took})."
    off = 100 * (estimate.peak_bytes - traced["peak_bytes"]) / traced["peak_bytes"]
    side = "above" if off > 0 else "below"
    words = f"{format_percent(abs(off))} {side} it" if abs(off) >= 0.005 else "the same to a hundredth of a percent"
    return f"The real step needs **{peak}** at its peak, {where} ({took}). The formula is **{words}**."


def trace_error(line: str) -> str:
    """What went wrong, with what to do where it is known."""
    if NO_KERNEL in line:
        return "This architecture has no sdpa kernel: choose eager under Attention kernel and trace again."
    return line


@st.fragment
def trace_panel(settings: Settings) -> None:
    """The button, and the outcome for as long as the settings are those that were traced."""
    traces: dict[Sequence[str], dict[str, Any] | str] = st.session_state.setdefault(state.TRACES, {})
    arguments = trace_arguments(settings)
    quantised = settings.precision not in TRAINABLE_PRECISIONS
    if arguments not in traces:
        if quantised:
            st.caption(f"A step in {settings.precision} cannot be traced; fp32, fp16, bf16 and mixed ones can.")
        place = st.empty()
        if not place.button("Trace it", key="trace", icon=":material/biotech:", disabled=quantised):
            return
        with place, st.spinner("Tracing a step of the real model", show_time=True):
            try:
                traces[arguments] = trace_model(arguments)
            except LoraExplorerError as error:
                traces[arguments] = str(error)
        place.empty()
    outcome = traces[arguments]
    if isinstance(outcome, str):
        st.error(trace_error(outcome))
        if st.button("Try again", key="trace_again"):
            del traces[arguments]
            st.rerun()
        return
    show_trace(settings, outcome)


def show_trace(settings: Settings, traced: Mapping[str, Any]) -> None:
    """One sentence, then the table."""
    estimate = counted = None
    if not settings.unknown_model:
        shape = cache.shape(settings.model)
        counted = calc.count_parameters(shape, settings.method)
        options = settings.memory_options | {"adapter_dtype": "fp32", "optimizer": traced_optimizer(settings)}
        estimate = calc.estimate_memory(shape, settings.method, precision=settings.precision, **options)
    st.markdown(difference_sentence(traced, estimate))
    st.dataframe(
        traced_table(traced, estimate, counted),
        hide_index=True,
        column_config={
            "figure": "Figure",
            "formula": "Formula",
            "traced": "Traced",
            "difference": st.column_config.TextColumn(
                "Difference", help="Formula minus traced; of a memory term in percent of the traced peak."
            ),
        },
    )
    for note in traced.get("notes", ()):
        st.caption(note)


def unknown_panel(settings: Settings) -> None:
    """First on the page for a model that only a trace can speak of."""
    with st.container(border=True):
        st.markdown(
            f"**{model_word(settings.unknown_model)}** has an architecture that the formulas do not know. {WHAT} "
            "Below: the embedded model."
        )
        trace_panel(settings)


def check_fold(settings: Settings) -> None:
    """Under the memory chart: the formula held against the real step, on demand."""
    fold = st.expander("Check the formula: trace a real step", key="trace_fold", on_change="rerun")
    if fold.open:
        with fold:
            st.caption(WHAT)
            trace_panel(settings)
