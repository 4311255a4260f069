"""What fits: the cards, the largest batch, sequence and rank on the chosen one, and what to change when it does not."""

from typing import Any

import cache
import pandas as pd
import state
import streamlit as st
from formatting import format_bytes, format_integer, plural
from state import Settings
from widgets import card_chips, figures

from lora_engine import calc
from lora_engine.calc.fit import card_room, confidence_text

MEMORY_KINDS = """
**Allocated**: the bytes that tensors hold (`torch.cuda.max_memory_allocated`). This is what is predicted here and
measured in your runs.

**Reserved**: what PyTorch's allocator has taken from the card, allocated and kept for later
(`torch.cuda.max_memory_reserved`). A few percent more; much more where sizes of batches differ.

**Card memory**: what `nvidia-smi` shows: reserved, and the CUDA context beside it. Of each card, {kept} are set aside
here for context and reserve before anything is said to fit.
"""
MOMENTS = {
    "loss": "while the loss is computed: every activation is alive, and gradients do not exist yet ({gradients} later)",
    "head": "as backward leaves the output head: activations are still alive; gradients take {gradients} in the end",
    "backward": "on the way back: activations go layer by layer while gradients come ({gradients} in all)",
    "embedding": "as backward reaches the embedding, with nearly all of {gradients} of gradients there",
    "optimizer": "while the optimizer updates the weights: activations are gone, gradients ({gradients}) are all there",
}


def moment_caption(settings: Settings) -> None:
    """Which moment the bars show."""
    memory = cache.memory(settings.model, settings.method, settings.precision, settings.memory_options)
    words = MOMENTS[memory.moment].format(gradients=format_bytes(memory.gradient_bytes))
    st.caption(f"The bars show the peak. Yours, LoRA in {settings.precision}, comes {words}.")
    for note in memory.notes:
        st.caption(note)


def show_fits(settings: Settings) -> None:
    """The verdict on the chosen card, what else it would hold, and every other card."""
    what = settings.model, settings.method, settings.precision, settings.memory_options
    st.subheader("Fits on", anchor=False)
    memory, interval, rows = cache.memory(*what), cache.interval(), cache.fits(*what)
    card = next(row for row in rows if row["name"] == settings.card)
    size = format_bytes(card["memory_bytes"])
    if interval is None:
        fit = {"yes": "fits", "tight": "may or may not fit", "no": "does not fit"}[card["verdict"]] + f" {size}"
        source = "with the interval as shipped; eight finished runs on this machine calibrate it"
    else:
        fit = confidence_text(calc.GpuFit(**card), size, interval.level_percent)
        source = f"from {plural(interval.count, 'run')} on this machine"
    st.markdown(f"{settings.card}: **{fit}**, {source}.")
    st.caption(
        f"Predicted {format_bytes(memory.low_bytes)} to {format_bytes(memory.high_bytes)} in {settings.precision} at "
        f"{plural(settings.batch_size, 'sequence')} of {settings.seq_length:,} tokens. "
        "Tight (~): the card lies inside that interval."
    )
    room = card_room(card["memory_bytes"])
    _limits(settings, room)
    if card["verdict"] != "yes":
        _changes(settings, room)
    card_chips(rows, settings.card)
    fold = st.expander("Allocated, reserved, card memory: what is what?", key="memory_kinds", on_change="rerun")
    if fold.open:
        fold.markdown(MEMORY_KINDS.format(kept=format_bytes(calc.gpus.RESERVED_BYTES)))


def _limits(settings: Settings, room: int) -> None:
    """The largest batch, sequence and rank on the chosen card, one at a time."""
    found = cache.limits(settings.model, settings.method, settings.precision, settings.memory_options, room)
    shape = cache.shape(settings.model)
    context = found["seq"] == shape.max_positions
    whole = found["r"] == max(min(x.in_features, x.out_features) for x in shape.linears)
    figures(
        [
            (
                "Largest batch",
                _largest(found["batch"], calc.fit.MAX_BATCH),
                f"sequences of {settings.seq_length:,} tokens",
            ),
            (
                "Longest sequence",
                _largest(found["seq"], 0),
                "tokens, the model's context" if context else f"tokens, {plural(settings.batch_size, 'sequence')}",
            ),
            (
                "Largest rank",
                _largest(found["r"], 0),
                "no weight takes more" if whole else f"in {settings.targets_word}",
            ),
        ]
    )


def _largest(value: int, limit: int) -> str:
    if not value:
        return "none"
    return f"{value:,} or more" if value == limit else format_integer(value)


def _changes(settings: Settings, room: int) -> None:
    """What would make the step fit: the gentlest way there, and every single change by what it saves."""
    plan, single = cache.changes(settings.model, settings.method, settings.precision, settings.memory_options, room)
    if plan:
        words = "; then ".join(_lower(change.words) for change in plan)
        end = "fits" if plan[-1].fits else "still does not fit"
        st.markdown(f"The gentlest way: {words}. That needs {format_bytes(plan[-1].peak_bytes)} and {end}.")
        merged = {name: value for change in plan for name, value in change.settings.items()}
        if plan[-1].fits:
            st.button(
                "Make these changes", key="apply_plan", on_click=state.apply_change, args=(plan[-1].method, merged)
            )
    if not single:
        return
    with st.expander("Single changes, the one that saves most first", expanded=not plan):
        st.dataframe(changes_table(single), hide_index=True, column_config=CHANGE_COLUMNS)
        by_words = {change.words: change for change in single}

        def take() -> None:
            change = by_words[st.session_state["take_change"]]
            st.session_state["take_change"] = None
            state.apply_change(change.method, change.settings)

        st.pills("Make one of them", list(by_words), key="take_change", on_change=take, wrap=True)


CHANGE_COLUMNS: dict[str, Any] = {
    "words": "Change",
    "saves": "Saves",
    "then": "Then needs",
    "fits": "Fits",
    "cost": "What it costs",
}


def changes_table(changes: list[calc.Change]) -> pd.DataFrame:
    """words, saves, then, fits, cost a row."""
    return pd.DataFrame(
        [
            (
                change.words,
                format_bytes(change.saved_bytes),
                format_bytes(change.peak_bytes),
                "yes" if change.fits else "no",
                change.cost,
            )
            for change in changes
        ],
        columns=list(CHANGE_COLUMNS),
    )


def _lower(words: str) -> str:
    return words[0].lower() + words[1:]
