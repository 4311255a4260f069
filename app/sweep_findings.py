"""What a sweep found: the advice, the charts, the table of its runs."""

from dataclasses import dataclass

import cache
import charts
import pandas as pd
import streamlit as st
from formatting import MIB, format_bytes, format_number
from sweep_words import reason_words, status_words, time_sentence
from widgets import download_table, show_chart

from lora_engine.config import LoraConfig
from lora_engine.errors import InputError
from lora_engine.runs import runs_frame
from lora_engine.sweeps import Advice, SweepSpec, advise, best_over, summarize_cells

TABLE_COLUMNS = {
    "run_id": st.column_config.TextColumn("Run"),
    "status": st.column_config.TextColumn("Status"),
    "r": st.column_config.NumberColumn("Rank (r)", format="%d"),
    "lora_alpha": st.column_config.NumberColumn("alpha", format="%g"),
    "lr": st.column_config.NumberColumn("Learning rate", format="%g"),
    "seed": st.column_config.NumberColumn("Seed"),
    "trainable_parameters": st.column_config.NumberColumn("Trainable", format="localized"),
    "eval_loss_before": st.column_config.NumberColumn("Loss before", format="%.3f"),
    "eval_loss_after": st.column_config.NumberColumn("Loss after", format="%.3f"),
    "early_exit_loss": st.column_config.NumberColumn("Loss when dropped", format="%.3f"),
    "seconds": st.column_config.NumberColumn("Seconds", format="%.1f"),
    "pack_size": st.column_config.NumberColumn("Runs a pass", format="%d"),
    "peak_mib": st.column_config.NumberColumn("Peak memory", format="%.1f MiB"),
}
OPTIONAL = ("early_exit_loss", "pack_size")  # only where there is something to say
BEST = "best"
MISLEADING = (
    "**One learning rate for all is misleading.** With alpha / r scaling alpha acts much like a learning rate, so "
    "here a rank or an alpha can look good only because {rate} suits it: compare them at the best rate of each."
)
# Text of the theme (config.toml), for a chart that cannot ask for it.
INK = {"light": "#1D2326", "dark": "#E7E5E0"}
ISO_WORDS = {"alpha / r": 1.0, "alpha / √r": 0.5}


@dataclass(frozen=True)
class SweepView:
    """A sweep on the page; `spec` is None when it cannot be read."""

    sweep_id: str
    spec: SweepSpec | None

    @property
    def uses_rslora(self) -> bool:
        method = self.spec.base.method if self.spec else None
        return isinstance(method, LoraConfig) and method.use_rslora


def answer(frame: pd.DataFrame, view: SweepView) -> Advice | None:
    """The advice in one sentence, and what it took; None, with the reason on the page, when there is none."""
    try:
        advice = advise(frame)
    except InputError as error:
        st.info(str(error))
        return None
    st.subheader(advice.reason, anchor=False)
    st.caption(
        f"Best at that rank: alpha {format_number(advice.lora_alpha)}, learning rate {format_number(advice.lr)}."
    )
    st.markdown(time_sentence(view.spec, frame, runs_frame(cache.ledger())))
    if reason := reason_words(frame):
        st.caption(reason)
    return advice


def evidence(frame: pd.DataFrame, view: SweepView, advice: Advice | None) -> None:
    """The charts, and the table of all runs."""
    rate = choose_rate(frame, view)
    if advice is not None:
        left, right = st.columns(2, gap="large")
        with left:
            _loss_by_rank(frame, view, advice, rate)
        with right:
            _pareto(frame, view)
    heatmap(frame, view, rate)
    if advice is not None:
        _costs(frame, view)
    _table(frame, view)


def choose_rate(frame: pd.DataFrame, view: SweepView) -> float | None:
    """Best over the learning rate (None), or one rate for all, with a word of warning."""
    rates = sorted({float(lr) for lr in frame["lr"].dropna()})
    if len(rates) < 2:
        return None
    choice = st.segmented_control(
        "Learning rate",
        [BEST, *rates],
        default=BEST,
        required=True,
        format_func=lambda value: "best for each" if value == BEST else format_number(float(value)),
        key=f"rate_{view.sweep_id}",
    )
    if not isinstance(choice, float):
        return None
    rate = choice
    st.warning(MISLEADING.format(rate=format_number(rate)), icon=":material/warning:")
    return rate


def at_rate(frame: pd.DataFrame, rate: float | None) -> pd.DataFrame:
    """The runs of one learning rate; all for None."""
    return frame if rate is None else frame[frame["lr"] == rate]


