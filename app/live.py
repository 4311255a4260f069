"""One run as it happens and what came of it; everything is read from the ledger."""

import io
import zipfile
from pathlib import Path
from typing import Any

import cache
import charts
import pandas as pd
import state
import streamlit as st
from data_picker import name_of
from formatting import format_bytes, format_duration, format_loss, format_percent, plural, significant
from widgets import figures, show_chart, text_block

from lora_engine.errors import InputError, NotFoundError
from lora_engine.executors import LocalExecutor
from lora_engine.runs import RunRecord, evals_frame, steps_frame

REFRESH_SECONDS = 1.0
RECENT_STEPS = 20  # what the pace and the seconds left are taken from
ACTIVE = ("queued", "running")
PEAK_WORDS = {"allocated": "allocated on the card", "tracked": "tracked in torch"}


def find_run() -> RunRecord | None:
    """The run of the address bar, if there is one."""
    run_id = state.recall(state.RUN)
    if run_id is None:
        return None
    try:
        record: RunRecord = cache.ledger().get_run(run_id)
    except (NotFoundError, InputError) as error:
        st.error(str(error))
        state.remember(state.RUN, None)
        return None
    return record


def show_run(record: RunRecord) -> None:
    """The run, refreshed every second for as long as somebody works on it."""
    active = is_active(record)
    st.fragment(run_every=REFRESH_SECONDS if active else None)(_refresh)(record.id, active)


def is_active(record: RunRecord) -> bool:
    return record.status == "running" or record.waits_for_worker


def _refresh(run_id: str, was_active: bool) -> None:
    try:
        record = cache.ledger().get_run(run_id)
    except NotFoundError as error:  # deleted in another tab
        st.error(str(error))
        return
    if was_active and not is_active(record):
        st.rerun()  # the page around the fragment has more to show now, and the clock stops
    steps = steps_frame(cache.ledger(), [run_id])
    if is_active(record):
        _progress(record, steps)
    elif record.status == "done":
        _outcome(record)
    else:
        _stopped(record)
    _figures(record, steps)
    evals = evals_frame(cache.ledger(), [run_id])
    show_chart(
        charts.plot_curves(steps, evals, num_steps=record.num_steps),
        steps.merge(evals[["step", "eval_loss"]], on="step", how="outer"),
        name=f"loss_{run_id}",
        alt=f"Training and evaluation loss of run {run_id} over {record.num_steps} steps.",
    )
    if record.status == "done":
        _before_and_after(record)


def _progress(record: RunRecord, steps: pd.DataFrame) -> None:
    done = record.last_step or 0
    left = seconds_left(steps, record.num_steps)
    doing = record.progress or ("waiting for its worker" if record.status == "queued" else "starting")
    words = f"Step {done:,} of {record.num_steps:,}, {doing}" + (f", {format_duration(left)} left" if left else "")
    bar, button = st.columns([6, 1], vertical_alignment="bottom")
    bar.progress(min(1.0, done / max(1, record.num_steps)), words)
    if button.button("Stop", key=f"stop_{record.id}", disabled=record.cancel_requested, width="stretch"):
        LocalExecutor(cache.ledger().home).cancel(record.id)
        st.rerun()


def seconds_left(steps: pd.DataFrame, num_steps: int) -> float | None:
    """From the pace of the latest steps; None before there is a pace."""
    recent = steps.tail(RECENT_STEPS)
    if len(recent) < 2:
        return None
    pace = (recent["seconds"].iloc[-1] - recent["seconds"].iloc[0]) / (len(recent) - 1)
    return float(pace * max(0, num_steps - recent["step"].iloc[-1]))


def tokens_per_second(steps: pd.DataFrame) -> float | None:
    """Over the latest steps."""
    recent = steps.tail(RECENT_STEPS)
    if len(recent) < 2:
        return None
    seconds = recent["seconds"].iloc[-1] - recent["seconds"].iloc[0]
    return float((recent["tokens"].iloc[-1] - recent["tokens"].iloc[0]) / seconds) if seconds > 0 else None


