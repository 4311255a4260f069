"""Operations, seconds and watt-hours of a step on the chosen card."""

import cache
import streamlit as st
from formatting import format_bytes, format_duration, format_flops, format_number, format_watt_hours, plural
from state import Settings

from lora_engine import calc
from lora_engine.calc.compute import UTILISATION, peak_flops_per_second
from lora_engine.calc.flops import StepFlops

STEPS = "compute_steps"


def show_compute(settings: Settings) -> None:
    """One line with the figures; how many steps, and where the figures are from, in a fold drawn when it is opened."""
    card = calc.find_gpu(settings.card)
    if card is None:
        return
    st.subheader("Compute", anchor=False)
    steps = int(st.session_state.get(STEPS, 1000))
    flops = step_flops(settings)
    memory = cache.memory(settings.model, settings.method, settings.precision, settings.memory_options)
    moved = 2 * settings.accumulation * memory.terms["weights"]
    seconds = calc.estimate_step_seconds(flops.total, card, settings.precision, moved_bytes=moved)
    energy = calc.estimate_energy_watt_hours(steps * seconds, card)
    st.markdown(
        f"A step takes **{format_flops(flops.total)}**, {format_flops(flops.per_token)} a token: about "
        f"**{format_duration(seconds)}** on {settings.card} at {format_number(100 * UTILISATION)} % of its peak. "
        f"{plural(steps, 'step')}: {format_duration(steps * seconds)} and at most "
        f"**{format_watt_hours(energy)}**."
    )
    fold = st.expander("How many steps, and where these figures are from", key="compute", on_change="rerun")
    if fold.open:
        with fold:
            st.number_input("Steps", 1, 10_000_000, 1000, step=100, key=STEPS, persist_state="session", width=240)
            rate = peak_flops_per_second(card, settings.precision)
            st.markdown(
                f"Forward {format_flops(flops.forward)}, backward {format_flops(flops.backward)}"
                + (f", forward again for checkpointing {format_flops(flops.recomputed)}" if flops.recomputed else "")
                + f", over {plural(flops.tokens, 'token')}. A frozen weight costs 2 operations a token forward and 2 "
                "back; a trained one 2 more. "
                f"{settings.card}: {format_flops(rate)} a second in {settings.precision} by its data sheet, "
                f"{card.power_watts} W at most. A step is never shorter than reading "
                f"{format_bytes(moved)} of weights from its memory. Small models and batches reach far less than "
                f"{format_number(100 * UTILISATION)} %; runs on the Fine-tune page show what yours reaches."
            )


def step_flops(settings: Settings) -> StepFlops:
    """The operations of the sidebar's step."""
    return calc.count_step_flops(
        cache.shape(settings.model),
        settings.method,
        settings.batch_size,
        settings.seq_length,
        accumulation=settings.accumulation,
        checkpointing=settings.checkpointing,
    )
