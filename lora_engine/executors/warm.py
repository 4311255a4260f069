"""A process that stays warm: it holds a run's model and answers one question after another.

The dashboard never loads torch; a fresh process for every turn of the dial would take seconds to load it."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_engine.errors import InputError, RunFailedError
from lora_engine.executors.local import LOG_FILE, QUIET_THREADS

DIALER = (sys.executable, "-P", "-m", "lora_engine.dialer")
TIMEOUT_SECONDS = 120.0


class WarmProcess:
    """Starts its process with the first question and again whenever it has ended; one question at a time.

    `command` replaces `lora_engine.dialer`; `--home HOME` is added to it. It reads one JSON object a line and answers
    with one line. It ends when this object's process does, or on `close`."""

    def __init__(
        self, home: Path | str, command: Sequence[str] | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self._home = Path(home).expanduser().absolute()
        self._command = [*(command or DIALER), "--home", str(self._home)]
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer. Raises InputError when the question is wrong, RunFailedError when there is no answer."""
        line = json.dumps(question)
        with self._lock:
            text = self._exchange(line) or self._exchange(line)  # an idle process may have gone meanwhile
        if not text:
            raise RunFailedError(f"The process behind the dial ended without an answer; see {self._home / LOG_FILE}.")
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            raise InputError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process; the next question starts another."""
        with self._lock:
            self._stop()

    def _exchange(self, line: str) -> str:
        process = self._process if self._process and self._process.poll() is None else self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        killer = threading.Timer(self._timeout_seconds, process.kill)
        killer.daemon = True
        killer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            text = process.stdout.readline()
        except OSError:
            text = ""
        finally:
            killer.cancel()
        if not text:
            self._stop()
        return text

    def _start(self) -> subprocess.Popen[str]:
        self._stop()
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = os.open(self._home / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=QUIET_THREADS | os.environ,
            )
        finally:
            os.close(log)
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it had not read yet
                    pipe.close()
