"""Cards and what fits on them."""

from dataclasses import dataclass, replace
from typing import Any

from lora_engine.calc.memory import Settings, estimate
from lora_engine.calc.structure import ModelShape
from lora_engine.config import MethodConfig

MIB = 2**20

# CUDA context, cuBLAS workspace and what the caching allocator holds beyond tensors: on every card outside
# of what `estimate_memory` counts.
RESERVED_BYTES = 800 * MIB

MAX_BATCH = 4096


@dataclass(frozen=True)
class Gpu:
    """A card; `memory_bytes` as its driver reports it, which is a little less than the box says."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class GpuFit:
    """Whether the step fits. `verdict`: "yes" when even the high end does, "tight" when only the estimate or
    the low end does, "no". `max_batch` is the largest batch whose estimate fits, 0 when none does."""

    name: str
    memory_bytes: int
    fits: bool
    max_batch: int
    verdict: str


GPUS: tuple[Gpu, ...] = tuple(
    Gpu(name, mib * MIB)
    for name, mib in (
        ("GeForce RTX 4060, 8 GB", 8188),
        ("GeForce RTX 3060, 12 GB", 12288),
        ("Tesla T4, 16 GB", 15360),
        ("GeForce RTX 4060 Ti, 16 GB", 16380),
        ("Tesla V100, 16 GB", 16384),
        ("L4, 24 GB", 23034),
        ("A10, 24 GB", 23028),
        ("GeForce RTX 3090, 24 GB", 24576),
        ("GeForce RTX 4090, 24 GB", 24564),
        ("GeForce RTX 5090, 32 GB", 32607),
        ("A100, 40 GB", 40960),
        ("L40S, 48 GB", 46068),
        ("RTX 6000 Ada, 48 GB", 49140),
        ("A100, 80 GB", 81920),
        ("H100, 80 GB", 81559),
        ("H200, 141 GB", 143771),
    )
)


def fit_gpus(shape: ModelShape, method: MethodConfig, **settings: Any) -> list[GpuFit]:
    """Each card of GPUS against `estimate_memory` with these `settings`. One card, nothing offloaded.

    Raises ConfigError, TargetError."""
    checked = Settings(**settings)
    memory = estimate(shape, method, checked)
    fits = []
    for gpu in GPUS:
        room = gpu.memory_bytes - RESERVED_BYTES
        verdict = "yes" if memory.high_bytes <= room else "tight" if memory.low_bytes <= room else "no"
        fits.append(
            GpuFit(
                gpu.name, gpu.memory_bytes, memory.peak_bytes <= room, max_batch(shape, method, checked, room), verdict
            )
        )
    return fits


def max_batch(shape: ModelShape, method: MethodConfig, settings: Settings, room_bytes: int) -> int:
    """The largest batch up to MAX_BATCH whose peak is at most `room_bytes`; 0 when even one sequence is not.

    The peak grows with the batch, so halving finds it."""

    def fits(batch: int) -> bool:
        return estimate(shape, method, replace(settings, batch_size=batch)).peak_bytes <= room_bytes

    low, high = 0, MAX_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
