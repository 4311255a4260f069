"""What a sweep took and what early exit saved, in sentences. Tables in, text out."""

from typing import Protocol

import pandas as pd
from charts.heatmap import is_dropped
from formatting import format_duration, format_loss, format_number, format_percent, plural

from lora_engine.sweeps import (
    EarlyExitBill,
    SweepSpec,
    estimate_alone_seconds,
    estimate_packed_sweep_seconds,
    estimate_sweep_seconds,
    find_throughput,
    pack_refusal,
)


class Cell(Protocol):
    """A configuration of the grid."""

    def __getitem__(self, key: str, /) -> float: ...


def took_seconds(frame: pd.DataFrame) -> float | None:
    """From the first start to the last end of a sweep's runs; None when none has ended.

    Not known, too, when runs that early exit had dropped were trained to the end later: nobody wrote the pause down."""
    ended = frame[frame["finished_seconds"].notna() & frame["started_seconds"].notna()]
    if ended.empty or ((ended["status"] == "done") & ended["early_exit_step"].notna()).any():
        return None
    return float(ended["finished_seconds"].max() - ended["started_seconds"].min())


def sequential_estimate(spec: SweepSpec, frame: pd.DataFrame, earlier: pd.DataFrame) -> tuple[float, str]:
    """(seconds for the whole grid one run after another, what that is taken from): from the speed-up that was
    measured before packing, else from earlier runs, else the stated guess."""
    seconds = estimate_alone_seconds(spec, frame)
    if seconds is not None:
        return seconds, "from the speed-up measured before packing"
    throughput = find_throughput(spec.base, earlier)
    return estimate_sweep_seconds(spec, throughput=throughput), throughput.basis


def time_sentence(spec: SweepSpec | None, frame: pd.DataFrame, earlier: pd.DataFrame) -> str:
    """What the grid took, beside what it would take one run after another, and how many runs shared a pass."""
    done = int((frame["status"] == "done").sum())
    runs = plural(len(frame), "run") if done == len(frame) else f"{done} of {plural(len(frame), 'run')} to the end"
    seconds = took_seconds(frame)
    if seconds is None:
        head = f"{runs}, {format_duration(float(frame['seconds'].sum()))} of training steps in all"
    else:
        head = f"{runs} in {format_duration(seconds)}"
    shared = shared_words(frame)
    if not shared:
        return f"**{head}**, one after another."
    if spec is None:
        return f"**{head}**. {shared}"
    estimate, basis = sequential_estimate(spec, frame, earlier)
    basis = basis if basis.startswith("a guess") else f"estimate {basis}"
    whole = "the whole grid " if done < len(frame) else ""
    return f"**{head}**; {whole}one after another about {format_duration(estimate)} ({basis}). {shared}"


def shared_words(frame: pd.DataFrame) -> str:
    """How many runs shared each pass; empty when none did."""
    sizes = frame["pack_size"].where(frame["pack_size"] > 1).dropna()
    if sizes.empty:
        return ""
    low, high = int(sizes.min()), int(sizes.max())
    many = f"{high} runs" if low == high else f"{low} to {high} runs"
    alone = int((frame["pack_size"] == 1).sum())
    # Packs shrink where runs are dropped, and what is known is the last one.
    when = "At the end " if frame["early_exit_step"].notna().any() else ""
    return f"{when}{many} shared each pass over the base" + (f"; {alone} went alone." if alone else ".")


def reason_words(frame: pd.DataFrame) -> str:
    """Why so many runs shared a pass, or none did; empty when nobody wrote it down."""
    said = frame["pack_reason"].dropna()
    reasons = said[~said.str.startswith("packed is")].value_counts()  # that was asked for, not found
    return "" if reasons.empty else f"{reasons.index[0][:1].upper()}{reasons.index[0][1:]}."


def predicted_words(spec: SweepSpec, earlier: pd.DataFrame) -> str:
    """What a grid will take, before it starts."""
    throughput = find_throughput(spec.base, earlier)
    alone = f"one after another about {format_duration(estimate_sweep_seconds(spec, throughput=throughput))}"
    reason = pack_refusal(spec.base)
    if reason is not None:
        return f"{alone} ({throughput.basis}). They cannot share passes: {reason}"
    packed = estimate_packed_sweep_seconds(spec, earlier)
    if packed is None:
        return f"{alone} ({throughput.basis}), less where runs can share passes"
    how = "sharing passes" + (" and stopping the worst half early" if spec.early_exit else "")
    return f"{how} about {format_duration(packed.seconds)} ({packed.basis}); {alone} ({throughput.basis})"


def bill_sentence(bill: EarlyExitBill) -> str:
    """Was the best one dropped, what did that cost, what did it save."""
    share = format_percent(100 * bill.steps_saved / max(1, bill.steps_planned))
    time = "" if bill.seconds_saved is None else f", about {format_duration(bill.seconds_saved)} in steps"
    if not bill.complete:
        return (
            f"Early exit stopped {bill.num_dropped} of {plural(bill.num_runs, 'run')} and left out {share} of the "
            f"steps{time}. Whether the best of them was among those is not known: nobody trained them to the end."
        )
    saved = f"{share} of the steps{time}"
    if bill.best is None or bill.best_kept is None:
        return f"Early exit left out {saved}; what it cost in loss cannot be told, as not every run ended with a loss."
    if not bill.best_was_dropped:
        return (
            f"Checked against the full grid: early exit kept the best, {cell_words(bill.best)}, "
            f"so it gave up nothing and saved {saved}."
        )
    return (
        f"Checked against the full grid: early exit had dropped the best, {cell_words(bill.best)}. "
        f"What it kept reaches {format_loss(bill.best_kept['eval_loss'])}, so it gave up "
        f"{_regret(bill.regret or 0.0)} to save {saved}."
    )


def cell_words(cell: Cell) -> str:
    """A configuration and its loss."""
    return (
        f"rank {format_number(cell['r'])}, alpha {format_number(cell['lora_alpha'])} at learning rate "
        f"{format_number(cell['lr'])} ({format_loss(cell['eval_loss'])})"
    )


def _regret(value: float) -> str:
    return f"{value:.2f} of loss" if value >= 0.1 else f"{value:.2g} of loss"


def status_words(frame: pd.DataFrame) -> "pd.Series[str]":
    """Each run's status for the table; where early exit stopped it, at which step."""
    return frame["status"].where(
        ~is_dropped(frame), "dropped at step " + frame["early_exit_step"].map(lambda step: f"{step:.0f}")
    )