def heatmap(frame: pd.DataFrame, view: SweepView, rate: float | None) -> None:
    """Loss over rank and alpha, with lines of equal scaling."""
    rows = at_rate(frame, rate)
    st.subheader(
        "Loss over rank and alpha" + (f" at learning rate {format_number(rate)}" if rate else ""), anchor=False
    )
    word = st.segmented_control(
        "Lines of equal",
        list(ISO_WORDS),
        default="alpha / √r" if view.uses_rslora else "alpha / r",
        required=True,
        key=f"iso_{view.sweep_id}",
    )
    table = charts.heatmap_table(rows, best_over(rows, ("r", "lora_alpha")))
    iso = charts.iso_table(table["r"], table["lora_alpha"], power=ISO_WORDS[str(word)])
    of_rates = "best over the learning rate" if rate is None else f"at learning rate {format_number(rate)}"
    show_chart(
        charts.plot_heatmap(table, iso=iso, iso_word=str(word), ink=INK.get(str(st.context.theme.type))),
        table,
        name=f"heatmap_{view.sweep_id}",
        alt=f"Evaluation loss by rank and alpha, {of_rates} and averaged over seeds; dotted lines join points of "
        f"equal {word}.",
    )
    words = [
        "Each cell: "
        + ("the best learning rate" if rate is None else f"learning rate {format_number(rate)}")
        + ", mean over seeds.",
        f"Dotted lines: equal {word}, with its value at the end; along them the update has the same scale.",
    ]
    if (table["state"] == "so far").any():
        words.append("Pale cells are not finished: their latest evaluation, and the share of their steps.")
    if (table["dropped"] > 0).any():
        words.append("✕: all of the cell was stopped early, at that step.")
    st.caption(" ".join(words))


def _loss_by_rank(frame: pd.DataFrame, view: SweepView, advice: Advice, rate: float | None) -> None:
    st.subheader("Loss against rank" + (f" at learning rate {format_number(rate)}" if rate else ""), anchor=False)
    table = advice.table if rate is None else best_over(at_rate(frame, rate), "r")
    over = "alpha and learning rate" if rate is None else f"alpha at learning rate {format_number(rate)}"
    show_chart(
        charts.plot_loss_by_rank(table, recommended=advice.r if rate is None else None, rate=rate),
        table,
        name=f"loss_by_rank_{view.sweep_id}",
        alt=f"Evaluation loss against rank, best over {over}. {advice.reason}",
    )


def _pareto(frame: pd.DataFrame, view: SweepView) -> None:
    st.subheader("Loss against trainable parameters", anchor=False)
    table = charts.pareto_table(summarize_cells(frame))
    show_chart(
        charts.plot_pareto(table),
        table,
        name=f"pareto_{view.sweep_id}",
        alt="Evaluation loss against trainable parameters; a line joins what nothing smaller beats.",
    )


def _costs(frame: pd.DataFrame, view: SweepView) -> None:
    costs = charts.cost_by_rank_table(frame)
    shared = bool((costs["shared"] > 0).any())
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Time against rank", anchor=False)
        show_chart(
            charts.plot_time_by_rank(costs),
            costs,
            name=f"time_{view.sweep_id}",
            alt="Measured seconds a run against rank, median with the fastest and the slowest run.",
        )
        if shared:
            st.caption(
                "Runs that shared their passes: each is given an equal share of its pack's time, whatever its rank. "
                "So this shows what a run cost in this sweep, not what its rank would cost alone."
            )
    with right:
        st.subheader("Memory against rank", anchor=False)
        show_chart(
            charts.plot_memory_by_rank(costs),
            costs,
            name=f"memory_{view.sweep_id}",
            alt="Peak memory against rank, measured beside predicted.",
        )
        if shared:
            peak = costs["pack_peak_bytes"].max()
            pack = f" A whole pack took {format_bytes(float(peak))} at its peak." if pd.notna(peak) else ""
            st.caption(f"Measured and predicted alone: one training step of one run of that rank by itself.{pack}")


def _table(frame: pd.DataFrame, view: SweepView) -> None:
    st.subheader("Every run", anchor=False)
    shown = frame.assign(peak_mib=frame["peak_bytes"] / MIB, status=status_words(frame))
    columns = [name for name in TABLE_COLUMNS if name not in OPTIONAL or shown[name].notna().any()]
    st.dataframe(shown[columns], hide_index=True, column_config={name: TABLE_COLUMNS[name] for name in columns})
    download_table(frame, f"sweep_{view.sweep_id}", "Export CSV")
