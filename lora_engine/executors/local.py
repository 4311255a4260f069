"""Worker processes on this machine: detached (the default), or waited for (tests, scripts)."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

from lora_engine.runs import Ledger

# -P: a file of the working folder that happens to be called torch.py is not imported.
WORKER = (sys.executable, "-P", "-m", "lora_engine.worker")
LOG_FILE = "worker.log"

# OpenMP threads that spin for long while they wait stand still as soon as another busy program wants
# the cores: two runs at once on two cores took twenty times as long. This is GNU OpenMP's own figure
# for more threads than cores; a run that has the machine to itself is as fast.
QUIET_THREADS = {"GOMP_SPINCOUNT": "1000"}


class LocalExecutor:
    """One detached worker process for each list of runs; it outlives whoever started it.

    `command` replaces the worker's own (`WORKER`); `--home HOME RUN_ID...` is added to it. What it
    prints is appended to home/worker.log."""

    def __init__(self, home: Path | str, command: Sequence[str] | None = None) -> None:
        self._ledger = Ledger(home)
        self._command = tuple(command or WORKER)

    def submit(self, run_ids: Sequence[str]) -> None:
        """Start a worker for these runs and return at once; nothing for an empty list."""
        if run_ids:
            process = self._start(run_ids)
            # Somebody has to take note of its end, or it stays behind as a zombie.
            threading.Thread(target=process.wait, name=f"worker {process.pid}", daemon=True).start()

    def cancel(self, run_id: str) -> None:
        """Ask the run's worker to stop after its current step."""
        self._ledger.request_cancel(run_id)

    def _start(self, run_ids: Sequence[str]) -> subprocess.Popen[bytes]:
        ids = [self._ledger.run_folder(run_id).name for run_id in run_ids]  # checked: they become arguments
        command = [*self._command, "--home", str(self._ledger.home), *ids]
        log = os.open(self._ledger.home / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            process = _popen_detached(command, log)
        finally:
            os.close(log)
        try:
            create_time = psutil.Process(process.pid).create_time()
        except psutil.NoSuchProcess:
            return process  # over already
        self._ledger.assign_worker(ids, process.pid, create_time)
        return process


class InlineExecutor(LocalExecutor):
    """The same worker, waited for: when `submit` returns, the runs are over."""

    def submit(self, run_ids: Sequence[str]) -> None:
        """Do these runs."""
        if run_ids:
            self._start(run_ids).wait()


def _popen_detached(command: Sequence[str], log: int) -> subprocess.Popen[bytes]:
    """A process in a session of its own, which no closed terminal and no Ctrl-C reaches."""
    environment = QUIET_THREADS | os.environ
    if sys.platform == "win32":
        flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            close_fds=True,
            creationflags=flags,
            env=environment,
        )
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
    )
