"""Whose kernels a run will use, without torch."""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def kernels_of(device: str) -> str:
    """ "cuda" or "cpu", as memory tells them apart, for a run's `device`; "auto" is found as the worker finds it.

    Of mps nothing is known but that its attention falls back as the CPU's does when it has to drop."""
    if device == "auto":
        return "cuda" if has_cuda() else "cpu"
    return "cuda" if device == "cuda" else "cpu"


@cache
def has_cuda() -> bool:
    """What torch.cuda.is_available() says: a torch that was built for CUDA, and a card that its driver shows."""
    return _torch_has_cuda() and _num_cards() > 0


def default_precision(device: str) -> str:
    """ "bf16" where a run's `device` is a CUDA card whose tensor cores compute in it (Ampere, compute capability 8.0,
    and later), else "fp32"."""
    return "bf16" if kernels_of(device) == "cuda" and has_cuda() and _compute_capability() >= (8, 0) else "fp32"


def _torch_has_cuda() -> bool:
    found = find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None


def _num_cards() -> int:
    """Cards that the driver's management library counts; 0 where CUDA_VISIBLE_DEVICES hides all of them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return 0
    with _nvml() as library:
        count = ctypes.c_uint()
        if library is not None and library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
            return count.value
    return 0


@cache
def _compute_capability() -> tuple[int, int]:
    """Of the driver's first card; (0, 0) where that cannot be asked."""
    with _nvml() as library:
        card, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if (
            library is not None
            and library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(card)) == 0
            and library.nvmlDeviceGetCudaComputeCapability(card, ctypes.byref(major), ctypes.byref(minor)) == 0
        ):
            return major.value, minor.value
    return 0, 0


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """The driver's management library while it is open; None where there is none."""
    library = None
    with contextlib.suppress(OSError, AttributeError):
        found = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        library = found if found.nvmlInit_v2() == 0 else None
    try:
        yield library
    finally:
        if library is not None:
            library.nvmlShutdown()
