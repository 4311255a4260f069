"""Peak memory of a training step, measured: the allocator's on CUDA, live tensor bytes on the CPU."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage alive while it is active; `peak_bytes` is the most at once.

    A storage is counted when an operation first returns it and let go when it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._seen: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live_bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return out


class PeakMemory:
    """Peak bytes of the steps run inside `watch`; `kind` says what the figure means.

    "allocated": torch.cuda.max_memory_allocated, which leaves out the CUDA context.
    "tracked": bytes of all live tensors, model and optimizer state included; not the process."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.kind = "allocated" if device.type == "cuda" else "tracked"
        self.peak_bytes = 0
        self.reserved_bytes: int | None = None
        self._model, self._optimizer, self._device = model, optimizer, device

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        if self.kind == "allocated":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self._device))
            self.reserved_bytes = torch.cuda.max_memory_reserved(self._device)
            return
        mode = LiveBytes()
        for tensor in self._resident():
            mode.add(tensor)
        with mode:
            yield
        self.peak_bytes = max(self.peak_bytes, mode.peak_bytes)

    def _resident(self) -> Iterator[torch.Tensor]:
        yield from self._model.parameters()
        yield from self._model.buffers()
        for p in self._model.parameters():
            if p.grad is not None:
                yield p.grad
        for state in self._optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
