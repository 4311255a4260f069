"""Trace a step in another process, so that whoever asks need not load torch."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from lora_engine.errors import RunFailedError

TIMEOUT_SECONDS = 300


def trace_model(arguments: Sequence[str], *, timeout_seconds: float = TIMEOUT_SECONDS) -> dict[str, Any]:
    """The JSON of `lora-explorer trace ARGUMENTS`. Raises RunFailedError with the one line that says what was wrong."""
    command = [sys.executable, "-m", "lora_engine.cli", "trace", *arguments, "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        raise RunFailedError(f"The trace took longer than {timeout_seconds:.0f} s and was stopped.") from None
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["the trace failed"])[-1]
        raise RunFailedError(line.removeprefix("lora-explorer trace: "))
    traced: dict[str, Any] = json.loads(done.stdout)
    return traced
