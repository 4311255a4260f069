"""Where a pack keeps what it trains: one row of values per config, one slot per tensor."""

import math
from dataclasses import dataclass

from torch import Tensor

# Slots begin at whole cache lines, which batched products on a GPU need to read four values at once.
_ALIGNED = 16


@dataclass(frozen=True)
class Slot:
    """One trained tensor in a row of the pack: its module and name there, where it begins, its padded shape as it is
    kept, and whether that is transposed; of a `padded` one the first dimension, as it is kept, is the rank."""

    module: str
    child: str
    start: int
    shape: tuple[int, ...]
    padded: bool = False
    transposed: bool = False

    @property
    def name(self) -> str:
        """As a separate run calls it."""
        return f"{self.module}.{self.child}"

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def of_pack(self, flat: Tensor) -> Tensor:
        """This tensor of all rows of flat (N, P), a view."""
        view = flat[:, self.start : self.stop].view(len(flat), *self.shape)
        return view.transpose(1, 2) if self.transposed else view

    def of_row(self, row: Tensor, rank: int) -> Tensor:
        """This tensor, of the first `rank` ranks, of row (P,), a view."""
        view = row[self.start : self.stop].view(self.shape)
        view = view[:rank] if self.padded else view
        return view.t() if self.transposed else view


def aligned(n: int) -> int:
    """The next place where a slot may begin."""
    return -(-n // _ALIGNED) * _ALIGNED
