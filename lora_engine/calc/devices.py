"""Whose kernels a run will use, without torch."""

import contextlib
import ctypes
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path


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
    name = "nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1"
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(name)
        if library.nvmlInit_v2() == 0:
            count = ctypes.c_uint()
            done = library.nvmlDeviceGetCount_v2(ctypes.byref(count))
            library.nvmlShutdown()
            return count.value if done == 0 else 0
    return 0
