"""Explore: what does this rank cost?"""

import cache
import charts
import dial
import state
import streamlit as st
from dial.table import dial_table
from formatting import format_bytes, format_number, plural
from widgets import card_chips, download_table, explain, show_chart

settings = state.current()
method, options = settings.method, settings.memory_options
rows = cache.rank_rows(settings.model, method, settings.precision, options)
full = cache.full_cost(settings.model, settings.precision, options)

st.header("What does this rank cost?", anchor=False)
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

st.subheader("Fits on", anchor=False)
fits = cache.fits(settings.model, method, settings.precision, options)
st.caption(
    f"Predicted {format_bytes(fits[0]['low_bytes'])} to {format_bytes(fits[0]['high_bytes'])} in "
    f"{settings.precision} at {plural(settings.batch_size, 'sequence')} of {settings.seq_length:,} tokens. "
    "Tight: the card lies inside that interval."
)
card_chips(fits, settings.card)

# Drawn when it is opened, so the browser need not load its table for the first chart.
fold = st.expander("Every adapted module", key="modules", on_change="rerun")
if fold.open:
    with fold:
        modules = cache.module_table(settings.model, method)
        st.dataframe(
            modules,
            hide_index=True,
            column_config={
                "name": "Module",
                "count": st.column_config.NumberColumn("How many", format="localized"),
                "in_features": st.column_config.NumberColumn("In", format="localized"),
                "out_features": st.column_config.NumberColumn("Out", format="localized"),
                "trainable_parameters": st.column_config.NumberColumn("Trainable parameters", format="localized"),
            },
        )
        for note in modules.attrs["notes"]:
            st.caption(note)
        download_table(modules, "modules")


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
