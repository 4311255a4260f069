"""Is the worker of a run still alive?"""

import os
from pathlib import Path

import psutil

TOLERANCE_SECONDS = 0.01  # one clock tick, the resolution of psutil's create_time on Linux


def this_process() -> tuple[int, float]:
    """(pid, create_time) of the caller, as `Ledger.claim_run` takes them."""
    return os.getpid(), psutil.Process().create_time()


def is_alive(pid: int | None, create_time: float | None, identity: str | None = None) -> bool:
    """Whether the process that had `pid` and started at `create_time` (epoch seconds) still works.

    A zombie is dead; so is a stranger that was given the same pid. `identity` (`process_identity`)
    decides where it is known, because create_time moves when the system clock is set."""
    if pid is None or create_time is None:
        return False
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
        now = process_identity(pid)
        if identity is not None and now is not None:
            return identity == now
        return abs(process.create_time() - create_time) <= TOLERANCE_SECONDS
    except psutil.AccessDenied:
        return True  # somebody else's process: it is there, and more cannot be known
    except (psutil.Error, ValueError, OverflowError):
        return False


def process_identity(pid: int) -> str | None:
    """The boot, and the clock ticks after it, at which `pid` started: Linux only, else None.

    psutil's create_time adds the boot time in whole seconds, which jumps when the clock is set
    (a laptop that wakes up); these two do not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    # Field 22 of proc_pid_stat(5); counted after the name, which may hold spaces and brackets.
    return f"{boot}:{stat.rpartition(')')[2].split()[19]}"


def claimed_identity(pid: int, create_time: float) -> str | None:
    """`process_identity(pid)` if that process really is the one that started at `create_time`."""
    return process_identity(pid) if is_alive(pid, create_time) else None
