"""app: the dashboard."""

import argparse
import inspect
import os
import threading
from importlib import import_module
from pathlib import Path

from lora_engine.assets_path import app_path
from lora_engine.errors import ConfigError, RunFailedError

# What the first page imports and the server itself does not, slowest first.
PAGE_IMPORTS = ("pandas", "lora_engine.calc", "lora_engine.runs")
# About what the server needs to answer; too long or too short costs a little time and nothing else.
SERVER_START_SECONDS = 0.3


def app(arguments: argparse.Namespace) -> tuple[None, str]:
    """Serve the dashboard until interrupted; loopback only."""
    if not 1 <= arguments.port <= 65535:
        raise ConfigError("port", arguments.port, "a whole number from 1 to 65535")
    script = app_path()
    # One BLAS thread keeps the small matrices of a page from fighting over the cores of a running fine-tune.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if home := os.environ.get("LORA_EXPLORER_HOME"):
        os.environ["LORA_EXPLORER_HOME"] = str(Path(home).expanduser().absolute())
    # Streamlit reads .streamlit/config.toml of the working folder: the one beside main.py holds everywhere.
    os.chdir(script.parent)
    from streamlit.web import cli

    # While the browser loads its scripts the server has nothing else to do; before it answers, this would delay it.
    early = threading.Timer(SERVER_START_SECONDS, _warm_up)
    early.daemon = True
    early.start()
    command = ["run", str(script), "--server.port", str(arguments.port)]
    command += ["--server.headless", "true" if arguments.no_browser else "false"]
    try:
        cli.main(command, standalone_mode=False)
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise RunFailedError(
                f"The dashboard stopped with exit code {stop.code}; is port {arguments.port} in use?"
            ) from None
    return None, ""


def _warm_up() -> None:
    for name in PAGE_IMPORTS:
        import_module(name)
    # Once each, 0.1 s: plotly imports what a figure is made of, and `inspect` finds the file of every module, for
    # Streamlit's first element, which asks who called it.
    import_module("plotly.graph_objects").Figure()
    inspect.stack()
