"""Where the state lives."""

import os
from pathlib import Path

import platformdirs


def default_home() -> Path:
    """LORA_EXPLORER_HOME, else the platform's user data folder. Nothing is created."""
    chosen = os.environ.get("LORA_EXPLORER_HOME", "").strip()
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(platformdirs.user_data_dir("lora-explorer", appauthor=False))
