"""Compare: is LoRA the right technique?"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import cache
import comparing
import state
import streamlit as st
from charts.compare import METHOD_NAMES
from data_picker import choose
from formatting import format_duration, format_integer, plural
from loop_form import Loop, predict, run_config, show_notes
from widgets import explain

from lora_engine.comparisons import comparer, is_active, start_comparison
from lora_engine.config import DEVICES, METHOD_CONFIGS, TRAINABLE_PRECISIONS, MethodConfig
from lora_engine.errors import InputError
from lora_engine.sweeps import evaluated_at_quarters
from lora_engine.sweeps.comparison import MATCHES, ComparisonSpec, count_runs
from lora_engine.sweeps.sizes import plan_comparison

MATCH_WORDS = {
    "steps": "steps",
    "parameters": "parameters",
    "memory": "memory",
    "seconds": "time",
}
EVAL_ROWS = 256

settings = state.current()
st.header("Is LoRA the right technique?", anchor=False)


def start(spec: ComparisonSpec, report: Mapping[str, Any]) -> None:
    """Write the search down, hand it to a comparer, and keep its id in the address bar."""
    from lora_engine.calc.predict import predict_run, row_facts

    predict_cell = partial(predict_run, rows=row_facts(report))
    ledger = cache.ledger()
    state.remember(comparing.COMPARISON, start_comparison(ledger, spec, comparer(ledger), predict_cell))


def method_config(name: str) -> MethodConfig:
    """LoRA as the sidebar says, the others as they come."""
    return replace(settings.method, use_dora=False) if name == "lora" else METHOD_CONFIGS[name]()


record = comparing.find_comparison()
busy = record is not None and is_active(cache.ledger(), record.id)
if record is not None:
    with st.container(border=True):
        comparing.show_comparison(record.id)
else:
    st.markdown(
        "Here you will see LoRA, full fine-tuning, a trained head, adapter layers and prefix tuning on your data: the "
        "same rows, the same batches, each at its best of a few learning rates, with the spread over seeds."
    )

st.subheader("Data", anchor=False)
chosen = choose(settings, preview=False, used=comparing.data_of(record))

if chosen is not None and chosen.usable:
    st.subheader("Methods", anchor=False)
    left, right = st.columns(2, gap="large")
    names = left.pills(
        "Compare",
        comparing.METHODS,
        selection_mode="multi",
        default=[name for name in comparing.METHODS if name != "ia3"],
        format_func=METHOD_NAMES.__getitem__,
        key="compare_methods",
        wrap=True,
        persist_state="session",
    )
    seeds = right.pills(
        "Seed", range(5), selection_mode="multi", default=[0, 1, 2], key="compare_seeds", persist_state="session"
    )
    match = left.segmented_control(
        "Made equal",
        MATCHES,
        default="steps",
        required=True,
        format_func=MATCH_WORDS.__getitem__,
        key="compare_match",
        persist_state="session",
        help="Steps: every method as it is. Otherwise the size of adapter layers and prefix, or the steps, are chosen "
        "so that each comes as close as it can to LoRA at your rank, in trainable parameters or in predicted memory or "
        "time.",
    )
    steps = right.number_input("Steps a run", 1, 1_000_000, 60, step=10, key="compare_steps", persist_state="session")
    device = right.segmented_control(
        "Device", DEVICES, default="auto", required=True, key="compare_device", persist_state="session"
    )
    show_notes(settings, precisions=TRAINABLE_PRECISIONS)
    if not (names and seeds):
        st.info("Choose at least one method and one seed.")
        st.stop()
    try:
        loop = Loop(steps=int(steps), device=str(device))
        base = run_config(settings, chosen, loop, precisions=TRAINABLE_PRECISIONS)
        train = replace(evaluated_at_quarters(base.train), eval_examples=EVAL_ROWS)
        spec = plan_comparison(
            replace(base, train=train),
            [method_config(name) for name in comparing.METHODS if name in names],
            cache.shape(settings.model),
            seeds=sorted(seeds),
            match=str(match),
            num_classes=len(chosen.report["classes"]),
        )
    except InputError as error:
        st.error(str(error))
        st.stop()
    predictions = [predict(cell, chosen.report) for cell in comparing.first_cells(spec)]
    if all(prediction is not None for prediction in predictions):
        seconds, basis = comparing.estimate_seconds(spec)
        search = len(spec.entries[0].lrs)
        st.markdown(
            f"**{plural(count_runs(spec), 'run')}**, one after another: each method at {search} learning rates with "
            f"seed {spec.seeds[0]}, then at the best of them with the other seeds. About {format_duration(seconds)} "
            f"({basis})."
        )
        sizes = [
            f"{METHOD_NAMES[entry.name]} {format_integer(prediction['trainable_parameters'])}"
            + (f" in {plural(entry.steps, 'step')}" if match == "seconds" else "")
            for entry, prediction in zip(spec.entries, predictions, strict=True)
            if prediction is not None
        ]
        st.caption(f"Trained parameters: {'; '.join(sizes)}. {' '.join(spec.notes)}")
        if st.button("Start", type="primary", key="start_comparison", disabled=busy, icon=":material/play_arrow:"):
            start(spec, chosen.report)
            st.rerun()
        if busy:
            st.caption("A comparison is going on; stop it or let it finish first.")


def _formula() -> None:
    st.latex(r"h = W_0 x + \tfrac{\alpha}{r} B A x \qquad h + W_\uparrow f(W_\downarrow h)")
    st.latex(r"\mathrm{Attention}(Q, [P_K; K], [P_V; V])")
    st.caption(
        "LoRA (Hu et al. 2021), adapter layers (Houlsby et al. 2019), prefix tuning (Li and Liang 2021). LoRA's "
        "product can be added to the weight it stands beside; a nonlinearity or a prefix cannot."
    )


explain(
    "All methods start from the same base model and read the same rows in the same order. Each is given equally many "
    "learning rates to choose from, because the best rate of one is far from the best of another.",
    _formula,
)
