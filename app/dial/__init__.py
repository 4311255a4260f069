"""The live dial: rank and alpha as range inputs that redraw figures, drawing and memory bar while held.

The browser looks every figure up in a table that the engine computed (`dial.table`); on release one
message goes to the server and the charts follow."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import streamlit as st

_HERE = Path(__file__).parent


@cache
def _component() -> Callable[..., Any]:
    html, css, js = ((_HERE / f"dial.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    return st.components.v2.component("lora_explorer_dial", html=html, css=css, js=js)


def mount(table: Mapping[str, Any], *, key: str, on_release: Callable[[], None]) -> None:
    """Show the dial. `on_release` runs when a dial was let go; `st.session_state[key]["released"]` then holds
    `{"r": int, "lora_alpha": float}`."""
    _component()(key=key, data=dict(table), on_released_change=on_release)
