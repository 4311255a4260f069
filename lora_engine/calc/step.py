"""What a training step is made of, as far as bytes go: precisions, tokens, and whose kernels run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """Bytes per value: `weight` as stored, `compute` inside matrix products, `stream` between layers
    (float32 under autocast, where every half-precision product starts with a copy of its input)."""

    weight: int
    compute: int
    stream: int

    @property
    def mixed(self) -> bool:
        return self.compute != self.stream


# Packed weights are unpacked piece by piece; on the CPU in smaller pieces.
UNPACKED_AT_ONCE = 2**22


@dataclass(frozen=True)
class Step:
    """What a training step is made of, as far as bytes go."""

    widths: Widths
    tokens: int
    seq_length: int
    eager: bool
    unpacking: int = 0  # bytes a value while packed weights are unpacked; 0: they are not packed
    device: str = "cuda"  # whose kernels run: "cuda" or "cpu"
    padded: bool = False  # whether attention is given a mask of the padding, as a classifier's batches are

    def dropout_mask(self, width: int) -> int:
        """Bytes that dropout keeps of a value of `width` bytes: CUDA a flag, the CPU 0 or 1 / (1 - p) in its type."""
        return width if self.device == "cpu" else 1

    def unpacked(self, num_values: int) -> int:
        """Bytes that a packed weight of so many values takes while it is used."""
        if not self.unpacking:
            return 0
        return self.widths.compute * num_values + self.unpacking * min(num_values, UNPACKED_AT_ONCE)
