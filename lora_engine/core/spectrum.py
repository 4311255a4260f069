"""What the rank of an update really is: singular values of B A without forming the product."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def singular_values(A: Array, B: Array, scaling: float = 1.0) -> Array:
    """Singular values of scaling * B A, descending, (min(r, in, out),).

    B = Q_B R_B and A^T = Q_A R_A, so B A = Q_B (R_B R_A^T) Q_A^T and the small product carries all
    of them (Golub and Van Loan, "Matrix Computations", section 2.5)."""
    small, _, _ = _small_product(A, B)
    values = np.linalg.svd(small, compute_uv=False)
    return abs(scaling) * values[: min(A.shape[0], A.shape[1], B.shape[0])]


def effective_rank(values: Array) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for no update."""
    total = float(np.sum(values))
    if total == 0.0:
        return 0.0
    p = np.asarray(values, dtype=np.float64) / total
    p = p[p > 0]
    return float(np.exp(-np.sum(p * np.log(p))))


def energy_rank(values: Array, share: float = 0.9) -> int:
    """How many directions hold `share` of the squared Frobenius norm; 0 for no update."""
    energy = np.cumsum(np.square(np.asarray(values, dtype=np.float64)))
    if energy.size == 0 or energy[-1] == 0.0:
        return 0
    return int(np.searchsorted(energy, share * energy[-1]) + 1)


def best_rank_r(A: Array, B: Array, r: int) -> tuple[Array, Array]:
    """(A_r, B_r), the best approximation of B A at a lower rank (Eckart and Young 1936)."""
    small, Q_B, Q_A = _small_product(A, B)
    U, values, Vt = np.linalg.svd(small)
    root = np.sqrt(values[:r])
    return root[:, None] * (Vt[:r] @ Q_A.T), (Q_B @ U[:, :r]) * root


def subspace_similarity(A1: Array, A2: Array, i: int, j: int) -> float:
    """phi(A1, A2, i, j) in [0, 1]: overlap of the top-i and top-j right singular directions (LoRA, section 7.2)."""
    V1 = np.linalg.svd(A1, full_matrices=False)[2][:i]
    V2 = np.linalg.svd(A2, full_matrices=False)[2][:j]
    return float(np.sum(np.square(V1 @ V2.T)) / min(i, j))


def _small_product(A: Array, B: Array) -> tuple[Array, Array, Array]:
    Q_B, R_B = np.linalg.qr(B)
    Q_A, R_A = np.linalg.qr(A.T)
    return R_B @ R_A.T, Q_B, Q_A
