"""The counts behind the headline: every adapted module, and the other methods on the same model."""

from typing import Any

import cache
import streamlit as st
from state import Settings
from widgets import download_table

COLUMNS: dict[str, Any] = {
    "name": "Module",
    "count": st.column_config.NumberColumn("How many", format="localized"),
    "in_features": st.column_config.NumberColumn("In", format="localized"),
    "out_features": st.column_config.NumberColumn("Out", format="localized"),
    "trainable_parameters": st.column_config.NumberColumn("Trainable parameters", format="localized"),
    "formula": st.column_config.TextColumn("How it is counted", width="large"),
}
METHOD_COLUMNS: dict[str, Any] = {
    "method": "Method",
    "trainable_parameters": st.column_config.NumberColumn("Trainable parameters", format="localized"),
    "trainable_percent": st.column_config.NumberColumn("Share of the model", format="%.3g %%"),
    "formula": st.column_config.TextColumn("How it is counted", width="large"),
}
METHOD_WORDS = {
    "lora": "LoRA, as set",
    "full": "Full fine-tuning",
    "head": "Output head alone",
    "bottleneck": "Bottleneck adapters (h / 16)",
    "prefix": "Prefix (16 positions)",
    "ia3": "(IA)³ scales",
}


def show_counts(settings: Settings) -> None:
    """Two folds, drawn when they are opened, so the browser need not load their tables for the first chart."""
    fold = st.expander("Every adapted module", key="modules", on_change="rerun")
    if fold.open:
        with fold:
            modules = cache.module_table(settings.model, settings.method)
            st.dataframe(modules, hide_index=True, column_config=COLUMNS)
            for note in modules.attrs["notes"]:
                st.caption(note)
            download_table(modules, "modules")
    fold = st.expander("Other methods on this model", key="methods", on_change="rerun")
    if fold.open:
        with fold:
            methods = cache.methods_table(settings.model, settings.method)
            shown = methods.assign(method=methods["method"].map(METHOD_WORDS))
            st.dataframe(shown, hide_index=True, column_config=METHOD_COLUMNS)
            download_table(methods, "methods")


def rank_notes(settings: Settings) -> None:
    """What counting has to say about the rank, beside the figures."""
    for note in cache.module_table(settings.model, settings.method).attrs["notes"]:
        if note.startswith("Rank "):
            st.caption(f":material/info: {note}")
