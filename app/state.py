"""Every session_state key of the dashboard, and the settings that all pages share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from lora_engine.config import LoraConfig, MethodConfig

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ALPHAS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
TARGET_CHOICES = ("attention", "mlp", "all-linear", "own")
TARGET_WORDS = {"attention": "the attention layers", "mlp": "the MLP layers", "all-linear": "all linear layers"}

# Widgets of the sidebar; their keys are the names in the address bar.
MODEL, PRECISION, CARD = "model", "precision", "card"
R, ALPHA, KEEP_RATIO = "r", "lora_alpha", "keep_ratio"
TARGETS, OWN_TARGETS = "targets", "own_targets"
BATCH, SEQ, OPTIMIZER, CHECKPOINTING, ATTENTION = "batch", "seq", "optimizer", "checkpointing", "attention_kernel"
ACCUMULATION, ADAPTER_DTYPE = "accumulation", "adapter_dtype"
RSLORA, DORA = "rslora", "dora"
BOUND = (
    MODEL, PRECISION, CARD, R, ALPHA, KEEP_RATIO, TARGETS, OWN_TARGETS,
    BATCH, SEQ, ACCUMULATION, OPTIMIZER, CHECKPOINTING, ATTENTION, ADAPTER_DTYPE, RSLORA, DORA,
)  # fmt: skip

# Kept between reruns, not widgets.
SETTINGS = "_settings"
RESTORE = "_restore_address"
LAST_R = "_last_r"
DIAL = "_dial"
CONFIG_UPLOAD, CONFIG_ERROR = "config_upload", "_config_error"
TRACES = "_traces"
DATA = "data"
RUN = "run"
SWEEP = "sweep"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the sidebar says, already checked: nothing in here raises later.

    `unknown_model` is a model that is there and whose architecture the formulas do not know; `model` is the embedded
    one then."""

    model: str = "embedded"
    unknown_model: str = ""
    precision: str = "fp32"
    card: str = ""
    r: int = 8
    lora_alpha: float = 16.0
    keep_ratio: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    targets_word: str = "all linear layers"
    batch_size: int = 8
    seq_length: int = 128
    optimizer: str = "adamw"
    checkpointing: bool = False
    attention: str = "sdpa"
    accumulation: int = 1
    adapter_dtype: str = "fp32"
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def method(self) -> LoraConfig:
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            target_modules=self.targets,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    @property
    def memory_options(self) -> dict[str, Any]:
        """Keyword arguments of `estimate_memory`, without the precision."""
        return {
            "batch_size": self.batch_size,
            "seq_length": self.seq_length,
            "optimizer": self.optimizer,
            "checkpointing": self.checkpointing,
            "attention": self.attention,
            "accumulation": self.accumulation,
            "adapter_dtype": self.adapter_dtype,
        }


def current() -> Settings:
    """The settings of this rerun."""
    settings: Settings = st.session_state.get(SETTINGS, Settings())
    return settings


def keep_ratio_callback() -> None:
    """Rank was changed by hand: with the ratio kept, alpha follows."""
    last = st.session_state.get(LAST_R)
    if st.session_state.get(KEEP_RATIO) and last:
        st.session_state[ALPHA] = float(st.session_state[ALPHA]) * st.session_state[R] / last


def apply_dial() -> None:
    """The dial was released: its rank and alpha become the sidebar's."""
    released = st.session_state[DIAL].get("released")
    if released:
        st.session_state[R] = int(released["r"])
        st.session_state[ALPHA] = float(released["lora_alpha"])


# Argument of `estimate_memory` -> widget of the sidebar.
WIDGETS = {
    "precision": PRECISION, "batch_size": BATCH, "seq_length": SEQ, "accumulation": ACCUMULATION,
    "optimizer": OPTIMIZER, "checkpointing": CHECKPOINTING, "attention": ATTENTION, "adapter_dtype": ADAPTER_DTYPE,
}  # fmt: skip


def apply_change(method: MethodConfig, settings: Mapping[str, Any]) -> None:
    """A suggested change was taken: the sidebar follows. To be called before its widgets are drawn."""
    for argument, value in settings.items():
        st.session_state[WIDGETS[argument]] = value
    if not isinstance(method, LoraConfig):
        return
    st.session_state[R] = method.r
    keep_ratio_callback()
    if isinstance(method.target_modules, str) and method.target_modules in TARGET_CHOICES:
        st.session_state[TARGETS] = method.target_modules


def recall(key: str) -> str | None:
    """A name kept in the address bar, or, after a change of page, in the session."""
    value = st.query_params.get(key) or st.session_state.get(f"_{key}")
    if value:
        remember(key, value)
    return value or None


def remember(key: str, value: str | None) -> None:
    """Keep `value` in the session and in the address bar; None forgets it."""
    st.session_state[f"_{key}"] = value
    if value is None:
        st.query_params.pop(key, None)
    elif st.query_params.get(key) != value:
        st.query_params[key] = value


def open_page(script: str) -> None:
    """Leave for another page; what is remembered and set goes with the person.

    Streamlit refuses to clear an address bar that holds the sidebar's settings, and takes no bound
    ones: they are left out here and written back by `restore_address`."""
    kept = {key: value for key in (DATA, RUN, SWEEP) if (value := st.session_state.get(f"_{key}"))}
    st.session_state[RESTORE] = True
    st.switch_page(script, query_params=kept)


def restore_address() -> None:
    """After `open_page`: set every bound setting to what it is, which puts it back into the address bar."""
    if st.session_state.pop(RESTORE, False):
        for key in BOUND:
            if key in st.session_state:
                st.session_state[key] = st.session_state[key]
