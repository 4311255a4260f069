"""Choosing the base model: from the catalog, by a path, or by dropping in its config.json."""

from pathlib import Path
from typing import Literal

import cache
import state
import streamlit as st
from formatting import plural

from lora_engine import calc
from lora_engine.errors import InputError, UnknownArchitectureError
from lora_engine.runs import store_config

URL: Literal["query-params"] = "query-params"
MAX_CONFIG_BYTES = 5_000_000  # as much as the calculator reads
# Streamlit's own instructions name the server's limit; the caption names what is read.
HIDE_INSTRUCTIONS = "<style>[data-testid=stFileUploaderDropzoneInstructions]{display:none}</style>"


def choose_model() -> tuple[str, str]:
    """(a model that the formulas know, one that they do not know or "")."""
    model = st.selectbox(
        "Base model",
        cache.model_names(),
        key=state.MODEL,
        bind=URL,
        accept_new_options=True,
        on_change=lambda: st.session_state.update({state.CONFIG_ERROR: None}),
        help="The embedded model needs no network. Or pick a well-known one, or type a folder with a config.json.",
    )
    _own_config()
    try:
        shape = cache.shape(model)
    except UnknownArchitectureError as error:
        said = str(error).partition("; allowed")[0]
        st.warning(f"{said}, which the formulas do not know. Explore can trace it; shown here: the embedded model.")
        return "embedded", str(model)
    except InputError as error:
        st.error(f"{error} Shown meanwhile: the embedded model.")
        return "embedded", ""
    word = model_word(str(model))
    if word != model and model != "embedded":  # a path, of which the box shows the start alone
        st.caption(f"{word}: {shape.architecture}, {plural(shape.num_layers, 'layer')}")
    return str(model), ""


def _own_config() -> None:
    # Drawn when it is opened: the first page need not wait for the browser to load an uploader that few use.
    fold = st.expander("Your own config.json", key="own_config", on_change="rerun")
    if fold.open:
        with fold:
            st.html(HIDE_INSTRUCTIONS)
            st.file_uploader(
                "Drop a model's config.json, or choose it",
                type=["json"],
                key=state.CONFIG_UPLOAD,
                on_change=take_config,
            )
            st.caption(
                f"At most {MAX_CONFIG_BYTES / 1e6:.0f} MB. It stays on this machine. "
                "A folder or file that is here already: type its path above."
            )
    if st.session_state.get(state.CONFIG_ERROR):
        st.error(st.session_state[state.CONFIG_ERROR])


def take_config() -> None:
    """A config.json was dropped: it becomes the model, kept at home, or a sentence says what is wrong."""
    upload = st.session_state[state.CONFIG_UPLOAD]
    st.session_state[state.CONFIG_ERROR] = None
    if upload is None:
        return
    if upload.size > MAX_CONFIG_BYTES:
        st.session_state[state.CONFIG_ERROR] = (
            f"{upload.name} has {upload.size / 1e6:.1f} MB; at most {MAX_CONFIG_BYTES / 1e6:.0f} MB are read: "
            "a config.json has a few thousand bytes."
        )
        return
    content = upload.getvalue()
    folder = store_config(cache.ledger().home, content)
    try:
        calc.load_shape(str(folder))
    except UnknownArchitectureError:
        pass  # the page offers to trace it
    except InputError as error:
        (folder / "config.json").unlink()
        sentence = str(error).replace(str(folder / "config.json"), upload.name).replace(folder.name, upload.name)
        st.session_state[state.CONFIG_ERROR] = sentence
        return
    st.session_state[state.MODEL] = str(folder)


def model_word(model: str) -> str:
    """How a model is called in a sentence."""
    if model == "embedded":
        return "the embedded model"
    path = Path(model)
    if path.is_absolute() or model.startswith(("~", ".")):
        return path.parent.name if path.name == "config.json" else path.name
    return model
