"""When memory ends."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
