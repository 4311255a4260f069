"""Fine-tune: what happens on my data?"""

from pathlib import Path
from typing import Any

import cache
import live
import state
import streamlit as st
from data_picker import choose
from formatting import format_integer, format_number, format_percent
from loop_form import loop_form, predict, predicted_sentence, run_config, show_notes
from model_picker import model_word
from widgets import explain

from lora_engine.config import RunConfig, to_dict
from lora_engine.errors import InputError
from lora_engine.executors import LocalExecutor

settings = state.current()
st.header("What happens on my data?", anchor=False)


def start(config: RunConfig, prediction: dict[str, Any]) -> None:
    """Write the run down, hand it to a worker, and keep its id in the address bar."""
    run_id = cache.ledger().create_run(to_dict(config), prediction=prediction, num_steps=config.train.steps)
    LocalExecutor(cache.ledger().home).submit([run_id])
    state.remember(state.RUN, run_id)


record = live.find_run()
if record is not None:
    with st.container(border=True):
        live.show_run(record)

st.subheader("Data", anchor=False)
chosen = choose(settings, used=Path(record.config["data"]["path"]) if record else None)

if chosen is not None and chosen.usable:
    st.subheader("Settings", anchor=False)
    loop = loop_form()
    show_notes(settings)
    try:
        config = run_config(settings, chosen, loop)
    except InputError as error:
        st.error(str(error))
        st.stop()
    prediction = predict(config, chosen.report)
    if prediction is not None:
        st.markdown(
            f"LoRA at rank {settings.r} and alpha {format_number(settings.lora_alpha)} trains "
            f"{format_integer(prediction['trainable_parameters'])} parameters "
            f"({format_percent(100 * prediction['trainable_parameters'] / prediction['total_parameters'])}) of "
            f"{model_word(settings.model)}, in {settings.targets_word}. {predicted_sentence(config, prediction)}"
        )
        busy = record is not None and live.is_active(record)
        if st.button("Start", type="primary", key="start", disabled=busy, icon=":material/play_arrow:"):
            start(config, prediction)
            st.rerun()
        if busy:
            st.caption("A run is going on; stop it or let it finish first.")


def _formula() -> None:
    st.latex(r"\mathcal{L} = -\frac{1}{|T|} \sum_{t \in T} \log p_\theta(x_t \mid x_{<t})")
    st.caption("T: the highlighted tokens. Only A and B move; the loss is the mean over T, in nats a token.")


explain(
    "A fine-tune shows the model your examples and moves only the adapter so that the highlighted parts become "
    "likelier. The evaluation loss is measured on a tenth of your rows that it never trains on.",
    _formula,
)