def answer(record: RunRecord) -> str:
    """What came of a finished run, in one sentence."""
    result = record.result or {}
    before, after = result["eval_loss_before"], result["eval_loss_after"]
    verb = "fell" if after < before else "rose"
    percent = 100 * result["trainable_parameters"] / result["total_parameters"]
    return (
        f"Evaluation loss {verb} from {format_loss(before)} to {format_loss(after)} in "
        f"{format_duration(result['seconds'])}; {format_percent(percent)} of the parameters trained."
    )


def _outcome(record: RunRecord) -> None:
    st.subheader(answer(record), anchor=False)
    folder = cache.ledger().run_folder(record.id) / str((record.result or {}).get("adapter_path", "adapter"))
    with st.container(horizontal=True):
        st.download_button(
            f"Download adapter, {format_bytes((record.result or {}).get('adapter_bytes'))}",
            data=lambda: zip_folder(folder),
            file_name=f"adapter_{record.id}.zip",
            mime="application/zip",
            key=f"adapter_{record.id}",
            on_click="ignore",
            type="primary",
            icon=":material/download:",
            disabled=not folder.is_dir(),
        )
        if st.button("Try other ranks", key=f"ranks_{record.id}", icon=":material/grid_on:"):
            name = name_of(Path(record.config["data"]["path"]))
            if name is not None:
                state.remember(state.DATA, name)
            state.open_page("views/sweep.py")


def zip_folder(folder: Path) -> bytes:
    """The files of an adapter as one ZIP; safetensors do not shrink, so they are only stored."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, Path(folder.name) / path.relative_to(folder))
    return buffer.getvalue()


def _stopped(record: RunRecord) -> None:
    step = f"at step {record.last_step:,} of {record.num_steps:,}" if record.last_step else "before its first step"
    if record.status == "failed":
        st.error(f"The run failed {step}: {record.error or 'no reason was written down.'}")
    elif record.status == "cancelled":
        st.info(f"Stopped {step}. Nothing is lost; it can go on from its last checkpoint.")
    else:
        st.warning(f"Interrupted {step}: its worker is gone. It goes on from its last checkpoint when you resume.")
    if st.button("Resume", key=f"resume_{record.id}", type="primary"):
        try:
            cache.ledger().requeue(record.id)
        except InputError as error:  # resumed in another tab
            st.error(str(error))
            return
        LocalExecutor(cache.ledger().home).submit([record.id])
        st.rerun()


def _figures(record: RunRecord, steps: pd.DataFrame) -> None:
    result, prediction = record.result or {}, record.prediction or {}
    speed = result.get("tokens_per_second") or tokens_per_second(steps)
    measured, predicted = result.get("peak_bytes"), prediction.get("peak_bytes")
    kind = PEAK_WORDS.get(str(result.get("peak_kind")), "measured")
    cells: list[tuple[str, str, str]] = [
        ("Evaluation loss", _or_not_yet(record.last_eval_loss), "latest"),
        ("Training loss", _or_not_yet(record.last_train_loss), "latest step"),
        (
            "Speed",
            f"{significant(speed)} tokens/s" if speed else "not yet",
            "whole run" if result else f"latest {RECENT_STEPS} steps",
        ),
        _memory_cell(measured, predicted, kind),
    ]
    figures(cells)


def _or_not_yet(loss: float | None) -> str:
    return "not yet" if loss is None else format_loss(loss)


def _memory_cell(measured: Any, predicted: Any, kind: str) -> tuple[str, str, str]:
    if measured is None:
        return "Peak memory", format_bytes(predicted), "predicted; measured at the end"
    beside = f"; predicted {format_bytes(predicted)}" if predicted else ""
    return "Peak memory", format_bytes(measured), f"{kind}{beside}"


def _before_and_after(record: RunRecord) -> None:
    sample = (record.result or {}).get("sample")
    if not sample:
        return
    st.subheader("The same prompt, before and after", anchor=False)
    text_block([{"text": sample["prompt"], "trained": False}])
    for column, word in zip(st.columns(2), ("before", "after"), strict=True):
        with column:
            st.caption(
                "Base model" if word == "before" else f"With the adapter, after {plural(record.num_steps, 'step')}"
            )
            text = str(sample[word])
            text_block([{"text": text.strip() or "Nothing but blank lines.", "trained": bool(text.strip())}])
