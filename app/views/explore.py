"""Explore: what does this rank cost?"""

import cache
import charts
import dial
import state
import streamlit as st
from computing import show_compute
from counts import rank_notes, show_counts
from dial.table import dial_table
from fitting import moment_caption, show_fits
from formatting import format_number
from tracing import check_fold, unknown_panel
from widgets import explain, show_chart

settings = state.current()
method, options = settings.method, settings.memory_options
rows = cache.rank_rows(settings.model, method, settings.precision, options)
full = cache.full_cost(settings.model, settings.precision, options)

st.header("What does this rank cost?", anchor=False)
if settings.unknown_model:
    unknown_panel(settings)
dial.mount(
    dial_table(
        rows,
        full,
        cache.drawn_module(settings.model, method),
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        alphas=state.ALPHAS,
        keep_ratio=settings.keep_ratio,
        use_rslora=settings.use_rslora,
        precision=settings.precision,
    ),
    key=state.DIAL,
    on_release=state.apply_dial,
)

left, right = st.columns(2, gap="large")
with left:
    st.subheader("Memory by precision", anchor=False)
    memory = cache.memory_table(settings.model, method, options)
    show_chart(
        charts.plot_memory(
            memory,
            current=settings.precision,
            card_name=settings.card,
            card_bytes=cache.cards().get(settings.card),
            lora_word=f"LoRA r {settings.r}",
        ),
        memory,
        name="memory_by_precision",
        alt=f"Predicted peak memory by precision, full fine-tuning beside LoRA at rank {settings.r}, stacked by term.",
    )
    moment_caption(settings)
with right:
    st.subheader("Parameters against rank", anchor=False)
    parameters = charts.parameter_table(rows)
    show_chart(
        charts.plot_parameters(
            parameters, r=settings.r, full_parameters=full.total_parameters, target_word=settings.targets_word
        ),
        parameters,
        name="parameters_by_rank",
        alt=f"Trainable parameters against rank on logarithmic axes for {settings.targets_word}; "
        f"rank {settings.r} is marked.",
    )
    rank_notes(settings)
if not settings.unknown_model:
    check_fold(settings)

show_fits(settings)
show_compute(settings)
show_counts(settings)


def _formula() -> None:
    st.latex(r"h = W_0 x + \frac{\alpha}{r}\, B A x")
    st.latex(r"\text{trained per weight} = r\,(d_\text{in} + d_\text{out})")
    st.caption(
        f"At rank {settings.r} and alpha {format_number(settings.lora_alpha)}. Hu et al. 2021, "
        "LoRA: low-rank adaptation of large language models, section 4.1."
    )


explain(
    "LoRA freezes every weight of the model and trains a thin correction beside it: two narrow matrices, B and A. "
    "The rank says how narrow; alpha says how loudly the correction speaks.",
    _formula,
)
