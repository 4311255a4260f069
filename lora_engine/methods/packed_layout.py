"""Where a pack keeps what it trains: one row of values per config, one slot per tensor."""

import math
from dataclasses import dataclass

# Slots begin at whole cache lines, which batched products on a GPU need to read four values at once.
_ALIGNED = 16


@dataclass(frozen=True)
class Slot:
    """One trained tensor in a row of the pack: its module and name there, where it begins, its padded shape, and the
    dimension that is padded (None: none)."""

    module: str
    child: str
    start: int
    shape: tuple[int, ...]
    padded: int | None = None

    @property
    def name(self) -> str:
        """As a separate run calls it."""
        return f"{self.module}.{self.child}"

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


def aligned(n: int) -> int:
    """The next place where a slot may begin."""
    return -(-n // _ALIGNED) * _ALIGNED
