"""The dial of a LoRA run: from the base model (0) past the trained one (1) to twice the update (2).

A warm process holds the model; the server asks it (see `lora_engine.executors.warm`)."""

from typing import Any

import cache
import streamlit as st
from charts import compare as charts
from formatting import format_loss, format_number
from widgets import CHART_CONFIG, text_block

from lora_engine.dialer import read_losses
from lora_engine.errors import InputError, LoraExplorerError
from lora_engine.runs import RunRecord

CURVE_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
TEMPERATURES = (0.0, 0.5, 0.8, 1.0)


def show_fold(run_id: str) -> None:
    """A fold with the dial; opened, it starts the process that writes. Nothing for a run that has no dial."""
    record: RunRecord = cache.ledger().get_run(run_id)
    if record.status != "done" or record.config["method"]["method"] != "lora":
        return
    fold = st.expander("The dial: from the base model to twice the update", key=f"dial_{run_id}", on_change="rerun")
    if fold.open:
        with fold:
            st.fragment(_dial)(record)


def _dial(record: RunRecord) -> None:
    sample = (record.result or {}).get("sample") or {}
    scale = st.slider("Scale of the update", 0.0, 2.0, 1.0, step=0.05, key=f"scale_{record.id}", format="%.2f")
    prompt = st.text_input("Prompt", str(sample.get("prompt", "")).strip(), key=f"dial_prompt_{record.id}")
    left, right = st.columns(2)
    temperature = left.segmented_control(
        "Temperature", TEMPERATURES, default=0.0, required=True, key=f"dial_temperature_{record.id}"
    )
    seed = right.number_input(
        "Seed", 0, 2**31 - 1, 0, key=f"dial_seed_{record.id}", help="At temperature 0 nothing is drawn by chance."
    )
    question = {"run_id": record.id, "scale": scale, "prompt": prompt, "temperature": temperature, "seed": int(seed)}
    left, right = st.columns(2, gap="large")
    with left:
        st.caption(scale_words(scale))
        answer = ask(question)
        if answer is None:
            return
        text = str(answer["text"])
        text_block([{"text": text.strip() or "Nothing but blank lines.", "trained": bool(text.strip())}])
    with right:
        _curve(record.id, scale)


def scale_words(scale: float) -> str:
    """What a place of the dial is."""
    known = {0.0: "The base model.", 1.0: "The model as trained.", 2.0: "Twice the update."}
    return known.get(scale, f"{format_number(scale)} times the update.")


def ask(question: dict[str, Any]) -> dict[str, Any] | None:
    """The warm process's answer; None, with the reason on the page, where there is none."""
    try:
        with st.spinner("Asking the model", show_time=True):
            answer: dict[str, Any] = cache.dialer().ask(question)
    except InputError as error:
        st.error(str(error))
        return None
    except LoraExplorerError as error:
        st.error(f"{error} Try again.")
        return None
    return answer


def _curve(run_id: str, scale: float) -> None:
    """The loss along the dial; what is missing is measured now, this place first."""
    spot, words = st.empty(), st.empty()
    for wanted in (None, scale, *CURVE_SCALES):
        losses = read_losses(cache.ledger(), run_id)
        if wanted is not None:
            if wanted in losses:
                continue
            if ask({"run_id": run_id, "scale": wanted, "eval": True}) is None:
                return
            losses = read_losses(cache.ledger(), run_id)
        spot.plotly_chart(
            charts.plot_dial_curve(losses, scale=scale),
            key=f"dial_curve_{run_id}_{wanted}",
            alt="Evaluation loss along the dial.",
            config=CHART_CONFIG,
        )
        if scale in losses:
            words.caption(f"Evaluation loss here: {format_loss(losses[scale])}.")
