"""The settings of the loop, as widgets, and the run configs they make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cache
import streamlit as st
from data_picker import Chosen
from formatting import format_bytes, format_duration
from state import Settings

from lora_engine.assets_path import absolute_model
from lora_engine.config import DEVICES, PRECISIONS, RunConfig, TrainConfig
from lora_engine.errors import InputError

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2)
FALLBACK_PRECISION = "fp32"


@dataclass(frozen=True)
class Loop:
    """What the page asks for beside the sidebar; `lr` and `seed` are swept on the Sweep page."""

    lr: float = 3e-3
    steps: int = 60
    seed: int = 0
    device: str = "auto"
    prompt: str = ""


def run_config(settings: Settings, chosen: Chosen, loop: Loop, *, precisions: Sequence[str] = PRECISIONS) -> RunConfig:
    """The run that these settings describe, in one of `precisions`. Raises ConfigError."""
    return RunConfig(
        model=absolute_model(settings.model),
        data=chosen.config(),
        method=settings.method,
        train=TrainConfig(
            lr=loop.lr,
            steps=loop.steps,
            seed=loop.seed,
            device=loop.device,
            batch_size=settings.batch_size,
            max_length=settings.seq_length,
            precision=settings.precision if settings.precision in precisions else FALLBACK_PRECISION,
            optimizer=settings.optimizer if settings.optimizer in ("adamw", "sgd") else "adamw",
            checkpointing=settings.checkpointing,
            accumulation=settings.accumulation,
        ),
        prompt=loop.prompt.strip() or None,
    )


def loop_form() -> Loop:
    """Learning rate, steps, seed, device and the sample's prompt."""
    left, middle, right = st.columns(3)
    lr = left.select_slider(
        "Learning rate", RATES, value=3e-3, format_func=lambda v: f"{v:g}", key="lr", persist_state="session"
    )
    steps = middle.number_input("Steps", 1, 1_000_000, 60, step=10, key="steps", persist_state="session")
    seed = right.number_input("Seed", 0, 2**31 - 1, 0, key="seed", persist_state="session")
    with st.expander("Device and sample"):
        device = st.segmented_control(
            "Device", DEVICES, default="auto", required=True, key="device", persist_state="session"
        )
        prompt = st.text_input(
            "Prompt for the sample before and after",
            key="prompt",
            persist_state="session",
            placeholder="empty: taken from the evaluation data",
        )
    return Loop(lr=float(lr), steps=int(steps), seed=int(seed), device=str(device or "auto"), prompt=prompt)


def show_notes(settings: Settings, *, precisions: Sequence[str] = PRECISIONS) -> None:
    """What of the sidebar a run cannot follow."""
    if settings.precision not in precisions:
        st.caption(
            f":material/info: Not every method trains in {settings.precision}: these run in {FALLBACK_PRECISION}."
        )
    if settings.optimizer not in ("adamw", "sgd"):
        st.caption(f":material/info: {settings.optimizer} is for predictions; this run uses adamw.")
    if settings.adapter_dtype != "fp32":
        st.caption(f":material/info: {settings.adapter_dtype} adapters are for predictions; this run has fp32 ones.")


def predict(config: RunConfig, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The engine's prediction for a run on the data of `report`; None, with the reason on the page, without one."""
    from lora_engine.calc.predict import predict_run, row_facts

    try:
        prediction = dict(predict_run(config, row_facts(report)))
    except InputError as error:
        st.error(str(error))
        return None
    interval = cache.interval()
    if interval is not None:
        prediction["low_bytes"], prediction["high_bytes"] = interval.bounds(prediction["peak_bytes"])
    return prediction


def predicted_sentence(config: RunConfig, prediction: dict[str, Any]) -> str:
    """Time and memory before the start."""
    from lora_engine.runs import runs_frame
    from lora_engine.sweeps import estimate_run_seconds, find_throughput

    throughput = find_throughput(config, runs_frame(cache.ledger()))
    seconds = estimate_run_seconds(config, throughput=throughput)
    return (
        f"Predicted: about {format_duration(seconds)} ({throughput.basis}) and "
        f"{format_bytes(prediction['peak_bytes'])} at the peak "
        f"({format_bytes(prediction['low_bytes'])} to {format_bytes(prediction['high_bytes'])})."
    )
