"""Ids of runs and sweeps: `r` or `s`, 8 characters of time, 6 of chance, all lower case base 36.

Short, safe in URLs and file names on every system, sortable by age, and not to be guessed from
another one. An id from outside is checked here before it touches a path or a query."""

import re
import secrets
import threading
import time

from lora_engine.errors import NotFoundError

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_TIME_WIDTH, _CHANCE_WIDTH = 8, 6
_PATTERN = re.compile(rf"[rs][0-9a-z]{{{_TIME_WIDTH + _CHANCE_WIDTH}}}", re.ASCII)

_lock = threading.Lock()
_last_milliseconds = 0


def new_id(kind: str) -> str:
    """A new id, `kind` "r" (run) or "s" (sweep). Within a process each sorts after the one before."""
    global _last_milliseconds
    with _lock:
        _last_milliseconds = max(time.time_ns() // 1_000_000, _last_milliseconds + 1)
        moment = _last_milliseconds
    chance = "".join(secrets.choice(_DIGITS) for _ in range(_CHANCE_WIDTH))
    return kind + _base36(moment, _TIME_WIDTH) + chance


def check_run_id(run_id: object) -> str:
    """`run_id` itself when it looks like the id of a run. Raises NotFoundError."""
    if not isinstance(run_id, str) or not _PATTERN.fullmatch(run_id) or run_id[0] != "r":
        raise missing("run", run_id)
    return run_id


def check_sweep_id(sweep_id: object) -> str:
    """`sweep_id` itself when it looks like the id of a sweep. Raises NotFoundError."""
    if not isinstance(sweep_id, str) or not _PATTERN.fullmatch(sweep_id) or sweep_id[0] != "s":
        raise missing("sweep", sweep_id)
    return sweep_id


def missing(kind: str, value: object) -> NotFoundError:
    """The error for an id that names nothing."""
    shown = repr(value)
    return NotFoundError(f"{kind} is {shown[:60]}; allowed: the id of a {kind} in this ledger.")


def _base36(number: int, width: int) -> str:
    text = ""
    for _ in range(width):
        number, digit = divmod(number, 36)
        text = _DIGITS[digit] + text
    return text
