"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"), one function an equation.

Shapes throughout: W0 (out_features, in_features), A (r, in_features), B (out_features, r),
x (..., in_features). A worked example, in_features = 4, out_features = 3, r = 2, one row of x:

    x (1, 4) -> x A^T (1, 2) -> (x A^T) B^T (1, 3), added to x W0^T (1, 3)
"""

import math
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_engine.errors import ConfigError

Array = NDArray[Any]


def scaling_factor(r: int, lora_alpha: float, *, use_rslora: bool = False) -> float:
    """alpha / r (section 4.1), or alpha / sqrt(r) (Kalajdzievski 2023, "rsLoRA", theorem 3.2).

    Raises ConfigError when r is not positive."""
    if r < 1:
        raise ConfigError("r", r, "a whole number of at least 1")
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def init_A(r: int, in_features: int, *, seed: int, name: str = "") -> Array:
    """A ~ N(0, 1 / in_features), float32, (r, in_features).

    The paper draws A from a Gaussian and leaves its width open; 1 / in_features keeps A x at the
    size of x whatever the rank (Hayou et al. 2024, "The Impact of Initialization on LoRA
    Finetuning Dynamics", Init[A]). `name` gives every module its own stream of the same seed, so
    values do not depend on the order of injection."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return (rng.standard_normal((r, in_features)) / math.sqrt(in_features)).astype(np.float32)


def init_B(out_features: int, r: int) -> Array:
    """B = 0, float32, (out_features, r): training starts from the base model (section 4.1)."""
    return np.zeros((out_features, r), dtype=np.float32)


def delta_W(A: Array, B: Array, scaling: float) -> Array:
    """The update scaling * B A, (out_features, in_features) (section 4.1, equation 3)."""
    return scaling * (B @ A)


def forward(x: Array, W0: Array, A: Array, B: Array, scaling: float, bias: Array | None = None) -> Array:
    """h = W0 x + scaling * B A x, (..., out_features) (equation 3), without forming B A."""
    h = x @ W0.T + scaling * ((x @ A.T) @ B.T)
    return h if bias is None else h + bias


def backward(grad_h: Array, x: Array, W0: Array, A: Array, B: Array, scaling: float) -> tuple[Array, Array, Array]:
    """(grad_x, grad_A, grad_B) of `forward` for grad_h (..., out_features); W0 is frozen.

    grad_x = grad_h W0 + s (grad_h B) A,  grad_A = s (grad_h B)^T x,  grad_B = s grad_h^T (x A^T),
    sums over all rows of x."""
    g = grad_h.reshape(-1, grad_h.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    g_low = scaling * (g @ B)
    grad_x = (g @ W0 + g_low @ A).reshape(x.shape)
    grad_A = g_low.T @ rows
    grad_B = scaling * (g.T @ (rows @ A.T))
    return grad_x, grad_A, grad_B


def merge(W0: Array, A: Array, B: Array, scaling: float) -> Array:
    """W = W0 + scaling * B A (section 4.1, "No Additional Inference Latency")."""
    return W0 + delta_W(A, B, scaling).astype(W0.dtype)


def unmerge(W: Array, A: Array, B: Array, scaling: float) -> Array:
    """W - scaling * B A: W0 up to one rounding. Keep W0 where every bit matters."""
    return W - delta_W(A, B, scaling).astype(W.dtype)


def row_norms(W: Array) -> Array:
    """||W||_c, (out_features,): the length of each output's weights (Liu et al. 2024, "DoRA", section 4.1)."""
    norms: Array = np.linalg.norm(W, axis=1)
    return norms


def merge_dora(W0: Array, A: Array, B: Array, magnitude: Array, scaling: float) -> Array:
    """W = m (W0 + scaling * B A) / ||W0 + scaling * B A||_c (Liu et al. 2024, equation 5), m (out_features,).

    With m = ||W0||_c and B = 0 this is W0."""
    V = W0 + delta_W(A, B, scaling)
    return (magnitude / row_norms(V))[:, None] * V


def forward_dora(
    x: Array, W0: Array, A: Array, B: Array, magnitude: Array, scaling: float, bias: Array | None = None
) -> Array:
    """h = W x with the W of `merge_dora`, (..., out_features), without forming it but for its norms."""
    factor = magnitude / row_norms(W0 + delta_W(A, B, scaling))
    h = factor * forward(x, W0, A, B, scaling)
    return h if bias is None else h + bias
