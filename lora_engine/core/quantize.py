"""Frozen weights in 8 and 4 bits, the reference: bytes and values as bitsandbytes has them.

Shapes throughout: W (out_features, in_features) float32, n = out_features * in_features its number of values, taken
row by row. A worked example in NF4, out_features = 3, in_features = 100, so n = 300:

    W (3, 100) -> packed (150,) uint8, two values a byte, and absmax (5,) float32, one for each 64 values (the last: 44)
    absmax (5,) -> codes (5,) uint8, nested absmax (1,) float32, offset () float32        with double quantisation
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 64  # values that share a scale (Dettmers et al. 2023, "QLoRA", section 3)
NESTED_BLOCK = 256  # scales that share a scale of their own (section 3, "Double Quantization")

# Quantiles of N(0, 1) scaled into [-1, 1], with an exact zero (appendix E).
NF4_CODE = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=np.float32,
)  # fmt: skip

# bitsandbytes' library for the CPU finds an 8-bit code by way of this many evenly spaced points in [-1, 1].
GRID = 65536

# 1 / 127, as bitsandbytes multiplies by it.
INT8_STEP = np.float32(7.874015718698502e-3)


def midpoints(code: Array) -> Array:
    """What separates neighbours of a sorted `code`; a value on a midpoint goes to the lower one."""
    middle: Array = (code[:-1] + code[1:]) / np.float32(2)
    return middle


def dynamic_code() -> Array:
    """The 256 values of the signed dynamic type (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization",
    section 2.1), float32 and sorted: 7 decades, each with twice as many steps as the one below it."""
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for i in range(7):
        bounds = _linspace(0.1, 1.0, 2**i + 1)
        decade = np.float32(10.0 ** (i - 6)) * midpoints(bounds)
        values += [decade, -decade]
    return np.sort(np.concatenate(values))


def _linspace(start: float, end: float, steps: int) -> Array:
    """torch.linspace in float32: each half counts from its own end, rounding once (in fused multiply-adds)."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(steps - 1))
    i = np.arange(steps)
    return np.where(i < steps // 2, first + step * i, last - step * (steps - 1 - i)).astype(np.float32)


def quantize_nf4(W: Array) -> tuple[Array, Array]:
    """(packed, absmax): of each block the largest size, and each value over it as the nearest of NF4_CODE; the first
    of two values is the high half of a byte (section 2, equation 1, and section 3)."""
    blocks = _blocks(W, BLOCK)  # (blocks, 64)
    absmax = np.abs(blocks).max(axis=1)
    scaled = blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[:, None]
    codes = np.searchsorted(midpoints(NF4_CODE), scaled.reshape(-1)[: W.size], side="left").astype(np.uint8)
    codes = np.append(codes, np.full(W.size % 2, 7, np.uint8))  # an odd end is filled up with a zero
    return (codes[0::2] << 4) | codes[1::2], absmax


def dequantize_nf4(packed: Array, absmax: Array, shape: tuple[int, int]) -> Array:
    """W, float32, of `quantize_nf4`."""
    n = shape[0] * shape[1]
    codes = np.stack((packed >> 4, packed & 15), axis=1).reshape(-1)[:n]
    return (NF4_CODE[codes] * np.repeat(absmax, BLOCK)[:n]).reshape(shape)


def quantize_absmax(absmax: Array, offset: np.float32 | None = None) -> tuple[Array, Array, np.float32]:
    """(codes, nested absmax, offset): the scales less their mean, in 8 bits (section 3, "Double Quantization"). Whoever
    has summed them up in an order of his own gives the `offset`.

    The nearest code is that of the nearest point of GRID, as in bitsandbytes' library for the CPU; its CUDA kernels
    compare directly, which gives about one scale in 700 the neighbouring code."""
    offset = np.float32(absmax.mean(dtype=np.float64)) if offset is None else offset
    blocks = _blocks(absmax - offset, NESTED_BLOCK)
    nested = np.abs(blocks).max(axis=1)
    inverse = np.float32(1) / np.where(nested > 0, nested, np.float32(1))
    scaled = np.where(nested[:, None] > 0, blocks * inverse[:, None], np.float32(-1)).reshape(-1)[: absmax.size]
    return dynamic_slots()[_grid_index(scaled)], nested, offset


def _grid_index(scaled: Array) -> Array:
    half = np.float32((GRID - 1) / 2)
    index: Array = np.floor((scaled + np.float32(1)) * half + np.float32(0.5)).astype(np.int64)
    return index.clip(0, GRID - 1)


def dynamic_slots() -> Array:
    """For each point of GRID the index of the nearest value of `dynamic_code`, uint8."""
    points = np.arange(GRID, dtype=np.float32) / np.float32((GRID - 1) / 2) - np.float32(1)
    return np.searchsorted(midpoints(dynamic_code()), points, side="left").astype(np.uint8)


def dequantize_absmax(codes: Array, nested: Array, offset: np.float32) -> Array:
    """absmax, float32, of `quantize_absmax`."""
    values: Array = dynamic_code()[codes] * np.repeat(nested, NESTED_BLOCK)[: codes.size] + offset
    return values


def quantize_int8(W: Array) -> tuple[Array, Array]:
    """(codes int8 (out_features, in_features), absmax (out_features,)): each row in 255 even steps up to its largest
    size (Dettmers et al. 2022, "LLM.int8()", section 2.1, absmax quantisation by rows of the weight).

    The weights alone: activations stay as they are, so there are no outliers to take apart."""
    absmax = np.abs(W).max(axis=1)
    # Shares first: 127 over the size of a very small row is beyond float32.
    shares = W / np.where(absmax > 0, absmax, np.float32(1))[:, None]
    return np.rint(shares * np.float32(127)).astype(np.int8), absmax


def dequantize_int8(codes: Array, absmax: Array) -> Array:
    """W, float32, of `quantize_int8`."""
    values: Array = codes.astype(np.float32) * absmax[:, None] * INT8_STEP
    return values


def _blocks(values: Array, size: int) -> Array:
    """(blocks, size), the last one filled up with zeros."""
    flat = values.reshape(-1).astype(np.float32)
    return np.append(flat, np.zeros(-flat.size % size, np.float32)).reshape(-1, size)
