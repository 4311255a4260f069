"""The dashboard: page config, the shared sidebar, and the pages."""

from pathlib import Path

import streamlit as st
from widgets import sidebar

st.set_page_config(page_title="LoRA Explorer", layout="wide", page_icon=str(Path(__file__).parent / "icon.svg"))

page = st.navigation(
    [
        st.Page("views/explore.py", title="Explore", icon=":material/straighten:", default=True),
        st.Page("views/finetune.py", title="Fine-tune", icon=":material/model_training:"),
        st.Page("views/sweep.py", title="Sweep", icon=":material/grid_on:"),
        st.Page("views/compare.py", title="Compare", icon=":material/balance:"),
        st.Page("views/runs.py", title="Runs", icon=":material/history:"),
        st.Page("views/accuracy.py", title="Accuracy", icon=":material/target:"),
    ]
)
sidebar()
page.run()
