"""A step on fixed buffers, captured as one CUDA graph where that is possible.

A small model's step is hundreds of kernels of a few microseconds each, and launching them takes longer than running
them. A graph launches the whole step at once: forward, backward, clipping and optimizer ("Whole-network capture" in
torch's CUDA semantics notes). What is captured may not ask the device anything and always works on the same memory.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

# Steps run one by one before the capture: libraries make their handles and workspaces, the optimizer its state.
WARM_UP_STEPS = 3
# Steps between two looks at the losses on a device that works on its own; each look waits for it.
READ_BACK_STEPS = 10

Function = Callable[..., tuple[Tensor, ...]]


class StaticStep:
    """`function(*inputs)`, from fixed buffers to small tensors on their device, called without waiting for it.

    A call copies its values into `inputs`, shape for shape, and returns copies of what the function returned. With
    `capture` the first WARM_UP_STEPS calls run on a side stream, real steps like all others; then the function is
    captured there and later calls replay it. Capturing runs nothing, so nothing is lost when it fails: `reason` says
    why, and this call and the following run without a graph. `pool` of another StaticStep shares its memory: the two
    never run at once, and keep nothing there between calls."""

    def __init__(
        self, function: Function, inputs: Sequence[Tensor], *, capture: bool, pool: "StaticStep | None" = None
    ) -> None:
        self.function, self.inputs = function, tuple(inputs)
        self.calls = 0
        self.reason: str | None = None if capture else "not asked for"
        self._device = self.inputs[0].device
        self._pool = pool
        self._graph: Any = None
        self._outputs: tuple[Tensor, ...] = ()
        self._stream: Any = None
        if capture:
            self._stream = torch.cuda.Stream(self._device) if pool is None else pool._stream

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        for buffer, value in zip(self.inputs, values, strict=True):
            buffer.copy_(value, non_blocking=True)
        if self.reason is None and not self.captured and self.calls >= WARM_UP_STEPS:
            self._capture()
        if self.captured:
            self._graph.replay()
            outputs = self._outputs
        elif self._stream is None:
            outputs = self._run()
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                outputs = self._run()
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self.calls += 1
        return tuple(output.clone() for output in outputs)

    def _run(self) -> tuple[Tensor, ...]:
        if self.calls:
            return self.function(*self.inputs)
        before = random_state(self._device)
        outputs = self.function(*self.inputs)
        if not torch.equal(before, random_state(self._device)):
            # A graph would need the seed of each step, so that a resumed run draws what the interrupted one would have.
            self.reason = "the step draws random numbers (dropout)"
        return outputs

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        outside = torch.cuda.current_stream(self._device)
        memory = self._pool._graph.pool() if self._pool is not None and self._pool.captured else None
        try:
            with torch.cuda.graph(graph, pool=memory, stream=self._stream):
                self._outputs = self.function(*self.inputs)
        except Exception as error:
            # A capture that ends badly leaves its own stream current.
            torch.cuda.set_stream(outside)
            torch.cuda.synchronize(self._device)
            self._outputs = ()
            self.reason = f"capturing failed: {' '.join(str(error).split())[:200] or type(error).__name__}"
        else:
            self._graph = graph


def random_state(device: torch.device) -> Tensor:
    """What the next random number on `device` depends on; a host tensor."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A host tensor to `device` without waiting: through pinned memory, which torch keeps until the copy is done."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


@contextlib.contextmanager
def without_device_checks() -> Iterator[None]:
    """What transformers asks the device at every step, waiting for it, and we know: whether a row holds several
    sequences (ours hold one), and whether it is padded and without an attention mask (on the right, where causal
    attention never looks)."""
    module: Any = masking_utils
    model: Any = PreTrainedModel
    find, warn = module.find_packed_sequence_indices, model.warn_if_padding_and_no_attention_mask
    module.find_packed_sequence_indices = lambda _position_ids: None
    model.warn_if_padding_and_no_attention_mask = lambda *_: None
    try:
        yield
    finally:
        module.find_packed_sequence_indices, model.warn_if_padding_and_no_attention_mask = find, warn
