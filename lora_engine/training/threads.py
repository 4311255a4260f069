"""How many threads the CPU's kernels get: every physical core that this process may use, and no more."""

import math
import os
from pathlib import Path

import psutil
import torch


def use_all_cores() -> int:
    """Set torch's threads to `count_cores` for the whole process, unless the user did by OMP_NUM_THREADS; how many.

    torch counts the machine's cores, not those of a container's quota: threads without a core of their own wait for
    each other at the end of every kernel."""
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(count_cores())
    return torch.get_num_threads()


def count_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Physical cores, at most as many as this process may run on and as its control group's quota pays for. Two threads
    on one core share its multipliers, so products gain nothing from them."""
    logical = os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    return max(1, min(physical, allowed, read_quota(quota_file) or physical))


def read_quota(path: Path) -> int | None:
    """Cores that cgroup version 2's cpu.max ("quota period" in microseconds, or "max period") pays for, rounded up."""
    try:
        quota, period = path.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or no limit
        return None
