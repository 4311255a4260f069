"""Pieces of pages: the sidebar that all pages share, charts with their downloads, folds, chips."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import cache
import pandas as pd
import plotly.graph_objects as go
import state
import streamlit as st
from formatting import format_bytes, format_ratio
from model_picker import URL, choose_model, model_word
from state import Settings

from lora_engine import calc
from lora_engine.calc.devices import default_precision
from lora_engine.config import OPTIMIZERS, PRECISIONS, LoraConfig
from lora_engine.errors import InputError

CHART_CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]}


def sidebar() -> Settings:
    """Draw the shared configuration; what comes back is checked and safe to use on every page."""
    state.restore_address()
    with st.sidebar:
        model, unknown = choose_model()
        usual = PRECISIONS.index(default_precision("auto"))
        precision = st.selectbox("Precision", PRECISIONS, index=usual, key=state.PRECISION, bind=URL)
        st.select_slider("Rank (r)", state.RANKS, value=8, key=state.R, bind=URL, on_change=state.keep_ratio_callback)
        st.number_input("Scaling (alpha)", 0.01, 1e6, 16.0, step=1.0, format="%g", key=state.ALPHA, bind=URL)
        ratio = st.container()
        st.toggle("Keep alpha / r when the rank changes", key=state.KEEP_RATIO, bind=URL)
        word, targets = _targets(model)
        more = _more(model)
        card = _card()
        settings = Settings(
            model=model,
            unknown_model=unknown,
            precision=precision,
            card=card,
            r=int(st.session_state[state.R]),
            lora_alpha=float(st.session_state[state.ALPHA]),
            keep_ratio=bool(st.session_state[state.KEEP_RATIO]),
            targets=targets,
            targets_word=word,
            **more,
        )
        sign = "alpha / √r" if settings.use_rslora else "alpha / r"
        ratio.caption(f"Scaling: {sign} = {format_ratio(settings.method.scaling)}")
    st.session_state[state.LAST_R] = settings.r
    st.session_state[state.SETTINGS] = settings
    return settings


def _targets(model: str) -> tuple[str, str | tuple[str, ...]]:
    """(words for a sentence, targets)."""
    choice = st.selectbox(
        "Adapted modules",
        state.TARGET_CHOICES,
        index=state.TARGET_CHOICES.index("all-linear"),
        key=state.TARGETS,
        bind=URL,
        help="attention, mlp, all-linear (both), or own: names or a regular expression, matched as PEFT does.",
    )
    if choice != "own":
        targets: str | tuple[str, ...] = choice
        word = state.TARGET_WORDS[choice]
    else:
        text = st.text_input(
            "Module names or a regular expression", "q_proj,v_proj", key=state.OWN_TARGETS, bind=URL, max_chars=400
        )
        targets, word = calc.parse_targets(text) if text.strip() else "all-linear", text.strip()
    try:
        calc.count_parameters(cache.shape(model), LoraConfig(r=1, target_modules=targets))
    except InputError as error:
        st.error(f"{error} Shown meanwhile: all-linear.")
        return state.TARGET_WORDS["all-linear"], "all-linear"
    return word, targets


def _more(model: str) -> dict[str, Any]:
    longest = cache.shape(model).max_positions
    with st.expander("Batch, length and optimizer"):
        batch = st.number_input("Sequences a micro-batch (batch)", 1, 4096, 8, key=state.BATCH, bind=URL)
        seq = st.number_input("Tokens a sequence, at most", 8, 1_048_576, 128, step=8, key=state.SEQ, bind=URL)
        if longest and seq > longest:
            st.caption(f"Longer than the context of {model_word(model)}, {longest:,} tokens.")
        accumulation = st.number_input(
            "Micro-batches a step (accumulation)", 1, 4096, 1, key=state.ACCUMULATION, bind=URL,
            help="Gradients of so many batches are added up before the weights move. Held all the while.",
        )  # fmt: skip
        optimizer = st.selectbox("Optimizer", OPTIMIZERS, key=state.OPTIMIZER, bind=URL)
        attention = st.selectbox("Attention kernel", ("sdpa", "eager"), key=state.ATTENTION, bind=URL)
        adapter_dtype = st.selectbox(
            "Adapter values", ("fp32", "bf16"), key=state.ADAPTER_DTYPE, bind=URL,
            help="Adapters, their gradients and optimizer states. Usual is fp32, on a half-precision base, too.",
        )  # fmt: skip
        return {
            "batch_size": int(batch),
            "seq_length": int(seq),
            "optimizer": optimizer,
            "attention": attention,
            "accumulation": int(accumulation),
            "adapter_dtype": adapter_dtype,
            "checkpointing": st.toggle("Gradient checkpointing", key=state.CHECKPOINTING, bind=URL),
            "use_rslora": st.toggle("rsLoRA: scale by alpha / √r", key=state.RSLORA, bind=URL),
            "use_dora": st.toggle("DoRA: train magnitudes too", key=state.DORA, bind=URL),
        }


def _card() -> str:
    known = cache.cards()
    return str(
        st.selectbox(
            "Card to fit on",
            list(known),
            index=min(range(len(known)), key=lambda i: abs(list(known.values())[i] - 12 * 2**30)),
            key=state.CARD,
            bind=URL,
        )
    )


def show_chart(figure: go.Figure, table: pd.DataFrame, *, name: str, alt: str) -> None:
    """A chart, its text for those who cannot see it, and its data to take away."""
    st.plotly_chart(figure, key=f"chart_{name}", alt=alt, config=CHART_CONFIG)
    download_table(table, name)


def download_table(table: pd.DataFrame, name: str, label: str = "Download data") -> None:
    """A quiet button; the CSV is written when it is clicked."""
    st.download_button(
        label,
        data=lambda: table.to_csv(index=False).encode(),
        file_name=f"{name}.csv",
        mime="text/csv",
        key=f"download_{name}",
        on_click="ignore",
        type="tertiary",
        icon=":material/download:",
        disabled=table.empty,
    )


def explain(what: str, formula: Callable[[], None]) -> None:
    """Two folds: the plain words, and the maths with its source."""
    left, right = st.columns(2)
    with left.expander("What is this?"):
        st.markdown(what)
    # Drawn when it is opened: the browser then loads its maths renderer for those who ask.
    fold = right.expander("The formula", key="formula", on_change="rerun")
    if fold.open:
        with fold:
            formula()


def empty_state(text: str, button: str, key: str) -> bool:
    """What will be here and the one button that makes it so; True when it was clicked."""
    with st.container(border=True):
        st.markdown(text)
        return st.button(button, type="primary", key=key)


VERDICTS = {"yes": ("✓", "#009E73"), "tight": ("~", "#E69F00"), "no": ("✕", "#D55E00")}


def card_words(row: Mapping[str, Any]) -> str:
    """What a card can do, in a few words; `row` has verdict and max_batch."""
    largest = row["max_batch"]
    if not largest:
        return "does not fit, not even one sequence"
    if row["verdict"] == "no":
        return f"not this batch; at most {largest:,}"
    return f"{'fits' if row['verdict'] == 'yes' else 'tight'}; largest batch {largest:,}"


def card_chips(rows: list[dict[str, Any]], chosen: str) -> None:
    """One chip a card; the words say what the colour says."""
    chips = []
    for row in rows:
        sign, colour = VERDICTS[row["verdict"]]
        weight = "2px" if row["name"] == chosen else "1px"
        name = f'<b><span style="color:{colour}">{sign}</span> {escape(row["name"])}</b>'
        chips.append(
            f'<li style="border:{weight} solid {colour}" title="{format_bytes(row["memory_bytes"])}">'
            f"{name}<span>{card_words(row)}</span></li>"
        )
    st.html(
        "<style>ul.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(12.5rem,47%),1fr));gap:.6rem;"
        "list-style:none;margin:0;padding:0}ul.cards li{margin:0;padding:.5rem .7rem;border-radius:6px;"
        "font-size:.87rem;line-height:1.4}ul.cards li>*{display:block}ul.cards b span{display:inline}</style>"
        f'<ul class="cards">{"".join(chips)}</ul>'
    )


def text_block(segments: Sequence[Mapping[str, Any]]) -> None:
    """Text as it is, line breaks kept; segments with "trained" are highlighted."""
    parts = [
        f'<mark class="trained">{escape(part["text"])}</mark>' if part["trained"] else escape(part["text"])
        for part in segments
    ]
    st.html(
        "<style>.text-block{white-space:pre-wrap;overflow-wrap:anywhere;max-height:18rem;overflow-y:auto;"
        "padding:.8rem 1rem;border:1px solid #8a8f9455;border-radius:6px;font-size:.93rem;line-height:1.55}"
        ".text-block mark.trained{background:#E69F0038;color:inherit;border-radius:3px;"
        "box-shadow:0 1px 0 0 #E69F00}</style>"
        f'<div class="text-block">{"".join(parts)}</div>'
    )


def figures(cells: Sequence[tuple[str, str, str]]) -> None:
    """A row of readings: (what it is, value with its unit, where it is from)."""
    parts = "".join(
        f'<div><dt>{escape(what)}</dt><dd class="value">{escape(value)}</dd><dd>{escape(note)}</dd></div>'
        for what, value, note in cells
    )
    st.html(
        "<style>dl.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.8rem 0;"
        "margin:.4rem 0;padding:0;font-variant-numeric:tabular-nums}dl.figures div{padding:0 .9rem;"
        "border-left:1px solid #8a8f9455}dl.figures dt,dl.figures dd{margin:0;font-size:.87rem;opacity:.75}"
        "dl.figures dd.value{font-size:1.35rem;font-weight:650;line-height:1.35;opacity:1}</style>"
        f'<dl class="figures">{parts}</dl>'
    )
