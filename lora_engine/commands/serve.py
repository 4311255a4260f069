"""app: the dashboard."""

import argparse
import os
import subprocess
import sys

from lora_engine.assets_path import app_path
from lora_engine.commands.requests import Output
from lora_engine.errors import ConfigError, RunFailedError


def app(arguments: argparse.Namespace) -> Output:
    """Serve the dashboard until interrupted; loopback only."""
    if not 1 <= arguments.port <= 65535:
        raise ConfigError("port", arguments.port, "a whole number from 1 to 65535")
    script = app_path()
    command = [sys.executable, "-P", "-m", "streamlit", "run", str(script), "--server.port", str(arguments.port)]
    command += ["--server.headless", "true" if arguments.no_browser else "false"]
    # Streamlit reads .streamlit/config.toml of the working folder: the one beside main.py holds everywhere.
    # One BLAS thread keeps the small matrices of a page from fighting over the cores of a running fine-tune.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    try:
        code = subprocess.run(command, cwd=script.parent, env=environment, check=False).returncode
    except KeyboardInterrupt:
        code = 0
    if code not in (0, -2, 130):
        raise RunFailedError(f"The dashboard stopped with exit code {code}; is port {arguments.port} in use?")
    return None, ""
