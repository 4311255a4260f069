"""One function a command: parsed arguments -> (JSON payload, text for people).

`COMMANDS` names the module that holds each one, so that a command imports what it needs and no more: the dashboard
is on the screen a third of a second sooner for not loading pandas in the process that only starts the server."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

COMMANDS = {
    "app": "serve",
    "count": "calculator",
    "memory": "calculator",
    "trace": "tracing",
    "data": "calculator",
    "train": "work",
    "sweep": "work",
    "compare": "compare",
    "generate": "work",
    "pretrain": "work",
    "runs": "history",
}


def find_command(name: str) -> Callable[..., Any]:
    """The function behind a command's name."""
    function: Callable[..., Any] = getattr(import_module(f"lora_engine.commands.{COMMANDS[name]}"), name)
    return function
